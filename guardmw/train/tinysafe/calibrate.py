"""Scores that mean what they say: temperatures and thresholds, fitted on held-out rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from guardmw.evaluate import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw.train.tinysafe.data import Example
    from guardmw.train.tinysafe.fit import Logits
    from guardmw.train.tinysafe.recipe import Recipe

_TEMPERATURES = np.geomspace(0.1, 10.0, 400)
# Fewer rows than this say nothing of a rate of a few percent.
_FEWEST = 50


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration found, by stage and for "injection".

    Attributes:
        report: per key: rows, unsafe rows, AUPRC, ECE before and after, recall and FPR at the threshold.
    """

    temperature: dict[str, float]
    thresholds: dict[str, float]
    report: dict[str, dict[str, Any]]


def fit(logits: Logits, examples: Sequence[Example], recipe: Recipe) -> Calibration:
    """Fit a temperature by likelihood, then the threshold whose false-positive rate is ``recipe.target_fpr``."""
    stages = np.array([example.stage for example in examples])
    unsafe = np.array([example.unsafe for example in examples])
    attacks = np.array([example.injection for example in examples])
    parts = {str(stage): (logits.unsafe[stages == stage], unsafe[stages == stage]) for stage in np.unique(stages)}
    parts["injection"] = (logits.injection, attacks)
    found = Calibration({}, {}, {})
    for key, (values, labels) in sorted(parts.items()):
        if min(labels.sum(), (~labels).sum()) < _FEWEST:
            continue
        temperature = _temperature(values, labels)
        scores = _sigmoid(values / temperature)
        # At most one half: a text that is more likely unsafe than not is not let through for the sake of a rate.
        threshold = min(metrics.threshold_at_fpr(labels, scores, recipe.target_fpr), 0.5)
        decided = metrics.at_threshold(labels, scores >= threshold)
        found.temperature[key] = round(float(temperature), 4)
        found.thresholds[key] = round(threshold, 4)
        found.report[key] = {
            "rows": len(labels),
            "unsafe": int(labels.sum()),
            "auprc": metrics.auprc(labels, scores),
            "ece_before": metrics.ece(labels, _sigmoid(values)),
            "ece_after": metrics.ece(labels, scores),
            "recall": decided.recall,
            "fpr": decided.fpr,
        }
    # No pool labels documents apart: they read as a tool's results do.
    for table in (found.temperature, found.thresholds):
        if "tool_result" in table:
            table["document"] = table["tool_result"]
    return found


def _temperature(logits: metrics.Floats, labels: metrics.Bools) -> float:
    """The temperature with the highest likelihood (Guo et al. 2017)."""
    signed = np.where(labels, logits, -logits)
    losses = [np.logaddexp(0, -signed / temperature).mean() for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _sigmoid(logits: metrics.Floats) -> metrics.Floats:
    return 1.0 / (1.0 + np.exp(-logits))
