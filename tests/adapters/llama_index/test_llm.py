"""guard_llm() and the guarded engines: nobody sees what is withheld, and what is safe is as the model said it."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import (
    REFUSAL,
    guard_chat_engine,
    guard_llm,
    guard_query_engine,
)
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.mock import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from workflows.errors import WorkflowCancelledByUser

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from llama_index.core.llms import LLM

SENTENCES = [f"This is sentence number {at} of a long and harmless answer. " for at in range(9)]
SAFE = "".join(SENTENCES).strip()
UNSAFE = "".join([*SENTENCES[:3], "Here comes the EVIL part. ", *SENTENCES[3:]]).strip()
QUESTION = "What is it?"
# In German, with a letter that is two characters, a flag that is two, and a family that is seven.
FOREIGN_SENTENCES = [f"Satz Nummer {at}: 👩\u200d👩\u200d👧\u200d👦 mo\u0308gen Käse aus 🇩🇪 sehr. " for at in range(9)]
FOREIGN_SAFE = "".join(FOREIGN_SENTENCES).strip()
FOREIGN_WORD = "U\u0308BELTÄTER"
FOREIGN_UNSAFE = "".join([*FOREIGN_SENTENCES[:3], f"Hier kommt der {FOREIGN_WORD}. ", *FOREIGN_SENTENCES[3:]]).strip()


class Witness(KeywordBackend):
    """A keyword backend that keeps what it read."""

    def __init__(self, word: str = "EVIL") -> None:
        super().__init__({word: 0.99})
        self.word = word
        self.asked: list[Conversation] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.asked += conversations
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        await asyncio.sleep(0)
        return self.classify(conversations)

    def judged(self, text: str) -> int:
        """How many of this text's first characters it has read and found safe."""
        covered = 0
        for trial in [conversation.trial for conversation in self.asked]:
            start = text.find(trial)
            if 0 <= start <= covered and trial and self.word not in trial:
                covered = max(covered, start + len(trial))
        return covered


@dataclass
class Source:
    """What a model says, and what became of it.

    Attributes:
        cut: what of the text a chunk adds.
        pace: seconds that it takes for a chunk.
    """

    text: str = SAFE
    shape: str = "cumulative"
    cut: str = r"\S+\s*"
    asked: int = 0
    sent: int = 0
    closed: bool = False
    pace: float = 0.0
    fails: Exception | None = None
    prompts: list[Any] = field(default_factory=list)

    def chunks(self) -> list[ChatResponse]:
        """The answer as it streams, in one of the ways there are."""
        made: list[ChatResponse] = []
        so_far = ""
        shared = ChatMessage(role="assistant", content="")
        for word in re.findall(self.cut, self.text):
            so_far += word
            message, extra, delta = ChatMessage(role="assistant", content=so_far), {}, word
            if self.shape == "piece":
                message = ChatMessage(role="assistant", content=word)
            elif self.shape == "content":
                delta = None
            elif self.shape == "delta":
                message = ChatMessage(role="assistant", content="")
            elif self.shape == "thinking":
                message = ChatMessage(role="assistant", blocks=[ThinkingBlock(content=so_far)])
                extra, delta = {"thinking_delta": word}, ""
            elif self.shape == "beside":
                message = ChatMessage(role="assistant", additional_kwargs={"reasoning_content": so_far})
                delta = None
            elif self.shape == "mutated":
                message = shared
            elif self.shape in ("tool call", "tool call beside"):
                call = {"id": "1", "function": {"name": "note", "arguments": json.dumps({"text": so_far})}}
                block = ToolCallBlock(tool_call_id="1", tool_name="note", tool_kwargs=json.dumps({"text": so_far})[:-2])
                message = ChatMessage(role="assistant", blocks=[block])
                if self.shape == "tool call beside":
                    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]})
                delta = ""
            made.append(ChatResponse(message=message, delta=delta, additional_kwargs=extra))
        return made

    def whole(self) -> ChatResponse:
        last = self.chunks()[-1]
        if self.shape in ("piece", "delta", "mutated"):
            last.message = ChatMessage(role="assistant", content=self.text)
        return ChatResponse(message=last.message)

    def stream(self) -> Iterator[ChatResponse]:
        self.asked += 1
        try:
            for chunk in self.chunks():
                time.sleep(self.pace)
                self.sent += 1
                if self.shape == "mutated":
                    chunk.message.blocks[0].text += chunk.delta or ""  # type: ignore[union-attr]
                yield chunk
            if self.fails:
                raise self.fails
        finally:
            self.closed = True

    async def astream(self) -> AsyncIterator[ChatResponse]:
        self.asked += 1
        try:
            for chunk in self.chunks():
                await asyncio.sleep(self.pace)
                self.sent += 1
                if self.shape == "mutated":
                    chunk.message.blocks[0].text += chunk.delta or ""  # type: ignore[union-attr]
                yield chunk
            if self.fails:
                raise self.fails
        finally:
            self.closed = True


class Fake(FunctionCallingLLM):
    """An LLM that calls tools, and says what a source gives."""

    _source: Source = PrivateAttr(default_factory=Source)

    @classmethod
    def of(cls, source: Source, **options: Any) -> Fake:
        llm = cls(**options)
        llm._source = source
        return llm

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True, model_name="fake-1")

    def _whole(self) -> ChatResponse:
        self._source.asked += 1
        if self._source.fails:
            raise self._source.fails
        return self._source.whole()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        self._source.prompts.append((messages, kwargs))
        return self._whole()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await asyncio.sleep(0)
        return self._whole()

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        return self._source.stream()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        return self._source.astream()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self._whole().message.content or "")

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self._whole().message.content or "")

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return (_completed(chunk) for chunk in self._source.stream())

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return (_completed(chunk) async for chunk in self._source.astream())

    def _prepare_chat_with_tools(
        self, tools: Any, user_msg: Any = None, chat_history: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"messages": [*(chat_history or []), *([ChatMessage(content=user_msg)] if user_msg else [])]}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        return [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_parsed(block))
            for block in blocks
        ]


def _parsed(block: ToolCallBlock) -> dict[str, Any]:
    if isinstance(block.tool_kwargs, dict):
        return block.tool_kwargs
    parsed: dict[str, Any] = json.loads(block.tool_kwargs + '"}')
    return parsed


def _completed(chunk: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=chunk.message.content or "", delta=chunk.delta)


@dataclass
class Watch:
    """What a caller sees, and how much of it before it was judged."""

    text: str
    on_block: str = "raise"
    witness: Witness = field(default_factory=Witness)
    out: str = ""
    seen: list[str] = field(default_factory=list)
    leaked: int = 0

    def delta(self, delta: str | None) -> None:
        self.content(self.out + (delta or ""))

    def content(self, content: str | None) -> None:
        self.out = content or ""
        self.seen.append(self.out)
        shown = self.out.removesuffix(REFUSAL).rstrip()
        self.leaked = max(self.leaked, len(shown) - self.witness.judged(self.text))

    def chunk(self, chunk: ChatResponse | CompletionResponse) -> None:
        """Delta and content each show it."""
        self.seen.append(repr(chunk))
        if chunk.delta:
            self.delta(chunk.delta)
        whole = chunk.text if isinstance(chunk, CompletionResponse) else chunk.message.content
        if whole and whole not in self.out:
            self.content(whole)


Way = Callable[[Any, "Watch"], Any]
"""Asks a model, directly or through what is made of it, and lets a watch see the answer."""

MESSAGES = [ChatMessage(content=QUESTION)]


def chat(llm: Any, watch: Watch) -> None:
    watch.chunk(llm.chat(MESSAGES))


async def achat(llm: Any, watch: Watch) -> None:
    watch.chunk(await llm.achat(MESSAGES))


def complete(llm: Any, watch: Watch) -> None:
    watch.chunk(llm.complete(QUESTION))


async def acomplete(llm: Any, watch: Watch) -> None:
    watch.chunk(await llm.acomplete(QUESTION))


def stream_chat(llm: Any, watch: Watch) -> None:
    for chunk in llm.stream_chat(MESSAGES):
        watch.chunk(chunk)


async def astream_chat(llm: Any, watch: Watch) -> None:
    async for chunk in await llm.astream_chat(MESSAGES):
        watch.chunk(chunk)


def stream_complete(llm: Any, watch: Watch) -> None:
    for chunk in llm.stream_complete(QUESTION):
        watch.chunk(chunk)


async def astream_complete(llm: Any, watch: Watch) -> None:
    async for chunk in await llm.astream_complete(QUESTION):
        watch.chunk(chunk)


def note(text: str) -> str:
    """Note something."""
    return "Noted."


TOOLS = [FunctionTool.from_defaults(note)]


def chat_with_tools(llm: Any, watch: Watch) -> None:
    watch.chunk(llm.chat_with_tools(TOOLS, QUESTION))


async def achat_with_tools(llm: Any, watch: Watch) -> None:
    watch.chunk(await llm.achat_with_tools(TOOLS, QUESTION))


def stream_chat_with_tools(llm: Any, watch: Watch) -> None:
    for chunk in llm.stream_chat_with_tools(TOOLS, QUESTION):
        watch.chunk(chunk)


async def astream_chat_with_tools(llm: Any, watch: Watch) -> None:
    async for chunk in await llm.astream_chat_with_tools(TOOLS, QUESTION):
        watch.chunk(chunk)


def simple(llm: Any) -> Any:
    """A chat engine without documents."""
    return SimpleChatEngine.from_defaults(llm=llm, memory=_memory())


def context(llm: Any) -> Any:
    """A chat engine with documents."""
    return ContextChatEngine.from_defaults(retriever=_index().as_retriever(), llm=llm, memory=_memory())


def condensed(llm: Any) -> Any:
    """A chat engine that rewrites questions."""
    return CondensePlusContextChatEngine.from_defaults(retriever=_index().as_retriever(), llm=llm, memory=_memory())


def _memory() -> ChatMemoryBuffer:
    # The default one leaves it to the garbage collector to close its database.
    return ChatMemoryBuffer.from_defaults()


def _index() -> VectorStoreIndex:
    return VectorStoreIndex.from_documents([Document(text="Eggs are boiled.")])


def engine_chat(engine: Any, watch: Watch) -> None:
    watch.content(engine.chat(QUESTION).response)


async def engine_achat(engine: Any, watch: Watch) -> None:
    watch.content((await engine.achat(QUESTION)).response)


def engine_stream_chat(engine: Any, watch: Watch) -> None:
    for delta in engine.stream_chat(QUESTION).response_gen:
        watch.delta(delta)


async def engine_astream_chat(engine: Any, watch: Watch) -> None:
    async for delta in (await engine.astream_chat(QUESTION)).async_response_gen():
        watch.delta(delta)


def query(engine: Any, watch: Watch) -> None:
    watch.content(str(engine.query(QUESTION)))


async def aquery(engine: Any, watch: Watch) -> None:
    watch.content(str(await engine.aquery(QUESTION)))


def stream_query(engine: Any, watch: Watch) -> None:
    for delta in engine.query(QUESTION).response_gen:
        watch.delta(delta)


async def astream_query(engine: Any, watch: Watch) -> None:
    async for delta in (await engine.aquery(QUESTION)).async_response_gen():
        watch.delta(delta)


def asked(llm: Any, *, streaming: bool) -> Any:
    """A query engine."""
    return _index().as_query_engine(llm=llm, streaming=streaming)


async def run_agent(agent: Any, watch: Watch) -> None:
    handler = agent.run(QUESTION)
    async for event in handler.stream_events():
        watch.seen.append(repr(event))
        if isinstance(event, AgentStream):
            watch.content(event.response)
    watch.content((await handler).response.content)


def function_agent(llm: Any, *, streaming: bool) -> Any:
    return FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming)


def react_agent(llm: Any, *, streaming: bool) -> Any:
    return ReActAgent(tools=TOOLS, llm=llm, streaming=streaming)


def workflow(llm: Any, *, streaming: bool) -> Any:
    return AgentWorkflow(agents=[FunctionAgent(name="one", description="One.", llm=llm, streaming=streaming)])


DIRECT: list[Way] = [chat, achat, complete, acomplete, chat_with_tools, achat_with_tools]
STREAMS: list[Way] = [
    stream_chat,
    astream_chat,
    stream_complete,
    astream_complete,
    stream_chat_with_tools,
    astream_chat_with_tools,
]
ENGINE_WAYS: list[Way] = [engine_chat, engine_achat, engine_stream_chat, engine_astream_chat]


def _through(make: Callable[[Any], Any], way: Way, wrap: Callable[..., Any] | None = None) -> Way:
    """A way through something that is made of an LLM: which is guarded, or what is made of it."""

    def ask(llm: LLM, watch: Watch) -> Any:
        if wrap is None:
            return way(make(llm), watch)
        return way(wrap(make(llm.inner), watch.witness, on_block=watch.on_block), watch)  # type: ignore[attr-defined]

    return ask


PATHS: dict[str, Way] = {way.__name__: way for way in (*DIRECT, *STREAMS)}
for _make in (simple, context, condensed):
    for _way in ENGINE_WAYS:
        PATHS[f"{_make.__name__} {_way.__name__}"] = _through(_make, _way)
        PATHS[f"guarded {_make.__name__} {_way.__name__}"] = _through(_make, _way, guard_chat_engine)
for _way in (query, aquery, stream_query, astream_query):
    _streams = "stream" in _way.__name__
    _asked = lambda llm, streams=_streams: asked(llm, streaming=streams)  # noqa: E731
    PATHS[_way.__name__] = _through(_asked, _way)
    PATHS[f"guarded {_way.__name__}"] = _through(_asked, _way, guard_query_engine)
for _agent in (function_agent, react_agent, workflow):
    for _streams in (False, True):
        _made = lambda llm, agent=_agent, streams=_streams: agent(llm, streaming=streams)  # noqa: E731
        PATHS[f"{'streaming ' if _streams else ''}{_agent.__name__}"] = _through(_made, run_agent)

EVERY_PATH = pytest.mark.parametrize("path", PATHS)
STREAMED = [name for name in PATHS if "stream" in name]
EVERY_STREAM = pytest.mark.parametrize("path", STREAMED)
pytestmark = [
    # LlamaIndex reports what a chat engine's thread raises on its own, too.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    # It looks, when an agent is made, at all that its class has, and pydantic has deprecated some of that.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


async def until_blocked(way: Way, llm: Any, watch: Watch) -> Blocked | None:
    """Ask, and return what was raised."""
    try:
        if (waiting := way(llm, watch)) is not None:
            await waiting
    except Blocked as blocked:
        return blocked
    return None


async def settled() -> None:
    """Async generators that nobody holds are closed by tasks of their own."""
    gc.collect()
    for _ in range(50):
        await asyncio.sleep(0)


def said(path: str, text: str) -> str:
    return f"Thought: I can answer. \nAnswer: {text}" if "react" in path else text


@EVERY_PATH
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
async def test_nobody_sees_what_is_withheld(path: str, on_block: Any) -> None:
    """Not the caller, nor callback handlers, events or errors; and nobody sees anything early."""
    # A chat engine's own thread or task reads ahead of whoever reads from it, as fast as its model writes.
    source = Source(said(path, UNSAFE), pace=0.002 if path.startswith("guarded") else 0)
    watch = Watch(source.text, on_block)
    told = Told()
    llm = guard_llm(Fake.of(source, callback_manager=CallbackManager([told])), watch.witness, on_block=on_block)
    if path == "streaming react_agent" and on_block == "refuse":
        pytest.skip("half a thought and a refusal is no answer for a ReAct agent, which asks again")
    blocked = await until_blocked(PATHS[path], llm, watch)
    assert "EVIL" not in repr(watch.seen) + repr(told.told)
    assert watch.leaked == 0
    if on_block == "raise":
        assert blocked is not None
        assert "EVIL" not in str(blocked)
    else:
        assert REFUSAL in watch.out
    await settled()
    if path in STREAMED:
        assert source.closed
        assert 0 < source.sent < len(source.chunks())
        assert "number 0" in repr(watch.seen)


class Told(BaseCallbackHandler):
    """A callback handler that keeps all it is told."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.told: list[Any] = []

    def on_event_start(self, event_type: Any, payload: Any = None, *_: Any, **__: Any) -> str:
        self.told.append(("start", event_type, payload))
        return ""

    def on_event_end(self, event_type: Any, payload: Any = None, *_: Any, **__: Any) -> None:
        self.told.append(("end", event_type, payload))

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None:
        pass


@EVERY_STREAM
async def test_the_check_notices_a_guard_that_leaks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged yet."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    watch = Watch(said(path, UNSAFE))
    await until_blocked(PATHS[path], guard_llm(Fake.of(Source(watch.text)), watch.witness), watch)
    assert watch.leaked > 0


@EVERY_PATH
async def test_what_is_safe_is_as_the_model_said_it(path: str) -> None:
    """Chunk by chunk, and in the end."""
    unguarded, guarded = Watch(said(path, SAFE)), Watch(said(path, SAFE))
    for watch, wrap in (
        (unguarded, lambda llm: _Bare(llm) if path.startswith("guarded") else llm),
        (guarded, lambda llm: guard_llm(llm, guarded.witness)),
    ):
        way = PATHS[path] if watch is guarded else PATHS[path.removeprefix("guarded ")]
        llm = wrap(Fake.of(Source(said(path, SAFE))))
        if (waiting := way(getattr(llm, "bare", llm), watch)) is not None:
            await waiting
    assert guarded.out == unguarded.out
    assert SAFE in guarded.out
    assert _without_ids(guarded.seen) == _without_ids(unguarded.seen)


def _without_ids(seen: list[str]) -> list[str]:
    return [re.sub(r"tool_id='[^']*'|id_='[^']*'", "", one) for one in seen]


# Every second character, or so: within letters, flags and families.
INSIDE = r"(?s)..?"


@EVERY_PATH
async def test_text_that_is_cut_within_its_letters_is_judged_whole_and_passes_as_it_is(path: str) -> None:
    """Of a language and of signs that are several characters each."""
    source = Source(said(path, FOREIGN_UNSAFE), cut=INSIDE)
    assert any(chunk.delta[0] in "\u0308\u200d" for chunk in source.chunks() if chunk.delta)
    watch = Watch(source.text, witness=Witness(FOREIGN_WORD))
    assert await until_blocked(PATHS[path], guard_llm(Fake.of(source), watch.witness), watch)
    assert watch.leaked == 0
    assert FOREIGN_WORD not in "".join(watch.seen)
    safe = Source(said(path, FOREIGN_SAFE), cut=INSIDE)
    watch = Watch(safe.text, witness=Witness(FOREIGN_WORD))
    assert await until_blocked(PATHS[path], guard_llm(Fake.of(safe), watch.witness), watch) is None
    assert watch.leaked == 0
    assert watch.out.removeprefix(said(path, "")).encode() == FOREIGN_SAFE.encode()


class Once(Source):
    """Says it in its shape, and to the next question something else, plainly."""

    def chunks(self) -> list[ChatResponse]:
        return super().chunks() if self.asked <= 1 else Source("That is noted.").chunks()


def remembered(engine: Any, watch: Watch) -> None:
    """Ask a chat engine, and look into its memory, too."""
    try:
        engine_stream_chat(engine, watch)
    finally:
        watch.seen.append(repr(engine.chat_history))


@pytest.mark.parametrize(
    ("make", "way"), [(lambda llm: function_agent(llm, streaming=True), run_agent), (simple, remembered)]
)
@pytest.mark.parametrize("shape", ["thinking", "tool call"])
@pytest.mark.parametrize("word", ["EVIL", FOREIGN_WORD])
async def test_whatever_form_an_agent_or_an_engine_meets(
    make: Callable[[Any], Any], way: Way, shape: str, word: str
) -> None:
    """Nobody sees of it what is withheld, and it is the same when it is safe."""
    unsafe, safe, cut = (UNSAFE, SAFE, r"\S+\s*") if word == "EVIL" else (FOREIGN_UNSAFE, FOREIGN_SAFE, INSIDE)
    watch = Watch(unsafe, witness=Witness(word))
    assert await until_blocked(_through(make, way), guard_llm(Fake.of(Once(unsafe, shape, cut)), watch.witness), watch)
    assert not re.search("EVIL|BELT", "".join(watch.seen))
    bare, guarded = Watch(safe), Watch(safe, witness=Witness(word))
    await until_blocked(_through(make, way), Fake.of(Once(safe, shape, cut)), bare)
    llm = guard_llm(Fake.of(Once(safe, shape, cut)), guarded.witness)
    assert await until_blocked(_through(make, way), llm, guarded) is None
    assert _without_ids(guarded.seen) == _without_ids(bare.seen)
    if way is run_agent:
        assert re.search("umber 8|ummer 8", "".join(guarded.seen))


@dataclass
class _Bare:
    bare: Any


SEVERAL = pytest.mark.parametrize(
    "path",
    [
        *(way.__name__ for way in (*DIRECT, *STREAMS)),
        "guarded simple engine_chat",
        "guarded simple engine_achat",
        "guarded simple engine_stream_chat",
        "guarded simple engine_astream_chat",
        "guarded query",
        "guarded aquery",
        "guarded stream_query",
        "guarded astream_query",
    ],
)


@EVERY_PATH
async def test_an_unsafe_question_reaches_no_model(path: str) -> None:
    """It is refused where it is asked."""
    source, watch = Source(said(path, SAFE)), Watch(SAFE, witness=Witness("What is it"))
    assert await until_blocked(PATHS[path], guard_llm(Fake.of(source), watch.witness), watch)
    assert source.asked == 0
    assert "sentence" not in repr(watch.seen)


@SEVERAL
@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("bug"), "too few", "late"])
async def test_a_failing_backend_is_for_the_policy_to_decide(path: str, failure: Any) -> None:
    """By default nothing comes out; an answer that only comes late is one."""

    class Odd(Witness):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if failure == "late":
                time.sleep(0.001)
                return super().classify(conversations)
            if failure == "too few":
                return []
            raise failure

    for action in ("block", "allow"):
        watch = Watch(SAFE, witness=Odd())
        # The guarded engines take the guard from the watch.
        watch.witness = judge = Guard(watch.witness, policy=Policy(on_error=action))  # type: ignore[assignment, arg-type]
        watch.content = lambda content, watch=watch: watch.seen.append(content or "")  # type: ignore[misc]
        blocked = await until_blocked(PATHS[path], guard_llm(Fake.of(Source(SAFE)), judge), watch)  # type: ignore[arg-type]
        if failure == "late" or action == "allow":
            assert blocked is None
            assert "number 8" in "".join(watch.seen)
        else:
            assert blocked is not None
            assert blocked.verdict.degraded
            assert "sentence" not in repr(watch.seen)


class Elsewhere(KeywordBackend):
    """Blocks its own thread until the event loop has gone round a few times since it was asked, or fails."""

    def __init__(self, patience: float = 10) -> None:
        super().__init__({})
        self.patience = patience
        self.went_round = threading.Semaphore(0)

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        while self.went_round.acquire(blocking=False):
            pass
        if not all(self.went_round.acquire(timeout=self.patience) for _ in range(5)):
            raise BackendError("the event loop stands still")
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        return await asyncio.to_thread(self.classify, conversations)

    async def go_round(self) -> None:
        while True:
            self.went_round.release()
            await asyncio.sleep(0.0001)


ASYNC = [name for name in PATHS if re.search(r"\ba[csq]|agent|workflow|engine_a", name)]


@pytest.mark.parametrize("path", ASYNC)
async def test_async_paths_never_judge_on_the_event_loop(path: str) -> None:
    """The loop does not wait for a classification."""
    judge = Elsewhere()
    watch = Watch(said(path, SAFE), witness=judge)  # type: ignore[arg-type]
    watch.content = lambda content: watch.seen.append(content or "")  # type: ignore[method-assign]
    going = asyncio.create_task(judge.go_round())
    assert await until_blocked(PATHS[path], guard_llm(Fake.of(Source(watch.text)), judge), watch) is None
    going.cancel()
    assert "number 8" in "".join(watch.seen)


async def test_the_check_notices_a_judge_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked by the sync route."""
    judge = Elsewhere(patience=0.1)

    async def on_the_loop(guard: Guard, given: Any) -> Any:
        return guard.screen_many(given)

    monkeypatch.setattr(Guard, "ascreen_many", on_the_loop)
    going = asyncio.create_task(judge.go_round())
    await asyncio.sleep(0)
    blocked = await until_blocked(achat, guard_llm(Fake.of(Source(SAFE)), judge), Watch(SAFE))
    going.cancel()
    assert blocked is not None
    assert "stands still" in str(blocked)


@pytest.mark.parametrize("way", [achat, astream_chat, astream_complete, acomplete])
async def test_a_backend_that_hangs_lets_nothing_out(way: Way) -> None:
    """Until the caller gives up; then the model does not go on."""

    class Hanging(Witness):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if conversations[0].last.role == "user":
                return self.classify(conversations)
            await asyncio.Event().wait()
            return []

    source, watch = Source(), Watch(SAFE)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(way(guard_llm(Fake.of(source), Hanging()), watch), 0.1)
    assert watch.seen == []
    await settled()
    assert source.sent < len(source.chunks())
    assert source.closed == (source.sent > 0)


class Stuck:
    """Where something waits for ever, and that it has come so far."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.reached = asyncio.Event()

    async def here(self, where: str) -> None:
        if where == self.where:
            self.reached.set()
            await asyncio.Event().wait()

    async def wait(self) -> None:
        await asyncio.wait_for(self.reached.wait(), 3)


@dataclass
class StuckSource(Source):
    """Stops in the middle of its answer."""

    stuck: Stuck = field(default_factory=lambda: Stuck(""))

    async def astream(self) -> AsyncIterator[ChatResponse]:
        async for chunk in super().astream():
            if self.sent == len(self.chunks()) // 2:
                try:
                    await self.stuck.here("model")
                finally:
                    self.closed = True
            yield chunk


class StuckWitness(Witness):
    """Stops in the middle of a question, or of an answer."""

    def __init__(self, stuck: Stuck) -> None:
        super().__init__()
        self.stuck = stuck

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        await self.stuck.here(conversations[-1].last.role)
        return await super().aclassify(conversations)


def own_threads() -> set[str]:
    """All but asyncio's own workers, which wait for more."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


async def cancelled_agent(agent: Any, watch: Watch, stuck: Stuck) -> None:
    """Cancel its run, as LlamaIndex has it."""
    handler = agent.run(QUESTION)

    async def read() -> None:
        async for event in handler.stream_events():
            watch.seen.append(repr(event))
            if isinstance(event, AgentStream):
                watch.content(event.response)

    reading = asyncio.create_task(read())
    await stuck.wait()
    await handler.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await handler
    await reading


async def cancelled_task(way: Way, llm: Any, watch: Watch, stuck: Stuck) -> None:
    """Cancel who waits for it."""
    waiting = asyncio.ensure_future(way(llm, watch))
    await stuck.wait()
    # Python 3.11's wait_for, by which an engine reads its queue, loses a cancellation that comes with an item.
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("where", ["user", "assistant", "model"])
@pytest.mark.parametrize(
    "path",
    [
        "achat",
        "astream_chat",
        "astream_complete",
        "astream_chat_with_tools",
        "guarded simple engine_astream_chat",
        "astream_query",
        "guarded astream_query",
        "function_agent",
        "react_agent",
        "workflow",
    ],
)
async def test_what_is_cancelled_is_over(path: str, where: str) -> None:
    """While the question is judged, while the answer is, or while the model speaks: no task, thread or text is left."""
    if (path, where) == ("achat", "model"):
        pytest.skip("it is the model's own")
    threads = own_threads()
    stuck = Stuck(where)
    source = StuckSource(said(path, UNSAFE if where == "assistant" else SAFE), stuck=stuck)
    watch = Watch(source.text, witness=StuckWitness(stuck))
    llm = guard_llm(Fake.of(source), watch.witness)
    if path in AGENTS:
        await cancelled_agent(AGENTS[path](llm, streaming=True), watch, stuck)
    else:
        await cancelled_task(PATHS[path], llm, watch, stuck)
    await settled()
    seen = len(watch.seen)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert own_threads() == threads
    assert watch.leaked == 0
    assert "EVIL" not in repr(watch.seen)
    assert ("number 0" in repr(watch.seen)) == (where == "model")
    assert source.closed == (source.sent > 0)
    await asyncio.sleep(0.01)
    assert len(watch.seen) == seen


AGENTS = {make.__name__: make for make in (function_agent, react_agent, workflow)}


@pytest.mark.parametrize("path", [name for name in STREAMED if "agent" not in name and "workflow" not in name])
async def test_a_caller_who_stops_reading_stops_the_model(path: str) -> None:
    """By an exception of its own, at the first text it sees."""

    class Leaves(Exception):  # noqa: N818 - it is no error
        pass

    def leave(*_: Any) -> None:
        raise Leaves

    source, watch = Source(pace=0.002), Watch(SAFE)
    watch.content = leave  # type: ignore[method-assign]
    with pytest.raises(Leaves):
        await until_blocked(PATHS[path], guard_llm(Fake.of(source), watch.witness), watch)
    await settled()
    if "engine" in path and not path.startswith("guarded"):
        # Such an engine's own thread or task reads on, as it does without a guard.
        return
    assert source.closed
    assert 0 < source.sent < len(source.chunks())


@SEVERAL
async def test_a_model_that_fails_is_not_hidden(path: str) -> None:
    """Its error comes out, after what has been judged of its answer."""
    source, watch = Source(fails=ConnectionError("gone")), Watch(SAFE)
    with pytest.raises(ConnectionError, match="gone"):
        await until_blocked(PATHS[path], guard_llm(Fake.of(source), watch.witness), watch)
    assert watch.leaked == 0


def _chunk(text: str | None, delta: str | None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role="assistant", content=text), delta=delta)


@pytest.mark.parametrize(
    ("chunks", "passes"),
    [
        ([], True),
        ([_chunk(None, None), _chunk("", ""), _chunk("Hi", "Hi"), _chunk("Hi", None), _chunk(None, "")], True),
        ([_chunk("Hi", "Hi"), None], True),
        ([_chunk("Hi", "Hi"), object()], False),
        ([_chunk("Hi", "Hi"), {"text": "EVIL"}], False),
        ([_chunk("", "EV"), _chunk("", "IL")], False),
        ([_chunk("EV", None), None, _chunk("EVIL", None)], False),
        ([_chunk("Fine. ", "Fine. "), _chunk("EVIL", "")], False),
    ],
)
async def test_odd_chunks_pass_as_they_are_or_not_at_all(chunks: list[Any], passes: bool) -> None:
    """Empty ones are nobody's harm; what cannot be read is not shown."""

    class Odd(Fake):
        def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
            yield from chunks

        async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
            async def stream() -> AsyncIterator[Any]:
                for chunk in chunks:
                    yield chunk

            return stream()

    llm = guard_llm(Odd(), Witness())
    for asynchronous in (False, True):
        seen: list[Any] = []
        blocked = None
        try:
            if asynchronous:
                async for chunk in await llm.astream_chat(MESSAGES):
                    seen.append(chunk)  # noqa: PERF401 - what came before the end counts
            else:
                for chunk in llm.stream_chat(MESSAGES):
                    seen.append(chunk)  # noqa: PERF402
        except Blocked as error:
            blocked = error
        assert (blocked is None) == passes
        assert not passes or seen == chunks
        assert "EVIL" not in repr(seen)


@pytest.mark.parametrize(
    "shape",
    ["cumulative", "piece", "content", "delta", "thinking", "beside", "mutated", "tool call", "tool call beside"],
)
@pytest.mark.parametrize(
    "way", [chat, achat, stream_chat, astream_chat, stream_chat_with_tools, astream_chat_with_tools]
)
async def test_whatever_form_an_answer_has(way: Way, shape: str) -> None:
    """It is judged before it is seen, and is the same when it is safe."""
    source, watch = Source(UNSAFE, shape), Watch(UNSAFE)
    assert await until_blocked(way, guard_llm(Fake.of(source), watch.witness), watch)
    assert "EVIL" not in repr(watch.seen)
    bare, guarded = Watch(SAFE), Watch(SAFE)
    await until_blocked(way, Fake.of(Source(SAFE, shape)), bare)
    assert await until_blocked(way, guard_llm(Fake.of(Source(SAFE, shape)), guarded.witness), guarded) is None
    assert guarded.seen == bare.seen
    assert "number 8" in repr(guarded.seen)


@pytest.mark.parametrize("make", [simple, context, condensed])
@pytest.mark.parametrize("way", ENGINE_WAYS)
async def test_a_chat_engine_remembers_nothing_that_was_withheld(way: Way, make: Callable[[Any], Any]) -> None:
    """And so the conversation goes on."""
    source = Source(UNSAFE)
    engine = make(Fake.of(source))
    guarded = guard_chat_engine(engine, Witness())
    assert await until_blocked(way, guarded, Watch(UNSAFE))
    assert "EVIL" not in repr(engine.chat_history) + repr(guarded.chat_history)
    source.text = SAFE
    assert await until_blocked(way, guarded, Watch(SAFE)) is None
    assert engine.chat_history == guarded.chat_history
    assert engine.chat_history[-1].content == SAFE


@pytest.mark.parametrize("way", ENGINE_WAYS)
async def test_a_chat_engine_never_has_a_question_that_is_withheld(way: Way) -> None:
    """Nor does its memory."""
    engine = simple(Fake.of(source := Source(SAFE)))
    assert await until_blocked(way, guard_chat_engine(engine, Witness("What is it")), Watch(SAFE))
    assert engine.chat_history == []
    assert source.asked == 0


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_query_engine_gives_no_node_that_is_withheld(asynchronous: bool) -> None:
    """A refusal has none, and says why."""
    engine = VectorStoreIndex.from_documents([Document(text="EVIL")]).as_query_engine(llm=Fake.of(Source(SAFE)))
    guarded = guard_query_engine(engine, Witness(), on_block="refuse")
    response = await guarded.aquery(QUESTION) if asynchronous else guarded.query(QUESTION)
    assert str(response) == REFUSAL
    assert response.source_nodes == []
    assert response.metadata is not None
    assert response.metadata["guardmw"]["stage"] == "document"
    guarded = guard_query_engine(engine, Witness())
    with pytest.raises(Blocked):
        await guarded.aquery(QUESTION) if asynchronous else guarded.query(QUESTION)


@pytest.mark.parametrize("wrap", [guard_llm, guard_chat_engine, guard_query_engine])
def test_a_wrong_argument_says_what_is_right(wrap: Callable[..., Any]) -> None:
    """Before anything is asked."""
    with pytest.raises(TypeError, match=r"^give an? (LLM|chat engine|query engine)"):
        wrap("gpt")
    with pytest.raises(TypeError, match="Guard, a Backend, a spec"):
        wrap(Fake(), 1)
    with pytest.raises(ValueError, match="on_block is one of 'raise', 'refuse'"):
        wrap(Fake(), Witness(), on_block="drop")


def test_a_guarded_llm_says_where_the_options_are() -> None:
    """Of what neither has it says no more than any object."""
    llm = guard_llm(MockLLM(max_tokens=3), Witness())
    with pytest.raises(AttributeError, match=r"read it from llm\.inner\.max_tokens"):
        _ = llm.max_tokens  # type: ignore[attr-defined]
    assert llm.inner.max_tokens == 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no attribute 'nonesuch'"):
        _ = llm.nonesuch  # type: ignore[attr-defined]


class Thing(BaseModel):
    """What a model is asked to give."""

    text: str


class Structured(Fake):
    """A model of which a provider has its own way to objects."""

    def _thing(self) -> Thing:
        return Thing(text=self._source.text)

    def structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self._thing()

    async def astructured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self._thing()

    def stream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        yield from (Thing(text=self._source.text[:end]) for end in range(1, len(self._source.text) + 1))

    async def astream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return aiter_of(self.stream_structured_predict())


async def aiter_of(values: Iterator[Any]) -> AsyncIterator[Any]:
    for value in values:
        yield value


class Calling(Fake):
    """A model that gives objects as the arguments of a call."""

    def _prepare_chat_with_tools(self, tools: Any, **kwargs: Any) -> dict[str, Any]:
        return {"messages": [*(kwargs["chat_history"] or []), *([kwargs["user_msg"]] if kwargs["user_msg"] else [])]}

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = ToolCallBlock(tool_call_id="1", tool_name="Thing", tool_kwargs={"text": self._source.text})
        # Of a stream LlamaIndex reads the calls only where they are in a provider's form, too.
        beside = {"tool_calls": [{"id": "1", "name": "Thing", "arguments": call.tool_kwargs}]}
        return ChatResponse(message=ChatMessage(role="assistant", blocks=[call], additional_kwargs=beside))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        yield self.chat(messages)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        return aiter_of(self.stream_chat(messages))


class Writing(Fake):
    """A model that writes objects down."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def _whole(self) -> ChatResponse:
        return ChatResponse(message=ChatMessage(role="assistant", content=json.dumps({"text": self._source.text})))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        whole = self._whole()
        yield ChatResponse(message=whole.message, delta=whole.message.content)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        return aiter_of(self.stream_chat(messages))


PROMPT = PromptTemplate("Say {what}.")


async def predicted(llm: Any, what: str) -> list[Any]:
    return [llm.structured_predict(Thing, PROMPT, what=what)]


async def apredicted(llm: Any, what: str) -> list[Any]:
    return [await llm.astructured_predict(Thing, PROMPT, what=what)]


async def stream_predicted(llm: Any, what: str) -> list[Any]:
    return list(llm.stream_structured_predict(Thing, PROMPT, what=what))


async def astream_predicted(llm: Any, what: str) -> list[Any]:
    return [one async for one in await llm.astream_structured_predict(Thing, PROMPT, what=what)]


async def structured_llm(llm: Any, what: str) -> list[Any]:
    return [llm.as_structured_llm(Thing).chat([ChatMessage(content=what)]).raw]


async def stream_structured_llm(llm: Any, what: str) -> list[Any]:
    return [one.raw for one in llm.as_structured_llm(Thing).stream_chat([ChatMessage(content=what)])]


async def around_structured_llm(llm: Any, what: str) -> list[Any]:
    guarded = guard_llm(llm.inner.as_structured_llm(Thing), KeywordBackend({"EVIL": 0.99}))
    return [guarded.chat([ChatMessage(content=what)]).raw]


EVERY_PREDICTION = pytest.mark.parametrize(
    "way",
    [
        predicted,
        apredicted,
        stream_predicted,
        astream_predicted,
        structured_llm,
        stream_structured_llm,
        around_structured_llm,
    ],
)


@EVERY_PREDICTION
@pytest.mark.parametrize("kind", [Structured, Calling, Writing])
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
@pytest.mark.parametrize(("question", "answer"), [("milk", "EVIL"), ("EVIL", "milk")])
async def test_an_object_that_is_withheld_is_never_given(
    way: Any, kind: type[Fake], on_block: Any, question: str, answer: str
) -> None:
    """Blocked is raised: a refusal is no such object, and half of one would pass for a whole."""
    llm = guard_llm(kind.of(Source(answer)), KeywordBackend({"EVIL": 0.99}), on_block=on_block)
    with pytest.raises(Blocked):
        await way(llm, question)


@EVERY_PREDICTION
@pytest.mark.parametrize("kind", [Structured, Calling, Writing])
async def test_a_safe_object_is_the_models(way: Any, kind: type[Fake]) -> None:
    """In the end, where it streams."""
    llm = guard_llm(kind.of(Source("milk")), KeywordBackend({"EVIL": 0.99}), on_block="refuse")
    *_, last = await way(llm, "bread")
    assert last.text == "milk"
