"""A deadline holds, what may pass is repeated, and a backend that is down is let be."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pytest

from guardmw import BackendError, BackendUnavailable, Cascade, Conversation, Scores
from guardmw.backends import resilient
from guardmw.backends.batched import Batched
from guardmw.backends.calibrated import Calibrated
from guardmw.backends.remembered import Remembered
from guardmw.backends.resilient import Resilient
from guardmw.backends.windowed import Windowed
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Backend

    Classify = Callable[[Backend, Sequence[Conversation]], list[Scores]]

ONE = [Conversation.of("one")]
DOWN = BackendUnavailable("scripted: nobody answers")
both = pytest.mark.parametrize(
    "classify",
    [lambda b, c: b.classify(c), lambda b, c: asyncio.run(b.aclassify(c))],
    ids=["sync", "async"],
)

test_contract = backend_contract(lambda: Resilient(KeywordBackend({"bread": 0.9})))
test_contract_without_a_deadline = backend_contract(lambda: Resilient(KeywordBackend({}), deadline=None))


class Clock:
    """Time that passes only in pauses, and by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Pass at once."""
        self.pauses.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        """Pass at once."""
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nothing waits."""
    clock = Clock()
    monkeypatch.setattr(resilient, "monotonic", clock)
    monkeypatch.setattr(resilient, "sleep", clock.sleep)
    monkeypatch.setattr(resilient._Pause, "aclassify", lambda self, _: _nothing(clock.asleep(self._seconds)))
    return clock


async def _nothing(pause: object) -> list[Scores]:
    await pause  # type: ignore[misc]
    return []


class Hanging(KeywordBackend):
    """Answers when it is let, and counts who is waiting."""

    def __init__(self) -> None:
        super().__init__({})
        self.let = threading.Event()
        self.cancelled = 0

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Wait on this thread."""
        self.let.wait(30)
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Wait on the event loop."""
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return []


def fails(backend: Backend, classify: Classify, message: str) -> None:
    """The next call does, with this message."""
    with pytest.raises(BackendUnavailable, match=message):
        classify(backend, ONE)


@both
def test_what_nobody_answered_is_asked_again(clock: Clock, classify: Classify) -> None:
    """After a pause of no fixed length, as others are waiting too."""
    backend = ScriptedBackend([DOWN, ConnectionRefusedError(), 0.9])
    assert [s.unsafe for s in classify(Resilient(backend, attempts=3, deadline=None), ONE)] == [0.9]
    first, second = clock.pauses
    assert 0.1 <= first <= 0.2 <= second <= 0.4


@both
def test_the_last_attempt_says_why(clock: Clock, classify: Classify) -> None:
    """As the backend said it."""
    backend = ScriptedBackend([DOWN, DOWN, 0.9])
    fails(Resilient(backend, attempts=2, deadline=None), classify, "nobody answers")
    assert len(clock.pauses) == 1


@both
def test_what_cannot_be_read_is_not_asked_again(clock: Clock, classify: Classify) -> None:
    """The same answer would come once more."""
    backend = ScriptedBackend([BackendError("no verdict in the reply"), 0.9])
    with pytest.raises(BackendError, match="no verdict in the reply"):
        classify(Resilient(backend, attempts=3), ONE)
    assert backend.batches == [1]


@both
def test_a_backend_that_is_down_is_let_be(clock: Clock, classify: Classify) -> None:
    """Until one trial in each cooldown finds it up."""
    backend = ScriptedBackend([DOWN, DOWN, DOWN, 0.9, 0.8])
    held = Resilient(backend, deadline=None, attempts=1, failures=2, cooldown=10)
    fails(held, classify, "nobody answers")
    assert held.state == "closed"
    fails(held, classify, "nobody answers")
    assert held.state == "open"
    fails(held, classify, r"not asked after 2 failures in a row; it is tried again in 10\.0 s")
    clock.now += 9
    fails(held, classify, r"again in 1\.0 s")
    assert backend.batches == [1, 1]
    clock.now += 1
    assert held.state == "half-open"
    fails(held, classify, "nobody answers")
    assert held.state == "open"
    fails(held, classify, "not asked after 3")
    clock.now += 10
    assert [s.unsafe for s in classify(held, ONE)] == [0.9]
    assert held.state == "closed"
    assert [s.unsafe for s in classify(held, ONE)] == [0.8]


@both
def test_a_success_forgives_failures(clock: Clock, classify: Classify) -> None:
    """Only those in a row count."""
    held = Resilient(ScriptedBackend([DOWN, 0.9] * 5), deadline=None, attempts=1, failures=2)
    for _ in range(5):
        fails(held, classify, "nobody answers")
        classify(held, ONE)
    assert held.state == "closed"


@both
def test_one_trial_is_made_at_a_time(clock: Clock, classify: Classify) -> None:
    """While it is under way, the others fail as before."""
    held: list[Resilient] = []

    class Trial(ScriptedBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if self.asked:
                with pytest.raises(BackendUnavailable, match="not asked"):
                    held[0].classify(conversations)
            return super().classify(conversations)

    backend = Trial([DOWN, 0.9])
    held.append(Resilient(backend, deadline=None, attempts=1, failures=1))
    fails(held[0], classify, "nobody answers")
    clock.now += 60
    assert [s.unsafe for s in classify(held[0], ONE)] == [0.9]


@both
def test_a_text_that_cannot_be_judged_does_not_open_the_breaker(clock: Clock, classify: Classify) -> None:
    """Or anybody could take the guard from everybody by sending it a few."""
    held = Resilient(ScriptedBackend([BackendError("unreadable")] * 9 + [0.9]), failures=1, deadline=None)
    for _ in range(9):
        with pytest.raises(BackendError, match="unreadable"):
            classify(held, ONE)
    assert [s.unsafe for s in classify(held, ONE)] == [0.9]


@both
def test_no_attempt_begins_that_the_deadline_would_end(clock: Clock, classify: Classify) -> None:
    """A caller waits no longer for the sake of a pause."""
    backend = ScriptedBackend([DOWN, 0.9])
    fails(Resilient(backend, deadline=0.05), classify, "nobody answers")
    assert clock.pauses == []


@both
def test_a_backend_that_hangs_is_left(classify: Classify) -> None:
    """With a thread, which ends when the backend lets it go; a task is cancelled."""
    backend = Hanging()
    before = threading.active_count()
    fails(Resilient(backend, deadline=0.02, attempts=1), classify, r"^keyword: no answer in 0\.02 s$")
    assert threading.active_count() - before + backend.cancelled == 1
    backend.let.set()
    for thread in threading.enumerate():
        if thread.name == "guardmw keyword":
            thread.join(30)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "within",
    [
        Batched,
        lambda backend: Remembered(Windowed(Batched(backend))),
        lambda backend: Cascade(KeywordBackend({}), Calibrated(Batched(backend), temperature={})),
    ],
)
def test_a_deadline_around_lanes_is_refused(within: Callable[[Backend], Backend]) -> None:
    """A thread that is left behind would keep its lane from everybody else."""
    lanes = within(KeywordBackend({}))
    with pytest.raises(BackendError, match=r"put the deadline inside, Batched\(Resilient\(x, deadline=\.\.\.\)\)"):
        Resilient(lanes)
    assert Resilient(lanes, deadline=None).classify(ONE)


def test_a_deadline_within_lanes_frees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls hang, without an event loop too."""
    monkeypatch.setattr(resilient, "_MOST_HUNG", 3)
    backend = Hanging()
    batched = Batched(Resilient(backend, deadline=0.01, attempts=1, failures=99))
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match="no answer"):
            batched.classify(ONE)
    backend.let.set()
    for thread in threading.enumerate():
        if thread.name == "guardmw keyword":
            thread.join(30)
    assert batched.classify(ONE)


def test_threads_that_never_come_back_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past a few no more are started, until one of them ends."""
    monkeypatch.setattr(resilient, "_MOST_HUNG", 3)
    backend = Hanging()
    held = Resilient(backend, deadline=0.01, attempts=1, failures=99)
    before = threading.active_count()
    for _ in range(3):
        fails(held, Resilient.classify, "no answer")  # type: ignore[arg-type]
    for _ in range(5):
        fails(held, Resilient.classify, "3 earlier calls have not come back")  # type: ignore[arg-type]
    assert threading.active_count() == before + 3
    backend.let.set()
    for thread in threading.enumerate():
        if thread.name == "guardmw keyword":
            thread.join(30)
    assert held.classify(ONE)


@both
def test_a_timeout_of_the_backends_own_is_told_as_such(classify: Classify) -> None:
    """It is not our deadline that passed."""
    held = Resilient(ScriptedBackend([TimeoutError("secret")]), deadline=30, attempts=1)
    fails(held, classify, "^scripted: TimeoutError$")


def test_a_cancelled_caller_cancels_the_backend_and_counts_for_nothing() -> None:
    """It says nothing of the backend."""

    async def main() -> tuple[int, str]:
        backend = Hanging()
        held = Resilient(backend, failures=1)
        task = asyncio.create_task(held.aclassify(ONE))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return backend.cancelled, held.state

    assert asyncio.run(main()) == (1, "closed")


def test_a_cancelled_trial_is_followed_by_another(clock: Clock) -> None:
    """A breaker never waits for news that will not come."""

    class Once(Hanging):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if not self.cancelled:
                return await super().aclassify(conversations)
            return KeywordBackend.classify(self, conversations)

        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise DOWN

    async def main() -> None:
        held = Resilient(Once(), failures=1, attempts=1, cooldown=10, deadline=None)
        with pytest.raises(BackendUnavailable):
            held.classify(ONE)
        clock.now += 10
        trial = asyncio.create_task(held.aclassify(ONE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        clock.now += 10
        assert len(await held.aclassify(ONE)) == 1
        assert held.state == "closed"

    asyncio.run(main())


def test_a_thread_of_a_call_sees_the_callers_context() -> None:
    """Traces are told apart by it."""
    tenant: ContextVar[str] = ContextVar("tenant")

    class Named(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return [Scores(0.1, backend=tenant.get()) for _ in conversations]

    tenant.set("a")
    assert Resilient(Named({})).classify(ONE)[0].backend == "a"


@pytest.mark.parametrize("options", [{"deadline": 0}, {"attempts": 0}, {"failures": 0}, {"cooldown": 0}])
def test_settings_that_make_no_sense_are_errors(options: dict[str, int]) -> None:
    """Before the first call, not in it."""
    with pytest.raises(BackendError, match="at least 1"):
        Resilient(KeywordBackend({}), **options)
