"""What is measured on is not learnt: rows that are a benchmark's, are near to one, or hold or are held by one."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from guardmw.evaluate import near
from guardmw.evaluate.near import Similarity
from guardmw.settings import Part
from guardmw.train.ingest import Benchmark, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw.evaluate.near import Hashes, Signature
    from guardmw.evaluate.rows import Row

# Words in a run: of those counted for containment, of the shortest text looked for as a whole, and for similarity.
_LONG, _SHORT, _SHINGLE = 8, 5, 3


class Contamination(Part):
    """What may not be learnt, for it is measured on.

    Attributes:
        against: files or data sets; a word is a file, or hub:NAME, of which the test split is meant.
        similarity: of the runs of three words, from which on a row is a benchmark's.
        containment: the share of the runs of eight words of the shorter text that are in the longer one too, from which
            on one is taken from the other. Of a benchmark's text of five to seven words, all must be.
    """

    against: tuple[Benchmark, ...] = ()
    similarity: Similarity = 0.8
    containment: Annotated[float, Field(gt=0, le=1)] = 0.6


def contaminated(given: Sequence[Row], settings: Contamination, seed: int) -> dict[int, str]:
    """The places of the rows that benchmarks hold in some form, each with the source and id of the benchmark's row.

    Raises:
        DataError: a benchmark cannot be read.
    """
    held = [(row, text) for source in settings.against for row in read(source) for text in _texts(row)]
    if not held:
        return {}
    found = _Found([text for _, text in held], settings, seed)
    asked = [(at, text) for at, row in enumerate(given) for text in _texts(row)]
    names: dict[int, str] = {}
    for (at, _), place in zip(asked, found.all([text for _, text in asked]), strict=True):
        if place is not None:
            names.setdefault(at, f"{held[place][0].source}: {held[place][0].id}")
    return names


def _texts(row: Row) -> list[list[str]]:
    """The words by which a row would be known again.

    An answer is known with its prompt only, for many answers are the same refusal; its prompt also alone, for a model
    that learns the right verdict on a prompt's answers learns something of the prompt. What tools are told and tell is
    known without what the user asked, which is often the same.
    """
    spoken = row.conversation
    if spoken.stage != "output" or not spoken.context:
        return [near.words(spoken.trial)]
    asked = [word for turn in spoken.context for word in near.words(turn.text)]
    return [asked, [*asked, *near.words(spoken.trial)]]


class _Found:
    """Benchmark texts, to be found in or near others."""

    def __init__(self, texts: Sequence[list[str]], settings: Contamination, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._exact: dict[tuple[str, ...], int] = {}
        self._long: dict[int, list[int]] = defaultdict(list)
        # By their length, the runs of words that are a whole short text.
        self._short: dict[int, dict[int, int]] = defaultdict(dict)
        self._sizes = [0] * len(texts)
        numbered = [near.numbers(said) for said in texts]
        for at, (text, said) in enumerate(zip(texts, numbered, strict=True)):
            self._exact.setdefault(tuple(text), at)
            if len(said) >= _LONG:
                runs = near.grams(said, _LONG).tolist()
                self._sizes[at] = len(runs)
                for run in runs:
                    self._long[run].append(at)
            elif len(said) >= _SHORT:
                self._short[len(said)].setdefault(int(near.grams(said, len(said))[0]), at)
        self._shingles = [near.grams(said, _SHINGLE) for said in numbered]
        signatures = near.signatures(self._shingles, seed)
        self._index = near.Index(signatures, settings.similarity)
        for at, shingles in enumerate(self._shingles):
            if len(shingles):
                self._index.add(at)

    def all(self, texts: Sequence[list[str]]) -> list[int | None]:
        """For each text the place of the first that it is, or holds, or is held by, or is near to."""
        numbered = [near.numbers(said) for said in texts]
        shingles = [near.grams(said, _SHINGLE) for said in numbered]
        signatures = near.signatures(shingles, self._seed)
        return [
            self._exact.get(tuple(text), self._like(said, one, signature)) if text else None
            for text, said, one, signature in zip(texts, numbered, shingles, signatures, strict=True)
        ]

    def _like(self, said: Hashes, shingles: Hashes, signature: Signature) -> int | None:
        if (held := self._held(said)) is not None:
            return held
        near_by = (
            at
            for at in self._index.near(signature)
            if near.jaccard(self._shingles[at], shingles) >= self._settings.similarity
        )
        return next(near_by, None)

    def _held(self, said: Hashes) -> int | None:
        """The place of a text that holds this one or is held by it, as far as the settings ask."""
        for length, whole in self._short.items():
            if len(said) > length:
                found = [whole[run] for run in near.grams(said, length).tolist() if run in whole]
                if found:
                    return min(found)
        if len(said) < _LONG:
            return None
        runs = near.grams(said, _LONG).tolist()
        shared = Counter(chain.from_iterable(self._long[run] for run in runs if run in self._long))
        least = self._settings.containment
        return min(
            (at for at, count in shared.items() if count >= least * min(len(runs), self._sizes[at])), default=None
        )
