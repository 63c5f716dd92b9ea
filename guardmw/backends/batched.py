"""A backend that many ask at once: what waits goes in one batch, and who is alone does not wait."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING

from guardmw.backends._plan import Ask, Plan, arun, blocks_a_loop, run
from guardmw.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardmw.backends import Backend
    from guardmw.conversation import Conversation
    from guardmw.verdict import Scores

# How many of those that wait are looked at for a batch, in batches.
_LOOK_AHEAD = 4
# Texts of fewer characters are alike.
_SHORT = 64


class Batched:
    """Puts the conversations of callers that wait at the same time, threads and tasks alike, into common batches.

    It has no thread and no timer. A caller that finds a free lane asks the backend at once. The others wait; the first
    of them is handed the lane when it becomes free, and takes along as many of the rest as fit, but leaves the other
    lanes their share. Nobody waits for a batch to fill.

    A batch that fails is halved and asked again, until those who were not to blame have their answer; but where the
    backend is unavailable, all of it fails at once. One who is cancelled leaves the others their batch, which is asked
    in the context (``contextvars``) of whoever was handed the lane; a task that nobody waits for any more is cancelled,
    so that its lane is free. A thread cannot be: a deadline belongs inside, Batched(Resilient(x)), and around a Batched
    Resilient refuses to have one.

    Args:
        backend: what to ask.
        batch_size: conversations in a batch at most; a caller's own are not divided.
        lanes: batches at the same time: about as many as the backend has processors, or as a server takes.
        queue: conversations that may wait. More are refused with BackendUnavailable.

    Raises:
        BackendError: one of them makes no sense.
    """

    def __init__(self, backend: Backend, *, batch_size: int = 32, lanes: int = 1, queue: int = 16_384) -> None:
        if batch_size < 1 or lanes < 1 or queue < 1:
            raise BackendError("batch_size, lanes and queue are at least 1")
        self.name = backend.name
        self.thresholds: Mapping[str, float] = getattr(backend, "thresholds", {})
        self._backend = backend
        self._batch_size = batch_size
        self._free = self._lanes = lanes
        self._room = self._queue = queue
        self._waiting: OrderedDict[_Call, None] = OrderedDict()
        self._lock = Lock()
        # Event loops keep weak references only.
        self._tasks: set[asyncio.Task[list[Scores]]] = set()

    def __repr__(self) -> str:
        return f"Batched({self.name!r}, {len(self._waiting)} waiting)"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        if blocks_a_loop():
            # A task there may have the lane, and could not give it back.
            return self._backend.classify(conversations)
        return run(self._plan(conversations))

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch without blocking the event loop."""
        return await arun(self._plan(conversations))

    def _plan(self, conversations: Sequence[Conversation]) -> Plan[list[Scores]]:
        if not conversations:
            return []
        call = self._enter(conversations)
        if call is None:
            try:
                return (yield Ask(self._backend, conversations))
            finally:
                self._hand_over()
        try:
            yield Ask(_Turn(self, call), ())
            if call.leads:
                yield Ask(_Lead(self, self._taken(call)), ())
        finally:
            self._leave(call)
        if call.failure:
            raise call.failure
        return call.scores

    def _enter(self, conversations: Sequence[Conversation]) -> _Call | None:
        """A place among those that wait; None where there is a free lane, which is taken."""
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            if len(conversations) > self._room:
                raise BackendUnavailable(f"{self.name}: the queue is full")
            self._room -= len(conversations)
            call = _Call(conversations)
            self._waiting[call] = None
            return call

    def await_turn(self, call: _Call, wake: Callable[[], object]) -> bool:
        """Whether there is something to wait for; ``wake`` is called when that is over."""
        with self._lock:
            if call.leads or call.settled:
                return False
            call.wake = wake
            return True

    def _hand_over(self) -> None:
        """Give the lane to who has waited longest."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                call, _ = self._waiting.popitem(last=False)
                self._room += len(call.conversations)
                call.leads = True
            try:
                call.wake()
            except RuntimeError:
                # Its event loop was closed on it.
                with self._lock:
                    if call.gone:
                        return
                    call.leads = False
                continue
            return

    def _taken(self, leader: _Call) -> list[_Call]:
        """The batch of one who was handed the lane, with those of like length among the ones that wait."""
        with self._lock:
            leader.led = True
            # All that waits in one batch would leave the other lanes with nothing to do.
            share = -(-(self._queue - self._room + len(leader.conversations)) // self._lanes)
            batch, left = [leader], min(self._batch_size, share) - len(leader.conversations)
            passed: list[_Call] = []
            while self._waiting and left > 0 and len(passed) < _LOOK_AHEAD * self._batch_size:
                call, _ = self._waiting.popitem(last=False)
                # Backends fill all of a batch up to its longest.
                if len(call.conversations) <= left and abs(call.length - leader.length) <= 1:
                    batch.append(call)
                    left -= len(call.conversations)
                else:
                    passed.append(call)
            self._wait_again(passed)
            self._room += sum(len(call.conversations) for call in batch[1:])
            return batch

    def _wait_again(self, calls: Sequence[_Call]) -> None:
        """Put calls back in front of all others; the lock is taken."""
        for call in reversed(calls):
            self._waiting[call] = None
            self._waiting.move_to_end(call, last=False)

    def _leave(self, call: _Call) -> None:
        """End a call: answered, failed, or given up at any point."""
        with self._lock:
            call.gone = True
            if call in self._waiting:
                del self._waiting[call]
                self._room += len(call.conversations)
            dropped = call.leads and not call.led
            left = [other for other in call.batch if not other.settled]
            abandoned = bool(left) and all(other.gone for other in left)
        if dropped:
            self._hand_over()
        if abandoned:
            with suppress(RuntimeError):  # its event loop was closed
                call.abandon()

    def batch(self, calls: list[_Call]) -> Plan[list[Scores]]:
        """Ask for all of them."""
        parts = [calls]
        while parts:
            part = parts.pop()
            try:
                given = yield Ask(self._backend, [one for call in part for one in call.conversations])
            except BackendUnavailable as error:
                self._settle([call for part_ in (part, *parts) for call in part_], failure=error)
                break
            except BackendError as error:
                if len(part) == 1:
                    self._settle(part, failure=error)
                else:
                    half = len(part) // 2
                    parts += [part[half:], part[:half]]
            else:
                self._settle(part, given)
        return []

    def done(self, calls: list[_Call]) -> None:
        """Give the lane to the next, when a batch was asked or cut off. Its leader, who was so too, is not among them.

        The others know nothing of it, and wait again.
        """
        with self._lock:
            for call in calls:
                call.batch, call.abandon = (), _nobody
            left = [call for call in calls[1:] if not (call.settled or call.gone)]
            self._wait_again(left)
            self._room -= sum(len(call.conversations) for call in left)
        self._hand_over()

    def _settle(
        self, calls: Sequence[_Call], scores: Sequence[Scores] = (), *, failure: BackendError | None = None
    ) -> None:
        at = 0
        for call in calls:
            size = len(call.conversations)
            with self._lock:
                call.scores, call.failure, call.settled = list(scores[at : at + size]), failure, True
            at += size
            try:
                call.wake()
            except RuntimeError:
                # Its event loop was closed on it, and nobody is left to hear.
                continue

    def task(self, calls: list[_Call]) -> asyncio.Task[list[Scores]]:
        """``batch`` and ``done`` as a task of its own, which goes on where its leader is cancelled and others wait."""
        task = asyncio.create_task(arun(self.batch(calls)))
        loop = asyncio.get_running_loop()
        with self._lock:
            for call in calls:
                call.batch, call.abandon = calls, partial(loop.call_soon_threadsafe, task.cancel)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Not within the task, which may be cancelled before it begins.
        task.add_done_callback(lambda _: self.done(calls))
        return task


class _Call:
    """A caller that waits.

    Attributes:
        length: of the longest text; 1 more is about twice as long.
        leads, led: it was handed the lane, and has taken a batch.
        settled: it has its scores or its failure.
        gone: nobody waits for it any more.
        batch, abandon: the calls that a task asks for together with it, and what ends that task.
    """

    __slots__ = (
        "abandon",
        "batch",
        "conversations",
        "failure",
        "gone",
        "leads",
        "led",
        "length",
        "scores",
        "settled",
        "wake",
    )

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.length = (max(len(conversation.last.text) for conversation in conversations) // _SHORT).bit_length()
        self.scores: list[Scores] = []
        self.failure: BackendError | None = None
        self.leads = self.led = self.settled = self.gone = False
        self.wake: Callable[[], object] = _nobody
        self.batch: Sequence[_Call] = ()
        self.abandon: Callable[[], object] = _nobody


def _nobody() -> None:
    """Nobody is waiting yet."""


class _Turn:
    """An errand: waiting to be answered, or to be handed the lane."""

    name = "batched"

    def __init__(self, batched: Batched, call: _Call) -> None:
        self._batched = batched
        self._call = call

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        over = Event()
        if self._batched.await_turn(self._call, over.set):
            over.wait()
        return []

    async def aclassify(self, _: Sequence[Conversation]) -> list[Scores]:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        if self._batched.await_turn(self._call, lambda: loop.call_soon_threadsafe(_end, over)):
            await over
        return []


class _Lead:
    """An errand: asking for a batch."""

    name = "batched"

    def __init__(self, batched: Batched, calls: list[_Call]) -> None:
        self._batched = batched
        self._calls = calls

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        try:
            return run(self._batched.batch(self._calls))
        finally:
            self._batched.done(self._calls)

    async def aclassify(self, _: Sequence[Conversation]) -> list[Scores]:
        if len(self._calls) > 1:
            return await asyncio.shield(self._batched.task(self._calls))
        try:
            return await arun(self._batched.batch(self._calls))
        finally:
            self._batched.done(self._calls)


def _end(wait: asyncio.Future[None]) -> None:
    if not wait.done():
        wait.set_result(None)
