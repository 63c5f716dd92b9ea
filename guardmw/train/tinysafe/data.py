"""Labelled rows become training examples: split without leaks, weighted, tokenised by the code that serves."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardmw.conversation import Conversation
from guardmw.errors import DataError
from guardmw.evaluate.rows import Row, read
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from guardmw.backends._windows import Window, Windows
    from guardmw.conversation import Stage
    from guardmw.train.tinysafe.recipe import Recipe


_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Example:
    """A row, tokenised.

    Attributes:
        windows: of the text with its context, all of them.
        bare: of the text alone, where it has context; empty otherwise.
        categories: 1.0 or 0.0 by CATEGORIES; None where unknown.
    """

    windows: tuple[Window, ...]
    bare: tuple[Window, ...]
    stage: Stage
    source: str
    unsafe: bool
    injection: bool
    categories: tuple[float, ...] | None
    weight: float

    def window(self, draw: random.Random, context_dropout: float) -> Window:
        """The window to show this time."""
        windows = self.bare if self.bare and draw.random() < context_dropout else self.windows
        # What makes a text unsafe mostly shows at its start; further on it may not show at all.
        if len(windows) == 1 or (self.unsafe and draw.random() < 0.5):  # noqa: PLR2004 - half of the time
            return windows[0]
        return draw.choice(windows)


def load(paths: Iterable[Path], recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Read rows, drop repeated texts, and hold some out: (training, held out).

    Which side a row falls on follows from its content alone, so that a run on more data never trains on what an earlier
    one was measured on. A held-out row that shares its prompt with a training row, or was made from one, is dropped: it
    would measure memory.

    Raises:
        DataError: a file or line is not valid, or a side lacks safe or unsafe rows.
    """
    unique = {_key(row): row for path in paths for row in read(path)}
    training: list[Row] = []
    candidates: list[Row] = []
    for key, row in unique.items():
        (candidates if int(key[:8], 16) < recipe.held_out * 2**32 else training).append(row)
    known = {trait for row in training for trait in _traits(row)}
    held_out = [row for row in candidates if known.isdisjoint(_traits(row))]
    for side, name in ((training, "training"), (held_out, "held-out")):
        labels = Counter(row.unsafe for row in side)
        if len(labels) < 2:  # noqa: PLR2004 - safe and unsafe
            raise DataError(
                f"the {name} rows hold {labels[True]} unsafe and {labels[False]} safe ones; training needs both"
            )
    return training, held_out


def digest(rows: Sequence[Row]) -> str:
    """A name for these rows, whatever their order."""
    return hashlib.sha256("".join(sorted(map(_key, rows))).encode()).hexdigest()[:16]


def _traits(row: Row) -> set[str]:
    """What rows that belong together have in common: the row behind them, and the words the user said."""
    said = next((turn.text for turn in row.conversation.context if turn.role == "user"), row.conversation.trial)
    return {" ".join(_WORD.findall(said.lower())), *filter(None, (row.id, row.origin))}


def encode(rows: Sequence[Row], windows: Windows, recipe: Recipe) -> list[Example]:
    """Tokenise rows with the windows that serving uses."""
    cut = windows.cut([row.conversation for row in rows])
    alone = {i: Conversation((row.conversation.last,)) for i, row in enumerate(rows) if row.conversation.context}
    bare = dict(zip(alone, windows.cut(list(alone.values())), strict=True))
    return [
        Example(
            windows=tuple(cut[i][0]),
            bare=tuple(bare[i][0]) if i in bare else (),
            stage=row.conversation.stage,
            source=row.source,
            unsafe=row.unsafe,
            injection=bool(row.attack),
            categories=None if row.categories is None else tuple(float(c in row.categories) for c in CATEGORIES),
            weight=recipe.source_weights.get(row.source, 1.0),
        )
        for i, row in enumerate(rows)
    ]


Batch = list[tuple[Example, "Window"]]


def batches(examples: Sequence[Example], recipe: Recipe, epoch: int) -> Iterator[Batch]:
    """One epoch of batches of like length, in an order that follows from seed and epoch."""
    draw = random.Random(f"{recipe.seed}/{epoch}")  # noqa: S311 - an order, not a secret
    shown = [(example, example.window(draw, recipe.context_dropout)) for example in examples]
    draw.shuffle(shown)
    grouped: list[Batch] = []
    # Sorting all rows would show the short ones of a source together; sorting a shuffled stretch does not.
    for start in range(0, len(shown), 8192):
        stretch = sorted(shown[start : start + 8192], key=lambda pair: len(pair[1].ids))
        batch: Batch = []
        for pair in stretch:
            if batch and (len(batch) + 1) * len(pair[1].ids) > recipe.batch_tokens:
                grouped.append(batch)
                batch = []
            batch.append(pair)
        grouped.append(batch)
    draw.shuffle(grouped)
    yield from grouped


def _key(row: Row) -> str:
    text = " ".join(row.conversation.trial.lower().split())
    context = " ".join(turn.text for turn in row.conversation.context)
    return hashlib.sha256(f"{text}\0{row.conversation.stage}\0{context}".encode("utf-8", "replace")).hexdigest()
