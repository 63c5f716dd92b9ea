"""One event loop on a thread of its own, for callers on any thread and in any event loop."""

# A pool of connections belongs to one event loop. With a pool for each of the callers' loops, nothing bounds their
# sum, and those of a loop that ended stay open; and only an event loop can break off whatever takes too long.

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from guardmw.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future


_TURNS, _TURN_S = 10, 0.003


class Held(Protocol):
    """What the loop works with."""

    async def aclose(self) -> None:
        """Let go of it, on the loop."""


H = TypeVar("H", bound=Held)
T = TypeVar("T")


class Aside(Generic[H]):
    """Runs coroutines on one thread, which starts with the first and ends with ``close`` or with this object.

    Args:
        make: what they work with; made anew after ``close`` and after a fork.
        name: of the thread.
    """

    def __init__(self, make: Callable[[], H], name: str) -> None:
        self._make = make
        self._name = name
        self._lock = threading.Lock()
        self._running: _Running[H] | None = None
        self._end: Callable[[], object] = _nothing

    def run(self, work: Callable[[H], Coroutine[Any, Any, T]]) -> T:
        """Wait for it on this thread."""
        future = self._submit(work)
        try:
            return _result(future.result())
        finally:
            # Ctrl-C must not leave it running.
            future.cancel()

    async def arun(self, work: Callable[[H], Coroutine[Any, Any, T]]) -> T:
        """Wait for it on this event loop; whoever is cancelled here cancels it there."""
        return _result(await asyncio.wrap_future(self._submit(work)))

    def close(self) -> None:
        """End the thread, and what runs on it; another call starts a new one."""
        with self._lock:
            end, self._end, self._running = self._end, _nothing, None
        end()

    def _submit(self, work: Callable[[H], Coroutine[Any, Any, T]]) -> Future[T | _Closed]:
        with self._lock:
            running = self._running
            if running is None or running.process != os.getpid():
                running = self._running = _Running(self._make)
                thread = threading.Thread(target=running.live, name=self._name, daemon=True)
                self._end = weakref.finalize(self, running.end, thread)
                thread.start()
            return asyncio.run_coroutine_threadsafe(running.do(work), running.loop)


class _Running(Generic[H]):
    """A loop, what it works with, and how both end. It knows nothing of who started it, who thus can be forgotten."""

    def __init__(self, make: Callable[[], H]) -> None:
        self.loop = asyncio.new_event_loop()
        self.process = os.getpid()
        self._make = make
        self._held: H | None = None
        self._works: set[asyncio.Task[Any]] = set()
        self._ended = asyncio.Event()

    def live(self) -> None:
        """Be the thread."""
        try:
            self.loop.run_until_complete(self._until_ended())
        finally:
            self.loop.close()

    def end(self, thread: threading.Thread) -> None:
        """Called once, from any thread, this one included."""
        if self.process != os.getpid():
            return
        self.loop.call_soon_threadsafe(self._ended.set)
        if thread is not threading.current_thread():
            thread.join()

    async def do(self, work: Callable[[H], Coroutine[Any, Any, T]]) -> T | _Closed:
        """The work, on the loop."""
        if self._held is None:
            self._held = self._make()
        task = asyncio.current_task()
        if task is not None:
            self._works.add(task)
            task.add_done_callback(self._works.discard)
        try:
            return await work(self._held)
        except asyncio.CancelledError:
            if not self._ended.is_set():
                raise
        # Not raised: asyncio complains of an error that nobody waits for any more.
        return _Closed()

    async def _until_ended(self) -> None:
        await self._ended.wait()
        works = list(self._works)
        for task in works:
            task.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        if self._held is not None:
            await self._held.aclose()
        # A closed transport lets go of its socket some turns of the loop later, one in a TLS handshake after the
        # selector has been asked again.
        for _ in range(_TURNS):
            await asyncio.sleep(_TURN_S)


class _Closed:
    """What work comes to that was closed while it was under way."""


def _result(came: T | _Closed) -> T:
    if isinstance(came, _Closed):
        raise BackendUnavailable("it was closed while a call was under way")
    return came


def _nothing() -> None:
    """There is no thread to end."""
