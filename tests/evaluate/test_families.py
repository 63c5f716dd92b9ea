"""What belongs together stays together, and sides are as even as that allows."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guardmw import Conversation, Turn
from guardmw.evaluate.families import families, sides
from guardmw.evaluate.rows import Row

LONG = "the baker of the old town gets up at three, kneads the dough for an hour, lets it rest and then lights the oven"


def row(*turns: Turn | str, name: str = "", origin: str = "") -> Row:
    """A safe one."""
    spoken = tuple(turn if isinstance(turn, Turn) else Turn("user", turn) for turn in turns)
    return Row(Conversation(spoken), unsafe=False, categories=frozenset(), id=name, origin=origin)


def together(*rows: Row) -> list[list[int]]:
    """The families, by the places of their rows."""
    found = families(rows)
    return [[at for at, own in enumerate(found) if own == family] for family in dict.fromkeys(found)]


def test_rows_made_from_one_are_a_family() -> None:
    """By the names of rows."""
    assert together(row("a", name="1"), row("b"), row("c", origin="1"), row("d", origin="1")) == [[0, 2, 3], [1]]


def test_rows_about_one_prompt_are_a_family() -> None:
    """Itself, and the answers to it; whatever the case and the signs."""
    answers = [row("How do I bake?", Turn("assistant", text)) for text in ("With an oven.", "You do not.")]
    assert together(row("how do I... BAKE"), *answers, row("How do I boil?")) == [[0, 1, 2], [3]]


def test_texts_that_say_nearly_the_same_are_a_family() -> None:
    """Also those that only a third one joins; not those that share their half."""
    near = [row(LONG), row(f"{LONG} again"), row(f"well, {LONG}"), row(Turn("tool", f"{LONG} again"))]
    assert together(*near, row(LONG[:60])) == [[0, 1, 2, 3], [4]]


def test_texts_without_a_word_are_no_trouble() -> None:
    """Of them nothing can be told apart."""
    assert together(row(""), row("..."), row("a")) == [[0, 1], [2]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=60), st.integers(0, 3))
def test_no_family_is_on_both_sides(rows: list[tuple[int, int]], seed: int) -> None:
    """And each stratum is on both, as evenly as the largest family allows."""
    strata, kin = [one for one, _ in rows], [other for _, other in rows]
    second = sides(strata, kin, seed)
    assert {kin[at] for at in np.flatnonzero(second)}.isdisjoint(kin[at] for at in np.flatnonzero(~second))
    assert second.tolist() == sides(strata, kin, seed).tolist()
    alone = sides(strata, range(len(rows)), seed)
    for stratum, count in Counter(strata).items():
        assert sum(side for side, own in zip(alone, strata, strict=True) if own == stratum) in (
            count // 2,
            -(-count // 2),
        )


def test_chance_decides_between_sides() -> None:
    """And nothing else: not which row came first."""
    drawn = np.array([sides([0] * 20, range(20), seed) for seed in range(200)])
    assert drawn.sum(axis=1).tolist() == [10] * 200
    assert (np.abs(drawn.mean(axis=0) - 0.5) < 0.15).all()
