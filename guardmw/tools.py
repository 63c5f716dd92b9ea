"""Tool rules: which tools a model may call, with what arguments, how often and after what; they hold if models fail."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fnmatch import translate
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from guardmw.arguments import Argument, Constraint, Name
from guardmw.conversation import Conversation, Turn, loads
from guardmw.running import Running
from guardmw.settings import Part, Score
from guardmw.verdict import SEVERITY, Action, Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from guardmw.conversation import Role, ToolCall

Source = Literal["tool_result", "document"]

_ROLE_OF: dict[Source, str] = {"tool_result": "tool", "document": "document"}


class Flow(Part):
    """What is more than it seems after something untrusted was read.

    Attributes:
        tools: the calls that it is about.
        injection: the P(injection) of an earlier turn from which on it applies; 0 stands for any such turn.
        after: the kinds of turn that are not trusted.
        trusted: tools and sources of documents whose results are, all the same.
        action: what such a call then means.
    """

    tools: Annotated[list[Name], Field(min_length=1)]
    injection: Score
    after: Annotated[list[Source], Field(min_length=1)] = ["tool_result", "document"]
    trusted: list[Name] = []
    action: Action = "review"


class Budget(Part):
    """How often tools may be called in one conversation.

    Attributes:
        tools: whose calls are counted together.
        calls: as many, and no more.
        action: what one more means.
    """

    tools: Annotated[list[Name], Field(min_length=1)]
    calls: Annotated[int, Field(strict=True, gt=0)]
    action: Action = "block"


class ToolPolicy(Part):
    """Rules for tool calls. Of all that apply the strictest counts, and none makes a call milder than its scores do.

    Tools are named by patterns as of file names (``send_*``), or by the name of a group. Case does not matter, except
    where a name is allowed or trusted.

    Attributes:
        allow: names that are known and need no more than the classifier's consent.
        flag: names to let through and tell of.
        review: names that a person decides on.
        block: names that are never called.
        unlisted: what a name on none of these lists means; "screen" leaves it to the classifier. None: "block" where
            there is an allow list, else "screen".
        groups: patterns by the name that stands for them.
        arguments: by pattern of tools, and by argument; dots lead into objects, "*" stands for all arguments together.
        flows: what calls mean after something untrusted.
        budgets: how many calls a conversation may have.
    """

    allow: list[Name] = []
    flag: list[Name] = []
    review: list[Name] = []
    block: list[Name] = []
    unlisted: Literal["screen", "flag", "review", "block"] | None = None
    groups: dict[Name, list[Name]] = {}
    arguments: dict[Name, dict[Name, Constraint]] = {}
    flows: list[Flow] = []
    budgets: list[Budget] = []


class Gone(NamedTuple):
    """What rules have to know of turns that are no longer told.

    Attributes:
        calls: how many there were, by the names of tools.
        injection: the highest P(injection) of what was read, by the role and the name of its turn.
    """

    calls: Mapping[str, int]
    injection: Mapping[tuple[Role, str], float]


@dataclass(frozen=True, slots=True)
class Continued(Conversation):
    """A conversation that began before its first turn."""

    gone: Gone


class Earlier(NamedTuple):
    """A turn of the context that flows go by, and whose score is not known yet.

    Attributes:
        key: tells it, and all that came before it, from any other.
        at: how many turns there are up to it.
        flows: which flows.
    """

    key: bytes
    at: int
    flows: tuple[int, ...]


class Before(NamedTuple):
    """What rules have to know of the turns before the one on trial.

    Attributes:
        turns: how many there are.
        digest: of all of them.
        calls: how many each budget counts.
        injection: the highest P(injection) that each flow has to go by, so far; below 0 where there is none.
        unheard: the turns that are still to be judged.
    """

    turns: int
    digest: bytes
    calls: tuple[int, ...]
    injection: tuple[float, ...]
    unheard: tuple[Earlier, ...] = ()

    def hearing(self, scores: Mapping[bytes, float]) -> Before:
        """The same, with these scores of turns that were still to be judged."""
        if not self.unheard:
            return self
        injection, unheard = list(self.injection), []
        for earlier in self.unheard:
            # Asked for once: others may empty the memory meanwhile.
            p = scores.get(earlier.key)
            if p is None:
                unheard.append(earlier)
                continue
            for at in earlier.flows:
                injection[at] = max(injection[at], p)
        return self._replace(injection=tuple(injection), unheard=tuple(unheard))


class ToolRules:
    """A ToolPolicy in the form that is fast to apply: no pattern is compiled per call, and no turn read twice."""

    __slots__ = ("_arguments", "_budgets", "_flows", "_known", "_lists", "_roles", "_running", "_unlisted")

    def __init__(self, policy: ToolPolicy) -> None:
        groups = policy.groups
        lists: tuple[tuple[Action, list[str]], ...] = (
            ("block", policy.block),
            ("review", policy.review),
            ("flag", policy.flag),
        )
        self._lists = [(_Names(names, groups), action) for action, names in lists if names]
        self._known = _Names(policy.allow, groups, exact=True)
        unlisted = policy.unlisted or ("block" if policy.allow else "screen")
        self._unlisted: Action | None = None if unlisted == "screen" else unlisted
        self._arguments = [
            (_Names([pattern], groups), [Argument(f"argument:{pattern}.{path}", path, of) for path, of in each.items()])
            for pattern, each in policy.arguments.items()
        ]
        self._budgets = [(_Names(budget.tools, groups), budget) for budget in policy.budgets]
        self._flows = [_Flow(flow, groups) for flow in policy.flows]
        self._roles = frozenset(role for flow in self._flows for role in flow.roles)
        start = Before(0, b"", (0,) * len(self._budgets), (-1.0,) * len(self._flows))
        self._running = Running(start, _arguments, frozen=True)

    def before(self, conversation: Conversation, heard: Mapping[bytes, float]) -> Before | None:
        """What came before, given what was heard of it already; None where no rule looks back."""
        last = conversation.last
        if last.role not in self._roles and not (last.tool_calls and (self._budgets or self._flows)):
            return None
        before = self._running.after(conversation.context, self._step, lambda known: known.hearing(heard))
        return self._continuing(before, conversation.gone) if isinstance(conversation, Continued) else before

    def _continuing(self, before: Before, gone: Gone) -> Before:
        made = [(_folded(name), calls) for name, calls in gone.calls.items()]
        read = [(Turn(role, name=name), p) for (role, name), p in gone.injection.items()]
        calls = tuple(
            so_far + sum(calls for name, calls in made if budget.hold(name))
            for so_far, (budget, _) in zip(before.calls, self._budgets, strict=True)
        )
        injection = tuple(
            max([so_far, *(p for turn, p in read if flow.goes_by(turn))])
            for so_far, flow in zip(before.injection, self._flows, strict=True)
        )
        return before._replace(calls=calls, injection=injection)

    def _step(self, before: Before, turn: Turn) -> Before:
        calls = before.calls
        if self._budgets and turn.tool_calls:
            names = [_folded(call.name) for call in _each_once(turn)]
            calls = tuple(
                so_far + sum(map(budget.hold, names)) for so_far, (budget, _) in zip(calls, self._budgets, strict=True)
            )
        digest, unheard = before.digest, before.unheard
        if self._flows:
            digest = _digest(before, turn)
            flows = tuple(at for at, flow in enumerate(self._flows) if flow.goes_by(turn))
            if flows and _says_anything(turn):
                unheard = (*unheard, Earlier(digest, before.turns + 1, flows))
        return Before(before.turns + 1, digest, calls, before.injection, unheard)

    def violations(self, conversation: Conversation, before: Before | None) -> tuple[Violation, ...]:
        """The rules that the calls on trial break, strictest first; flows are apart, as they need scores."""
        calls = conversation.last.tool_calls
        if not calls:
            return ()
        found: list[Violation] = []
        for call in calls:
            folded = _folded(call.name)
            found += self._by_name(call.name, folded)
            for names, arguments in self._arguments:
                if names.hold(folded):
                    given = _read(call.arguments)
                    found += filter(None, (argument.violation(given) for argument in arguments))
        if before:
            found += self._over_budget(conversation.last, before)
        return _strictest_first(found)

    def _by_name(self, name: str, folded: str) -> Iterator[Violation]:
        listed = self._known.hold(name)
        for names, action in self._lists:
            if names.hold(folded):
                listed = True
                yield _broken(f"tool:{names.label_of(folded)}", action)
        if self._unlisted and not listed:
            # The name itself is the model's text, and may be anything.
            yield _broken("tool:unlisted", self._unlisted)

    def _over_budget(self, last: Turn, before: Before) -> Iterator[Violation]:
        now = [_folded(call.name) for call in _each_once(last)]
        for (names, budget), earlier in zip(self._budgets, before.calls, strict=True):
            count = sum(map(names.hold, now))
            if count and count + earlier > budget.calls:
                yield _broken(f"budget:{names.label}", budget.action)

    def depends_on(self, conversation: Conversation, before: Before | None) -> list[Earlier]:
        """The turns of the context whose scores ``flows`` still needs; none where no flow is about the calls."""
        if before is None or not before.unheard:
            return []
        about = {at for at, _ in self._about(conversation)}
        return [earlier for earlier in before.unheard if not about.isdisjoint(earlier.flows)]

    def key(self, conversation: Conversation, before: Before | None) -> bytes | None:
        """What ``depends_on`` will call the turn on trial when it has become context; None where no flow would ask."""
        return _digest(before, conversation.last) if before and conversation.last.role in self._roles else None

    def flows(self, conversation: Conversation, before: Before | None) -> tuple[Violation, ...]:
        """The flows that the calls on trial break, strictest first, by P(injection) of what they depend on."""
        if before is None:
            return ()
        about = self._about(conversation)
        return _strictest_first(filter(None, (flow.violation(before.injection[at]) for at, flow in about)))

    def _about(self, conversation: Conversation) -> list[tuple[int, _Flow]]:
        if not self._flows or not conversation.last.tool_calls:
            return []
        names = [_folded(call.name) for call in conversation.last.tool_calls]
        return [(at, flow) for at, flow in enumerate(self._flows) if any(map(flow.names.hold, names))]


class _Names:
    """Patterns of names, groups resolved.

    Args:
        exact: whether names come as they are; else they come folded.
    """

    __slots__ = ("_each", "_matches", "label")

    def __init__(self, patterns: Sequence[str], groups: Mapping[str, Sequence[str]], *, exact: bool = False) -> None:
        self.label = ",".join(patterns)
        # A tool may be called as a group is.
        each = [(word, pattern) for word in patterns for pattern in (word, *groups.get(word, ()))]
        regexes = [translate(pattern if exact else _folded(pattern)) for _, pattern in each]
        self._matches = re.compile("|".join(regexes) if regexes else r"(?!)").match
        self._each = [(word, re.compile(regex).match) for (word, _), regex in zip(each, regexes, strict=True)]

    def hold(self, name: str) -> bool:
        """Whether one of them matches."""
        return self._matches(name) is not None

    def label_of(self, name: str) -> str:
        """The first that matches, in the policy's own words."""
        return next(word for word, matches in self._each if matches(name))


class _Flow:
    __slots__ = ("_rule", "_settings", "_trusted", "names", "roles")

    def __init__(self, flow: Flow, groups: Mapping[str, Sequence[str]]) -> None:
        self._settings = flow
        self._trusted = _Names(flow.trusted, groups, exact=True)
        self.names = _Names(flow.tools, groups)
        self.roles = frozenset(_ROLE_OF[source] for source in flow.after)
        self._rule = f"flow:{self.names.label}"

    def goes_by(self, turn: Turn) -> bool:
        """Whether the turn is of a kind that is not trusted."""
        return turn.role in self.roles and not self._trusted.hold(turn.name)

    def violation(self, injection: float) -> Violation | None:
        """By the highest P(injection) of what it goes by; below 0 where there was nothing."""
        threshold = self._settings.injection
        return Violation(self._rule, injection, threshold, self._settings.action) if injection >= threshold else None


def _broken(rule: str, action: Action) -> Violation:
    return Violation(rule, 1.0, 1.0, action)


def _strictest_first(found: Iterable[Violation]) -> tuple[Violation, ...]:
    """Each rule once, as strict as it was found."""
    once: dict[str, Violation] = {}
    for violation in sorted(found, key=lambda violation: -SEVERITY[violation.action]):
        once.setdefault(violation.rule, violation)
    return tuple(once.values())


def _read(arguments: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
    """Arguments as the tool will get them: those of a streamed call come as the string that they were written in."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _each_once(turn: Turn) -> Iterator[ToolCall]:
    """A turn's calls, without those that repeat one under its id in another spelling of its arguments."""
    seen: dict[tuple[str, str], list[Mapping[str, Any] | str]] = {}
    for call in turn.tool_calls:
        if call.id and len(turn.tool_calls) > 1:
            alike, arguments = seen.setdefault((call.id, call.name), []), _read(call.arguments)
            if arguments in alike:
                continue
            alike.append(arguments)
        yield call


def _folded(name: str) -> str:
    """A name as one that looks like it: who blocks "shell" means "Shell" too."""
    return (name if name.isascii() else unicodedata.normalize("NFKC", name)).casefold().strip()


def _says_anything(turn: Turn) -> bool:
    return bool(turn.media or turn.tool_calls or turn.text.strip())


def _arguments(turns: Sequence[Turn]) -> list[list[object]]:
    """What turns hold that may change."""
    return [[call.arguments for call in turn.tool_calls] for turn in turns]


def _digest(before: Before, turn: Turn) -> bytes:
    """Of all that came before, and of all in a turn that a backend is given to judge; the ids of its calls are not."""
    # The length tells where a text ends. Half of a surrogate pair is text too.
    head = repr((turn.role, turn.name, turn.media, [str(call) for call in turn.tool_calls], len(turn.text)))
    return blake2b(before.digest + (head + turn.text).encode(errors="surrogatepass"), digest_size=16).digest()
