"""A fitted band keeps what it promises, as often as it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import Cascade, Conversation, Coverage, Guard, Policy, Scores, Turn
from guardmw.errors import BackendError, DataError
from guardmw.evaluate import bands
from guardmw.evaluate.bands import Target, Tiers, fit, rates, tail, upper, withholding
from guardmw.evaluate.rows import Row
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMITS = (0.5, 0.5)


def simulated(count: int, second: str, seed: int) -> Tiers:
    """Rows whose first tier is right four times of five, and a second tier of some kind."""
    draw = np.random.default_rng(seed)
    unsafe = draw.random(count) < 0.4
    logits = np.where(unsafe, 1.5, -1.5) + draw.normal(0, 2, count)
    score = 1 / (1 + np.exp(-logits))
    first = score >= 0.5
    judged = {"perfect": unsafe, "noisy": unsafe ^ (draw.random(count) < 0.1), "equal": first}[second]
    forced = draw.random(count) < 0.01
    return Tiers(unsafe, np.stack([score, np.full(count, -1.0)], axis=1), forced, first, judged)


@pytest.mark.parametrize("second", ["perfect", "noisy", "equal"])
@pytest.mark.parametrize("lost", [0.02, 0.05])
def test_no_more_is_lost_than_promised(second: str, lost: float) -> None:
    """In at least as many of repeated splits as stated, by the true rates; and the band is not idly wide."""
    truth = simulated(20_000, second, seed=0)
    error, repeats = 0.1, 60
    kept, shares = 0, []
    for seed in range(1, repeats + 1):
        band = bands._losing_little(simulated(1500, second, seed), lost, error, LIMITS, seed)
        seen = rates(truth, band)
        kept += seen["missed"] <= lost and seen["alarmed"] <= lost
        shares.append(seen["escalated"])
    assert kept >= (1 - error) * repeats
    assert np.mean(shares) < (0.02 if second == "equal" else 0.9)


def in_families(tiers: Tiers, seed: int) -> Tiers:
    """Most rows alone, and every tenth as many times over as answers to one prompt may be."""
    draw = np.random.default_rng(seed)
    sizes = np.where(draw.random(len(tiers)) < 0.1, draw.integers(10, 60, len(tiers)), 1)
    at = np.repeat(np.arange(len(tiers)), sizes)
    return replace(tiers.of(at), families=at)


def losing(tiers: Tiers, seed: int) -> bool:
    """Whether a band that is to lose 5 % does, by the true rates."""
    band = bands._losing_little(tiers, 0.05, 0.1, LIMITS, seed)
    seen = rates(simulated(20_000, "noisy", seed=0), band)
    return max(seen["missed"], seen["alarmed"]) <= 0.05


def escalating(tiers: Tiers, seed: int) -> bool:
    """The same of one that is to escalate 20 %."""
    band = bands._within_budget(tiers, 0.2, 0.1, LIMITS, seed)
    return rates(simulated(20_000, "noisy", seed=0), band)["escalated"] <= 0.2


@pytest.mark.parametrize("keeps", [losing, escalating])
def test_a_family_is_one_witness(keeps: Callable[[Tiers, int], bool]) -> None:
    """Many answers to one prompt say little more than one does, and their number would promise too much."""
    given = [in_families(simulated(500, "noisy", seed), seed) for seed in range(1, 61)]
    known = sum(keeps(tiers, seed) for seed, tiers in enumerate(given))
    unknown = sum(keeps(replace(tiers, families=None), seed) for seed, tiers in enumerate(given))
    assert unknown < 54 <= known


def test_a_rate_counts_a_family_once() -> None:
    """Whatever its rows are: half of one that is missed is half a row."""
    unsafe, second = np.ones(5, dtype=bool), np.ones(5, dtype=bool)
    scores = np.stack([np.array([0.1, 0.1, 0.1, 0.9, 0.9]), np.full(5, -1.0)], axis=1)
    tiers = Tiers(unsafe, scores, ~unsafe, scores[:, 0] >= 0.5, second, np.array([7, 7, 7, 7, 2]))
    assert rates(tiers, (0.5, 0.5)) == {"escalated": 0.0, "missed": 0.375, "alarmed": 0.0}
    assert rates(tiers, (0.1, 0.5)) == {"escalated": 0.375, "missed": 0.0, "alarmed": 0.0}
    assert rates(replace(tiers, families=None), (0.5, 0.5))["missed"] == 0.6


def test_a_band_is_not_tested_on_relatives_of_what_it_was_found_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would agree with it."""
    tiers = replace(simulated(600, "noisy", 0), families=np.arange(600) // 3)
    seen: list[Tiers] = []
    frontier, of = bands._frontier, Tiers.of
    monkeypatch.setattr(bands, "_frontier", lambda part, limits: seen.append(part) or frontier(part, limits))
    monkeypatch.setattr(Tiers, "of", lambda self, rows: seen.append(of(self, rows)) or of(self, rows))
    bands._within_budget(tiers, 0.3, 0.05, LIMITS, seed=0)
    finding, testing = (set(part.families.tolist()) for part in seen[:2])  # type: ignore[union-attr]
    assert finding.isdisjoint(testing)
    assert len(finding | testing) == 200
    assert seen[2].families is not None
    assert set(seen[2].families.tolist()) == finding


@pytest.mark.parametrize("second", ["perfect", "noisy", "equal"])
def test_no_more_is_escalated_than_promised(second: str) -> None:
    """In at least as many of repeated splits as stated; and little less than that, where it pays."""
    truth = simulated(20_000, second, seed=0)
    error, repeats, budget = 0.1, 30, 0.2
    shares = []
    for seed in range(1, repeats + 1):
        band = bands._within_budget(simulated(1500, second, seed), budget, error, LIMITS, seed)
        shares.append(rates(truth, band)["escalated"])
    assert sum(share <= budget for share in shares) >= (1 - error) * repeats
    assert second == "equal" or np.mean(shares) > 0.1


@given(
    st.lists(
        st.tuples(*[st.booleans()] * 2, st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.6, 1.0]), st.booleans()), min_size=1
    ),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    st.sampled_from([0.5, 0.6, 0.9, 1.0]),
)
def test_what_is_tested_bounds_what_happens(
    rows: list[tuple[bool, bool, float, bool]], low: float, high: float
) -> None:
    """Each side by itself, whatever the other."""
    unsafe, forced, score, second = (np.array(column) for column in zip(*rows, strict=True))
    tiers = Tiers(
        unsafe, np.stack([score, score[::-1]], axis=1), forced, (np.maximum(score, score[::-1]) >= 0.5), second
    )
    withheld = tiers.withheld((low, high))
    assert (unsafe & second & ~withheld).sum() <= (tiers.missable < low).sum()
    assert (~unsafe & ~second & withheld).sum() <= (tiers.alarming > high).sum()


@pytest.mark.parametrize(
    ("successes", "trials", "rate", "chance"),
    [
        (0, 10, 0.1, 0.9**10),
        (1, 10, 0.1, 0.9**10 + 10 * 0.1 * 0.9**9),
        (5, 10, 0.5, 0.623046875),
        (10, 10, 0.5, 1.0),
        (3, 10, 0.0, 1.0),
        (3, 10, 1.0, 0.0),
        (50, 10_000, 0.01, 2.1122399326e-08),
    ],
)
def test_the_tail_of_a_binomial(successes: int, trials: int, rate: float, chance: float) -> None:
    """By values that can be worked out otherwise."""
    assert tail(successes, trials, rate) == pytest.approx(chance, rel=1e-9)


def test_a_long_tail_is_exact() -> None:
    """Summed up in integers, it is the same."""
    count, trials = 37, 1000
    exact = sum(math.comb(trials, k) * 19 ** (trials - k) for k in range(count + 1))
    assert tail(count, trials, 0.05) == pytest.approx(exact / 20**trials, rel=1e-9)


@pytest.mark.parametrize(
    ("successes", "trials", "bound"),
    # Of no success, 1 - 0.05^(1/n); of all, 1; the others by published tables of Clopper and Pearson, 90 % two-sided.
    [(0, 59, 1 - 0.05 ** (1 / 59)), (0, 299, 1 - 0.05 ** (1 / 299)), (10, 10, 1.0), (1, 10, 0.3942), (5, 10, 0.7776)],
)
def test_the_bound_of_clopper_and_pearson(successes: int, trials: int, bound: float) -> None:
    """By known values."""
    assert upper(successes, trials, 0.95) == pytest.approx(bound, abs=5e-5)


def labelled(count: int, *, stage: str = "user") -> list[Row]:
    """Texts of which the first tier is sure, wrongly sure, or not at all."""
    rows = []
    for at in range(count):
        unsafe = at % 2 == 0
        word = "doubt" if at % 10 < 4 else "bad" if unsafe else "good"
        text = f"{word} {'worse' if unsafe else 'fine'} {at}"
        rows.append(Row(Conversation.of(Turn(stage, text)), unsafe, frozenset()))  # type: ignore[arg-type]
    return rows


FIRST = KeywordBackend({"doubt": 0.4, "bad": 0.99}, name="first")
SECOND = KeywordBackend({"worse": 0.99}, name="second")


@pytest.mark.parametrize("target", [Target(lost=0.05), Target(escalated=0.6)])
def test_a_band_is_fitted_and_told(target: Target) -> None:
    """It holds what is in doubt, and the policy that it is written to is in force for a guard."""
    cascade, policy = Cascade(FIRST, SECOND), Policy(on_error="review", stages={"input": {"on_partial": "flag"}})  # type: ignore[dict-item]
    found = fit(cascade, policy, labelled(800), target, by_stage=True)
    assert found.parts.keys() == {"all", "input"}
    part = found.parts["all"]
    assert 0.01 < part.band[0] <= 0.4 <= part.band[1] < 0.99
    assert part.point.recall == 1.0
    assert part.seen.keys() == part.promised.keys()
    assert part.point.escalated == pytest.approx(0.4, abs=0.05)
    assert (part.curve[0].band, part.curve[-1].band) == (None, (0.0, 1.0))
    assert (part.curve[0].recall, part.curve[-1].escalated) == (pytest.approx(0.6, abs=0.05), 1.0)
    written = found.policy(policy)
    assert (written.on_error, written.stages["input"].on_partial) == ("review", "flag")
    assert written.stages["input"].band == found.parts["input"].band
    guard = Guard(cascade, policy=written)
    assert guard.screen("doubt worse").blocked
    assert not guard.screen("doubt fine").blocked
    assert set(found.to_dict()) == {"backend", "confidence", "rows", "unread", "parts"}


def test_it_is_the_cascade_itself_that_is_measured() -> None:
    """Row by row, a guard with the band does what the figures say."""

    class Odd(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return [self._odd(len(c.trial), len(c.trial) % 3) for c in conversations]

        def _odd(self, size: int, kind: int) -> Scores:
            part = Coverage(size, size - 1) if size % 11 == 0 else None
            score = (size * 37 % 100) / 100
            return Scores(score, injection=(0.0, 0.3, 0.95)[kind], backend="odd", coverage=part)

    rows = [Row(Conversation.of("x" * at), at % 2 == 0, frozenset()) for at in range(1, 200)]
    policy = Policy(threshold={"flag": 0.2, "review": 0.6}, injection=0.9)
    band = (0.25, 0.9)
    guard = Guard(Cascade(Odd({}), KeywordBackend({"xxxxxxxxx": 0.7})), policy=policy.model_copy(update={"band": band}))
    cascade: Any = guard.backend
    tiers, ms, unread = bands.measure(cascade, guard.policy, rows)
    assert unread == 0
    given = [row.conversation for row in rows]
    done = [verdict.action in ("review", "block") for verdict in guard.screen_many(given)]
    assert tiers.withheld(band).tolist() == done
    assert tiers.families is not None
    assert len(tiers.families) == len(rows)
    asked = [cascade.doubtful(c, s) for c, s in zip(given, Odd({}).classify(given), strict=True)]
    assert tiers.escalated(band).tolist() == asked
    assert min(ms) >= 0


class _Mumbles(KeywordBackend):
    """Of some texts nothing it says can be read."""

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        if any("mumble" in conversation.trial for conversation in conversations):
            raise BackendError("mumbles: an answer cannot be read")
        return super().classify(conversations)


@pytest.mark.parametrize(("on_degraded", "withheld"), [("block", True), ("allow", False)])
def test_a_text_that_the_second_tier_cannot_judge_is_for_on_degraded(on_degraded: Any, withheld: bool) -> None:
    """As in a cascade: one answer that cannot be read spoils neither the others nor the whole calibration."""
    cascade = Cascade(KeywordBackend({"doubt": 0.5}), _Mumbles({"worse": 0.9}))
    texts = ["doubt worse", "doubt mumble", "doubt fine"] * 2
    rows = [Row(Conversation.of(text), text == "doubt worse", frozenset()) for text in texts]
    policy = Policy(on_degraded=on_degraded, threshold=0.8)
    tiers, _, unread = bands.measure(cascade, policy, rows)
    assert unread == 2
    assert tiers.second.tolist() == [True, withheld, False] * 2
    guard = Guard(cascade, policy=policy)
    assert [guard.screen(row.conversation).blocked for row in rows] == tiers.second.tolist()


def test_a_second_tier_that_is_broken_is_an_error() -> None:
    """It is found out with the first batch, after a few questions."""
    cascade = Cascade(KeywordBackend({}), _Mumbles({}))
    rows = [Row(Conversation.of(f"mumble {at}"), at % 2 == 0, frozenset()) for at in range(200)]
    with pytest.raises(BackendError, match="cannot be read"):
        bands.measure(cascade, Policy(), rows)


def test_a_band_reaches_over_every_limit() -> None:
    """Of each stage and score, where a policy withholds."""
    policy = Policy(threshold={"flag": 0.1, "review": 0.4, "block": 0.9}, injection=0.7)
    assert withholding(policy, ["input", "output"]) == (0.4, 0.7)
    assert withholding(Policy(threshold={"flag": 0.1}), ["input"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("limits", "band"), [((0.5, 1.0), (0.5, 1.0)), ((0.0, 0.5), (0.0, 0.5)), ((0.3, 0.6), (0.3, 0.6))]
)
def test_a_band_never_ends_short_of_the_limits(limits: tuple[float, float], band: tuple[float, float]) -> None:
    """However sure the first tier is."""
    unsafe = np.arange(1000) % 2 == 0
    sure = Tiers(unsafe, np.stack([unsafe * 1.0, unsafe * 0.0 - 1], axis=1), unsafe & False, unsafe, unsafe)
    assert bands._losing_little(sure, 0.05, 0.05, limits, seed=0) == pytest.approx(band, abs=2e-6)


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        (Target(lost=0.05), labelled(80), "needs 50 unsafe ones there, not 20"),
        (Target(), labelled(400), "one target"),
        (Target(0.1, 0.1), labelled(400), "one target"),
        (Target(lost=0.0), labelled(400), "rates between 0 and 1"),
        (Target(escalated=1.5), labelled(400), "rates between 0 and 1"),
        (Target(escalated=0.001), labelled(400), r"bring at least \d+"),
    ],
)
def test_what_cannot_be_promised_is_refused(target: Target, rows: list[Row], message: str) -> None:
    """Rather than a band that means nothing."""
    with pytest.raises(DataError, match=message):
        fit(Cascade(FIRST, SECOND), Policy(), rows, target)


def test_a_band_is_between_two_tiers() -> None:
    """Of more, each pair would need rows of its own."""
    with pytest.raises(DataError, match="first>second>second has 3"):
        fit(Cascade(FIRST, SECOND, SECOND), Policy(), labelled(400), Target(lost=0.1))


def test_too_few_rows_escalate_rather_than_promise() -> None:
    """Of 60 unsafe rows without a miss, none shows that fewer than one in a hundred is missed."""
    found = fit(Cascade(FIRST, SECOND), Policy(), labelled(240), Target(lost=0.01))
    assert found.parts["all"].band == (0.0, 1.0)


def test_a_new_band_leaves_no_older_one_beside_it() -> None:
    """Which would be promised nothing."""
    old = Policy(stages={"output": {"band": (0.4, 0.6), "threshold": 0.7}})
    cascade = Cascade(KeywordBackend({"bad": 0.9}), KeywordBackend({"bad": 0.9}, name="second"))
    rows = [Row(Conversation.of(f"{'bad' if i % 2 else 'good'} {i}"), bool(i % 2), frozenset()) for i in range(400)]
    policy = fit(cascade, old, rows, Target(escalated=0.2)).policy(old)
    assert policy.model_dump(exclude_defaults=True)["stages"]["output"] == {"threshold": 0.7}


def test_what_a_category_withholds_alone_is_not_promised_away() -> None:
    """No band takes those rows out."""

    class Kinds(KeywordBackend):
        def _scores(self, trial: str) -> Scores:
            return Scores(0.1, {"violence": 0.9 if "war" in trial else 0.0}, backend=self.name)

    rows = [Row(Conversation.of(f"{'bad' if i % 2 else 'war'} {i}"), bool(i % 2), frozenset()) for i in range(400)]
    cascade = Cascade(Kinds({}), KeywordBackend({"bad": 0.9}))
    with pytest.raises(DataError, match="category alone"):
        fit(cascade, Policy(categories={"violence": 0.5}), rows, Target(lost=0.05))
