"""Rows that belong together, and sides that share none: a row with a sister on the other side would measure memory."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from guardmw.evaluate import near

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from guardmw.evaluate.metrics import Bools
    from guardmw.evaluate.rows import Row

# Of the runs of three words, from which on two texts are nearly one; what the filter of training rows takes for
# duplicates, too.
SIMILARITY = 0.85
_SHINGLE = 3

_WORD = re.compile(r"\w+")


def families(rows: Sequence[Row]) -> list[int]:
    """The family of each row, by number: those that share a prompt or an origin, and those that say nearly the same."""
    kin = _Kin()
    for at, row in enumerate(rows):
        for trait in _traits(row):
            kin.join(trait, at)
    for one, other in _alike(rows):
        kin.join(other, one)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(kin.root(at), len(numbers)) for at in range(len(rows))]


def sides(strata: Sequence[Hashable], families: Sequence[int], seed: int) -> Bools:
    """Two sides of about as many rows of each stratum, no family on both.

    Args:
        strata: what each row is to be counted as.
        families: of each row.
        seed: of what chance decides.

    Returns:
        Which rows are on the second side, (n,).
    """
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    members: defaultdict[int, list[int]] = defaultdict(list)
    for at, family in enumerate(families):
        members[family].append(at)
    # The largest first, and the many of one row then make up for what those leave uneven.
    order = sorted(draw.sample(list(members.values()), len(members)), key=len, reverse=True)
    ahead: Counter[Hashable] = Counter()
    second = np.zeros(len(strata), dtype=bool)
    for own in order:
        counts = Counter(strata[at] for at in own)
        lead = sum(count * ahead[stratum] for stratum, count in counts.items()) or ahead.total()
        goes_second = lead > 0 or (lead == 0 and draw.random() < 0.5)  # noqa: PLR2004 - a coin
        second[own] = goes_second
        for stratum, count in counts.items():
            ahead[stratum] += -count if goes_second else count
    return second


def named(unique: Mapping[str, Row]) -> dict[str, str]:
    """The family of each key, named after its least member; of those that share a prompt or an origin."""
    kin = _Kin()
    for name, row in unique.items():
        for trait in _traits(row):
            kin.join(trait, name)
    least: dict[Hashable, str] = {}
    for name in unique:
        least[kin.root(name)] = min(name, least.get(kin.root(name), name))
    # Hashed once more: the least of many hashes is a small one, and large families would all fall on one side.
    return {name: hashlib.sha256(least[kin.root(name)].encode()).hexdigest() for name in unique}


class _Kin:
    """Disjoint sets."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def root(self, member: Hashable) -> Hashable:
        parent = self._parent
        while parent.setdefault(member, member) != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    def join(self, one: Hashable, other: Hashable) -> None:
        self._parent[self.root(one)] = self.root(other)


def _traits(row: Row) -> set[str]:
    """What rows that belong together have in common: the row behind them, and the words the user said."""
    said = next((turn.text for turn in row.conversation.context if turn.role == "user"), row.conversation.trial)
    words = " ".join(_WORD.findall(said.lower()))
    return {f"{kind}:{trait}" for kind, trait in (("id", row.id), ("id", row.origin), ("said", words)) if trait}


def _alike(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Pairs whose texts on trial are nearly equal."""
    runs = [near.grams(near.numbers(near.words(row.conversation.trial)), _SHINGLE) for row in rows]
    signed = near.signatures(runs, seed=0)
    index = near.Index(signed, SIMILARITY)
    for at, run in enumerate(runs):
        for other in index.near(signed[at]):
            if near.jaccard(run, runs[other]) >= SIMILARITY:
                yield other, at
        index.add(at)
