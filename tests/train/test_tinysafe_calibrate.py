"""Temperatures make scores probabilities, thresholds keep false alarms as rare as asked."""

from __future__ import annotations

import numpy as np
import pytest

from guardmw.evaluate import metrics
from guardmw.train.tinysafe.calibrate import Measured, fit, report

DRAW = np.random.default_rng(0)


def overconfident(count: int, factor: float) -> Measured:
    """Logits whose sigmoid is right once they are divided by ``factor``."""
    logits = DRAW.normal(0, 2, count)
    labels = DRAW.random(count) < 1 / (1 + np.exp(-logits))
    return Measured(logits * factor, labels)


def test_a_temperature_undoes_overconfidence() -> None:
    """The factor is found, and the error falls."""
    measured = {"all": overconfident(4000, 3.0), "injection": overconfident(4000, 2.0)}
    temperatures, thresholds = fit(measured, 0.02)
    assert temperatures["input"] == pytest.approx(3.0, rel=0.15)
    assert temperatures["injection"] == pytest.approx(2.0, rel=0.15)
    figures = report({"injection": overconfident(4000, 2.0)}, temperatures, thresholds)["injection"]
    assert figures["ece_after"] < 0.03 < figures["ece_before"]


def test_false_alarms_are_as_rare_as_asked() -> None:
    """On the rows it was fitted on, to the letter."""
    measured = {"all": overconfident(4000, 1.0), "injection": overconfident(4000, 1.0)}
    temperatures, thresholds = fit(measured, 0.05)
    logits, labels = measured["all"]
    scores = 1 / (1 + np.exp(-logits / temperatures["input"]))
    fpr = metrics.at_threshold(labels, scores >= thresholds["input"]).fpr
    assert fpr is not None
    assert 0.04 < fpr <= 0.05


def test_a_stage_of_few_rows_shares_what_all_say() -> None:
    """Ten rows cannot tell of two percent; a document reads as a tool's result does."""
    own, few = overconfident(4000, 3.0), overconfident(10, 0.3)
    measured = {
        "all": overconfident(4000, 1.0),
        "injection": overconfident(400, 1.0),
        "tool_result": own,
        "output": few,
    }
    temperatures, thresholds = fit(measured, 0.02)
    assert temperatures["document"] == temperatures["tool_result"] == pytest.approx(3.0, rel=0.15)
    assert temperatures["output"] == temperatures["input"] == pytest.approx(1.0, rel=0.15)
    assert thresholds.keys() == {"injection", "input", "output", "tool_call", "tool_result", "document"}


def test_rows_told_apart_without_error_do_not_make_a_trigger_happy_guard() -> None:
    """The lowest threshold with few false alarms would be close to 0."""
    labels = np.arange(400) % 2 == 1
    easy = Measured(np.where(labels, 9.0, -9.0), labels)
    _, thresholds = fit({"all": easy, "injection": easy}, 0.02)
    assert set(thresholds.values()) == {0.5}
