"""guard_model(): nobody sees what is withheld, not even callbacks, and what is safe is as the model said it."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_guardmw import REFUSAL, GuardedModel, guard_model
from langchain_guardmw.gate import Around, Gate
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel, PrivateAttr

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores, Turn
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from langchain_core.language_models.base import LangSmithParams

# Events of the third version are in beta.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

KEYWORD = KeywordBackend({"EVIL": 0.99})
SENTENCES = [f"This is sentence number {at} of a long and harmless answer. " for at in range(9)]
SAFE = "".join(SENTENCES)
UNSAFE = "".join([*SENTENCES[:3], "Here comes the EVIL part. ", *SENTENCES[3:]])
QUESTION = "What is it?"
# As much of it as looks the same in a repr.
REFUSED = REFUSAL.partition("'t ")[2]


class Witness(KeywordBackend):
    """A keyword backend that keeps what it read."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.asked: list[Conversation] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """EVIL is unsafe."""
        self.asked += conversations
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, after others had their turn."""
        await asyncio.sleep(0)
        return self.classify(conversations)

    def judged(self, text: str) -> int:
        """How many of this text's first characters it has read and found safe."""
        covered = 0
        for trial in [conversation.trial for conversation in self.asked]:
            start = text.find(trial)
            if 0 <= start <= covered and "EVIL" not in trial:
                covered = max(covered, start + len(trial))
        return covered


@dataclass
class Source:
    """What a model says, and what became of it."""

    chunks: Sequence[AIMessageChunk]
    asked: int = 0
    sent: int = 0
    closed: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> AIMessage:
        """All of it at once."""
        merged = self.chunks[0]
        for chunk in self.chunks[1:]:
            merged += chunk
        given = {"content": merged.content, "additional_kwargs": merged.additional_kwargs}
        return AIMessage(**given, tool_calls=merged.tool_calls)


class Fake(BaseChatModel):
    """A chat model that streams what a source gives, and takes tools."""

    model_name: str = "fake-1"
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    _source: Source = PrivateAttr(default_factory=lambda: Source(messages(SAFE)))

    @classmethod
    def of(cls, source: Source, **options: Any) -> Fake:
        """A model that says this."""
        model = cls(**options)
        model._source = source
        return model

    @property
    def _llm_type(self) -> str:
        return "fake"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return {**params, "ls_provider": "faker"}

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        return self.bind(tools=[convert_to_openai_tool(one) for one in tools], **kwargs)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self._source.asked += 1
        self._source.calls.append(kwargs)
        return ChatResult(generations=[ChatGeneration(message=self._source.whole)])

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        await asyncio.sleep(0)
        return self._generate(messages, *args, **kwargs)

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self._source.asked += 1
        self._source.calls.append(kwargs)
        try:
            for chunk in self._source.chunks:
                self._source.sent += 1
                yield ChatGenerationChunk(message=chunk.model_copy())
        finally:
            self._source.closed = True

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._source.asked += 1
        self._source.calls.append(kwargs)
        try:
            for chunk in self._source.chunks:
                await asyncio.sleep(0)
                self._source.sent += 1
                yield ChatGenerationChunk(message=chunk.model_copy())
        finally:
            self._source.closed = True


@dataclass
class Watch(BaseCallbackHandler):
    """A callback handler that keeps all it is told, and measures what of a text it was told too early."""

    witness: Witness = field(default_factory=Witness)
    text: str = ""
    told: list[str] = field(default_factory=list)
    out: str = ""
    leaked: int = 0

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        """Measure."""
        self.told.append(repr((token, chunk)))
        self.see(chunk.message)

    def see(self, message: BaseMessage) -> None:
        """Measure what a chunk shows."""
        self.out += text_of(message)
        self.leaked = max(self.leaked, len(self.out) - self.witness.judged(self.text))

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr(event))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr(response))

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr((error, kwargs)))

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr(outputs))


Way = Callable[["Runnable[Any, Any]", Any, BaseCallbackHandler, Callable[[Any], None]], None]


def invoke(model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]) -> None:
    """Ask for a whole answer."""
    show(model.invoke(question, {"callbacks": [handler]}))


def ainvoke(
    model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]
) -> None:
    """The same on an event loop."""

    async def ask() -> None:
        show(await model.ainvoke(question, {"callbacks": [handler]}))

    asyncio.run(ask())


def stream(model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]) -> None:
    """Ask for a stream."""
    for chunk in model.stream(question, {"callbacks": [handler]}):
        show(chunk)


def astream(
    model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]
) -> None:
    """The same on an event loop."""

    async def ask() -> None:
        async for chunk in model.astream(question, {"callbacks": [handler]}):
            show(chunk)

    asyncio.run(ask())


def events(model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]) -> None:
    """Ask for the events of a stream."""

    async def ask() -> None:
        async for event in model.astream_events(question, {"callbacks": [handler]}, version="v2"):
            show(event)

    asyncio.run(ask())


def events_of_invoke(
    model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]
) -> None:
    """Ask for the events of a chain that does not ask for a stream."""

    async def step(given: Any) -> Any:
        return await model.ainvoke(given)

    events(RunnableLambda(step), question, handler, show)


def events_v3(
    model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]
) -> None:
    """Ask for the events of the third version."""
    answering: Any = model.stream_events(question, {"callbacks": [handler]}, version="v3")  # type: ignore[attr-defined]
    for event in answering:
        show(event)
    show(answering.output)


def aevents_v3(
    model: Runnable[Any, Any], question: Any, handler: BaseCallbackHandler, show: Callable[[Any], None]
) -> None:
    """The same on an event loop."""

    async def ask() -> None:
        answering: Any = await model.astream_events(question, {"callbacks": [handler]}, version="v3")  # type: ignore[misc]
        async for event in answering:
            show(event)
        show(await answering.output)

    asyncio.run(ask())


WHOLE: list[Way] = [invoke, ainvoke]
STREAMED: list[Way] = [stream, astream, events, events_of_invoke, events_v3, aevents_v3]
WAYS = pytest.mark.parametrize("way", WHOLE + STREAMED)
STREAMS = pytest.mark.parametrize("way", STREAMED)
INPUTS = pytest.mark.parametrize("input_", ["before", "parallel", "off"])
JUDGED_INPUTS = pytest.mark.parametrize("input_", ["before", "parallel"])


def words(text: str) -> list[str]:
    """A text in pieces."""
    return re.findall(r"\S+\s*", text)


def messages(text: str) -> list[AIMessageChunk]:
    """A text as a chat model streams it."""
    return [AIMessageChunk(content=word) for word in words(text)]


def calls(text: str) -> list[AIMessageChunk]:
    """A text that a tool is called with, after a few words."""
    arguments = '{"text": "' + text + '"}'
    pieces: list[Any] = [arguments[at : at + 9] for at in range(0, len(arguments), 9)]
    first: Any = {"name": "note", "args": "", "id": "1", "index": 0}
    rest: Any = [{"name": None, "args": piece, "id": None, "index": 0} for piece in pieces]
    return [
        AIMessageChunk(content="Wait. "),
        *(AIMessageChunk(content="", tool_call_chunks=[piece]) for piece in (first, *rest)),
    ]


# What an answer comes as. Accents, joined emoji and Chinese are torn apart between their code points.
SHAPES: dict[str, Callable[[str], list[AIMessageChunk]]] = {
    "text": messages,
    "letters": lambda text: [AIMessageChunk(content=one) for one in "Ze\u0301 👩‍👩‍👧 你好。 " + text[:400]],
    "blocks": lambda text: [AIMessageChunk(content=[{"type": "text", "text": one, "index": 0}]) for one in words(text)],
    "reasoning": lambda text: [
        AIMessageChunk(content="", additional_kwargs={"reasoning_content": one}) for one in words(text)
    ],
    "thinking": lambda text: [
        AIMessageChunk(content=[{"type": "thinking", "thinking": one, "index": 0}]) for one in words(text)
    ],
    "tool call": calls,
    "one chunk": lambda text: [AIMessageChunk(content=text)],
}


def text_of(message: BaseMessage) -> str:
    """What a chunk shows its reader."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = [one if isinstance(one, str) else one.get("text") or one.get("thinking") or "" for one in blocks]
    arguments = [call["args"] or "" for call in getattr(message, "tool_call_chunks", [])]
    return "".join([message.additional_kwargs.get("reasoning_content", ""), *texts, *arguments])


def until_blocked(
    way: Way, model: Runnable[Any, Any], handler: BaseCallbackHandler, show: Callable[[Any], None], question: Any
) -> Blocked | None:
    """Ask, and return what was raised."""
    try:
        way(model, question, handler, show)
    except Blocked as blocked:
        return blocked
    return None


class TestUnit(ChatModelUnitTests):
    """What LangChain holds every chat model to."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """The delegate."""
        return GuardedModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """Around a fake."""
        return {"inner": Fake(), "around": Around(Gate(Guard(KEYWORD), "output"))}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Those are the inner model's."""
        return {}


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
@JUDGED_INPUTS
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
def test_nobody_sees_what_is_withheld(way: Way, shape: str, input_: Any, on_block: Any) -> None:
    """Not the caller, nor callbacks, events or errors; and nobody sees anything early."""
    source = Source(SHAPES[shape](UNSAFE))
    text = "".join(map(text_of, source.chunks))
    watch = Watch(text=text)
    shown: list[Any] = []
    model = guard_model(Fake.of(source), watch.witness, input=input_, on_block=on_block)
    blocked = until_blocked(way, model, watch, shown.append, QUESTION)
    seen = repr(shown) + repr(watch.told)
    assert "EVIL" not in seen
    assert (blocked is not None) == (on_block == "raise")
    assert on_block == "raise" or REFUSED in seen
    assert watch.out.removesuffix(REFUSAL).removesuffix("\n\n") in text
    assert on_block == "refuse" or watch.leaked == 0
    assert not any(getattr(one, "tool_calls", None) for one in shown)
    if way in STREAMED:
        assert source.closed
    if way in STREAMED and shape in ("text", "letters", "blocks", "reasoning", "thinking"):
        assert source.sent < len(source.chunks)
        assert "number" in seen or shape == "letters"


@STREAMS
@pytest.mark.parametrize("broken", ["hold", "observe"])
def test_the_check_notices_a_guard_that_leaks(way: Way, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged, or holds nothing."""
    if broken == "hold":
        monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    mode: Any = broken
    watch = Watch(text=UNSAFE)
    model = guard_model(Fake.of(Source(messages(UNSAFE))), watch.witness, stream=mode)
    until_blocked(way, model, watch, lambda _: None, QUESTION)
    assert watch.leaked > 0


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
@JUDGED_INPUTS
def test_what_is_safe_is_as_the_model_said_it(way: Way, shape: str, input_: Any) -> None:
    """The same chunks, events and messages, but for the ids of their runs."""

    def outcome(wrap: Callable[[Fake], BaseChatModel]) -> list[Any]:
        shown: list[Any] = []
        way(wrap(Fake.of(Source(SHAPES[shape](SAFE)), name="Fake")), QUESTION, Watch(), shown.append)
        return [without_ids(one) for one in shown]

    assert outcome(lambda model: guard_model(model, KEYWORD, input=input_)) == outcome(lambda model: model)


def without_ids(value: Any) -> Any:
    """A value without what no two runs have in common."""
    if isinstance(value, BaseMessage):
        return value.model_copy(update={"id": None}) if value.id else value
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in ("run_id", "parent_ids", "id", "message_id")}
        return {key: without_ids(item) for key, item in kept.items()}
    return value


@WAYS
@JUDGED_INPUTS
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
def test_an_unsafe_question_gets_no_answer(way: Way, input_: Any, on_block: Any) -> None:
    """The model is not asked; or, in parallel, of what it says nothing comes out."""
    source, watch = Source(messages(SAFE)), Watch()
    shown: list[Any] = []
    model = guard_model(Fake.of(source), KEYWORD, input=input_, on_block=on_block)
    blocked = until_blocked(way, model, watch, shown.append, "An EVIL question")
    assert (blocked is not None) == (on_block == "raise")
    assert "sentence" not in repr(shown) + repr(watch.told)
    assert source.asked <= (input_ == "parallel")
    if blocked:
        assert blocked.verdict.stage == "input"
    else:
        assert REFUSED in repr(shown)
    if source.sent:
        assert source.closed
        assert source.sent <= 2  # one chunk ahead


@STREAMS
@pytest.mark.parametrize("bad", ["question", "answer"])
def test_by_the_time_of_the_refusal_the_model_is_closed(way: Way, bad: str) -> None:
    """Whoever reads it may never ask for more."""
    source, closed = Source(messages(UNSAFE if bad == "answer" else SAFE)), list[bool]()

    def show(shown: Any) -> None:
        if REFUSED in repr(shown):
            closed.append(source.closed or not source.sent)

    model = guard_model(Fake.of(source), Witness(), input="parallel", on_block="refuse")
    way(model, "EVIL" if bad == "question" else QUESTION, Watch(), show)
    assert closed
    assert all(closed)


@WAYS
def test_input_off_judges_only_the_answer(way: Way) -> None:
    """As one does who has judged the question already."""
    shown: list[Any] = []
    way(guard_model(Fake.of(Source(messages(SAFE))), KEYWORD, input="off"), "An EVIL question", Watch(), shown.append)
    assert "sentence" in repr(shown)


@WAYS
@INPUTS
def test_an_answer_is_judged_with_the_conversation(way: Way, input_: Any) -> None:
    """All of what was said before is the context of what is on trial, and is itself judged message by message."""
    witness = Witness()
    conversation = [
        SystemMessage("Be brief."),
        HumanMessage("One?"),
        AIMessage("Uno.", tool_calls=[{"name": "note", "args": {"text": "x"}, "id": "1"}]),
        ToolMessage("Noted.", tool_call_id="1", name="note"),
        HumanMessage("Two?"),
    ]
    way(guard_model(Fake.of(Source(messages("Dos. "))), witness, input=input_), conversation, Watch(), lambda _: None)
    *before, answer = witness.asked
    assert answer.last == Turn("assistant", "Dos. ")
    said = ["Be brief.", "One?", "Uno.", "", "Noted.", "Two?"]
    assert [turn.text for turn in answer.context] == said
    assert [asked.last.text for asked in before] == ([] if input_ == "off" else said)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_in_parallel_the_model_runs_while_its_question_is_judged(asynchronous: bool) -> None:
    """The verdict waits for the model here, which could not be if it were asked only afterwards."""
    asked = threading.Event()

    class Curious(Fake):
        def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            asked.set()
            yield from super()._stream(messages, *args, **kwargs)

        async def _astream(
            self, messages: list[BaseMessage], *args: Any, **kwargs: Any
        ) -> AsyncIterator[ChatGenerationChunk]:
            asked.set()
            async for chunk in super()._astream(messages, *args, **kwargs):
                yield chunk

    class Waiting(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            assert asked.wait(10)
            return super().classify(conversations)

        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return await asyncio.to_thread(self.classify, conversations)

    out: list[Any] = []
    model = guard_model(Curious.of(Source(messages(SAFE))), Waiting({}), input="parallel")
    (astream if asynchronous else stream)(model, QUESTION, Watch(), out.append)
    assert "".join(chunk.text for chunk in out) == SAFE


class Endless(Fake):
    """A model that never answers, and knows how it ended."""

    _ended: list[str] = PrivateAttr(default_factory=list)

    async def _wait(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self._ended.append("cancelled")
            raise

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        await self._wait()
        raise AssertionError

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        await self._wait()
        yield ChatGenerationChunk(message=AIMessageChunk(content=""))


async def alone() -> None:
    """No task runs but this one."""
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_block_cancels_a_model_that_thinks(streamed: bool) -> None:
    """At once, and by the time the caller knows the call has ended."""
    inner = Endless()
    model = guard_model(inner, Witness(), input="parallel")
    with pytest.raises(Blocked):
        _ = [chunk async for chunk in model.astream("EVIL")] if streamed else await model.ainvoke("EVIL")
    assert inner._ended == ["cancelled"]
    await alone()


@pytest.mark.parametrize("streamed", [False, True])
@INPUTS
async def test_a_caller_who_gives_up_cancels_the_model(streamed: bool, input_: Any) -> None:
    """And leaves no task behind."""
    inner = Endless()
    model = guard_model(inner, Witness(), input=input_)

    async def ask() -> None:
        _ = [chunk async for chunk in model.astream("?")] if streamed else await model.ainvoke("?")

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(), 0.05)
    assert inner._ended == ["cancelled"]
    await alone()


@pytest.mark.parametrize("streamed", [False, True])
@JUDGED_INPUTS
async def test_a_backend_that_hangs_lets_nothing_out(streamed: bool, input_: Any) -> None:
    """Until the caller gives up; then neither the model nor a task goes on."""

    class Hanging(KeywordBackend):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            await asyncio.Event().wait()
            return []

    source, watch = Source(messages(SAFE)), Watch()
    out: list[Any] = []
    model = guard_model(Fake.of(source), Hanging({}), input=input_)

    async def ask() -> None:
        if streamed:
            async for chunk in model.astream("?", {"callbacks": [watch]}):
                out.append(chunk)  # noqa: PERF401 - what came before the end counts
        else:
            out.append(await model.ainvoke("?", {"callbacks": [watch]}))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(), 0.05)
    assert (out, watch.out) == ([], "")
    assert source.sent == 0 or source.closed
    await alone()


@pytest.mark.parametrize("streamed", [False, True])
def test_no_thread_is_left(streamed: bool) -> None:
    """The judge's is gone with its verdict, whatever that is and whatever the model does."""
    before = set(threading.enumerate())
    model = guard_model(Fake.of(Source(messages(SAFE))), KEYWORD, input="parallel")
    (stream if streamed else invoke)(model, QUESTION, Watch(), lambda _: None)
    with pytest.raises(Blocked):
        (stream if streamed else invoke)(model, "EVIL", Watch(), lambda _: None)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("way", [stream, astream])
@INPUTS
def test_a_caller_who_stops_reading_stops_the_model(way: Way, input_: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Though nothing was blocked; and the event loop has nothing to complain about."""

    class StopError(Exception):
        pass

    def stop(_: Any) -> None:
        raise StopError

    source = Source(messages(SAFE))
    with pytest.raises(StopError):
        way(guard_model(Fake.of(source), KEYWORD, input=input_), QUESTION, Watch(), stop)
    gc.collect()
    assert source.closed
    assert source.sent < len(source.chunks)
    assert not caplog.records


@WAYS
@INPUTS
@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("bug"), "too few", "late"])
def test_a_failing_backend_is_for_the_policy_to_decide(way: Way, input_: Any, failure: Any) -> None:
    """By default nothing comes out; an answer that only comes late is one."""

    class Odd(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if failure == "late":
                threading.Event().wait(0.001)
                return super().classify(conversations)
            if failure == "too few":
                return []
            raise failure

        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            await asyncio.sleep(0.001)
            return self.classify(conversations)

    for action in ("block", "allow"):
        shown: list[Any] = []
        watch = Watch()
        judge = Guard(Odd({}), policy=Policy(on_error=action))  # type: ignore[arg-type]
        model = guard_model(Fake.of(Source(messages(SAFE))), judge, input=input_)
        blocked = until_blocked(way, model, watch, shown.append, QUESTION)
        if failure == "late" or action == "allow":
            assert blocked is None
            assert "number" in repr(shown)
        else:
            assert blocked is not None
            assert blocked.verdict.degraded
            assert "sentence" not in repr(shown) + repr(watch.told)


@WAYS
@INPUTS
def test_a_model_that_fails_is_not_hidden(way: Way, input_: Any) -> None:
    """Its error reaches the caller; but a verdict that blocks its question goes first."""

    class Failing(Fake):
        def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
            raise ConnectionError

        def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            raise ConnectionError

        async def _astream(
            self, messages: list[BaseMessage], *args: Any, **kwargs: Any
        ) -> AsyncIterator[ChatGenerationChunk]:
            raise ConnectionError
            yield

    model = guard_model(Failing(), KEYWORD, input=input_)
    with pytest.raises(ConnectionError):
        way(model, QUESTION, Watch(), lambda _: None)
    with pytest.raises(ConnectionError if input_ == "off" else Blocked):
        way(model, "EVIL", Watch(), lambda _: None)


@STREAMS
def test_nothing_is_held_longer_than_it_must(way: Way) -> None:
    """The first sentence is told while the model is at its second."""
    source, at = Source(messages(SAFE)), list[int]()

    class First(Watch):
        def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
            at.append(source.sent)

    way(guard_model(Fake.of(source), KEYWORD), QUESTION, First(), lambda _: None)
    assert at[0] <= len(SENTENCES[0].split()) + 2


@WAYS
@pytest.mark.parametrize("shared", [False, True])
def test_an_answer_from_a_cache_is_judged_too(way: Way, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds what the inner model said, whether it is that model's own or everybody's."""
    cache = InMemoryCache()
    monkeypatch.setattr("langchain_core.globals._llm_cache", cache if shared else None)
    inner = Fake.of(Source(messages(UNSAFE)), cache=None if shared else cache)
    inner.invoke(QUESTION)
    shown: list[Any] = []
    with pytest.raises(Blocked):
        way(guard_model(inner, KEYWORD), QUESTION, Watch(), shown.append)
    assert "EVIL" not in repr(shown)


def test_a_cache_saves_calls_as_before() -> None:
    """The inner model is asked once."""
    source = Source(messages(SAFE))
    model = guard_model(Fake.of(source, cache=InMemoryCache()), KEYWORD)
    assert model.invoke(QUESTION).text == model.invoke(QUESTION).text == SAFE
    assert source.asked == 1


@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream])
def test_a_rate_limit_is_kept(way: Way) -> None:
    """Once for each call of the inner model."""

    class Counting(InMemoryRateLimiter):
        taken = 0

        def acquire(self, *, blocking: bool = True) -> bool:
            self.taken += 1
            return True

        async def aacquire(self, *, blocking: bool = True) -> bool:
            return self.acquire()

    limiter = Counting()
    way(guard_model(Fake(rate_limiter=limiter), KEYWORD), QUESTION, Watch(), lambda _: None)
    assert limiter.taken == 1


@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream, events, events_of_invoke])
def test_a_model_made_of_models_tells_no_callback(way: Way) -> None:
    """Though LangChain hands callbacks down to whatever runs inside a run."""

    class Router(BaseChatModel):
        to: BaseChatModel

        @property
        def _llm_type(self) -> str:
            return "router"

        def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
            return ChatResult(generations=[ChatGeneration(message=self.to.invoke(messages))])

        async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
            return ChatResult(generations=[ChatGeneration(message=await self.to.ainvoke(messages))])

        def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in self.to.stream(messages):
                yield ChatGenerationChunk(message=chunk)

        async def _astream(
            self, messages: list[BaseMessage], *args: Any, **kwargs: Any
        ) -> AsyncIterator[ChatGenerationChunk]:
            async for chunk in self.to.astream(messages):
                yield ChatGenerationChunk(message=chunk)

    watch, shown = Watch(), list[Any]()
    model = guard_model(Router(to=Fake.of(Source(messages(UNSAFE)))), KEYWORD)
    chain = RunnableLambda(lambda question: question) | model
    assert until_blocked(way, chain, watch, shown.append, QUESTION)
    assert "EVIL" not in repr(shown) + repr(watch.told)


@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream, events, events_v3, aevents_v3])
@pytest.mark.parametrize("unsafe", [False, True])
def test_a_model_that_does_not_stream_answers_whole(way: Way, unsafe: bool) -> None:
    """Judged all the same."""

    class Whole(BaseChatModel):
        @property
        def _llm_type(self) -> str:
            return "whole"

        def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
            return ChatResult(generations=[ChatGeneration(message=AIMessage(UNSAFE if unsafe else SAFE))])

    shown: list[Any] = []
    blocked = until_blocked(way, guard_model(Whole(), KEYWORD), Watch(), shown.append, QUESTION)
    assert (blocked is not None) == unsafe
    assert "EVIL" not in repr(shown)
    assert unsafe or SAFE in repr(shown)


def test_handlers_of_the_inner_model_are_told_what_was_judged() -> None:
    """They are the guarded model's now."""
    watch = Watch()
    inner = Fake.of(Source(messages(UNSAFE)), callbacks=[watch], tags=["mine"], metadata={"a": 1}, name="me")
    model = guard_model(inner, KEYWORD, on_block="refuse")
    model.invoke(QUESTION)
    assert REFUSED in repr(watch.told)
    assert "EVIL" not in repr(watch.told)
    assert (model.tags, model.metadata, model.name) == (["mine"], inner.metadata, "me")


def test_it_passes_for_the_inner_model() -> None:
    """In traces, in agents' choices and in counts of tokens."""
    profile: Any = {"structured_output": True}
    inner = Fake(profile=profile, custom_get_token_ids=lambda text: [1] * len(text), disable_streaming=True)
    model = guard_model(inner, KEYWORD)
    assert (model._llm_type, model.profile, model.model_name) == ("fake", profile, "fake-1")
    assert model._get_ls_params() == inner._get_ls_params()
    assert model._get_invocation_params() == inner._get_invocation_params()
    assert model.get_num_tokens("four") == 4
    assert model.disable_streaming is True
    assert model.cache is False
    with pytest.raises(TypeError):
        guard_model(RunnableLambda(lambda _: AIMessage("Hello")), KEYWORD)


class Note(BaseModel):
    """Note something."""

    text: str


@pytest.mark.parametrize("text", [SAFE, UNSAFE])
@pytest.mark.parametrize("first", ["bound", "guarded"])
@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream])
def test_bound_tools_reach_the_model_and_its_calls_are_judged(way: Way, text: str, first: str) -> None:
    """Whichever was done first."""
    source, shown = Source(calls(text)), list[Any]()
    inner = Fake.of(source)
    if first == "bound":
        model = guard_model(inner.bind_tools([Note], tool_choice="any"), KEYWORD)
    else:
        model = guard_model(inner, KEYWORD).bind_tools([Note], tool_choice="any")
    blocked = until_blocked(way, model, Watch(), shown.append, QUESTION)
    assert source.calls[0]["tools"] == [convert_to_openai_tool(Note)]
    assert source.calls[0]["tool_choice"] == "any"
    if text == UNSAFE:
        assert blocked is not None
        assert blocked.verdict.stage == "tool_call"
        assert not any(chunk.tool_calls for chunk in shown)
    else:
        merged = shown[0]
        for chunk in shown[1:]:
            merged += chunk
        assert [call["args"] for call in merged.tool_calls] == [{"text": SAFE}]


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_structured_output_is_judged(include_raw: bool, asynchronous: bool) -> None:
    """It never passes through a tool."""

    def asked(text: str) -> Any:
        source = Source([one.model_copy() for one in calls(text)])
        for chunk in source.chunks:
            for piece in chunk.tool_call_chunks:
                piece["name"] = piece["name"] and "Note"
        model = guard_model(Fake.of(source), KEYWORD).with_structured_output(Note, include_raw=include_raw)
        return asyncio.run(model.ainvoke(QUESTION)) if asynchronous else model.invoke(QUESTION)

    answer = asked(SAFE)
    assert (answer["parsed"] if include_raw else answer) == Note(text=SAFE)
    with pytest.raises(Blocked):
        asked(UNSAFE)


def test_fallbacks_inside_are_guarded_too() -> None:
    """None of the models in what is bound escapes."""
    first, second = (Fake.of(Source(messages(text))) for text in (SAFE, UNSAFE))

    class Binding(Fake):
        def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
            return first.bind_tools(tools).with_fallbacks([second.bind_tools(tools)])

    bound: Any = guard_model(Binding(), KEYWORD).bind_tools([Note])
    assert [type(one.bound) for one in bound.runnables] == [GuardedModel, GuardedModel]


class Turns(Fake):
    """A model that calls a tool in its first turn and answers in its second."""

    _turns: list[Source] = PrivateAttr()

    @classmethod
    def saying(cls, *turns: list[AIMessageChunk]) -> Turns:
        """A model with these turns."""
        model = cls()
        model._turns = [Source(turn) for turn in turns]
        return model

    def _turn(self, messages: list[BaseMessage]) -> None:
        self._source = self._turns[sum(isinstance(message, ToolMessage) for message in messages)]

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self._turn(messages)
        return super()._generate(messages, *args, **kwargs)

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self._turn(messages)
        yield from super()._stream(messages, *args, **kwargs)

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._turn(messages)
        async for chunk in super()._astream(messages, *args, **kwargs):
            yield chunk


def run_agent(agent: Any, mode: str, asynchronous: bool) -> list[Any]:
    """All that a mode of streaming shows of an agent's run."""
    given = {"messages": [HumanMessage(QUESTION)]}

    async def consume() -> list[Any]:
        if mode == "v3":
            return [event async for event in await agent.astream_events(given, version="v3")]
        if mode == "events":
            return [event async for event in agent.astream_events(given, version="v2")]
        return [event async for event in agent.astream(given, stream_mode=mode)]

    if asynchronous:
        return asyncio.run(consume())
    if mode == "v3":
        return list(agent.stream_events(given, version="v3"))
    return list(agent.stream(given, stream_mode=mode))


MODES = [("messages", False), ("updates", False), ("values", False), ("v3", False)] + [
    (mode, True) for mode in ("messages", "updates", "values", "events", "v3")
]


@pytest.mark.parametrize(("mode", "asynchronous"), MODES)
@pytest.mark.parametrize("bad", ["none", "call", "answer"])
@JUDGED_INPUTS
def test_an_agent_shows_nothing_unjudged(mode: str, asynchronous: bool, bad: str, input_: Any) -> None:
    """In no mode of streaming; a bad tool call does not run, a bad answer ends in a refusal."""
    noted: list[str] = []

    @tool
    def note(text: str) -> str:
        """Note something."""
        noted.append(text)
        return "Noted."

    model = Turns.saying(calls("EVIL" if bad == "call" else "milk"), messages(UNSAFE if bad == "answer" else SAFE))
    agent = create_agent(guard_model(model, KEYWORD, on_block="refuse", input=input_), [note])
    shown = repr(run_agent(agent, mode, asynchronous))
    assert "EVIL" not in shown
    assert noted == ([] if bad == "call" else ["milk"])
    assert (REFUSED in shown) == (bad != "none")
    if bad == "answer" and mode == "messages":
        # Sentence by sentence, not all at once.
        assert "number" in shown


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_streams_a_safe_answer_token_by_token(asynchronous: bool) -> None:
    """The very chunks that its model would have sent."""
    agent = create_agent(guard_model(Turns.saying(messages(SAFE)), KEYWORD), [])
    shown = run_agent(agent, "messages", asynchronous)
    assert [chunk.text for chunk, _ in shown if chunk.text] == [chunk.text for chunk in messages(SAFE)]


def test_too_few_scores_in_the_middle_release_nothing_more() -> None:
    """The policy decides about a backend that fails late, too."""
    out: list[Any] = []
    model = guard_model(Fake.of(Source(messages(SAFE))), ScriptedBackend([0.0, 0.0, BackendError("gone")]))
    with pytest.raises(Blocked):
        stream(model, QUESTION, Watch(), out.append)
    assert "".join(chunk.text for chunk in out) == SENTENCES[0]


def test_names_in_signatures_are_there_at_run_time() -> None:
    """langchain-core asks for them where a guarded model stands in front of another."""
    for name in ("bind_tools", "with_structured_output", "with_retry", "with_fallbacks", "configurable_alternatives"):
        assert "return" in get_type_hints(getattr(GuardedModel, name))
    get_type_hints(GuardedModel.get_num_tokens_from_messages)


def test_tools_are_bound_to_a_guarded_model_and_its_fallbacks() -> None:
    """Each of them stays guarded."""
    source = Source(messages(UNSAFE))
    model: Any = guard_model(Fake(), KEYWORD, on_block="refuse").with_fallbacks([Fake.of(source)])
    bound = model.bind_tools([Note])
    assert bound.invoke(QUESTION).text == SAFE
    assert [type(one.bound) for one in bound.runnables] == [GuardedModel, GuardedModel]


@pytest.mark.parametrize("kind", ["model", "bound", "made when asked", "function"])
def test_alternatives_of_a_guarded_model_are_guarded(kind: str) -> None:
    """Whichever is chosen, and whatever it is."""
    evil = Fake.of(Source(messages(UNSAFE)))
    alternatives: dict[str, Any] = {
        "model": evil,
        "bound": evil.bind(stop=["x"]),
        "made when asked": lambda: evil,
        "function": RunnableLambda(evil.invoke),
    }
    model = guard_model(Fake(), KEYWORD).configurable_alternatives(ConfigurableField(id="m"), evil=alternatives[kind])
    assert model.invoke(QUESTION).text == SAFE
    with pytest.raises(Blocked):
        model.invoke(QUESTION, {"configurable": {"m": "evil"}})


def test_alternatives_that_are_no_models_stay_as_they_are() -> None:
    """Prompts and parsers beside a guarded model, of which the one that is chosen is taken."""
    prompt = ChatPromptTemplate.from_template("short: {q}").configurable_alternatives(
        ConfigurableField(id="p"), default_key="short", long=lambda: ChatPromptTemplate.from_template("long: {q}")
    )
    parser = StrOutputParser().configurable_alternatives(ConfigurableField(id="o"), other=StrOutputParser())
    chain: Any = guard_model(prompt | Fake() | parser, KEYWORD)
    for choice in ("short", "long"):
        assert chain.invoke({"q": QUESTION}, {"configurable": {"p": choice}}) == SAFE
    with pytest.raises(Blocked):
        guard_model(prompt | Fake.of(Source(messages(UNSAFE))) | parser, KEYWORD).invoke({"q": QUESTION})


@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream])
def test_a_function_as_a_fallback_is_judged_unseen(way: Way) -> None:
    """Also what models in it say, of which callbacks hear nothing."""

    class Down(Fake):
        def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
            raise ConnectionError

        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            raise ConnectionError

        async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
            raise ConnectionError
            yield

    for text in (SAFE, UNSAFE):
        other = Fake.of(Source(messages(text)))
        function = RunnableLambda(lambda asked, other=other: other.invoke(asked))
        model = guard_model(Down(), KEYWORD, on_block="refuse").with_fallbacks([function])
        watch, shown = Watch(), []
        way(model, QUESTION, watch, shown.append)
        assert ("EVIL" in repr((watch.told, shown))) is False
        assert (REFUSED in repr(shown)) == (text == UNSAFE)


def test_a_function_in_the_place_of_a_model_says_what_it_is_to_return() -> None:
    """Without a quote of what it returned."""
    wrong = RunnableLambda(lambda _: {"a": "secret"})
    model = guard_model(Fake(), KEYWORD).configurable_alternatives(ConfigurableField(id="m"), wrong=wrong)
    with pytest.raises(TypeError, match="returns an AIMessage or a str, not dict"):
        model.invoke(QUESTION, {"configurable": {"m": "wrong"}})
