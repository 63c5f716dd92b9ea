"""Which texts say nearly the same: found by MinHash (Broder 1997), and then counted, so that no estimate decides."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Sequence

Hashes = NDArray[np.uint64]
Signature = NDArray[np.uint32]
# Of two sets. Far below, the search would compare each with each.
Similarity = Annotated[float, Field(ge=0.4, le=1)]

PERMUTATIONS = 128
# Estimates from that many are off by 0.04 (one sigma); what may be near is counted.
MARGIN = 0.15
# The share of near texts, at the limit, that the search may overlook.
OVERLOOKED = 1e-3

# Scripts that set no spaces have no words to find: each sign is one.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[^\w\s]")
_STEP = np.uint64(0x9E3779B97F4A7C15)


def words(text: str, *, signs: bool = False) -> list[str]:
    """The words of a text without case and form, and with ``signs`` the punctuation too."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return (_WORD_OR_SIGN if signs else _WORD).findall(plain)


def numbers(said: Sequence[str]) -> Hashes:
    """A number for each word, in order: the same for the same word, on any machine."""
    return np.fromiter(map(_number, said), dtype=np.uint64, count=len(said))


def grams(numbers: Hashes, length: int) -> Hashes:
    """A number for each distinct run of so many words, in order of size; for fewer words, one for them all."""
    if not len(numbers):
        return numbers
    length = min(length, len(numbers))
    runs = np.zeros(len(numbers) - length + 1, dtype=np.uint64)
    for at in range(length):
        runs = (runs ^ numbers[at : at + len(runs)]) * _STEP
        runs ^= runs >> np.uint64(29)
    return np.unique(runs)


def jaccard(one: Hashes, other: Hashes) -> float:
    """What two sets have in common, of what either has; 1 for two empty ones."""
    if not len(one) or not len(other):
        return float(len(one) == len(other))
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def signatures(sets: Sequence[Hashes], seed: int) -> Signature:
    """MinHash signatures, one row for each set; two rows agree in as many places as their sets do in elements."""
    made = np.full((len(sets), PERMUTATIONS), 2**32 - 1, dtype=np.uint32)
    filled = [at for at, one in enumerate(sets) if len(one)]
    if not filled:
        return made
    flat = np.concatenate([sets[at] for at in filled])
    starts = np.cumsum([0, *(len(sets[at]) for at in filled[:-1])])
    for column in range(PERMUTATIONS):
        # Dietzfelbinger's multiply-shift. numpy's own generators may draw otherwise in another version.
        factor, offset = np.frombuffer(hashlib.blake2b(f"{seed}/{column}".encode(), digest_size=16).digest(), "<u8")
        mixed = (flat * (factor | np.uint64(1)) + offset) >> np.uint64(32)
        made[filled, column] = np.minimum.reduceat(mixed, starts).astype(np.uint32)
    return made


class Index:
    """Finds, among the signatures that were added, those that may belong to similar sets."""

    def __init__(self, signatures: Signature, similarity: float) -> None:
        self._signatures = signatures
        self._least = similarity - MARGIN
        self._rows = _rows_per_band(similarity)
        self._bands: list[defaultdict[bytes, list[int]]] = [
            defaultdict(list) for _ in range(PERMUTATIONS // self._rows)
        ]

    def add(self, at: int) -> None:
        """Let the set at this place be found."""
        for band, key in zip(self._bands, self._keys(self._signatures[at]), strict=True):
            band[key].append(at)

    def near(self, signature: Signature) -> list[int]:
        """The places, in order, of sets that may be similar to the one of this signature."""
        found = {at for band, key in zip(self._bands, self._keys(signature), strict=True) for at in band.get(key, ())}
        if not found:
            return []
        places = np.sort(np.fromiter(found, dtype=np.int64, count=len(found)))
        agreed = (self._signatures[places] == signature).mean(axis=1)
        return [int(at) for at in places[agreed >= self._least]]

    def _keys(self, signature: Signature) -> list[bytes]:
        return [signature[at * self._rows : (at + 1) * self._rows].tobytes() for at in range(len(self._bands))]


def _rows_per_band(similarity: float) -> int:
    """As many as overlook no more than OVERLOOKED of what is just that similar: the fewest comparisons."""
    wide = (rows for rows in range(PERMUTATIONS, 1, -1) if _missed(similarity, rows) <= OVERLOOKED)
    return next(wide, 1)


def _missed(similarity: float, rows: int) -> float:
    return float((1 - similarity**rows) ** (PERMUTATIONS // rows))


@lru_cache(maxsize=2**18)
def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
