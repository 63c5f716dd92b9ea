"""Labels of public rows that were read again under one policy: by key, without a word of the rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from guardmw.errors import DataError
from guardmw.evaluate.rows import key
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from guardmw.evaluate.rows import Row

FILE = Path(__file__).with_suffix(".txt")
# Of a SHA-256; among a million rows two share it once in ten million tries.
DIGITS = 16
# What a reading is worth beside other labels, and what is left where it could not decide.
_SURE, _BORDERLINE = 0.9, 0.5

Label = Literal["safe", "unsafe", "borderline"]


class Reading(NamedTuple):
    """What somebody saw who read a row again.

    Attributes:
        categories: the kinds of harm; None where none of ours fits, or there is none.
    """

    label: Label
    categories: frozenset[str] | None


class Reread(NamedTuple):
    """Rows in the order they came, and what was changed, by source."""

    rows: list[Row]
    report: dict[str, Any]


def read(path: Path = FILE) -> dict[str, Reading]:
    """The readings of a file, by the first DIGITS of a row's key: lines of key, label and categories joined by commas.

    Raises:
        DataError: a line is not of that form.
    """
    found: dict[str, Reading] = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        name, label, kinds = (*line.split(" "), "", "")[:3]
        named = frozenset(filter(None, kinds.split(",")))
        known = label in ("safe", "borderline") or (label == "unsafe" and named <= set(CATEGORIES))
        if not known or len(name) != DIGITS or name in found:
            raise DataError(f"{path}, line {number}: neither a new key with a label nor with categories")
        found[name] = Reading(cast("Label", label), named or None)
    return found


def reread(rows: Iterable[Row], readings: Mapping[str, Reading]) -> Reread:
    """Give rows the labels that they were read to have.

    A row read as safe or unsafe counts as labelled with a confidence of 0.9, and no longer as weak; one that was read
    as borderline keeps its label, with a confidence of 0.5.
    """
    told: dict[str, Counter[str]] = defaultdict(Counter)

    def again(row: Row) -> Row:
        reading = readings.get(key(row)[:DIGITS])
        if reading is None:
            return row
        unsafe = reading.label == "unsafe"
        borderline = reading.label == "borderline"
        told[row.source]["borderline" if borderline else "kept" if unsafe == row.unsafe else reading.label] += 1
        if borderline:
            return replace(row, weak=True, confidence=_BORDERLINE)
        return replace(
            row,
            unsafe=unsafe,
            categories=reading.categories if unsafe else frozenset(),
            attack=row.attack if unsafe else "",
            weak=False,
            confidence=_SURE,
        )

    made = [again(row) for row in rows]
    return Reread(made, {"read_again": {source: dict(counts) for source, counts in sorted(told.items())}})
