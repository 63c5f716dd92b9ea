"""A guard at work on LangChain values: alone, as they stream, and on both sides of a call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

from langchain_core.runnables.config import ContextThreadPoolExecutor
from pydantic import ValidationError

from guardmw import Backend, Blocked, Guard
from guardmw.conversation import STAGES
from langchain_guardmw.held import Held, Mode
from langchain_guardmw.outcome import REFUSAL, refusal, strictest
from langchain_guardmw.parts import CONTEXT_TURNS, parts, within
from langchain_guardmw.upstream import Ahead, AsyncUpstream, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
    from contextvars import Context

    from guardmw import Conversation, Turn, Verdict
    from guardmw.conversation import Stage
    from langchain_guardmw.calls import Calls

T = TypeVar("T")

OnBlock = Literal["raise", "refuse"]
Input = Literal["before", "parallel", "off"]
# Asked for at every turn of an agent, and typing is slow to ask.
_INPUTS = get_args(Input)


def as_guard(g: Guard | Backend | str | None, *, escalate: Backend | str | None = None) -> Guard | None:
    """What users give for a guard, as one; None stays None, for the embedded model.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: it is none of these, or a Guard that is to escalate.
    """
    if escalate is not None and isinstance(g, Guard):
        raise TypeError("a Guard is made with whom it escalates to: Guard(…, escalate=…)")
    if escalate is not None and g is None:
        g = "embedded"
    if isinstance(g, str | Backend):
        return Guard(g, escalate=escalate)
    if g is not None and not isinstance(g, Guard):
        raise TypeError(f"give a Guard, a Backend, a spec or None, not {type(g).__name__}")
    return g


@dataclass(frozen=True, slots=True)
class Gate:
    """Lets values through that the guard allows, unchanged. In place of others: Blocked, or a refusal.

    Attributes: as in ``guard()``.
        refusal: what a refusal says.

    Raises:
        ValueError: one of them is none of those that there are.
    """

    guard: Guard | None = None
    stage: Stage | None = None
    on_block: OnBlock = "raise"
    mode: Mode = "hold"
    leak: int = 0
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        for name, given, known in (
            ("stage", self.stage, (None, *STAGES)),
            ("on_block", self.on_block, get_args(OnBlock)),
            ("stream", self.mode, get_args(Mode)),
        ):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}")
        if not isinstance(self.leak, int) or self.leak < 0:
            raise ValueError("leak is a number of characters, 0 or more")

    def screen(self, value: T, context: tuple[Turn, ...] = ()) -> T:
        """Judge a whole value, said after these turns."""
        return self.settled(value, self.ready().screen_many(self.asked(value, context)))

    async def ascreen(self, value: T, context: tuple[Turn, ...] = ()) -> T:
        """``screen``, without blocking the event loop."""
        guard = await self.aready()
        return self.settled(value, await guard.ascreen_many(self.asked(value, context)))

    def stream(
        self,
        chunks: Iterable[T],
        upstream: Upstream,
        context: tuple[Turn, ...] = (),
        calls: Calls | None = None,
    ) -> Iterator[T]:
        """Judge what streams; a block closes ``upstream``, where the chunks come from.

        Its tool calls are left out if they have been judged elsewhere, as ``calls`` may know.
        """
        guard, held = self.ready(), self._held(context, calls)
        for chunk in chunks:
            if asked := held.feed(chunk):
                held.take(guard.screen_many(asked))
            yield from held.released()
            if held.verdict is not None:
                break
        else:
            held.take(guard.screen_many(held.end()))
            yield from held.released()
        if held.verdict is not None:
            upstream.close(held.verdict)
            yield self.withheld(held.last, held.verdict, started=held.started)

    async def astream(
        self,
        chunks: AsyncIterator[T],
        upstream: Ahead | AsyncUpstream,
        context: tuple[Turn, ...] = (),
        calls: Calls | None = None,
    ) -> AsyncGenerator[T, None]:
        """``stream``, without blocking the event loop."""
        guard, held = await self.aready(), self._held(context, calls)
        async for chunk in chunks:
            if asked := held.feed(chunk):
                held.take(await guard.ascreen_many(asked))
            for released in held.released():
                yield released
            if held.verdict is not None:
                break
        else:
            held.take(await guard.ascreen_many(held.end()))
            for released in held.released():
                yield released
        if held.verdict is not None:
            await upstream.aclose()
            yield self.withheld(held.last, held.verdict, started=held.started)

    def asked(self, value: object, context: tuple[Turn, ...] = ()) -> list[Conversation]:
        """What is to be judged in a value."""
        return [within(context, part.conversation) for part in parts(value, self.stage)]

    def settled(self, value: T, verdicts: Sequence[Verdict]) -> T:
        """The value, if these verdicts on it let it pass."""
        verdict = strictest(verdicts)
        return value if verdict is None else self.withheld(value, verdict)

    def withheld(self, value: object, verdict: Verdict, *, started: bool = False) -> Any:  # noqa: ANN401 - of its type
        """What stands in the place of a value, or of the rest of a stream; or Blocked."""
        if self.on_block == "raise":
            raise Blocked(verdict)
        return refusal(value, verdict, text=f"\n\n{self.refusal}" if started else self.refusal)

    def ready(self) -> Guard:
        """The guard; the embedded model is loaded here."""
        return self.guard or _embedded()

    async def aready(self) -> Guard:
        """``ready``, without blocking the event loop: loading takes half a second."""
        if self.guard or _loaded.cache_info().currsize:
            return self.ready()
        return await asyncio.to_thread(_embedded)

    def _held(self, context: tuple[Turn, ...], calls: Calls | None) -> Held:
        return Held(self.mode, stage=self.stage, leak=self.leak, context=context, calls=calls)


class Source(Protocol):
    """Where an answer comes from: it is given the call that would ask, and may answer in its place."""

    def run(self, run: Callable[[], Any]) -> Any:  # noqa: ANN401 - the call's
        """The whole answer."""

    async def arun(self, run: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ANN401 - the call's
        """``run``, without blocking the event loop."""

    def chunks(self, run: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The answer as it comes."""

    def achunks(self, run: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
        """``chunks``, without blocking the event loop."""


@dataclass(frozen=True, slots=True)
class Around:
    """Judges what goes into a call before it runs or meanwhile, and what comes out, in its light, before it is seen.

    Blocked, by whomever it was raised, is what the gate makes of it: Blocked still, or a refusal. A ValueError, which
    is what parsers raise, quotes the answer that it could not read, and is judged as that.

    Attributes:
        gate: judges what comes out.
        input: when what goes in is judged. "parallel": nothing comes out before its verdict; a block cancels the call.
        output: whether what comes out is judged.
        calls: in what comes out, if they may have been judged elsewhere.
        source: where it comes from, if not from the call alone.
    """

    gate: Gate
    input: Input = "before"
    output: bool = True
    calls: Calls | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.input not in _INPUTS:
            raise ValueError(f"input is one of {', '.join(map(repr, _INPUTS))}")

    def call(self, value: object, run: Callable[[], T], *, empty: T, context: Context | None = None) -> T:
        """What ``run`` returns, once judged; a refusal is made of ``empty`` where it returned nothing."""
        asked, before = self.read(value)
        if self.source:
            run = partial(self.source.run, run)
        try:
            try:
                answer = self._begin(asked, partial(context.run, run) if context else run)
            except ValueError as error:
                failed = error
            else:
                if not self.output:
                    return answer
                return self.gate.settled(answer, self.gate.ready().screen_many(self.spoken(answer, before)))
            if self.output:
                self.gate.screen(quoted(failed), before)
            raise failed
        except Blocked as blocked:
            return self._refused(empty, blocked)

    async def acall(self, value: object, run: Callable[[], Coroutine[Any, Any, T]], *, empty: T) -> T:
        """``call``; where it is judged meanwhile, the call is a task, which is awaited even where it is cancelled."""
        asked, before = self.read(value)
        if self.source:
            run = partial(self.source.arun, run)
        try:
            try:
                answer = await self._abegin(asked, run)
            except ValueError as error:
                failed = error
            else:
                if not self.output:
                    return answer
                guard = await self.gate.aready()
                return self.gate.settled(answer, await guard.ascreen_many(self.spoken(answer, before)))
            if self.output:
                await self.gate.ascreen(quoted(failed), before)
            raise failed
        except Blocked as blocked:
            return self._refused(empty, blocked)

    def stream(
        self, value: object, run: Callable[[], Iterator[T]], *, empty: T, context: Context | None = None
    ) -> Iterator[T]:
        """The chunks of ``run()``, each once it has been judged; a refusal ends them, or is all there is."""
        answer = self.source.chunks(run) if self.source else run()
        last, refused, failed, upstream = None, None, None, Upstream(answer, context=context)
        asked, before = self.read(value)
        try:
            try:
                first = self._begin(asked, lambda: list(islice(upstream, 1)))
                chunks: Iterable[T] = chain(first, upstream)
                for last in self.gate.stream(chunks, upstream, before, self.calls) if self.output else chunks:
                    yield last
            except ValueError as error:
                failed = error
            if failed is not None:
                if self.output:
                    self.gate.screen(quoted(failed), before)
                raise failed
        except Blocked as blocked:
            refused = blocked
        finally:
            upstream.close()
        if refused:
            yield self._refused(empty if last is None else last, refused, started=last is not None)

    async def astream(
        self, value: object, run: Callable[[], AsyncIterator[T]], *, empty: T, context: Context | None = None
    ) -> AsyncGenerator[T, None]:
        """``stream``; the chunks are read by a task, which is awaited even where it is cancelled."""
        last, refused, failed, upstream = None, None, None, None
        asked, before = self.read(value)
        if self.source:
            run = partial(self.source.achunks, run)
        try:
            try:
                if self.input == "parallel":
                    upstream = Ahead(run(), context=context)
                await self._aadmit(asked)
                upstream = upstream or Ahead(run(), context=context)
                released = self.gate.astream(upstream, upstream, before, self.calls) if self.output else upstream
                # Closed by nobody: the event loop, when it ends, closes all generators at once, each of them once.
                async for last in released:
                    yield last
            except ValueError as error:
                failed = error
            if failed is not None:
                if self.output:
                    await self.gate.ascreen(quoted(failed), before)
                raise failed
        except Blocked as blocked:
            refused = blocked
        finally:
            if upstream:
                await upstream.aclose()
        if refused:
            yield self._refused(empty if last is None else last, refused, started=last is not None)

    def read(self, value: object) -> tuple[list[Conversation], tuple[Turn, ...]]:
        """What is to be judged of what goes in, and the turns in whose light what comes out is judged."""
        if self.input == "off":
            if not self.output:
                return [], ()
            if isinstance(value, list):
                # Only the answer's context is wanted, which must not cost more the longer the conversation is.
                value = value[-CONTEXT_TURNS:]
        asked = [part.conversation for part in parts(value)]
        return asked, tuple(conversation.last for conversation in asked[-CONTEXT_TURNS:])

    def wants_object(self) -> Around:
        """The same where whatever reads what comes out makes an object of it, as which no refusal can stand."""
        return replace(self, gate=replace(self.gate, on_block="raise"))

    def spoken(self, answer: object, before: tuple[Turn, ...]) -> list[Conversation]:
        """What is to be judged of a whole answer, said after these turns."""
        return self.gate.asked(answer, before)

    def told(self, result: T) -> T:
        """What a model returns in the end, of which nothing has been withheld that should be; also what refuses."""
        return result

    def _begin(self, asked: list[Conversation], run: Callable[[], T]) -> T:
        if self.input == "off":
            return run()
        if self.input == "before":
            self._admit(asked)
            return run()
        # It is the judge that gets the thread: a model's stream stays in one, and the thread is gone with the verdict.
        with ContextThreadPoolExecutor(max_workers=1) as pool:
            judging = pool.submit(self._admit, asked)
            try:
                return run()
            finally:
                judging.result()

    async def _abegin(self, asked: list[Conversation], run: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self.input == "off":
            return await run()
        if self.input == "before":
            await self._aadmit(asked)
            return await run()
        calling = asyncio.create_task(run())
        try:
            await self._aadmit(asked)
            return await calling
        except BaseException:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            raise

    def _admit(self, asked: list[Conversation]) -> None:
        admit(self.gate.ready().screen_many(asked))

    async def _aadmit(self, asked: list[Conversation]) -> None:
        if self.input != "off":
            admit(await (await self.gate.aready()).ascreen_many(asked))

    def _refused(self, value: T, blocked: Blocked, *, started: bool = False) -> T:
        if self.gate.on_block == "raise":
            raise blocked
        refused: T = self.gate.withheld(value, blocked.verdict, started=started)
        return refused


def admit(verdicts: Sequence[Verdict]) -> None:
    """Raise Blocked where one of them withholds."""
    if (verdict := strictest(verdicts)) is not None:
        raise Blocked(verdict)


def quoted(error: BaseException | None) -> list[object]:
    """All that an error says, and shows to whoever looks into it and its causes."""
    texts: dict[str, None] = {}
    inputs: list[object] = []
    while error is not None:
        held = getattr(error, "__dict__", {}).values()
        texts |= dict.fromkeys((str(error), *(text for text in held if isinstance(text, str))))
        if isinstance(error, ValidationError):
            inputs += [one["input"] for one in error.errors(include_url=False, include_context=False)]
        error = error.__cause__ or error.__context__
    return [*texts, *inputs]


_loading = Lock()


@cache
def _loaded() -> Guard:
    return Guard()


def _embedded() -> Guard:
    """The guard with the embedded model, the same for all."""
    # `cache` alone lets two threads load it at once.
    with _loading:
        return _loaded()
