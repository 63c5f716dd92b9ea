"""What each step gave: every one measured on the same rows, with intervals, against the one before it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guardmw.evaluate import intervals
from guardmw.train.miniguard.measure import EVEN, figures
from guardmw.train.telling import table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from guardmw.evaluate.metrics import Bools, Floats
    from guardmw.evaluate.rows import Row
    from guardmw.train.miniguard.ask import Asked
    from guardmw.train.stages import Say

POOL = "pool, held out"
# Each stands in the other's place, and is held against what both are made of.
_EIGHT_BITS = ("+ FP8", "+ INT8")
PAGE = "ablation.md"
# Qwen3-0.6B on Nemotron's English test split, by the makers of MiniGuard; another model and another set.
PUBLISHED = {
    "base": 52.5,
    "+ SFT": 85.0,
    "+ think SFT": 88.6,
    "+ targeted data": 89.3,
    "+ soup": 89.2,
    "+ FP8": 89.3,
}


class Step(NamedTuple):
    """A model with all steps up to one.

    Attributes:
        made_from: a name for what it is.
        asked: loads it.
    """

    name: str
    made_from: str
    asked: Callable[[], Asked]


class Measured(NamedTuple):
    """What a step said of each set's rows.

    Attributes:
        scores: by the set's name.
        unread: answers that could not be read, of all sets.
    """

    name: str
    scores: dict[str, Floats]
    unread: int


def measure(step: Step, sets: Mapping[str, Sequence[Row]], rows: str, folder: Path, say: Say) -> Measured:
    """A step's scores of all sets, or those that an earlier run left.

    Args:
        step: the model.
        sets: rows by name.
        rows: a name for these rows.
        folder: where scores are left.
        say: hears of what is done.
    """
    path = folder / f"{step.name.strip('+ ').replace(' ', '-').lower()}.json"
    made_from = f"{step.made_from} {rows}"
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        left = {}
    if left.get("made_from") != made_from:
        say(f"ablation: {step.name}")
        asked = step.asked()
        scores = {name: asked.scores([row.conversation for row in some]).tolist() for name, some in sets.items()}
        left = {"made_from": made_from, "scores": scores, "unread": asked.unread}
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(left) + "\n", encoding="utf-8")
        draft.replace(path)
    return Measured(step.name, {name: np.array(some) for name, some in left["scores"].items()}, left["unread"])


def told(steps: Sequence[Measured], sets: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Figures by step and set, and how each differs from the step before it."""
    found: dict[str, Any] = {}
    before: Measured | None = None
    for step in steps:
        of = {name: figures(rows, step.scores[name]) for name, rows in sets.items()}
        if before:
            for name, rows in sets.items():
                of[name]["against_before"] = _difference(rows, step.scores[name], before.scores[name])
        found[step.name] = {"unread": step.unread, "sets": of}
        before = before if step.name in _EIGHT_BITS else step
    return found


def page(found: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    """The tables, in Markdown."""
    pool = [
        (
            name,
            _sure(of["sets"][POOL], "macro_f1"),
            _against(of["sets"][POOL].get("against_before")),
            _sure(of["sets"][POOL], "auprc"),
            str(of["unread"]),
            f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else "",
        )
        for name, of in found.items()
    ]
    head = ("step", "macro-F1", "against the step before", "AUPRC", "unread answers, all sets", "published")
    sets = [name for name in next(iter(found.values()))["sets"] if name != POOL]
    intro = (
        f"Each line holds all steps above it, but INT8 stands in FP8's place, after the soup. {POOL}: "
        f"{next(iter(found.values()))['sets'][POOL]['rows']} rows on which "
        "nothing was trained or chosen. In brackets 95 % intervals (bootstrap; of differences, paired). An answer that "
        "could not be read counts as unsafe. Published: Qwen3-0.6B on another set, in percent."
    )
    parts = [
        "# What each step gave",
        intro,
        table(head, pool),
        *(f"Left out: {name}, {why}." for name, why in skipped.items()),
    ]
    if sets:
        parts += [
            "## On benchmarks",
            "Macro-F1; of sets with one label the recall or the false-positive rate.",
            table(("", *found), [(name, *(_cell(of["sets"][name]) for of in found.values())) for name in sets]),
        ]
    return "\n\n".join(parts) + "\n"


def _difference(rows: Sequence[Row], scores: Floats, before: Floats) -> dict[str, Any] | None:
    unsafe: Bools = np.array([row.unsafe for row in rows], dtype=bool)
    mine, theirs = (intervals.Judged(some, some >= EVEN) for some in (scores, before))
    found = intervals.differences(unsafe, mine, theirs).get("macro_f1")
    if found is None:
        return None
    sure = found.interval
    return {"macro_f1": found.value, "interval": [sure.low, sure.high] if sure else None}


def _cell(of: Mapping[str, Any]) -> str:
    if of["macro_f1"] is not None:
        return _sure(of, "macro_f1")
    return f"recall {_sure(of, 'recall')}" if of["unsafe"] else f"FPR {_sure(of, 'fpr')}"


def _sure(of: Mapping[str, Any], name: str) -> str:
    if of.get(name) is None:
        return ""
    between = of["intervals"].get(name)
    return f"{of[name]:.3f}" + (f" [{between[0]:.3f}, {between[1]:.3f}]" if between else "")


def _against(given: Mapping[str, Any] | None) -> str:
    if given is None:
        return ""
    between = given["interval"]
    return f"{given['macro_f1']:+.3f}" + (f" [{between[0]:+.3f}, {between[1]:+.3f}]" if between else "")
