"""Whether a fitted band keeps its promise on rows it was not fitted on: over many splits, with several second tiers.

One command, of which only the first run is slow; it measures, and prints nothing that a row says:

    python tests/benchmarks/bands.py ../shared/data/bench/*.jsonl.gz --cache scores.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from guardmw import Cascade, Guard, load
from guardmw.backends.onnx import EMBEDDED
from guardmw.backends.remembered import Remembered
from guardmw.conversation import STAGES
from guardmw.errors import DataError
from guardmw.evaluate import bands
from guardmw.evaluate.families import sides
from guardmw.evaluate.rows import read
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardmw.evaluate.bands import Target, Tiers
    from guardmw.evaluate.metrics import Bools
    from guardmw.evaluate.rows import Row

TARGETS = (bands.Target(escalated=0.1), bands.Target(escalated=0.2), bands.Target(lost=0.05), bands.Target(lost=0.02))
FLIPS = (0.0, 0.05, 0.15)
CONFIDENCE = 0.95


class Shelf:
    """Scores in a file, by hash of the conversation and fingerprint of the model; no text."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self._kept: dict[str, str] = dict(json.loads(line) for line in lines)

    def fetch(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """From what the file held, and what came since."""
        found = (self._kept.get(key.hex()) for key in keys)
        return [None if value is None else value.encode() for value in found]

    def keep(self, values: Mapping[bytes, bytes], _: float) -> None:
        """At once, so that a run that is ended goes on where it was."""
        new = {key.hex(): value.decode() for key, value in values.items()}
        self._kept |= new
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(pair) + "\n" for pair in new.items())


class Seen(NamedTuple):
    """What one band did on rows it was not fitted on, and the worst of its rates on both halves together."""

    escalated: float
    worst: float
    everywhere: float


def remembered(spec: str, shelf: Shelf) -> Remembered:
    """A backend that scores each row once, under the digest of its weights where there is a file of them."""
    folder = EMBEDDED if spec == "embedded" else Path(spec.partition(":")[2])
    files = [folder / name for name in ("model.onnx", "card.json", "tokenizer.json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.exists() else spec.encode())
    return Remembered(load(spec), store=shelf, fingerprint=digest.hexdigest())


def measured(first: str, second: str, rows: Sequence[Row], shelf: Shelf) -> tuple[Tiers, tuple[float, float]]:
    """What the tiers of a cascade say of all rows, by the policy that a guard has by default; and its limits."""
    careful = remembered(second, shelf) if second else KeywordBackend({})
    guard = Guard(Cascade(remembered(first, shelf), careful))
    cascade = guard.backend
    assert isinstance(cascade, Cascade)
    tiers, _, _ = bands.measure(cascade, guard.policy, rows, done=lambda count: show_progress(count, len(rows)))
    return tiers, bands.withholding(guard.policy, STAGES)


def show_progress(count: int, of: int) -> None:
    """On one line."""
    print(f"\r{count:,} of {of:,} rows", end="" if count < of else "\n", file=sys.stderr, flush=True)


def simulated(tiers: Tiers, flip: float) -> Tiers:
    """A second tier that withholds what is unsafe, but errs on some rows: on the same ones in every split."""
    wrong: Bools = np.random.default_rng(0).random(len(tiers)) < flip
    return replace(tiers, second=tiers.unsafe ^ wrong)


def one_split(
    tiers: Tiers, strata: list[object], target: Target, limits: tuple[float, float], seed: int
) -> Seen | None:
    """Fitted on one half, seen on the other, families apart; None where the fit refuses."""
    assert tiers.families is not None
    other = sides(strata, tiers.families.tolist(), seed)
    fitting, reporting, error = tiers.of(~other), tiers.of(other), 1 - CONFIDENCE
    try:
        if target.escalated is not None:
            band = bands._within_budget(fitting, target.escalated, error, limits, seed)
        else:
            band = bands._losing_little(fitting, target.lost or 0.0, error, limits, seed)
    except DataError:
        return None
    rates = bands.rates(reporting, band)
    promised = ("escalated",) if target.escalated is not None else ("missed", "alarmed")
    everywhere = bands.rates(tiers, band)
    return Seen(rates["escalated"], *(max(given[name] for name in promised) for given in (rates, everywhere)))


def promises(name: str, tiers: Tiers, strata: list[object], limits: tuple[float, float], splits: int) -> None:
    """A line of the table for each target."""
    for target in TARGETS:
        most = target.lost if target.escalated is None else target.escalated
        assert most is not None
        all_of_them = [one_split(tiers, strata, target, limits, seed) for seed in range(splits)]
        found = [one for one in all_of_them if one]
        if not found:
            print(f"| {name} | {most:.0%} | refused | | |")
            continue
        what = "loses" if target.escalated is None else "escalates"
        share, worst = np.mean([one.escalated for one in found]), [one.worst for one in found]
        within = [sum(rate <= most for rate in given) for given in (worst, [one.everywhere for one in found])]
        print(
            f"| {name} | {what} ≤ {most:.0%} | {share:.1%} | {np.mean(worst):.1%}, {max(worst):.1%} "
            f"| {within[0]}, {within[1]} of {len(found)} |",
            flush=True,
        )


def invented(count: int, seed: int) -> Tiers:
    """Independent rows: a first tier that is right four times of five, a second one that is wrong once in ten."""
    draw = np.random.default_rng(seed)
    unsafe = draw.random(count) < 0.4
    score = 1 / (1 + np.exp(-(np.where(unsafe, 1.5, -1.5) + draw.normal(0, 2, count))))
    scores = np.stack([score, np.full(count, -1.0)], axis=1)
    second = unsafe ^ (draw.random(count) < 0.1)
    return bands.Tiers(unsafe, scores, np.zeros(count, dtype=bool), score >= 0.5, second)


def control(count: int, splits: int) -> None:
    """How often a promise that is kept is seen to be, on halves of one pool: by the other half, and by true rates."""
    truth, lost, limits = invented(200_000, 0), 0.05, (0.5, 0.5)
    for pool in range(1, 5):
        tiers, kept = invented(count, pool), [0, 0]
        for seed in range(splits):
            other = sides(tiers.unsafe.tolist(), range(count), seed)
            band = bands._losing_little(tiers.of(~other), lost, 1 - CONFIDENCE, limits, seed)
            for at, seen in enumerate((tiers.of(other), truth)):
                rates = bands.rates(seen, band)
                kept[at] += max(rates["missed"], rates["alarmed"]) <= lost
        print(f"invented pool {pool}: within {kept[0]} of {splits} as seen, {kept[1]} by true rates", flush=True)


def curve(tiers: Tiers, strata: list[object], limits: tuple[float, float]) -> None:
    """Of one split: what other bands would do."""
    assert tiers.families is not None
    other = sides(strata, tiers.families.tolist(), 0)
    fitting, reporting = tiers.of(~other), tiers.of(other)
    fitted = bands.fit_tiers(fitting, reporting, bands.Target(escalated=0.2), error=1 - CONFIDENCE, limits=limits)
    print("| band | escalated | recall | FPR | F1 |\n|---|---|---|---|---|")
    for point in sorted((*fitted.curve, fitted.point), key=lambda point: point.escalated):
        band = "first tier alone" if point.band is None else f"{point.band[0]:.2f}–{point.band[1]:.2f}"
        chosen = " (`--at-most 0.2`)" if point is fitted.point else ""
        print(f"| {band}{chosen} | {point.escalated:.0%} | {point.recall:.3f} | {point.fpr:.3f} | {point.f1:.3f} |")


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="labelled rows, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--first", default="embedded", metavar="SPEC", help="before simulated tiers (default: embedded)"
    )
    parser.add_argument("--real", action="append", default=[], metavar="SPEC,SPEC", help="two tiers; may be repeated")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="where scores are kept from run to run")
    parser.add_argument("--rows", type=int, metavar="N", help="so many of them, drawn by chance (default: all)")
    parser.add_argument("--splits", type=int, default=40, metavar="N", help="(default: 40)")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read(file)]
    if args.rows and args.rows < len(rows):
        rows = random.Random(0).sample(rows, args.rows)  # noqa: S311 - a choice, not a secret
    shelf = Shelf(args.cache)
    strata: list[object] = [(row.conversation.stage, row.unsafe, bool(row.attack)) for row in rows]
    tiers, limits = measured(args.first, "", rows, shelf)
    assert tiers.families is not None
    unsafe, kin = int(tiers.unsafe.sum()), len(set(tiers.families.tolist()))
    print(f"{len(rows):,} rows, {unsafe:,} of them unsafe, in {kin:,} families; first tier {args.first}\n")
    curve(simulated(tiers, 0.15), strata, limits)
    print("\n| second tier | promise | escalated, mean | seen, mean and worst | splits within: there, of all rows |")
    print("|---|---|---|---|---|")
    for flip in FLIPS:
        name = f"wrong in {flip:.0%}" if flip else "perfect"
        promises(name, simulated(tiers, flip), strata, limits, args.splits)
    for pair in args.real:
        first, _, second = pair.partition(",")
        real, its_limits = measured(first, second, rows, shelf)
        promises(f"{first} → {second}", real, strata, its_limits, args.splits)
    print()
    control(kin, args.splits)


if __name__ == "__main__":
    main()
