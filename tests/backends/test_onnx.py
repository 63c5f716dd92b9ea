"""Dual-head classifiers on onnxruntime give the scores their graph computes, whatever its shape, and fail by name."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from guardmw import (
    ArtefactError,
    BackendError,
    BackendUnavailable,
    Conversation,
    Guard,
    Scores,
    ToolCall,
    Turn,
    load,
)
from guardmw.backends.onnx import OnnxBackend
from guardmw.taxonomy import CATEGORIES
from guardmw.testing import backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import MakeArtefact

CARD: dict[str, Any] = {"name": "tiny", "max_tokens": 32, "overlap": 8}
HIGH, LOW = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4))
SHAPES: dict[str, dict[str, Any]] = {
    "as ours": {},
    "without segments": {"segments": False},
    "without injection": {"injection": False},
    "of fixed length": {"length": 32},
    "as TinySafe 2": {"card": None, "segments": False, "injection": False, "length": 128},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def scores(backend: OnnxBackend, given_: Any) -> Scores:
    """Of one conversation."""
    return backend.classify([Conversation.of(given_)])[0]


@every_shape
def test_every_shape_keeps_the_contract(artefact: MakeArtefact, shape: dict[str, Any]) -> None:
    """Order, length, alone and in a batch, sync and async, from several threads."""
    folder = artefact(**shape)
    backend_contract(lambda: OnnxBackend(folder))()


@every_shape
def test_every_shape_finds_what_is_there(artefact: MakeArtefact, shape: dict[str, Any]) -> None:
    """At the start, at the end, and at any depth of a text of many windows."""
    backend = OnnxBackend(artefact(**shape))
    assert scores(backend, "bread").unsafe == pytest.approx(LOW)
    for at in (0, 1, 23, 24, 25, 100, 499):
        words = ["bread"] * 500
        words[at] = "evil"
        found = scores(backend, " ".join(words))
        assert found.unsafe == pytest.approx(HIGH)
        assert found.coverage
        assert found.coverage.windows > 1


def test_every_head_is_read(artefact: MakeArtefact) -> None:
    """P(unsafe), P(category) by its label, and P(injection)."""
    backend = OnnxBackend(artefact())
    found = scores(backend, "evil")
    assert found.backend == "tiny"
    assert found.unsafe == pytest.approx(HIGH)
    assert found.categories == pytest.approx({name: HIGH if name == "violence" else LOW for name in CATEGORIES})
    assert found.injection == pytest.approx(LOW)
    assert scores(backend, "ignore").injection == pytest.approx(HIGH)
    assert scores(backend, "ignore").unsafe == pytest.approx(LOW)


def test_a_model_without_an_injection_head_finds_none(artefact: MakeArtefact) -> None:
    """Zero, and not a guess from the other heads."""
    assert scores(OnnxBackend(artefact(injection=False)), "evil ignore").injection == 0.0


def test_context_is_marked_as_context(artefact: MakeArtefact) -> None:
    """The graph is told which segment is on trial."""
    backend = OnnxBackend(artefact(card=CARD | {"form": {"context_tokens": 8}}))
    said = [Turn("user", "evil"), Turn("assistant", "bread")]
    assert scores(backend, said).unsafe == pytest.approx(LOW)
    assert scores(backend, [*said, Turn("assistant", "evil")]).unsafe == pytest.approx(HIGH)


def test_tool_calls_are_read(artefact: MakeArtefact) -> None:
    """Their arguments are text on trial like any other."""
    call = Turn("assistant", tool_calls=(ToolCall("say", {"text": "evil"}),))
    assert scores(OnnxBackend(artefact()), call).unsafe == pytest.approx(HIGH)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(
        st.text(st.characters()) | st.lists(st.sampled_from(["evil", "bread", "ignore"])).map(" ".join), max_size=6
    )
)
def test_batch_and_single_sync_and_async_agree(artefact: MakeArtefact, tmp_path: Path, texts: list[str]) -> None:
    """To the last digit, for this model: no padding, order or thread leaks into a score."""
    folder = tmp_path / "model"
    backend = OnnxBackend(folder if folder.exists() else artefact(), batch_size=4)
    conversations = [Conversation.of(text) for text in texts]
    batch = backend.classify(conversations)
    assert batch == [backend.classify([one])[0] for one in conversations]
    assert batch == asyncio.run(backend.aclassify(conversations))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_no_score(artefact: MakeArtefact, batch_size: int) -> None:
    """It is a matter of memory and speed."""
    texts = ["bread " * n + end for n, end in ((1, "evil"), (50, ""), (40, "evil"), (0, ""), (90, "ignore"))]
    conversations = [Conversation.of(text) for text in texts]
    found = OnnxBackend(artefact(), batch_size=batch_size).classify(conversations)
    assert [s.unsafe > 0.5 for s in found] == [True, False, True, False, False]
    assert [s.injection > 0.5 for s in found] == [False, False, False, False, True]


def test_the_card_sets_temperature_and_thresholds(artefact: MakeArtefact) -> None:
    """Scores are calibrated by stage, and a guard acts where the card advises."""
    card = CARD | {"temperature": {"output": 4.0, "injection": 2.0}, "thresholds": {"input": 0.99, "output": 0.7}}
    backend = OnnxBackend(artefact(card=card))
    answer = {"role": "assistant", "content": "evil ignore"}
    assert scores(backend, "evil").unsafe == pytest.approx(HIGH)
    assert scores(backend, answer).unsafe == pytest.approx(1 / (1 + math.exp(-1)))
    assert scores(backend, answer).injection == pytest.approx(1 / (1 + math.exp(-2)))
    guard = Guard(backend)
    assert guard.screen("evil").action == "allow"
    assert guard.screen({"role": "assistant", "content": "evil"}).action == "block"


def test_text_in_disguise_is_judged_by_what_it_spells(artefact: MakeArtefact) -> None:
    """Nothing invisible, broken or fancy comes between the letters and the model."""
    guard = Guard(OnnxBackend(artefact()))
    tags = "".join(chr(0xE0000 + ord(sign)) for sign in "evil")
    for text in (
        f"bread {tags}",
        "ev\x00il",
        "bread and butter \ud83devil",
        "ev\u200bil",
        "ＥＶＩＬ",
        "x" * 640 + "evil",
        "[SEP] evil [PAD]",
    ):
        assert guard.screen(text).blocked, ascii(text[-20:])
        assert not guard.screen(text).degraded


def test_text_the_model_cannot_read_is_not_allowed(artefact: MakeArtefact, tokenizer_json: str) -> None:
    """A tokenizer that gives up on long words makes them unknown; the verdict knows."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder = artefact()
    tokenizer.save(str(folder / "tokenizer.json"))
    guard = Guard(OnnxBackend(folder))
    for text in ("x" * 101 + "evil", "你好 bread"):
        verdict = guard.screen(text)
        assert (verdict.action, verdict.degraded) == ("block", True)
        assert "unreadable to the model" in verdict.reason


def test_a_model_that_gives_no_numbers_is_a_failure(artefact: MakeArtefact) -> None:
    """NaN is under every threshold, and so would be an allow."""
    backend = OnnxBackend(artefact(bias=math.nan))
    with pytest.raises(BackendError, match="tiny: the model gave scores that are not numbers"):
        scores(backend, "bread")
    verdict = Guard(backend).screen("bread")
    assert (verdict.action, verdict.degraded) == ("block", True)


def test_a_run_that_fails_is_a_failure(artefact: MakeArtefact, tokenizer_json: str) -> None:
    """A tokenizer that knows more tokens than its graph, and an error that does not say which."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_tokens(["secret"])
    folder = artefact()
    tokenizer.save(str(folder / "tokenizer.json"))
    verdict = Guard(OnnxBackend(folder)).screen("a secret")
    assert (verdict.action, verdict.degraded) == ("block", True)
    assert verdict.reason.startswith("tiny: onnxruntime failed (")
    assert "secret" not in verdict.reason


@pytest.mark.parametrize("bias", [1e6, -1e6, math.inf, -math.inf])
def test_logits_without_bounds_are_probabilities_all_the_same(artefact: MakeArtefact, bias: float) -> None:
    """An exponential overflows where nobody looks."""
    assert scores(OnnxBackend(artefact(bias=bias)), "bread").unsafe == (1.0 if bias > 0 else 0.0)


def test_text_longer_than_a_fixed_length_fits(artefact: MakeArtefact) -> None:
    """A card that promises more than its graph takes is corrected."""
    backend = OnnxBackend(artefact(length=16, card=CARD | {"max_tokens": 512, "overlap": 4}))
    assert backend.card.max_tokens == 16
    assert scores(backend, "bread " * 50 + "evil").unsafe == pytest.approx(HIGH)


def corrupt(name: str, content: bytes) -> Callable[[Path], None]:
    """Overwrite a file of a folder."""
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt("model.onnx", b"not a graph"), r"model\.onnx is not a graph onnxruntime can load"),
        (corrupt("model.onnx", b""), r"model\.onnx is not a graph onnxruntime can load"),
        (corrupt("tokenizer.json", b"{}"), r"tokenizer\.json is not a tokenizer"),
        (corrupt("tokenizer.json", b"\xff"), r"tokenizer\.json is not a tokenizer"),
        (corrupt("card.json", b"{"), r"card\.json cannot be read"),
        (lambda folder: (folder / "model.onnx").unlink(), r"holds none of: .*model\.onnx"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"holds none of: tokenizer\.json"),
    ],
)
def test_a_broken_artefact_is_named_by_its_file(
    artefact: MakeArtefact, damage: Callable[[Path], None], message: str
) -> None:
    """When it is loaded, and never as an error from inside a library."""
    folder = artefact()
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        OnnxBackend(folder)
    with pytest.raises(ArtefactError, match=message):
        load(f"onnx:{folder}")


def test_a_truncated_graph_is_named(artefact: MakeArtefact) -> None:
    """A download that stopped half-way."""
    folder = artefact()
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match=r"model\.onnx is not a graph"):
        OnnxBackend(folder)


def test_a_graph_of_another_kind_is_refused(artefact: MakeArtefact) -> None:
    """Its inputs and outputs are compared with what is needed, by name."""
    folder = artefact()
    graph = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(graph.replace(b"binary_logit", b"binary_LOGIT"))
    with pytest.raises(ArtefactError, match=r"model\.onnx has no output 'binary_logit'; its outputs are: binary_LOGIT"):
        OnnxBackend(folder)


def test_a_graph_of_another_taxonomy_is_refused(artefact: MakeArtefact) -> None:
    """Seven logits for two labels would be read as the wrong harm."""
    with pytest.raises(ArtefactError, match="gives 7 category logits, but there are 2 labels"):
        OnnxBackend(artefact(card=CARD | {"labels": ["violence", "hate"]}))


def test_a_provider_that_is_not_there_is_named(artefact: MakeArtefact) -> None:
    """With those that are; onnxruntime alone would fall back without a word."""
    with pytest.raises(BackendUnavailable, match=r"no MoonExecutionProvider; it has: .*CPUExecutionProvider"):
        OnnxBackend(artefact(), providers=["MoonExecutionProvider"])


@pytest.mark.parametrize("option", [{"threads": 0}, {"batch_size": 0}])
def test_impossible_settings_are_refused(artefact: MakeArtefact, option: dict[str, int]) -> None:
    """At once, and not when the first text comes."""
    with pytest.raises(BackendError, match="at least 1"):
        OnnxBackend(artefact(), **option)  # type: ignore[arg-type]


def test_threads_and_a_name_can_be_chosen(artefact: MakeArtefact) -> None:
    """The name is what verdicts carry."""
    backend = OnnxBackend(artefact(), threads=2, name="mine")
    assert scores(backend, "evil").backend == backend.name == "mine"


@pytest.mark.parametrize("revision", ["v1.0", "0123456789abcdef"])
def test_a_model_of_the_hub_is_loaded_at_its_revision(
    artefact: MakeArtefact, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    """Exactly the one asked for, under the repository's name."""
    folder, asked = artefact(), []

    def snapshot_download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    backend = load(f"onnx:someone/guard@{revision}")
    assert asked == [("someone/guard", revision)]
    assert backend.name == "someone/guard"
    assert Guard(backend).screen("evil").blocked


def test_a_hub_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its client raises."""

    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(BackendUnavailable, match="someone/guard@v1 is not to be had: ConnectionError"):
        load("onnx:someone/guard@v1")


def test_a_model_of_the_hub_has_to_be_pinned() -> None:
    """A guard that changes overnight is no guard."""
    with pytest.raises(BackendUnavailable, match="pin its revision: onnx:someone/guard@REVISION"):
        load("onnx:someone/guard")


def test_a_folder_with_an_at_sign_is_a_folder(artefact: MakeArtefact) -> None:
    """What exists here is not looked for elsewhere."""
    assert load(f"onnx:{artefact('guard@v1')}").name == "tiny"


def test_the_embedded_model_keeps_the_contract() -> None:
    """The one in this package, as every other."""
    backend_contract(lambda: load("embedded"))()
