"""What a guard costs: medians, and ratios to the bare model, of the embedded model and of guardmw alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from guardmw import Conversation, Guard, Scores
from guardmw.backends.onnx import EMBEDDED, OnnxBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# 32 tokens with [CLS] and [SEP], by the vocabulary of BERT.
PROMPT = (
    "Please explain to me in simple words how a bakery makes bread from flour, water, salt and yeast, "
    "and how long the dough has to rest."
)
SENTENCE = (
    "The baker mixes flour with water and salt, lets the dough rest for an hour, and bakes it until it is brown. "
)

IMPORT = "import time; t = time.perf_counter(); import guardmw; print(time.perf_counter() - t)"
COLD = """
import time; t = time.perf_counter()
from guardmw import Guard
guard = Guard("embedded"); loaded = time.perf_counter() - t
guard.screen("How do I bake bread?")
import re
# Not ru_maxrss, which starts at what the parent process used.
print(loaded, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


class Instant:
    """Answers at once."""

    name = "instant"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """One score, made beforehand, for each."""
        return [SAFE] * len(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same."""
        return [SAFE] * len(conversations)


SAFE = Scores(0.01, backend="instant")


class Clocked:
    """Stands for an object, and adds up the time its methods take."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def timed(*args: object, **options: object) -> object:
            started = perf_counter()
            answer = method(*args, **options)
            self.seconds += perf_counter() - started
            return answer

        return timed


def seconds(call: Callable[[], object], times: int) -> list[float]:
    """Wall times of a call."""
    taken = []
    for _ in range(times):
        started = perf_counter()
        call()
        taken.append(perf_counter() - started)
    return taken


def p50(call: Callable[[], object], times: int) -> float:
    """The median after a warm-up."""
    seconds(call, max(times // 10, 1))
    return median(seconds(call, times))


def fresh(code: str, times: int = 7) -> list[list[float]]:
    """What fresh interpreters print, as columns of numbers."""
    command = [sys.executable, "-c", code]
    # As where bytecode is kept, which is almost everywhere.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    answers = [subprocess.run(command, capture_output=True, text=True, check=True, env=env) for _ in range(times)]
    rows = [answer.stdout.split() for answer in answers]
    return [[float(row[column]) for row in rows] for column in range(len(rows[0]))]


def show(what: str, figure: str, aim: str) -> None:
    """One line of the table."""
    print(f"{what:<58}{figure:>14}{aim:>18}", flush=True)


async def p50_async(guard: Guard, times: int) -> float:
    """The median of an async check, all on one event loop."""
    taken = []
    for _ in range(times):
        started = perf_counter()
        await guard.ascreen(PROMPT)
        taken.append(perf_counter() - started)
    return median(taken)


def without_model() -> None:
    """What guardmw costs by itself."""
    guard = Guard(Instant())
    show("a check, backend answers at once", f"{p50(lambda: guard.screen(PROMPT), 20_000) * 1e6:.1f} µs", "15 µs")
    show("the same, async", f"{asyncio.run(p50_async(guard, 20_000)) * 1e6:.1f} µs", "25 µs")
    batch = [PROMPT] * 64
    each = p50(lambda: guard.screen_many(batch), 300) / len(batch)
    show("the same, each of a batch of 64", f"{each * 1e6:.1f} µs", "")
    ours, pydantic = (median(fresh(IMPORT.replace("guardmw", name))[0]) for name in ("guardmw", "pydantic.main"))
    show("import guardmw, fresh interpreter", f"{ours:.3f} s", "0.15 s")
    show("the same, against importing pydantic", f"{ours / pydantic:.2f} x", "")


def with_model() -> None:
    """What a check costs with the embedded model, and how much of that is the model."""
    guard = Guard("embedded")
    total = seconds(lambda: guard.screen(PROMPT), 550)[50:]
    show("a check of 32 tokens, embedded model, one thread", f"{median(total) * 1e3:.2f} ms", "2.5 ms")
    show("the same, 95 of 100 are faster", f"{sorted(total)[int(len(total) * 0.95)] * 1e3:.2f} ms", "")
    show("of which guardmw, not tokenising nor ONNX", f"{median(own(600)) * 1e6:.0f} µs", "60 µs")
    # A run of the model leaves little of guardmw in the processor's caches; this is the same work with warm ones.
    show("the same, the model's answer given at once", f"{median(own(6000, instant=True)) * 1e6:.0f} µs", "")
    whole, bare = long_text(100_000)
    show("100,000 characters", f"{whole:.2f} s", "")
    show("the same, against the bare ONNX time of its windows", f"{whole / bare:.2f} x", "1.6 x")
    show("100,000 characters against 50,000", f"{whole / long_text(50_000)[0]:.2f} x", "2 x")
    loaded, resident = fresh(COLD)
    show("cold load of the embedded model, fresh interpreter", f"{median(loaded):.2f} s", "0.6 s")
    show("resident memory at its highest, after a check", f"{median(resident):.0f} MB", "250 MB")


def clocked() -> tuple[Guard, Clocked, Clocked]:
    """A guard whose tokenizer and session are clocked."""
    backend = OnnxBackend(EMBEDDED, name="embedded")
    session, tokenizer = Clocked(backend._session), Clocked(backend._windows._tokenizer)
    backend._session = session  # type: ignore[assignment]
    backend._windows._tokenizer = tokenizer  # type: ignore[assignment]
    return Guard(backend), session, tokenizer


class Given:
    """A session that has its answer ready."""

    def __init__(self, answer: list[Any]) -> None:
        self._answer = answer

    def run(self, *_: object) -> list[Any]:
        """The answer."""
        return self._answer


def own(times: int, *, instant: bool = False) -> list[float]:
    """Seconds of a check that neither the tokenizer nor the session took."""
    guard, session, tokenizer = clocked()
    if instant:
        backend = guard.backend
        assert isinstance(backend, OnnxBackend)
        shapes = [(1, 1), (1, len(backend.card.labels)), (1, 1)]
        session = Clocked(Given([np.full(shape, -3.0, dtype=np.float32) for shape in shapes]))
        backend._session = session  # type: ignore[assignment]
    taken = []
    for _ in range(times):
        session.seconds = tokenizer.seconds = 0.0
        started = perf_counter()
        guard.screen(PROMPT)
        taken.append(perf_counter() - started - session.seconds - tokenizer.seconds)
    return taken[times // 10 :]


def long_text(characters: int) -> tuple[float, float]:
    """Seconds for a text of this length, and those of its ONNX runs alone, each window by itself: medians of three."""
    guard, session, _ = clocked()
    text = (SENTENCE * (characters // len(SENTENCE) + 1))[:characters]
    whole = []
    for _ in range(3):
        started = perf_counter()
        guard.screen(text)
        whole.append(perf_counter() - started)
    backend = guard.backend
    assert isinstance(backend, OnnxBackend)
    ((windows, _),) = backend._windows.cut([Conversation.of(text)])
    bare = []
    for _ in range(3):
        session.seconds = 0.0
        for window in windows:
            backend._run([window])
        bare.append(session.seconds)
    return median(whole), median(bare)


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians; trust ratios where others work too\n")
    show("", "measured", "aim: at most")
    without_model()
    with_model()
