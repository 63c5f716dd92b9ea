"""Models on transformers are asked in a dialect or read by their labels; both are tiny, random and made on the spot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import BackendError, BackendUnavailable, Conversation, dialects
from guardmw.dialects import Message, Reply, Request
from guardmw.errors import ArtefactError
from guardmw.testing import backend_contract
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from pathlib import Path

    from guardmw.conversation import Conversation as Given

pytestmark = pytest.mark.torch

WORDS = "is this text safe or unsafe evil good bread how do i bake"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ extra if extra is defined else '' }}"
)


def tokenizer(writers: Any, **more: Any) -> Any:
    """With a template of its own."""
    special = ("<unk>", "<|end|>", "<|user|>", "<|assistant|>")
    signs = {"eos_token": "<|end|>", "unk_token": "<unk>"}
    return writers.tokenizer([WORDS] * 9, TEMPLATE, special=special, vocabulary=330, **signs, **more)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from more, and wait for them on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, writers: Any) -> Path:
    """A model that writes, and does not only repeat its last token, as random ones of tied embeddings do."""
    folder = tmp_path_factory.mktemp("models") / "writer"
    made: Path = writers.make(folder, tokenizer(writers), "llama", tie_word_embeddings=False)
    return made


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, writers: Any) -> Path:
    """A classifier of two labels."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "acme-prompt-guard-2"
    words = tokenizer(writers, model_max_length=64)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        initializer_range=1.0,
        num_labels=2,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


class First:
    """Scores by how likely the first token of the answer is, and remembers replies."""

    name = "first"

    def __init__(self, **changed: Any) -> None:
        self.changed: dict[str, Any] = {"max_tokens": 3, "top_logprobs": 5} | changed
        self.replies: list[Reply] = []

    def judge(self, conversation: Given) -> dialects.Judging:
        """Ask twice."""
        one = Request((Message("user", conversation.trial),), **self.changed)
        other = Request((Message("user", "how " + conversation.trial),), **self.changed | {"max_tokens": 1})
        replies = yield [one, other]
        self.replies += replies
        return Scores(math.exp(replies[0].tokens[0].logprob) if replies[0].tokens else 0.5)


def generative(folder: Path, dialect: Any, **changed: Any) -> Any:
    """A backend that writes its verdict."""
    from guardmw.backends.transformers import GenerativeBackend

    return GenerativeBackend(str(folder), dialect=dialect, device="cpu", **changed)


def classifier(folder: Path, **changed: Any) -> Any:
    """A backend with labels."""
    from guardmw.backends.transformers import ClassifierBackend

    return ClassifierBackend(str(folder), device="cpu", **changed)


def test_a_writing_model_keeps_the_contract(writer: Path) -> None:
    """Alone and in a batch, from several threads."""
    backend_contract(lambda: generative(writer, First()))()


@pytest.mark.parametrize(
    "case",
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", True, "float32"),
        ("float32", True, "float32"),
    ],
    ids=str,
)
def test_a_cpu_computes_in_what_it_has_instructions_for(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, bool, str]
) -> None:
    """Bfloat16 where it knows it and the weights are of it, else float32."""
    import torch
    import transformers

    from guardmw.backends.transformers import GenerativeBackend

    stored, known, computes = case
    model = transformers.AutoModelForCausalLM.from_pretrained(writer).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(writer).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: known)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    made = GenerativeBackend(str(tmp_path), dialect="nemotron", device="cpu")
    assert made._loaded.model.dtype == getattr(torch, computes)


def test_a_classifier_keeps_the_contract(reader: Path) -> None:
    """The same."""
    backend_contract(lambda: classifier(reader))()


@pytest.mark.parametrize("prefill", ["", "unsafe"])
def test_logprobs_are_those_of_the_model(writer: Path, prefill: str) -> None:
    """Of the tokens that follow its own template and the beginning of the answer."""
    import torch
    import transformers

    dialect = First(prefill=prefill, template={"extra": "!"})
    scored = generative(writer, dialect, name="mine").classify([Conversation.of("bread")])
    words = transformers.AutoTokenizer.from_pretrained(writer)
    model = transformers.AutoModelForCausalLM.from_pretrained(writer)
    ids = words(f"<|user|>bread<|end|><|assistant|>!{prefill}", add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(**ids).logits[0, -1], dim=-1)
    first = dialect.replies[0].tokens[0]
    assert first.logprob == pytest.approx(logprobs.max().item(), abs=1e-3)
    assert first.text == words.decode([int(logprobs.argmax())])
    assert first.alternatives[first.text] == first.logprob
    assert 1 <= len(first.alternatives) <= 5
    assert [len(reply.tokens) for reply in dialect.replies] == [3, 1]
    assert dialect.replies[0].cut
    assert scored[0].backend == "mine"


def test_an_answer_ends_with_the_token_that_ends_it(writer: Path) -> None:
    """Which is none of its tokens."""
    backend = generative(writer, dialect := First(max_tokens=8))
    [before] = backend.classify([Conversation.of("bread")])
    whole = dialect.replies[0]
    words, model = backend._loaded.tokenizer, backend._loaded.model
    ids = words("<|user|>bread<|end|><|assistant|>", add_special_tokens=False, return_tensors="pt")
    object.__setattr__(
        backend._loaded, "ends", model.generate(**ids, max_new_tokens=3, do_sample=False)[0, -1:].tolist()
    )
    [after] = backend.classify([Conversation.of("bread")])
    ended = dialect.replies[2]
    assert before == after
    assert (whole.cut, ended.cut) == (True, False)
    assert whole.tokens[: len(ended.tokens)] == ended.tokens
    assert len(ended.tokens) <= 2


def test_no_logprobs_are_told_where_none_are_asked_for(writer: Path) -> None:
    """The answer comes all the same."""
    dialect = First(top_logprobs=0)
    generative(writer, dialect).classify([Conversation.of("bread")])
    assert dialect.replies[0].tokens == ()


def test_a_long_text_is_judged_in_pieces(writer: Path) -> None:
    """All of it."""
    [scores] = generative(writer, First()).classify([Conversation.of("bread zq" * 600)])
    assert scores.coverage is not None
    assert scores.coverage.judged == scores.coverage.characters == 4_800
    assert scores.coverage.windows > 1


def test_a_template_that_does_not_take_the_messages_is_a_failure(writer: Path, tmp_path: Path) -> None:
    """Whatever it raises, and nothing of the text is told."""
    backend = generative(writer, First())
    backend._loaded.tokenizer.chat_template = "{{ raise_exception(messages[0].content) }}"
    with pytest.raises(BackendError, match="chat template does not take") as caught:
        backend.classify([Conversation.of("a secret")])
    assert "secret" not in str(caught.value)


def test_known_labels_are_read(reader: Path) -> None:
    """Prompt Guard 2 tells injections."""
    import torch
    import transformers

    [scores] = classifier(reader).classify([Conversation.of("how do i bake bread")])
    words = transformers.AutoTokenizer.from_pretrained(reader)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reader)
    with torch.inference_mode():
        told = torch.softmax(model(**words("how do i bake bread", return_tensors="pt")).logits[0], dim=-1).tolist()
    assert scores.injection == pytest.approx(told[1], abs=1e-4)
    assert scores.unsafe == pytest.approx(told[1], abs=1e-4)
    assert scores.backend == "acme-prompt-guard-2"


def test_labels_may_be_given(reader: Path) -> None:
    """A category among them."""
    backend = classifier(reader, labels={"LABEL_0": "violence", "LABEL_1": "safe"})
    [scores] = backend.classify([Conversation.of("bread")])
    assert scores.categories["violence"] == pytest.approx(scores.unsafe, abs=1e-6)
    assert scores.injection == 0.0


@pytest.mark.parametrize(
    "labels",
    [{"LABEL_0": "safe"}, {"LABEL_0": "safe", "LABEL_1": "injektion"}, {"LABEL_0": "unsafe", "LABEL_1": "unsafe"}],
)
def test_every_label_stands_for_something_known(reader: Path, labels: dict[str, str]) -> None:
    """And one for safe."""
    with pytest.raises(BackendError, match="label"):
        classifier(reader, labels=labels)


def test_the_worst_window_counts(reader: Path) -> None:
    """And all are read."""
    backend = classifier(reader)
    text = "bread " * 20 + "evil " * 40 + "good " * 60
    [whole, *parts] = backend.classify(
        [Conversation.of(text), *(Conversation.of(word * 10) for word in ("bread ", "evil ", "good "))]
    )
    assert whole.coverage is not None
    assert whole.coverage.windows > 2
    assert whole.coverage.judged == len(text)
    assert whole.unsafe >= min(part.unsafe for part in parts)


def test_signs_of_the_tokenizer_are_text(reader: Path) -> None:
    """Where a user writes them."""
    backend = classifier(reader)
    [ids], _ = backend._windows("<|end|>")
    assert len(ids) > 3


def test_a_spec_says_what_it_is(reader: Path, writer: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own settings tell which of the two."""
    from guardmw.backends.transformers import ClassifierBackend, GenerativeBackend, from_spec

    monkeypatch.setattr(dialects, "named", lambda name: First(), raising=False)
    assert isinstance(from_spec(f"{reader}?device=cpu&labels=LABEL_0:safe,LABEL_1:unsafe"), ClassifierBackend)
    assert isinstance(from_spec(f"{writer}?dialect=first&device=cpu"), GenerativeBackend)


def test_a_dialect_left_empty_is_none(writer: Path) -> None:
    """What card or name tell does not stand in for it, as nobody asked for that."""
    from guardmw.backends.transformers import from_spec

    with pytest.raises(BackendUnavailable, match="unknown dialect ''"):
        from_spec(f"{writer}?dialect=&device=cpu")


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("acme/guard", BackendUnavailable),
        ("?", BackendError),
        ("x?dialekt=y", BackendError),
        ("{folder}?batch_size=many", BackendError),
        ("{folder}?labels=x", BackendError),
        ("{folder}", ArtefactError),
    ],
)
def test_a_spec_that_is_not_valid_is_refused(tmp_path: Path, spec: str, error: type[Exception]) -> None:
    """By name."""
    from guardmw.backends.transformers import from_spec

    with pytest.raises(error):
        from_spec(spec.format(folder=tmp_path))
