"""What an agent's conversation says: each message read once, and judged once in the light of those before it."""

from __future__ import annotations

import marshal
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from langchain_guardmw.outcome import strictest
from langchain_guardmw.parts import CONTEXT_TURNS, is_plain, spoken, within

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import EllipsisType

    from langchain_core.messages import BaseMessage

    from guardmw import Conversation, Turn, Verdict
    from langchain_guardmw.parts import Part

# Messages whose verdicts are kept, at some 200 bytes each.
REMEMBERED = 4_096

Key = tuple[bytes, ...]
"""A message and the context that it is judged in, by their digests."""

# All of a message that is judged.
_JUDGED = ("additional_kwargs", "artifact", "content", "invalid_tool_calls", "tool_call_chunks", "tool_calls")
# What nobody judges, and a model puts on its answer when that has been judged.
_BESIDE = {"id": None, "response_metadata": None, "usage_metadata": None}


class Read(NamedTuple):
    """What a message says.

    Attributes:
        of: the message, while it lives.
        fields: what it was then; None where nobody could tell whether it has been changed in place.
        conversations: its parts on trial, one for each, as if nothing came before it.
    """

    of: ref[BaseMessage]
    fields: dict[str, Any] | None
    digest: bytes
    parts: tuple[Part, ...]
    conversations: tuple[Conversation, ...]
    turn: Turn

    def holds(self, message: BaseMessage) -> bool:
        """Whether it is still what this very message says; of numbers only whether they are equal."""
        if self.fields is None or self.of() is not message or message.__pydantic_extra__:
            return False
        try:
            return self.fields == _fields(message)
        except Exception:  # noqa: BLE001 - of anybody's values
            return False

    @property
    def key(self) -> str:
        """By what it is approved whatever stands before it: of a guard, who left of it what may be said."""
        return self.digest.hex()

    @property
    def nameless(self) -> bytes:
        """Its digest, whoever is said to have spoken."""
        named = any(part.turn.name for part in self.parts)
        return _digest(self.conversations, named=False) if named else self.digest


class Reads:
    """What messages say, for as long as they live. May be shared between threads."""

    def __init__(self) -> None:
        self._reads: dict[int, Read] = {}

    def read(self, message: BaseMessage) -> Read:
        """What a message says, read anew only where it may have changed."""
        at = id(message)
        known = self._reads.get(at)
        if known is not None and known.holds(message):
            return known
        # Before it is read: what changes meanwhile has it read again.
        fields = _kept(message)
        found, turn = spoken(message)
        trials = tuple(part.conversation for part in found)
        read = Read(ref(message, lambda _: self._forget(at)), fields, _digest(trials), tuple(found), trials, turn)
        self._reads[at] = read
        return read

    def _forget(self, at: int) -> None:
        self._reads.pop(at, None)


class History(Reads):
    """Verdicts by what was judged. May be shared between threads.

    Args:
        max_characters: the policy's: longer text is not judged, which is no failure of the backend.
    """

    def __init__(self, max_characters: int) -> None:
        super().__init__()
        self._max_characters = max_characters
        self._verdicts: dict[Key, Verdict | None] = {}
        self._passed: dict[int, tuple[Read, bytes]] = {}

    def trial(
        self, messages: Sequence[BaseMessage], approved: Collection[str] = (), *, calls_reviewed: bool = False
    ) -> Trial:
        """Open the trial of a conversation; messages with keys on which it was decided already are not withheld.

        Nor are, with ``calls_reviewed``, calls that a policy wants reviewed: somebody else has seen to that.
        """
        return Trial(self, messages, approved, calls_reviewed=calls_reviewed)

    def context(self, messages: Sequence[BaseMessage]) -> tuple[Turn, ...]:
        """The turns in whose light is judged what follows these messages."""
        return tuple(self.read(message).turn for message in messages[-CONTEXT_TURNS:])

    def let_out(self, message: BaseMessage) -> None:
        """Note that this very message was judged on its way out of a model."""
        read = self.read(message)
        # An agent with a name puts it on what its model says.
        self._passed[id(message)] = (read, read.nameless)

    def was_let_out(self, message: BaseMessage) -> bool:
        """Whether it was, and has not been changed since."""
        passed, digest = self._passed.get(id(message), (None, b""))
        if passed is None or passed.of() is not message:
            return False
        read = self.read(message)
        # Not by their turns, whose arguments are the message's own, changed or not.
        return read is passed or read.nameless == digest

    def verdict(self, key: Key) -> Verdict | EllipsisType | None:
        """The verdict that withholds it; None where it passed, and ``...`` where it has not been judged."""
        return self._verdicts.get(key, ...)

    def remember(self, key: Key, verdict: Verdict | None) -> None:
        """Keep a verdict, or None where it passed."""
        if len(self._verdicts) >= REMEMBERED:
            self._verdicts.clear()
        self._verdicts[key] = verdict

    def _forget(self, at: int) -> None:
        super()._forget(at)
        self._passed.pop(at, None)

    def failed(self, verdict: Verdict) -> bool:
        """Whether it rests on nothing but a backend's failure, which may pass."""
        covered = verdict.coverage
        return verdict.degraded and not verdict.scores and covered.judged < covered.characters <= self._max_characters


class Trial:
    """The messages of one conversation, of which those are to be judged that have not been.

    Attributes:
        asked: what is to be judged; ``take`` waits for the verdicts.
        withheld: the verdicts that withhold, by the positions of the messages.
    """

    def __init__(
        self, history: History, messages: Sequence[BaseMessage], approved: Collection[str], *, calls_reviewed: bool
    ) -> None:
        self.asked: list[Conversation] = []
        self.withheld: dict[int, Verdict] = {}
        self._history = history
        self._approved = approved
        self._calls_reviewed = calls_reviewed
        self._reads = [history.read(message) for message in messages]
        self._digests = [read.digest for read in self._reads]
        self._open: list[tuple[int, int]] = []
        for at in range(len(messages)):
            verdict = history.verdict(self._window(at))
            if verdict is ...:
                self._ask(at)
            elif verdict is not None:
                self._withhold(at, verdict)

    def take(self, verdicts: Sequence[Verdict]) -> None:
        """The verdicts on what was asked, in its order."""
        given = iter(verdicts)
        for at, count in self._open:
            own = list(islice(given, count))
            verdict = strictest(self._counted(at, own))
            if not any(map(self._history.failed, own)):
                self._history.remember(self._window(at), verdict)
            if verdict is not None:
                self._withhold(at, verdict)

    def failed(self, verdict: Verdict) -> bool:
        """Whether it rests on nothing but a backend's failure, which may pass."""
        return self._history.failed(verdict)

    def passes(self, answer: BaseMessage) -> None:
        """Note that what follows the conversation has been judged."""
        before = self._digests[-CONTEXT_TURNS:]
        self._history.remember((*before, self._history.read(answer).digest), None)

    def key(self, at: int) -> str:
        """What a person approves who approves a message."""
        return blake2b(b"".join(self._window(at)), digest_size=16).hexdigest()

    def context(self, end: int | None = None) -> tuple[Turn, ...]:
        """The turns before a position, or before what follows."""
        end = len(self._reads) if end is None else end
        return tuple(read.turn for read in self._reads[max(0, end - CONTEXT_TURNS) : end])

    def begin(self) -> int:
        """Where the current turn begins: with what the user said last."""
        spoken = (at for at in range(len(self._reads) - 1, -1, -1) if self._reads[at].turn.role == "user")
        return next(spoken, 0)

    def _window(self, at: int) -> Key:
        return tuple(self._digests[max(0, at - CONTEXT_TURNS) : at + 1])

    def _ask(self, at: int) -> None:
        context = self.context(at)
        found = [within(context, conversation) for conversation in self._reads[at].conversations]
        self._open.append((at, len(found)))
        self.asked += found

    def _counted(self, at: int, verdicts: Sequence[Verdict]) -> Sequence[Verdict]:
        """Those that are not for somebody else to see to."""
        if not self._calls_reviewed:
            return verdicts
        judged = zip(self._reads[at].parts, verdicts, strict=True)
        return [verdict for part, verdict in judged if verdict.action != "review" or not part.turn.tool_calls]

    def _withhold(self, at: int, verdict: Verdict) -> None:
        if not self._approved or not {self.key(at), self._reads[at].key}.intersection(self._approved):
            self.withheld[at] = verdict


def _fields(message: BaseMessage) -> dict[str, Any]:
    """All of a message that says anything."""
    fields = message.__dict__
    if is_plain(message):
        return {"content": fields["content"], "name": fields["name"], "role": fields.get("role")}
    return {**fields, **_BESIDE}


def _kept(message: BaseMessage) -> dict[str, Any] | None:
    """The same, to tell by later whether it was changed in place; None where nobody could."""
    fields = _fields(message)
    if is_plain(message):
        return fields
    try:
        # It takes plain values only, and copies them.
        plain = marshal.dumps({name: fields[name] for name in _JUDGED if name in fields}, 2)
        fields |= marshal.loads(plain)  # noqa: S302 - of our own making
    except ValueError:
        return None
    return None if message.__pydantic_extra__ else fields


def _digest(conversations: Sequence[Conversation], *, named: bool = True) -> bytes:
    digest = blake2b(digest_size=16)
    for conversation in conversations:
        for turn in conversation.turns:
            # The lengths tell where a text ends; half of a surrogate pair is text too.
            calls = [str(call) for call in turn.tool_calls]
            head = repr((turn.role, turn.name if named else "", turn.media, calls, len(turn.text)))
            digest.update((head + turn.text).encode(errors="surrogatepass"))
    return digest.digest()
