"""The published TinySafe folders load as they are: shown on a DeBERTa-v2 of random weights with the same files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from guardmw import ArtefactError, Conversation, Guard, load
from guardmw.backends import _artefact
from guardmw.backends._artefact import Card
from guardmw.backends._windows import Windows
from guardmw.backends.onnx import OnnxBackend
from guardmw.taxonomy import CATEGORIES
from guardmw.testing import backend_contract

if TYPE_CHECKING:
    from pathlib import Path

    import torch

WORDS = [
    "how",
    "do",
    "I",
    "bake",
    "bread",
    "knead",
    "the",
    "dough",
    "let",
    "it",
    "rest",
    "mix",
    "flour",
    "water",
    "salt",
    "and",
    "yeast",
    "then",
    "wait",
    "an",
    "hour",
    "please",
]
TEXTS = [
    "How do I bake bread?",
    " Mix flour  & salt;\nwait an hour.",
    "Ünïcödé „quotes“ ½ ①",
    "",
    "[SEP] [CLS]",
    "x" * 200,
]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with DeBERTa's special tokens in DeBERTa's places."""
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    sentences = (" ".join(WORDS[i:] + WORDS[:i]) + f" {i}?" for i in range(len(WORDS)))
    with path.open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=80,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            minloglevel=2,
        )
    return path


def tokenizer_folder(folder: Path, spm: Path) -> Path:
    """What DebertaV2Tokenizer saves."""
    folder.mkdir(parents=True)
    (folder / "spm.model").write_bytes(spm.read_bytes())
    settings = {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "split_by_punct": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, spm: Path) -> Windows:
    """What reads text with the tokenizer that a folder with an spm.model is given."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "model.onnx").touch()
    tokenizer_folder(folder / "tokenizer", spm)
    return Windows(Tokenizer.from_file(str(_artefact.read(folder).tokenizer)), Card(name="tinysafe"))


@given(st.text("bread how ½①ＥＶ你\n\t\u3000▁[](\u200b\x00é") | st.text())
def test_the_tokenizer_gives_the_tokens_the_model_learned(converted: Windows, spm: Path, text: str) -> None:
    """Those of sentencepiece itself, normalisation and all."""
    ids = SentencePieceProcessor(model_file=str(spm)).encode(text)
    (windows, _) = converted.cut([Conversation.of(text)])[0]
    # Of nothing but space there is nothing to judge; sentencepiece takes some of Unicode's for words.
    assert [id_ for window in windows for id_ in window.ids[1:-1]] == ([] if text.isspace() else ids)


def test_special_tokens_in_the_text_are_text(converted: Windows) -> None:
    """The pieces of a Unigram model include them, in fancy dress too; the text on trial does not."""
    for text in ("a [SEP] b", "[PAD][CLS]", "［ＳＥＰ］"):
        ((window,), _) = converted.cut([Conversation.of(text)])[0]
        assert (window.ids[0], window.ids[-1]) == (converted.cls, converted.sep)
        assert {converted.cls, converted.sep, converted.pad}.isdisjoint(window.ids[1:-1])


def test_the_tokenizer_is_converted_once(tmp_path: Path, spm: Path) -> None:
    """Afterwards sentencepiece is not asked again."""
    (tmp_path / "model.onnx").touch()
    slow = tokenizer_folder(tmp_path / "exported" / "tokenizer", spm) / "spm.model"
    fast = _artefact.read(tmp_path).tokenizer
    slow.write_bytes(b"no sentencepiece model")
    assert _artefact.read(tmp_path).tokenizer == fast


@pytest.mark.parametrize("content", [b"", b"no sentencepiece model"])
def test_a_broken_slow_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    """And no half-made tokenizer.json is left behind."""
    (tmp_path / "model.onnx").touch()
    (tmp_path / "spm.model").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"spm\.model cannot be converted"):
        _artefact.read(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "spm.model"]


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    """Two heads on the first token of an encoder, as in jdleo/tinysafe-1, of random weights."""
    import torch
    from transformers import DebertaV2Config, DebertaV2Model

    class DualHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = DebertaV2Config(
                vocab_size=200,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=512,
                type_vocab_size=0,
                relative_attention=True,
                position_buckets=256,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_biased_input=False,
                attn_implementation="eager",
            )
            self.encoder = DebertaV2Model(config)
            self.binary_head = torch.nn.Linear(32, 1)
            self.category_head = torch.nn.Linear(32, len(CATEGORIES))

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            first = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
            return self.binary_head(first), self.category_head(first)

    torch.manual_seed(7)
    return DualHead().eval()


def export(classifier: torch.nn.Module, path: Path, *, fixed: bool) -> None:
    """As TinySafe's export scripts do; version 2 leaves only the batch dynamic."""
    import torch

    axes = {0: "batch"} if fixed else {0: "batch", 1: "seq_len"}
    length = 512 if fixed else 16
    ids = torch.ones(1, length, dtype=torch.int64)
    torch.onnx.export(
        classifier,
        (ids, ids),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["binary_logit", "category_logits"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "binary_logit": {0: "batch"}},
        opset_version=14,
        dynamo=False,
    )
    classifier.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, spm: Path, classifier: torch.nn.Module) -> dict[int, Path]:
    """A folder of each version, with the files that its export writes."""
    folders = {}
    for version in (1, 2):
        folder = folders[version] = tmp_path_factory.mktemp(f"tinysafe-{version}")
        tokenizer_folder(folder / "exported" / "tokenizer", spm)
        export(classifier, folder / "exported" / "model.onnx", fixed=version == 2)
    config = {"max_length": 512, "binary_threshold": 0.30, "categories": list(CATEGORIES)}
    (folders[2] / "exported" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folders


versions = pytest.mark.parametrize("version", [1, 2])
# torch's exporter and transformers warn of each other's future, not of anything here.
quiet = pytest.mark.filterwarnings("ignore")


@pytest.mark.torch
@quiet
@versions
def test_scores_are_those_of_the_original(
    published: dict[int, Path], spm: Path, classifier: torch.nn.Module, version: int
) -> None:
    """Tokenised by sentencepiece and run by torch: the same ids, and so the same probabilities."""
    import torch

    slow = SentencePieceProcessor(model_file=str(spm))
    backend = OnnxBackend(published[version])
    for text in TEXTS:
        ids = torch.tensor([[1, *slow.encode(text), 2]])
        with torch.no_grad():
            unsafe, categories = (logits.sigmoid()[0].tolist() for logits in classifier(ids, torch.ones_like(ids)))
        (scores,) = backend.classify([Conversation.of(text)])
        assert scores.unsafe == pytest.approx(unsafe[0], abs=1e-5), ascii(text)
        assert list(scores.categories.values()) == pytest.approx(categories, abs=1e-5)
        assert scores.injection == 0.0


@pytest.mark.torch
@quiet
@versions
def test_it_keeps_the_contract(published: dict[int, Path], version: int) -> None:
    """As every backend."""
    backend_contract(lambda: OnnxBackend(published[version]))()


@pytest.mark.torch
@quiet
def test_each_version_acts_at_its_own_threshold(published: dict[int, Path]) -> None:
    """0.45 by the source of the first, 0.30 by the config of the second."""
    thresholds = [load(f"onnx:{published[version]}").thresholds["input"] for version in (1, 2)]  # type: ignore[attr-defined]
    assert thresholds == [0.45, 0.30]


@pytest.mark.torch
@quiet
@versions
def test_long_text_is_judged_whole(published: dict[int, Path], version: int) -> None:
    """In windows of 512 tokens, whether the graph takes others or not."""
    verdict = Guard(OnnxBackend(published[version])).screen("bread and salt " * 1000)
    assert verdict.coverage.windows > 1
    assert not verdict.degraded
