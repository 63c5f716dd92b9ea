"""Guard: a backend to judge, a policy to decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from guardmw.backends import Backend, load
from guardmw.backends._plan import Ask, Plan, arun, run
from guardmw.backends.cascade import Cascade
from guardmw.conversation import STAGES, Conversation, Turn
from guardmw.errors import BackendError, Blocked, ConversationError, PolicyError
from guardmw.policy import Policy
from guardmw.tools import ToolRules
from guardmw.verdict import SEVERITY, Coverage, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw.verdict import Scores

    Screenable = str | Turn | Conversation | Mapping[str, Any] | Sequence[Turn | Mapping[str, Any]]

# Scores of earlier turns that a guard keeps, at some 150 bytes each.
_REMEMBERED = 4_096


class Guard:
    """Screens conversations: the last turn is judged in the light of the earlier ones.

    A guard never raises because of a backend: what could not be scored gets the policy's ``on_error`` action, and the
    verdict says so. It may be shared between threads and tasks.

    Args:
        backend: a Backend, or a spec for ``load``, such as "embedded".
        policy: when to act; thresholds it leaves open are taken from the backend.
        escalate: who is asked where that backend is in doubt, as in a Cascade: a Backend, a spec, or the URL of a
            server that ``load("vllm:URL")`` takes, behind a circuit breaker.

    Raises:
        BackendError: the spec names no backend, it cannot be made, or what was given is none.
        PolicyError: the policy is no Policy, or has a band while the backend is no Cascade.
    """

    def __init__(
        self,
        backend: Backend | str = "embedded",
        *,
        policy: Policy | None = None,
        escalate: Backend | str | None = None,
    ) -> None:
        self.backend = load(backend) if isinstance(backend, str) else backend
        if not isinstance(self.backend, Backend):
            raise BackendError(f"{type(backend).__name__} is no backend: it needs name, classify and aclassify")
        if not isinstance(policy, Policy | None):
            raise PolicyError(f"a policy is a Policy, not {type(policy).__name__}; for a file: Policy.load(path)")
        if escalate is not None:
            self.backend = Cascade(self.backend, _careful(escalate) if isinstance(escalate, str) else escalate)
        if policy:
            self.backend = _banded(self.backend, policy)
        self._policy = (policy or Policy()).advised(getattr(self.backend, "thresholds", {}))
        # Asked for at every verdict, and a pydantic model is slow to ask.
        self._rules = {stage: self._policy.at(stage) for stage in STAGES}
        self._max_characters = self._policy.max_characters
        self._tools = ToolRules(self._policy.tools) if self._policy.tools else None
        self._heard: dict[bytes, float] = {}

    def __repr__(self) -> str:
        return f"Guard({self.backend.name!r}, policy={self.policy.fingerprint})"

    @property
    def policy(self) -> Policy:
        """The policy in force: the one given, with the backend's advice wherever it names no threshold."""
        return self._policy

    def screen(self, given: Screenable) -> Verdict:
        """Judge the last turn of what ``Conversation.of`` reads.

        Raises:
            ConversationError: it cannot be read as a conversation.
        """
        return run(self._plan([Conversation.of(given)]))[0]

    async def ascreen(self, given: Screenable) -> Verdict:
        """``screen``, without blocking the event loop."""
        return (await arun(self._plan([Conversation.of(given)])))[0]

    def screen_many(self, given: Iterable[Screenable]) -> list[Verdict]:
        """Judge many in one batch: one verdict each, in their order. A backend that fails, fails for all of them.

        Raises:
            ConversationError: one cannot be read as a conversation; the message gives its index, and none is judged.
        """
        return run(self._plan(_read(given)))

    async def ascreen_many(self, given: Iterable[Screenable]) -> list[Verdict]:
        """``screen_many``, without blocking the event loop."""
        return await arun(self._plan(_read(given)))

    def _plan(self, conversations: list[Conversation]) -> Plan[list[Verdict]]:
        return self._ruled(self._tools, conversations) if self._tools else self._judged(conversations)

    def _ruled(self, tools: ToolRules, conversations: list[Conversation]) -> Plan[list[Verdict]]:
        """What tool rules block nobody is asked about; what else they find is added to what the backend says."""
        started = perf_counter()
        before = [tools.before(conversation, self._heard) for conversation in conversations]
        found = list(map(tools.violations, conversations, before))
        asked = [i for i, broken in enumerate(found) if not broken or broken[0].action != "block"]
        needed = {
            earlier.key: Conversation(conversations[i].turns[: earlier.at])
            for i in asked
            for earlier in tools.depends_on(conversations[i], before[i])
        }
        judged = yield from self._judged([*(conversations[i] for i in asked), *needed.values()])
        # Kept apart from the memory, which others may empty.
        heard = {key: self._hear(key, verdict) for key, verdict in zip(needed, judged[len(asked) :], strict=True)}
        verdicts = dict(zip(asked, judged, strict=False))
        elapsed_ms = (perf_counter() - started) * 1000
        for i, conversation in enumerate(conversations):
            if i not in verdicts:
                coverage = Coverage(len(conversation.trial), 0, 0, 0, conversation.last.media)
                verdicts[i] = self._rules[conversation.stage].refuse(found[i], coverage, elapsed_ms)
                continue
            earlier = before[i]
            own = tools.key(conversation, earlier)
            if own:
                self._hear(own, verdicts[i])
            broken = (*found[i], *(tools.flows(conversation, earlier.hearing(heard)) if earlier else ()))
            if broken:
                verdicts[i] = verdicts[i].beside(broken)
        return [verdicts[i] for i in range(len(conversations))]

    def _hear(self, key: bytes, verdict: Verdict) -> float:
        """P(injection) of a turn, for the flows of later ones; 1 where it was not judged as the policy demands."""
        doubtful = verdict.degraded and SEVERITY[verdict.action] >= SEVERITY["review"]
        injection = 1.0 if doubtful else verdict.scores.injection if verdict.scores else 0.0
        # A failure may pass, and is not remembered.
        if verdict.scores and not verdict.scores.degraded:
            if len(self._heard) >= _REMEMBERED:
                self._heard.clear()
            self._heard[key] = injection
        return injection

    def _judged(self, conversations: list[Conversation]) -> Plan[list[Verdict]]:
        started = perf_counter()
        trials = [conversation.trial for conversation in conversations]
        # Blank text needs no opinion, and text beyond the policy's limit gets none.
        asked = [i for i, trial in enumerate(trials) if len(trial) <= self._max_characters and not _blank(trial)]
        scored: dict[int, Scores] = {}
        failure = ""
        if asked:
            try:
                scored = dict(zip(asked, (yield Ask(self.backend, [conversations[i] for i in asked])), strict=True))
            except BackendError as error:
                failure = str(error) or type(error).__name__
        elapsed_ms = (perf_counter() - started) * 1000
        unscored = set(asked) if failure else ()
        verdicts = []
        for i, (conversation, trial) in enumerate(zip(conversations, trials, strict=True)):
            rules, characters, media = self._rules[conversation.stage], len(trial), conversation.last.media
            if i in unscored:
                verdicts.append(rules.fail(failure, Coverage(characters, 0, 0, 0, media), elapsed_ms))
                continue
            scores = scored.get(i)
            if scores:
                coverage = _covered(scores.coverage, characters)
            else:
                coverage = Coverage(characters, characters if _blank(trial) else 0, 0)
            if media:
                coverage = replace(coverage, media=media)
            verdicts.append(rules.decide(scores, coverage, elapsed_ms))
        return verdicts


def enforce(verdict: Verdict) -> Verdict:
    """Return a verdict that lets the turn through.

    Raises:
        Blocked: the action is block.
    """
    if verdict.action == "block":
        raise Blocked(verdict)
    return verdict


def _careful(spec: str) -> Backend:
    """Who is asked in doubt, by its spec or the URL of its server."""
    if not spec.startswith(("http://", "https://")):
        return load(spec)
    from guardmw.backends.resilient import Resilient  # noqa: PLC0415 - brings asyncio, a fifth of guardmw's import time

    # It has a deadline and retries of its own; what it cannot know is that nobody has been answering for a while.
    return Resilient(load(f"vllm:{spec}"), deadline=None, attempts=1)


def _banded(backend: Backend, policy: Policy) -> Backend:
    """The backend with the policy's bands, where it has any."""
    stages = {stage: part.band for stage, part in policy.stages.items() if part.band is not None}
    if policy.band is None and not stages:
        return backend
    if not isinstance(backend, Cascade):
        raise PolicyError(f"the policy has a band, and {backend.name} is no cascade: Guard(…, escalate=…) makes one")
    return backend.banded(policy.band, stages)


def _covered(stated: Coverage | None, characters: int) -> Coverage:
    """What a backend states that it read of so many characters; of how many is not for it to say."""
    if stated is None:
        return Coverage(characters, characters)
    if stated.characters == characters >= stated.judged:
        return stated
    return replace(stated, characters=characters, judged=min(stated.judged, characters))


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _read(given: Iterable[Screenable]) -> list[Conversation]:
    # A list it is almost always, and to ask that is quick.
    if not isinstance(given, list) and (
        isinstance(given, str | bytes | Mapping | Turn | Conversation) or not isinstance(given, Iterable)
    ):
        raise ConversationError(f"many conversations come as a list of them, not as one {type(given).__name__}")
    conversations = []
    for index, one in enumerate(given):
        try:
            conversations.append(Conversation.of(one))
        except ConversationError as error:
            raise ConversationError(f"conversation {index}: {error}") from None
    return conversations
