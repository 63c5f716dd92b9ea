"""Whatever goes wrong between an adapter's guard and its server: nothing comes out, in time, and nothing is left."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import langchain_guardmw as lc
import llama_index.callbacks.guardmw as li
import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from langchain_core.tools import tool
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from guardmw import Blocked, Guard
from guardmw.backends.chat import ChatBackend
from tests.backends import conftest as parts
from tests.backends.test_chat_failures import (
    DEADLINE,
    GRACE,
    KEY,
    SECRETS,
    TEXT,
    Failure,
    assert_idle,
    both_ways,
    every_failure,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from llama_index.core.schema import QueryBundle

ANSWER = "an answer that nobody is to see"
DROPPED = LookupError("nothing was found")


class Place(NamedTuple):
    """Where an adapter puts a guard, with and without an event loop; what it gives is what a caller sees."""

    sync: Callable[[Guard], Any]
    asynchronous: Callable[[Guard], Any]


def model() -> Any:
    """One that answers, of LangChain."""
    return GenericFakeChatModel(messages=iter([AIMessage(ANSWER)] * 3))


@tool
def say(text: str) -> str:
    """Say it."""
    return f"{ANSWER}: {text}"


def repeat(text: str) -> str:
    """It is a tool of LlamaIndex's."""
    return f"{ANSWER}: {text}"


class Shelf(LangChainRetriever):
    """It finds the same, whatever is asked."""

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return [Document(TEXT)]


class Drawer(BaseRetriever):
    """The same, of LlamaIndex."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=TEXT))]


def agent(guard: Guard) -> Any:
    """With a middleware."""
    return create_agent(model(), [], middleware=[lc.GuardMiddleware(guard)])


async def streamed(chunks: AsyncIterator[Any]) -> str:
    """All of them."""
    return "".join([chunk.text async for chunk in chunks])


async def chunks_of(guard: Guard) -> str:
    """Of a LlamaIndex model's answer, whose question is not judged."""
    return await streamed(await li.guard_llm(MockLLM(), guard, input="off").astream_complete(TEXT))


def outcome(output: Any) -> Any:
    """Of a tool of LlamaIndex's, which says what it raised."""
    if output.exception:
        raise output.exception
    return output


def found(documents: list[Document]) -> list[Document]:
    """By a retriever of LangChain's, which drops what is withheld and raises nothing."""
    if not documents:
        raise DROPPED
    return documents


async def later(coming: Awaitable[Any], then: Callable[[Any], Any]) -> Any:
    """The same on an event loop."""
    return then(await coming)


ASKED = {"messages": [("user", TEXT)]}
PLACES = {
    "langchain": {
        "guard": Place(lambda g: lc.guard(g).invoke(TEXT), lambda g: lc.guard(g).ainvoke(TEXT)),
        "guard_model": Place(
            lambda g: lc.guard_model(model(), g).invoke(TEXT), lambda g: lc.guard_model(model(), g).ainvoke(TEXT)
        ),
        "guard_model, in parallel": Place(
            lambda g: lc.guard_model(model(), g, input="parallel").invoke(TEXT),
            lambda g: lc.guard_model(model(), g, input="parallel").ainvoke(TEXT),
        ),
        "guard_model, its answer": Place(
            lambda g: "".join(chunk.text for chunk in lc.guard_model(model(), g, input="off").stream(TEXT)),
            lambda g: streamed(lc.guard_model(model(), g, input="off").astream(TEXT)),
        ),
        "guard_tool": Place(
            lambda g: lc.guard_tool(say, g).invoke({"text": TEXT}),
            lambda g: lc.guard_tool(say, g).ainvoke({"text": TEXT}),
        ),
        "guard_retriever": Place(
            lambda g: found(lc.guard_retriever(Shelf(), g).invoke("?")),
            lambda g: later(lc.guard_retriever(Shelf(), g).ainvoke("?"), found),
        ),
        "GuardMiddleware": Place(lambda g: agent(g).invoke(ASKED), lambda g: agent(g).ainvoke(ASKED)),
    },
    "llama_index": {
        "guard_llm": Place(
            lambda g: li.guard_llm(MockLLM(), g).complete(TEXT), lambda g: li.guard_llm(MockLLM(), g).acomplete(TEXT)
        ),
        "guard_llm, its answer": Place(
            lambda g: "".join(chunk.text for chunk in li.guard_llm(MockLLM(), g, input="off").stream_complete(TEXT)),
            chunks_of,
        ),
        "guard_tool": Place(
            lambda g: outcome(li.guard_tool(repeat, g).call(text=TEXT)),
            lambda g: later(li.guard_tool(repeat, g).acall(text=TEXT), outcome),
        ),
        "guard_retriever": Place(
            lambda g: li.guard_retriever(Drawer(), g, on_block="raise").retrieve("?"),
            lambda g: li.guard_retriever(Drawer(), g, on_block="raise").aretrieve("?"),
        ),
    },
}


@pytest.fixture
def server() -> Iterator[parts.Server]:
    """A server that behaves."""
    made = parts.Server()
    yield made
    made.end()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> parts.Fake:
    """What its answers are made with; tries follow each other at once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01 * low)
    return parts.Fake(monkeypatch)


async def each_in_turn(places: list[Place], guard: Guard) -> list[Any]:
    """What came of each, on one event loop, with no task left."""
    came = [await caught(place.asynchronous, guard) for place in places]
    until = time.monotonic() + GRACE
    while len(asyncio.all_tasks()) > 1 and time.monotonic() < until:  # noqa: ASYNC110 - tasks of anybody
        await asyncio.sleep(0.005)
    assert len(asyncio.all_tasks()) == 1
    return came


async def caught(place: Callable[[Guard], Any], guard: Guard) -> Any:
    """What it gives, or raises."""
    try:
        return await place(guard)
    except (Blocked, LookupError) as error:
        return error


def caught_at_once(place: Callable[[Guard], Any], guard: Guard) -> Any:
    """The same without an event loop."""
    try:
        return place(guard)
    except (Blocked, LookupError) as error:
        return error


@both_ways
@every_failure
@pytest.mark.parametrize("adapter", PLACES)
def test_a_failing_server_lets_nothing_through(
    server: parts.Server, fake: parts.Fake, adapter: str, failure: Failure, way: str
) -> None:
    """Wherever the guard is: its verdict is degraded and says why, and quotes neither text nor key nor server."""
    before = set(threading.enumerate())
    seconds = DEADLINE if failure.reason.startswith("no answer") else 60.0
    url = server.url.replace("http://127.0.0.1", failure.at)
    made = ChatBackend(url, model=fake.MODEL, dialect=fake.OneWord(), api_key=KEY, deadline=seconds)
    failure.set_up(server, fake)
    places, guard = list(PLACES[adapter].values()), Guard(made)
    started = time.monotonic()
    if way == "sync":
        came = [caught_at_once(place.sync, guard) for place in places]
    else:
        came = asyncio.run(each_in_turn(places, guard))
    assert time.monotonic() - started < len(places) * DEADLINE + GRACE
    assert [type(one) for one in came] == [
        LookupError if place == "guard_retriever" and adapter == "langchain" else Blocked for place in PLACES[adapter]
    ]
    for one in came:
        if one is not DROPPED:
            verdict = one.verdict
            assert (verdict.action, verdict.degraded, verdict.scores) == ("block", True, None)
            assert failure.reason in verdict.reason
            assert not any(secret in f"{one} {verdict.to_json()}" for secret in (*SECRETS, ANSWER))
    if failure.tries is not None:
        assert len(server.asked) == failure.tries * len(places)
    made.close()
    assert {thread for thread in threading.enumerate() if thread.name.startswith("guardmw")} <= before
    assert_idle(server)


@both_ways
@pytest.mark.parametrize("adapter", PLACES)
def test_a_server_that_judges_lets_it_through(server: parts.Server, fake: parts.Fake, adapter: str, way: str) -> None:
    """Or there would be nothing to see in a failure."""
    made = ChatBackend(server.url, model=fake.MODEL, dialect=fake.OneWord(), deadline=60.0)
    places = list(PLACES[adapter].values())
    if way == "sync":
        came = [caught_at_once(place.sync, Guard(made)) for place in places]
    else:
        came = asyncio.run(each_in_turn(places, Guard(made)))
    assert not any(isinstance(one, Exception) for one in came)
    assert all(any(said in repr(one) for said in (TEXT, ANSWER)) for one in came)
    made.close()
