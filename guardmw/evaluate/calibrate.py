"""Scores that mean what they say: temperatures and thresholds of any backend, fitted on labelled rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from guardmw.backends._artefact import CARD
from guardmw.conversation import STAGES, Stage
from guardmw.errors import DataError
from guardmw.evaluate import metrics, plots
from guardmw.evaluate.families import families, sides
from guardmw.policy import Policy, StagePolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from guardmw.backends import Backend
    from guardmw.evaluate.rows import Row
    from guardmw.verdict import Scores

_TEMPERATURES = np.geomspace(0.2, 5.0, 400)
# Fewer rows of either label than this say little of a rate of a few percent: such a stage shares what all stages say.
_FEWEST = 50
# Held-out rows are of the pool's kind, and other texts are not: where few false alarms come easily, a score below even
# odds is still no reason to act; and where they do not come at all, one above the upper bound is.
BOUNDS = (0.5, 0.9)
# Conversations in one call of a backend, where somebody waits to see it move on.
_BATCH = 64


class Measured(NamedTuple):
    """What rows got, and are, (n,) each; of one stage, of all of them, or of the injection head.

    Attributes:
        shares: of a row in its family, which is one observation however many answers there are to one prompt.
    """

    logits: metrics.Floats
    labels: metrics.Bools
    shares: metrics.Floats


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was found for one stage, or for the injection head.

    Attributes:
        temperature: what the logits of the backend's scores are divided by.
        threshold: on the scores so calibrated.
        rows, unsafe, auprc, recall, fpr, ece_before, ece_after: on the half of the rows that nothing was fitted on.
        before, after: scores and labels of that half.
    """

    temperature: float
    threshold: float
    rows: int
    unsafe: int
    auprc: float | None
    recall: float | None
    fpr: float | None
    ece_before: float
    ece_after: float
    before: plots.Measured
    after: plots.Measured

    @property
    def raw_threshold(self) -> float:
        """The threshold, on the scores as the backend gives them. Rounded up, as a threshold is."""
        # A bound just below 1 is rounded up to it.
        threshold = min(self.threshold, 1 - 1e-9)
        odds = math.log(threshold / (1 - threshold)) * self.temperature
        return min(1.0, math.ceil(1e6 / (1 + math.exp(-odds))) / 1e6)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the rows."""
        figures = (self.auprc, self.recall, self.fpr, self.ece_before, self.ece_after)
        rounded = [None if figure is None else round(figure, 4) for figure in figures]
        return {
            "rows": self.rows,
            "unsafe": self.unsafe,
            "temperature": self.temperature,
            "threshold": self.threshold,
            "policy_threshold": self.raw_threshold,
        } | dict(zip(("auprc", "recall", "fpr", "ece_before", "ece_after"), rounded, strict=True))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures and thresholds of a backend.

    Attributes:
        rows: all of them, those fitted on included.
        stages: by stage, for those that have rows; and "injection", where enough rows carry an attack.
        temperatures, thresholds: of every stage, those without rows of their own included.
    """

    backend: str
    target_fpr: float
    rows: int
    stages: dict[str, Fitted]
    temperatures: dict[str, float]
    thresholds: dict[str, float]

    def policy(self) -> Policy:
        """Thresholds as a policy, for the scores as the backend gives them; "injection" only where it was fitted."""
        limits = {name: fitted.raw_threshold for name, fitted in self.stages.items()}
        injection = limits.pop("injection", None)
        stages = {cast("Stage", stage): StagePolicy(threshold=limit) for stage, limit in limits.items()}
        return Policy(stages=stages, injection=injection)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "backend": self.backend,
            "target_fpr": self.target_fpr,
            "rows": self.rows,
            "stages": {name: fitted.to_dict() for name, fitted in self.stages.items()},
        }


def calibrate(
    backend: Backend,
    rows: Sequence[Row],
    target_fpr: float,
    *,
    bounds: tuple[float, float] = BOUNDS,
    seed: int = 0,
    done: Callable[[int], None] | None = None,
) -> Calibration:
    """Fit temperatures and thresholds on one half of the rows, and measure what they do on the other.

    Args:
        backend: it may have temperatures of its own; the ones found come on top of those.
        rows: of both labels, in each stage that is to have figures of its own.
        target_fpr: the highest share of safe rows that may be acted on.
        bounds: of the thresholds, on calibrated scores.
        seed: of the halves, which hold about the same stages and labels, and no two rows that belong together.
        done: called with the number of rows that have been scored.

    Raises:
        DataError: there are too few rows of some label, or the target is no rate, or the bounds are none.
        BackendError: the backend could not score them.
    """
    if not 0 <= target_fpr < 1:
        raise DataError(f"a target FPR lies in 0 to 1, as 0.02 does, not {target_fpr:g}")
    if not 0 < bounds[0] <= bounds[1] < 1:
        raise DataError(f"thresholds are held between two scores from 0 to 1, the lower one first, not {bounds}")
    fitting, reporting = halves(rows, seed)
    for label in (True, False):
        if (count := sum(row.unsafe == label for row in fitting)) < _FEWEST:
            kind = "unsafe" if label else "safe"
            raise DataError(f"calibration fits on half of the rows, and needs {_FEWEST} {kind} ones there, not {count}")
    fitted = measure(backend, fitting, done=done)
    held = measure(backend, reporting, done=done and (lambda count: done(len(fitting) + count)))
    found = between(backend.name, fitted, held, target_fpr, bounds=bounds)
    if fitted["injection"].labels.sum() < _FEWEST:
        for known in (found.stages, found.temperatures, found.thresholds):
            known.pop("injection", None)
    return found


def between(
    name: str,
    fitted: dict[str, Measured],
    held: dict[str, Measured],
    target_fpr: float,
    *,
    bounds: tuple[float, float] = BOUNDS,
) -> Calibration:
    """Temperatures and thresholds fitted on some rows, with what they do on others."""
    temperatures, thresholds = fit(fitted, target_fpr, bounds=bounds)
    figures = report(held, temperatures, thresholds)
    return Calibration(
        backend=name,
        target_fpr=target_fpr,
        rows=len(fitted["all"].labels) + len(held["all"].labels),
        stages={
            stage: _fitted(held[stage], temperatures[stage], thresholds[stage], figures[stage]) for stage in figures
        },
        temperatures=temperatures,
        thresholds=thresholds,
    )


def enter(found: Calibration, folder: Path) -> None:
    """Enter temperatures, thresholds and figures into the card of an artefact, whose backend was calibrated.

    Raises:
        DataError: the folder holds no card.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    before: dict[str, float] = card.get("temperature", {})
    # The scores that were fitted on had been divided by the card's own temperatures.
    card["temperature"] = before | {
        name: round(before.get(name, 1.0) * temperature, 4) for name, temperature in found.temperatures.items()
    }
    card["thresholds"] = card.get("thresholds", {}) | found.thresholds
    card["metrics"] = card.get("metrics", {}) | {"calibration": found.to_dict()["stages"]}
    # A killed process leaves the card as it was.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def halves(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Two halves with the same stages, labels and attacks, as far as families allow, which are never in both."""
    strata = [(row.conversation.stage, row.unsafe, bool(row.attack)) for row in rows]
    second = sides(strata, families(rows), seed).tolist()
    first = [not one for one in second]
    return list(compress(rows, first)), list(compress(rows, second))


def _fitted(part: Measured, temperature: float, threshold: float, figures: Mapping[str, Any]) -> Fitted:
    return Fitted(
        temperature=temperature,
        threshold=threshold,
        before=plots.Measured(part.labels, _sigmoid(part.logits)),
        after=plots.Measured(part.labels, _sigmoid(part.logits / temperature)),
        **{name: figures[name] for name in ("rows", "unsafe", "auprc", "recall", "fpr", "ece_before", "ece_after")},
    )


def measure(backend: Backend, rows: Sequence[Row], *, done: Callable[[int], None] | None = None) -> dict[str, Measured]:
    """What a backend without temperatures says of rows: by stage, "all", and "injection".

    ``done`` is called with the number of rows so far.
    """
    conversations = [row.conversation for row in rows]
    size = _BATCH if done else max(1, len(rows))
    scores: list[Scores] = []
    for start in range(0, len(rows), size):
        scores += backend.classify(conversations[start : start + size])
        if done:
            done(len(scores))
    stages = np.array([row.conversation.stage for row in rows])
    kin = families(rows)
    sizes = Counter(kin)
    shares = np.array([1 / sizes[family] for family in kin])
    labels = np.array([(row.unsafe, bool(row.attack)) for row in rows])
    unsafe = Measured(_logit([given.unsafe for given in scores]), labels[:, 0], shares)
    attack = Measured(_logit([given.injection for given in scores]), labels[:, 1], shares)
    by_stage: dict[str, Measured] = {
        stage: Measured(*(part[stages == stage] for part in unsafe)) for stage in STAGES if (stages == stage).any()
    }
    return {"all": unsafe, "injection": attack, **by_stage}


def fit(
    measured: dict[str, Measured], target_fpr: float, *, bounds: tuple[float, float] = BOUNDS
) -> tuple[dict[str, float], dict[str, float]]:
    """Temperatures by likelihood, and thresholds by false-positive rate; of each stage, and of "injection".

    Thresholds are held within ``bounds``.
    """
    temperatures, thresholds = {}, {}
    for key in ("injection", *STAGES):
        part = measured.get(key)
        # No rows are labelled as documents: they read as a tool's results do.
        part = measured.get("tool_result") if key == "document" else part
        if part is None or min(part.labels.sum(), (~part.labels).sum()) < _FEWEST:
            part = measured["all" if key != "injection" else key]
        temperature = _temperature(part)
        lowest = metrics.threshold_at_fpr(part.labels, _sigmoid(part.logits / temperature), target_fpr)
        temperatures[key] = round(temperature, 4)
        # Rounded up: a threshold below the one measured lets through fewer safe texts than it says.
        thresholds[key] = math.ceil(min(max(lowest, bounds[0]), bounds[1]) * 1e4) / 1e4
    return temperatures, thresholds


def report(
    measured: dict[str, Measured], temperatures: dict[str, float], thresholds: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Figures on rows that nothing was fitted on."""
    found = {}
    for key, part in measured.items():
        if key not in temperatures:
            continue
        scores = _sigmoid(part.logits / temperatures[key])
        decided = metrics.at_threshold(part.labels, scores >= thresholds[key])
        found[key] = {
            "rows": len(part.labels),
            "unsafe": int(part.labels.sum()),
            "auprc": metrics.auprc(part.labels, scores),
            "ece_before": metrics.ece(part.labels, _sigmoid(part.logits)),
            "ece_after": metrics.ece(part.labels, scores),
            "recall": decided.recall,
            "fpr": decided.fpr,
        }
    return found


def _temperature(part: Measured) -> float:
    """The temperature with the highest likelihood (Guo et al. 2017), each family counted once."""
    signed = np.where(part.labels, part.logits, -part.logits)
    losses = [float(np.logaddexp(0, -signed / temperature) @ part.shares) for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _logit(scores: Sequence[float]) -> metrics.Floats:
    bounded = np.clip(np.array(scores, dtype=np.float64), 1e-12, 1 - 1e-12)
    return np.asarray(np.log(bounded / (1 - bounded)))


def _sigmoid(logits: metrics.Floats) -> metrics.Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))
