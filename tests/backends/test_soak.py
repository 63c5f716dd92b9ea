"""Two hours of faults, on a clock that does not wait: nobody is left without a verdict, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import selectors
import threading
from typing import TYPE_CHECKING, Any

from guardmw import BackendError, BackendUnavailable, Cascade, Conversation, Guard, Policy, Scores, Verdict
from guardmw.backends import remembered, resilient
from guardmw.backends.batched import Batched
from guardmw.backends.remembered import Remembered
from guardmw.backends.resilient import Resilient
from guardmw.backends.windowed import Windowed
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

HOURS = 2
# What the server does, for a minute each, in an order of its own; "up" comes again and again.
FAULTS = ["refused", "hangs", "slow", "nonsense", "short", "number", "broken", "flaps", "poisoned"]


class Server(KeywordBackend):
    """A careful model that is up every other minute."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__({"EVIL": 0.99}, name="server")
        self._now = now
        self._draw = random.Random(0)  # noqa: S311 - faults, not secrets
        self.seen: set[str] = set()

    def _fault(self) -> str:
        minute = int(self._now() // 60)
        fault = FAULTS[minute // 2 % len(FAULTS)] if minute % 2 else "up"
        self.seen.add(fault)
        return self._draw.choice(["refused", "up"]) if fault == "flaps" else fault

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """As the minute has it."""
        fault = self._fault()
        if fault == "refused":
            raise ConnectionRefusedError
        if fault in ("hangs", "slow"):
            # Without an event loop, the backend's own deadline ends it.
            raise BackendUnavailable("server: no answer in 2 s")
        return self._answer(fault, conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """As the minute has it."""
        fault = self._fault()
        if fault == "refused":
            raise ConnectionRefusedError
        await asyncio.sleep({"hangs": 100_000, "slow": self._draw.uniform(1, 3)}.get(fault, 0.05))
        return self._answer(fault, conversations)

    def _answer(self, fault: str, conversations: Sequence[Conversation]) -> list[Scores]:
        if fault == "nonsense":
            raise BackendError("server: no verdict in the reply")
        if fault == "broken" or (fault == "poisoned" and any("7" in c.trial for c in conversations)):
            raise KeyError("secret")
        scores: list[Any] = super().classify(conversations)
        return {"short": scores[1:], "number": [0.0] * len(scores)}.get(fault, scores)


def guarded(server: Server, *, deadline: float | None) -> tuple[Guard, Batched]:
    """A guard with everything around its second tier."""
    held = Resilient(server, deadline=deadline, failures=3, cooldown=10)
    batched = Batched(Windowed(held, characters=50, overlap=10), batch_size=8, lanes=2)
    cascade = Cascade(KeywordBackend({"DOUBT": 0.4}), Remembered(batched, size=100, ttl=20))
    return Guard(cascade, policy=Policy(on_degraded="review")), batched


def text_of(at: int, draw: random.Random) -> str:
    """Sure or in doubt, safe or not, short or long, heard before or not."""
    words = ["DOUBT"] * (draw.random() < 0.7) + ["EVIL"] * (draw.random() < 0.4) + [str(draw.randrange(60))]
    return " ".join(words) + "." * (100 if at % 10 == 0 else 0)


def check(text: str, verdict: Verdict) -> str:
    """What was allowed was judged, by one who was sure or by the server."""
    if verdict.action == "allow":
        assert verdict.scores is not None
        assert verdict.coverage.judged == len(text)
        assert not verdict.degraded
        assert "DOUBT" not in text or verdict.scores.backend == "server"
        assert "DOUBT" not in text or "EVIL" not in text
    else:
        assert verdict.degraded or "EVIL" in text
        assert "secret" not in verdict.reason
    return verdict.action


class Fast(asyncio.SelectorEventLoop):
    """An event loop that skips the time in which nothing happens."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Skipping(self))

    def time(self) -> float:
        """Seconds since it began."""
        return self.now


class _Skipping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, loop: Fast) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        """Never wait."""
        assert timeout is not None, "everybody waits for ever"
        self._loop.now += max(timeout, 0)
        return super().select(0)


def things() -> int:
    """How much there is to collect."""
    gc.collect()
    return len(gc.get_objects())


def test_two_hours_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an event loop: several at a time, some of whom give up."""
    draw = random.Random(1)  # noqa: S311 - faults, not secrets
    told: list[str] = []

    async def one(guard: Guard, at: int) -> None:
        text = text_of(at, draw)
        patience = draw.uniform(0, 3) if draw.random() < 0.1 else 1000
        try:
            async with asyncio.timeout(patience):
                told.append(check(text, await guard.ascreen(text)))
        except TimeoutError:
            assert patience < 1000
            told.append("gave up")

    async def main(loop: Fast) -> None:
        server = Server(loop.time)
        guard, batched = guarded(server, deadline=2)
        running: set[asyncio.Task[None]] = set()
        begun = 0
        sizes: list[int] = []
        while loop.now < HOURS * 3600:
            for _ in range(draw.choice([1, 1, 1, 6])):
                task = asyncio.create_task(one(guard, begun))
                running.add(task)
                begun += 1
            await asyncio.sleep(draw.uniform(0, 4))
            running -= {task for task in running if task.done() and task.result() is None}
            if len(sizes) < int(4 * loop.now / (HOURS * 3600)):
                sizes.append(things())
        await asyncio.gather(*running)
        await asyncio.sleep(60)
        assert len(told) == begun > 5000
        assert {"allow", "review", "block", "gave up"} == set(told)
        assert server.seen == {"up", *FAULTS}
        assert len(asyncio.all_tasks()) == 1
        assert (batched._free, len(batched._waiting)) == (2, 0)
        assert sizes[-1] < sizes[0] + 400

    threads = threading.active_count()
    with asyncio.Runner(loop_factory=Fast) as runner:
        loop: Any = runner.get_loop()
        for module in (remembered, resilient):
            monkeypatch.setattr(module, "monotonic", loop.time)
        runner.run(main(loop))
    assert threading.active_count() == threads


def test_two_hours_of_faults_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an event loop."""
    draw = random.Random(2)  # noqa: S311 - faults, not secrets
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for module in (remembered, resilient):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])
    monkeypatch.setattr(resilient, "sleep", sleep)
    server = Server(lambda: now[0])
    guard, batched = guarded(server, deadline=None)
    told: list[str] = []
    sizes: list[int] = []
    while now[0] < HOURS * 3600:
        text = text_of(len(told), draw)
        told.append(check(text, guard.screen(text)))
        now[0] += draw.uniform(0, 4)
        if len(sizes) < int(4 * now[0] / (HOURS * 3600)):
            sizes.append(things())
    assert set(told) == {"allow", "review", "block"}
    assert server.seen == {"up", *FAULTS}
    assert (batched._free, len(batched._waiting)) == (2, 0)
    assert sizes[-1] < sizes[0] + 400
