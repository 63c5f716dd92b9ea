"""What goes into a call is known again by all that was said up to it, and by nothing less."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from llama_index.callbacks.guardmw._asked import (
    CONTEXT_TURNS,
    Passed,
    _spelled,
    asked_apart,
    asked_in_chat,
    digest_after,
)
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock

from guardmw import Guard, ToolCall, Turn
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of the marks by which turns are told apart, so that chance finds what is ambiguous.
PIECES = st.sampled_from(["user", "\n", "(", "'", ", ", "()", "'user'", "a", "\ud800"])
WORDS = st.lists(PIECES, max_size=4).map("".join)
CALLS = st.lists(st.builds(ToolCall, WORDS, st.dictionaries(WORDS, WORDS, max_size=1), WORDS), max_size=1).map(tuple)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["user", "tool"]), WORDS, CALLS, WORDS), min_size=1, max_size=3)


def digest_of(turns: Sequence[Turn]) -> bytes:
    """Of the last turn, and of all before it."""
    so_far = blake2b(digest_size=16)
    for turn in turns[:-1]:
        so_far.update(_spelled(turn))
    return digest_after(so_far, turns[-1])


@given(TURNS, TURNS)
def test_only_the_same_is_known_again(one: list[Turn], other: list[Turn]) -> None:
    """Not what merely reads alike when it is put together."""
    assert (digest_of(one) == digest_of(other)) == (one == other)


@given(st.lists(st.lists(st.sampled_from(["hi", "", "a\nuser\nb", "EVIL"]), min_size=1, max_size=3), max_size=13))
def test_each_part_is_judged_once_with_what_came_before(said: Sequence[Sequence[str]]) -> None:
    """Of messages that say several things, each thing; a picture, too."""
    pictures = [ImageBlock(image=b"1")]
    messages = [ChatMessage(blocks=[*(TextBlock(text=text) for text in texts), *pictures]) for texts in said]
    passed, guard = Passed(CONTEXT_TURNS), Guard(KeywordBackend({}))
    asked = asked_in_chat(messages)
    assert len(asked.turns) == len(messages)
    assert asked.context == tuple(asked.turns[-CONTEXT_TURNS:])
    fresh = passed.fresh(asked)
    assert len(fresh) == len(asked.trials)
    for conversation, (_, before, turn) in zip(fresh.values(), asked.trials, strict=True):
        assert conversation.context == tuple(asked.turns[max(0, before - CONTEXT_TURNS) : before])
        assert conversation.last == turn
    passed.learn(fresh, guard.screen_many(fresh.values()))
    # A verdict on a picture is partial, and so does not pass for good.
    assert all(conversation.last.media for conversation in passed.fresh(asked_in_chat(messages)).values())


def test_nodes_are_known_by_themselves() -> None:
    """In whatever order they are found."""
    turns = (Turn("document", "one"), Turn("document", "two"))
    passed, guard = Passed(), Guard(KeywordBackend({}))
    fresh = passed.fresh(asked_apart(turns))
    assert [conversation.turns for conversation in fresh.values()] == [turns[:1], turns[1:]]
    passed.learn(fresh, guard.screen_many(fresh.values()))
    assert passed.fresh(asked_apart(turns[::-1])) == {}
