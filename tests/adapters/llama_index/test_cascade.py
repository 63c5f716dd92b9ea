"""Wherever a guard is taken, one that escalates is: the doubtful go to whom it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import (
    GuardPostprocessor,
    guard_chat_engine,
    guard_llm,
    guard_query_engine,
    guard_retriever,
    guard_tools,
    install,
)
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeWithScore, TextNode

from guardmw import Blocked, Guard
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "DOUBT"


def _index() -> VectorStoreIndex:
    return VectorStoreIndex.from_documents([Document(text=TEXT)])


def _tool(guard: Guard) -> object:
    (tool,) = guard_tools([lambda text: text], guard)
    raise tool.call(text=TEXT).exception


def _installed(guard: Guard) -> object:
    Settings.llm = MockLLM()
    with install(guard):
        return Settings.llm.complete(TEXT)


def _chat(guard: Guard) -> object:
    engine = SimpleChatEngine.from_defaults(llm=MockLLM(), memory=ChatMemoryBuffer.from_defaults())
    return guard_chat_engine(engine, guard).chat(TEXT)


PLACES: dict[str, Callable[[Guard], object]] = {
    "guard_llm": lambda guard: guard_llm(MockLLM(), guard).complete(TEXT),
    "guard_query_engine": lambda guard: guard_query_engine(_index().as_query_engine(llm=MockLLM()), guard).query(TEXT),
    "guard_chat_engine": _chat,
    "guard_tools": _tool,
    "guard_retriever": lambda guard: guard_retriever(_index().as_retriever(), guard, on_block="raise").retrieve("?"),
    "GuardPostprocessor": lambda guard: GuardPostprocessor(guard, on_block="raise").postprocess_nodes(
        [NodeWithScore(node=TextNode(text=TEXT))], query_str="?"
    ),
    "install": _installed,
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_doubt_is_asked_of_whom_the_guard_escalates_to(place: str) -> None:
    """Who has the last word."""
    first, second = KeywordBackend({TEXT: 0.45}), KeywordBackend({TEXT: 0.99}, name="careful")
    with pytest.raises(Blocked) as blocked:
        PLACES[place](Guard(first, escalate=second))
    scores: Any = blocked.value.verdict.scores
    assert scores.backend.endswith("careful")


def test_a_handler_takes_such_a_guard_too(make_llm: Callable[..., Any], make_handler: Callable[..., Any]) -> None:
    """And a model behind a URL is one line."""
    guard = Guard(KeywordBackend({TEXT: 0.45}), escalate=KeywordBackend({TEXT: 0.99}))
    with pytest.raises(Blocked):
        make_llm(make_handler(guard)).complete(TEXT)
    assert Guard(KeywordBackend({}), escalate="http://127.0.0.1:9/v1").backend.name.startswith("keyword>")
