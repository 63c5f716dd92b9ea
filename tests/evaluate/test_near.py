"""Texts that say nearly the same are found, however many there are beside them, and on every machine the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw.evaluate import near

SETS = st.lists(st.lists(st.integers(0, 30), max_size=20), min_size=2, max_size=6)


def hashes(said: str, length: int = 3) -> near.Hashes:
    """The runs of words of a text."""
    return near.grams(near.numbers(near.words(said)), length)


def test_words_are_the_same_however_they_are_written() -> None:
    """Case, form, spacing and punctuation aside; scripts without spaces sign by sign."""
    assert near.words("Héllo,  WORLD\uff01") == near.words("héllo world")
    assert near.words("面包 bread面包") == ["面", "包", "bread", "面", "包"]
    assert near.words("rm -rf ./", signs=True) == ["rm", "-", "rf", ".", "/"]


def test_runs_of_words_are_distinct_and_in_their_order() -> None:
    """Fewer words than a run has are one run."""
    assert len(hashes("a b c a b c")) == 3
    assert len(hashes("a b")) == 1
    assert len(hashes("")) == 0
    assert near.jaccard(hashes("a b c"), hashes("c b a")) == 0
    assert near.jaccard(hashes("a b c d"), hashes("x a b c")) == pytest.approx(1 / 3)
    assert near.jaccard(hashes(""), hashes("")) == 1


def test_numbers_are_the_same_on_every_machine() -> None:
    """Python's own hash is another in each process."""
    assert near.numbers(["bread"]).tolist() == [2987821297354627175]


@given(SETS)
def test_signatures_estimate_what_is_counted(given: list[list[int]]) -> None:
    """Within six sigma, for sets of any size."""
    sets = [near.grams(np.array(one, dtype=np.uint64), 1) for one in given]
    made = near.signatures(sets, 0)
    for one, other in zip(range(len(sets)), range(1, len(sets)), strict=False):
        estimate = float((made[one] == made[other]).mean())
        assert abs(estimate - near.jaccard(sets[one], sets[other])) < 6 * 0.5 / near.PERMUTATIONS**0.5


@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.8, 0.95, 1.0])
def test_what_is_similar_enough_is_found(similarity: float) -> None:
    """Sets at the very limit, in each of 200 tries, and few that are far from it."""
    size = 60
    common = round(2 * size * similarity / (1 + similarity) + 0.49)
    sets = []
    for at in range(200):
        start = np.uint64(at * 1000)
        one = np.arange(size, dtype=np.uint64) + start
        sets += [one, np.concatenate([one[:common], one[common:] + np.uint64(500)])]
    sets = [near.grams(one, 1) for one in sets]
    made = near.signatures(sets, 0)
    index = near.Index(made, similarity)
    for at in range(0, len(sets), 2):
        index.add(at)
    found = [index.near(made[at]) for at in range(1, len(sets), 2)]
    assert sum(at * 2 in places for at, places in enumerate(found)) >= 198
    assert sum(map(len, found)) < 250
