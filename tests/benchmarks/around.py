"""What backends around backends cost and bring: a cascade, a memory, and batches of concurrent callers."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import TYPE_CHECKING

from guardmw import Backend, Cascade, Conversation, Scores, load
from guardmw.backends.batched import Batched
from guardmw.backends.onnx import OnnxBackend
from guardmw.backends.remembered import Remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT = (
    "Please explain to me in simple words how a bakery makes bread from flour, water, salt and yeast, "
    "and how long the dough has to rest."
)
CALLERS, EACH, ROUNDS = 32, 24, 5
BATCHES = (1, 2, 4, 8, 16, 32)


class Instant:
    """Answers at once."""

    def __init__(self, unsafe: float, name: str) -> None:
        self.name = name
        self._scores = Scores(unsafe, backend=name)

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """One score, made beforehand, for each."""
        return [self._scores] * len(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same."""
        return [self._scores] * len(conversations)


def show(what: str, figure: str, aim: str) -> None:
    """One line of the table."""
    print(f"{what:<62}{figure:>18}{aim:>16}", flush=True)


def p50(call: Callable[[], object], times: int = 20_000) -> float:
    """Median seconds after a warm-up."""
    taken = []
    for _ in range(times):
        started = perf_counter()
        call()
        taken.append(perf_counter() - started)
    return median(taken[times // 10 :])


async def ap50(backend: Backend, one: list[Conversation], times: int = 20_000) -> float:
    """``p50`` on an event loop."""
    taken = []
    for _ in range(times):
        started = perf_counter()
        await backend.aclassify(one)
        taken.append(perf_counter() - started)
    return median(taken[times // 10 :])


def overheads() -> None:
    """What is added to backends that answer at once."""
    one = [Conversation.of(PROMPT)]
    sure, doubtful, careful = Instant(0.01, "sure"), Instant(0.5, "doubtful"), Instant(0.9, "careful")
    bare = p50(lambda: sure.classify(one))
    for what, first, calls in (("first tier is sure", sure, 1), ("second tier is asked", doubtful, 2)):
        cascade = Cascade(first, careful)
        show(f"a cascade, {what}", f"{(p50(lambda c=cascade: c.classify(one)) - calls * bare) * 1e6:.1f} µs", "20 µs")  # type: ignore[misc]
        show("the same, async", f"{(asyncio.run(ap50(cascade, one)) - calls * bare) * 1e6:.1f} µs", "20 µs")
    memory = Remembered(sure)
    show("a hit of a memory", f"{p50(lambda: memory.classify(one)) * 1e6:.1f} µs", "10 µs")
    show("the same, async", f"{asyncio.run(ap50(memory, one)) * 1e6:.1f} µs", "10 µs")
    batched = Batched(sure)
    show("a batch of one, nobody else there", f"{(p50(lambda: batched.classify(one)) - bare) * 1e6:.1f} µs", "")


def texts(caller: int, words: str) -> list[Conversation]:
    """As many as a caller asks, no two alike."""
    return [Conversation.of(f"{words} {caller} {at}") for at in range(EACH)]


def threads(backend: Backend, words: str) -> list[float]:
    """Seconds of each call, all callers being threads; before them the seconds and processor seconds of the whole."""

    def caller(number: int) -> list[float]:
        taken = []
        for one in texts(number, words):
            started = perf_counter()
            backend.classify([one])
            taken.append(perf_counter() - started)
        return taken

    started, worked = perf_counter(), process_time()
    with ThreadPoolExecutor(CALLERS) as pool:
        taken = [seconds for each in pool.map(caller, range(CALLERS)) for seconds in each]
    return [perf_counter() - started, process_time() - worked, *taken]


def tasks(backend: Backend, words: str) -> list[float]:
    """Seconds of each call, all callers being tasks; before them the seconds and processor seconds of the whole."""

    async def caller(number: int) -> list[float]:
        taken = []
        for one in texts(number, words):
            started = perf_counter()
            await backend.aclassify([one])
            taken.append(perf_counter() - started)
        return taken

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*map(caller, range(CALLERS)))

    started, worked = perf_counter(), process_time()
    taken = [seconds for each in asyncio.run(all_of_them()) for seconds in each]
    return [perf_counter() - started, process_time() - worked, *taken]


DRIVES = (("threads", threads), ("tasks", tasks))
WORDS = ((10, "How do I bake bread?"), (34, PROMPT))
LONG = (128, " ".join([PROMPT] * 4))


def concurrent() -> None:
    """The embedded model, asked by many at once."""
    bare = load("embedded")
    cores = os.cpu_count() or 1
    bare.classify(texts(0, PROMPT))
    kinds = [(f"{CALLERS} {who}, {size} tokens", drive, words) for size, words in WORDS for who, drive in DRIVES]
    for what, drive, words in kinds:
        seen: dict[str, list[list[float]]] = {"bare": [], "batched": []}
        # In turns, so that both meet the same neighbours on this machine.
        for _ in range(ROUNDS):
            seen["bare"].append(drive(bare, words))
            seen["batched"].append(drive(Batched(bare, lanes=cores), words))
        whole, work, slow = (
            {name: [figure(one) for one in rounds] for name, rounds in seen.items()}
            for figure in (lambda r: r[0], lambda r: r[1], lambda r: sorted(r[2:])[int(0.95 * len(r[2:]))])
        )
        rates = [CALLERS * EACH / median(whole[name]) for name in ("bare", "batched")]
        show(f"{what}, texts a second", f"{rates[0]:.0f} → {rates[1]:.0f}", "")
        show("the same, against unbatched", f"{_gain(whole):.2f} x", "at least 2 x")
        show("the same, by processor time, which neighbours do not change", f"{_gain(work):.2f} x", "")
        show(
            "95 of 100 are faster",
            f"{median(slow['bare']) * 1e3:.0f} → {median(slow['batched']) * 1e3:.0f} ms",
            "no worse",
        )


def ceilings() -> None:
    """What batches bring of themselves, by the time of one processor: more than that no caller can be given."""
    backend = load("embedded")
    assert isinstance(backend, OnnxBackend)
    for size, words in (*WORDS, LONG):
        (one, _), *_ = backend._windows.cut(texts(0, words))
        taken: dict[int, list[tuple[float, float]]] = {}
        for at in range(ROUNDS * 5):
            for count in BATCHES:
                started = thread_time()
                backend._run(one * count)
                alone = thread_time() - started
                asked = [Conversation.of(f"{words} {at} {other}") for other in range(count)]
                started = thread_time()
                backend.classify(asked)
                taken.setdefault(count, []).append((alone / count, (thread_time() - started) / count))
        for count, seconds in taken.items():
            for what, which in (("one run of the graph", 0), ("one call", 1)):
                each, single = (median(pair[which] for pair in pairs) for pairs in (seconds, taken[1]))
                label = f"{what}, {count} texts of {size} tokens: ms a text, gain"
                show(label, f"{each * 1e3:.2f}, {single / each:.2f} x", "")


def _gain(seconds: dict[str, list[float]]) -> float:
    """How many times as fast, by the median of the rounds."""
    return median(bare / batched for bare, batched in zip(seconds["bare"], seconds["batched"], strict=True))


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians; trust ratios where others work too\n")
    show("", "measured", "aim: at most")
    overheads()
    ceilings()
    concurrent()
