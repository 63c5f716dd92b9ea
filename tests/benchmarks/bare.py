"""The embedded model beside the bare tokenizers and onnxruntime that it runs on: one check, and 32 callers at once."""

from __future__ import annotations

import argparse
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from guardmw import Guard
from guardmw.backends.batched import Batched
from guardmw.backends.onnx import EMBEDDED, OnnxBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# 32 tokens with [CLS] and [SEP]; the two of the card's "user:" come to that, here as there.
PROMPT = (
    "Please explain to me in simple words how a bakery makes bread from flour, water, salt and yeast, "
    "and how long the dough has to rest."
)
# Of 5 to 128 tokens, as callers' texts are.
MIXED = [PROMPT[:20], PROMPT[:60], PROMPT, PROMPT * 2, PROMPT[:100], PROMPT[:40], PROMPT * 4, PROMPT[:80]]
CALLERS, EACH = 32, 8
BATCHES = (8, 16, 32)
ROUNDS_OF_A_PROFILE = 9
CORES = os.cpu_count() or 1


class Bare:
    """What whoever has the two files writes: tokens, arrays, a run, a sigmoid."""

    def __init__(self, threads: int, entry: tuple[str, str] | None = None, **given: bool) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if entry:
            options.add_session_config_entry(*entry)
        for name, value in given.items():
            setattr(options, name, value)
        self._session = ort.InferenceSession(str(EMBEDDED / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
        self._tokenizer.no_truncation()

    def one(self, text: str) -> float:
        """P(unsafe) of a text."""
        # Without offsets, which ``encode`` works out.
        return float(self._judged(self._tokenizer.encode_batch_fast([f"user: {text}"]))[0])

    def many(self, texts: Sequence[str]) -> list[float]:
        """The same of a batch, filled up to its longest."""
        self._tokenizer.enable_padding()
        found: list[float] = self._judged(self._tokenizer.encode_batch_fast([f"user: {text}" for text in texts]))
        return found

    def _judged(self, encoded: Sequence[Any]) -> Any:
        feeds = {
            "input_ids": np.array([one.ids for one in encoded], dtype=np.int64),
            "attention_mask": np.array([one.attention_mask for one in encoded], dtype=np.int64),
            "token_type_ids": np.array([one.type_ids for one in encoded], dtype=np.int64),
        }
        logits = self._session.run(None, feeds)[0][:, 0]
        return (1 / (1 + np.exp(-logits / TEMPERATURE))).tolist()


EMBEDDED_BACKEND = OnnxBackend(EMBEDDED, name="embedded")
TEMPERATURE = EMBEDDED_BACKEND.card.temperature["input"]


class Taken(NamedTuple):
    """What a piece of work took, in seconds."""

    wall: float
    work: float


def taken(step: Callable[[], object]) -> Taken:
    """Of one step, by the clock and by all processors."""
    wall, work = perf_counter(), process_time()
    step()
    return Taken(perf_counter() - wall, process_time() - work)


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Taken]]:
    """Each step once a round, the order turned about every other time, so that all see the same machine."""
    for step in steps.values():
        step()
    found: dict[str, list[Taken]] = {name: [] for name in steps}
    for at in range(rounds):
        for name in (list(steps), list(reversed(steps)))[at % 2]:
            found[name].append(taken(steps[name]))
    return found


def medians(found: Sequence[Taken]) -> Taken:
    """Of each column."""
    return Taken(median(one.wall for one in found), median(one.work for one in found))


def check(rounds: int) -> None:
    """One caller, one text."""
    guard, bare = Guard(EMBEDDED_BACKEND), Bare(threads=1)
    found = in_turns({"bare": lambda: bare.one(PROMPT), "guardmw": lambda: guard.screen(PROMPT)}, rounds)
    ratios = [one.work / other.work for one, other in zip(found["guardmw"], found["bare"], strict=True)]
    for name, each in found.items():
        print(f"{name:<40}{medians(each).work * 1e3:>8.3f} ms {medians(each).wall * 1e3:>8.3f} ms by the clock")
    work = medians(found["guardmw"]).work / medians(found["bare"]).work
    print(f"{'ratio, by processor time':<40}{work:>8.3f} x; of the pairs {median(ratios):.3f}; aim 1.05")
    profile("one caller", Guard, lambda guard: [guard.screen(PROMPT) for _ in range(50)], 50)
    print()


def options(rounds: int) -> None:
    """One text, by sessions of other options than guardmw's."""
    bares = {
        "as guardmw's": Bare(1),
        "no memory patterns": Bare(1, enable_mem_pattern=False),
        "no arena": Bare(1, enable_cpu_mem_arena=False),
        "denormals as zero": Bare(1, ("session.set_denormal_as_zero", "1")),
        "weights not packed beforehand": Bare(1, ("session.disable_prepacking", "1")),
    }
    found = in_turns({name: partial(bare.one, PROMPT) for name, bare in bares.items()}, rounds)
    for name, each in found.items():
        print(f"a session, {name:<40}{medians(each).work * 1e3:>8.3f} ms")
    print()


def static(bares: Sequence[Bare], size: int, texts: Sequence[str]) -> None:
    """All texts in batches of one size, one thread for each session; they are cut and dealt out beforehand."""
    batches = [texts[at : at + size] for at in range(0, len(texts), size)]

    def share(number: int) -> None:
        for batch in batches[number :: len(bares)]:
            bares[number].many(batch)

    with ThreadPoolExecutor(len(bares)) as pool:
        list(pool.map(share, range(len(bares))))


def tasks(guard: Guard, texts: Sequence[str]) -> None:
    """All texts asked for by so many tasks on one event loop, each of which waits for its answer."""

    async def caller(number: int) -> None:
        for text in texts[number::CALLERS]:
            await guard.ascreen(text)

    async def all_of_them() -> None:
        await asyncio.gather(*map(caller, range(CALLERS)))

    asyncio.run(all_of_them())


def threads(guard: Guard, texts: Sequence[str]) -> None:
    """The same by threads."""

    def caller(number: int) -> None:
        for text in texts[number::CALLERS]:
            guard.screen(text)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(caller, range(CALLERS)))


class Clocked:
    """Stands for an object, and adds up the processor time that one of its methods takes, on whatever thread."""

    def __init__(self, inner: Any, method: str) -> None:
        self._inner = inner
        self._method = method
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        return partial(self._timed, method) if name == self._method else method

    def _timed(self, method: Callable[..., object], *args: object, **options: object) -> object:
        began = thread_time()
        answer = method(*args, **options)
        self.seconds.append(thread_time() - began)
        return answer


def profile(what: str, guard_of: Callable[[OnnxBackend], Guard], work: Callable[[Guard], object], texts: int) -> None:
    """Where the processor time of guardmw goes, for each text."""
    # Its own threads' time would be nobody's.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = OnnxBackend(EMBEDDED, name="embedded")
    run, encode = Clocked(backend._session, "run"), Clocked(backend._windows._tokenizer, "encode_batch_fast")
    backend._session, backend._windows._tokenizer = run, encode  # type: ignore[assignment]
    guard = guard_of(backend)
    work(guard)
    rows = []
    for _ in range(ROUNDS_OF_A_PROFILE):
        run.seconds.clear()
        encode.seconds.clear()
        whole = taken(partial(work, guard)).work
        rows.append((whole, sum(run.seconds), sum(encode.seconds), len(run.seconds)))
    whole, ran, encoded, runs = (median(column) for column in zip(*rows, strict=True))
    shares = f"runs {ran / whole:.1%}, tokenising {encoded / whole:.1%}, the rest {1 - (ran + encoded) / whole:.1%}"
    print(f"{what}: {whole / texts * 1e3:.3f} ms a text in {runs:.0f} runs: {shares}")
    del os.environ["TOKENIZERS_PARALLELISM"]


def callers(kind: str, words: Sequence[str], rounds: int) -> None:
    """32 callers, beside the best of the static batches."""
    texts = [f"{words[at % len(words)]} {at % 10}" for at in range(CALLERS * EACH)]
    apart, together = [Bare(threads=1) for _ in range(CORES)], [Bare(threads=CORES)]
    guard = Guard(Batched(EMBEDDED_BACKEND, lanes=CORES))
    steps: dict[str, Callable[[], object]] = {
        "guardmw, 32 tasks": partial(tasks, guard, texts),
        "guardmw, 32 threads": partial(threads, guard, texts),
    }
    for size in BATCHES:
        steps[f"bare, {size} in a batch, {CORES} sessions"] = partial(static, apart, size, texts)
        steps[f"bare, {size} in a batch, {CORES} threads"] = partial(static, together, size, texts)
    found = in_turns(steps, rounds)
    print(f"{kind}, {len(texts)} texts")
    for name, each in found.items():
        one = medians(each)
        print(f"  {name:<40}{len(texts) / one.work:>8.0f} a second of processor {len(texts) / one.wall:>8.0f} a second")
    for column, what in ((0, "throughput"), (1, "throughput of a processor")):
        best = min(medians(each)[column] for name, each in found.items() if name.startswith("bare"))
        told = (f"{name.split()[-1]} {best / medians(found[name])[column]:.2f} x" for name in list(steps)[:2])
        print(f"  {what}, against the best static batch: {', '.join(told)}; aim 0.80")
    profile(
        f"  {CALLERS} tasks", lambda inner: Guard(Batched(inner, lanes=CORES)), partial(tasks, texts=texts), len(texts)
    )
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400, metavar="N", help="of one check; of callers a 40th of it")
    rounds = parser.parse_args().rounds
    print(f"{CORES} cores, load {os.getloadavg()[0]:.1f}; medians; processor time is what neighbours change least\n")
    assert abs(Bare(1).one(PROMPT) - Guard(EMBEDDED_BACKEND).screen(PROMPT).scores.unsafe) < 1e-6  # type: ignore[union-attr]
    check(rounds)
    options(rounds // 4)
    callers("32 tokens", [PROMPT], rounds // 40)
    callers("5 to 128 tokens", MIXED, rounds // 40)
