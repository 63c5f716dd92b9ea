"""Where the answer to an agent's model call comes from: the model, or a person who decided on what the model said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_guardmw.gate import Gate
from langchain_guardmw.model import as_chunk
from langchain_guardmw.outcome import refuses

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator

    from langchain_core.messages import BaseMessage

    from guardmw import Verdict
    from langchain_guardmw.calls import Calls
    from langchain_guardmw.gate import Source


class Kept:
    """A model's answer, kept for a person to decide on it.

    Attributes:
        answer: that is withheld; None where none is, or what was said is another guard's refusal.
        beside: other guards have an answer to judge, too.
    """

    def __init__(self, calls: Calls | None, *, beside: bool) -> None:
        self.answer: AIMessage | None = None
        self.beside = beside
        self._calls = calls
        self._said: list[Any] = []

    def withhold(self) -> None:
        """Keep what was said."""
        said = _merged(self._said) if self._said else None
        self.answer = None if said is None or refuses(said) else said

    def run(self, run: Callable[[], Any]) -> Any:  # noqa: ANN401, D102
        self._begin()
        self._said.append(self._calls.run(run) if self._calls else run())
        return self._said[0]

    async def arun(self, run: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ANN401, D102
        self._begin()
        self._said.append(await (self._calls.arun(run) if self._calls else run()))
        return self._said[0]

    def chunks(self, run: Callable[[], Iterator[Any]]) -> Iterator[Any]:  # noqa: D102
        self._begin()
        for chunk in self._calls.chunks(run) if self._calls else run():
            self._said.append(chunk)
            yield chunk

    async def achunks(self, run: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:  # noqa: D102
        self._begin()
        async for chunk in self._calls.achunks(run) if self._calls else run():
            self._said.append(chunk)
            yield chunk

    def _begin(self) -> None:
        # Another middleware may have the model asked twice.
        self.answer = None
        self._said = []


class Again:
    """An answer on which a person has decided: the model is not asked.

    Args:
        then: is given it as the model's.
    """

    def __init__(self, said: AIMessage, then: Source | None = None) -> None:
        self._said = ChatResult(generations=[ChatGeneration(message=said)])
        self._then = then

    @property
    def streamed(self) -> BaseMessage:
        """It, as it is once it has been streamed."""
        return message_chunk_to_message(as_chunk(self._said).message)

    def run(self, run: Callable[[], Any]) -> Any:  # noqa: ANN401, ARG002, D102
        return self._then.run(lambda: self._said) if self._then else self._said

    async def arun(self, run: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ANN401, ARG002, D102
        async def given() -> ChatResult:
            return self._said

        return await (self._then.arun(given) if self._then else given())

    def chunks(self, run: Callable[[], Iterator[Any]]) -> Iterator[Any]:  # noqa: ARG002, D102
        given = iter([as_chunk(self._said)])
        return self._then.chunks(lambda: given) if self._then else given

    def achunks(self, run: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:  # noqa: ARG002, D102
        async def given() -> AsyncGenerator[ChatGenerationChunk, None]:
            yield as_chunk(self._said)

        return self._then.achunks(given) if self._then else given()


@dataclass(frozen=True, slots=True)
class Telling(Gate):
    """Tells of each verdict by which it withholds."""

    tell: Callable[[Verdict], None] = field(kw_only=True)

    def withheld(self, value: object, verdict: Verdict, *, started: bool = False) -> Any:  # noqa: ANN401, D102
        self.tell(verdict)
        # Not super(): a class with slots is made anew.
        return Gate.withheld(self, value, verdict, started=started)


def _merged(said: list[Any]) -> AIMessage:
    """What a model said, in one message."""
    if isinstance(said[0], ChatResult):
        whole: Any = said[0].generations[0].message
        return whole  # type: ignore[no-any-return]
    merged: ChatGenerationChunk = said[0]
    for chunk in said[1:]:
        merged += chunk
    message: Any = message_chunk_to_message(merged.message)
    return message  # type: ignore[no-any-return]
