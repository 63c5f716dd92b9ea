"""A stream that is closed ends what it comes from at once, though nobody has read of it."""

# Fakes are what they stand in for.
# ruff: noqa: D102

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import guard_llm, guard_query_engine
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms import MockLLM

from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

BACKEND = KeywordBackend({"EVIL": 0.99})
MESSAGES = [ChatMessage(content="hi")]


class Line:
    """What a provider's client gives: chunks, and a connection that is open until it is told."""

    def __init__(self, chunk: Any) -> None:
        self.chunk = chunk
        self.read = 0
        self.closed = False

    def __iter__(self) -> Line:
        return self

    def __next__(self) -> Any:
        self.read += 1
        return self.chunk

    def close(self) -> None:
        self.closed = True

    __aiter__ = __iter__

    async def __anext__(self) -> Any:
        return next(self)

    async def aclose(self) -> None:
        self.close()


class Streaming(MockLLM):
    """Gives its lines."""

    _line: Line = PrivateAttr()

    @classmethod
    def of(cls, line: Line, *handlers: Any) -> Streaming:
        made = cls(callback_manager=CallbackManager(list(handlers)))
        made._line = line
        return made

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        return self._line

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        return self._line

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return self._line

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return self._line


class Engine(BaseQueryEngine):
    """Gives its lines."""

    def __init__(self, line: Line) -> None:
        super().__init__(None)
        self.line = line

    def _query(self, query_bundle: Any) -> Any:
        return StreamingResponse(self.line)  # type: ignore[arg-type] # as good as a generator

    async def _aquery(self, query_bundle: Any) -> Any:
        return AsyncStreamingResponse(self.line)  # type: ignore[arg-type]

    def _get_prompt_modules(self) -> Any:
        return {}


CHAT = ChatResponse(message=ChatMessage(role="assistant", content="ho"), delta="ho")
COMPLETION = CompletionResponse(text="ho", delta="ho")

SYNC: dict[str, tuple[Any, Callable[[Line], Any]]] = {
    "chat": (CHAT, lambda line: guard_llm(Streaming.of(line), BACKEND).stream_chat(MESSAGES)),
    "chat that handlers hear of": (
        CHAT,
        lambda line: guard_llm(Streaming.of(line, LlamaDebugHandler()), BACKEND).stream_chat(MESSAGES),
    ),
    "completion": (COMPLETION, lambda line: guard_llm(Streaming.of(line), BACKEND).stream_complete("hi")),
    "query": ("ho", lambda line: guard_query_engine(Engine(line), BACKEND).query("hi").response_gen),  # type: ignore[union-attr]
}


async def _queried(line: Line) -> Any:
    response: Any = await guard_query_engine(Engine(line), BACKEND).aquery("hi")
    return response.async_response_gen()


ASYNC: dict[str, tuple[Any, Callable[[Line], Any]]] = {
    "chat": (CHAT, lambda line: guard_llm(Streaming.of(line), BACKEND).astream_chat(MESSAGES)),
    "chat that handlers hear of": (
        CHAT,
        lambda line: guard_llm(Streaming.of(line, LlamaDebugHandler()), BACKEND).astream_chat(MESSAGES),
    ),
    "completion": (COMPLETION, lambda line: guard_llm(Streaming.of(line), BACKEND).astream_complete("hi")),
    "query": ("ho", _queried),
}


@pytest.mark.parametrize("name", SYNC)
@pytest.mark.parametrize("way", ["close", "collect"])
def test_a_stream_that_nobody_read_closes_the_models(name: str, way: str) -> None:
    """By hand, or by the garbage collector."""
    chunk, ask = SYNC[name]
    stream = ask(line := Line(chunk))
    assert not line.closed
    if way == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    assert line.closed
    assert line.read == 0


@pytest.mark.parametrize("name", ASYNC)
@pytest.mark.parametrize("way", ["close", "collect"])
async def test_the_same_holds_for_asynchronous_streams(name: str, way: str) -> None:
    """Collected ones are closed by a task of the event loop's."""
    chunk, ask = ASYNC[name]
    stream = await ask(line := Line(chunk))
    assert not line.closed
    if way == "close":
        await stream.aclose()
    else:
        del stream
        gc.collect()
        for _ in range(20):
            await asyncio.sleep(0)
    assert line.closed
    assert line.read == 0
