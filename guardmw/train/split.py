"""Rows are split without leaks: what belongs together stays on one side."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from guardmw.errors import DataError
from guardmw.evaluate.families import named
from guardmw.evaluate.rows import key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guardmw.evaluate.rows import Row


def split(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Drop repeated texts, and hold some out: (training, held out).

    Rows that share a prompt or an origin, or one made from another, are a family and stay on one side: a held-out row
    with a sister in training would measure memory. The side follows from the family's texts alone, so that more data
    moves a row only where it joins families.

    Raises:
        DataError: a side lacks safe or unsafe rows.
    """
    unique = {key(row): row for row in rows}
    families = named(unique)
    training: list[Row] = []
    held_out: list[Row] = []
    for name, row in unique.items():
        (held_out if int(families[name][:8], 16) < share * 2**32 else training).append(row)
    for side, title in ((training, "training"), (held_out, "held-out")):
        labels = Counter(row.unsafe for row in side)
        if len(labels) < 2:  # noqa: PLR2004 - safe and unsafe
            raise DataError(
                f"the {title} rows hold {labels[True]} unsafe and {labels[False]} safe ones; training needs both"
            )
    for side in halves(held_out):
        if len({row.unsafe for row in side}) < 2:  # noqa: PLR2004 - safe and unsafe
            raise DataError(
                f"{len(held_out)} held-out rows are too few: thresholds are fitted on one half and measured on the "
                "other, and both need safe and unsafe ones; bring more rows, or a larger held_out"
            )
    return training, held_out


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Two sides of about the same number of families."""
    families = named({key(row): row for row in rows})
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        # Not the digits by which a held-out row was held out.
        sides[int(families[key(row)][-8:], 16) % 2].append(row)
    return sides


def digest(rows: Iterable[Row]) -> str:
    """A name for these rows with their labels, whatever their order."""
    named = sorted(f"{key(row)} {row.unsafe} {sorted(row.categories or ())} {row.attack}" for row in rows)
    return hashlib.sha256("".join(named).encode()).hexdigest()[:16]
