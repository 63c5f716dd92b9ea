"""Streams that do not say what is new in them are judged as what their pieces come to, and go out as they came."""

# Fakes are what they stand in for.
# ruff: noqa: D102

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import guard_llm
from llama_index.callbacks.guardmw._held import Held
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, ThinkingBlock, ToolCallBlock
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


def called(piece: str, of: str | None) -> ChatResponse:
    """A chunk of a tool call."""
    block = ToolCallBlock(tool_call_id=of, tool_name="run", tool_kwargs=piece)
    return ChatResponse(message=ChatMessage(role="assistant", blocks=[block]))


def called_beside(piece: str, of: str | None) -> ChatResponse:
    """A chunk of a tool call, in a provider's own form."""
    beside = {"tool_calls": [{"id": of, "function": {"name": "run", "arguments": piece}}]}
    return ChatResponse(message=ChatMessage(role="assistant", additional_kwargs=beside))


EITHER_CALL = pytest.mark.parametrize("chunk", [called, called_beside])


@EITHER_CALL
@pytest.mark.parametrize("ids", [["1", "1", "1"], [None, None, None], ["1", None, None]])
@pytest.mark.parametrize(
    "pieces",
    [
        ['{"cmd": "B', 'AD"}'],
        ['{"', 'cmd": "BA', 'D"}'],
        ['{"cmd": "', "BA", 'D"}'],
        ['{"', "BA", "D"],
        ['{"cmd": "B\\u00', '41D"}'],
        ['{"cmd": "B\\u00', "41D"],
        ['{"cmd": "B', '{"cmd": "B\\u0041', '{"cmd": "B\\u0041D'],
    ],
)
def test_arguments_that_come_in_pieces_are_judged_as_a_whole(chunk: Any, ids: list[Any], pieces: list[str]) -> None:
    """Whether a piece names its call or not."""
    chunks = [chunk(piece, of) for piece, of in zip(pieces, ids, strict=False)]
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("BAD")).stream_chat([ChatMessage(content="hi")]))
    assert list(guard_llm(Saying.of(chunks), Witness()).stream_chat([ChatMessage(content="hi")])) == chunks


def interleaved(*pieces: tuple[str | None, int | str | None, str]) -> list[ChatResponse]:
    """Chunks with a piece of a call each, by its id and its index."""
    calls = [{"id": id_, "index": index, "function": {"name": "run", "arguments": text}} for id_, index, text in pieces]
    return [
        ChatResponse(message=ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]})) for call in calls
    ]


BY_INDEX = [(None, 0, '{"cmd": "B'), (None, 1, '{"cmd": "fi'), (None, 0, 'AD"}'), (None, 1, 'ne"}')]
BY_WORD = [(None, "0", '{"cmd": "B'), (None, "1", '{"cmd": "fi'), (None, "0", 'AD"}'), (None, "1", 'ne"}')]
BY_BOTH = [("a", 0, '{"cmd": "B'), ("b", 1, '{"cmd": "fi'), (None, 0, 'AD"}'), (None, 1, 'ne"}')]
BY_ID = [("a", None, '{"cmd": "B'), ("b", None, '{"cmd": "fi'), ("a", None, 'AD"}'), ("b", None, 'ne"}')]
ONE_INDEX = [("a", 0, '{"cmd": "B'), ("b", 0, '{"cmd": "fi'), ("a", 0, 'AD"}'), ("b", 0, 'ne"}')]
NEW_IDS = [("a", 0, '{"cmd": "B'), ("b", 1, '{"cmd": "fi'), ("c", 0, 'AD"}'), ("d", 1, 'ne"}')]


@pytest.mark.parametrize("pieces", [BY_INDEX, BY_WORD, BY_BOTH, BY_ID, ONE_INDEX, NEW_IDS])
def test_pieces_of_several_calls_are_joined_by_what_tells_them_apart(pieces: Any) -> None:
    """By all that does: whoever puts them together may go by the one or the other."""
    chunks = interleaved(*pieces)
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("BAD")).stream_chat([ChatMessage(content="hi")]))
    assert list(guard_llm(Saying.of(chunks), Witness()).stream_chat([ChatMessage(content="hi")])) == chunks


@pytest.mark.parametrize(
    ("pieces", "name"), [("B O O M", "BOOM"), ("ki ll _ki ll", "kill_kill"), ("E E VIL VIL", "EVIL")]
)
def test_pieces_of_a_name_may_be_alike(pieces: str, name: str) -> None:
    """Every piece counts, or is the one before once more."""
    calls = [{"id": "1", "index": 0, "function": {"name": piece, "arguments": "{}"}} for piece in pieces.split()]
    message = ChatMessage(role="assistant", content="")
    chunks = [
        ChatResponse(message=message.model_copy(update={"additional_kwargs": {"tool_calls": [one]}})) for one in calls
    ]
    held = Held(())
    judged = [trial for chunk in chunks for trial in held.feed(chunk)] + held.end()
    assert any(name in trial.last.text.split("\n") for trial in judged)


@pytest.mark.parametrize("id_", ["a", None])
def test_a_name_that_comes_in_pieces_is_judged_as_a_whole(id_: str | None) -> None:
    """One that is only said again is not."""
    chunks = interleaved((id_, 0, ""), (id_, 0, ""), (None, 0, "{}"))
    for chunk, name in zip(chunks, ("B", "AD", ""), strict=True):
        chunk.message.additional_kwargs["tool_calls"][0]["function"]["name"] = name
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("BAD")).stream_chat([ChatMessage(content="hi")]))
    again = interleaved((id_, 0, ""), (id_, 0, "{}"))
    assert list(guard_llm(Saying.of(again), Witness("runrun")).stream_chat([ChatMessage(content="hi")])) == again


def test_the_same_piece_of_two_calls_counts_for_both() -> None:
    """In one chunk, without ids."""

    def both(text: str) -> ChatResponse:
        calls = [{"function": {"name": "run", "arguments": text}}] * 2
        return ChatResponse(message=ChatMessage(role="assistant", additional_kwargs={"tool_calls": calls}))

    second = {"tool_calls": [{"name": "run", "arguments": "x"}, {"name": "run", "arguments": 'D"}'}]}
    last = ChatResponse(message=ChatMessage(role="assistant", additional_kwargs=second))
    chunks = [both('{"cmd": "'), both("BA"), last]
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("BAD")).stream_chat([ChatMessage(content="hi")]))


@EITHER_CALL
def test_a_piece_of_arguments_that_comes_twice_counts_twice(chunk: Any) -> None:
    """As in a text."""
    chunks = [chunk(piece, "1") for piece in ('{"cmd": "', "ga", "ga", '"}')]
    with pytest.raises(Blocked):
        list(guard_llm(Saying.of(chunks), Witness("gaga")).stream_chat([ChatMessage(content="hi")]))


@EITHER_CALL
@pytest.mark.parametrize("of", ["1", None])
def test_arguments_that_grow_are_read_once(chunk: Any, of: str | None) -> None:
    """However many chunks say them again, and nothing of a call but its name and arguments is read."""
    whole = json.dumps({"cmd": " ".join(f"word{at}" for at in range(40))})
    chunks = [chunk(whole[:end], of) for end in range(3, len(whole) + 1)]
    assert list(guard_llm(Saying.of(chunks), witness := Witness()).stream_chat([ChatMessage(content="hi")])) == chunks
    assert witness.read == [f"run {whole}"]


@EITHER_CALL
def test_calls_that_come_whole_are_read_once(chunk: Any) -> None:
    """One after the other."""
    chunks = [chunk(json.dumps({"cmd": cmd}), cmd) for cmd in ("milk", "eggs")]
    assert list(guard_llm(Saying.of(chunks), witness := Witness()).stream_chat([ChatMessage(content="hi")])) == chunks
    assert witness.read == ['run {"cmd": "milk"}\nrun {"cmd": "eggs"}']


@EITHER_CALL
def test_arguments_without_their_end_are_read_as_they_will_be(chunk: Any) -> None:
    """A whole answer's, too, and half of a character that is written as two."""

    class Once(Saying):
        def chat(self, messages: Any, **kwargs: Any) -> Any:
            return self._chunks[0]

    given = chunk('{"cmd": "\\ud83d B\\u0041D', "1")
    with pytest.raises(Blocked):
        guard_llm(Once.of([given]), Witness("BAD")).chat([ChatMessage(content="hi")])
    assert guard_llm(Once.of([given]), Witness()).chat([ChatMessage(content="hi")]) == given


@EITHER_CALL
def test_arguments_in_pieces_are_read_joined_and_no_more_than_the_last_alone(chunk: Any) -> None:
    """The name of the tool is not read with every piece."""
    chunks = [chunk(piece, "1") for piece in ('{"cmd": ', '"milk ', "and ", 'eggs"}')]
    assert list(guard_llm(Saying.of(chunks), witness := Witness()).stream_chat([ChatMessage(content="hi")])) == chunks
    assert witness.read == ['{"cmd": "milk and eggs"}\nrun eggs"}']
