"""Scores that mean what they say: temperatures and thresholds for the graph that ships, fitted on held-out rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guardmw.conversation import STAGES
from guardmw.evaluate import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw.backends import Backend
    from guardmw.evaluate.rows import Row

_TEMPERATURES = np.geomspace(0.2, 5.0, 400)
# Fewer rows of either label than this say little of a rate of a few percent: such a stage shares what all stages say.
_FEWEST = 50
# Held-out rows are of the pool's kind, and other texts are not: where few false alarms come easily, a score below even
# odds is still no reason to act; and where they do not come at all, one above the upper bound is.
_LOWEST, _HIGHEST = 0.5, 0.9


class Measured(NamedTuple):
    """Logits and labels, all (n,), of one stage, of all of them, or of the injection head."""

    logits: metrics.Floats
    labels: metrics.Bools


def measure(backend: Backend, rows: Sequence[Row]) -> dict[str, Measured]:
    """What a backend without temperatures says of rows: by stage, "all", and "injection"."""
    scores = backend.classify([row.conversation for row in rows])
    stages = np.array([row.conversation.stage for row in rows])
    unsafe = Measured(_logit([s.unsafe for s in scores]), np.array([row.unsafe for row in rows], dtype=bool))
    attack = Measured(_logit([s.injection for s in scores]), np.array([bool(row.attack) for row in rows], dtype=bool))
    by_stage: dict[str, Measured] = {
        stage: Measured(*(part[stages == stage] for part in unsafe)) for stage in STAGES if (stages == stage).any()
    }
    return {"all": unsafe, "injection": attack, **by_stage}


def fit(measured: dict[str, Measured], target_fpr: float) -> tuple[dict[str, float], dict[str, float]]:
    """Temperatures by likelihood, and thresholds by false-positive rate; of each stage, and of "injection"."""
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
        thresholds[key] = math.ceil(min(max(lowest, _LOWEST), _HIGHEST) * 1e4) / 1e4
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
    """The temperature with the highest likelihood (Guo et al. 2017)."""
    signed = np.where(part.labels, part.logits, -part.logits)
    losses = [np.logaddexp(0, -signed / temperature).mean() for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _logit(scores: Sequence[float]) -> metrics.Floats:
    bounded = np.clip(np.array(scores, dtype=np.float64), 1e-12, 1 - 1e-12)
    return np.asarray(np.log(bounded / (1 - bounded)))


def _sigmoid(logits: metrics.Floats) -> metrics.Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))
