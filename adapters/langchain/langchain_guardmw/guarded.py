"""``guarded()``: a whole chain that refuses where a guard in it, or around it, says no."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSequence, RunnableSerializable
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.fallbacks import RunnableWithFallbacks
from pydantic import ConfigDict, Field, InstanceOf

from langchain_guardmw.gate import Around, Gate, as_guard
from langchain_guardmw.model import GuardedModel
from langchain_guardmw.outcome import REFUSAL
from langchain_guardmw.runnable import GuardRunnable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from guardmw import Backend, Guard


def guarded(
    chain: Runnable[Any, Any], g: Guard | Backend | str | None = None, *, refusal: str = REFUSAL
) -> GuardedChain:
    """A chain that answers with a refusal where ``guard()`` would raise, before its stream and in the middle of it.

    What goes in and what comes out is judged, the answer in the light of the question. A Blocked that the chain raises
    itself becomes a refusal as well. In a stream, what was released stays, and the refusal is the last chunk.

    A refusal is a str or a message, whichever the chain returns. A chain that returns anything else, or does not tell
    (``chain.with_types(output_type=str)`` tells), still raises Blocked.

    Args:
        chain: anything that can be run.
        g: as in ``guard()``; but where None is given and the chain is a sequence with guards of its own, only those.
        refusal: what a refusal says.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: the chain is nothing that can be run.
    """
    if not isinstance(chain, Runnable):
        raise TypeError(f"give a chain, a model or another Runnable, not {type(chain).__name__}")
    gate = Gate(as_guard(g), "output", "refuse", refusal=refusal)
    if g is None and _has_guards(chain):
        return GuardedChain(chain=chain, around=Around(gate, "off", output=False))
    return GuardedChain(chain=chain, around=Around(gate))


class GuardedChain(RunnableSerializable[Any, Any]):
    """The chain that ``guarded()`` makes.

    Attributes:
        chain: what is run.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    name: str | None = "guarded"
    chain: Runnable[Any, Any]
    around: InstanceOf[Around] = Field(repr=False)

    @property
    def InputType(self) -> Any:  # noqa: ANN401, N802 - langchain-core's name
        """The chain's."""
        return self.chain.InputType

    @property
    def OutputType(self) -> Any:  # noqa: ANN401, N802 - langchain-core's name
        """The chain's."""
        return self.chain.OutputType

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002, ANN401, D102
        return self._call_with_config(self._invoke, input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002, ANN401, D102
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002, ANN401, D102
        yield from self._transform_stream_with_config(iter([input]), self._stream, config, **kwargs)

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:  # noqa: A002, ANN401, D102
        async def alone() -> AsyncIterator[Any]:
            yield input

        async for chunk in self._atransform_stream_with_config(alone(), self._astream, config, **kwargs):
            yield chunk

    def _invoke(self, value: Any, run_manager: object, config: RunnableConfig, **kwargs: Any) -> Any:  # noqa: ANN401, ARG002 - langchain-core's
        run = partial(self.chain.invoke, value, config, **kwargs)
        return self.around.call(value, run, empty=_empty(self.chain))

    async def _ainvoke(self, value: Any, run_manager: object, config: RunnableConfig, **kwargs: Any) -> Any:  # noqa: ANN401, ARG002 - langchain-core's
        run = partial(self.chain.ainvoke, value, config, **kwargs)
        return await self.around.acall(value, run, empty=_empty(self.chain))

    def _stream(
        self,
        values: Iterator[Any],
        run_manager: object,  # noqa: ARG002 - langchain-core's
        config: RunnableConfig,
        **kwargs: Any,  # noqa: ANN401
    ) -> Iterator[Any]:
        for value in values:
            run = partial(self.chain.stream, value, config, **kwargs)
            yield from self.around.stream(value, run, empty=_empty(self.chain, chunk=True))

    async def _astream(
        self,
        values: AsyncIterator[Any],
        run_manager: object,  # noqa: ARG002 - langchain-core's
        config: RunnableConfig,
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncIterator[Any]:
        async for value in values:
            run = partial(self.chain.astream, value, config, **kwargs)
            async for chunk in self.around.astream(value, run, empty=_empty(self.chain, chunk=True)):
                yield chunk


def _empty(chain: Runnable[Any, Any], *, chunk: bool = False) -> Any:  # noqa: ANN401 - of the type the chain returns
    """An answer of the chain's that says nothing; None if it returns neither messages nor str."""
    kind = _answer(chain)
    if kind is str:
        return ""
    if kind == AnyMessage or (isinstance(kind, type) and issubclass(kind, BaseMessage)):
        return AIMessageChunk(content="") if chunk else AIMessage("")
    return None


def _answer(runnable: Runnable[Any, Any]) -> Any:  # noqa: ANN401 - a type, or what stands for one
    """The type of what it returns; guards return what they are given."""
    if isinstance(runnable, RunnableSequence):
        answers = [step for step in runnable.steps if not isinstance(_bare(step), GuardRunnable)]
        return _answer(answers[-1]) if answers else None
    if isinstance(runnable, RunnableBindingBase) and runnable.custom_output_type is None:
        return _answer(runnable.bound)
    if isinstance(runnable, RunnableWithFallbacks):
        return _answer(runnable.runnable)
    try:
        return runnable.OutputType
    except TypeError:  # what a runnable raises that cannot tell
        return None


def _has_guards(chain: Runnable[Any, Any]) -> bool:
    chain = _bare(chain)
    if isinstance(chain, RunnableSequence):
        return any(map(_has_guards, chain.steps))
    return isinstance(chain, GuardRunnable | GuardedModel | GuardedChain)


def _bare(runnable: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """What it is without what is bound to it."""
    return _bare(runnable.bound) if isinstance(runnable, RunnableBindingBase) else runnable
