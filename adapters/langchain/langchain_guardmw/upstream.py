"""The stream a guard reads from, which it can close for good."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from guardmw import Blocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from guardmw import Verdict

# langchain-core reads a step's input to its end, for tracing, when the step has ended, and in sync streams also when it
# is closed: a model would go on writing (and be paid for) after a block. It does not where an exception ends the step.


class Abandoned(Exception):  # noqa: N818 - a reason, not an error
    """Nobody reads the stream any more."""


class Upstream:
    """An iterator that ends when ``close`` is called, and closes what it iterates over."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Upstream:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - a chunk
        return next(self._chunks)

    def close(self, verdict: Verdict | None = None) -> None:
        """Read no more; the steps above end by Blocked, or by Abandoned."""
        chunks, self._chunks = self._chunks, iter(())
        # Whatever a step does on its way out, what reaches the caller is the verdict.
        with suppress(Exception):
            if hasattr(chunks, "throw"):
                chunks.throw(Blocked(verdict) if verdict else Abandoned())
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
