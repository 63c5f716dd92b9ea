"""An answer that nobody reads is not remembered, and what an engine notes beside its answer is read."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import guard_chat_engine, guard_query_engine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.base.response.schema import Response
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CustomQueryEngine

from guardmw import Blocked, GuardmwError
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

BACKEND = KeywordBackend({"EVIL": 0.99})
PIECES = ("One fine start. ", "EVIL rest.")
# The engine's thread is ended by SystemExit, of which Python says nothing and pytest does.
UNHANDLED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Waiting(MockLLM):
    """Goes on with its first answer only when it is told to; says "fine" from then on."""

    _first: tuple[str, ...] = PrivateAttr(default=PIECES)
    _asked: int = PrivateAttr(default=0)
    _go: threading.Event = PrivateAttr(default_factory=threading.Event)
    _ended: threading.Event = PrivateAttr(default_factory=threading.Event)

    def _pieces(self) -> tuple[str, ...]:
        self._asked += 1
        return self._first if self._asked == 1 else ("fine",)

    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        """An answer in one piece."""
        return _chunks(self._pieces())[-1]

    def stream_chat(self, messages: Any, **kwargs: Any) -> Iterator[ChatResponse]:
        """An answer of which the end waits."""
        first = self._asked == 0
        try:
            for at, chunk in enumerate(_chunks(self._pieces())):
                if at:
                    self._go.wait(5)
                yield chunk
        finally:
            if first:
                self._ended.set()

    async def astream_chat(self, messages: Any, **kwargs: Any) -> AsyncIterator[ChatResponse]:
        """The same."""
        chunks = _chunks(self._pieces())

        async def said() -> AsyncIterator[ChatResponse]:
            for at, chunk in enumerate(chunks):
                if at:
                    await asyncio.to_thread(self._go.wait, 5)
                yield chunk

        return said()


def _chunks(pieces: tuple[str, ...]) -> list[ChatResponse]:
    texts = ["".join(pieces[: at + 1]) for at in range(len(pieces))]
    return [
        ChatResponse(message=ChatMessage(role="assistant", content=text), delta=piece)
        for text, piece in zip(texts, pieces, strict=True)
    ]


@UNHANDLED
def test_the_next_question_ends_an_answer_that_nobody_reads() -> None:
    """Its thread would put all of it into the memory, behind the next one."""
    llm = Waiting()
    engine = guard_chat_engine(
        SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults()), BACKEND
    )
    unread = engine.stream_chat("one")
    threading.Timer(0.05, llm._go.set).start()
    assert str(engine.chat("two")) == "fine"
    assert llm._ended.wait(5)
    # The engine's thread writes down what it has read after the model has ended.
    time.sleep(0.1)
    assert [message.content for message in engine.inner.chat_history] == ["two", "fine"]
    del unread


def test_the_same_holds_for_asynchronous_answers() -> None:
    """Theirs is a task."""

    async def run() -> list[str | None]:
        llm = Waiting()
        engine = guard_chat_engine(
            SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults()), BACKEND
        )
        unread = await engine.astream_chat("one")
        await asyncio.sleep(0.01)
        llm._go.set()
        answer = await engine.astream_chat("two")
        assert "".join([piece async for piece in answer.async_response_gen()]) == "fine"
        for _ in range(10):
            await asyncio.sleep(0.01)
        del unread
        return [message.content for message in engine.inner.chat_history]

    assert asyncio.run(run()) == ["two", "fine"]


def asked(llm: Waiting) -> tuple[Any, Any]:
    """A chat engine, and the same guarded."""
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())
    return engine, guard_chat_engine(engine, BACKEND)


def remembered(engine: Any) -> list[str | None]:
    """All that a chat engine has in its memory."""
    return [message.content for message in engine.chat_history]


@UNHANDLED
@pytest.mark.parametrize("model", ["speaks", "has spoken"])
@pytest.mark.parametrize("way", ["close", "drop"])
def test_an_answer_that_is_closed_before_it_is_read_is_forgotten(model: str, way: str) -> None:
    """At once, and not when the next question comes."""
    llm = Waiting()
    inner, engine = asked(llm)
    if model == "has spoken":
        llm._go.set()
    response = engine.stream_chat("one")
    if model == "has spoken":
        assert llm._ended.wait(5)
        time.sleep(0.1)
        assert remembered(inner) == ["one", "".join(PIECES)]
    else:
        threading.Timer(0.05, llm._go.set).start()
    if way == "close":
        response.response_gen.close()
    else:
        del response
    assert llm._ended.is_set()
    assert remembered(inner) == []


@pytest.mark.parametrize("model", ["speaks", "has spoken"])
@pytest.mark.parametrize("way", ["close", "drop"])
async def test_an_asynchronous_one_is_forgotten_too(model: str, way: str) -> None:
    """By a task of the event loop's, where it is dropped."""
    llm = Waiting()
    inner, engine = asked(llm)
    if model == "has spoken":
        llm._go.set()
    response = await engine.astream_chat("one")
    await asyncio.sleep(0.1)
    if model == "has spoken":
        assert remembered(inner) == ["one", "".join(PIECES)]
    if way == "close":
        await response.async_response_gen().aclose()
    else:
        del response
        gc.collect()
        await asyncio.sleep(0.1)
    llm._go.set()
    await asyncio.sleep(0.1)
    assert remembered(inner) == []


@UNHANDLED
def test_of_an_answer_that_is_closed_what_was_read_is_remembered() -> None:
    """As the user has seen it."""
    llm = Waiting()
    inner, engine = asked(llm)
    text = engine.stream_chat("one").response_gen
    assert next(text) == PIECES[0]
    threading.Timer(0.05, llm._go.set).start()
    text.close()
    assert remembered(inner) == remembered(engine) == ["one", PIECES[0]]


def test_to_look_at_an_answer_or_to_leave_off_does_not_end_it() -> None:
    """It goes on where it was."""
    llm = Waiting()
    llm._first = ("One. ", "Two. ", "Three.")
    llm._go.set()
    inner, engine = asked(llm)
    response = engine.stream_chat("one")
    assert hasattr(response, "response_gen")
    read = [next(response.response_gen)]
    gc.collect()
    read += response.response_gen
    assert read == ["One. ", "Two. ", "Three."]
    assert remembered(inner) == ["one", "One. Two. Three."]


ENDS: dict[str, Callable[[Any], Any]] = {
    "the next question": lambda engine: engine.chat("two"),
    "a question with a history of its own": lambda engine: engine.chat("two", chat_history=[]),
    "a question whose answer streams": lambda engine: list(engine.stream_chat("two").response_gen),
    "an asynchronous question": lambda engine: asyncio.run(engine.achat("two")),
    "a reset": lambda engine: engine.reset(),
}


@UNHANDLED
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("begun", [False, True])
def test_whoever_reads_on_in_an_answer_that_was_ended_is_told(end: str, begun: bool) -> None:
    """Half of it must not pass for all of it; and the memory stays as it has become since."""
    llm = Waiting()
    inner, engine = asked(llm)
    text = engine.stream_chat("one").response_gen
    seen = [next(text)] if begun else []
    threading.Timer(0.05, llm._go.set).start()
    ENDS[end](engine)
    after = remembered(inner)
    said = [] if not begun or "history" in end or end == "a reset" else ["one", PIECES[0]]
    assert after == said + ([] if end == "a reset" else ["two", "fine"])
    with pytest.raises(GuardmwError, match="ended this answer"):
        seen += text
    assert "".join(seen) in PIECES[0]
    del text
    assert remembered(inner) == remembered(engine) == after


@pytest.mark.parametrize("waits", [False, True])
async def test_so_is_an_asynchronous_reader(waits: bool) -> None:
    """One that waits for the next piece, too."""
    llm = Waiting()
    inner, engine = asked(llm)
    text = (await engine.astream_chat("one")).async_response_gen()
    seen = [await anext(text)]

    async def go_on() -> None:
        seen.extend([piece async for piece in text])

    reading = asyncio.create_task(go_on()) if waits else None
    await asyncio.sleep(0.05)
    await engine.achat("two")
    with pytest.raises(GuardmwError, match="ended this answer"):
        await (reading or go_on())
    assert seen == [PIECES[0]]
    llm._go.set()
    assert remembered(inner) == ["one", PIECES[0], "two", "fine"]


class Noting(CustomQueryEngine):
    """Answers as engines over databases do."""

    rows: str

    def custom_query(self, query_str: str) -> Response:  # type: ignore[override] # the base says str or response
        """A harmless answer, with what it was made of."""
        return Response(f"About {query_str}.", metadata={"sql_query": "SELECT *", "result": [(1, self.rows)]})


def test_what_an_engine_notes_beside_its_nodes_is_judged() -> None:
    """Callers show it, and hand it on."""
    assert str(guard_query_engine(Noting(rows="oats"), BACKEND).query("horses")) == "About horses."
    with pytest.raises(Blocked):
        guard_query_engine(Noting(rows="EVIL"), BACKEND).query("horses")
    with pytest.raises(Blocked):
        asyncio.run(guard_query_engine(Noting(rows="EVIL"), BACKEND).aquery("horses"))
