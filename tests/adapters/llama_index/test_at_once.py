"""A chat engine answers one call at a time, so that no answer that is withheld stays in its memory."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import asyncio
import pickle
from copy import copy, deepcopy
from functools import partial
from gc import collect
from threading import Event, Thread, current_thread
from threading import enumerate as enumerate_threads
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
from llama_index.callbacks.guardmw import guard_chat_engine, guard_llm
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.memory import ChatMemoryBuffer

from guardmw import Blocked, GuardmwError
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Conversation, Scores


class Slow(CustomLLM):
    """Answers the first question, harmfully, when it is let."""

    _asked: Event = PrivateAttr(default_factory=Event)
    _let: Event = PrivateAttr(default_factory=Event)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if "two" in prompt:
            return CompletionResponse(text="Fine.")
        self._asked.set()
        self._let.wait(10)
        return CompletionResponse(text="EVIL")

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await asyncio.to_thread(self.chat, messages)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        answer = self.complete(prompt).text
        yield CompletionResponse(text=answer, delta=answer)


class Yielding(KeywordBackend):
    """Judges when the event loop has gone on."""

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        await asyncio.sleep(0)
        return self.classify(conversations)


def guarded(llm: Any) -> Any:
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())
    return guard_chat_engine(engine, Yielding({"EVIL": 0.99}))


async def test_of_two_questions_at_once_the_second_is_not_asked() -> None:
    """Both begin before either is admitted; what the first has of harm is in no memory."""
    engine = guarded(llm := Slow())
    llm._let.set()
    first, second = await asyncio.gather(engine.achat("one"), engine.achat("two"), return_exceptions=True)
    assert isinstance(first, Blocked)
    assert isinstance(second, GuardmwError)
    assert "one engine for each conversation" in str(second)
    assert engine.chat_history == engine.inner.chat_history == []
    assert (await engine.achat("two")).response == "Fine."
    assert [message.content for message in engine.chat_history] == ["two", "Fine."]


@pytest.mark.parametrize(
    "interrupt",
    [
        lambda engine: engine.chat("two"),
        lambda engine: engine.stream_chat("two"),
        lambda engine: asyncio.run(engine.achat("two")),
        lambda engine: asyncio.run(engine.astream_chat("two")),
        lambda engine: engine.reset(),
    ],
    ids=["chat", "stream_chat", "achat", "astream_chat", "reset"],
)
def test_nothing_comes_between_a_question_and_its_answer(interrupt: Callable[[Any], Any]) -> None:
    """Neither from another thread; and afterwards the engine goes on."""
    engine = guarded(llm := Slow())
    raised: list[Exception] = []

    def ask() -> None:
        try:
            engine.chat("one")
        except Blocked as blocked:
            raised.append(blocked)

    asking = Thread(target=ask)
    asking.start()
    llm._asked.wait(10)
    try:
        with pytest.raises(GuardmwError, match="answering already"):
            interrupt(engine)
    finally:
        llm._let.set()
        asking.join()
    assert len(raised) == 1
    assert engine.chat_history == engine.inner.chat_history == []
    engine.reset()
    assert engine.chat("two").response == "Fine."


def test_guarded_engines_around_one_engine_take_turns() -> None:
    """They write into one memory."""
    first = guarded(llm := Slow())
    second = guard_chat_engine(first.inner, KeywordBackend({}))
    other = guarded(MockLLM())
    raised: list[Exception] = []

    def ask() -> None:
        try:
            first.chat("one")
        except Blocked as blocked:
            raised.append(blocked)

    asking = Thread(target=ask)
    asking.start()
    llm._asked.wait(10)
    try:
        with pytest.raises(GuardmwError, match="answering already"):
            second.chat("two")
        assert second.chat_history == []
        assert other.chat("two").response
    finally:
        llm._let.set()
        asking.join()
    assert len(raised) == 1
    assert second.chat("two").response == "Fine."
    assert [message.content for message in first.chat_history] == ["two", "Fine."]


# LlamaIndex reports what a chat engine's thread raises on its own, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("copied", [False, True])
def test_a_question_through_one_guard_ends_an_answer_that_is_read_through_another(copied: bool) -> None:
    """What was not judged of it is in no memory."""
    first = guarded(MockLLM())
    second = copy(first) if copied else guard_chat_engine(first.inner, KeywordBackend({}))
    answer = first.stream_chat("One. Two. Three.").response_gen
    said = next(answer)
    assert [message.content for message in second.chat_history][1:] == [said]
    assert second.chat("two").response
    with pytest.raises(GuardmwError, match="ended this answer"):
        list(answer)
    assert [message.content for message in first.chat_history][1:3] == [said, "two"]


def test_what_engines_share_ends_with_them() -> None:
    """No engine is kept alive, and none gets another's state with its id."""
    engine = guarded(MockLLM())
    kept = ref(engine.inner)
    engine.chat("one")
    del engine
    collect()
    assert kept() is None


async def test_a_call_that_is_cancelled_leaves_the_engine_free() -> None:
    """For the next question."""
    engine = guarded(llm := Slow())
    asking = asyncio.create_task(engine.achat("one"))
    await asyncio.to_thread(llm._asked.wait, 10)
    asking.cancel()
    llm._let.set()
    await asyncio.gather(asking, return_exceptions=True)
    assert asking.cancelled()
    assert (await engine.achat("two")).response == "Fine."


class Sentences(CustomLLM):
    """Says three, at once."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text="One. EVIL. Three.")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield CompletionResponse(text=(text := self.complete(prompt).text), delta=text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("way", [copy, deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])  # noqa: S301
def test_a_copy_remembers_nothing_that_nobody_has_judged(way: Callable[[Any], Any]) -> None:
    """The engine's own thread has put all of an answer into its memory already."""
    engine = guarded(Sentences())
    reading = engine.stream_chat("one")
    for thread in enumerate_threads():
        if thread is not current_thread() and thread.name.startswith("Thread-"):
            thread.join(5)
    assert "EVIL" in repr(engine.inner.chat_history)
    copied = way(engine)
    assert "EVIL" not in repr(copied.chat_history)
    if way is not copy:
        assert copied.inner.chat_history == []
        assert "EVIL" in repr(engine.inner.chat_history)
    with pytest.raises(Blocked):
        list(reading.response_gen)


class Adding(KeywordBackend):
    """While it judges, somebody writes into the list."""

    def __init__(self, messages: list[ChatMessage]) -> None:
        super().__init__({"EVIL": 0.99})
        self.messages = messages

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.messages.append(ChatMessage(content="EVIL"))
        return super().classify(conversations)


@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat", "astream_chat"])
@pytest.mark.parametrize("of", ["llm", "engine"])
async def test_what_is_added_while_a_backend_judges_is_not_asked(of: str, way: str) -> None:
    """The model reads what was judged."""
    messages = [ChatMessage(content="one")]
    model, judge = MockLLM(), Adding(messages)
    if of == "llm":
        ask = partial(getattr(guard_llm(model, judge), way), messages)
    else:
        engine = SimpleChatEngine.from_defaults(llm=model, memory=ChatMemoryBuffer.from_defaults())
        ask = partial(getattr(guard_chat_engine(engine, judge), way), "two", messages)
    answer = ask()
    answer = await answer if way.startswith("a") else answer
    if of == "engine" and way == "stream_chat":
        answer = "".join(answer.response_gen)
    elif of == "engine" and way == "astream_chat":
        answer = "".join([delta async for delta in answer.async_response_gen()])
    elif way == "stream_chat":
        answer = [str(chunk) for chunk in answer]
    elif way == "astream_chat":
        answer = [str(chunk) async for chunk in answer]
    assert len(messages) > 1
    # A mock says what it is asked.
    assert "one" in str(answer)
    assert "EVIL" not in str(answer)


def test_a_guarded_chat_engine_goes_to_another_process() -> None:
    """With its memory, and guarded there."""
    engine = guarded(MockLLM())
    engine.chat("What?")
    arrived = pickle.loads(pickle.dumps(engine))  # noqa: S301
    assert [message.content for message in arrived.chat_history] == [message.content for message in engine.chat_history]
    with pytest.raises(Blocked):
        arrived.chat("EVIL")
