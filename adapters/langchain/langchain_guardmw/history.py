"""What an agent's conversation says: each message read once, and judged once in the light of those before it."""

from __future__ import annotations

import marshal
from hashlib import blake2b
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from guardmw.identifiers import is_mark
from guardmw.running import Running
from langchain_guardmw.outcome import strictest
from langchain_guardmw.parts import CONTEXT_TURNS, is_plain, spoken, within

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from langchain_core.messages import BaseMessage

    from guardmw import Conversation, Turn, Verdict
    from langchain_guardmw.parts import Part

# Messages whose verdicts are kept, at some 200 bytes each.
REMEMBERED = 4_096

Key = tuple[bytes, ...]
"""A message and the context that it is judged in, by their digests."""

# What is approved: a message wherever it stands.
ANYWHERE = b"anywhere"

_HELD = attrgetter("__dict__", "__pydantic_extra__")
# All of a message that is judged.
_JUDGED = ("additional_kwargs", "artifact", "content", "invalid_tool_calls", "tool_call_chunks", "tool_calls")
# What nobody judges (of ids those that are marks), and a model puts on its answer when that has been judged.
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
        trials = tuple([part.conversation for part in found])
        own = ref(message, lambda _: self._forget(at))
        read = self._reads[at] = Read(own, fields, _digest(trials), tuple(found), trials, turn)
        return read

    def _forget(self, at: int) -> None:
        self._reads.pop(at, None)


class Case(NamedTuple):
    """A message that has not passed.

    Attributes:
        asked: what is to be judged of it, in its context.
        verdict: that withholds it; None while it has not been judged.
    """

    at: int
    key: Key
    asked: tuple[Conversation, ...]
    verdict: Verdict | None = None


class Said(NamedTuple):
    """What a conversation has come to.

    Attributes:
        length: how many messages there are.
        begin: where the user spoke last.
        key: of the last message.
        recent: the last ones, in whose light the next is judged.
        cases: those that have not passed.
    """

    length: int = 0
    begin: int = 0
    key: Key = ()
    recent: tuple[Read, ...] = ()
    cases: tuple[Case, ...] = ()


class History(Reads):
    """Verdicts by what was judged. May be shared between threads.

    Args:
        max_characters: the policy's: longer text is not judged, which is no failure of the backend.
        guard: whose verdicts these are, and under which policy: what is approved to one is not to another.
    """

    def __init__(self, max_characters: int, guard: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._guard = blake2b(repr(guard).encode(errors="surrogatepass")).digest()
        self._max_characters = max_characters
        self._verdicts: dict[Key, Verdict | None] = {}
        self._passed: dict[int, tuple[Read, bytes]] = {}
        self._said = Running(Said(), held, frozen=False)

    def said(self, messages: Sequence[BaseMessage]) -> Said:
        """What a conversation has come to, of which only what is new is read."""
        return self._said.after(messages, self._step, self._judged)

    def _step(self, said: Said, message: BaseMessage) -> Said:
        read = self.read(message)
        at = said.length
        key = (*[earlier.digest for earlier in said.recent], read.digest)
        context = tuple([earlier.turn for earlier in said.recent])
        case = Case(at, key, tuple([within(context, conversation) for conversation in read.conversations]))
        begin = at if read.turn.role == "user" else said.begin
        return Said(at + 1, begin, key, (*said.recent, read)[-CONTEXT_TURNS:], (*said.cases, *self._heard(case)))

    def _judged(self, said: Said) -> Said:
        if not said.cases:
            return said
        return said._replace(cases=tuple(case for one in said.cases for case in self._heard(one)))

    def _heard(self, case: Case) -> tuple[Case, ...]:
        """The case, with what is known of its verdict; none where it has passed."""
        if case.verdict is not None:
            return (case,)
        verdict = self._verdicts.get(case.key, ...)
        if verdict is None:
            return ()
        return (case,) if verdict is ... else (case._replace(verdict=verdict),)

    def trial(
        self, messages: Sequence[BaseMessage], approved: Collection[str] = (), *, calls_reviewed: bool = False
    ) -> Trial:
        """Open the trial of a conversation; messages with keys on which it was decided already are not withheld.

        Nor are, with ``calls_reviewed``, calls that a policy wants reviewed: somebody else has seen to that.
        """
        return Trial(self, messages, approved, calls_reviewed=calls_reviewed)

    def context(self, messages: Sequence[BaseMessage]) -> tuple[Turn, ...]:
        """The turns in whose light is judged what follows these messages."""
        return tuple([self.read(message).turn for message in messages[-CONTEXT_TURNS:]])

    def approval(self, messages: Sequence[BaseMessage], at: int) -> str:
        """What a person approves who approves one of these messages."""
        context = messages[max(at - CONTEXT_TURNS, 0) : at + 1]
        return self.approved(tuple(self.read(message).digest for message in context))

    def approval_anywhere(self, message: BaseMessage) -> str:
        """By what it is approved whatever stands before it: of a guard, who left of it what may be said."""
        return self.approved((self.read(message).digest,), ANYWHERE)

    def approved(self, key: Key, person: bytes = b"") -> str:
        """By what a message is approved that has this key."""
        return blake2b(b"".join(key), digest_size=16, key=self._guard, person=person).hexdigest()

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
        self.withheld: dict[int, Verdict] = {}
        self._history = history
        self._approved = approved
        self._calls_reviewed = calls_reviewed
        self._said = history.said(messages)
        self._open = [case for case in self._said.cases if case.verdict is None]
        self.asked = [conversation for case in self._open for conversation in case.asked]
        for case in self._said.cases:
            if case.verdict is not None:
                self._withhold(case, case.verdict)

    def take(self, verdicts: Sequence[Verdict]) -> None:
        """The verdicts on what was asked, in its order."""
        given = iter(verdicts)
        for case in self._open:
            own = list(islice(given, len(case.asked)))
            verdict = strictest(self._counted(case, own))
            if not any(map(self._history.failed, own)):
                self._history.remember(case.key, verdict)
            if verdict is not None:
                self._withhold(case, verdict)

    def failed(self, verdict: Verdict) -> bool:
        """Whether it rests on nothing but a backend's failure, which may pass."""
        return self._history.failed(verdict)

    def passes(self, answer: BaseMessage) -> None:
        """Note that what follows the conversation has been judged."""
        before = [read.digest for read in self._said.recent]
        self._history.remember((*before, self._history.read(answer).digest), None)

    def context(self) -> tuple[Turn, ...]:
        """The turns before what follows."""
        return tuple(read.turn for read in self._said.recent)

    def begin(self) -> int:
        """Where the current turn begins: with what the user said last."""
        return self._said.begin

    def _counted(self, case: Case, verdicts: Sequence[Verdict]) -> Sequence[Verdict]:
        """Those that are not for somebody else to see to."""
        if not self._calls_reviewed:
            return verdicts
        judged = zip(case.asked, verdicts, strict=True)
        return [verdict for one, verdict in judged if verdict.action != "review" or not one.last.tool_calls]

    def _withhold(self, case: Case, verdict: Verdict) -> None:
        approved = self._history.approved
        if not self._approved or not {approved(case.key), approved(case.key[-1:], ANYWHERE)} & set(self._approved):
            self.withheld[case.at] = verdict


def held(messages: Sequence[BaseMessage]) -> Iterable[object]:
    """All that messages hold, of which nothing is copied."""
    return map(_HELD, messages)


def _fields(message: BaseMessage) -> dict[str, Any]:
    """All of a message that says anything."""
    fields = message.__dict__
    if is_plain(message):
        return {"content": fields["content"], "name": fields["name"], "role": fields.get("role")}
    return {**fields, **_BESIDE} if is_mark(fields.get("id")) else {**fields, **_BESIDE, "id": fields["id"]}


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
            calls = [str(call) for call in turn.tool_calls] if turn.tool_calls else []
            head = repr((turn.role, turn.name if named else "", turn.media, calls, len(turn.text)))
            digest.update((head + turn.text).encode(errors="surrogatepass"))
    return digest.digest()
