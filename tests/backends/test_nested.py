"""Backends around backends go around each other in any order: the same is said, told, forgotten and freed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import TYPE_CHECKING, ClassVar

import pytest

from guardmw import BackendError, BackendUnavailable, Cascade, Conversation, Guard, ToolCall, Turn
from guardmw.backends.batched import Batched
from guardmw.backends.calibrated import Calibrated
from guardmw.backends.remembered import Remembered
from guardmw.backends.resilient import Resilient
from guardmw.backends.windowed import Windowed
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Backend, Scores

LAYERS: dict[str, Callable[[Backend], Backend]] = {
    "batched": lambda backend: Batched(backend, batch_size=3),
    "calibrated": lambda backend: Calibrated(backend, {"input": 2.0, "tool_call": 0.5}),
    "remembered": Remembered,
    "resilient": lambda backend: Resilient(backend, deadline=None, attempts=1),
    "windowed": lambda backend: Windowed(backend, characters=40, overlap=10, most=3),
}
ORDERS = list(permutations(LAYERS))
every_order = pytest.mark.parametrize("order", ORDERS, ids=">".join)
LONG = "EVIL " + "bread " * 10
ENDLESS = "bread " * 100


class Worker(KeywordBackend):
    """Knows EVIL; fails where it reads DOWN or POISON, and never ends where it reads HANG, as long as it is ill."""

    thresholds: ClassVar = {"input": 0.6, "injection": 0.7}

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.9}, name="worker")
        self.asked: list[str] = []
        self.ill = True

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Or fail."""
        read = [conversation.trial for conversation in conversations]
        self.asked += read
        if self.ill and any("DOWN" in text for text in read):
            raise BackendUnavailable("worker: nobody answers")
        if self.ill and any("POISON" in text for text in read):
            raise BackendError("worker: no verdict in the reply")
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Or hang, or fail; not at once."""
        await asyncio.sleep(0)
        if self.ill and any("HANG" in conversation.trial for conversation in conversations):
            await asyncio.Event().wait()
        return self.classify(conversations)


def around(worker: Backend, order: Sequence[str]) -> Backend:
    """The first of the order is the outermost."""
    made = worker
    for layer in reversed(order):
        made = LAYERS[layer](made)
    return made


def given() -> list[Conversation]:
    """Of several stages and lengths, one of them twice."""
    call = Turn("assistant", "", tool_calls=(ToolCall("shell", {"command": LONG}),))
    turns = [Turn("user", "bread"), Turn("user", "EVIL"), Turn("user", LONG), call, Turn("document", LONG)]
    return [Conversation((turn,)) for turn in (*turns, turns[1])]


EXPECTED = around(Worker(), ORDERS[0]).classify(given())


@every_order
def test_any_order_says_the_same(order: tuple[str, ...]) -> None:
    """Sync and async, the second time from memory; the name and the advice go along."""
    worker = Worker()
    made = around(worker, order)
    assert (made.name, vars(made)["thresholds"]) == ("worker", vars(around(Worker(), ORDERS[0]))["thresholds"])
    assert made.classify(given()) == EXPECTED
    asked = len(worker.asked)
    assert asyncio.run(made.aclassify(given())) == EXPECTED
    assert len(worker.asked) == asked
    assert made.classify([]) == asyncio.run(made.aclassify([])) == []


@every_order
def test_any_order_serves_threads_and_tasks_at_once(order: tuple[str, ...]) -> None:
    """Each has its own answer."""
    made = around(Worker(), order)

    async def tasks() -> list[list[Scores]]:
        return await asyncio.gather(*(made.aclassify([one]) for one in given() * 3))

    with ThreadPoolExecutor(6) as pool:
        threads = [pool.submit(made.classify, [one]) for one in given() * 3]
        looped = pool.submit(lambda: asyncio.run(tasks()))
        for came in ([thread.result() for thread in threads], looped.result()):
            assert [scores for (scores,) in came] == EXPECTED * 3


@every_order
@pytest.mark.parametrize("word", ["DOWN", "POISON"])
def test_in_any_order_a_failure_is_told_and_forgotten(order: tuple[str, ...], word: str) -> None:
    """By its own kind, sync and async; the next call is asked anew."""
    worker = Worker()
    made = around(worker, order)
    bad = [Conversation.of(f"bread {word}")]
    for classify in (made.classify, lambda some: asyncio.run(made.aclassify(some))):
        with pytest.raises(BackendError, match="worker: ") as caught:
            classify(bad)
        assert isinstance(caught.value, BackendUnavailable) is (word == "DOWN")
    worker.ill = False
    (scores,) = made.classify(bad)
    assert scores.unsafe < 0.5


@every_order
def test_in_any_order_what_is_left_out_is_told_and_asked_again(order: tuple[str, ...]) -> None:
    """Three pieces are read; nothing partial is remembered of the whole, and a guard does not allow it."""
    worker = Worker()
    made = around(worker, order)
    for _ in range(2):
        (scores,) = made.classify([Conversation.of(ENDLESS)])
        assert scores.coverage is not None
        assert (scores.coverage.judged, scores.coverage.windows) == (100, 3)
        verdict = Guard(made).screen(ENDLESS)
        assert (verdict.action, verdict.degraded) == ("block", True)


@every_order
async def test_in_any_order_who_is_cancelled_leaves_nothing_in_the_way(order: tuple[str, ...]) -> None:
    """Neither a task nor a lane nor a question; the others have their answers."""
    worker = Worker()
    made = around(worker, order)
    hung = asyncio.create_task(made.aclassify([Conversation.of("HANG")]))
    same = asyncio.create_task(made.aclassify([Conversation.of("HANG")]))
    other = asyncio.create_task(made.aclassify([Conversation.of("EVIL")]))
    for _ in range(20):
        await asyncio.sleep(0)
    worker.ill = False
    hung.cancel()
    gone, (harmless,), (evil,) = await asyncio.gather(hung, same, other, return_exceptions=True)
    assert isinstance(gone, asyncio.CancelledError)
    assert harmless.unsafe < 0.5 < evil.unsafe
    assert len(asyncio.all_tasks()) == 1


@every_order
def test_a_deadline_goes_within_lanes_however_deep(order: tuple[str, ...]) -> None:
    """Around them it is refused, whatever is in between, a cascade too."""
    outside = order.index("resilient") < order.index("batched")

    def held(backend: Backend) -> Backend:
        return Resilient(Cascade(KeywordBackend({}), backend), deadline=1.0)

    made: Backend = Worker()
    for layer in reversed(order):
        if layer == "resilient" and outside:
            with pytest.raises(BackendError, match="put the deadline"):
                held(made)
            return
        made = held(made) if layer == "resilient" else LAYERS[layer](made)
    assert made.classify([Conversation.of("bread")])[0].unsafe < 0.5
