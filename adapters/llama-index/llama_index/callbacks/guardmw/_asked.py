"""What goes into a call, turn by turn, each known again by what was said up to it; no text is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True)
class Asked:
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
    before = b""
    turns: list[Turn] = []
    trials: list[tuple[bytes, int, Turn]] = []
    sent = messages
    last = _last_question(messages) if left_out else 0
    for at, message in enumerate(messages):
        if text := only_text(message):
            whole = Turn(ROLES[message.role], text)
            digest = digest_after(before, whole)
            parts = [(digest, len(turns), whole)]
        elif read := parts_of_message(message):
            parts = [(digest_after(before, part.turn), len(turns), part.turn) for part in read]
            whole = merged(read)
            digest = digest_after(before, whole)
        else:
            continue
        if left_out and at < last and message.role == MessageRole.USER and any(one in left_out for one, *_ in parts):
            whole = Turn("user", WITHHELD)
            digest, parts = digest_after(before, whole), []
            sent = [*sent[:at], ChatMessage(content=WITHHELD), *sent[at + 1 :]]
        before = digest
        if own or ROLES[message.role] != "assistant":
            trials += parts
        turns.append(whole)
    return Asked(turns, trials, sent)


def asked_apart(turns: Iterable[Turn]) -> Asked:
    """Turns that do not belong together, each to be judged by itself."""
    apart = tuple(turns)
    return Asked(apart, [(digest_after(b"", turn), 0, turn) for turn in apart])


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
    while len(digests) > REMEMBERED:
        del digests[next(iter(digests))]


def _last_question(messages: Sequence[ChatMessage]) -> int:
    return max((at for at, message in enumerate(messages) if message.role == MessageRole.USER), default=0)


def digest_after(before: bytes, turn: Turn) -> bytes:
    """The digest of a turn and of all before it, whose digest is given."""
    if turn.tool_calls or turn.name or turn.media:
        # As repr(turn), which takes three times as long; and like no turn that is only text, as no role has a bracket.
        spelled = repr((turn.role, turn.text, turn.tool_calls, turn.name, turn.media))
    else:
        spelled = f"{turn.role}\n{turn.text}"
    return blake2b(before + spelled.encode("utf-8", "surrogatepass"), digest_size=16).digest()
