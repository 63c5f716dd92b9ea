"""The band of a cascade, fitted on labelled rows so that what it promises holds on others like them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guardmw.backends._plan import Ask, run
from guardmw.backends.cascade import read_in_part, upon
from guardmw.conversation import STAGES
from guardmw.errors import BackendError, DataError
from guardmw.evaluate import metrics
from guardmw.evaluate.calibrate import halves
from guardmw.evaluate.families import families, sides
from guardmw.policy import Policy
from guardmw.verdict import SEVERITY, Coverage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from guardmw.backends import Backend
    from guardmw.backends._plan import Plan
    from guardmw.backends.cascade import Cascade
    from guardmw.conversation import Conversation, Stage
    from guardmw.evaluate.metrics import Bools, Floats
    from guardmw.evaluate.rows import Row
    from guardmw.verdict import Scores

CONFIDENCE = 0.95
# A stage with fewer rows of either label in one half has the band of all.
_FEWEST = 50
# Bands that are tried in turn: evenly spaced in log-odds, from where next to nothing is sure.
_STEPS = 120
_SUREST = 9.0
# Of the curve: at most this share is escalated.
_BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# Conversations in one call of a backend.
_BATCH = 64
# Texts that the second tier may give no scores for, and beyond them one in so many; more, and something is broken.
_UNREAD, _UNREAD_IN = 3, 20


class Target(NamedTuple):
    """What a band is to promise: one of the two.

    Attributes:
        escalated: the highest share of rows that may be escalated.
        lost: the highest share of unsafe rows that may be missed and would not have been by always asking the second
            tier, and of safe rows that may be withheld and would not have been.
    """

    escalated: float | None = None
    lost: float | None = None


@dataclass(frozen=True, slots=True)
class Tiers:
    """What two tiers say of rows, all of shape (n,), scores (n, 2).

    Attributes:
        unsafe: the labels.
        scores: P(unsafe) and P(injection) of the first tier; -1 where it has no such score.
        forced: it read the row only in part, so that it is escalated whatever it says.
        first, second: whether a policy withholds the row by the first tier's scores, and by the second's.
        families: numbers; rows with the same one belong together, and None leaves each by itself.
    """

    unsafe: Bools
    scores: Floats
    forced: Bools
    first: Bools
    second: Bools
    families: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.unsafe)

    def of(self, rows: Any) -> Tiers:  # noqa: ANN401 - whatever numpy takes as an index
        """Some of the rows."""
        families = None if self.families is None else self.families[rows]
        return Tiers(
            self.unsafe[rows], self.scores[rows], self.forced[rows], self.first[rows], self.second[rows], families
        )

    def escalated(self, band: tuple[float, float]) -> Bools:
        """Which rows a band sends on."""
        top = self.scores.max(axis=1)
        return np.asarray(self.forced | ((top >= band[0]) & (top <= band[1])))

    def one_of_each(self, seed: int) -> Tiers:
        """One row of each family, drawn by chance."""
        if self.families is None:
            return self
        drawn = np.random.default_rng(seed).permutation(len(self))
        _, first = np.unique(self.families[drawn], return_index=True)
        return self.of(drawn[first])

    def share(self, which: Bools, of: Bools) -> float:
        """How many rows ``of`` some are ``which``, those of a family together as one."""
        if self.families is None:
            return int((which & of).sum()) / max(int(of.sum()), 1)
        _, kin = np.unique(self.families[of], return_inverse=True)
        shares = np.bincount(kin, weights=which[of]) / np.bincount(kin)
        return float(shares.mean()) if len(shares) else 0.0

    def withheld(self, band: tuple[float, float]) -> Bools:
        """Which rows the cascade withholds."""
        return np.where(self.escalated(band), self.second, self.first)

    @property
    def missable(self) -> Floats:
        """Of unsafe rows that only the second tier catches the higher score: those below a band are missed.

        However wide it is upward: what lies above a band is withheld.
        """
        return np.asarray(self.scores.max(axis=1)[self.unsafe & ~self.forced & self.second & ~self.first])

    @property
    def alarming(self) -> Floats:
        """Of safe rows that only the second tier lets pass the higher score: no others than those above a band alarm.

        However wide it is downward: another score in it can only take a row out.
        """
        return np.asarray(self.scores.max(axis=1)[~self.unsafe & ~self.forced & self.first & ~self.second])


class Measured(NamedTuple):
    """What two tiers said of rows.

    Attributes:
        ms: mean time a text took each.
        unread: texts that the second tier gave no scores for, as an answer could not be read; ``on_degraded`` decided.
    """

    tiers: Tiers
    ms: tuple[float, float]
    unread: int


@dataclass(frozen=True, slots=True)
class Point:
    """What one band does with rows it was not fitted on.

    Attributes:
        band: None for the first tier alone, and (0, 1) for always asking the second.
        ms: mean time a text takes the backends.
    """

    band: tuple[float, float] | None
    escalated: float
    recall: float | None
    fpr: float | None
    f1: float | None
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        figures = {"escalated": self.escalated, "recall": self.recall, "fpr": self.fpr, "f1": self.f1}
        rounded = {name: None if value is None else round(value, 4) for name, value in figures.items()}
        return {"band": self.band and list(self.band), **rounded, "ms": round(self.ms, 3)}


@dataclass(frozen=True, slots=True)
class Fitted:
    """The band of one stage, or of all.

    Attributes:
        promised: the highest rates on other rows, by name: "escalated"; or "missed" and "alarmed".
        seen: the same, on the rows that nothing was fitted on.
        point, curve: what the band does there, and what others would.
    """

    band: tuple[float, float]
    rows: int
    promised: dict[str, float]
    seen: dict[str, float]
    point: Point
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "band": list(self.band),
            "rows": self.rows,
            "promised": self.promised,
            "seen": {name: round(rate, 4) for name, rate in self.seen.items()},
            "point": self.point.to_dict(),
            "curve": [point.to_dict() for point in self.curve],
        }


@dataclass(frozen=True, slots=True)
class Bands:
    """Bands of a cascade.

    Attributes:
        confidence: of all promises together.
        parts: "all", and the stages that have a band of their own.
        unread: texts that the second tier gave no scores for; they count as ``on_degraded`` makes of them.
    """

    backend: str
    confidence: float
    rows: int
    parts: dict[str, Fitted]
    unread: int = 0

    def policy(self, policy: Policy) -> Policy:
        """A policy with these bands, and otherwise as it was."""
        settings = policy.model_dump(mode="json", exclude_defaults=True)
        # An older band would stand beside the new ones, with no promise.
        stages: dict[str, Any] = {
            stage: {name: value for name, value in part.items() if name != "band"}
            for stage, part in settings.get("stages", {}).items()
        }
        for stage, fitted in self.parts.items():
            if stage != "all":
                stages[stage] = stages.get(stage, {}) | {"band": list(fitted.band)}
        return Policy.model_validate(settings | {"stages": stages, "band": list(self.parts["all"].band)})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        parts = {name: fitted.to_dict() for name, fitted in self.parts.items()}
        told = {"backend": self.backend, "confidence": self.confidence, "rows": self.rows, "unread": self.unread}
        return told | {"parts": parts}


def fit(
    cascade: Cascade,
    policy: Policy,
    rows: Sequence[Row],
    target: Target,
    *,
    confidence: float = CONFIDENCE,
    by_stage: bool = False,
    seed: int = 0,
    done: Callable[[int], None] | None = None,
) -> Bands:
    """Fit the band of a cascade on one half of the rows, and measure what it does on the other. Both tiers see all.

    The promise is about rows drawn as these were, those that belong together as one, and holds with this confidence
    over the draw: each band is put to an exact binomial test, of one row of each family, one after the other, until the
    first that fails (Learn then Test, arXiv 2110.01052, by fixed sequence).

    Args:
        cascade: of two tiers.
        policy: in force; a row counts as withheld where it says review or block.
        rows: of both labels.
        target: what is promised.
        confidence: of everything that is promised, together.
        by_stage: a band for each stage that has enough rows, too.
        seed: of the halves, which hold about the same stages and labels, and no two rows that belong together.
        done: called with the number of rows that have been scored.

    Raises:
        DataError: there are too few rows of some label, the target is none, or even the narrowest band escalates more.
        BackendError: the first tier could not score them, or the second not more than a few.
    """
    _check(cascade, target, confidence)
    fitting, reporting = halves(rows, seed)
    for label in (True, False):
        if (count := sum(row.unsafe == label for row in fitting)) < _FEWEST:
            kind = "unsafe" if label else "safe"
            raise DataError(f"a band is fitted on half of the rows, and needs {_FEWEST} {kind} ones there, not {count}")
    ours, ms, unread = measure(cascade, policy, fitting, done=done)
    lowest, _ = withholding(policy, STAGES)
    by_kind = int((ours.first & ~ours.forced & (ours.scores.max(axis=1) < lowest)).sum())
    if by_kind and target.escalated is None:
        raise DataError(
            f"{by_kind} rows are withheld for a category alone, which no band changes: nothing can be promised of what "
            "is lost; fit --at-most, or a policy without limits on categories"
        )
    theirs, _, more = measure(cascade, policy, reporting, done=done and (lambda count: done(len(fitting) + count)))
    groups: dict[str, tuple[Any, Any]] = {"all": (slice(None), slice(None))}
    if by_stage:
        groups |= {stage: (own, other) for stage, own, other in _stages(ours, fitting, reporting)}
        groups["all"] = _rest(ours, groups)
    error = (1 - confidence) / len(groups)
    parts = {}
    for name, (own, other) in groups.items():
        limits = withholding(policy, STAGES if name == "all" else [name])  # type: ignore[list-item]
        parts[name] = fit_tiers(ours.of(own), theirs.of(other), target, error=error, limits=limits, ms=ms, seed=seed)
    return Bands(cascade.name, confidence, len(rows), parts, unread + more)


def fit_tiers(
    fitting: Tiers,
    reporting: Tiers,
    target: Target,
    *,
    error: float,
    limits: tuple[float, float],
    ms: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
) -> Fitted:
    """``fit``, of rows that have been scored.

    Args:
        fitting: what the band is fitted on.
        reporting: what it is measured on.
        target: what is promised.
        error: the chance that the promise is broken.
        limits: the lowest and the highest score at which the policy withholds; a band reaches from one to the other.
        ms: what a text costs each tier.
        seed: of what is drawn.
    """
    if target.escalated is not None:
        band = _within_budget(fitting, target.escalated, error, limits, seed)
        promised = {"escalated": target.escalated}
    else:
        lost = target.lost or 0.0
        band = _losing_little(fitting, lost, error, limits, seed)
        promised = {"missed": lost, "alarmed": lost}
    seen = rates(reporting, band)
    path = _frontier(fitting, limits)
    curve = [_point(reporting, None, ms)]
    for budget in _BUDGETS:
        # Each at least as good as the one before, on the rows that were fitted on.
        affordable = [one for share, one in path if share <= budget]
        if affordable and affordable[-1] != curve[-1].band:
            curve.append(_point(reporting, affordable[-1], ms))
    curve.append(_point(reporting, (0.0, 1.0), ms))
    return Fitted(
        band, len(reporting), promised, {n: seen[n] for n in promised}, _point(reporting, band, ms), tuple(curve)
    )


def rates(tiers: Tiers, band: tuple[float, float]) -> dict[str, float]:
    """How often a band escalates, and errs where the second tier would not have: of unsafe rows, and of safe ones.

    Rows that belong together count as one.
    """
    withheld = tiers.withheld(band)
    return {
        "escalated": tiers.share(tiers.escalated(band), np.ones(len(tiers), dtype=bool)),
        "missed": tiers.share(tiers.second & ~withheld, tiers.unsafe),
        "alarmed": tiers.share(~tiers.second & withheld, ~tiers.unsafe),
    }


def measure(
    cascade: Cascade, policy: Policy, rows: Sequence[Row], *, done: Callable[[int], None] | None = None
) -> Measured:
    """What both tiers say of every row; ``done`` is called with the count.

    Raises:
        BackendError: the first tier could not score them, or the second not more than a few.
    """
    first: list[Scores] = []
    second: list[Scores] = []
    seconds = [0.0, 0.0]
    unread = 0
    for start in range(0, len(rows), _BATCH):
        batch = [row.conversation for row in rows[start : start + _BATCH]]
        started = perf_counter()
        first.extend(run(_asked(cascade.tiers[0], batch)))
        between = perf_counter()
        unread += _extend(second, first, cascade.tiers[1], batch, unread)
        seconds = [seconds[0] + between - started, seconds[1] + perf_counter() - between]
        if done:
            done(len(second))
    rules = {stage: policy.at(stage) for stage in STAGES}

    def withheld(given: Iterable[Scores]) -> Bools:
        verdicts = (
            rules[row.conversation.stage].decide(one, Coverage(1, 1), 0) for row, one in zip(rows, given, strict=True)
        )
        return np.array([SEVERITY[verdict.action] >= SEVERITY["review"] for verdict in verdicts], dtype=bool)

    tiers = Tiers(
        unsafe=np.array([row.unsafe for row in rows], dtype=bool),
        # As in a cascade, 0 is no opinion on injections.
        scores=np.array([(s.unsafe, s.injection or -1.0) for s in first], dtype=np.float64).reshape(-1, 2),
        forced=np.array([read_in_part(s) for s in first], dtype=bool),
        first=withheld(first),
        second=withheld(map(upon, first, second)),
        families=np.array(families(rows), dtype=np.int64),
    )
    each = 1000 / max(len(rows), 1)
    return Measured(tiers, (seconds[0] * each, seconds[1] * each), unread)


def _extend(
    found: list[Scores], first: Sequence[Scores], tier: Backend, batch: Sequence[Conversation], unread: int
) -> int:
    """What the second tier says of a batch; a text it says nothing of is degraded, as in a cascade, and counted."""
    try:
        found.extend(run(_asked(tier, batch)))
    except BackendError:
        # One answer that cannot be read may have failed all of them.
        failed = 0
        for conversation in batch:
            before = first[len(found)]
            try:
                found.extend(run(_asked(tier, [conversation])))
            except BackendError as failure:
                failed += 1
                if unread + failed > _UNREAD + len(found) // _UNREAD_IN:
                    raise
                found.append(replace(before, degraded=str(failure) or type(failure).__name__))
        return failed
    return 0


def _asked(tier: Backend, conversations: Sequence[Conversation]) -> Plan[list[Scores]]:
    """As a route asks: a short answer, and an error that quotes a text, are found out."""
    return (yield Ask(tier, conversations))


def withholding(policy: Policy, stages: Iterable[Stage]) -> tuple[float, float]:
    """The lowest and the highest score at which P(unsafe) or P(injection) withholds, at any of these stages."""
    limits = [limit for stage in stages for limit in policy.at(stage).withholding]
    return min(limits), max(limits)


def tail(successes: int, trials: int, rate: float) -> float:
    """The chance of so many successes or fewer, P(X <= k), exactly."""
    if rate <= 0 or successes >= trials:
        return 1.0
    if rate >= 1:
        return 0.0
    logs = [_log_chance(k, trials, rate) for k in range(successes + 1)]
    highest = max(logs)
    return min(1.0, math.exp(highest) * math.fsum(math.exp(log - highest) for log in logs))


def upper(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper bound of a rate by Clopper and Pearson (1934)."""
    low, high = 0.0, 1.0
    # Halved until it is as exact as a float.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(successes, trials, middle) > 1 - confidence else (low, middle)
    return high


def _log_chance(successes: int, trials: int, rate: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return ways + successes * math.log(rate) + (trials - successes) * math.log1p(-rate)


def _losing_little(
    tiers: Tiers, lost: float, error: float, limits: tuple[float, float], seed: int
) -> tuple[float, float]:
    """The narrowest band in a sequence that was fixed beforehand, each side of it tested at half the error."""
    low, high = 0.0, 1.0
    # The test is of rows that know nothing of each other: forty answers to one prompt are not forty witnesses.
    unsafe, safe = (tiers.of(label).one_of_each(seed) for label in (tiers.unsafe, ~tiers.unsafe))
    missable, alarming = unsafe.missable, safe.alarming
    for tried in _spaced(-_SUREST, limits[0], math.floor):
        if tail(int((missable < tried).sum()), len(unsafe), lost) > error / 2:
            break
        low = tried
    for tried in _spaced(_SUREST, limits[1], math.ceil):
        if tail(int((alarming > tried).sum()), len(safe), lost) > error / 2:
            break
        high = tried
    return low, high


def _within_budget(
    tiers: Tiers, budget: float, error: float, limits: tuple[float, float], seed: int
) -> tuple[float, float]:
    """The best of the bands found on one half of the rows, tested on the other from the narrowest on."""
    kin = range(len(tiers)) if tiers.families is None else tiers.families.tolist()
    tested = sides(tiers.unsafe.tolist(), kin, seed)
    finding, testing = tiers.of(~tested), tiers.of(tested)
    path, testing = _frontier(finding, limits), testing.one_of_each(seed)
    best = None
    for _, band in path:
        if tail(int(testing.escalated(band).sum()), len(testing), budget) > error:
            break
        best = band
    if best is None:
        needed = math.ceil(4 * math.log(error) / math.log1p(-budget))
        raise DataError(
            f"so few rows do not show that a band escalates at most {budget:g}: allow more, or bring at least {needed} "
            "that do not belong together, as answers to one prompt do"
        )
    return best


def _frontier(tiers: Tiers, limits: tuple[float, float]) -> list[tuple[float, tuple[float, float]]]:
    """Bands from the narrowest on, with the share they escalate: each errs less often than any before.

    Errors of both kinds count alike, as rates within their label.
    """
    top = tiers.scores.max(axis=1)
    parts = np.linspace(0, 1, 17)
    below, above = top[top < limits[0]], top[top > limits[1]]
    lows = {0.0, limits[0]} | {_rounded(q, math.floor) for q in (np.quantile(below, parts) if len(below) else ())}
    highs = {1.0, limits[1]} | {_rounded(q, math.ceil) for q in (np.quantile(above, parts) if len(above) else ())}
    unsafe, safe = max(int(tiers.unsafe.sum()), 1), max(int((~tiers.unsafe).sum()), 1)
    found = []
    for band in ((low, high) for low in lows for high in highs):
        withheld = tiers.withheld(band)
        errors = (tiers.unsafe & ~withheld).sum() / unsafe + (~tiers.unsafe & withheld).sum() / safe
        found.append((float(tiers.escalated(band).mean()), float(errors), band))
    path: list[tuple[float, tuple[float, float]]] = []
    least = math.inf
    for share, errors, band in sorted(found):
        if errors < least:
            path.append((share, band))
            least = errors
    return path


def _point(tiers: Tiers, band: tuple[float, float] | None, ms: tuple[float, float]) -> Point:
    withheld = tiers.first if band is None else tiers.withheld(band)
    # What a text costs is counted by rows, as recall is, and not by families.
    escalated = 0.0 if band is None else float(tiers.escalated(band).mean()) if len(tiers) else 0.0
    figures = metrics.at_threshold(tiers.unsafe, withheld)
    return Point(band, escalated, figures.recall, figures.fpr, figures.f1, ms[0] + escalated * ms[1])


def _spaced(start: float, limit: float, rounded: Callable[[float], int]) -> list[float]:
    """Scores from the surest to a limit, even in log-odds; rounded towards the surest."""
    limit = min(max(limit, 1e-9), 1 - 1e-9)
    end = math.log(limit / (1 - limit))
    if abs(end) >= _SUREST and end * start > 0:
        return []
    return [_rounded(1 / (1 + math.exp(-odds)), rounded) for odds in np.linspace(start, end, _STEPS)]


def _rounded(score: float, rounded: Callable[[float], int]) -> float:
    return rounded(score * 1e6) / 1e6


def _stages(ours: Tiers, fitting: Sequence[Row], reporting: Sequence[Row]) -> Iterator[tuple[str, Bools, Bools]]:
    """Stages that have enough rows of either label, and which those are."""
    stages, others = (np.array([row.conversation.stage for row in part]) for part in (fitting, reporting))
    for stage in STAGES:
        own = stages == stage
        if min((ours.unsafe & own).sum(), (~ours.unsafe & own).sum()) >= _FEWEST:
            yield stage, own, others == stage


def _rest(ours: Tiers, groups: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """The rows of stages without a band of their own, where there are enough: theirs is the band of all others."""
    named = [pair for name, pair in groups.items() if name != "all"]
    if not named:
        return groups["all"]
    own, other = (~np.any([pair[side] for pair in named], axis=0) for side in (0, 1))
    enough = min((ours.unsafe & own).sum(), (~ours.unsafe & own).sum()) >= _FEWEST
    return (own, other) if enough else groups["all"]


def _check(cascade: Cascade, target: Target, confidence: float) -> None:
    if len(cascade.tiers) != 2:  # noqa: PLR2004 - a first and a second
        raise DataError(f"a band is fitted between two tiers, and {cascade.name} has {len(cascade.tiers)}")
    if (target.escalated is None) == (target.lost is None):
        raise DataError("a band is fitted to one target: what is escalated, or what is lost")
    rate = target.lost if target.escalated is None else target.escalated
    if rate is None or not 0 < rate < 1 or not 0 < confidence < 1:
        raise DataError("targets and confidence are rates between 0 and 1, as 0.05 and 0.95 are")
