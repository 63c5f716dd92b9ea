"""What a guard did with labelled rows is tabulated as the words of the report say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

import pytest

from guardmw import BackendError, Conversation, Coverage, Guard, Policy, Scores, Turn
from guardmw.evaluate.report import Part, Report, acting_threshold, evaluate
from guardmw.evaluate.rows import Row
from guardmw.policy import StagePolicy
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_UP = 0.0
WHOLE = Coverage(1, 1)


class Advising(ScriptedBackend):
    """A backend that knows at which scores it should act."""

    thresholds: ClassVar = {"input": 0.3, "output": 0.6}


def row(*, unsafe: bool, categories: frozenset[str] | None = frozenset(), role: str = "user", attack: str = "") -> Row:
    """A row of some label; what it says does not matter to a scripted backend."""
    return Row(Conversation((Turn(role, "x"),)), unsafe, categories, attack, source="s")  # type: ignore[arg-type]


def report(
    script: Sequence[Scores | float | Exception], rows: Sequence[Row], policy: Policy | None = None
) -> tuple[Part, Report]:
    """The part of the only file, and the whole, for a backend that answers as scripted."""
    made = evaluate(Guard(ScriptedBackend([WARM_UP, *script]), policy=policy), {"file": rows})
    return made.files["file"], made


def test_figures_by_hand() -> None:
    """Two of three unsafe rows caught, one of two safe ones acted on."""
    rows = [row(unsafe=unsafe) for unsafe in (True, False, True, False, True)]
    part, whole = report([0.9, 0.8, 0.7, 0.4, 0.2], rows)
    figures = part.figures
    assert (figures.rows, figures.unsafe, figures.threshold) == (5, 3, 0.5)
    assert figures.recall == pytest.approx(2 / 3)
    assert figures.fpr == pytest.approx(1 / 2)
    assert figures.auroc == pytest.approx(3 / 6)
    assert figures.actions == {"allow": 2, "flag": 0, "review": 0, "block": 3}
    assert figures.p50_ms is not None
    assert figures.p95_ms is not None
    assert 0 < figures.p50_ms <= figures.p95_ms
    assert whole.all.figures.recall == figures.recall


def test_review_is_acted_on_and_flag_is_not() -> None:
    """Review withholds a turn until a person decides; flag lets it through."""
    policy = Policy(threshold={"flag": 0.2, "review": 0.5, "block": 0.8})
    part, _ = report([0.3, 0.6, 0.9], [row(unsafe=True)] * 3, policy)
    assert part.figures.recall == pytest.approx(2 / 3)
    assert part.figures.actions == {"allow": 0, "flag": 1, "review": 1, "block": 1}
    assert part.figures.threshold == 0.5


def test_rows_rank_by_the_higher_of_unsafe_and_injection() -> None:
    """A guard acts on either."""
    script = [Scores(0.1, injection=0.9), Scores(0.5, injection=0.0)]
    part, _ = report(script, [row(unsafe=True), row(unsafe=False)])
    assert part.figures.auroc == 1.0


def test_what_could_not_be_scored_counts_as_what_was_done() -> None:
    """A failure blocks: the unsafe row is caught, the safe one a false alarm, both are degraded."""
    script: list[Exception | float] = [BackendError("down"), BackendError("down"), 1.0]
    part, whole = report(script, [row(unsafe=True), row(unsafe=False), row(unsafe=True)])
    assert part.figures.degraded == 2
    assert (part.figures.recall, part.figures.fpr) == (1.0, 1.0)
    assert part.figures.auroc == 0.5
    assert part.figures.ece == 0.0
    assert whole.reason == "down"


def test_a_blank_row_is_allowed_and_ranks_last() -> None:
    """There is nothing in it to judge."""
    blank = Row(Conversation.of(" "), unsafe=True, categories=None)
    part, _ = report([0.1], [blank, row(unsafe=False)])
    assert (part.figures.recall, part.figures.degraded, part.figures.auroc) == (0.0, 0, 0.0)


def test_categories_are_measured_where_they_are_known() -> None:
    """Caught counts any action; naming counts the category among the violations; unknown kinds are left out."""
    hate, violence = frozenset({"hate"}), frozenset({"violence"})
    script = [
        Scores(0.9, {"hate": 0.9, "violence": 0.1}),
        Scores(0.9, {"hate": 0.1, "violence": 0.1}),
        Scores(0.9, {"hate": 0.8, "violence": 0.1}),
        Scores(0.1, {"hate": 0.3, "violence": 0.1}),
        Scores(0.9, {"hate": 0.9, "violence": 0.9}),
    ]
    rows = [
        row(unsafe=True, categories=hate),
        row(unsafe=True, categories=hate),
        row(unsafe=True, categories=violence),
        row(unsafe=False),
        row(unsafe=True, categories=None),
    ]
    part, _ = report(script, rows)
    assert set(part.categories) == {"hate", "violence"}
    found = part.categories["hate"]
    assert (found.rows, found.caught) == (2, 1.0)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.auprc == pytest.approx((1 + 2 / 4) / 2)


def test_a_backend_without_categories_has_no_figures_of_naming() -> None:
    """None, rather than a recall of 0 that it never tried for."""
    part, _ = report([0.9], [row(unsafe=True, categories=frozenset({"hate"}))])
    assert part.categories["hate"].caught == 1.0
    assert part.categories["hate"].recall is None


def test_parts_by_stage_attack_and_source() -> None:
    """Each row is in one stage and one source; an attack is counted by its kind."""
    rows = [row(unsafe=True, attack="jailbreak"), row(unsafe=False, role="assistant"), row(unsafe=True, role="tool")]
    part, _ = report([0.9, 0.1, 0.2], rows)
    assert {name: figures.rows for name, figures in part.stages.items()} == {"input": 1, "output": 1, "tool_result": 1}
    assert part.attacks["jailbreak"].caught == 1.0
    assert part.sources["s"].rows == 3


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), 0.5),
        (Policy(threshold=0.7), 0.7),
        (Policy(threshold=0.7, stages={"input": StagePolicy(threshold=0.2)}), 0.2),
        (Policy(threshold={"flag": 0.1, "block": 0.9, "review": 0.6}), 0.6),
        (Policy(threshold={"flag": 0.1}), None),
        (Policy(threshold=0.0), 0.0),
    ],
)
def test_the_threshold_is_where_the_policy_acts(policy: Policy, expected: float | None) -> None:
    """The stage's own before the policy's; the mildest action that withholds; the policy decides just so."""
    assert acting_threshold(policy, "input") == expected
    reached = 1.0 if expected is None else expected
    assert (policy.decide("input", Scores(reached), WHOLE).action in ("review", "block")) == (expected is not None)
    if expected:
        assert policy.decide("input", Scores(expected - 1e-9), WHOLE).action in ("allow", "flag")


def test_the_threshold_is_of_the_commonest_stage() -> None:
    """The backend's advice for that stage, where the policy leaves it open."""
    guard = Guard(Advising([0.0] * 4))
    rows = [row(unsafe=True), row(unsafe=True, role="assistant"), row(unsafe=False, role="assistant")]
    assert evaluate(guard, {"file": rows}).all.figures.threshold == 0.6


def test_every_row_is_screened_by_itself() -> None:
    """Batches of one, so that times are of one call; progress is told after each."""
    backend = ScriptedBackend([0.0] * 4)
    told: list[tuple[str, int]] = []
    files = {"a": [row(unsafe=True)] * 2, "b": [row(unsafe=False)]}
    evaluate(Guard(backend), files, done=lambda name, count: told.append((name, count)))
    assert backend.batches == [1] * 4
    assert told == [("a", 1), ("a", 2), ("b", 3)]


def test_a_report_is_plain_json() -> None:
    """No NaN, no numpy; the figures lie flat, their parts beside them."""
    guard = Guard(KeywordBackend({"EVIL": 0.99}))
    files = {"one": [Row(Conversation.of("EVIL"), unsafe=True, categories=None)]}
    made = evaluate(guard, files).to_dict()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["backend"] == "keyword"
    assert made["files"]["one"]["recall"] == 1.0
    assert made["files"]["one"]["precision"] is None
    assert made["files"]["one"]["stages"]["input"]["rows"] == 1
