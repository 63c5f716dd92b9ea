"""What goes into a call, turn by turn, each known again by what was said up to it; no text is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING

from llama_index.callbacks.guardmw._parts import merged, parts_of_message
from llama_index.callbacks.guardmw._turns import ROLES, only_text

from guardmw import Conversation, Turn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llama_index.core.base.llms.types import ChatMessage

    from guardmw import Verdict

CONTEXT_TURNS = 10
"""Turns before the one on trial: a guard reads a few of them, and a verdict's cost must not grow with the history."""

REMEMBERED = 1024
"""How many parts of conversations that passed are remembered, so as not to judge a chat's history at every turn."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What goes into a call.

    Attributes:
        turns: all of it.
        trials: each part of it that is to be judged, with a digest of it and of all before it, and how many turns that
            is.
    """

    turns: Sequence[Turn]
    trials: Sequence[tuple[bytes, int, Turn]]

    @property
    def context(self) -> tuple[Turn, ...]:
        """The last turns, as the context of the answer."""
        return tuple(self.turns[-CONTEXT_TURNS:])


def asked_in_chat(messages: Iterable[ChatMessage]) -> Asked:
    """Every message of a chat, the model's own too, part by part."""
    before = b""
    turns: list[Turn] = []
    trials: list[tuple[bytes, int, Turn]] = []
    for message in messages:
        if text := only_text(message):
            whole = Turn(ROLES[message.role], text)
            before = _after(before, whole)
            trials.append((before, len(turns), whole))
            turns.append(whole)
        elif parts := parts_of_message(message):
            trials += [(_after(before, part.turn), len(turns), part.turn) for part in parts]
            whole = parts[0].turn if len(parts) == 1 else merged(parts)
            before = _after(before, whole)
            turns.append(whole)
    return Asked(turns, trials)


def asked_in_turns(turns: Sequence[Turn]) -> Asked:
    """The turns of a chat as they are, of which those that are not the model's own are to be judged."""
    before = b""
    trials: list[tuple[bytes, int, Turn]] = []
    for at, turn in enumerate(turns):
        before = _after(before, turn)
        if turn.role != "assistant":
            trials.append((before, at, turn))
    return Asked(turns, trials)


def asked_apart(turns: Iterable[Turn]) -> Asked:
    """Turns that do not belong together, each to be judged by itself."""
    apart = tuple(turns)
    return Asked(apart, [(_after(b"", turn), 0, turn) for turn in apart])


def asked_in_words(words: str) -> Asked:
    """A prompt, or a query."""
    return asked_in_turns((Turn("user", words),))


class Passed:
    """Remembers what passed in full, for one guard, and picks what did not.

    Args:
        reach: how many of the turns before it belong to one on trial; None for all.
    """

    def __init__(self, reach: int | None = None) -> None:
        self._reach = reach
        self._digests: dict[bytes, None] = {}
        self._lock = Lock()

    def fresh(self, asked: Asked) -> dict[bytes, Conversation]:
        """What is still to be judged, with the turns before it."""
        reach, turns = self._reach, asked.turns
        return {
            digest: Conversation((*turns[0 if reach is None else max(0, at - reach) : at], turn))
            for digest, at, turn in asked.trials
            if digest not in self._digests
        }

    def learn(self, fresh: Iterable[bytes], verdicts: Sequence[Verdict]) -> None:
        """Remember of these what was allowed, and judged as well as can be."""
        with self._lock:
            for digest, verdict in zip(fresh, verdicts, strict=True):
                if verdict.action == "allow" and not verdict.degraded:
                    self._digests[digest] = None
            while len(self._digests) > REMEMBERED:
                del self._digests[next(iter(self._digests))]


def _after(before: bytes, turn: Turn) -> bytes:
    """The digest of a turn and of all before it, whose digest is given."""
    if turn.tool_calls or turn.name or turn.media:
        # As repr(turn), which takes three times as long; and like no turn that is only text, as no role has a bracket.
        spelled = repr((turn.role, turn.text, turn.tool_calls, turn.name, turn.media))
    else:
        spelled = f"{turn.role}\n{turn.text}"
    return blake2b(before + spelled.encode("utf-8", "surrogatepass"), digest_size=16).digest()
