"""What a backend measured, and what a policy made of it, in one stable form."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import Coverage, Guard, Policy, Scores, Verdict, Violation
from guardmw.taxonomy import CATEGORIES
from guardmw.testing import KeywordBackend, ScriptedBackend
from guardmw.verdict import worst

SCORE = st.floats(0, 1)
SCORES = st.builds(
    Scores, SCORE, st.fixed_dictionaries(dict.fromkeys(CATEGORIES, SCORE)), SCORE, backend=st.just("scripted")
)


@pytest.mark.parametrize("score", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_score_lies_between_0_and_1(score: float) -> None:
    """NaN above all: it would be under every threshold."""
    with pytest.raises(ValueError, match="lies in"):
        Scores(score)
    with pytest.raises(ValueError, match="lies in"):
        Scores(0.5, injection=score)
    with pytest.raises(ValueError, match="lies in"):
        Scores(0.5, {"violence": score})


@given(st.lists(SCORES, min_size=1, max_size=4))
def test_of_several_windows_the_worst_counts(windows: list[Scores]) -> None:
    """Of each score by itself, so that nothing found in one window is lost in another."""
    together = worst(windows)
    assert together.unsafe == max(s.unsafe for s in windows)
    assert together.injection == max(s.injection for s in windows)
    for name in CATEGORIES:
        assert together.categories[name] == max(s.categories[name] for s in windows)


def verdict() -> Verdict:
    """One with something in every field."""
    return Verdict(
        action="block",
        stage="output",
        violations=(Violation("unsafe", 0.98761, 0.5, "block"), Violation("violence", 0.75, 0.6, "flag")),
        scores=Scores(0.98761, {"violence": 0.75}, 0.00001, "tiny"),
        coverage=Coverage(100, 90, 2, 3, ("image_url",)),
        degraded=True,
        reason="90 of 100 characters were judged",
        policy="0123456789ab",
        elapsed_ms=1.23456,
    )


def test_the_json_of_a_verdict_is_stable() -> None:
    """Same keys in the same order, scores to four places: logs can be compared and parsed for years."""
    assert verdict().to_json() == (
        '{"action": "block", "stage": "output", "violations": [{"rule": "unsafe", "score": 0.9876, "threshold": 0.5, '
        '"action": "block"}, {"rule": "violence", "score": 0.75, "threshold": 0.6, "action": "flag"}], "scores": '
        '{"unsafe": 0.9876, "categories": {"violence": 0.75}, "injection": 0.0, "backend": "tiny"}, "coverage": '
        '{"characters": 100, "judged": 90, "windows": 2, "unreadable": 3, "media": ["image_url"]}, "degraded": true, '
        '"reason": "90 of 100 characters were judged", "policy": "0123456789ab", "elapsed_ms": 1.235}'
    )


def test_the_json_has_all_keys_where_there_are_no_scores() -> None:
    """A failed verdict is read by the same code as any other."""
    failed = Policy().fail("input", "it fell over", Coverage(5, 0, 0))
    assert json.loads(failed.to_json()).keys() == verdict().to_dict().keys()
    assert failed.to_dict()["scores"] is None


def test_numpy_scores_become_json() -> None:
    """Backends hand over what their model gave, and that is rarely a Python float."""
    scores = Scores(np.float32(0.75), {"violence": np.float32(0.5)}, np.float32(0.25))  # type: ignore[arg-type,dict-item]
    told = Guard(ScriptedBackend([scores])).screen("Hello").to_json()
    assert json.loads(told)["scores"] == {
        "unsafe": 0.75,
        "categories": {"violence": 0.5},
        "injection": 0.25,
        "backend": "",
    }


def test_the_summary_names_what_was_violated_and_why_it_is_degraded() -> None:
    """One line for a log."""
    assert verdict().summary == (
        "unsafe 0.99 (threshold 0.5), violence 0.75 (threshold 0.6); 90 of 100 characters were judged"
    )
    assert Policy().decide("input", Scores(0.01), Coverage(5, 5)).summary == "nothing found"


def test_the_categories_are_kinds_of_harm_only() -> None:
    """Being unsafe, or an injection, is not a kind of harm."""
    policy = Policy(categories={"violence": 0.5})
    decided = policy.decide("input", Scores(0.9, {"violence": 0.8, "hate": 0.1}, 0.9), Coverage(5, 5))
    assert decided.categories == ("violence",)


def test_a_verdict_survives_a_change_of_process() -> None:
    """Workers hand verdicts back pickled."""
    assert pickle.loads(pickle.dumps(verdict())) == verdict()  # noqa: S301 - its own pickle


def test_a_verdict_is_not_to_be_taken_for_a_yes() -> None:
    """``if guard.screen(text):`` would let everything through."""
    with pytest.raises(TypeError, match=r"verdict\.blocked"):
        bool(Guard(KeywordBackend({})).screen("Hello"))
