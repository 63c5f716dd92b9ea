"""How cost grows: one curve for each thing that can grow, and the power of it that the cost goes by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from guardmw.backends.remembered import Remembered
from guardmw.conversation import Conversation, ToolCall, Turn
from guardmw.guard import Guard
from guardmw.policy import Policy
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from guardmw.evaluate.bench.prompts import Prompts
    from guardmw.evaluate.bench.times import Clock

# Of one size. The quickest counts: what else the machine does can only make the others longer.
_CALLS = 25
# A power needs a line through this many sizes.
_LEAST = 3
# Characters of a turn, of a streamed answer, and of what a provider sends at a time.
_TURN, _ANSWER, _DELTA = 120, 2_000, 4


class Growth(NamedTuple):
    """Something that can grow.

    Attributes:
        unit: what its sizes count.
        sizes: from small to large.
        steps: what to do at a size, each time with other text.
        model: whether the backend under test takes part; else one that answers at once does, and the cost is all of
            guardmw's own.
    """

    name: str
    unit: str
    sizes: Sequence[int]
    steps: Callable[[int], Iterator[Callable[[], object]]]
    model: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """What was measured of a growth.

    Attributes:
        sizes: those there was time for.
        ms: of the quickest call at each size.
        exponent: of the line through all sizes on logarithmic axes: 1 is linear, 2 quadratic; below 1 where a fixed
            cost weighs in. None for fewer than three sizes.
        last: the same through the three largest, where a fixed cost weighs least.
    """

    name: str
    unit: str
    model: bool
    sizes: list[int]
    ms: list[float]
    exponent: float | None
    last: float | None


def growths(guard: Guard, prompts: Prompts, length: int) -> list[Growth]:
    """All that is measured; ``length`` is that of the texts of a batch."""
    instant = Guard(KeywordBackend({}, name="instant"))

    def text(size: int) -> Iterator[Callable[[], object]]:
        return (_screen(guard, given) for given in prompts.characters(size))

    def conversation(size: int) -> Iterator[Callable[[], object]]:
        turns = [Turn(("user", "assistant")[at % 2], given) for at, given in enumerate(_some(prompts, size))]
        return (_screen(guard, Conversation((*turns[1:], Turn("user", given)))) for given in prompts.characters(_TURN))

    def batch(size: int) -> Iterator[Callable[[], object]]:
        texts = prompts.of(length)
        while True:
            yield _screen_many(guard, list(islice(texts, size)))

    def stream(size: int) -> Iterator[Callable[[], object]]:
        return (_streams(instant, [given]) for given in prompts.characters(size))

    def streams(size: int) -> Iterator[Callable[[], object]]:
        texts = prompts.characters(_ANSWER)
        while True:
            yield _streams(instant, list(islice(texts, size)))

    return [
        Growth("text", "characters", (250, 1_000, 4_000, 16_000, 64_000), text, model=True),
        Growth("conversation", "turns", (1, 4, 16, 64, 256), conversation, model=True),
        Growth("batch", "conversations", (1, 4, 16, 64), batch, model=True),
        Growth("tool rules", "rules", (1, 10, 100, 1_000), partial(_ruled, prompts), model=False),
        Growth("memory", "conversations", (10, 100, 1_000, 10_000), partial(_remembering, prompts), model=False),
        Growth("stream", "characters", (1_000, 4_000, 16_000, 64_000), stream, model=False),
        Growth("streams at once", "streams", (1, 4, 16, 64), streams, model=False),
    ]


def _ruled(prompts: Prompts, size: int) -> Iterator[Callable[[], object]]:
    arguments = {f"tool_{at}": {"path": {"paths": ["/srv"], "max_length": 200}} for at in range(size)}
    ruled = Guard(KeywordBackend({}), policy=Policy.model_validate({"tools": {"arguments": arguments}}))
    for given in prompts.characters(_TURN):
        call = ToolCall("tool_0", {"path": "/srv/a", "text": given})
        yield _screen(ruled, Conversation((Turn("assistant", tool_calls=(call,)),)))


def _remembering(prompts: Prompts, size: int) -> Iterator[Callable[[], object]]:
    memory = Remembered(KeywordBackend({}), size=size)
    known = [Conversation.of(f"{at} is known") for at in range(size)]
    memory.classify(known)
    guard = Guard(memory)
    known_last = known[-1].trial
    for new in prompts.characters(_TURN):
        # The one learned last is found, however few are held; the other is learned in place of the one held longest.
        yield _screen_many(guard, [known_last, new])
        known_last = new


def measured(growth: Growth, seconds: float, clock: Clock) -> Curve:
    """Take a growth as far as time allows; no size is begun that would not end in time, going by the one before."""
    sizes: list[int] = []
    taken: list[float] = []
    end = clock.now() + seconds
    for left, size in zip(range(len(growth.sizes), 0, -1), growth.sizes, strict=True):
        now = clock.now()
        # Twice: the first time is not counted.
        if sizes and (now >= end or now + 2 * taken[-1] * size / sizes[-1] > end):
            break
        until = now + (end - now) / left
        sizes.append(size)
        taken.append(min(_times(growth.steps(size), until, clock)))
    return Curve(
        name=growth.name,
        unit=growth.unit,
        model=growth.model,
        sizes=sizes,
        ms=[one * 1000 for one in taken],
        exponent=exponent(sizes, taken),
        last=exponent(sizes[-_LEAST:], taken[-_LEAST:]),
    )


def exponent(sizes: Sequence[float], taken: Sequence[float]) -> float | None:
    """The power of the size that the time goes by: the slope of the line through both on logarithmic axes."""
    if len(sizes) < _LEAST or min(taken) <= 0:
        return None
    slope, _ = np.polyfit(np.log(sizes), np.log(taken), 1)
    return float(slope)


def _times(steps: Iterator[Callable[[], object]], until: float, clock: Clock) -> list[float]:
    """Seconds of each step until then; one at least, and the first, which warms up, does not count."""
    next(steps)()
    times = []
    for step in islice(steps, _CALLS):
        began = clock.now()
        step()
        times.append(clock.now() - began)
        if clock.now() >= until:
            break
    return times


def _some(prompts: Prompts, count: int) -> Iterable[str]:
    return islice(prompts.characters(_TURN), count)


def _screen(guard: Guard, given: str | Conversation) -> Callable[[], object]:
    return lambda: guard.screen(given)


def _screen_many(guard: Guard, given: list[str]) -> Callable[[], object]:
    return lambda: guard.screen_many(given)


def _streams(guard: Guard, texts: Sequence[str]) -> Callable[[], object]:
    """Streams that come in turns, each held back and judged as an adapter does it."""

    def run() -> None:
        holds: list[Hold[str, str]] = [Hold() for _ in texts]
        for at in range(0, max(map(len, texts)), _DELTA):
            for hold, text in zip(holds, texts, strict=True):
                _fed(guard, hold, text[at : at + _DELTA])
        for hold in holds:
            hold.end()
            _judge(guard, hold)

    return run


def _fed(guard: Guard, hold: Hold[str, str], delta: str) -> None:
    hold.feed(delta, {"text": delta})
    _judge(guard, hold)


def _judge(guard: Guard, hold: Hold[str, str]) -> None:
    if pieces := hold.due():
        verdicts = guard.screen_many(Conversation((Turn("assistant", piece.text),)) for piece in pieces)
        hold.take([not verdict.blocked for verdict in verdicts])
    for _ in hold.released():
        pass
