"""``guard_query_engine()``, ``guard_chat_engine()``: engines of which nobody sees what a guard withholds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeGuard
from weakref import WeakValueDictionary

from llama_index.callbacks.guardmw._asked import asked_in_chat, asked_in_words
from llama_index.callbacks.guardmw._gate import BEGUN, Gate, OnBlock, aclosed_after, begun, closed_after
from llama_index.callbacks.guardmw._parts import is_short_mark, object_text, texts_in
from llama_index.callbacks.guardmw._verdicts import REFUSAL, enforced
from llama_index.callbacks.guardmw.nodes import turn_of_node
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.memory import BaseMemory
from llama_index.core.query_engine import (
    FLAREInstructQueryEngine,
    RetryGuidelineQueryEngine,
    RetryQueryEngine,
    RetrySourceQueryEngine,
    SQLJoinQueryEngine,
)
from llama_index.core.schema import BaseNode, NodeWithScore

from guardmw import Blocked, Conversation, GuardmwError, Turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from llama_index.callbacks.guardmw._asked import Asked
    from llama_index.core.base.response.schema import RESPONSE_TYPE
    from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
    from llama_index.core.schema import QueryBundle
    from llama_index.core.tools import ToolOutput

    from guardmw import Backend, Guard, Verdict

# Their asynchronous queries are the others.
_SYNCHRONOUS = (RetryGuidelineQueryEngine, RetryQueryEngine, RetrySourceQueryEngine, SQLJoinQueryEngine)


def guard_query_engine(
    engine: BaseQueryEngine, g: Guard | Backend | str | None = None, *, on_block: OnBlock = "raise"
) -> BaseQueryEngine:
    """A query engine that answers as ``engine`` does, of which nobody sees what the guard withholds.

    Queries are judged before anything is retrieved; the answer, with the query as context, before anyone has it, and so
    are the nodes that come with it. A streamed answer goes out sentence by sentence, as it is judged. The nodes have
    been read by the LLM by then: to judge them before, give the engine a ``GuardPostprocessor``.

    Args:
        engine: a query engine; it is not changed.
        g: as in ``guard_llm()``.
        on_block: "raise" ``guardmw.Blocked``; or "refuse": answer with ``REFUSAL``, without nodes, in the type that the
            engine answers in, and with the verdict in ``metadata["guardmw"]``; what ends a stream that has begun has
            none.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: engine is no query engine, or g no guard.
        ValueError: on_block is none of those that there are.
    """
    gate = Gate(g, on_block)
    if not isinstance(engine, BaseQueryEngine):
        raise TypeError(f"give a query engine, not {type(engine).__name__}")
    return GuardedQueryEngine(engine, gate)


def guard_chat_engine(
    engine: BaseChatEngine, g: Guard | Backend | str | None = None, *, on_block: OnBlock = "raise"
) -> BaseChatEngine:
    """A chat engine that answers as ``engine`` does, of which nobody sees what the guard withholds.

    Messages are judged before the engine has them, with the history as context; so what is blocked is not in its
    memory, and does not block the next one. Answers are judged before anyone has them, and so are the nodes that come
    with them; the memory forgets what is withheld. A streamed answer goes out sentence by sentence, as it is judged;
    a block ends the engine's own reading of the stream. So do its closing, read or not, a reset and the next question;
    to read on after these two raises ``guardmw.GuardmwError``, and so does a call while another one is under way. All
    that holds for several guarded engines around one ``engine``, too, for they share its memory.

    Args:
        engine: a chat engine. It is used, not copied: its memory is that of the conversation.
        g: as in ``guard_llm()``.
        on_block: "raise" ``guardmw.Blocked``; or "refuse": answer with ``REFUSAL``.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: engine is no chat engine, or g no guard.
        ValueError: on_block is none of those that there are.
    """
    gate = Gate(g, on_block)
    if not isinstance(engine, BaseChatEngine):
        raise TypeError(f"give a chat engine, not {type(engine).__name__}")
    return GuardedChatEngine(engine, gate)


class GuardedQueryEngine(BaseQueryEngine):
    """The query engine that ``guard_query_engine()`` makes."""

    def __init__(self, inner: BaseQueryEngine, gate: Gate) -> None:
        super().__init__(inner.callback_manager)
        self._inner = inner
        self._gate = gate

    @property
    def inner(self) -> BaseQueryEngine:
        """The engine that answers; to ask it goes past the guard."""
        return self._inner

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:  # noqa: D102
        self._gate.admit(_asked(query_bundle))
        nodes = self._inner.retrieve(query_bundle)
        enforced(self._gate.ready().screen_many(_of_nodes(nodes)))
        return nodes

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """``retrieve``, where the engine has it."""
        await self._gate.aadmit(_asked(query_bundle))
        nodes: list[NodeWithScore] = await self._inner.aretrieve(query_bundle)  # type: ignore[attr-defined]
        enforced(await (await self._gate.aready()).ascreen_many(_of_nodes(nodes)))
        return nodes

    def synthesize(  # noqa: D102
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        return self._answer(query_bundle, lambda: self._inner.synthesize(query_bundle, nodes, additional_source_nodes))

    async def asynthesize(  # noqa: D102
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        return await self._aanswer(
            query_bundle, lambda: self._inner.asynthesize(query_bundle, nodes, additional_source_nodes)
        )

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return self._answer(query_bundle, lambda: self._inner.query(query_bundle))

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return await self._aanswer(query_bundle, lambda: self._inner.aquery(query_bundle))

    def _answer(self, query: QueryBundle, run: Callable[[], RESPONSE_TYPE]) -> RESPONSE_TYPE:
        asked, response = _asked(query), None
        try:
            self._gate.admit(asked)
            response = run()
            enforced(self._gate.ready().screen_many(_of_response(response, asked)))
        except Exception as error:  # noqa: BLE001 - raised again, where it says nothing that is withheld
            kind = _kind(self._inner, StreamingResponse) if response is None else type(response)
            with closed_after(getattr(response, "response_gen", None)):
                return self._gate.instead(self._gate.failure(error, asked.context), partial(_refused, kind))
        return self._held(response, asked)

    async def _aanswer(self, query: QueryBundle, run: Callable[[], Awaitable[RESPONSE_TYPE]]) -> RESPONSE_TYPE:
        asked, response = _asked(query), None
        try:
            await self._gate.aadmit(asked)
            response = await run()
            enforced(await (await self._gate.aready()).ascreen_many(_of_response(response, asked)))
        except Exception as error:  # noqa: BLE001 - the same
            kind = _kind(self._inner, AsyncStreamingResponse) if response is None else type(response)
            async with aclosed_after(getattr(response, "response_gen", None)):
                return self._gate.instead(await self._gate.afailure(error, asked.context), partial(_refused, kind))
        return self._held(response, asked)

    def _held(self, response: RESPONSE_TYPE, asked: Asked) -> RESPONSE_TYPE:
        """The same answer; what of it is still to come, held."""
        if isinstance(response, StreamingResponse) and response.response_gen is not None:
            return replace(response, response_gen=self._gate.stream(response.response_gen, asked.context, _more))
        if isinstance(response, AsyncStreamingResponse) and response.response_gen is not None:
            held = self._gate.astream(response.response_gen, asked.context, _more)
            return _AsyncStreaming(held, response.source_nodes, response.metadata, response.response_txt)
        return response

    def _get_prompts(self) -> dict[str, Any]:
        return self._inner._get_prompts()  # noqa: SLF001 - it stands in for the inner engine

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._inner._update_prompts(prompts)  # noqa: SLF001

    def _get_prompt_modules(self) -> PromptMixinType:
        return self._inner._get_prompt_modules()  # noqa: SLF001


class GuardedChatEngine(BaseChatEngine):
    """The chat engine that ``guard_chat_engine()`` makes."""

    def __init__(self, inner: BaseChatEngine, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self._talk = _talk_with(inner)

    def __copy__(self) -> Self:
        return type(self)(self._inner, self._gate)

    def __reduce__(self) -> tuple[Any, ...]:
        # The lock stays here, and so does what nobody has read yet of an answer, which the memory may have.
        talk = self._talk.open
        return type(self), (self._inner, self._gate), None if talk is None else talk.history()

    def __setstate__(self, history: list[ChatMessage]) -> None:
        self._remember(history)

    @property
    def inner(self) -> BaseChatEngine:
        """The engine that answers; to ask it goes past the guard, and its memory may be ahead of the judge."""
        return self._inner

    def reset(self) -> None:
        """Forget the conversation; an answer that is still being read ends."""
        with self._alone():
            self._before()
            self._inner.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """What was said; of an answer that is still being read, or is not read at all, what has been."""
        # The engine's memory has all of it as soon as the model has said it.
        return self._inner.chat_history if self._talk.open is None else self._talk.open.history()

    def chat(  # noqa: D102
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AgentChatResponse | StreamingAgentChatResponse:
        with self._alone():
            given = None if chat_history is None else list(chat_history)
            exchange = _Exchange(self._before(given), message)
            try:
                self._gate.admit(exchange.asked)
            except Blocked as blocked:
                return AgentChatResponse(self._gate.instead(blocked, _more))
            self._talk.open = exchange
            try:
                response = self._inner.chat(message, given)
                enforced(self._gate.ready().screen_many(_of_chat(response, exchange.asked)))
                exchange.ended = True
            except Exception as error:  # noqa: BLE001 - raised again, where it says nothing that is withheld
                exchange.said = self._gate.instead(self._gate.failure(error, exchange.asked.context), _more)
                return AgentChatResponse(exchange.said)
            finally:
                self._keep(exchange)
            return response

    async def achat(  # noqa: D102
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AgentChatResponse | StreamingAgentChatResponse:
        with self._alone():
            # Others may go on writing into the list while a backend judges.
            given = None if chat_history is None else list(chat_history)
            exchange = _Exchange(await self._abefore(given), message)
            try:
                await self._gate.aadmit(exchange.asked)
            except Blocked as blocked:
                return AgentChatResponse(self._gate.instead(blocked, _more))
            self._talk.open = exchange
            try:
                response = await self._inner.achat(message, given)
                enforced(await (await self._gate.aready()).ascreen_many(_of_chat(response, exchange.asked)))
                exchange.ended = True
            except Exception as error:  # noqa: BLE001 - the same
                exchange.said = self._gate.instead(await self._gate.afailure(error, exchange.asked.context), _more)
                return AgentChatResponse(exchange.said)
            finally:
                await self._akeep(exchange)
            return response

    def stream_chat(  # noqa: D102
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        with self._alone():
            given = None if chat_history is None else list(chat_history)
            exchange = _Exchange(self._before(given), message)
            try:
                self._gate.admit(exchange.asked)
            except Blocked as blocked:
                return _streamed(_only(self._gate.instead(blocked, _more)))
            self._talk.open, inner = exchange, None
            try:
                inner = self._inner.stream_chat(message, given)
                enforced(self._gate.ready().screen_many(_of_sources(inner, exchange.asked)))
            except BaseException as error:  # noqa: BLE001 - the same
                if inner is not None:
                    _Deltas(inner).close()
                try:
                    exchange.said = self._gate.instead(self._gate.failure(error, exchange.asked.context), _more)
                finally:
                    self._keep(exchange)
                return _streamed(_only(exchange.said))
            exchange.reader = _Deltas(inner)
            return _streamed(self._read(exchange.reader, exchange), inner)

    async def astream_chat(  # noqa: D102
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        with self._alone():
            # Others may go on writing into the list while a backend judges.
            given = None if chat_history is None else list(chat_history)
            exchange = _Exchange(await self._abefore(given), message)
            try:
                await self._gate.aadmit(exchange.asked)
            except Blocked as blocked:
                return _astreamed(_aonly(self._gate.instead(blocked, _more)))
            self._talk.open, inner = exchange, None
            try:
                inner = await self._inner.astream_chat(message, given)
                enforced(await (await self._gate.aready()).ascreen_many(_of_sources(inner, exchange.asked)))
            except BaseException as error:  # noqa: BLE001 - the same
                if inner is not None:
                    await _AsyncDeltas(inner).aclose()
                try:
                    exchange.said = self._gate.instead(await self._gate.afailure(error, exchange.asked.context), _more)
                finally:
                    await self._akeep(exchange)
                return _astreamed(_aonly(exchange.said))
            exchange.reader = _AsyncDeltas(inner)
            return _astreamed(self._aread(exchange.reader, exchange), inner)

    @begun
    def _read(self, reader: _Deltas, exchange: _Exchange) -> Generator[str, None, None]:
        try:
            with closing(self._gate.stream(reader, exchange.asked.context, exchange.refusal)) as released:
                yield BEGUN
                for delta in released:
                    self._go_on(exchange)
                    exchange.said += delta
                    yield delta
            self._go_on(exchange)
            exchange.ended = not exchange.refused
        finally:
            self._keep(exchange)

    @begun
    async def _aread(self, reader: _AsyncDeltas, exchange: _Exchange) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(self._gate.astream(reader, exchange.asked.context, exchange.refusal)) as released:
                yield BEGUN
                async for delta in released:
                    self._go_on(exchange)
                    exchange.said += delta
                    yield delta
            self._go_on(exchange)
            exchange.ended = not exchange.refused
        finally:
            await self._akeep(exchange)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # Two calls would write into one memory, of which neither could take back its own.
        if not self._talk.free.acquire(blocking=False):
            raise GuardmwError(
                "this chat engine is answering already: make one engine for each conversation, and wait"
                " for its answer before you ask the next question or reset it"
            )
        try:
            yield
        finally:
            self._talk.free.release()

    def _go_on(self, exchange: _Exchange) -> None:
        # What came so far must not pass for the whole answer.
        if self._talk.open is not exchange:
            raise _ended()

    @property
    def _memory(self) -> BaseMemory | None:
        # All engines of LlamaIndex's own have it, and nothing public takes a turn back.
        memory = getattr(self._inner, "_memory", None)
        return memory if isinstance(memory, BaseMemory) else None

    def _before(self, given: list[ChatMessage] | None = None) -> list[ChatMessage]:
        """What was said, or what is given as that, once no answer is open any more."""
        if self._talk.open is not None:
            # An answer that nobody has read to its end; the engine would remember all of it once it is written.
            if self._talk.open.reader is not None:
                self._talk.open.reader.close()
            self._keep(self._talk.open)
        return self._inner.chat_history if given is None else given

    async def _abefore(self, given: list[ChatMessage] | None = None) -> list[ChatMessage]:
        if self._talk.open is not None:
            match self._talk.open.reader:
                case _Deltas() as reader:
                    await asyncio.to_thread(reader.close)
                case _AsyncDeltas() as reader:
                    await reader.aclose()
            await self._akeep(self._talk.open)
        if given is not None:
            return given
        return self._inner.chat_history if self._memory is None else await self._memory.aget_all()

    def _keep(self, exchange: _Exchange) -> None:
        """Let the engine remember of an exchange what has been judged; an engine that cannot, remembers nothing."""
        # The memory is no longer that of an exchange which another one has ended.
        if self._talk.open is not exchange:
            return
        if not exchange.ended:
            self._remember(exchange.history())
        self._talk.open = None

    def _remember(self, history: list[ChatMessage]) -> None:
        if self._memory is None:
            self._inner.reset()
        else:
            self._memory.set(history)

    async def _akeep(self, exchange: _Exchange) -> None:
        if self._talk.open is not exchange:
            return
        if not exchange.ended:
            if self._memory is None:
                self._inner.reset()
            else:
                await self._memory.aset(exchange.history())
        if self._talk.open is exchange:
            self._talk.open = None


class _Talk:
    """What all guarded engines around one engine share: its memory is one.

    Attributes:
        engine: it lives as long, so that no other gets its id.
        free: held while it is asked, or reset.
        open: what is being answered, or has an answer that was not read to its end.
    """

    def __init__(self, engine: BaseChatEngine) -> None:
        self.engine = engine
        self.free = Lock()
        self.open: _Exchange | None = None


_talks: WeakValueDictionary[int, _Talk] = WeakValueDictionary()
_looking = Lock()


def _talk_with(engine: BaseChatEngine) -> _Talk:
    with _looking:
        return _talks.setdefault(id(engine), _Talk(engine))


class _Exchange:
    """A message and its answer.

    Attributes:
        reader: of the engine's streamed answer.
        said: what of the answer was seen.
        refused: it ends with a refusal.
        ended: all of the answer was judged and seen; the engine remembers it.
    """

    def __init__(self, before: list[ChatMessage], message: str) -> None:
        self.before = list(before)
        self.message = ChatMessage(role=MessageRole.USER, content=message)
        self.asked = asked_in_chat([*before, self.message])
        self.reader: _Deltas | _AsyncDeltas | None = None
        self.said = ""
        self.refused = False
        self.ended = False

    def refusal(self, verdict: Verdict, shown: str) -> str:
        """What ends the answer."""
        self.refused = True
        return _more(verdict, shown)

    def history(self) -> list[ChatMessage]:
        """The conversation as it was seen; without the message, if it has no answer."""
        if not self.said:
            return list(self.before)
        return [*self.before, self.message, ChatMessage(role=MessageRole.ASSISTANT, content=self.said)]


class _Deltas:
    """The text of a streamed answer, piece by piece, of which the engine reads no more once it is closed."""

    def __init__(self, response: StreamingAgentChatResponse) -> None:
        self._response = response
        self._deltas = response.response_gen

    def __iter__(self) -> Iterator[str]:
        return self._deltas

    def close(self) -> None:
        """End the engine's thread at its next chunk, and the model's stream with it."""
        response = self._response
        # Whoever reads in another thread would wait for ever.
        response.exception = response.exception or _ended()
        response.put_in_queue = _leave  # type: ignore[method-assign, assignment]
        if response.write_response_to_history_thread is not None:
            response.write_response_to_history_thread.join()
            response.write_response_to_history_thread = None
        for stream in (self._deltas, response.chat_stream, *_live(response)):
            with closed_after(stream):
                pass


class _AsyncDeltas:
    """The same for an answer that is streamed asynchronously."""

    def __init__(self, response: StreamingAgentChatResponse) -> None:
        self._response = response
        # Where the response has it, whoever stops reading waits for it, and so for the model to finish.
        self._task, response.awrite_response_to_history_task = response.awrite_response_to_history_task, None
        self._deltas = self._read(response.async_response_gen())

    def __aiter__(self) -> AsyncIterator[str]:
        return self._deltas

    async def _read(self, deltas: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta
        if self._task is not None:
            await self._task

    def close(self) -> None:
        """Cancel the engine's task, which ends when its event loop goes on."""
        self._response.exception = self._response.exception or _ended()
        if self._task is not None and not self._task.done() and not self._task.get_loop().is_closed():
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    async def aclose(self) -> None:
        """Cancel the engine's task, and close the model's stream."""
        self._response.exception = self._response.exception or _ended()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for stream in (self._deltas, self._response.achat_stream, *_live(self._response)):
            async with aclosed_after(stream):
                pass


def _live(response: StreamingAgentChatResponse) -> list[Any]:
    """The streams among its sources, of which the answer is made."""
    return [source.raw_output.response_gen for source in response.sources if _streams(source.raw_output)]


def _streams(output: object) -> TypeGuard[StreamingResponse | AsyncStreamingResponse]:
    return isinstance(output, StreamingResponse | AsyncStreamingResponse)


def _ended() -> GuardmwError:
    return GuardmwError(
        "a reset or the next question ended this answer: read it to its end, or close it, before you go on"
    )


def _leave(_: str | None) -> NoReturn:
    """End the thread that calls this: neither its error handling nor Python's own has anything to say to that."""
    raise SystemExit


class _Reading(Generator[str, None, None]):
    """An answer's text as LlamaIndex reads it: to close it closes the answer, too, and to drop it does not."""

    def __init__(self, deltas: Generator[str, None, None], answer: Any) -> None:  # noqa: ANN401 - a stream
        self._deltas = deltas
        self._answer = answer

    def send(self, value: None) -> str:
        return self._deltas.send(value)

    def throw(self, *error: Any) -> str:  # noqa: ANN401 - in any of its forms
        return self._deltas.throw(*error)

    def close(self) -> None:
        self._deltas.close()
        self._answer.close()


class _AsyncReading(AsyncGenerator[str, None]):
    """The same of an asynchronous one."""

    def __init__(self, deltas: AsyncGenerator[str, None], answer: Any) -> None:  # noqa: ANN401
        self._deltas = deltas
        self._answer = answer

    async def asend(self, value: None) -> str:
        return await self._deltas.asend(value)

    async def athrow(self, *error: Any) -> str:  # noqa: ANN401
        return await self._deltas.athrow(*error)

    async def aclose(self) -> None:
        await self._deltas.aclose()
        await self._answer.aclose()


class _StreamingChat(StreamingAgentChatResponse):
    @property
    def response_gen(self) -> Generator[str, None, None]:
        return _Reading(super().response_gen, self.chat_stream)

    def async_response_gen(self) -> AsyncGenerator[str, None]:
        return _AsyncReading(super().async_response_gen(), self.achat_stream)


class _AsyncStreaming(AsyncStreamingResponse):
    def async_response_gen(self) -> AsyncGenerator[str, None]:
        return _AsyncReading(super().async_response_gen(), self.response_gen)


def _streamed(
    deltas: Generator[str, None, None], inner: StreamingAgentChatResponse | None = None
) -> StreamingAgentChatResponse:
    """An answer of these pieces, with the sources of another."""
    response = _StreamingChat(chat_stream=_chunks(deltas), is_writing_to_memory=False)
    return response if inner is None else _with_sources(response, inner)


def _astreamed(
    deltas: AsyncGenerator[str, None], inner: StreamingAgentChatResponse | None = None
) -> StreamingAgentChatResponse:
    response = _StreamingChat(achat_stream=_achunks(deltas), is_writing_to_memory=False)
    return response if inner is None else _with_sources(response, inner)


def _with_sources(
    response: StreamingAgentChatResponse, inner: StreamingAgentChatResponse
) -> StreamingAgentChatResponse:
    response.sources, response.source_nodes = list(map(_without_stream, inner.sources)), inner.source_nodes
    return response


def _without_stream(source: ToolOutput) -> ToolOutput:
    """What a tool gave, without a stream that the engine reads itself, and that nobody has judged there."""
    output = source.raw_output
    if not _streams(output):
        return source
    emptied: Any = {"response_gen": None, "response_txt": ""}
    return source.model_copy(update={"raw_output": replace(output, **emptied)})


@begun
def _chunks(deltas: Generator[str, None, None]) -> Generator[ChatResponse, None, None]:
    text = ""
    with closing(deltas):
        yield BEGUN
        for delta in deltas:
            text += delta
            yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


@begun
async def _achunks(deltas: AsyncGenerator[str, None]) -> AsyncGenerator[ChatResponse, None]:
    text = ""
    async with aclosing(deltas):
        yield BEGUN
        async for delta in deltas:
            text += delta
            yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def _asked(query: QueryBundle) -> Asked:
    """All strings of a query: beside its own those that are embedded in its place."""
    return asked_in_words("\n".join(dict.fromkeys((query.query_str, *(query.custom_embedding_strs or ())))))


def _of_response(response: object, asked: Asked) -> list[Conversation]:
    """What there is to judge of an answer that is there; of one that streams, the nodes."""
    nodes = getattr(response, "source_nodes", None) or ()
    trials = [*_of_nodes(nodes), *_of_metadata(getattr(response, "metadata", None) or {}, nodes, asked)]
    if isinstance(response, PydanticResponse):
        text = object_text(response.response) if response.response else ""
    elif isinstance(response, Response):
        text = response.response or ""
    elif isinstance(response, StreamingResponse | AsyncStreamingResponse):
        text = response.response_txt or ""
    else:
        return [*trials, _unreadable(response, asked)]
    return [*trials, _said(text, asked)] if text else trials


def _of_chat(response: object, asked: Asked) -> list[Conversation]:
    if not isinstance(response, AgentChatResponse):
        return [_unreadable(response, asked)]
    return [*_of_sources(response, asked, response.response), _said(response.response, asked)]


def _of_sources(
    response: AgentChatResponse | StreamingAgentChatResponse, asked: Asked, said: str = ""
) -> list[Conversation]:
    """The nodes, notes and tool outputs that come with a chat engine's answer."""
    nodes = response.source_nodes
    trials = [*_of_nodes(nodes), *_of_metadata(getattr(response, "metadata", None) or {}, nodes, asked)]
    for source in response.sources:
        trials += _of_source(source, nodes, asked)
    # Most of it is the question, the answer or the nodes once more.
    known = {Turn("assistant", text) for text in (said, asked.turns[-1].text, "")}
    return list({trial.last: trial for trial in trials if trial.last not in known}.values())


def _of_source(source: ToolOutput, nodes: Sequence[NodeWithScore], asked: Asked) -> Iterator[Conversation]:
    """What a tool was given, and what it gave."""
    output = source.raw_output
    yield from _noted(source.raw_input, "assistant", "", asked)
    if isinstance(output, Response | PydanticResponse) or _streams(output):
        yield from _of_response(output, asked)
        return
    if output is nodes:
        return
    for value in (source.content, output, source.exception):
        yield from _noted(value, "tool", source.tool_name, asked)


def _of_metadata(metadata: Mapping[str, Any], nodes: Sequence[NodeWithScore], asked: Asked) -> Iterator[Conversation]:
    """What an engine notes beside its nodes, whose own is judged with them: the SQL that it wrote, the rows it read."""
    known = {node.node_id: node.metadata for node in nodes}
    beside = {key: value for key, value in metadata.items() if key not in known or known[key] != value}
    for key in [key for key, value in beside.items() if _are_nodes(value)]:
        # Engines with pictures have their nodes here once more; a picture is no text.
        yield from _of_nodes(beside.pop(key))
    yield from _noted(beside, "tool", "metadata", asked)


def _noted(value: object, role: Literal["assistant", "tool"], name: str, asked: Asked) -> Iterator[Conversation]:
    """What a value of any shape says."""
    try:
        text = texts_in(value)
    except RecursionError:
        yield Conversation((*asked.context, Turn(role, name=name, media=(type(value).__name__,))))
        return
    if text:
        yield Conversation((*asked.context, Turn(role, text, name=name)))


def _are_nodes(value: object) -> TypeGuard[list[NodeWithScore]]:
    return isinstance(value, list) and all(isinstance(one, NodeWithScore) for one in value)


def _of_nodes(nodes: Sequence[NodeWithScore]) -> list[Conversation]:
    return [Conversation((_whole(node),)) for node in nodes]


def _whole(node: NodeWithScore) -> Turn:
    """A node as its caller has it: as a model reads it, and with what no model is shown."""
    turn = turn_of_node(node)
    texts = [turn.text]
    behind: object = node.node
    while isinstance(behind, BaseNode):
        # A template may leave out what is not excluded, too, and the content itself.
        hidden = {key: value for key, value in behind.metadata.items() if f"{key}: {value}" not in turn.text}
        texts += (text for text in (behind.get_content().strip(), texts_in(hidden)) if text not in turn.text)
        texts += _of_relatives(behind)
        texts += (id_ for id_ in (behind.node_id, getattr(behind, "index_id", None)) if id_ and not is_short_mark(id_))
        behind = getattr(behind, "obj", None)
        behind = behind.node if isinstance(behind, NodeWithScore) else behind
    return replace(turn, text="\n".join(dict.fromkeys(filter(None, texts))))


def _of_relatives(node: BaseNode) -> Iterator[str]:
    """What is noted of the nodes around it, of its document too, where that is not its own; and their ids."""
    own = node.metadata
    for relatives in node.relationships.values():
        for relative in relatives if isinstance(relatives, list) else [relatives]:
            noted = relative.metadata.items()
            yield texts_in({key: value for key, value in noted if key not in own or own[key] != value})
            if not is_short_mark(relative.node_id):
                yield relative.node_id


def _said(text: str, asked: Asked) -> Conversation:
    return Conversation((*asked.context, Turn("assistant", text)))


def _unreadable(value: object, asked: Asked) -> Conversation:
    """Nobody can tell what it says, so that the policy has to."""
    return Conversation((*asked.context, Turn("assistant", media=(type(value).__name__,))))


def _more(_: Verdict, shown: str) -> str:
    """What is said in place of the rest."""
    return f"\n\n{REFUSAL}" if shown else REFUSAL


def _only(text: str) -> Generator[str, None, None]:
    yield text


async def _aonly(text: str) -> AsyncGenerator[str, None]:
    yield text


def _refused(kind: type, verdict: Verdict, _: str) -> RESPONSE_TYPE:
    """A refusal instead of an answer of this kind."""
    metadata = {"guardmw": verdict.to_dict()}
    if issubclass(kind, AsyncStreamingResponse):
        return _AsyncStreaming(_aonly(REFUSAL), [], metadata)
    if issubclass(kind, StreamingResponse):
        return StreamingResponse(_only(REFUSAL), [], metadata)
    return Response(REFUSAL, [], metadata)


def _kind(engine: BaseQueryEngine, streaming: type) -> type:
    """``streaming`` or Response, as LlamaIndex's own engines know it of themselves or of the engines that they ask."""
    if isinstance(engine, FLAREInstructQueryEngine):
        return Response
    if isinstance(engine, _SYNCHRONOUS):
        streaming = StreamingResponse
    synthesizer = getattr(engine, "_response_synthesizer", engine)
    if hasattr(synthesizer, "_streaming"):
        return streaming if synthesizer._streaming else Response  # noqa: SLF001 - nothing public says it
    several = getattr(engine, "_query_engines", ())
    asked = [getattr(engine, name, None) for name in ("_inner", "_query_engine")]
    kinds = {_kind(one, streaming) for one in (*asked, *several) if isinstance(one, BaseQueryEngine)}
    # Whoever wants it whole can read a stream; not the other way round.
    return max(kinds, key=lambda kind: kind is not Response, default=Response)
