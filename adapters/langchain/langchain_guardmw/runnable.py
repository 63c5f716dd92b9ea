"""``guard()``: a step of a chain that lets through what the guard allows, unchanged, and nothing else."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any

from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field

from guardmw import Blocked, Guard
from guardmw.conversation import Stage  # noqa: TC001 - pydantic reads the annotation
from langchain_guardmw.gate import Gate, OnBlock, as_guard
from langchain_guardmw.held import Mode  # noqa: TC001 - pydantic reads the annotation
from langchain_guardmw.outcome import is_failure
from langchain_guardmw.upstream import AsyncUpstream, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from langchain_core.runnables import Runnable

    from guardmw import Backend, Conversation, Verdict


def guard(
    g: Guard | Backend | str | None = None,
    *,
    stage: Stage | None = None,
    on_block: OnBlock = "raise",
    stream: Mode = "hold",
    leak: int = 0,
    escalate: Backend | str | None = None,
) -> GuardRunnable:
    """A Runnable that judges what passes it, and returns the very same object if that is safe.

    It reads prompts, messages, strings, documents, dicts, and lists of them: text, reasoning, tool calls, invalid ones,
    artifacts. Every message of a prompt or a list is judged, each with those before it as context, in one batch. What
    cannot be judged (an image, bytes) makes a verdict partial, and the policy's ``on_partial`` decides.

    A verdict of review withholds like one of block: nobody stands beside a chain whom it could ask.

    Args:
        g: a Guard; a Backend or its spec, judged by the default policy; None for the embedded model, which all such
            guards of a process share and the first to be used loads.
        stage: what text is that has no speaker of its own (a str, a dict's values). None: a str is input; it is output
            if it comes in several chunks, or from a parser behind a chat model. Behind an LLM that is no chat model,
            say "output".
        on_block: "raise" Blocked; or "refuse": an AIMessage, AIMessageChunk or str is replaced by one that says
            ``REFUSAL``. Anything else raises still, as its refusal would be put to the model as a prompt: in front of a
            model, raise.
        stream: "hold" lets text go sentence by sentence, as it is judged; "buffer" lets go of everything when all of it
            has been judged; "observe" holds nothing and tells of a block only when all is out: it leaks.
        leak: how many characters may go out before they are judged ("hold" only). Tool calls never do.
        escalate: who is asked where g is in doubt, as in ``Guard(escalate=…)``: a Backend, a spec, or a server's URL.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: a Guard was given, and somebody to escalate to.
        ValueError: stage, on_block, stream or leak is none of those that there are.
    """
    gate = Gate(as_guard(g, escalate=escalate), stage, on_block, stream, leak)
    return GuardRunnable(guard=gate.guard, stage=stage, on_block=on_block, mode=stream, leak=leak)


class GuardRunnable(RunnableSerializable[Any, Any]):
    """The step that ``guard()`` makes.

    In every way of running: Blocked is raised, or a refusal returned, where a verdict withholds. A batch is judged in
    one call of the backend.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    name: str | None = "guard"
    guard: Guard | None = None
    stage: Stage | None = None
    on_block: OnBlock = "raise"
    mode: Mode = "hold"
    leak: Annotated[int, Field(ge=0)] = 0

    @property
    def InputType(self) -> Any:  # noqa: ANN401, N802 - langchain-core's name; every type is welcome
        """Anything."""
        return Any

    @property
    def OutputType(self) -> Any:  # noqa: ANN401, N802 - langchain-core's name; what came in goes out
        """Anything."""
        return Any

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002, ANN401, ARG002, D102
        return self._call_with_config(self._screen, input, config, run_type="chain")

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002, ANN401, ARG002, D102
        return await self._acall_with_config(self._ascreen, input, config, run_type="chain")

    def batch(  # noqa: D102
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> list[Any]:
        return self._batch_with_config(
            self._screen_many, inputs, config, return_exceptions=return_exceptions, run_type="chain"
        )

    async def abatch(  # noqa: D102
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> list[Any]:
        return await self._abatch_with_config(
            self._ascreen_many, inputs, config, return_exceptions=return_exceptions, run_type="chain"
        )

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002, ANN401, D102
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:  # noqa: A002, ANN401, D102
        async def alone() -> AsyncIterator[Any]:
            yield input

        async for chunk in self.atransform(alone(), config, **kwargs):
            yield chunk

    def transform(  # noqa: D102
        self,
        input: Iterator[Any],  # noqa: A002 - langchain-core's name
        config: RunnableConfig | None = None,
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> Iterator[Any]:
        upstream = Upstream(iter(input))
        released = self._transform_stream_with_config(
            upstream, partial(self._transform, upstream=upstream), config, run_type="chain"
        )
        # Not `yield from`: where the caller stops reading, what is above has to close before langchain-core reads on.
        try:
            for chunk in released:  # noqa: UP028 - see above
                yield chunk
        finally:
            upstream.close()

    async def atransform(  # noqa: D102
        self,
        input: AsyncIterator[Any],  # noqa: A002 - langchain-core's name
        config: RunnableConfig | None = None,
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> AsyncIterator[Any]:
        upstream = AsyncUpstream(aiter(input))
        released = self._atransform_stream_with_config(
            upstream, partial(self._atransform, upstream=upstream), config, run_type="chain"
        )
        try:
            async for chunk in released:
                yield chunk
        finally:
            await upstream.aclose()

    def with_retry(  # noqa: D102
        self,
        *,
        retry_if_exception_type: tuple[type[BaseException], ...] | Callable[[BaseException], bool] = (Exception,),
        **kwargs: Any,  # noqa: ANN401
    ) -> Runnable[Any, Any]:
        return super().with_retry(retry_if_exception_type=is_failure(retry_if_exception_type), **kwargs)

    def _screen(self, value: Any) -> Any:  # noqa: ANN401 - what came in goes out
        return self._gate.screen(value)

    async def _ascreen(self, value: Any) -> Any:  # noqa: ANN401 - what came in goes out
        return await self._gate.ascreen(value)

    def _screen_many(self, values: list[Any]) -> list[Any]:
        gate = self._gate
        asked = [gate.asked(value) for value in values]
        return self._each_settled(values, asked, gate.ready().screen_many(chain.from_iterable(asked)))

    async def _ascreen_many(self, values: list[Any]) -> list[Any]:
        gate = self._gate
        asked = [gate.asked(value) for value in values]
        guard = await gate.aready()
        return self._each_settled(values, asked, await guard.ascreen_many(chain.from_iterable(asked)))

    def _transform(self, chunks: Iterator[Any], *, upstream: Upstream) -> Iterator[Any]:
        return self._gate.stream(chunks, upstream)

    def _atransform(self, chunks: AsyncIterator[Any], *, upstream: AsyncUpstream) -> AsyncIterator[Any]:
        return self._gate.astream(chunks, upstream)

    def _each_settled(
        self, values: list[Any], asked: list[list[Conversation]], verdicts: Sequence[Verdict]
    ) -> list[Any]:
        """One value or exception for each, as langchain-core wants a batch."""
        given = iter(verdicts)
        settled: list[Any] = []
        for value, conversations in zip(values, asked, strict=True):
            try:
                settled.append(self._gate.settled(value, list(islice(given, len(conversations)))))
            except Blocked as blocked:
                settled.append(blocked)
        return settled

    @property
    def _gate(self) -> Gate:
        return Gate(self.guard, self.stage, self.on_block, self.mode, self.leak)
