"""What goes into a call, turn by turn, each known again by what was said up to it; no text is remembered."""

from __future__ import annotations

from hashlib import blake2b
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from llama_index.callbacks.guardmw._parts import ROLES, merged, only_text, parts_of_message
from llama_index.callbacks.guardmw._verdicts import withholds
from llama_index.core.base.llms.types import ChatMessage, MessageRole

from guardmw import Conversation, Turn

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from guardmw import Verdict

CONTEXT_TURNS = 10
"""Turns before the one on trial: a guard reads a few of them, and a verdict's cost must not grow with the history."""

REMEMBERED = 1024
"""How many parts of conversations that passed are remembered, so as not to judge a chat's history at every turn."""

WITHHELD = "[Withheld by policy.]"
"""What stands in a chat for a question that was withheld before."""


class Asked(NamedTuple):
    """What goes into a call.

    Attributes:
        turns: all of it.
        trials: each part of it that is to be judged, with a digest of it and of all before it, and how many turns that
            is.
        messages: what to ask with.
    """

    turns: Sequence[Turn]
    trials: Sequence[tuple[bytes, int, Turn]]
    messages: Sequence[ChatMessage] = ()

    @property
    def context(self) -> tuple[Turn, ...]:
        """The last turns, as the context of the answer."""
        return tuple(self.turns[-CONTEXT_TURNS:])


def asked_in_chat(messages: Sequence[ChatMessage], left_out: Container[bytes] = (), *, own: bool = True) -> Asked:
    """Every message of a chat, part by part.

    Args:
        messages: of the chat.
        own: whether the model's own are to be judged, too.
        left_out: digests of questions in whose place a note stands, once the user has gone on.
    """
    so_far = _nothing()
    turns: list[Turn] = []
    trials: list[tuple[bytes, int, Turn]] = []
    # While a backend judges, others may go on writing into the list.
    sent = messages = list(messages)
    last = _last_question(messages) if left_out else 0
    for at, message in enumerate(messages):
        role = ROLES[message.role]
        parts: Sequence[Turn] = ()
        if text := only_text(message):
            whole = Turn(role, text)
        elif read := parts_of_message(message):
            whole = merged(read)
            parts = [part.turn for part in read]
        else:
            continue
        judged = own or role != "assistant"
        if at < last and role == "user" and _is_in(left_out, so_far, parts or (whole,)):
            whole, judged = Turn("user", WITHHELD), False
            sent = [*sent[:at], ChatMessage(content=WITHHELD), *sent[at + 1 :]]
        if judged and parts:
            trials += [(digest_after(so_far, part), len(turns), part) for part in parts]
        so_far.update(_spelled(whole))
        if judged and not parts:
            trials.append((so_far.digest(), len(turns), whole))
        turns.append(whole)
    return Asked(turns, trials, sent)


def asked_apart(turns: Iterable[Turn]) -> Asked:
    """Turns that do not belong together, each to be judged by itself."""
    apart = tuple(turns)
    return Asked(apart, [(digest_after(_nothing(), turn), 0, turn) for turn in apart])


def asked_in_words(words: str) -> Asked:
    """A prompt, or a query."""
    return asked_apart([Turn("user", words)])


class Passed:
    """Remembers what passed in full, for one guard, and picks what did not.

    Args:
        reach: how many of the turns before it belong to one on trial; None for all.

    Attributes:
        left_out: digests of questions that were withheld.
    """

    def __init__(self, reach: int | None = None) -> None:
        self._reach = reach
        self._digests: dict[bytes, None] = {}
        self._lock = Lock()
        self.left_out: dict[bytes, None] = {}

    def fresh(self, asked: Asked) -> dict[bytes, Conversation]:
        """What is still to be judged, with the turns before it."""
        reach, turns = self._reach, asked.turns
        return {
            digest: Conversation((*turns[0 if reach is None else max(0, at - reach) : at], turn))
            for digest, at, turn in asked.trials
            if digest not in self._digests
        }

    def learn(self, fresh: Mapping[bytes, Conversation], verdicts: Sequence[Verdict]) -> None:
        """Remember of these what was allowed and judged as well as can be, and the questions that were withheld."""
        with self._lock:
            for (digest, conversation), verdict in zip(fresh.items(), verdicts, strict=True):
                if verdict.action == "allow" and not verdict.degraded:
                    self._digests[digest] = None
                # What nobody could judge may pass the next time.
                elif withholds(verdict) and verdict.scores is not None and conversation.last.role == "user":
                    self.left_out[digest] = None
            _forget(self._digests)
            _forget(self.left_out)


def _forget(digests: dict[bytes, None]) -> None:
    if (excess := len(digests) - REMEMBERED) > 0:
        for digest in list(islice(digests, excess)):
            del digests[digest]


def _is_in(left_out: Container[bytes], before: blake2b, parts: Iterable[Turn]) -> bool:
    return any(digest_after(before, part) in left_out for part in parts)


def _last_question(messages: Sequence[ChatMessage]) -> int:
    return max((at for at, message in enumerate(messages) if message.role == MessageRole.USER), default=0)


def _nothing() -> blake2b:
    """The digest of what comes before a chat."""
    return blake2b(digest_size=16)


def digest_after(before: blake2b, turn: Turn) -> bytes:
    """The digest of a turn and of all before it, whose digest is given; it stays as it is."""
    so_far = before.copy()
    so_far.update(_spelled(turn))
    return so_far.digest()


def _spelled(turn: Turn) -> bytes:
    if turn.tool_calls or turn.name or turn.media:
        # As repr(turn), which takes three times as long; and like no turn that is only text, as no role has a bracket.
        head, said = "(", repr((turn.role, turn.text, turn.tool_calls, turn.name, turn.media))
    else:
        head, said = turn.role, turn.text
    # The length tells where a turn ends.
    return f"{head}\n{len(said)}\n{said}".encode("utf-8", "surrogatepass")
