"""The stream a guard reads from, which it can close for good."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from guardmw import Blocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextvars import Context

    from guardmw import Verdict

# langchain-core reads a step's input to its end, for tracing, when the step has ended, and in sync streams also when it
# is closed: a model would go on writing (and be paid for) after a block. It does not where an exception ends the step.


class Abandoned(Exception):  # noqa: N818 - a reason, not an error
    """Nobody reads the stream any more."""


class Upstream:
    """An iterator that ends when ``close`` is called, and closes what it iterates over.

    Args:
        context: what the chunks are made in; None for that of whoever reads.
    """

    def __init__(self, chunks: Iterator[Any], *, context: Context | None = None) -> None:
        self._chunks = chunks
        self._context = context

    def __iter__(self) -> Upstream:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - a chunk
        return self._context.run(next, self._chunks) if self._context else next(self._chunks)

    def close(self, verdict: Verdict | None = None) -> None:
        """Read no more; the steps above end by Blocked, or by Abandoned."""
        chunks, self._chunks = self._chunks, iter(())
        # Whatever a step does on its way out, what reaches the caller is the verdict.
        with suppress(Exception):
            if hasattr(chunks, "throw"):
                chunks.throw(Abandoned() if verdict is None else Blocked(verdict))
        with suppress(Exception):
            if hasattr(chunks, "close"):
                chunks.close()


class AsyncUpstream:
    """The same for an asynchronous iterator, where closing the steps above is enough."""

    def __init__(self, chunks: AsyncIterator[Any]) -> None:
        self._chunks = chunks
        self._closed = False

    def __aiter__(self) -> AsyncUpstream:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 - a chunk
        if self._closed:
            raise StopAsyncIteration
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Read no more."""
        self._closed = True
        with suppress(Exception):
            if hasattr(self._chunks, "aclose"):
                await self._chunks.aclose()


class Ahead:
    """An asynchronous stream that is read by a task of its own, which runs one chunk ahead and ends with ``aclose``.

    All of the stream is read by the same task, as streams that hold a timeout or a task group open need it.

    Args:
        context: what the task runs in; None for a copy of the current one.
    """

    def __init__(self, chunks: AsyncIterator[Any], *, context: Context | None = None) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
        self._end: BaseException | None = None
        self._task = asyncio.create_task(self._read(chunks), context=context)

    def __aiter__(self) -> Ahead:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 - a chunk
        if self._end is None or not self._queue.empty():
            chunk = await self._queue.get()
            if chunk is not self:
                return chunk
        raise self._end or StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the task, and wait until it has closed the stream."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self, chunks: AsyncIterator[Any]) -> None:
        try:
            async with aclosing(AsyncUpstream(aiter(chunks))) as upstream:
                async for chunk in upstream:
                    await self._queue.put(chunk)
            self._end = StopAsyncIteration()
        except BaseException as error:  # noqa: BLE001 - the reader's to raise
            self._end = error
        # Wakes a reader. None waits where the queue is full.
        with suppress(asyncio.QueueFull):
            self._queue.put_nowait(self)
