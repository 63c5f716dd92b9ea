"""Temperatures make scores probabilities, thresholds keep false alarms as rare as asked."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guardmw import BackendError, Conversation, Guard, Policy, Scores, Turn
from guardmw.errors import DataError
from guardmw.evaluate import metrics
from guardmw.evaluate.calibrate import Measured, calibrate, enter, fit, halves, measure, report
from guardmw.evaluate.rows import Row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardmw.conversation import Role

DRAW = np.random.default_rng(0)


def overconfident(count: int, factor: float) -> Measured:
    """Logits whose sigmoid is right once they are divided by ``factor``."""
    logits = DRAW.normal(0, 2, count)
    labels = DRAW.random(count) < 1 / (1 + np.exp(-logits))
    return Measured(logits * factor, labels, np.ones(count))


def test_a_temperature_undoes_overconfidence() -> None:
    """The factor is found, and the error falls."""
    measured = {"all": overconfident(4000, 3.0), "injection": overconfident(4000, 2.0)}
    temperatures, thresholds = fit(measured, 0.02)
    assert temperatures["input"] == pytest.approx(3.0, rel=0.15)
    assert temperatures["injection"] == pytest.approx(2.0, rel=0.15)
    figures = report({"injection": overconfident(4000, 2.0)}, temperatures, thresholds)["injection"]
    assert figures["ece_after"] < 0.03 < figures["ece_before"]


def test_many_answers_to_one_prompt_count_as_one() -> None:
    """A family of rows that the backend is all wrong about does not blunt what it says of the others."""
    prompt = Turn("user", "One prompt")
    wrong = [Row(Conversation((prompt, Turn("assistant", f"{3 + i / 1e6:.9f}"))), False, None) for i in range(2000)]
    right = labelled(2000, "assistant")
    assert measure(Overconfident(), [*right, *wrong])["all"].shares.sum() == pytest.approx(2001)
    found = [fit(measure(Overconfident(), rows), 0.05)[0]["output"] for rows in (right, [*right, *wrong])]
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_false_alarms_are_as_rare_as_asked() -> None:
    """On the rows it was fitted on, to the letter."""
    measured = {"all": overconfident(4000, 1.0), "injection": overconfident(4000, 1.0)}
    temperatures, thresholds = fit(measured, 0.05)
    logits, labels, _ = measured["all"]
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
    easy = Measured(np.where(labels, 9.0, -9.0), labels, np.ones(400))
    _, thresholds = fit({"all": easy, "injection": easy}, 0.02)
    assert set(thresholds.values()) == {0.5}


class Overconfident:
    """A backend whose odds are what they should be, to some power; of texts that say what they should be."""

    def __init__(self, power: float = 3.0, *, failing: bool = False) -> None:
        self.name = "overconfident"
        self.batches: list[int] = []
        self._power, self._failing = power, failing

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        self.batches.append(len(conversations))
        if self._failing:
            raise BackendError("down")
        return [Scores(1 / (1 + math.exp(-float(c.trial) * self._power)), injection=0.01) for c in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; never waits."""
        return self.classify(conversations)


def labelled(count: int, role: Role = "user") -> list[Row]:
    """Rows whose text is the logit of their chance to be unsafe."""
    # Nobody says what another one does: those would be kept together.
    draw = np.random.default_rng(len(role))
    logits = draw.normal(0, 2, count)
    unsafe = draw.random(count) < 1 / (1 + np.exp(-logits))
    return [
        Row(Conversation((Turn(role, f"{logit:.9f}"),)), bool(label), None)
        for logit, label in zip(logits, unsafe, strict=True)
    ]


ROWS = labelled(2000) + labelled(1000, "assistant")


def test_calibrates_any_backend() -> None:
    """Temperatures are found on one half, and the error falls on the other; stages and labels are in both."""
    found = calibrate(Overconfident(), ROWS, 0.05)
    assert {name: (one.rows, one.temperature) for name, one in found.stages.items()} == {
        "input": (1000, pytest.approx(3.0, rel=0.2)),
        "output": (500, pytest.approx(3.0, rel=0.2)),
    }
    for one in found.stages.values():
        assert one.ece_after < 0.05 < one.ece_before
        assert one.fpr is not None
        assert one.fpr < 0.1
    assert found.to_dict()["stages"]["input"]["temperature"] == found.stages["input"].temperature
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_a_policy_decides_on_the_scores_as_they_are() -> None:
    """As the thresholds would on calibrated ones; a head that nothing was fitted for stays open."""
    backend = Overconfident()
    found = calibrate(backend, ROWS, 0.05)
    policy = found.policy()
    assert policy.stages.keys() == {"input", "output"}
    assert policy.injection is None
    assert Policy.model_validate(json.loads(policy.model_dump_json())) == policy
    guard = Guard(backend, policy=policy)
    for row in ROWS[:300]:
        logit = float(row.conversation.trial)
        calibrated = 1 / (1 + math.exp(-logit * 3.0 / found.temperatures["input"]))
        assert guard.screen(row.conversation).blocked == (calibrated >= found.thresholds["input"])


def test_thresholds_are_held_between_bounds() -> None:
    """Where a target would have them lower or higher; as a policy, on the scores as they are, too."""
    assert calibrate(Overconfident(), ROWS, 0.9).thresholds["input"] == 0.5
    assert calibrate(Overconfident(), ROWS, 0.0).thresholds["input"] == 0.9
    assert calibrate(Overconfident(), ROWS, 0.9, bounds=(0.05, 0.9)).thresholds["input"] < 0.2
    highest = calibrate(Overconfident(), ROWS, 0.0, bounds=(0.99999, 0.999999))
    assert 0.99 < highest.stages["input"].raw_threshold <= 1.0


@pytest.mark.parametrize("bounds", [(0.9, 0.5), (0.0, 0.5), (0.5, 1.0), (math.nan, 0.5)])
def test_bounds_that_are_none_are_an_error(bounds: tuple[float, float]) -> None:
    """Before anything is scored."""
    with pytest.raises(DataError, match="held between two scores"):
        calibrate(Overconfident(), ROWS, 0.02, bounds=bounds)


def test_halves_depend_on_the_seed_alone() -> None:
    """Not on chance."""
    assert calibrate(Overconfident(), ROWS, 0.05).to_dict() == calibrate(Overconfident(), ROWS, 0.05).to_dict()
    assert calibrate(Overconfident(), ROWS, 0.05, seed=1).to_dict() != calibrate(Overconfident(), ROWS, 0.05).to_dict()


@pytest.mark.parametrize("seed", range(5))
def test_nearly_the_same_is_not_in_both_halves(seed: int) -> None:
    """Or what is fitted on one would be remembered on the other; stages and labels are in both all the same."""
    rows = [
        Row(Conversation.of(f"please tell me all there is to know about the bread of village {at} {end}"), unsafe, None)
        for at in range(40)
        for unsafe, end in ((True, "now"), (False, "now, please"), (at % 2 == 0, "now, thank you"))
    ]
    sides = [{row.conversation.trial.split()[13] for row in half} for half in halves(rows, seed)]
    assert sides[0] & sides[1] == set()
    assert len(sides[0] | sides[1]) == 40
    first, second = (Counter(row.unsafe for row in half) for half in halves(rows, seed))
    assert abs(first[True] - second[True]) <= 2
    assert abs(first[False] - second[False]) <= 2


def test_who_waits_is_told_how_far_it_is() -> None:
    """After each batch, of all rows."""
    told: list[int] = []
    backend = Overconfident()
    calibrate(backend, ROWS, 0.05, done=told.append)
    assert told == sorted(told)
    assert told[-1] == len(ROWS)
    assert max(backend.batches) == 64


@pytest.mark.parametrize(
    ("rows", "target", "told"),
    [
        (ROWS[:120], 0.02, "needs 50 "),
        ([row for row in ROWS if row.unsafe], 0.02, "needs 50 safe ones there, not 0"),
        ([row for row in ROWS if not row.unsafe], 0.02, "needs 50 unsafe ones there, not 0"),
        ([], 0.02, "needs 50 unsafe ones there, not 0"),
        (ROWS, 1.5, "a target FPR lies in 0 to 1"),
        (ROWS, math.nan, "a target FPR lies in 0 to 1"),
    ],
)
def test_too_little_to_go_by_is_an_error(rows: list[Row], target: float, told: str) -> None:
    """Before anything is scored."""
    backend = Overconfident()
    with pytest.raises(DataError, match=told):
        calibrate(backend, rows, target)
    assert backend.batches == []


def test_a_backend_that_fails_is_an_error() -> None:
    """Nothing is fitted on what it did not say."""
    with pytest.raises(BackendError, match="down"):
        calibrate(Overconfident(failing=True), ROWS, 0.02)


def test_a_card_takes_temperatures_on_top_of_its_own(tmp_path: Path) -> None:
    """The scores had been divided by them; what else the card says stays."""
    found = calibrate(Overconfident(), ROWS, 0.05)
    card = {"name": "mine", "temperature": {"input": 2.0, "injection": 0.5}, "metrics": {"f1": 0.9}}
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    enter(found, tmp_path)
    entered = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert entered["temperature"]["input"] == pytest.approx(2 * found.temperatures["input"], abs=1e-4)
    assert entered["temperature"]["output"] == pytest.approx(found.temperatures["output"], abs=1e-4)
    assert entered["temperature"]["injection"] == 0.5
    assert entered["thresholds"] == found.thresholds
    assert entered["metrics"].keys() == {"f1", "calibration"}
    assert entered["name"] == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize("card", [None, "{"])
def test_a_card_that_cannot_be_read_is_an_error(tmp_path: Path, card: str | None) -> None:
    """It names the file."""
    if card is not None:
        (tmp_path / "card.json").write_text(card, encoding="utf-8")
    with pytest.raises(DataError, match=r"card\.json cannot be read"):
        enter(calibrate(Overconfident(), ROWS, 0.05), tmp_path)
