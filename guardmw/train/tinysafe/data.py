"""Labelled rows become training examples: weighted, and tokenised by the code that serves."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guardmw.backends._windows import Window
from guardmw.conversation import Conversation
from guardmw.evaluate.rows import key
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from guardmw.backends._windows import Windows
    from guardmw.conversation import Stage
    from guardmw.evaluate.rows import Row
    from guardmw.train.tinysafe.recipe import Training


@dataclass(frozen=True, slots=True)
class Example:
    """A row, tokenised.

    Attributes:
        windows: of the text with its context, all of them.
        bare: of the text alone, where it has context; empty otherwise.
        categories: 1.0 or 0.0 by CATEGORIES; None where unknown.
        taught: the teachers' logits: unsafe, injection, then by CATEGORIES; empty without teachers.
        telling: which of the windows shows what makes it unsafe; None where nobody has looked.
    """

    key: str
    windows: tuple[Window, ...]
    bare: tuple[Window, ...]
    stage: Stage
    source: str
    unsafe: bool
    injection: bool
    categories: tuple[float, ...] | None
    taught: tuple[float, ...] = ()
    telling: int | None = None

    def window(self, draw: random.Random, training: Training) -> Window:
        """The window to show this time."""
        if self.telling is not None:
            return self.read(training.short_tokens if draw.random() >= training.long_share else None)
        windows = self.bare if self.bare and draw.random() < training.context_dropout else self.windows
        # What makes a text unsafe mostly shows at its start; further on it may not show at all.
        first = len(windows) == 1 or (self.unsafe and draw.random() < 0.5)  # noqa: PLR2004 - half of the time
        window = windows[0] if first else draw.choice(windows)
        return self._cut(window, training.short_tokens if draw.random() >= training.long_share else None)

    def read(self, tokens: int | None) -> Window:
        """The window that tells most, or the first, cut to so many tokens."""
        return self._cut(self.windows[self.telling or 0], tokens)

    def _cut(self, window: Window, tokens: int | None) -> Window:
        # An instruction may be planted at the end of a record; without it, the label is wrong.
        planted = self.stage in ("tool_result", "document")
        return window if planted or tokens is None else shortened(window, tokens)


def shortened(window: Window, tokens: int) -> Window:
    """The window with its text on trial cut at the end, its context whole."""
    judged = window.segments.count(0)
    kept = judged - max(0, len(window.ids) - tokens)
    if kept == judged or kept < tokens // 4:
        return window
    return Window(window.ids[: kept - 1] + window.ids[judged - 1 :], [0] * kept + [1] * (len(window.ids) - judged))


def traced(examples: Iterable[Example]) -> str:
    """A name for all that a training sees of examples but their words, of which each has its key; in their order."""
    seen = ((e.key, e.stage, e.source, e.unsafe, e.injection, e.categories) for e in examples)
    return hashlib.sha256("\n".join(map(repr, seen)).encode("utf-8", "replace")).hexdigest()[:16]


def encode(rows: Sequence[Row], windows: Windows) -> list[Example]:
    """Tokenise rows with the windows that serving uses."""
    cut = windows.cut([row.conversation for row in rows])
    alone = {i: Conversation((row.conversation.last,)) for i, row in enumerate(rows) if row.conversation.context}
    bare = dict(zip(alone, windows.cut(list(alone.values())), strict=True))
    return [
        Example(
            key=key(row),
            windows=tuple(cut[i][0]),
            bare=tuple(bare[i][0]) if i in bare else (),
            stage=row.conversation.stage,
            source=row.source,
            unsafe=row.unsafe,
            injection=bool(row.attack),
            categories=None if row.categories is None else tuple(float(c in row.categories) for c in CATEGORIES),
        )
        for i, row in enumerate(rows)
    ]


def teach(examples: Iterable[Example], logits: Mapping[str, tuple[float, ...]]) -> list[Example]:
    """The examples with their teachers' logits, by key."""
    return [replace(example, taught=logits[example.key]) for example in examples]


Batch = list[tuple[Example, Window]]


def batches(examples: Sequence[Example], training: Training, epoch: int, seed: int) -> Iterator[Batch]:
    """One epoch of batches of like length, in an order that follows from seed and epoch."""
    draw = random.Random(f"{seed}/{epoch}")  # noqa: S311 - an order, not a secret
    shares = training.source_shares
    shown = [
        (example, example.window(draw, training))
        for example in examples
        for _ in range(_times(shares.get(example.source, shares.get("*", 1.0)), draw))
    ]
    draw.shuffle(shown)
    grouped: list[Batch] = []
    # Sorting all rows would show the short ones of a source together; sorting a shuffled stretch does not.
    for start in range(0, len(shown), 8192):
        stretch = sorted(shown[start : start + 8192], key=lambda pair: len(pair[1].ids))
        batch: Batch = []
        for pair in stretch:
            if batch and _full(batch, pair, training):
                grouped.append(batch)
                batch = []
            batch.append(pair)
        grouped.append(batch)
    draw.shuffle(grouped)
    yield from grouped


def _full(batch: Batch, pair: tuple[Example, Window], training: Training) -> bool:
    """Whether one more, the longest so far, is too much."""
    if training.batch_rows:
        return len(batch) == training.batch_rows
    return (len(batch) + 1) * len(pair[1].ids) > training.batch_tokens


def _times(share: float, draw: random.Random) -> int:
    whole = int(share)
    return whole + (draw.random() < share - whole)
