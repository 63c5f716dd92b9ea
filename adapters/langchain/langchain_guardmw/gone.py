"""What tool rules have to know of messages that may be taken out of an agent's history, by summaries or trimming."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from guardmw.tools import Gone
from guardmw.verdict import SEVERITY
from langchain_guardmw.parts import CONTEXT_TURNS, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.messages import BaseMessage

    from guardmw import Conversation, Verdict
    from guardmw.conversation import Role
    from langchain_guardmw.history import Read, Reads

# Results whose scores are kept until they are noted; others are judged once more.
_REMEMBERED = 4_096
_UNTRUSTED = ("tool", "document")


class Noted(TypedDict):
    """What an agent's state keeps of its history, in what every checkpointer can write.

    Attributes:
        here: the tools that each message calls, by its id, of those that were there last.
        gone: how many calls were made in others, by tool.
        read: the highest P(injection) of what was read, gone or not, by role and name.
    """

    here: dict[str, list[str]]
    gone: dict[str, int]
    read: dict[str, dict[str, float]]


class Unheard(NamedTuple):
    """What was read, and nobody knows the score of."""

    read: Read
    asked: tuple[Conversation, ...]


class Notes:
    """Makes notes of messages, each once. May be shared between threads.

    Args:
        flows: whether there are rules that ask for P(injection).
    """

    def __init__(self, reads: Reads, *, flows: bool) -> None:
        self._reads = reads
        self._flows = flows
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    def hear(self, message: BaseMessage, verdicts: Sequence[Verdict]) -> None:
        """Keep the score of a result until it is noted; without verdicts it is the guard's own words."""
        if self._flows:
            self._keep(self._reads.read(message), verdicts)

    def unheard(self, state: Mapping[str, Any]) -> list[Unheard]:
        """What is to be judged before the state of an agent can be noted."""
        if not self._flows:
            return []
        messages, here = state["messages"], _noted(state)["here"]
        found = []
        for at, message in enumerate(messages):
            if message.id in here:
                continue
            read = self._reads.read(message)
            if read.turn.role in _UNTRUSTED and read.digest not in self._scores:
                context = tuple(self._reads.read(one).turn for one in messages[max(at - CONTEXT_TURNS, 0) : at])
                found.append(Unheard(read, tuple(within(context, one) for one in read.conversations)))
        return found

    def noted(self, state: Mapping[str, Any], heard: Sequence[Unheard], verdicts: Sequence[Verdict]) -> Noted | None:
        """The notes on all that was said, given the verdicts on what was unheard; None where there is nothing new."""
        given = iter(verdicts)
        scores = {one.read.digest: self._keep(one.read, [next(given) for _ in one.asked]) for one in heard}
        messages, before = state["messages"], _noted(state)
        here = {message.id: before["here"].get(message.id) for message in messages}
        if here == before["here"]:
            return None
        gone = Counter(before["gone"])
        for id_ in before["here"].keys() - here.keys():
            gone.update(before["here"][id_])
        read = {role: dict(by_name) for role, by_name in before["read"].items()}
        for message in messages:
            if here[message.id] is not None:
                continue
            said = self._reads.read(message)
            here[message.id] = [call.name for call in said.turn.tool_calls]
            if self._flows and said.turn.role in _UNTRUSTED and said.conversations:
                by_name, name = read.setdefault(said.turn.role, {}), said.turn.name
                score = scores.get(said.digest, self._scores.get(said.digest, 1.0))
                by_name[name] = max(score, by_name.get(name, 0.0))
        return Noted(here=cast("dict[str, list[str]]", here), gone=dict(gone), read=read)

    def _keep(self, read: Read, verdicts: Sequence[Verdict]) -> float:
        score = max(map(_injection, verdicts), default=0.0)
        # A failure may pass, and is not remembered.
        if all(verdict.scores and not verdict.scores.degraded for verdict in verdicts):
            self._scores[read.digest] = max(score, self._scores.get(read.digest, 0.0))
            while len(self._scores) > _REMEMBERED:
                self._scores.popitem(last=False)
        return score


def gone(state: object) -> Gone | None:
    """What is noted of messages that are no longer in the state of an agent; None where nothing is."""
    if not isinstance(state, Mapping) or not state.get("guardmw_noted"):
        return None
    noted = _noted(state)
    calls = Counter(noted["gone"])
    for id_ in noted["here"].keys() - {message.id for message in state.get("messages") or ()}:
        calls.update(noted["here"][id_])
    read = {(cast("Role", role), name): p for role, by in noted["read"].items() for name, p in by.items()}
    return Gone(dict(sorted(calls.items())), read) if calls or read else None


def _noted(state: Mapping[str, Any]) -> Noted:
    return state.get("guardmw_noted") or Noted(here={}, gone={}, read={})


def _injection(verdict: Verdict) -> float:
    """As a guard hears it: 1 where it was not judged as the policy demands."""
    if verdict.degraded and SEVERITY[verdict.action] >= SEVERITY["review"]:
        return 1.0
    return verdict.scores.injection if verdict.scores else 0.0
