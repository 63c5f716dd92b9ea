"""What the tests share: tiny model folders, made on the spot.

Those of the dual-head shape answer what is known beforehand. Such a model reads one token at a time: a text is unsafe,
and violent, where a token is ``evil``, and an injection where one is ``ignore``. Padding that the mask does not cover,
and context that the segments do not mark, would count too. Those that write are random, for tests with torch.
"""

from __future__ import annotations

import json
import string
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# No test is timed: hypothesis would otherwise fail one that a busy machine made slow.
settings.register_profile(
    "untimed",
    parent=settings.get_profile(settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIGNS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
VOCABULARY = {
    token: id_
    for id_, token in enumerate(
        [*SPECIAL, *SIGNS, *(f"##{sign}" for sign in SIGNS), "evil", "ignore", "bread", "user", "assistant", "tool"],
    )
}
CARD: dict[str, Any] = {"name": "tiny", "max_tokens": 32, "overlap": 8}
YES, NO = 4.0, -4.0
"""Logits; 0.98 and 0.02 as probabilities."""
_TURNS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
)
# As Qwen3's, without its tools: thoughts unless told otherwise.
QWEN = (
    _TURNS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
PLAIN = _TURNS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"


class MakeArtefact(Protocol):
    """Writes a model folder and returns its path."""

    def __call__(
        self,
        name: str = "model",
        *,
        card: Mapping[str, Any] | None = CARD,
        segments: bool = True,
        injection: bool = True,
        length: int | None = None,
        bias: float = 0.0,
    ) -> Path:
        """Make one.

        Args:
            name: of the folder.
            card: None leaves card.json out.
            segments: whether the graph takes ``token_type_ids``.
            injection: whether it gives ``injection_logit``.
            length: the fixed length of its input, None for any.
            bias: added to every logit.
        """


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A WordPiece tokenizer as `guardmw train tinysafe` makes them, that knows a few words and every ASCII sign."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.FixedLength(length=64)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer.to_str()


@pytest.fixture
def artefact(tmp_path: Path, tokenizer_json: str) -> MakeArtefact:
    """Make model folders as OnnxBackend loads them."""

    def make(
        name: str = "model",
        *,
        card: Mapping[str, Any] | None = CARD,
        segments: bool = True,
        injection: bool = True,
        length: int | None = None,
        bias: float = 0.0,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        onnx.save(graph(segments=segments, injection=injection, length=length, bias=bias), folder / "model.onnx")
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        if card is not None:
            (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
        return folder

    return make


def graph(*, segments: bool, injection: bool, length: int | None, bias: float) -> onnx.ModelProto:
    """Look every token up in a table of logits, and give the highest of each column."""
    heads = {"binary_logit": [0], "injection_logit": [1], "category_logits": list(range(2, 2 + len(CATEGORIES)))}
    if not injection:
        del heads["injection_logit"]
    table = np.full((len(VOCABULARY), 2 + len(CATEGORIES)), NO, dtype=np.float32)
    table[VOCABULARY["evil"], [0, 2 + CATEGORIES.index("violence")]] = YES
    table[VOCABULARY["ignore"], 1] = YES
    table[VOCABULARY["[PAD]"]] = YES
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * segments
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"], axis=0),
        helper.make_node("Greater", ["attention_mask", "zero"], ["attended"]),
        helper.make_node("Equal", ["token_type_ids", "zero"], ["tried"])
        if segments
        else helper.make_node("Identity", ["attended"], ["tried"]),
        helper.make_node("And", ["attended", "tried"], ["read"]),
        helper.make_node("Unsqueeze", ["read", "last"], ["mask"]),
        helper.make_node("Where", ["mask", "logits", "no"], ["masked"]),
        helper.make_node("ReduceMax", ["masked"], ["highest"], axes=[1], keepdims=0),
        helper.make_node("Add", ["highest", "bias"], ["shifted"]),
        *(helper.make_node("Gather", ["shifted", f"{name}_columns"], [name], axis=1) for name in heads),
    ]
    constants = {
        "table": table,
        "zero": np.array(0, dtype=np.int64),
        "last": np.array([2], dtype=np.int64),
        "no": np.array(NO, dtype=np.float32),
        "bias": np.array(bias, dtype=np.float32),
        **{f"{name}_columns": np.array(columns, dtype=np.int64) for name, columns in heads.items()},
    }
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length or "length"]) for name in inputs],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(columns)])
            for name, columns in heads.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10  # what onnxruntime 1.20 reads
    onnx.checker.check_model(model)
    return model


def tokenizer(
    texts: Iterable[str],
    template: str | None,
    *,
    special: tuple[str, ...] = (),
    merged: tuple[str, ...] = (),
    vocabulary: int = 2000,
    **more: Any,
) -> Any:
    """Byte-level BPE that was trained on some texts, of transformers.

    Args:
        texts: to train on.
        template: of chats.
        special: tokens besides those of Qwen's turns.
        merged: tokens that it has besides what it learnt.
        vocabulary: of how many tokens, those of ``merged`` not counted.
        more: arguments of the tokenizer.
    """
    from tokenizers import decoders, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, start, end = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[pad, start, end, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_tokens([*merged])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **{"eos_token": end, "pad_token": pad, "chat_template": template} | more
    )


def writer(folder: Path, spoken: Any, kind: str = "qwen", **shape: Any) -> Path:
    """A folder with a tokenizer and a random model that writes, in the shape of Qwen3 or of Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    given = {
        "vocab_size": len(spoken),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": spoken.eos_token_id,
        "pad_token_id": spoken.pad_token_id,
    } | shape
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**given)) if kind == "qwen" else LlamaForCausalLM(LlamaConfig(**given))
    made.save_pretrained(folder)
    spoken.save_pretrained(folder)
    return folder


class Writers(NamedTuple):
    """What makes models that write, for tests, which import nothing of each other."""

    QWEN: str = QWEN
    PLAIN: str = PLAIN
    tokenizer: Any = staticmethod(tokenizer)
    make: Any = staticmethod(writer)


@pytest.fixture(scope="session")
def writers() -> Writers:
    """The parts."""
    return Writers()
