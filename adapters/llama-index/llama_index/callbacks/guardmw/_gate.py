"""A guard at work between a caller and a model: what goes in, what comes out, and what stands in for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from llama_index.callbacks.guardmw._asked import CONTEXT_TURNS, Passed
from llama_index.callbacks.guardmw._held import Held, leaves_review
from llama_index.callbacks.guardmw._parts import trials_of
from llama_index.callbacks.guardmw._verdicts import Judge, blocked_by, enforced, said_by, strictest, tell, withhold
from llama_index.core.callbacks import CallbackManager

from guardmw import Blocked, Conversation, GuardmwError, Turn

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        AsyncIterator,
        Callable,
        Collection,
        Container,
        Generator,
        Iterable,
        Iterator,
        Sequence,
    )

    from llama_index.callbacks.guardmw._asked import Asked

    from guardmw import Backend, Guard, Verdict

    # Made of the verdict, and of the text that has gone out before it.
    Refusal = Callable[[Verdict, str], "T"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

OnBlock = Literal["raise", "refuse"]
Input = Literal["before", "off"]

BEGUN: Any = None
"""What a stream yields first; see ``begun``."""

judging: ContextVar[tuple[Judge, str] | None] = ContextVar("guardmw_judging", default=None)
"""Whose guard judges, by itself, the event that LlamaIndex's callback handlers are being told of, by its id."""


class Silent(CallbackManager):
    """Tells nobody, of an LLM that is guarded itself."""

    def __init__(self) -> None:
        super().__init__([])
        # Without handlers of its own it has the global ones.
        self.set_handlers([])


def begun(stream: F) -> F:
    """A generator function whose streams have begun: they close what they read though nobody has read of them.

    A generator that has not begun runs none of its code when it is closed, or collected. The function has to begin with
    ``yield BEGUN``, which nobody sees, and to await nothing before.
    """

    @wraps(stream)
    def begin(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the function has it
        chunks = stream(*args, **kwargs)
        if isinstance(chunks, AsyncGenerator):
            with suppress(StopIteration):
                chunks.asend(None).send(None)
        else:
            next(chunks)
        return chunks

    return begin  # type: ignore[return-value] # it takes and gives the same


class Gate:
    """Lets through what a guard allows, unchanged; in place of other things: Blocked, or a refusal.

    Args:
        g: a Guard, a Backend, a spec for ``guardmw.load``, or None for the embedded model.
        on_block: "raise" or "refuse".
        input: whether what goes in is judged: "before" the call, or "off".

    Attributes:
        refuses: on_block is "refuse".

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: g is none of these.
        ValueError: on_block or input is none of those that there are.
    """

    def __init__(
        self,
        g: Guard | Backend | str | Judge | None,
        on_block: OnBlock = "raise",
        input: Input = "before",  # noqa: A002 - what is judged
    ) -> None:
        for name, given, known in (("on_block", on_block, get_args(OnBlock)), ("input", input, get_args(Input))):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}")
        self._judge = Judge.of(g)
        self.refuses = on_block == "refuse"
        self._input = input == "before"
        self._passed = Passed(CONTEXT_TURNS)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        # LLMs are copied with what they hold; the model and the lock stay one.
        return self

    def __reduce__(self) -> tuple[type[Gate], tuple[Judge, OnBlock, Input]]:
        # What has passed is judged again where it arrives.
        return type(self), (self._judge, "refuse" if self.refuses else "raise", "before" if self._input else "off")

    def ready(self) -> Guard:
        """The guard; the embedded model is loaded here."""
        return self._judge.ready()

    def strict(self) -> Gate:
        """The same gate, which raises and does not refuse."""
        gate = copy(self)
        gate.refuses = False
        return gate

    async def aready(self) -> Guard:
        """``ready``, without blocking the event loop."""
        return await self._judge.aready()

    def admit(self, asked: Asked, reviewed: Collection[str] = ()) -> None:
        """Judge what goes into a call, as far as it has not passed before.

        Args:
            asked: what goes in.
            reviewed: the names of tools that see to the reviews of their calls, here as in the other methods.

        Raises:
            Blocked: the policy blocks it, or wants it reviewed.
        """
        if fresh := self._fresh(asked):
            self._enter(fresh, self.ready().screen_many(fresh.values()), reviewed)

    async def aadmit(self, asked: Asked, reviewed: Collection[str] = ()) -> None:
        """``admit``, without blocking the event loop."""
        if fresh := self._fresh(asked):
            self._enter(fresh, await (await self.aready()).ascreen_many(fresh.values()), reviewed)

    def release(self, answer: T, context: Sequence[Turn], reviewed: Collection[str] = ()) -> T:
        """A whole answer, once it has been judged.

        Raises:
            Blocked: the policy blocks it, or wants it reviewed.
        """
        trials = trials_of(answer, context)
        verdicts = self.ready().screen_many(trials)
        enforced(verdicts, _counted(trials, verdicts, reviewed))
        return answer

    async def arelease(self, answer: T, context: Sequence[Turn], reviewed: Collection[str] = ()) -> T:
        """``release``, without blocking the event loop."""
        trials = trials_of(answer, context)
        verdicts = await (await self.aready()).ascreen_many(trials)
        enforced(verdicts, _counted(trials, verdicts, reviewed))
        return answer

    @begun
    def stream(
        self, chunks: Iterable[T], context: Sequence[Turn], refusal: Refusal[T], reviewed: Collection[str] = ()
    ) -> Generator[T, None, None]:
        """The chunks, each once it has been judged; a block closes what they come from, and a refusal ends them."""
        with closed_after(chunks):
            yield BEGUN
            guard, held, failure = self.ready(), Held(context, reviewed), None
            try:
                for chunk in chunks:
                    if asked := held.feed(chunk):
                        held.take(guard.screen_many(asked))
                    yield from held.released()
                    if held.verdict is not None:
                        break
                else:
                    held.take(guard.screen_many(held.end()))
                    yield from held.released()
            except Exception as error:  # noqa: BLE001 - raised again, where it says nothing that is withheld
                failure = self.failure(error, context)
        if held.verdict is not None:
            failure = Blocked(held.verdict)
        if failure is not None:
            yield self.instead(failure, refusal, held.shown)

    @begun
    async def astream(
        self, chunks: AsyncIterable[T], context: Sequence[Turn], refusal: Refusal[T], reviewed: Collection[str] = ()
    ) -> AsyncGenerator[T, None]:
        """``stream``, without blocking the event loop."""
        async with aclosed_after(chunks):
            yield BEGUN
            guard, held, failure = await self.aready(), Held(context, reviewed), None
            try:
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
            except Exception as error:  # noqa: BLE001 - the same
                failure = await self.afailure(error, context)
        if held.verdict is not None:
            failure = Blocked(held.verdict)
        if failure is not None:
            yield self.instead(failure, refusal, held.shown)

    def failure(self, error: BaseException, context: Sequence[Turn]) -> BaseException:
        """What a call fails by: an exception of the model's as it is, or Blocked where what it says is withheld."""
        if not _may_quote(error):
            return error
        return _unless_withheld(error, self.ready().screen_many(trials_of(said_by(error), context)))

    async def afailure(self, error: BaseException, context: Sequence[Turn]) -> BaseException:
        """``failure``, without blocking the event loop."""
        if not _may_quote(error):
            return error
        guard = await self.aready()
        return _unless_withheld(error, await guard.ascreen_many(trials_of(said_by(error), context)))

    def instead(self, failure: BaseException, refusal: Refusal[T], shown: str = "") -> T:
        """What stands in the place of what is withheld, after text that has gone out.

        Raises:
            Blocked: this gate does not refuse.
            BaseException: it is another failure.
        """
        if not isinstance(failure, Blocked):
            raise failure
        if not self.refuses:
            withhold(failure.verdict)
        return refusal(failure.verdict, shown)

    def judges_like(self, judge: Judge) -> bool:
        """Whether it is the same guard, or judges by the same backend and policy."""
        own, other = self._judge.guard, judge.guard
        if own is None or other is None:
            return own is other
        return own is other or (own.backend is other.backend and own.policy == other.policy)

    @contextmanager
    def told(self, event_id: str) -> Iterator[None]:
        """Callback handlers that are told of this event meanwhile need not judge it by this guard once more."""
        # Of this one alone: a handler may ask another LLM, or leave a task behind that does.
        token = judging.set((self._judge, event_id) if self._input else None)
        try:
            yield
        finally:
            judging.reset(token)

    def _fresh(self, asked: Asked) -> dict[bytes, Conversation]:
        return self._passed.fresh(asked) if self._input else {}

    def _enter(self, fresh: dict[bytes, Conversation], verdicts: Sequence[Verdict], reviewed: Collection[str]) -> None:
        self._passed.learn(fresh, verdicts)
        enforced(verdicts, _counted(fresh.values(), verdicts, reviewed))

    @property
    def left_out(self) -> Container[bytes]:
        """The questions that chats go on without, as the caller has been told of them."""
        return self._passed.left_out


def _counted(
    conversations: Iterable[Conversation], verdicts: Sequence[Verdict], reviewed: Collection[str]
) -> Sequence[Verdict]:
    """The verdicts that are not for tools to see to."""
    if not reviewed:
        return verdicts
    judged = zip(conversations, verdicts, strict=True)
    return [verdict for conversation, verdict in judged if not leaves_review(conversation, verdict, reviewed)]


def _may_quote(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, GuardmwError)


def _unless_withheld(error: BaseException, verdicts: Sequence[Verdict]) -> BaseException:
    tell(verdicts)
    verdict = strictest(verdicts)
    return error if verdict is None else blocked_by(verdict)


@contextmanager
def closed_after(chunks: Any) -> Iterator[None]:  # noqa: ANN401 - whatever a model streams
    """Close what can be closed."""
    try:
        yield
    finally:
        # Whatever a model does on its way out, what reaches the caller is the verdict.
        with suppress(Exception):
            if hasattr(chunks, "close"):
                chunks.close()


@asynccontextmanager
async def aclosed_after(chunks: Any) -> AsyncIterator[None]:  # noqa: ANN401
    """``closed_after``, of asynchronous streams."""
    try:
        yield
    finally:
        with suppress(Exception):
            if hasattr(chunks, "aclose"):
                await chunks.aclose()
