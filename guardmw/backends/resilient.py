"""A backend that answers within a deadline or fails, asked again where that may help, and let be while it is down."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextvars import copy_context
from math import inf
from random import uniform
from threading import Lock, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Literal

from guardmw.backends._plan import Ask, Plan, arun, run
from guardmw.backends.batched import Batched
from guardmw.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardmw.backends import Backend
    from guardmw.conversation import Conversation
    from guardmw.verdict import Scores

# The longest pause before the second attempt, in seconds; each later one may be twice as long.
_PAUSE = 0.2
# A thread cannot be ended from outside. With so many that never came back, no more are started.
_MOST_HUNG = 32

State = Literal["closed", "half-open", "open"]


class Resilient:
    """Holds a backend to a deadline, repeats what may pass, and stops asking while it is down.

    Only BackendUnavailable (nobody answers, or not in time) is repeated and counted. Any other failure is about what
    was asked, and a text that a backend cannot read must not take the guard from everybody else.

    While the breaker is open, calls fail at once, except one in each ``cooldown``, whose success closes it.

    Args:
        backend: what to hold.
        deadline: seconds for one call, its repetitions included; None leaves that to the backend. Without an event
            loop it takes a thread for each call, and one that overruns stays behind until the backend lets it go; so
            that it does not keep a lane of a Batched, that goes around: Batched(Resilient(x)).
        attempts: how often it is asked at most.
        failures: in a row, after which the breaker opens.
        cooldown: seconds from one trial to the next.

    Raises:
        BackendError: one of them makes no sense, or there is a deadline around a Batched.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        deadline: float | None = 10.0,
        attempts: int = 2,
        failures: int = 5,
        cooldown: float = 15.0,
    ) -> None:
        if (deadline is not None and deadline <= 0) or attempts < 1 or failures < 1 or cooldown <= 0:
            raise BackendError("deadline and cooldown are seconds above 0, attempts and failures at least 1")
        if deadline is not None and _has_lanes(backend):
            raise BackendError(
                "a call that overruns its deadline here would keep its lane of the Batched within: put the deadline "
                "inside, Batched(Resilient(x, deadline=...)), or none around it, Resilient(Batched(x), deadline=None)"
            )
        self.name = backend.name
        self.thresholds: Mapping[str, float] = getattr(backend, "thresholds", {})
        self._backend = backend
        self._deadline = deadline
        self._attempts = attempts
        self._breaker = _Breaker(backend.name, failures, cooldown)
        self._threads = _Threads(backend.name)

    def __repr__(self) -> str:
        return f"Resilient({self.name!r}, {self.state})"

    @property
    def state(self) -> State:
        """Of the breaker: "closed" lets every call through, "open" none, "half-open" the next one."""
        return self._breaker.state

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return run(self._plan(conversations))

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch without blocking the event loop; where the caller is cancelled, so is the backend."""
        return await arun(self._plan(conversations))

    def _plan(self, conversations: Sequence[Conversation]) -> Plan[list[Scores]]:
        if not conversations:
            return []
        started = monotonic()
        for attempt in range(self._attempts):
            self._breaker.admit()
            within = self._backend
            if self._deadline is not None:
                within = _Within(within, self._deadline - (monotonic() - started), self._threads)
            try:
                scores = yield Ask(within, conversations)
            except BackendUnavailable:
                self._breaker.failed()
                pause = uniform(0.5, 1) * _PAUSE * 2**attempt  # noqa: S311 - spread, not a secret
                left = inf if self._deadline is None else self._deadline - (monotonic() - started)
                if attempt + 1 == self._attempts or left <= pause:
                    raise
            except BackendError:
                # It is there, and said so.
                self._breaker.passed()
                raise
            else:
                self._breaker.passed()
                return scores
            yield Ask(_Pause(pause), ())
        raise AssertionError  # the last attempt returns or raises


class _Breaker:
    """Whether a backend is worth asking. Shared by threads and tasks."""

    def __init__(self, name: str, failures: int, cooldown: float) -> None:
        self._name = name
        self._most = failures
        self._cooldown = cooldown
        self._failures = 0
        self._next_trial = 0.0
        self._lock = Lock()

    @property
    def state(self) -> State:
        if self._failures < self._most:
            return "closed"
        return "half-open" if monotonic() >= self._next_trial else "open"

    def admit(self) -> None:
        """Let a call through, or raise.

        A trial that is never heard of again, because its caller was cancelled, is followed by another like any other.
        """
        if self._failures < self._most:
            return
        with self._lock:
            now = monotonic()
            if now < self._next_trial:
                again = f"it is tried again in {self._next_trial - now:.1f} s"
                raise BackendUnavailable(f"{self._name}: not asked after {self._failures} failures in a row; {again}")
            self._next_trial = now + self._cooldown

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures == self._most:
                self._next_trial = monotonic() + self._cooldown

    def passed(self) -> None:
        # Most calls find it so, and take no lock.
        if self._failures:
            with self._lock:
                self._failures = 0


class _Threads:
    """Threads that calls without an event loop run on, as they can be left behind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._hung = 0
        self._lock = Lock()

    def call(self, backend: Backend, conversations: Sequence[Conversation], seconds: float) -> list[Scores]:
        if self._hung >= _MOST_HUNG:
            raise BackendUnavailable(f"{self.name}: {self._hung} earlier calls have not come back")
        answer: Future[list[Scores]] = Future()
        context = copy_context()

        def ask() -> None:
            try:
                answer.set_result(context.run(backend.classify, conversations))
            except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
                answer.set_exception(error)

        # No thread of a pool: Python waits for those before it ends.
        Thread(target=ask, name=f"guardmw {self.name}", daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError:
            if answer.done():
                raise
        with self._lock:
            self._hung += 1
        answer.add_done_callback(self._back)
        raise _late(self.name, seconds)

    def _back(self, _: object) -> None:
        with self._lock:
            self._hung -= 1


class _Within:
    """A backend, for so many seconds."""

    def __init__(self, backend: Backend, seconds: float, threads: _Threads) -> None:
        self.name = backend.name
        self._backend = backend
        self._seconds = seconds
        self._threads = threads

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        return self._threads.call(self._backend, conversations, self._seconds)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                return await self._backend.aclassify(conversations)
        except TimeoutError:
            if not limit.expired():
                raise
        raise _late(self.name, self._seconds)


class _Pause:
    """An errand that only takes time."""

    name = "pause"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        sleep(self._seconds)
        return []

    async def aclassify(self, _: Sequence[Conversation]) -> list[Scores]:
        await asyncio.sleep(self._seconds)
        return []


def _has_lanes(backend: object) -> bool:
    """Whether there is a Batched in it, however deep within guardmw's own."""
    if isinstance(backend, Batched) or not type(backend).__module__.startswith("guardmw."):
        return isinstance(backend, Batched)
    return any(map(_has_lanes, (getattr(backend, "_backend", None), *getattr(backend, "tiers", ()))))


def _late(name: str, seconds: float) -> BackendUnavailable:
    return BackendUnavailable(f"{name}: no answer in {seconds:.3g} s")
