"""The table of what each step gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from guardmw.evaluate.rows import row
from guardmw.train.miniguard import ablate

if TYPE_CHECKING:
    from guardmw.evaluate.rows import Row


def rows() -> list[Row]:
    """Safe and unsafe by turns."""
    return [row({"text": f"number {i}", "label": "unsafe" if i % 2 else "safe"}, "mine") for i in range(40)]


def measured(name: str, right: int) -> ablate.Measured:
    """A step that decides so many of the rows right, and the others as unsafe."""
    scores = np.array([float(one.unsafe) if i < right else 1.0 for i, one in enumerate(rows())])
    return ablate.Measured(name, {ablate.POOL: scores}, 3)


def test_every_step_is_held_against_the_one_that_it_is_made_of() -> None:
    """For each of two foldings to eight bits that is the soup."""
    steps = [measured("base", 10), measured("+ soup", 30), measured("+ FP8", 20), measured("+ INT8", 26)]
    found = ablate.told(steps, {ablate.POOL: rows()})
    of = {name: told["sets"][ablate.POOL] for name, told in found.items()}
    assert "against_before" not in of["base"]
    for name, before in (("+ soup", "base"), ("+ FP8", "+ soup"), ("+ INT8", "+ soup")):
        gain = of[name]["macro_f1"] - of[before]["macro_f1"]
        assert of[name]["against_before"]["macro_f1"] == pytest.approx(gain), name
    low, high = of["+ INT8"]["against_before"]["interval"]
    assert low < of["+ INT8"]["against_before"]["macro_f1"] < high <= 0
    page = ablate.page(found, {})
    assert "unread answers, all sets" in page
    assert "INT8 stands in FP8's place" in page
