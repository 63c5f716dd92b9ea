"""``guard_model()``: a chat model that judges what it is asked, and shows of its answers only what has been judged."""

# ruff: noqa: SLF001 - a model that stands in for another calls of it what langchain-core would

from __future__ import annotations

from collections.abc import Callable, Sequence  # noqa: TC003 - see below
from contextvars import Context, copy_context
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableParallel,
    RunnableSequence,
    RunnableSerializable,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives
from langchain_core.runnables.fallbacks import RunnableWithFallbacks
from langchain_core.runnables.retry import RunnableRetry
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, model_validator

from langchain_guardmw.gate import Around, Gate, Input, OnBlock, as_guard
from langchain_guardmw.hooks import Signed, signed
from langchain_guardmw.outcome import is_failure

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams

    from guardmw import Backend, Guard
    from langchain_guardmw.held import Mode

# langchain-core asks for the type hints of a model's public methods, to tell which of them make another runnable: their
# names are imported at run time.
I = TypeVar("I")  # noqa: E741 - what goes in
O = TypeVar("O")  # noqa: E741 - what comes out
M = TypeVar("M", bound=BaseModel)

# What langchain-core reads off a model. Its cache and its rate limiter stay with the inner model, whose calls they are
# about: what comes from a cache is judged too.
_SHARED = (
    "name",
    "callbacks",
    "tags",
    "metadata",
    "verbose",
    "profile",
    "output_version",
    "disable_streaming",
    "custom_get_token_ids",
)
_shared = attrgetter(*_SHARED)
_NOTHING = ChatResult(generations=[ChatGeneration(message=AIMessage(""))])
_NO_CHUNK = ChatGenerationChunk(message=AIMessageChunk(content=""))


@overload
def guard_model(
    model: BaseChatModel,
    g: Guard | Backend | str | None = None,
    *,
    input: Input = "before",
    on_block: OnBlock = "raise",
    stream: Mode = "hold",
    leak: int = 0,
) -> GuardedModel: ...
@overload
def guard_model(
    model: Runnable[LanguageModelInput, AIMessage],
    g: Guard | Backend | str | None = None,
    *,
    input: Input = "before",
    on_block: OnBlock = "raise",
    stream: Mode = "hold",
    leak: int = 0,
) -> Runnable[LanguageModelInput, AIMessage]: ...
def guard_model(
    model: Runnable[LanguageModelInput, AIMessage],
    g: Guard | Backend | str | None = None,
    *,
    input: Input = "before",  # noqa: A002 - what is judged, as "stream" is how
    on_block: OnBlock = "raise",
    stream: Mode = "hold",
    leak: int = 0,
) -> Runnable[LanguageModelInput, AIMessage]:
    """A chat model that answers as ``model`` does, of which nobody sees what the guard withholds.

    Not in what it returns or streams, and not in callbacks, events and traces: the inner model has none of its own, and
    those attached to it are told what has been judged. Whatever is made of it, by ``bind_tools`` or
    ``with_structured_output``, is guarded as well.

    Every message it is asked with is judged, each with those before it as context, and its answer with all of them.

    Args:
        model: a chat model, or one with tools or arguments bound to it.
        g: as in ``guard()``.
        input: "before": the model is asked once the conversation has been judged. "parallel": while it is judged;
            nothing comes out before that, and a block cancels the call. Async code cancels it at once, sync code can
            do so when the model's first chunk is there. "off": the conversation is not judged, only the answer.
        on_block: "raise" Blocked, or "refuse": answer with ``REFUSAL``, and the verdict in
            ``response_metadata["guardmw"]``.
        stream: as in ``guard()``.
        leak: as in ``guard()``.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: there is no chat model in ``model``.
        ValueError: input, on_block, stream or leak is none of those that there are.
    """
    gate = Gate(as_guard(g), "output", on_block, stream, leak)
    return _guarded(model, Around(gate, input))


class GuardedModel(BaseChatModel):
    """The chat model that ``guard_model()`` makes.

    Attributes:
        inner: the model that answers.
    """

    model_config = ConfigDict(ignored_types=(Signed,))

    inner: BaseChatModel
    around: InstanceOf[Around] = Field(default=Around(Gate(stage="output")), repr=False)

    @model_validator(mode="before")
    @classmethod
    def _resemble(cls, given: Any) -> Any:  # noqa: ANN401 - pydantic's to refuse
        inner = given.get("inner")
        if not isinstance(inner, BaseChatModel):
            return given
        return _of(inner) | given

    def bind_tools(  # noqa: D102
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Runnable[LanguageModelInput, AIMessage]:
        # Some models know no tool_choice.
        chosen = {} if tool_choice is None else {"tool_choice": tool_choice}
        bound = self.inner.bind_tools(tools, **chosen, **kwargs)
        around = self.around.wants_object() if tools and all(map(_is_form, tools)) else self.around
        if isinstance(bound, RunnableBindingBase) and bound.bound is self.inner:
            # As _guarded() does, with no second model around the inner one.
            guarded = self if around is self.around else _changed(self, around=around)
            return _changed(bound, bound=guarded)
        return _guarded(bound, around)

    def with_structured_output(  # noqa: D102
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        structured = self.inner.with_structured_output(schema, include_raw=include_raw, **kwargs)
        return _guarded(structured, self.around)

    def with_retry(  # noqa: D102
        self,
        *,
        retry_if_exception_type: tuple[type[BaseException], ...] | Callable[[BaseException], bool] = (Exception,),
        **kwargs: Any,  # noqa: ANN401
    ) -> Runnable[LanguageModelInput, AIMessage]:
        return super().with_retry(retry_if_exception_type=is_failure(retry_if_exception_type), **kwargs)

    def with_fallbacks(  # noqa: D102
        self,
        fallbacks: Sequence[Runnable[LanguageModelInput, AIMessage]],
        **kwargs: Any,  # noqa: ANN401
    ) -> RunnableWithFallbacks[LanguageModelInput, AIMessage]:
        # One of them is asked after a block, too.
        guarded = [one if isinstance(one, GuardedModel) else _answering(one, self.around) for one in fallbacks]
        return super().with_fallbacks(guarded, **kwargs)

    def configurable_alternatives(  # noqa: D102
        self,
        which: ConfigurableField,
        *,
        default_key: str = "default",
        prefix_keys: bool = False,
        **kwargs: Runnable[LanguageModelInput, AIMessage] | Callable[[], Runnable[LanguageModelInput, AIMessage]],
    ) -> RunnableSerializable[LanguageModelInput, AIMessage]:
        guarded = {name: _alternative(one, self.around, _answering) for name, one in kwargs.items()}
        return super().configurable_alternatives(which, default_key=default_key, prefix_keys=prefix_keys, **guarded)

    def get_token_ids(self, text: str) -> list[int]:  # noqa: D102
        return self.inner.get_token_ids(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> int:  # noqa: ANN401, D102
        return self.inner.get_num_tokens_from_messages(messages, *args, **kwargs)

    @property
    def model_name(self) -> str | None:
        """What agents go by in their choice of how to get structured output."""
        names = (getattr(self.inner, name, None) for name in ("model_name", "model", "model_id"))
        return next((name for name in names if isinstance(name, str)), None)

    @property
    def _llm_type(self) -> str:
        return self.inner._llm_type

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return dict(self.inner._identifying_params)

    @property
    def _serialized(self) -> dict[str, Any]:
        # For callbacks. langchain-core's own spells out the inner model, anew for each of the many made of it.
        kind = f"{type(self).__name__}(inner={type(self.inner).__name__})"
        return {"lc": 1, "type": "not_implemented", "id": self.lc_id(), "repr": kind, "name": self.get_name()}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        return self.inner._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:  # noqa: ANN401
        return self.inner._get_ls_params(stop=stop, **kwargs)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None], /) -> dict[str, Any]:
        return self.inner._combine_llm_outputs(llm_outputs)

    def _should_stream(self, **kwargs: Any) -> bool:  # noqa: ANN401
        return super()._should_stream(**kwargs) and self.inner._should_stream(**kwargs | {"stream": True})

    # Whatever way it was asked, the message that comes out here is the one that the caller gets.
    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        return self.around.told(super()._generate_with_cache(messages, stop, run_manager, **kwargs))

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        return self.around.told(await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs))

    @signed
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the inner model tells nobody
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        ask = partial(self.inner._generate_with_cache, messages, stop=stop, **kwargs)
        return self.around.call(messages, ask, empty=_NOTHING, context=_apart())

    @signed
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the inner model tells nobody
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        ask = partial(self._aanswer, messages, stop=stop, **kwargs)
        return await self.around.acall(messages, ask, empty=_NOTHING)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Iterator[ChatGenerationChunk]:
        ask = partial(self._chunks, messages, stop=stop, **kwargs)
        for chunk in self.around.stream(messages, ask, empty=_NO_CHUNK, context=_apart()):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncIterator[ChatGenerationChunk]:
        ask = partial(self._achunks, messages, stop=stop, **kwargs)
        async for chunk in self.around.astream(messages, ask, empty=_NO_CHUNK, context=_apart()):
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _aanswer(self, messages: list[BaseMessage], **kwargs: Any) -> ChatResult:  # noqa: ANN401
        """The inner model's own; as ``_apart()``, without a task, which would cost as much as the guard."""
        token = var_child_runnable_config.set(_unheard())
        try:
            return await self.inner._agenerate_with_cache(messages, **kwargs)
        finally:
            var_child_runnable_config.reset(token)

    def _chunks(self, messages: list[BaseMessage], **kwargs: Any) -> Iterator[ChatGenerationChunk]:  # noqa: ANN401
        """The inner model's own; its whole answer as one, if it does not stream."""
        if type(self.inner)._stream is BaseChatModel._stream:
            yield as_chunk(self.inner._generate_with_cache(messages, **kwargs))
            return
        if self.inner.rate_limiter:
            self.inner.rate_limiter.acquire(blocking=True)
        yield from self.inner._stream(messages, **kwargs)

    async def _achunks(
        self,
        messages: list[BaseMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        kind = type(self.inner)
        if kind._astream is BaseChatModel._astream and kind._stream is BaseChatModel._stream:
            yield as_chunk(await self.inner._agenerate_with_cache(messages, **kwargs))
            return
        if self.inner.rate_limiter:
            await self.inner.rate_limiter.aacquire(blocking=True)
        async for chunk in self.inner._astream(messages, **kwargs):
            yield chunk


class Answering(BaseChatModel):
    """What answers as a chat model does, and is none: a function, or what makes a model only when it is asked.

    Attributes:
        runnable: that answers, in one piece.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    runnable: InstanceOf[Runnable[Any, Any]]

    @property
    def _llm_type(self) -> str:
        return self.runnable.get_name()

    def bind_tools(self, *args: Any, **kwargs: Any) -> Answering:  # noqa: ANN401, D102
        runnable: Any = self.runnable
        return Answering(runnable=runnable.bind_tools(*args, **kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - nobody is told what is not judged
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        stops = {} if stop is None else {"stop": stop}
        return _result(self.runnable.invoke(messages, {"callbacks": []}, **stops, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - nobody is told what is not judged
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResult:
        stops = {} if stop is None else {"stop": stop}
        return _result(await self.runnable.ainvoke(messages, {"callbacks": []}, **stops, **kwargs))


def stand_in(inner: Runnable[LanguageModelInput, AIMessage], around: Around) -> Runnable[LanguageModelInput, AIMessage]:
    """An agent's model, guarded, which need not be a chat model.

    Of one it is a ``GuardedModel`` in less than half the time, as agents need one for every turn: nothing is validated.
    """
    if not isinstance(inner, BaseChatModel):
        return _answering(inner, around)
    return _changed(_blank(), **_of(inner), inner=inner, around=around)


def _changed(model: M, **changes: Any) -> M:  # noqa: ANN401 - its fields
    """As ``model_copy``, for which an agent's turn is too short."""
    made: M = object.__new__(type(model))
    put = object.__setattr__
    put(made, "__dict__", {**model.__dict__, **changes})
    extra, private = model.__pydantic_extra__, model.__pydantic_private__
    put(made, "__pydantic_extra__", dict(extra) if extra else extra)
    put(made, "__pydantic_fields_set__", {*model.__pydantic_fields_set__, *changes})
    put(made, "__pydantic_private__", dict(private) if private else private)
    return made


@cache
def _blank() -> GuardedModel:
    return GuardedModel.model_construct()


def _of(inner: BaseChatModel) -> dict[str, Any]:
    """What a guarded model has of the inner one, and a cache of its own, which is none."""
    return {**dict(zip(_SHARED, _shared(inner), strict=True)), "cache": False}


def _guarded(runnable: Runnable[I, O], around: Around) -> Runnable[I, O]:
    """The same with every chat model in it guarded."""
    guarded: Runnable[I, O] = _replaced(runnable, around)
    if guarded is runnable:
        raise TypeError(f"there is no chat model to guard in a {type(runnable).__name__}")
    return guarded


def _answering(runnable: Runnable[I, O], around: Around) -> Runnable[I, O]:
    """What stands beside a guarded model, or in its place, guarded whatever it is."""
    guarded: Runnable[I, O] = _replaced(runnable, around)
    if guarded is runnable:
        whole: Any = GuardedModel(inner=Answering(runnable=runnable), around=around)
        return cast("Runnable[I, O]", whole)
    return guarded


def _alternative(
    one: Runnable[I, O] | Callable[[], Runnable[I, O]],
    around: Around,
    guarded: Callable[[Any, Around], Any],
) -> Runnable[I, O] | Callable[[], Runnable[I, O]]:
    if isinstance(one, Runnable):
        return cast("Runnable[I, O]", guarded(one, around))
    return lambda: guarded(one(), around)


def _chosen(runnable: RunnableConfigurableAlternatives[I, O], around: Around) -> RunnableConfigurableAlternatives[I, O]:
    """What configuration chooses from: chat models and what stands in their place, or anything else."""
    options = (runnable.default, *runnable.alternatives.values())
    models = any(isinstance(one, Runnable) and isinstance(_bare(one), BaseChatModel) for one in options)
    guarded = _answering if models else _replaced
    default = guarded(runnable.default, around)
    others = {name: _alternative(one, around, guarded) for name, one in runnable.alternatives.items()}
    if default is runnable.default and all(one is others[name] for name, one in runnable.alternatives.items()):
        return runnable
    return runnable.model_copy(update={"default": default, "alternatives": others})


def _replaced(runnable: Runnable[Any, Any], around: Around) -> Any:  # noqa: ANN401 - a runnable of the same type
    """The very same where there is no chat model in it."""
    if isinstance(runnable, BaseChatModel):
        return GuardedModel(inner=runnable, around=around)
    if isinstance(runnable, RunnableConfigurableAlternatives):
        return _chosen(runnable, around)
    inside = {name: _replaced(part, around) for name, part in _within(runnable).items()}
    if all(part is inside[name] for name, part in _within(runnable).items()):
        return runnable
    if isinstance(runnable, RunnableSequence):
        return RunnableSequence(*inside.values(), name=runnable.name)
    if isinstance(runnable, RunnableParallel):
        return RunnableParallel(inside)
    if isinstance(runnable, RunnableWithFallbacks):
        first, *others = inside.values()
        if isinstance(_bare(first), BaseChatModel):
            others = [_answering(one, around) for one in runnable.fallbacks]
        return runnable.model_copy(update={"runnable": first, "fallbacks": others})
    if isinstance(runnable, RunnableRetry):
        inside["retry_exception_types"] = is_failure(runnable.retry_exception_types)
    # A binding: nothing else has anything in it.
    return cast("RunnableBindingBase[Any, Any]", runnable).model_copy(update=inside)


def _within(runnable: Runnable[Any, Any]) -> dict[str, Runnable[Any, Any]]:
    """What langchain-core puts models into, and there what is in it."""
    if isinstance(runnable, RunnableSequence):
        return dict(zip(map(str, range(len(runnable.steps))), runnable.steps, strict=True))
    if isinstance(runnable, RunnableParallel):
        return dict(runnable.steps__)
    if isinstance(runnable, RunnableWithFallbacks):
        return dict(zip(map(str, range(len(runnable.fallbacks) + 1)), runnable.runnables, strict=True))
    return {"bound": runnable.bound} if isinstance(runnable, RunnableBindingBase) else {}


def _bare(runnable: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """What it is without what is bound to it."""
    return _bare(runnable.bound) if isinstance(runnable, RunnableBindingBase) else runnable


def _is_form(tool: object) -> bool:
    """Whether nothing can be done with a tool: agents offer one for their model to give structured output.

    One without any other tools asks until it gets that.
    """
    return isinstance(tool, StructuredTool) and tool.func is None and tool.coroutine is None


def _apart() -> Context:
    """A context in which a model that is made of other runnables does not tell this run's callbacks what they do."""
    context = copy_context()
    context.run(var_child_runnable_config.set, _unheard())
    return context


def _unheard() -> RunnableConfig | None:
    """What this run is configured to do, without those who are told of it: callbacks, and streams of a graph."""
    config = var_child_runnable_config.get()
    chosen = config.get("configurable") if config else None
    if not chosen:
        return None
    return {"configurable": {name: value for name, value in chosen.items() if not name.startswith("__")}}


def _result(answer: object) -> ChatResult:
    message = AIMessage(answer) if isinstance(answer, str) else answer
    if not isinstance(message, AIMessage):
        raise TypeError(f"what answers as a chat model returns an AIMessage or a str, not {type(answer).__name__}")
    if isinstance(message, AIMessageChunk):
        message = message_chunk_to_message(message)
    return ChatResult(generations=[ChatGeneration(message=message)])


def as_chunk(result: ChatResult) -> ChatGenerationChunk:
    """A whole answer as the only chunk of a stream."""
    generation = result.generations[0]
    message = AIMessageChunk(**generation.message.model_dump(exclude={"type"}), chunk_position="last")
    return ChatGenerationChunk(message=message, generation_info=generation.generation_info)
