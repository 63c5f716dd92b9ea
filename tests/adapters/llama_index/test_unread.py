"""An answer that nobody reads is not remembered, and what an engine notes beside its answer is read."""

from __future__ import annotations

import asyncio
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

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

BACKEND = KeywordBackend({"EVIL": 0.99})
PIECES = ("One fine start. ", "EVIL rest.")


class Waiting(MockLLM):
    """Goes on with its first answer only when it is told to; says "fine" from then on."""

    _asked: int = PrivateAttr(default=0)
    _go: threading.Event = PrivateAttr(default_factory=threading.Event)
    _ended: threading.Event = PrivateAttr(default_factory=threading.Event)

    def _pieces(self) -> tuple[str, ...]:
        self._asked += 1
        return PIECES if self._asked == 1 else ("fine",)

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


# The engine's thread is ended by SystemExit, of which Python says nothing and pytest does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_next_question_ends_an_answer_that_nobody_reads() -> None:
    """Its thread would put all of it into the memory, behind the next one."""
    llm = Waiting()
    engine = guard_chat_engine(
        SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults()), BACKEND
    )
    engine.stream_chat("one")
    threading.Timer(0.05, llm._go.set).start()
    assert str(engine.chat("two")) == "fine"
    assert llm._ended.wait(5)
    # The engine's thread writes down what it has read after the model has ended.
    time.sleep(0.1)
    assert [message.content for message in engine.inner.chat_history] == ["two", "fine"]


def test_the_same_holds_for_asynchronous_answers() -> None:
    """Theirs is a task."""

    async def run() -> list[str | None]:
        llm = Waiting()
        engine = guard_chat_engine(
            SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults()), BACKEND
        )
        await engine.astream_chat("one")
        await asyncio.sleep(0.01)
        llm._go.set()
        answer = await engine.astream_chat("two")
        assert "".join([piece async for piece in answer.async_response_gen()]) == "fine"
        for _ in range(10):
            await asyncio.sleep(0.01)
        return [message.content for message in engine.inner.chat_history]

    assert asyncio.run(run()) == ["two", "fine"]


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
