"""What vLLM is asked in this process, and how its answers are read, with a stand-in for it."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import BackendError, BackendUnavailable, Conversation, dialects
from guardmw.backends import _rounds
from guardmw.dialects import Message, Reply, Request
from guardmw.errors import ArtefactError
from guardmw.testing import backend_contract
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 2_000


class Letters:
    """A tokenizer of letters, with a chat template."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """As the real one is called."""
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any) -> str:
        """As the real one is called."""
        assert not tokenize
        assert add_generation_prompt
        if "fail" in more:
            raise ValueError(messages[0]["content"])
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


class Engine:
    """Says unsafe where it reads EVIL."""

    def __init__(self, model: str, **options: Any) -> None:
        if model == "broken":
            raise OSError("no such file")
        self.options = options
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=CONTEXT))
        self.batches: list[list[str]] = []
        self.ended = "stop"
        self.failing = False

    def get_tokenizer(self) -> Letters:
        """Of the model."""
        return Letters()

    def generate(self, prompts: list[dict[str, list[int]]], settings: list[Any], *, use_tqdm: bool) -> list[Any]:
        """As the real one is called."""
        assert not use_tqdm
        assert len(prompts) == len(settings)
        assert all(
            len(one["prompt_token_ids"]) + s.max_tokens <= CONTEXT for one, s in zip(prompts, settings, strict=True)
        )
        texts = ["".join(map(chr, one["prompt_token_ids"])) for one in prompts]
        if self.failing:
            raise RuntimeError(texts[0])
        self.batches.append(texts)
        return [self._output("EVIL" in text, one.logprobs) for text, one in zip(texts, settings, strict=True)]

    def _output(self, evil: bool, logprobs: int | None) -> Any:
        # By rank, and the chosen one need not be the first of the mapping.
        found = {
            8: SimpleNamespace(logprob=-0.1 if not evil else -3.0, decoded_token="safe"),  # noqa: S106 - no password
            9: SimpleNamespace(logprob=-0.1 if evil else -3.0, decoded_token="unsafe"),  # noqa: S106 - no password
        }
        told = [found] if logprobs else None
        text = "unsafe" if evil else "safe"
        return SimpleNamespace(
            outputs=[SimpleNamespace(text=text, token_ids=[9 if evil else 8], logprobs=told, finish_reason=self.ended)]
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on the stand-in."""
    fake = ModuleType("vllm")
    fake.LLM = Engine  # type: ignore[attr-defined]
    fake.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delitem(sys.modules, "guardmw.backends.engine", raising=False)
    module = importlib.import_module("guardmw.backends.engine")
    yield module
    sys.modules.pop("guardmw.backends.engine", None)


def test_the_contract(engine: Any, fake: Any) -> None:
    """As every backend keeps it."""
    backend_contract(lambda: engine.EngineBackend("m", dialect=fake.OneWord()))()


def test_a_batch_is_asked_at_once(engine: Any, fake: Any) -> None:
    """Rendered by the model's own template, the beginning of the answer behind it."""
    backend = engine.EngineBackend("m", dialect=fake.OneWord(prefill='{"'), options={"quantization": "fp8"})
    scores = backend.classify([Conversation.of("good"), Conversation.of("EVIL")])
    assert [one.unsafe > 0.5 for one in scores] == [False, True]
    assert {one.backend for one in scores} == {"m"}
    assert backend._engine.batches == [[f'[user]Is this safe?\n{word}[assistant]{{"' for word in ("good", "EVIL")]]
    assert backend._engine.options == {"quantization": "fp8"}


def test_a_long_text_is_judged_in_pieces(engine: Any, fake: Any) -> None:
    """All of it, wherever the evil is."""
    backend = engine.EngineBackend("m", dialect=fake.OneWord())
    for place in (0, 1_990, 2_500, 4_996):
        text = "x" * place + "EVIL" + "y" * (4_996 - place)
        [scores] = backend.classify([Conversation.of(text)])
        assert scores.unsafe > 0.5
        assert scores.coverage.judged == scores.coverage.characters == 5_000
        assert scores.coverage.windows == 4


@pytest.mark.parametrize("ended", ["abort", None, "error"])
def test_an_answer_that_was_broken_off_is_none(engine: Any, fake: Any, ended: str | None) -> None:
    """Not even where it can be read."""
    backend = engine.EngineBackend("m", dialect=fake.OneWord())
    backend._engine.ended = ended
    with pytest.raises(BackendError, match="broke an answer off"):
        backend.classify([Conversation.of("good")])


def test_a_failure_quotes_nothing(engine: Any, fake: Any) -> None:
    """Neither vLLM's nor the template's."""
    backend = engine.EngineBackend("m", dialect=fake.OneWord())
    backend._engine.failing = True
    failing = engine.EngineBackend("m", dialect=fake.OneWord(template={"fail": True}))
    for one in (backend, failing):
        with pytest.raises(BackendError) as caught:
            one.classify([Conversation.of("a secret")])
        assert "secret" not in str(caught.value)
        assert caught.value.__context__ is None


def test_a_model_that_cannot_be_loaded_is_named(engine: Any, fake: Any) -> None:
    """With what vLLM says of it, which tells what to set."""
    with pytest.raises(ArtefactError, match="broken cannot be loaded by vLLM: OSError: no such file"):
        engine.EngineBackend("broken", dialect=fake.OneWord())


def test_a_folder_goes_by_its_name(engine: Any, fake: Any, tmp_path: Any) -> None:
    """Where it lies stays out of verdicts."""
    assert engine.EngineBackend(f"{tmp_path}/", dialect=fake.OneWord()).name == tmp_path.name


def test_a_spec_names_model_and_dialect(engine: Any, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no option that is not known."""
    monkeypatch.setattr(dialects, "named", lambda name: fake.OneWord(), raising=False)
    assert engine.from_spec("acme/Guard-1?dialect=one-word").name == "acme/Guard-1"
    with pytest.raises(BackendError, match="did you mean 'dialect'"):
        engine.from_spec("acme/Guard-1?dialekt=one-word")


def test_a_dialect_left_empty_is_none(engine: Any) -> None:
    """The model's name does not stand in for it, as nobody asked for that."""
    with pytest.raises(BackendUnavailable, match="unknown dialect ''"):
        engine.from_spec("acme/miniguard?dialect=")


class Twice:
    """Asks one question, and another where the answer to the first is yes."""

    name = "twice"

    def judge(self, conversation: Conversation) -> dialects.Judging:
        """In two rounds, or one."""
        [reply] = yield [Request((Message("user", conversation.trial),))]
        if reply.text != "yes":
            return Scores(0.0)
        told = yield [Request((Message("user", word),)) for word in ("a", "b")]
        return Scores(0.5 if [one.text for one in told] == ["A", "B"] else 1.0)


def test_conversations_go_on_in_rounds() -> None:
    """Each as long as it has questions, and every round is one batch."""
    rounds = []

    def answer(requests: Sequence[Request]) -> list[Reply | None]:
        words = [request.messages[0].content for request in requests]
        rounds.append(words)
        return [Reply("yes" if word == "go on" else word.upper()) for word in words]

    given = [Conversation.of(text) for text in ("stop", "go on", "go on")]
    scores = _rounds.scores("m", Twice(), given, answer)
    assert [one.unsafe for one in scores] == [0.0, 0.5, 0.5]
    assert rounds == [["stop", "go on", "go on"], ["a", "b", "a", "b"]]


@pytest.mark.parametrize("wrong", [ValueError("a secret"), BackendError("it cannot be read"), None])
def test_what_a_dialect_does_wrong_is_a_failure(wrong: Exception | None) -> None:
    """Of which only a BackendError is quoted."""

    class Wrong:
        name = "wrong"

        def judge(self, conversation: Conversation) -> Any:
            yield [Request((Message("user", "x"),))]
            if wrong:
                raise wrong
            return math.nan

    with pytest.raises(BackendError) as caught:
        _rounds.scores("m", Wrong(), [Conversation.of("x")], lambda requests: [Reply("") for _ in requests])
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


def test_what_is_too_long_even_in_pieces_is_a_failure() -> None:
    """And not a safe text."""
    with pytest.raises(BackendError, match="even in pieces"):
        _rounds.scores("m", Twice(), [Conversation.of("x" * 9_000)], lambda requests: [None] * len(requests))
