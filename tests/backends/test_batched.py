"""Who is alone does not wait, who waits shares, and nobody suffers for another's text."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import BackendError, BackendUnavailable, Conversation, Guard, Scores
from guardmw.backends.batched import Batched
from guardmw.backends.resilient import Resilient
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

test_contract = backend_contract(lambda: Batched(KeywordBackend({"bread": 0.9})))
test_contract_of_small_batches = backend_contract(lambda: Batched(KeywordBackend({"bread": 0.9}), batch_size=1))


def texts(*given: str) -> list[Conversation]:
    """User turns."""
    return [Conversation.of(text) for text in given]


class Gated(KeywordBackend):
    """Answers when it is let, fails on POISON, and remembers each batch."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()
        self.batches: list[list[str]] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Wait on this thread."""
        self.batches.append([c.trial for c in conversations])
        self.begun.release()
        assert self.gate.wait(30)
        if any("DOWN" in c.trial for c in conversations):
            raise BackendUnavailable("keyword: nobody answers")
        if any("POISON" in c.trial for c in conversations):
            raise BackendError("keyword: no verdict in the reply")
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Wait on the event loop."""
        return await asyncio.to_thread(self.classify, conversations)


def waiting(batched: Batched, count: int) -> None:
    """Until so many are."""
    while len(batched._waiting) < count:
        time.sleep(0.001)


def heard(batched: Batched, *given: str) -> list[object]:
    """What a thread for each hears, that come while somebody else has the lane, in this order."""
    backend: Gated = batched._backend  # type: ignore[assignment]

    def ask(text: str) -> object:
        try:
            return batched.classify(texts(text))[0].unsafe
        except BackendError as error:
            return str(error)

    with ThreadPoolExecutor(len(given) + 1) as pool:
        first = pool.submit(ask, "first")
        assert backend.begun.acquire(timeout=30)
        others = []
        for count, text in enumerate(given, 1):
            others.append(pool.submit(ask, text))
            waiting(batched, count)
        backend.gate.set()
        assert first.result(30) == 0.01
        return [other.result(30) for other in others]


async def until(ready: Callable[[], object]) -> None:
    """As long as it takes, and the event loop goes on."""
    while not ready():  # noqa: ASYNC110 - what is waited for happens on a thread
        await asyncio.sleep(0.001)


def idle(batched: Batched, lanes: int = 1) -> None:
    """Nothing is left of anything."""
    assert (batched._free, len(batched._waiting), batched._room) == (lanes, 0, 16_384)
    assert not batched._tasks


def test_who_is_alone_asks_at_once() -> None:
    """On the same thread, so that nothing is waited for."""
    threads = []

    class Where(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            threads.append(threading.current_thread())
            return super().classify(conversations)

    before = threading.active_count()
    Batched(Where({})).classify(texts("a"))
    assert threads == [threading.current_thread()]
    assert threading.active_count() == before


def test_those_who_wait_share_a_batch() -> None:
    """Each gets its own answer."""
    batched = Batched(Gated())
    assert heard(batched, "a", "EVIL", "c") == [0.01, 0.99, 0.01]
    assert batched._backend.batches == [["first"], ["a", "EVIL", "c"]]  # type: ignore[attr-defined]
    idle(batched)


def test_a_batch_is_no_longer_than_it_may_be() -> None:
    """The rest is the next one."""
    batched = Batched(Gated(), batch_size=2)
    assert heard(batched, *"abcde") == [0.01] * 5
    assert batched._backend.batches[1:] == [["a", "b"], ["c", "d"], ["e"]]  # type: ignore[attr-defined]


def test_texts_of_like_length_go_together() -> None:
    """And the oldest first, so that none waits for ever."""
    batched = Batched(Gated())
    long, short = "x" * 1000, "x" * 10
    assert heard(batched, long, short, long, short) == [0.01] * 4
    sizes = [[len(text) for text in batch] for batch in batched._backend.batches[1:]]  # type: ignore[attr-defined]
    assert sizes == [[1000, 1000], [10, 10]]


def test_one_poisonous_text_fails_only_its_caller() -> None:
    """Wherever it stands."""
    batched = Batched(Gated())
    assert heard(batched, "a", "b", "POISON", "EVIL", "e") == [
        0.01,
        0.01,
        "keyword: no verdict in the reply",
        0.99,
        0.01,
    ]
    idle(batched)


def test_a_backend_that_is_down_is_not_asked_by_halves() -> None:
    """It would be asked for each of them, and be waited for each time."""
    batched = Batched(Gated())
    assert heard(batched, "a", "DOWN", "c") == ["keyword: nobody answers"] * 3
    assert len(batched._backend.batches) == 2  # type: ignore[attr-defined]
    idle(batched)


def test_lanes_are_batches_at_the_same_time() -> None:
    """As many as there are."""
    backend = Gated()
    batched = Batched(backend, lanes=2)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(batched.classify, texts(text)) for text in "abc"]
        assert backend.begun.acquire(timeout=30)
        assert backend.begun.acquire(timeout=30)
        waiting(batched, 1)
        backend.gate.set()
        assert [call.result(30)[0].unsafe for call in calls] == [0.01] * 3
    idle(batched, lanes=2)


def test_a_lane_leaves_the_others_their_share() -> None:
    """One long batch would keep one processor busy, and the others idle."""
    backend = Gated()
    batched = Batched(backend, lanes=2)
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(batched.classify, texts(text)) for text in "abcdef"]
        waiting(batched, 4)
        backend.gate.set()
        assert [call.result(30)[0].unsafe for call in calls] == [0.01] * 6
    assert max(map(len, backend.batches)) == 2
    idle(batched, lanes=2)


def test_a_full_queue_refuses_at_once() -> None:
    """And has room again when those in it are answered."""
    backend = Gated()
    batched = Batched(backend, queue=2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batched.classify, texts("a"))
        assert backend.begun.acquire(timeout=30)
        second = pool.submit(batched.classify, texts("b", "c"))
        waiting(batched, 1)
        with pytest.raises(BackendUnavailable, match="keyword: the queue is full"):
            batched.classify(texts("d"))
        backend.gate.set()
        assert len(first.result(30) + second.result(30)) == 3
    assert batched._room == 2
    assert repr(batched) == "Batched('keyword', 0 waiting)"


def test_threads_and_tasks_share_one_queue() -> None:
    """Whoever of them is handed the lane asks for all."""
    backend = Gated()
    batched = Batched(backend)

    async def tasks() -> list[float]:
        return [s[0].unsafe for s in await asyncio.gather(*(batched.aclassify(texts(text)) for text in ("EVIL", "b")))]

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batched.classify, texts("first"))
        assert backend.begun.acquire(timeout=30)
        loop = pool.submit(lambda: asyncio.run(tasks()))
        waiting(batched, 2)
        thread = pool.submit(batched.classify, texts("EVIL"))
        waiting(batched, 3)
        backend.gate.set()
        assert loop.result(30) == [0.99, 0.01]
        assert [s[0].unsafe for s in (first.result(30), thread.result(30))] == [0.01, 0.99]
    assert backend.batches == [["first"], ["EVIL", "b", "EVIL"]]
    idle(batched)


@pytest.mark.parametrize("cancelled", [0, 1, 2, 3])
@pytest.mark.parametrize("when", ["waiting", "asking"])
def test_who_is_cancelled_leaves_the_others_their_batch(cancelled: int, when: str) -> None:
    """Be it the one that asks for all of them."""

    async def main() -> None:
        backend = Gated()
        batched = Batched(backend)
        tasks = [asyncio.create_task(batched.aclassify(texts(text))) for text in ("EVIL", "b", "EVIL", "d")]
        assert await asyncio.to_thread(backend.begun.acquire, timeout=30)
        if when == "asking":
            backend.gate.set()
            await until(lambda: len(backend.batches) > 1)
        tasks[cancelled].cancel()
        backend.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        expected = [0.99, 0.01, 0.99, 0.01]
        for at, answer in enumerate(answers):
            if at == cancelled:
                assert isinstance(answer, asyncio.CancelledError) or when == "asking"
            else:
                assert answer[0].unsafe == expected[at]  # type: ignore[index]
        await until(lambda: batched._free and not batched._tasks)
        idle(batched)

    asyncio.run(main())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_batch_that_nobody_waits_for_any_more_frees_its_lane(order: list[int]) -> None:
    """All of its callers ran out of time, and the backend never answers."""
    batches: list[int] = []

    class Hangs(KeywordBackend):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            batches.append(len(conversations))
            await asyncio.sleep(0 if len(batches) == 3 else 3_600)
            return self.classify(conversations)

    async def main() -> None:
        batched = Batched(Hangs({"EVIL": 0.99}))
        first, *others = (asyncio.create_task(batched.aclassify(texts(text))) for text in "abcd")
        await until(lambda: len(batched._waiting) == 3)
        first.cancel()
        await until(lambda: len(batches) == 2)
        for at in order:
            assert not batched._free
            others[at].cancel()
            await asyncio.sleep(0.001)
        assert all(task.done() for task in others)
        await until(lambda: batched._free)
        assert (await asyncio.wait_for(batched.aclassify(texts("EVIL")), 30))[0].unsafe == 0.99
        assert batches == [1, 3, 1]
        idle(batched)

    asyncio.run(main())


def test_a_batch_that_a_thread_waits_for_goes_on_without_its_tasks() -> None:
    """It cannot give up, and is owed its answer."""
    backend = Gated()
    batched = Batched(backend)

    async def main() -> None:
        first, leader, other = (asyncio.create_task(batched.aclassify(texts(text))) for text in "abc")
        await until(lambda: backend.begun.acquire(blocking=False))
        waiting(batched, 2)
        thread = asyncio.create_task(asyncio.to_thread(batched.classify, texts("EVIL")))
        await asyncio.to_thread(waiting, batched, 3)
        first.cancel()
        await until(lambda: len(backend.batches) == 2)
        leader.cancel()
        other.cancel()
        await asyncio.sleep(0.001)
        assert not batched._free
        backend.gate.set()
        assert (await thread)[0].unsafe == 0.99
        await until(lambda: batched._free)

    asyncio.run(main())
    assert backend.batches == [["a"], ["b", "c", "EVIL"]]
    idle(batched)


def test_an_event_loop_that_ends_in_the_middle_leaves_the_others_to_themselves() -> None:
    """A thread that waited for its batch is handed the lane."""
    backend = Gated()
    batched = Batched(backend)

    class Loops(Gated):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            self.batches.append([c.trial for c in conversations])
            self.begun.release()
            await asyncio.sleep(30)
            return []

    backend.__class__ = Loops

    async def tasks() -> None:
        first, leader = (asyncio.create_task(batched.aclassify(texts(text))) for text in "ab")
        await until(lambda: backend.begun.acquire(blocking=False))
        waiting(batched, 1)
        thread.append(pool.submit(batched.classify, texts("EVIL")))
        waiting(batched, 2)
        first.cancel()
        await until(lambda: backend.begun.acquire(blocking=False))
        assert backend.batches[-1] == ["b", "EVIL"]
        assert not leader.done()

    thread: list[object] = []
    with ThreadPoolExecutor(2) as pool:
        backend.gate.set()
        asyncio.run(tasks())
        assert thread[0].result(30)[0].unsafe == 0.99  # type: ignore[attr-defined]
    idle(batched)


def test_a_closed_event_loop_is_not_handed_the_lane() -> None:
    """A task that was left in it will never run again."""
    backend = Gated()
    batched = Batched(backend)
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batched.classify, texts("a"))
        assert backend.begun.acquire(timeout=30)
        left = loop.create_task(batched.aclassify(texts("b")))
        loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        last = pool.submit(batched.classify, texts("EVIL"))
        waiting(batched, 2)
        backend.gate.set()
        assert [s[0].unsafe for s in (first.result(30), last.result(30))] == [0.01, 0.99]
    left._log_destroy_pending = False  # type: ignore[attr-defined]
    del left
    gc.collect()
    assert batched._free == 1


def test_a_call_that_blocks_the_event_loop_does_not_wait_for_a_task_on_it() -> None:
    """Both would wait for ever."""

    async def main() -> list[float]:
        backend = Gated()
        batched = Batched(backend)
        task = asyncio.create_task(batched.aclassify(texts("EVIL")))
        assert await asyncio.to_thread(backend.begun.acquire, timeout=30)
        backend.gate.set()
        return [batched.classify(texts("a"))[0].unsafe, (await task)[0].unsafe]

    assert asyncio.run(main()) == [0.01, 0.99]


@given(
    st.lists(st.lists(st.sampled_from(["a", "EVIL", "POISON"]), min_size=1, max_size=4), max_size=12),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_each_is_answered_as_if_it_were_alone(calls: list[list[str]], batch_size: int, lanes: int) -> None:
    """Whatever the others ask: its own scores, or its own failure."""

    async def ask(batched: Batched, call: list[str]) -> object:
        try:
            return [s.unsafe for s in await batched.aclassify(texts(*call))]
        except BackendError as error:
            return str(error)

    class Poisoned(KeywordBackend):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            await asyncio.sleep(0)
            if any("POISON" in c.trial for c in conversations):
                raise BackendError("poison")
            return super().classify(conversations)

    async def main() -> list[object]:
        batched = Batched(Poisoned({"EVIL": 0.99}), batch_size=batch_size, lanes=lanes)
        answers = await asyncio.gather(*(ask(batched, call) for call in calls))
        await asyncio.sleep(0)
        idle(batched, lanes)
        return answers

    alone = ["poison" if "POISON" in call else [0.99 if text == "EVIL" else 0.01 for text in call] for call in calls]
    assert asyncio.run(main()) == alone


def test_ten_thousand_at_once_over_a_slow_backend() -> None:
    """All are answered, and nothing is left of them; the backend is never asked for more than it takes."""
    most = [0, 0]

    class Slow(KeywordBackend):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            most[1] += 1
            most[0] = max(most[0], most[1], len(conversations) // 64)
            await asyncio.sleep(0.002)
            most[1] -= 1
            return super().classify(conversations)

    async def main() -> None:
        batched = Batched(Resilient(Slow({"EVIL": 0.99}), deadline=30), batch_size=64, lanes=4)
        guard = Guard(batched)
        evil = [at % 7 < 2 for at in range(10_000)]
        verdicts = await asyncio.gather(*(guard.ascreen("EVIL" if bad else "bread") for bad in evil))
        assert [verdict.blocked for verdict in verdicts] == evil
        assert not any(verdict.degraded for verdict in verdicts)
        assert most[0] <= 4
        assert len(asyncio.all_tasks()) == 1
        idle(batched, 4)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"lanes": 0}, {"queue": 0}])
def test_settings_that_make_no_sense_are_errors(options: dict[str, int]) -> None:
    """Before the first call, not in it."""
    with pytest.raises(BackendError, match="at least 1"):
        Batched(ScriptedBackend([]), **options)
