"""An agent with both middlewares whose reader goes away: nothing unjudged is out, and nothing goes on behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langchain_guardmw import GuardMiddleware, ToolGuardMiddleware
from langchain_guardmw.upstream import Ahead
from langgraph.graph import START, MessagesState, StateGraph

from guardmw import Conversation, Guard, Scores
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

OPENING = "The first sentence is harmless. "
GIVEN = {"messages": [("user", "Hello.")]}
CALL: Any = {"name": "note", "args": '{"text": "a SECRET"}', "id": "1", "index": 0}
# How much a model says at most that nobody stops.
ENOUGH = 300


class Backend(KeywordBackend):
    """Finds everything harmless; where it reads this word, it waits until it is told to go on, or cancelled."""

    def __init__(self, word: str = "") -> None:
        super().__init__({"EVIL": 0.99})
        self.word = word
        self.reached, self.cancelled = asyncio.Event(), 0
        self.thread_reached, self.go = threading.Event(), threading.Event()
        self.read: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """All is well."""
        if self._waits(conversations):
            self.thread_reached.set()
            assert self.go.wait(30)
        self.read += [one.trial for one in conversations]
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same."""
        await asyncio.sleep(0)
        if self._waits(conversations):
            self.reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        self.read += [one.trial for one in conversations]
        return super().classify(conversations)

    def _waits(self, conversations: Sequence[Conversation]) -> bool:
        return bool(self.word) and any(self.word in one.trial for one in conversations)


class Talker(BaseChatModel):
    """Says a sentence and then goes on, in text or towards a call; knows how often it was asked and left off."""

    calls: bool = False
    said: int = 0
    running: int = 0
    finished: int = 0

    @property
    def _llm_type(self) -> str:
        return "talker"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        return self.bind()

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        # An outer model that nobody streams.
        return ChatResult(generations=[ChatGeneration(message=AIMessage(OPENING))])

    def _chunks(self, messages: list[BaseMessage]) -> Iterator[AIMessageChunk]:
        yield AIMessageChunk(content=OPENING)
        yield AIMessageChunk(content="Then ")
        if self.calls and not isinstance(messages[-1], ToolMessage):
            yield AIMessageChunk(content="", tool_call_chunks=[CALL])
            return
        for _ in range(ENOUGH):
            yield AIMessageChunk(content="comes a SECRET ")

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self.running += 1
        try:
            for chunk in self._chunks(messages):
                self.said += 1
                yield ChatGenerationChunk(message=chunk)
            self.finished += 1
        finally:
            self.running -= 1

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        self.running += 1
        try:
            for chunk in self._chunks(messages):
                self.said += 1
                await asyncio.sleep(0)
                yield ChatGenerationChunk(message=chunk)
            self.finished += 1
        finally:
            self.running -= 1


NOTED: list[str] = []


@tool
def note(text: str) -> str:
    """Note something."""
    NOTED.append(text)
    return "Noted."


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    NOTED.clear()


def graph_of(model: Talker, backend: Backend, *, outer: bool) -> Any:
    """An agent with both middlewares, alone or as a node of another graph."""
    judge = Guard(backend)
    agent: Any = create_agent(model, [note], middleware=[ToolGuardMiddleware(judge), GuardMiddleware(judge)])
    if not outer:
        return agent
    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_edge(START, "agent")
    return graph.compile()


async def amessages(graph: Any) -> AsyncIterator[Any]:
    """What a chat shows."""
    async with aclosing(graph.astream(GIVEN, stream_mode="messages", subgraphs=True)) as shown:
        async for one in shown:
            yield one


async def aall(graph: Any) -> AsyncIterator[Any]:
    """All that a graph streams."""
    modes = ["messages", "updates", "values"]
    async with aclosing(graph.astream(GIVEN, stream_mode=modes, subgraphs=True)) as shown:
        async for one in shown:
            yield one


async def aevents(graph: Any) -> AsyncIterator[Any]:
    """All that happens."""
    async with aclosing(graph.astream_events(GIVEN, version="v2")) as shown:
        async for one in shown:
            yield one


Read = Callable[[Any], AsyncIterator[Any]]
EVERY_READER = pytest.mark.parametrize("read", [amessages, aall, aevents])
EVERY_GRAPH = pytest.mark.parametrize("outer", [False, True], ids=["agent", "subgraph"])


async def at_rest() -> None:
    """Let everything end that was told to."""
    for _ in range(20):
        await asyncio.sleep(0)


def unjudged(shown: list[Any], backend: Backend) -> bool:
    """Whether something is out that the backend has not read."""
    return "SECRET" in repr(shown) and not any("SECRET" in one for one in backend.read)


async def cancelled_in_classification(read: Read, *, outer: bool, calls: bool) -> None:
    """Cancel a reader while the second piece of an answer, or its call, is being judged."""
    model, backend, shown = Talker(calls=calls), Backend("SECRET"), list[Any]()
    graph = graph_of(model, backend, outer=outer)
    before, threads, arrived = asyncio.all_tasks(), threading.active_count(), asyncio.Event()

    async def consume() -> None:
        async with aclosing(read(graph)) as reading:  # type: ignore[type-var] # a generator
            async for one in reading:
                shown.append(one)
                if OPENING.strip() in repr(one):
                    arrived.set()

    reading = asyncio.create_task(consume())
    await backend.reached.wait()
    # What has been judged has to arrive, or nothing is tested.
    await arrived.wait()
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    assert reading.cancelled()
    await at_rest()
    assert not unjudged(shown, backend)
    assert backend.cancelled == 1
    assert (model.running, NOTED) == (0, [])
    assert asyncio.all_tasks() == before
    assert threading.active_count() <= threads


async def closed_in_mid_stream(read: Read, *, outer: bool) -> None:
    """Close a stream when it has shown something, while the model goes on."""
    model, backend, shown = Talker(), Backend(), list[Any]()
    graph = graph_of(model, backend, outer=outer)
    before, threads = asyncio.all_tasks(), threading.active_count()
    async with aclosing(read(graph)) as reading:  # type: ignore[type-var] # a generator
        async for one in reading:
            shown.append(one)
            if OPENING.strip() in repr(shown):
                break
    await at_rest()
    said, judged = model.said, len(backend.read)
    await at_rest()
    assert (model.running, model.finished) == (0, 0)
    assert (model.said, len(backend.read)) == (said, judged)
    assert not unjudged(shown, backend)
    assert asyncio.all_tasks() == before
    assert threading.active_count() <= threads


@EVERY_READER
@EVERY_GRAPH
@pytest.mark.parametrize("calls", [False, True], ids=["text", "call"])
async def test_a_reader_who_is_cancelled_while_the_backend_reads(read: Read, outer: bool, calls: bool) -> None:
    """The backend's call is cancelled, the model left off, and no task or thread remains."""
    await cancelled_in_classification(read, outer=outer, calls=calls)


@EVERY_READER
@EVERY_GRAPH
async def test_a_reader_who_goes_away_in_mid_stream(read: Read, outer: bool) -> None:
    """The model says no more, and nobody judges what nobody reads."""
    await closed_in_mid_stream(read, outer=outer)


@EVERY_GRAPH
async def test_the_checks_notice_a_guard_that_leaks(outer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    with pytest.raises(AssertionError):
        await cancelled_in_classification(amessages, outer=outer, calls=False)


@EVERY_GRAPH
@pytest.mark.parametrize("check", [cancelled_in_classification, closed_in_mid_stream])
async def test_the_checks_notice_a_guard_that_leaves_tasks_behind(
    check: Any, outer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not stop the model that it reads."""
    left: list[Ahead] = []

    async def leave(ahead: Ahead) -> None:
        left.append(ahead)

    close = Ahead.aclose
    monkeypatch.setattr(Ahead, "aclose", leave)
    options = {"calls": False} if check is cancelled_in_classification else {}
    with pytest.raises(AssertionError):
        await check(amessages, outer=outer, **options)
    for ahead in left:
        await close(ahead)


class Tokens(BaseCallbackHandler):
    """Is told of every token at once, however slowly a stream is read."""

    def __init__(self, shown: list[Any]) -> None:
        self._shown = shown

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        """Keep it."""
        self._shown.append(token)


def closed(mode: str | list[str], *, outer: bool, word: str) -> None:
    """Close a sync stream when it has shown something: in mid-stream, or while the backend reads this word."""
    model, backend, shown = Talker(), Backend(word), list[Any]()
    graph = graph_of(model, backend, outer=outer)
    threads = threading.active_count()
    reading = graph.stream(GIVEN, {"callbacks": [Tokens(shown)]}, stream_mode=mode, subgraphs=True)
    for one in reading:
        shown.append(one)
        if OPENING.strip() in repr(shown):
            break
    if word:
        assert backend.thread_reached.wait(30)
        assert not unjudged(shown, backend)
        # LangGraph waits for its thread, which waits for the backend.
        threading.Timer(0.01, backend.go.set).start()
    reading.close()
    assert not unjudged(shown, backend)
    assert model.running == 0
    assert NOTED == []
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert threading.active_count() <= threads


EVERY_MODE = pytest.mark.parametrize("mode", ["messages", ["messages", "updates", "values"]])


@EVERY_MODE
@EVERY_GRAPH
@pytest.mark.parametrize("word", ["", "SECRET"], ids=["mid-stream", "mid-classification"])
def test_a_sync_stream_that_is_closed(mode: Any, outer: bool, word: str) -> None:
    """Nothing unjudged was out; threads cannot be cancelled, but none outlives the stream."""
    closed(mode, outer=outer, word=word)


@EVERY_GRAPH
def test_the_sync_check_notices_a_guard_that_leaks(outer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    with pytest.raises(AssertionError):
        closed("messages", outer=outer, word="SECRET")
