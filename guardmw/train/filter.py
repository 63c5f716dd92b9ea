"""Which rows are worth learning from, and why the others are not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from guardmw.errors import DataError, GuardmwError
from guardmw.evaluate import near, rows
from guardmw.evaluate.near import Similarity
from guardmw.settings import Part, Score
from guardmw.train.contamination import Contamination, contaminated
from guardmw.train.ingest import both_labels, check

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from guardmw.evaluate.rows import Row

Reason = Literal[
    "confidence", "length", "contamination", "denied", "conflict", "duplicate", "near_duplicate", "balance"
]
_Count = Annotated[int, Field(gt=0)]
_Key = TypeVar("_Key")

# Words in a run, for similarity; where two texts differ in one word, each has so many runs that the other has not.
_SHINGLE = 3


class Duplicates(Part):
    """Rows of one stage that say the same, or nearly.

    Of rows with the same label the most trusted is kept. A label is trusted more if it is not weak, and then by its
    confidence.

    Attributes:
        similarity: of the runs of three words, text and context each for itself, from which on two rows are one; 1
            leaves only case, spacing and, except in tool calls, punctuation out of account.
        conflict_similarity: the same for rows whose labels differ, which may moreover differ in one word only: a text
            that lacks just what makes another one harmful teaches the most, as a page does without the instruction that
            was put into it.
        conflicts: trust drops a row that a more trusted one contradicts, and all that contradict each other with equal
            trust; drop drops all; keep keeps all.
    """

    similarity: Similarity = 0.85
    conflict_similarity: Similarity = 0.95
    conflicts: Literal["trust", "drop", "keep"] = "trust"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.conflict_similarity < self.similarity:
            raise ValueError("'conflict_similarity' is no lower than 'similarity'")
        return self


class Folds(Part):
    """What models say of rows that they were not trained on.

    Attributes:
        file: JSON lines with "key" (of ``guardmw.evaluate.rows.key``) and "score", P(unsafe); a key may come often.
        deny: a row is dropped if every score gives its label a probability of at most 1 less this.
    """

    file: Path
    deny: Annotated[float, Field(gt=0.5, le=1)] = 0.95


class Balance(Part):
    """How many rows there may be of a kind; which of them, their content decides.

    Attributes:
        per_source: of each source that has no number of its own.
        sources: of these.
        per_stage_label: of each label at each stage.
        ratio: of one label at a stage, for each row of the other; a stage with one label only is left as it is.
    """

    per_source: _Count | None = None
    sources: dict[str, _Count] = {}
    per_stage_label: _Count | None = None
    ratio: Annotated[float, Field(ge=1)] | None = None


class Filter(Part):
    """What is dropped.

    Attributes:
        confidence: rows whose label is given with less; rows without a confidence stay.
        min_words, max_words: of the text on trial, without its context.
        seed: of the choice among rows that are alike to every rule.
    """

    confidence: Score | None = None
    min_words: _Count = 1
    max_words: _Count | None = None
    contamination: Contamination = Contamination()
    folds: Folds | None = None
    duplicates: Duplicates | None = Duplicates()
    balance: Balance = Balance()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that was dropped.

    Attributes:
        like: id of the row, or source and id of the benchmark's row, that it is too much like.
    """

    id: str
    source: str
    reason: Reason
    like: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What was dropped and why; never what it said.

    Attributes:
        given, kept: rows by source.
        drops: in the order of the rows.
    """

    given: Mapping[str, int]
    kept: Mapping[str, int]
    drops: tuple[Drop, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: counts of all, by reason, and by source."""
        reasons = Counter(drop.reason for drop in self.drops)
        by_source: dict[str, Counter[str]] = defaultdict(Counter)
        for drop in self.drops:
            by_source[drop.source][drop.reason] += 1
        return {
            "given": sum(self.given.values()),
            "kept": sum(self.kept.values()),
            "dropped": dict(sorted(reasons.items())),
            "sources": {
                name: {
                    "given": self.given[name],
                    "kept": self.kept.get(name, 0),
                    "dropped": dict(sorted(by_source[name].items())),
                }
                for name in sorted(self.given)
            },
        }

    def write(self, path: Path) -> None:
        """One JSON line for each row that was dropped: id, source, reason, and what it is like if that is why."""
        lines = (
            json.dumps({"id": d.id, "source": d.source, "reason": d.reason} | ({"like": d.like} if d.like else {}))
            for d in self.drops
        )
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def filter_(given: Sequence[Row], settings: Filter) -> tuple[list[Row], Dropped]:
    """The rows that are kept, in their order, and what was dropped.

    Each rule sees what those before it left: confidence, length, contamination, folds, duplicates, balance. Which rows
    are kept does not depend on their order.

    Raises:
        DataError: a file or benchmark cannot be read, or what is kept has one label only.
    """
    for benchmark in settings.contamination.against:
        check(benchmark)
    pool = _Pool(given, settings.seed)
    pool.drop("confidence", _unsure(settings.confidence))
    pool.drop("length", _too_short_or_long(settings))
    _drop_contaminated(pool, settings.contamination)
    if settings.folds:
        _drop_denied(pool, settings.folds)
    if settings.duplicates:
        _drop_duplicates(pool, settings.duplicates)
    _balance(pool, settings.balance)
    kept = [given[at] for at in pool.left]
    both_labels(kept, f"of {len(given):,} rows the filter keeps")
    return kept, Dropped(
        given=Counter(row.source for row in given),
        kept=Counter(row.source for row in kept),
        drops=tuple(pool.dropped[at] for at in sorted(pool.dropped)),
    )


class _Pool:
    """The rows, of which some have been dropped."""

    def __init__(self, given: Sequence[Row], seed: int) -> None:
        self.rows = given
        self.seed = seed
        self.dropped: dict[int, Drop] = {}
        # Of rows that are alike to every rule, which comes first is drawn; the seed decides, not the order.
        self.lots = [_lot(row, seed) for row in given]

    @property
    def left(self) -> list[int]:
        """Places of the rows that are not dropped."""
        return [at for at in range(len(self.rows)) if at not in self.dropped]

    def drop(self, reason: Reason, condition: Callable[[Row], bool]) -> None:
        """Drop the rows that meet a condition."""
        for at in self.left:
            if condition(self.rows[at]):
                self.take(at, reason)

    def take(self, at: int, reason: Reason, like: str = "") -> None:
        """Drop the row at a place."""
        row = self.rows[at]
        self.dropped[at] = Drop(row.id, row.source, reason, like)


def _lot(row: Row, seed: int) -> str:
    told = f"{seed}\0{rows.key(row)}\0{row.source}\0{row.id}\0{row.unsafe}"
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()


def _unsure(least: float | None) -> Callable[[Row], bool]:
    return lambda row: least is not None and row.confidence is not None and row.confidence < least


def _too_short_or_long(settings: Filter) -> Callable[[Row], bool]:
    most = settings.max_words

    def outside(row: Row) -> bool:
        count = len(near.words(row.conversation.trial))
        return count < settings.min_words or (most is not None and count > most)

    return outside


def _drop_contaminated(pool: _Pool, settings: Contamination) -> None:
    left = pool.left
    for place, like in contaminated([pool.rows[at] for at in left], settings, pool.seed).items():
        pool.take(left[place], "contamination", like)


def _drop_denied(pool: _Pool, settings: Folds) -> None:
    scores = _scores(settings.file)
    keys = {at: rows.key(pool.rows[at]) for at in pool.left}
    if not scores.keys() & keys.values():
        raise DataError(f"{settings.file} has a score for none of the rows: its keys are those of other rows")
    for at, key in keys.items():
        given = scores.get(key, ())
        doubts = [1 - score if pool.rows[at].unsafe else score for score in given]
        if doubts and min(doubts) >= settings.deny:
            pool.take(at, "denied")


def _scores(path: Path) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = defaultdict(list)
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in rows.lines(file):  # noqa: B007 - the message below tells it
                if line.strip():
                    key, score = _score(rows.loads(line))
                    scores[key].append(score)
    except rows.UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except GuardmwError as error:
        raise DataError(f"{path}, line {number}: {error}") from None
    return scores


def _score(given: object) -> tuple[str, float]:
    match given:
        case {"key": str(key), "score": int() | float() as score} if 0 <= score <= 1 and not isinstance(score, bool):
            return key, float(score)
    raise DataError('a line is {"key": …, "score": …}, the score a number from 0 to 1')


def _drop_duplicates(pool: _Pool, settings: Duplicates) -> None:
    """Compare each row with those that go before it, the most trusted first."""
    # The place goes last: of rows that are the same in all, the first.
    order = sorted(pool.left, key=lambda at: (*_distrust(pool.rows[at]), pool.lots[at], at))
    said = _Said([pool.rows[at] for at in order], settings.similarity, pool.seed)
    disputed: set[int] = set()
    for later, at in enumerate(order):
        row = pool.rows[at]
        found = [(earlier, share, pool.rows[order[earlier]]) for earlier, share in said.before(later)]
        agreeing = [earlier for earlier, _, other in found if other.unsafe == row.unsafe]
        denying = [
            earlier
            for earlier, share, other in found
            if other.unsafe != row.unsafe
            and settings.conflicts != "keep"
            and share >= settings.conflict_similarity
            and said.apart(later, earlier) <= _SHINGLE
        ]
        if denying:
            pool.take(at, "conflict", pool.rows[order[denying[0]]].id)
            for earlier in denying:
                equal = _distrust(pool.rows[order[earlier]]) == _distrust(row)
                if (equal or settings.conflicts == "drop") and earlier not in disputed:
                    disputed.add(earlier)
                    pool.take(order[earlier], "conflict", row.id)
        elif agreeing:
            like = pool.rows[order[agreeing[0]]].id
            same = said.exactly(later, agreeing[0])
            repeated: Reason = "duplicate" if same else "near_duplicate"
            pool.take(at, "conflict" if agreeing[0] in disputed else repeated, like)
        else:
            said.remember(later)


def _distrust(row: Row) -> tuple[bool, float]:
    """Lower for a label that is trusted more; a label that nobody doubts counts as one that nobody measured."""
    return row.weak, -(1.0 if row.confidence is None else row.confidence)


class _Said:
    """What rows say, in three words at a time, and which of those remembered say nearly the same."""

    def __init__(self, given: Sequence[Row], similarity: float, seed: int) -> None:
        self._similarity = similarity
        self._stages = [row.conversation.stage for row in given]
        self._texts = [_told(row) for row in given]
        self._runs = [tuple(near.grams(near.numbers(words), _SHINGLE) for words in text) for text in self._texts]
        # Two rows are near if text and context both are, and then so are both put together.
        together = [np.concatenate([text, context ^ np.uint64(1)]) for text, context in self._runs]
        self._signatures = near.signatures(together, seed)
        self._index: dict[str, near.Index] = {}
        self._exact: dict[tuple[str, tuple[tuple[str, ...], ...]], int] = {}

    def remember(self, at: int) -> None:
        """Let a row be found from here on."""
        self._exact[self._stages[at], self._texts[at]] = at
        stage = self._stages[at]
        if stage not in self._index:
            self._index[stage] = near.Index(self._signatures, self._similarity)
        self._index[stage].add(at)

    def before(self, at: int) -> list[tuple[int, float]]:
        """The remembered rows that say nearly the same, with how nearly; the same ones first."""
        exact = self._exact.get((self._stages[at], self._texts[at]))
        index = self._index.get(self._stages[at])
        found = [(other, self._share(at, other)) for other in (index.near(self._signatures[at]) if index else ())]
        near_by = [(other, share) for other, share in found if share >= self._similarity and other != exact]
        return ([] if exact is None else [(exact, 1.0)]) + near_by

    def exactly(self, one: int, other: int) -> bool:
        """Whether two rows say the same but for case, spacing and signs."""
        return self._texts[one] == self._texts[other]

    def apart(self, one: int, other: int) -> int:
        """How many runs of words one of two rows has and the other has not, counted for the one that has more."""
        pairs = list(zip(self._runs[one], self._runs[other], strict=True))
        return max(
            sum(len(np.setdiff1d(a, b, assume_unique=True)) for a, b in pairs),
            sum(len(np.setdiff1d(b, a, assume_unique=True)) for a, b in pairs),
        )

    def _share(self, one: int, other: int) -> float:
        return min(near.jaccard(a, b) for a, b in zip(self._runs[one], self._runs[other], strict=True))


def _told(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of the text, and of its context. In a tool call each sign counts: one may be all that is wrong."""
    spoken = row.conversation
    text = near.words(spoken.trial, signs=spoken.stage == "tool_call")
    return tuple(text), tuple(word for turn in spoken.context for word in near.words(turn.text))


def _balance(pool: _Pool, settings: Balance) -> None:
    for source, places in _grouped(pool, lambda row: row.source).items():
        _cap(pool, places, settings.sources.get(source, settings.per_source))
    for places in _grouped(pool, lambda row: (row.conversation.stage, row.unsafe)).values():
        _cap(pool, places, settings.per_stage_label)
    if settings.ratio is None:
        return
    for places in _grouped(pool, lambda row: row.conversation.stage).values():
        labels = _grouped(pool, lambda row: row.unsafe, places)
        fewest = min(map(len, labels.values()))
        for some in labels.values() if len(labels) > 1 else ():
            _cap(pool, some, int(settings.ratio * fewest))


def _grouped(pool: _Pool, by: Callable[[Row], _Key], places: Collection[int] | None = None) -> dict[_Key, list[int]]:
    groups: dict[_Key, list[int]] = defaultdict(list)
    for at in pool.left if places is None else places:
        groups[by(pool.rows[at])].append(at)
    return groups


def _cap(pool: _Pool, places: Iterable[int], most: int | None) -> None:
    if most is None:
        return
    for at in sorted(places, key=lambda at: (pool.lots[at], at))[most:]:
        pool.take(at, "balance")
