"""Streams that do not say what is new in them are judged as what their pieces come to, and go out as they came."""

# Fakes are what they stand in for.
# ruff: noqa: D102

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import guard_llm
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, ThinkingBlock
from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw import Conversation, Scores


class Witness(KeywordBackend):
    """Blocks a word, and keeps what it read of answers."""

    def __init__(self, word: str = "EVIL") -> None:
        super().__init__({word: 0.99})
        self.read: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.read += [conversation.trial for conversation in conversations if conversation.last.role == "assistant"]
        return super().classify(conversations)


class Saying(MockLLM):
    """Gives these chunks."""

    _chunks: list[Any] = PrivateAttr()

    @classmethod
    def of(cls, chunks: Sequence[Any]) -> Saying:
        made = cls()
        made._chunks = list(chunks)
        return made

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        yield from self._chunks

    def stream_structured_predict(self, *_: Any, **__: Any) -> Any:
        yield from self._chunks


def text(piece: str, delta: str | None) -> ChatResponse:
    """A chunk of an answer."""
    return ChatResponse(message=ChatMessage(role="assistant", content=piece), delta=delta)


def thought(piece: str, _: str | None) -> ChatResponse:
    """A chunk of thinking."""
    return ChatResponse(message=ChatMessage(role="assistant", blocks=[ThinkingBlock(content=piece)]))


def completion(piece: str, delta: str | None) -> CompletionResponse:
    """A chunk of a completion."""
    return CompletionResponse(text=piece, delta=delta)


@pytest.mark.parametrize("chunk", [text, thought, completion])
@pytest.mark.parametrize("delta", [None, ""])
@pytest.mark.parametrize("pieces", [["ga", "ga"], ["so ", "ga", "ga"], ["aga", "ga", "ga"], ["ga", "x", "ga", "ga"]])
def test_a_piece_that_comes_twice_counts_twice(chunk: Any, delta: str | None, pieces: list[str]) -> None:
    """Together they may say what neither says alone."""
    chunks = [chunk(piece, delta) for piece in pieces]
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("gaga")).stream_chat([ChatMessage(content="hi")]))
    assert list(guard_llm(Saying.of(chunks), Witness()).stream_chat([ChatMessage(content="hi")])) == chunks


@pytest.mark.parametrize("chunk", [text, thought, completion])
def test_an_answer_that_is_said_again_as_it_stands_is_read_once(chunk: Any) -> None:
    """Once it has been seen to grow."""
    chunks = [chunk(piece, None) for piece in ("One", "One two", "One two", "One two three", "One two three")]
    assert list(guard_llm(Saying.of(chunks), witness := Witness()).stream_chat([ChatMessage(content="hi")])) == chunks
    assert witness.read == ["One two three"]


class Thing(BaseModel):
    """An object."""

    name: str
    use: str


def test_a_field_that_stays_as_it_is_is_read_once() -> None:
    """While the object grows around it."""
    things = [Thing(name="milk", use=use) for use in ("", "to", "to drink", "to drink")]
    llm = guard_llm(Saying.of(things), witness := Witness())
    assert list(llm.stream_structured_predict(Thing, PromptTemplate("give"))) == things
    assert sorted(witness.read) == ["milk", "to drink"]
