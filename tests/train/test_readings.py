"""Rows that were read again take the labels they were read to have, and nothing else of them is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guardmw import DataError
from guardmw.conversation import Conversation, Turn
from guardmw.evaluate.rows import Row, key
from guardmw.train import readings
from guardmw.train.readings import Reading, reread

if TYPE_CHECKING:
    from pathlib import Path


def row(text: str, *, unsafe: bool = True, attack: str = "") -> Row:
    """A weak row of a user's turn."""
    kinds = frozenset({"hate"}) if unsafe else frozenset[str]()
    return Row(Conversation((Turn("user", text),)), unsafe, kinds, attack, source="pond", weak=True)


def name(given: Row) -> str:
    """As files name it."""
    return key(given)[: readings.DIGITS]


def test_a_row_takes_the_label_it_was_read_to_have() -> None:
    """With its kinds of harm, and as one that is trusted."""
    rude, calm = row("ducks are silly", attack="jailbreak"), row("off with the geese", unsafe=False)
    said = {name(rude): Reading("safe", None), name(calm): Reading("unsafe", frozenset({"violence"}))}
    (first, second), report = reread([rude, calm], said)
    assert (first.unsafe, first.categories, first.attack, first.weak) == (False, frozenset(), "", False)
    assert (second.unsafe, second.categories, second.weak) == (True, {"violence"}, False)
    assert report == {"read_again": {"pond": {"safe": 1, "unsafe": 1}}}


def test_unsafe_in_no_way_of_ours_leaves_the_kinds_unknown() -> None:
    """So that nothing is learned of them."""
    given = row("geese")
    ((made,), _) = reread([given], {name(given): Reading("unsafe", None)})
    assert made.unsafe
    assert made.categories is None


def test_what_could_not_be_decided_keeps_its_label_and_is_doubted() -> None:
    """A filter by confidence drops it."""
    given = row("drakes, am I right")
    ((made,), report) = reread([given], {name(given): Reading("borderline", None)})
    assert made.unsafe == given.unsafe
    assert made.confidence == 0.5
    assert report == {"read_again": {"pond": {"borderline": 1}}}


def test_a_row_that_nobody_read_is_the_same_object() -> None:
    """Its label stands."""
    given = row("moorhens")
    assert reread([given], {name(row("coots")): Reading("safe", None)}).rows[0] is given


@pytest.mark.parametrize(
    "line",
    [
        "0123456789abcdef",
        "0123456789abcdef maybe",
        "0123456789abcdef unsafe rudeness",
        "0123 safe",
        "0123456789abcdef safe\n0123456789abcdef unsafe",
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    """With its number, before anything is trained."""
    path = tmp_path / "readings.txt"
    path.write_text(f"fedcba9876543210 unsafe hate,violence\n{line}\n", encoding="ascii")
    with pytest.raises(DataError, match=r"line [23]"):
        readings.read(path)


def test_the_readings_that_ship_can_be_read() -> None:
    """They are keys and labels, nothing of the rows."""
    assert {reading.label for reading in readings.read().values()} == {"safe", "unsafe", "borderline"}
