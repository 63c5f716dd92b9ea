"""``guard_llm()``: an LLM that judges what it is asked, and shows of its answers only what has been judged."""

# ruff: noqa: SLF001 - a model that stands in for another calls of it what llama-index-core would

from __future__ import annotations

import pickle
from contextlib import aclosing, closing, contextmanager, nullcontext
from functools import partial
from inspect import currentframe, getattr_static
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

from llama_index.callbacks.guardmw._asked import asked_in_chat, asked_in_words
from llama_index.callbacks.guardmw._gate import BEGUN, Gate, Input, OnBlock, Silent, begun
from llama_index.callbacks.guardmw._parts import object_text
from llama_index.callbacks.guardmw._verdicts import REFUSAL, mark, withhold
from llama_index.callbacks.guardmw.tools import names_of_guarded
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram
from llama_index_instrumentation.dispatcher import DISPATCHER_SPAN_DECORATED_ATTR

from guardmw import GuardmwError

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        Awaitable,
        Callable,
        Collection,
        Generator,
        Iterable,
        Iterator,
        Sequence,
    )
    from contextlib import AbstractContextManager

    from llama_index.callbacks.guardmw._asked import Asked
    from llama_index.core.base.llms.types import LLMMetadata
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.llms.llm import ToolSelection
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools.types import BaseTool

    from guardmw import Backend, Guard, Verdict

F = TypeVar("F", bound="Callable[..., Any]")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

# What llama-index-core reads off an LLM when it makes prompts for it. Rate limits stay with the inner LLM.
_SHARED = (
    "callback_manager",
    "system_prompt",
    "messages_to_prompt",
    "completion_to_prompt",
    "output_parser",
    "pydantic_program_mode",
    "query_wrapper_prompt",
)
# Carries the guarded tools' names from preparing a call to making it.
_REVIEWED = "guardmw_reviewed"
# Where a provider has its own way to an object, beside the LLM's chat.
_STRUCTURED = (
    "structured_predict",
    "astructured_predict",
    "stream_structured_predict",
    "astream_structured_predict",
    "_structured_stream_call",
    "_structured_astream_call",
)


def guard_llm(
    llm: LLM,
    g: Guard | Backend | str | None = None,
    *,
    input: Input = "before",  # noqa: A002 - what is judged
    on_block: OnBlock = "raise",
) -> LLM:
    """An LLM that answers as ``llm`` does, of which nobody sees what the guard withholds.

    Not in what it returns or streams, and not in callback handlers: the inner LLM is a copy that tells none, and those
    of ``llm`` are told what it is asked, before that is judged, and of the answer what has been judged. LlamaIndex's
    instrumentation, which cannot be kept from it, does hear the inner LLM. It is a FunctionCallingLLM if ``llm`` is
    one; a StructuredLLM stays one, around a guarded LLM.

    Every message it is asked with is judged, each with those before it as context, and its answer with the last of
    them. What passed is remembered (the last 1024 messages). A question that is withheld stops the call; once the user
    has gone on, the LLM reads a note in its place. Streams go out sentence by sentence, as they are judged; tool calls
    when they are complete. In async calls the event loop goes on meanwhile. What ``llm`` raises is judged as an answer.

    Args:
        llm: an LLM; it is not changed.
        g: a Guard; a Backend or its spec, judged by the default policy; None for the embedded model, which all of a
            process share and the first to be used loads.
        input: "before": the LLM is asked once what it is asked with has been judged. "off": only answers are judged.
        on_block: "raise" ``guardmw.Blocked``; or "refuse": answer with ``REFUSAL``, and the verdict in
            ``additional_kwargs["guardmw"]``. A verdict of review withholds like one of block. An object, which
            structured prediction or a program is to give, cannot refuse: Blocked is raised. Only where a program's LLM
            is one around this one, and asks it in another thread or task, it is given the refusal.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: llm is no LLM, or g no guard.
        ValueError: input or on_block is none of those that there are.
    """
    gate = Gate(g, on_block, input)
    if not isinstance(llm, LLM):
        raise TypeError(f"give an LLM of LlamaIndex, not {type(llm).__name__}")
    return _guarded(llm, gate)


def _unspanned(method: F) -> F:
    """A method without a span of its own: the inner LLM has one, and a second would cost as much as the guard."""
    # LlamaIndex puts one around every such method that has not got this mark.
    setattr(method, DISPATCHER_SPAN_DECORATED_ATTR, True)
    return method


class GuardedLLM(LLM):
    """The LLM that ``guard_llm()`` makes."""

    _inner: LLM = PrivateAttr()
    _gate: Gate = PrivateAttr()

    def __init__(self, inner: LLM, gate: Gate) -> None:
        super().__init__(**{name: getattr(inner, name) for name in _SHARED})
        self._inner = inner.model_copy(update={"callback_manager": Silent()})
        self._gate = gate

    def __reduce__(self) -> tuple[type[Self], tuple[LLM, Gate]]:
        shared = {name: getattr(self, name) for name in _SHARED}
        try:
            pickle.dumps(self.callback_manager)
        except Exception:  # noqa: BLE001 - whatever callback handlers raise: LlamaIndex would leave all of them out
            shared["callback_manager"] = self._inner.callback_manager
        return type(self), (self._inner.model_copy(update=shared), self._gate)

    @classmethod
    def class_name(cls) -> str:  # noqa: D102
        return "guarded_llm"

    if not TYPE_CHECKING:  # Type checkers would take any name for an attribute.

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or not hasattr(self._private.get("_inner"), name):
                    raise
            raise AttributeError(f"a guarded LLM has no {name!r} of its own: read it from llm.inner.{name}", name=name)

    @property
    def inner(self) -> LLM:
        """The LLM that answers; to ask it goes past the guard."""
        inner: LLM = self._private["_inner"]
        return inner

    @property
    def _private(self) -> dict[str, Any]:
        # Where pydantic finds self._inner and self._gate in the end, at a tenth of the time.
        return self.__pydantic_private__ or {}

    @property
    def metadata(self) -> LLMMetadata:  # noqa: D102
        return self._inner.metadata

    def to_payload(self) -> dict[str, Any]:  # noqa: D102
        return self._inner.to_payload()

    def convert_chat_messages(self, messages: Sequence[ChatMessage]) -> list[Any]:  # noqa: D102
        return self._inner.convert_chat_messages(messages)

    @_unspanned
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:  # noqa: ANN401, D102
        return self._call(_Chat(self, messages, kwargs, kwargs.pop(_REVIEWED, ())), partial(self.inner.chat, **kwargs))

    @_unspanned
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:  # noqa: ANN401, D102
        return await self._acall(
            _Chat(self, messages, kwargs, kwargs.pop(_REVIEWED, ())), partial(self.inner.achat, **kwargs)
        )

    @_unspanned
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ANN401, D102, FBT001, FBT002
        ask = partial(self.inner.complete, prompt, formatted=formatted, **kwargs)
        return self._call(_Completion(self, prompt, kwargs), ask)

    @_unspanned
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ANN401, D102, FBT001, FBT002
        ask = partial(self.inner.acomplete, prompt, formatted=formatted, **kwargs)
        return await self._acall(_Completion(self, prompt, kwargs), ask)

    @_unspanned
    def stream_chat(  # noqa: D102
        self,
        messages: Sequence[ChatMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> Generator[ChatResponse, None, None]:
        return self._stream(
            _Chat(self, messages, kwargs, kwargs.pop(_REVIEWED, ())), partial(self.inner.stream_chat, **kwargs)
        )

    @_unspanned
    async def astream_chat(  # noqa: D102
        self,
        messages: Sequence[ChatMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncGenerator[ChatResponse, None]:
        return await self._astream(
            _Chat(self, messages, kwargs, kwargs.pop(_REVIEWED, ())), partial(self.inner.astream_chat, **kwargs)
        )

    @_unspanned
    def stream_complete(  # noqa: D102
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002
        **kwargs: Any,  # noqa: ANN401
    ) -> Generator[CompletionResponse, None, None]:
        ask = partial(self.inner.stream_complete, prompt, formatted=formatted, **kwargs)
        return self._stream(_Completion(self, prompt, kwargs), ask)

    @_unspanned
    async def astream_complete(  # noqa: D102
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncGenerator[CompletionResponse, None]:
        ask = partial(self.inner.astream_complete, prompt, formatted=formatted, **kwargs)
        return await self._astream(_Completion(self, prompt, kwargs), ask)

    @_unspanned
    def structured_predict(  # noqa: D102
        self,
        output_cls: type[M],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> M:
        if not self._has_its_own_structured():
            predicted: M = super(GuardedLLM, self._strict()).structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return predicted
        asked = _Object(self, self._messages(prompt, prompt_args), llm_kwargs or {})
        predict: Callable[[], M] = partial(
            self._inner.structured_predict, output_cls, prompt, llm_kwargs, **prompt_args
        )
        return self._call(asked, predict)

    @_unspanned
    async def astructured_predict(  # noqa: D102
        self,
        output_cls: type[M],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> M:
        if not self._has_its_own_structured():
            predicted: M = await super(GuardedLLM, self._strict()).astructured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
            return predicted
        asked = _Object(self, self._messages(prompt, prompt_args), llm_kwargs or {})
        predict: Callable[[], Awaitable[M]] = partial(
            self._inner.astructured_predict, output_cls, prompt, llm_kwargs, **prompt_args
        )
        return await self._acall(asked, predict)

    @_unspanned
    def stream_structured_predict(  # noqa: D102
        self,
        output_cls: type[M],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> Generator[Any, None, None]:
        if not self._has_its_own_structured():
            return super(GuardedLLM, self._strict()).stream_structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
        asked = _Object(self, self._messages(prompt, prompt_args), llm_kwargs or {})
        predict = self._inner.stream_structured_predict
        return self._stream(asked, partial(predict, output_cls, prompt, llm_kwargs, **prompt_args))

    @_unspanned
    async def astream_structured_predict(  # noqa: D102
        self,
        output_cls: type[M],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> AsyncGenerator[Any, None]:
        if not self._has_its_own_structured():
            return await super(GuardedLLM, self._strict()).astream_structured_predict(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
        asked = _Object(self, self._messages(prompt, prompt_args), llm_kwargs or {})
        predict = self._inner.astream_structured_predict
        return await self._astream(asked, partial(predict, output_cls, prompt, llm_kwargs, **prompt_args))

    def _strict(self) -> Self:
        """The same LLM, which does not refuse: programs would take a refusal for an object, or for a broken one."""
        if not self._gate.refuses:
            return self
        strict = self.model_copy()
        strict._gate = self._gate.strict()
        return strict

    def _has_its_own_structured(self) -> bool:
        kind = type(self._inner)
        return any(getattr_static(kind, name) is not getattr_static(LLM, name) for name in _STRUCTURED)

    def _messages(self, prompt: PromptTemplate, prompt_args: dict[str, Any]) -> list[ChatMessage]:
        return self._extend_messages(prompt.format_messages(llm=self._inner, **prompt_args))

    def _call(self, call: _Call, run: Callable[..., T]) -> T:
        gate: Gate = self._private["_gate"]
        asked = call.asked(gate)
        with self._told(call, gate) as told:
            try:
                gate.admit(asked, call.reviewed)
                answer = run(*call.given(asked))
                gate.release(call.spoken(answer), asked.context, call.reviewed)
            except Exception as error:  # noqa: BLE001 - raised again, where it says nothing that is withheld
                answer = gate.instead(gate.failure(error, asked.context), call.refusal)
            told.end(answer)
        return answer

    async def _acall(self, call: _Call, run: Callable[..., Awaitable[T]]) -> T:
        gate: Gate = self._private["_gate"]
        asked = call.asked(gate)
        with self._told(call, gate) as told:
            try:
                await gate.aadmit(asked, call.reviewed)
                answer = await run(*call.given(asked))
                await gate.arelease(call.spoken(answer), asked.context, call.reviewed)
            except Exception as error:  # noqa: BLE001 - raised again, where it says nothing that is withheld
                answer = gate.instead(await gate.afailure(error, asked.context), call.refusal)
            told.end(answer)
        return answer

    def _stream(self, call: _Call, run: Callable[..., Iterable[T]]) -> Generator[T, None, None]:
        gate: Gate = self._private["_gate"]
        asked = call.asked(gate)
        with self._told(call, gate) as told:
            try:
                # Not in the generator: what goes in is refused where it is asked, not where the answer is read.
                gate.admit(asked, call.reviewed)
                released = gate.stream(run(*call.given(asked)), asked.context, call.refusal, call.reviewed)
            except Exception as error:  # noqa: BLE001 - the same
                released = _only(gate.instead(gate.failure(error, asked.context), call.refusal))
            return told.to_the_end(released)

    async def _astream(self, call: _Call, run: Callable[..., Awaitable[AsyncIterable[T]]]) -> AsyncGenerator[T, None]:
        gate: Gate = self._private["_gate"]
        asked = call.asked(gate)
        with self._told(call, gate) as told:
            try:
                await gate.aadmit(asked, call.reviewed)
                released = gate.astream(await run(*call.given(asked)), asked.context, call.refusal, call.reviewed)
            except Exception as error:  # noqa: BLE001 - the same
                released = _aonly(gate.instead(await gate.afailure(error, asked.context), call.refusal))
            return told.to_the_end_async(released)

    def _told(self, call: _Call, gate: Gate) -> AbstractContextManager[_Told]:
        """Tell the callback handlers of this call; it is the caller who says when it has ended."""
        told = _Told(self.callback_manager, gate, call)
        return self._telling(told, call.trace) if self.callback_manager.handlers else nullcontext(told)

    @contextmanager
    def _telling(self, told: _Told, trace: str) -> Iterator[_Told]:
        with self.callback_manager.as_trace(trace):
            told.start()
            try:
                yield told
            except BaseException as error:
                told.fail(error)
                raise


class GuardedFunctionCallingLLM(GuardedLLM, FunctionCallingLLM):
    """The LLM that ``guard_llm()`` makes of one that calls tools."""

    _inner: FunctionCallingLLM = PrivateAttr()

    def __init__(self, inner: FunctionCallingLLM, gate: Gate) -> None:
        GuardedLLM.__init__(self, inner, gate)

    def _prepare_chat_with_tools(  # noqa: PLR0917 - the framework's signature
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,  # noqa: FBT001, FBT002 - the framework's signature
        allow_parallel_tool_calls: bool = False,  # noqa: FBT001, FBT002
        tool_required: bool = False,  # noqa: FBT001, FBT002
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        # Older integrations know no tool_required.
        prepared = self._inner._prepare_chat_with_tools_compat(
            tools,
            user_msg=user_msg,
            chat_history=chat_history,
            verbose=verbose,
            allow_parallel_tool_calls=allow_parallel_tool_calls,
            tool_required=tool_required,
            **kwargs,
        )
        return {**prepared, _REVIEWED: names_of_guarded(tools, self._gate)}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,  # noqa: FBT001, FBT002 - the framework's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResponse:
        return self._inner._validate_chat_with_tools_response(
            response, tools, allow_parallel_tool_calls=allow_parallel_tool_calls, **kwargs
        )

    def get_tool_calls_from_response(  # noqa: D102
        self,
        response: ChatResponse,
        error_on_no_tool_call: bool = True,  # noqa: FBT001, FBT002 - the framework's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> list[ToolSelection]:
        return self._inner.get_tool_calls_from_response(response, error_on_no_tool_call=error_on_no_tool_call, **kwargs)


class _Chat:
    """A call with messages.

    Attributes:
        llm: the guarded one that is asked.
        reviewed: the names of tools that see to the reviews of their calls.
    """

    trace = "chat"

    def __init__(
        self, llm: LLM, messages: Sequence[ChatMessage], options: dict[str, Any], reviewed: Collection[str] = ()
    ) -> None:
        self.llm = llm
        self.reviewed = reviewed
        self._messages = messages
        self._options = options

    def asked(self, gate: Gate) -> Asked:
        """What goes in."""
        return asked_in_chat(self._messages, gate.left_out)

    def given(self, asked: Asked) -> tuple[Any, ...]:
        """What of it the inner LLM is still to be given."""
        return (asked.messages,)

    def start(self) -> dict[str, Any]:
        """What callback handlers are told before it."""
        return {EventPayload.MESSAGES: self._messages, EventPayload.ADDITIONAL_KWARGS: self._options}

    def end(self, answer: object) -> dict[str, Any]:
        """What callback handlers are told after it."""
        return {EventPayload.MESSAGES: self._messages, EventPayload.RESPONSE: answer}

    def spoken(self, answer: object) -> object:
        """The answer, as it is judged."""
        return answer

    def refusal(self, verdict: Verdict, shown: str) -> Any:  # noqa: ANN401 - of the answer's type
        """What stands in for the answer, or for the rest of it."""
        text, delta = _refusal(self.llm, verdict, shown)
        message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
        # The verdict quotes nothing of what was screened.
        return ChatResponse(message=message, delta=delta, additional_kwargs={"guardmw": verdict.to_dict()})


class _Object(_Chat):
    """A call with messages that is to give an object."""

    def asked(self, _: Gate) -> Asked:
        return asked_in_chat(self._messages)

    def given(self, _: Asked) -> tuple[Any, ...]:
        return ()

    def end(self, answer: object) -> dict[str, Any]:
        message = ChatMessage(role=MessageRole.ASSISTANT, content=self.spoken(answer))
        return super().end(ChatResponse(message=message, raw=answer))

    def spoken(self, answer: object) -> str:
        return object_text(answer)

    def refusal(self, verdict: Verdict, _: str) -> Any:  # noqa: ANN401 - never
        withhold(verdict)


class _Completion:
    """A call with a prompt."""

    trace = "completion"
    reviewed: Collection[str] = ()

    def __init__(self, llm: LLM, prompt: str, options: dict[str, Any]) -> None:
        self.llm = llm
        self._prompt = prompt
        self._options = options

    def asked(self, _: Gate) -> Asked:
        return asked_in_words(self._prompt)

    def given(self, _: Asked) -> tuple[Any, ...]:
        return ()

    def start(self) -> dict[str, Any]:
        return {EventPayload.PROMPT: self._prompt, EventPayload.ADDITIONAL_KWARGS: self._options}

    def end(self, answer: object) -> dict[str, Any]:
        return {EventPayload.PROMPT: self._prompt, EventPayload.COMPLETION: answer}

    def spoken(self, answer: object) -> object:
        return answer

    def refusal(self, verdict: Verdict, shown: str) -> Any:  # noqa: ANN401 - of the answer's type
        text, delta = _refusal(self.llm, verdict, shown)
        return CompletionResponse(text=text, delta=delta, additional_kwargs={"guardmw": verdict.to_dict()})


_Call = _Chat | _Completion


class _Told:
    """What callback handlers are told of one call: of its answer nothing but what has been judged."""

    def __init__(self, manager: CallbackManager, gate: Gate, call: _Call) -> None:
        self._manager = manager
        self._gate = gate
        self._call = call
        self._id: str | None = None

    def start(self) -> None:
        event_id = str(uuid4())
        with self._gate.told(event_id):
            self._id = self._manager.on_event_start(CBEventType.LLM, payload=self._call.start(), event_id=event_id)

    def end(self, answer: object) -> None:
        self._end(lambda: self._call.end(answer))

    def fail(self, error: BaseException) -> None:
        if isinstance(error, GuardmwError):
            mark(error)
        self._end(lambda: {EventPayload.EXCEPTION: error})

    def to_the_end(self, released: Generator[T, None, None]) -> Generator[T, None, None]:
        return released if self._id is None else self._read(released)

    def to_the_end_async(self, released: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        return released if self._id is None else self._aread(released)

    def _end(self, payload: Callable[[], dict[str, Any]]) -> None:
        # Once: a handler may raise at the end, too.
        if (event_id := self._id) is not None:
            self._id = None
            with self._gate.told(event_id):
                self._manager.on_event_end(CBEventType.LLM, payload=payload(), event_id=event_id)

    @begun
    def _read(self, released: Generator[T, None, None]) -> Generator[T, None, None]:
        last = None
        try:
            with closing(released):
                yield BEGUN
                for last in released:
                    yield last
        except BaseException as error:
            self.fail(error)
            raise
        self.end(last)

    @begun
    async def _aread(self, released: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        last = None
        try:
            async with aclosing(released):
                yield BEGUN
                async for last in released:
                    yield last
        except BaseException as error:
            self.fail(error)
            raise
        self.end(last)


def _guarded(llm: LLM, gate: Gate) -> LLM:
    if isinstance(llm, StructuredLLM):
        # It shows the text of its own LLM nowhere but in the object that it makes of it.
        return llm.model_copy(update={"llm": _guarded(llm.llm, gate)})
    return GuardedFunctionCallingLLM(llm, gate) if isinstance(llm, FunctionCallingLLM) else GuardedLLM(llm, gate)


def _refusal(llm: LLM, verdict: Verdict, shown: str) -> tuple[str, str]:
    """All that is said in the end, and what of it is new.

    A program is known to ask where it waits in this very thread, and its LLM is this one, or is at work in between. One
    that waits for a thread or a task of its LLM's own is told of a refusal as of any answer.

    Raises:
        Blocked: it is a program that asks, which would take a refusal for an object, or for a broken one.
    """
    asked: list[object] = [llm]
    frame = currentframe()
    while frame is not None:
        # LlamaIndex's decorators have an LLM as _self, and what stands in for its chunks the call that it is asked by.
        for at in (frame.f_locals.get(name) for name in ("self", "_self", "refusal")):
            asker = getattr(at, "__self__", at)
            # Nothing that a program gives to an LLM tells who asks.
            if isinstance(asker, LLMTextCompletionProgram | FunctionCallingProgram):
                if any(asker._llm is one for one in asked):
                    withhold(verdict)
            elif isinstance(asker, LLM):
                asked.append(asker)
            elif isinstance(asker, _Chat | _Completion):
                asked.append(asker.llm)
        frame = frame.f_back
    delta = f"\n\n{REFUSAL}" if shown else REFUSAL
    return shown + delta, delta


def _only(answer: T) -> Generator[T, None, None]:
    yield answer


async def _aonly(answer: T) -> AsyncGenerator[T, None]:
    yield answer
