"""Cheap first, careful second: only what leaves a tier in doubt is asked of the next one, and never in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from guardmw.backends import Backend, load
from guardmw.backends._plan import Ask, Plan, arun, run
from guardmw.conversation import STAGES
from guardmw.errors import BackendError, nearest
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw.conversation import Conversation, Stage
    from guardmw.settings import ScoreName
    from guardmw.verdict import Scores

    Bands = tuple[float, float] | Mapping[ScoreName, tuple[float, float]]

BAND = (0.2, 0.8)
"""Where nobody names a band."""

_SCORES = ("unsafe", "injection", *CATEGORIES)


class Cascade:
    """A backend made of two or more, the cheapest first.

    A conversation goes on to the next tier where one of its scores lies in its band, or where the tier read it only in
    part; all that go on do so in one batch. What the next tier says of it stands. Where that has no opinion of its own
    (no categories at all, an injection score of exactly 0), the opinion before stands.

    A tier that fails leaves all it was asked to the tier behind it. Where none is left, or none that is known to judge
    injections as the failed one does, the scores there are come back with ``Scores.degraded`` set, and the policy's
    ``on_degraded`` decides; where there are none, the failure is raised. A tier is known to judge injections by its
    advice on them, or by a score of them that it has given.

    Args:
        first: the cheapest.
        others: each more careful than the one before.
        band: the lowest and the highest score that leave doubt, both included: of P(unsafe) and P(injection); or by
            score, categories among them. "unsafe" and "injection" are (0.2, 0.8) where they are not named, and a
            category without a band leaves no doubt.
        stages: bands that differ at one stage.

    Attributes:
        thresholds: the advice of the last tier. What is outside a band is decided alike by any threshold within it.

    Raises:
        BackendError: there is no second tier, a tier is no backend, or a band is none.
    """

    def __init__(
        self,
        first: Backend,
        *others: Backend,
        band: Bands = BAND,
        stages: Mapping[Stage, Bands] | None = None,
    ) -> None:
        if not others:
            raise BackendError("a cascade has two tiers or more: Cascade(first, second)")
        self.tiers = (first, *others)
        for tier in self.tiers:
            if not isinstance(tier, Backend):
                raise BackendError(f"{type(tier).__name__} is no backend: it needs name, classify and aclassify")
        self.name = ">".join(tier.name for tier in self.tiers)
        # The last tier's advice; of injections, that of the last one that knows them.
        advice = [getattr(tier, "thresholds", {}) for tier in self.tiers]
        attacks = [given["injection"] for given in advice if "injection" in given]
        self._judges = {at for at, given in enumerate(advice) if "injection" in given}
        self.thresholds: Mapping[str, float] = {**({"injection": attacks[-1]} if attacks else {}), **advice[-1]}
        if unknown := set(stages or ()).difference(STAGES):
            raise BackendError(f"unknown stage {min(unknown)!r}: {nearest(min(unknown), STAGES)}")
        self._band, self._stages = band, dict(stages or {})
        whole = _by_score(band)
        self._doubt = {stage: _Doubt.of(whole | _by_score((stages or {}).get(stage, {}))) for stage in STAGES}

    def __repr__(self) -> str:
        return f"Cascade({self.name!r})"

    def banded(self, band: Bands | None, stages: Mapping[Stage, Bands]) -> Cascade:
        """The same tiers with other bands, as a policy gives them."""
        whole = self._band if band is None else _by_score(self._band) | _by_score(band)
        return Cascade(*self.tiers, band=whole, stages={**self._stages, **stages})

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return run(self._plan(conversations))

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch without blocking the event loop."""
        return await arun(self._plan(conversations))

    def doubtful(self, conversation: Conversation, scores: Scores) -> bool:
        """Whether a tier's scores send the conversation on to the next."""
        return bool(scores.degraded) or read_in_part(scores) or self._doubt[conversation.stage].of_scores(scores)

    def _plan(self, conversations: Sequence[Conversation]) -> Plan[list[Scores]]:
        course = _Course(len(conversations))
        for at, tier in enumerate(self.tiers):
            if not course.open:
                break
            try:
                given = yield Ask(tier, [conversations[i] for i in course.open])
            except BackendError as error:
                course.fail(error, judged=at in self._judges)
                continue
            if any(scores.injection for scores in given):
                self._judges.add(at)
            course.tell(given, judged=at in self._judges)
            # Of the last tier nobody asks whether it is in doubt.
            if tier is not self.tiers[-1]:
                course.close(lambda i: not self.doubtful(conversations[i], course.found[i]))
        return course.end()


class _Course:
    """How far the tiers have come with a batch.

    Attributes:
        open: which conversations go on to the next tier.
        found: what has been said of each.
    """

    def __init__(self, count: int) -> None:
        self.open = list(range(count))
        self.found: dict[int, Scores] = {}
        self._count = count
        self._failure: BackendError | None = None
        # Those whose attacks nobody has judged because a tier that does so failed, and how it did.
        self._unjudged: dict[int, BackendError] = {}

    def tell(self, given: Sequence[Scores], *, judged: bool) -> None:
        """What a tier says of the open ones; injections too, if ``judged``."""
        self._failure = None
        for i, scores in zip(self.open, given, strict=True):
            self.found[i] = upon(self.found[i], scores) if i in self.found else scores
        if judged:
            self._unjudged.clear()

    def fail(self, failure: BackendError, *, judged: bool) -> None:
        """A tier said nothing, and would have said it of injections too, if ``judged``."""
        self._failure = failure
        if judged:
            self._unjudged |= {i: failure for i in self.open if i not in self.found or not self.found[i].injection}

    def close(self, sure: Callable[[int], bool]) -> None:
        """Let those go on that are not sure, or not judged."""
        self.open = [i for i in self.open if i in self._unjudged or not sure(i)]

    def end(self) -> list[Scores]:
        """One for each; or the failure, where nothing was said."""
        if self._failure:
            if not self.found:
                raise self._failure
            for i in self.open:
                self.found[i] = replace(self.found[i], degraded=_told(self._failure))
        else:
            for i, failure in self._unjudged.items():
                why = self.found[i].degraded or f"injections were not judged: {_told(failure)}"
                self.found[i] = replace(self.found[i], degraded=why)
        return [self.found[i] for i in range(self._count)]


class _Doubt(NamedTuple):
    """The bands of one stage, in the form that is fast to ask."""

    unsafe: tuple[float, float]
    injection: tuple[float, float]
    categories: tuple[tuple[str, float, float], ...]

    @classmethod
    def of(cls, bands: Mapping[ScoreName, tuple[float, float]]) -> _Doubt:
        categories = tuple((name, *bands[name]) for name in CATEGORIES if name in bands)
        return cls(bands.get("unsafe", BAND), bands.get("injection", BAND), categories)

    def of_scores(self, scores: Scores) -> bool:
        # Doubt is two-sided: a confident "safe" is as final as a confident "unsafe", of harm and of attacks alike.
        if scores.unsafe > self.unsafe[1] or scores.injection > self.injection[1]:
            return False
        # An injection score of exactly 0 is that of a model which has no such score.
        if scores.unsafe >= self.unsafe[0] or 0 < scores.injection >= self.injection[0]:
            return True
        return any(low <= scores.categories.get(name, -1.0) <= high for name, low, high in self.categories)


def _told(failure: BackendError) -> str:
    return str(failure) or type(failure).__name__


def read_in_part(scores: Scores) -> bool:
    """Whether what a backend left out, or could not read, may change its mind."""
    covered = scores.coverage
    return covered is not None and (covered.judged < covered.characters or covered.unreadable > 0)


def upon(before: Scores, after: Scores) -> Scores:
    """What a later tier says, on top of what it has no opinion on."""
    if after.injection and before.categories.keys() <= after.categories.keys():
        return after
    unsafe, injection = after.unsafe, after.injection or before.injection
    # Who has no opinion on attacks cannot clear what may be one.
    if not after.injection and before.injection >= BAND[0]:
        unsafe = max(unsafe, before.unsafe)
    degraded = after.degraded
    if before.injection and not after.injection:
        # Its opinion stands, and so does what is wrong with it.
        degraded = degraded or before.degraded or ("injections were judged in part" if read_in_part(before) else "")
    categories = {**before.categories, **after.categories}
    return replace(after, unsafe=unsafe, injection=injection, categories=categories, degraded=degraded)


def from_spec(rest: str) -> Cascade:
    """What "cascade:SPEC,SPEC" loads, the cheapest first: "cascade:embedded,onnx:FOLDER"."""
    specs = [spec.strip() for spec in rest.split(",")]
    if len(specs) == 1 or not all(specs):
        raise BackendError("a cascade is two specs or more, the cheapest first: cascade:embedded,onnx:FOLDER")
    return Cascade(*map(load, specs))


def _by_score(band: Bands) -> dict[ScoreName, tuple[float, float]]:
    bands: dict[ScoreName, tuple[float, float]] = (
        dict(band) if isinstance(band, Mapping) else {"unsafe": band, "injection": band}
    )
    for name, given in bands.items():
        if name not in _SCORES:
            raise BackendError(f"no band for {name!r}: {nearest(name, _SCORES)}")
        if len(given) != 2 or not 0 <= given[0] <= given[1] <= 1:  # noqa: PLR2004 - from, to
            raise BackendError(f"a band is two scores from 0 to 1, the lower one first, not {given}")
    return bands
