"""The handler stops what its guard blocks, wherever LlamaIndex lets a handler, and leaves everything else as it was."""

# The ways to call a model are named as LlamaIndex names them, and fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import copy
import functools
import logging
import pickle
import threading
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import (
    CoverageWarning,
    GuardCallbackHandler,
    _asked,
    _verdicts,
    guard_llm,
    guardmw_callback_handler,
)
from llama_index.core import Settings
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ImageBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base import global_stack_trace, global_stack_trace_ids
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.callbacks.schema import BASE_TRACE_EVENT
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import ImageNode, NodeWithScore

from guardmw import Backend, BackendError, Blocked, Guard, Policy, Scores
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex

    from tests.adapters.llama_index.conftest import CountingLLM

EVIL = KeywordBackend({"EVIL": 0.99})


class Failing:
    """A backend that cannot score."""

    name = "failing"

    def classify(self, conversations: object) -> list[Scores]:
        raise BackendError("out of order")

    async def aclassify(self, conversations: object) -> list[Scores]:
        raise BackendError("out of order")


class Recording(BaseCallbackHandler):
    """Remembers what began, and as whose child."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.tree: list[tuple[str, str]] = []
        self._kinds = {BASE_TRACE_EVENT: BASE_TRACE_EVENT}

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> str:
        self._kinds[event_id] = event_type.value
        self.tree.append((event_type.value, self._kinds.get(parent_id, "unknown")))
        return event_id

    def on_event_end(self, *args: Any, **kwargs: Any) -> None:
        pass

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None:
        pass


def ask(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="system", content="Be kind."), ChatMessage(content=text)]


async def chat(llm: CountingLLM, text: str) -> str:
    return str(llm.chat(ask(text)).message.content)


async def achat(llm: CountingLLM, text: str) -> str:
    return str((await llm.achat(ask(text))).message.content)


async def stream_chat(llm: CountingLLM, text: str) -> str:
    return "".join(part.delta or "" for part in llm.stream_chat(ask(text)))


async def astream_chat(llm: CountingLLM, text: str) -> str:
    return "".join([part.delta or "" async for part in await llm.astream_chat(ask(text))])


async def complete(llm: CountingLLM, text: str) -> str:
    return str(llm.complete(text).text)


async def acomplete(llm: CountingLLM, text: str) -> str:
    return str((await llm.acomplete(text)).text)


async def stream_complete(llm: CountingLLM, text: str) -> str:
    return "".join(part.delta or "" for part in llm.stream_complete(text))


async def astream_complete(llm: CountingLLM, text: str) -> str:
    return "".join([part.delta or "" async for part in await llm.astream_complete(text)])


def engine(llm: CountingLLM) -> SimpleChatEngine:
    # The default memory leaves a database connection open.
    return SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())


async def chat_engine(llm: CountingLLM, text: str) -> str:
    return str(engine(llm).chat(text))


async def chat_engine_achat(llm: CountingLLM, text: str) -> str:
    return str(await engine(llm).achat(text))


async def chat_engine_stream(llm: CountingLLM, text: str) -> str:
    return "".join(engine(llm).stream_chat(text).response_gen)


async def chat_engine_astream(llm: CountingLLM, text: str) -> str:
    response = await engine(llm).astream_chat(text)
    return "".join([token async for token in response.async_response_gen()])


Path = Callable[["CountingLLM", str], Awaitable[str]]
PATHS: list[Path] = [
    chat,
    achat,
    stream_chat,
    astream_chat,
    complete,
    acomplete,
    stream_complete,
    astream_complete,
    chat_engine,
    chat_engine_achat,
    chat_engine_stream,
    chat_engine_astream,
]
MakeLLM = Callable[..., "CountingLLM"]
MakeHandler = Callable[["Guard | Backend | str | None"], GuardCallbackHandler]
IndexOf = Callable[..., "VectorStoreIndex"]


@pytest.mark.parametrize("path", PATHS)
async def test_an_unsafe_turn_never_reaches_the_model(
    path: Path, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """Blocked comes out of every way to call an LLM, and the model did not run."""
    llm = make_llm(handler)
    with pytest.raises(Blocked) as caught:
        await path(llm, "EVIL")
    assert caught.value.verdict.stage == "input"
    assert llm.calls == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_safe_turn_gets_the_same_answer(path: Path, make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """With a handler as without one, and with one run of the model."""
    llm = make_llm(handler)
    assert await path(llm, "hi") == await path(make_llm(), "hi") == "All is well."
    assert llm.calls == 1


@pytest.mark.parametrize("path", [chat, achat, complete, acomplete, chat_engine, chat_engine_achat])
async def test_an_unsafe_answer_does_not_come_back(
    path: Path, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """An answer that is returned whole is judged before its caller has it."""
    with pytest.raises(Blocked) as caught:
        await path(make_llm(handler, reply="pure EVIL"), "hi")
    assert caught.value.verdict.stage == "output"


def test_a_stream_is_judged_after_its_text_is_out(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """The documented limit of a handler: every word has been read when the stream raises."""
    words: list[str | None] = []
    stream = make_llm(handler, reply="pure EVIL indeed").stream_complete("hi")
    with pytest.raises(Blocked) as caught:
        words.extend(part.delta for part in stream)
    assert words == ["pure", " EVIL", " indeed"]
    assert caught.value.verdict.stage == "output"


async def test_an_async_stream_is_judged_after_its_text_is_out(
    make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """The same, in async."""
    words = []
    with pytest.raises(Blocked):  # noqa: PT012 - a stream is read in a loop
        async for part in await make_llm(handler, reply="pure EVIL indeed").astream_chat(ask("hi")):
            words.append(part.delta)  # noqa: PERF401 - what came before the exception is the point
    assert words == ["pure", " EVIL", " indeed"]


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_query_is_judged_before_anything_is_searched(
    streaming: bool, index_of: IndexOf, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """A query engine, sync and async: an unsafe query is neither embedded nor answered."""
    recording = Recording()
    Settings.callback_manager = CallbackManager([recording, handler])
    Settings.llm = llm = make_llm()
    engine = index_of("The sky is blue.").as_query_engine(streaming=streaming)
    recording.tree.clear()
    with pytest.raises(Blocked):
        engine.query("EVIL")
    with pytest.raises(Blocked):
        await engine.aquery("EVIL")
    assert recording.tree == [("query", BASE_TRACE_EVENT)] * 2
    assert llm.calls == 0


async def test_a_safe_query_gets_its_answer(
    index_of: IndexOf, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """A query engine, sync, async and streaming, answers as its model does."""
    Settings.callback_manager = CallbackManager([handler])
    Settings.llm = llm = make_llm()
    index = index_of("The sky is blue.")
    assert str(index.as_query_engine().query("hi")) == "All is well."
    assert str(await index.as_query_engine().aquery("hi")) == "All is well."
    assert str(index.as_query_engine(streaming=True).query("hi")) == "All is well."
    assert llm.calls == 3


async def test_an_unsafe_node_is_not_retrieved(
    index_of: IndexOf, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """A poisoned document stops retrieval, and with it the query, before a model reads it."""
    Settings.callback_manager = CallbackManager([handler])
    Settings.llm = llm = make_llm()
    index = index_of("The sky is EVIL.")
    chat = index.as_chat_engine(ChatMode.CONTEXT, memory=ChatMemoryBuffer.from_defaults())
    for call in (index.as_retriever().retrieve, index.as_query_engine().query, chat.chat):
        with pytest.raises(Blocked) as caught:
            call("What colour is the sky?")
        assert caught.value.verdict.stage == "document"
    with pytest.raises(Blocked):
        await index.as_retriever().aretrieve("What colour is the sky?")
    assert llm.calls == 0


def test_the_metadata_of_a_node_is_judged(index_of: IndexOf, handler: GuardCallbackHandler) -> None:
    """Metadata goes into the prompt, so it is on trial."""
    Settings.callback_manager = CallbackManager([handler])
    with pytest.raises(Blocked):
        index_of("The sky is blue.", title="EVIL").as_retriever().retrieve("What colour is the sky?")


def test_an_image_node_is_partly_judged(handler: GuardCallbackHandler, make_handler: MakeHandler) -> None:
    """What cannot be judged gets the policy's on_partial."""
    nodes: dict[str, Any] = {EventPayload.NODES: [NodeWithScore(node=ImageNode(text="a cat", image_url="u"))]}
    with pytest.raises(Blocked, match="not judged: image"):
        handler.on_event_end(CBEventType.RETRIEVE, nodes)
    lenient = make_handler(Guard(EVIL, policy=Policy(on_partial="allow")))
    lenient.on_event_end(CBEventType.RETRIEVE, nodes)


def test_an_image_in_a_message_is_not_passed_over(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """An image block makes the verdict on its message partial."""
    llm = make_llm(handler)
    with pytest.raises(Blocked, match="not judged: image"):
        llm.chat([ChatMessage(blocks=[ImageBlock(image=b"\x89PNG")])])
    assert llm.calls == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LlamaIndex's own
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("command", ["ls", "EVIL"])
async def test_a_tool_call_is_judged_before_the_tool_runs(
    streaming: bool, command: str, handler: GuardCallbackHandler
) -> None:
    """A FunctionAgent's tool does not run where its model's call is blocked: the call is part of the answer."""
    ran = []

    def shell(cmd: str) -> str:
        """Run a command."""
        ran.append(cmd)
        return "done"

    call = ToolCallBlock(tool_call_id="1", tool_name="shell", tool_kwargs={"cmd": command})
    answers = {False: ChatMessage(role="assistant", blocks=[call]), True: ChatMessage(role="assistant", content="ok")}
    llm = MockFunctionCallingLLM(
        callback_manager=CallbackManager([handler]),
        response_generator=lambda messages, **_: answers[messages[-1].role == "tool"],
    )
    agent = FunctionAgent(tools=[shell], llm=llm, streaming=streaming)
    memory = ChatMemoryBuffer.from_defaults()
    if command == "EVIL":
        with pytest.raises(Blocked) as caught:
            await agent.run("List my files.", memory=memory)
        assert caught.value.verdict.stage == "tool_call"
        assert ran == []
    else:
        assert str(await agent.run("List my files.", memory=memory)) == "ok"
        assert ran == ["ls"]


def test_a_tool_result_is_judged_before_a_model_reads_it(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """A tool's message is on trial, though the user's is harmless."""
    llm = make_llm(handler)
    with pytest.raises(Blocked) as caught:
        llm.chat([ChatMessage(content="hi"), ChatMessage(role="tool", content="EVIL")])
    assert caught.value.verdict.stage == "tool_result"


def test_every_turn_is_judged_in_its_context_in_one_batch(make_llm: MakeLLM, make_handler: MakeHandler) -> None:
    """All turns but the model's own, each with the turns before it; the answer with all of them."""
    backend = ScriptedBackend([0.0] * 4)
    handler = make_handler(backend)
    messages = [*ask("first"), ChatMessage(role="assistant", content="answer"), ChatMessage(content="second")]
    handler.on_event_start(CBEventType.LLM, {EventPayload.MESSAGES: messages})
    response = ChatResponse(message=ChatMessage(role="assistant", content="last"))
    handler.on_event_end(CBEventType.LLM, {EventPayload.MESSAGES: messages, EventPayload.RESPONSE: response})
    assert backend.batches == [3, 1]
    assert [[turn.text for turn in asked.turns] for asked in backend.asked] == [
        ["Be kind."],
        ["Be kind.", "first"],
        ["Be kind.", "first", "answer", "second"],
        ["Be kind.", "first", "answer", "second", "last"],
    ]


def test_history_that_passed_is_not_judged_again(make_handler: MakeHandler) -> None:
    """The next call of a chat judges only what is new; another context makes a turn new."""
    backend = ScriptedBackend([0.0] * 6)
    handler = make_handler(backend)
    for messages in (ask("first"), [*ask("first"), ChatMessage(content="second")], ask("first")):
        handler.on_event_start(CBEventType.LLM, {EventPayload.MESSAGES: messages})
    assert backend.batches == [2, 1]
    handler.on_event_start(CBEventType.LLM, {EventPayload.MESSAGES: ask("first")[1:]})
    assert backend.batches == [2, 1, 1]


def test_only_a_clean_pass_is_remembered(make_handler: MakeHandler) -> None:
    """What was flagged, or could not be judged, is judged again."""
    backend = ScriptedBackend([0.4, BackendError("x"), 0.0])
    handler = make_handler(Guard(backend, policy=Policy(threshold={"flag": 0.3, "block": 0.6}, on_error="allow")))
    for _ in range(4):
        handler.on_event_start(CBEventType.LLM, {EventPayload.PROMPT: "hi"})
    assert backend.batches == [1, 1, 1]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, make_handler: MakeHandler) -> None:
    """The oldest pass is forgotten first."""
    monkeypatch.setattr(_asked, "REMEMBERED", 2)
    backend = ScriptedBackend([0.0] * 4)
    handler = make_handler(backend)
    for prompt in ("one", "two", "three", "three", "one"):
        handler.on_event_start(CBEventType.LLM, {EventPayload.PROMPT: prompt})
    assert [asked.trial for asked in backend.asked] == ["one", "two", "three", "one"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_failing_backend_blocks(path: Path, make_llm: MakeLLM, make_handler: MakeHandler) -> None:
    """on_error is block unless the policy says otherwise."""
    llm = make_llm(make_handler(Failing()))
    with pytest.raises(Blocked, match="out of order"):
        await path(llm, "hi")
    assert llm.calls == 0


async def test_a_failing_backend_lets_pass_where_the_policy_says_so(
    make_llm: MakeLLM, caplog: pytest.LogCaptureFixture, make_handler: MakeHandler
) -> None:
    """on_error=allow passes, and says so in the log."""
    llm = make_llm(make_handler(Guard(Failing(), policy=Policy(on_error="allow"))))
    assert await complete(llm, "hi") == "All is well."
    assert [record.getMessage() for record in caplog.records] == [
        "allow at input: out of order",
        "allow at output: out of order",
    ]


def test_a_model_that_cannot_be_loaded_stops_the_call(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, make_handler: MakeHandler
) -> None:
    """No guard, no call."""

    def broken() -> Guard:
        raise BackendError("no such model")

    handler = make_handler(None)
    monkeypatch.setattr(_verdicts, "_loaded", functools.cache(broken))
    llm = make_llm(handler)
    with pytest.raises(BackendError, match="no such model"):
        llm.complete("hi")
    assert llm.calls == 0


def test_a_flag_passes_and_is_told_without_the_text(
    make_llm: MakeLLM, caplog: pytest.LogCaptureFixture, make_handler: MakeHandler
) -> None:
    """A flag goes to the log, which never quotes what was screened."""
    policy = Policy(threshold={"flag": 0.3, "block": 0.6})
    llm = make_llm(make_handler(Guard(KeywordBackend({"dubious": 0.4}), policy=policy)))
    assert llm.complete("something dubious").text == "All is well."
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        ("guardmw", logging.WARNING, "flag at input: unsafe 0.40 (threshold 0.3)"),
    ]


def test_what_a_person_should_review_does_not_pass(make_llm: MakeLLM, make_handler: MakeHandler) -> None:
    """A callback has nobody to ask; where one verdict reviews and another blocks, the block is told."""
    policy = Policy(threshold={"review": 0.3, "block": 0.6})
    llm = make_llm(make_handler(Guard(KeywordBackend({"dubious": 0.4, "EVIL": 0.99}), policy=policy)))
    for messages, action in ((["dubious"], "review"), (["dubious", "EVIL"], "block")):
        with pytest.raises(Blocked) as caught:
            llm.chat([ChatMessage(content=content) for content in messages])
        assert caught.value.verdict.action == action
    assert llm.calls == 0


def test_an_llm_event_without_text_is_told(handler: GuardCallbackHandler, caplog: pytest.LogCaptureFixture) -> None:
    """An event of somebody's own that carries nothing to judge does not pass in silence."""
    handler.on_event_start(CBEventType.LLM, None)
    assert "was not judged" in caplog.text


@pytest.mark.parametrize("path", PATHS[:8])
async def test_an_exception_is_not_judged(path: Path, make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """A model's own exception comes out as it is: no event about it is judged, or raises again."""
    with pytest.raises(RuntimeError, match="EVIL"):
        await path(make_llm(handler, reply="EVIL", fails=True), "hi")


@pytest.mark.parametrize("payload", [None, {}, {EventPayload.EXCEPTION: RuntimeError("EVIL")}])
@pytest.mark.parametrize("kind", [CBEventType.LLM, CBEventType.RETRIEVE])
def test_an_event_that_ended_badly_has_nothing_to_judge(
    kind: CBEventType, payload: dict[str, Any] | None, handler: GuardCallbackHandler
) -> None:
    """No payload, an empty one, an exception."""
    handler.on_event_end(kind, payload)


def test_only_asks_for_the_events_it_judges(handler: GuardCallbackHandler) -> None:
    """Among those it does not hear of are EXCEPTION events."""
    assert set(CBEventType) - set(handler.event_starts_to_ignore) == {
        CBEventType.QUERY,
        CBEventType.RETRIEVE,
        CBEventType.LLM,
    }
    assert set(CBEventType) - set(handler.event_ends_to_ignore) == {CBEventType.RETRIEVE, CBEventType.LLM}


def test_several_guards_each_have_a_say(
    make_llm: MakeLLM, handler: GuardCallbackHandler, make_handler: MakeHandler
) -> None:
    """Whichever blocks, blocks."""
    llm = make_llm(handler, make_handler(KeywordBackend({"BAD": 0.99})))
    for text in ("EVIL", "BAD"):
        with pytest.raises(Blocked):
            llm.complete(text)
    assert llm.calls == 0
    assert llm.complete("hi").text == "All is well."


@pytest.mark.parametrize(("position", "heard"), [(0, 0), (1, 1)])
def test_handlers_after_it_hear_nothing_of_what_it_stops(
    position: int, heard: int, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """First among several, it leaves them no event without an end."""
    other = Recording()
    handlers: list[BaseCallbackHandler] = [other]
    handlers.insert(position, handler)
    with pytest.raises(Blocked):
        make_llm(*handlers).complete("EVIL")
    assert len(other.tree) == heard


@pytest.mark.parametrize(
    ("word", "stage"),
    [("EVIL", "input"), ("blue", "document"), ("Context information", "input"), ("All is well", "output")],
    ids=["query", "node", "prompt", "answer"],
)
async def test_a_block_leaves_the_trace_stack_clean(
    word: str, stage: str, index_of: IndexOf, make_llm: MakeLLM, make_handler: MakeHandler
) -> None:
    """Whatever was blocked, what follows is traced as if nothing had happened, even outside of a trace."""
    recording = Recording()
    Settings.callback_manager = CallbackManager([recording, make_handler(KeywordBackend({word: 0.99}))])
    Settings.llm = make_llm()
    engine = index_of("The sky is blue.").as_query_engine()
    recording.tree.clear()
    with pytest.raises(Blocked) as caught:
        engine.query("EVIL?")
    assert global_stack_trace.get() == [BASE_TRACE_EVENT]
    with pytest.raises(Blocked):
        await engine.aquery("EVIL?")
    assert global_stack_trace.get() == [BASE_TRACE_EVENT]
    assert global_stack_trace_ids.get() == []
    assert caught.value.verdict.stage == stage
    recording.tree.clear()
    Settings.embed_model.get_text_embedding("hi")
    assert recording.tree == [("embedding", BASE_TRACE_EVENT)]


def test_a_safe_query_after_a_block_is_traced_as_ever(
    index_of: IndexOf, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """The same events with the same parents as where nothing was ever blocked."""
    recording = Recording()
    Settings.callback_manager = CallbackManager([handler, recording])
    Settings.llm = make_llm()
    engine = index_of("The sky is blue.").as_query_engine()
    traces = []
    for text in ("hi", "EVIL", "hi"):
        recording.tree.clear()
        if text == "EVIL":
            with pytest.raises(Blocked):
                engine.query(text)
        else:
            assert str(engine.query(text)) == "All is well."
            traces.append(list(recording.tree))
    assert traces[0] == traces[1]
    assert ("llm", "synthesize") in traces[0]


async def by_an_agent(llm: CountingLLM, text: str) -> str:
    return str(await ReActAgent(llm=llm, streaming=False).run(text))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", [*PATHS, by_an_agent])
async def test_an_llm_made_before_the_settings_is_warned_of(
    path: Path, make_llm: MakeLLM, handler: GuardCallbackHandler
) -> None:
    """It is not seen, and says so once, whoever asks it, until it is taken from Settings, or given their manager."""
    llm = make_llm(reply="Thought: I can answer.\nAnswer: All is well.")
    Settings.callback_manager = CallbackManager([handler])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            await path(llm, "hi")
    told = [str(warning.message) for warning in caught if warning.category is CoverageWarning]
    assert len(told) == 1
    assert told[0].startswith("CountingLLM is asked, and GuardCallbackHandler hears nothing of it")
    Settings.llm = llm
    with pytest.raises(Blocked):
        await path(Settings.llm, "EVIL")  # type: ignore[arg-type]


async def test_an_llm_that_is_heard_or_guarded_is_not_warned_of(
    make_llm: MakeLLM, handler: GuardCallbackHandler, make_handler: MakeHandler
) -> None:
    """Nor any while Settings have no such handler; a later one that is neither still is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await chat(early := make_llm(), "hi")
        guarded: Any = guard_llm(make_llm(), EVIL)
        Settings.callback_manager = CallbackManager([handler])
        Settings.llm = make_llm()
        structured: Any = Settings.llm.as_structured_llm(Answer)
        for path in PATHS:
            for llm in (Settings.llm, make_llm(make_handler(EVIL)), guarded):
                await path(llm, "hi")  # type: ignore[arg-type]
        guarded.predict(PromptTemplate("hi"))
        Settings.llm.reply = '{"text": "hi"}'  # type: ignore[attr-defined]
        structured.chat(ask("hi"))
    assert [warning for warning in caught if warning.category is CoverageWarning] == []
    with pytest.warns(CoverageWarning, match="CountingLLM is asked"):
        await chat(early, "hi")


class Answer(BaseModel):
    """What a structured LLM gives."""

    text: str


def test_a_blocked_turn_stays_in_a_chat_engines_memory(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """The documented limit: a chat stays blocked until the turn is taken out of its memory."""
    chat = engine(make_llm(handler))
    for text in ("EVIL", "hi"):
        with pytest.raises(Blocked):
            chat.chat(text)
    chat.reset()
    assert chat.chat("hi").response == "All is well."


def test_warns_of_what_it_cannot_see_when_it_is_made() -> None:
    """Once for each place in the code that makes one, there, and not at each event."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            handler = guardmw_callback_handler(EVIL)
            handler.on_event_start(CBEventType.LLM, {EventPayload.PROMPT: "hi"})
    assert [(warning.category, warning.filename) for warning in caught] == [(CoverageWarning, __file__)]


def test_takes_a_guard_a_backend_or_a_spec(make_handler: MakeHandler) -> None:
    """A Guard is used as it is; a Backend or a spec becomes one; a wrong spec is told at once."""
    guard = Guard(EVIL)
    assert make_handler(guard).guard is guard
    assert make_handler(EVIL).guard.backend is EVIL
    with pytest.raises(BackendError, match="unknown backend 'nonesuch'"):
        make_handler("nonesuch")


def test_loads_the_embedded_model_once_and_late(monkeypatch: pytest.MonkeyPatch, make_handler: MakeHandler) -> None:
    """Not when the handler is made; once, though many threads need it first."""
    made: list[Guard] = []
    barrier = threading.Barrier(4, timeout=30)

    def make() -> Guard:
        made.append(Guard(EVIL))
        return made[-1]

    handler = make_handler(None)
    monkeypatch.setattr(_verdicts, "_loaded", functools.cache(make))

    def event(_: int) -> str:
        barrier.wait()
        return handler.on_event_start(CBEventType.LLM, {EventPayload.PROMPT: "hi"}, event_id="1")

    assert made == []
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(event, range(4))) == ["1"] * 4
    assert made == [handler.guard]


def test_shares_the_embedded_model_with_a_guarded_llm(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, make_handler: MakeHandler
) -> None:
    """It is loaded once, and judges once what both hear of."""
    backend = ScriptedBackend([0.0, 0.0])
    made: list[Guard] = []

    def make() -> Guard:
        made.append(Guard(backend))
        return made[-1]

    monkeypatch.setattr(_verdicts, "_loaded", functools.cache(make))
    guard_llm(make_llm(make_handler(None))).complete("hi")
    assert len(made) == 1
    assert [asked.trial for asked in backend.asked] == ["hi", "All is well."]


def test_a_copied_llm_stays_guarded(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """By the same handler, so that the model is not loaded twice."""
    llm = copy.deepcopy(make_llm(handler))
    with pytest.raises(Blocked):
        llm.complete("EVIL")
    assert llm.callback_manager.handlers == [handler]


@pytest.mark.filterwarnings("ignore::llama_index.callbacks.guardmw.CoverageWarning")
def test_a_pickled_llm_stays_guarded(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """In this process and where it is sent, as long as its guard can be pickled."""
    llm = make_llm(handler)
    for guarded in (pickle.loads(pickle.dumps(llm)), llm):  # noqa: S301 - our own bytes
        with pytest.raises(Blocked):
            guarded.complete("EVIL")


async def test_leaves_the_callers_messages_alone(make_llm: MakeLLM, handler: GuardCallbackHandler) -> None:
    """Safe or blocked, the messages are as they were."""
    for text in ("hi", "EVIL"):
        messages = ask(text)
        try:
            make_llm(handler).chat(messages)
        except Blocked:
            assert text == "EVIL"
        assert messages == ask(text)


def test_events_that_never_end_are_forgotten(make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked is kept for the answer, but not for ever."""
    monkeypatch.setattr("llama_index.callbacks.guardmw.handler.UNDER_WAY", 4)
    handler = make_handler(ScriptedBackend([0.0] * 10))
    for at in range(10):
        handler.on_event_start(CBEventType.LLM, {EventPayload.PROMPT: f"hi {at}"}, event_id=str(at))
    assert list(handler._asked) == ["6", "7", "8", "9"]


class Asking(Recording):
    """Asks a model what it makes of what it is told."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__()
        self._ask = ask

    def on_event_start(self, event_type: CBEventType, *args: Any, **kwargs: Any) -> str:
        if event_type == CBEventType.LLM:
            self._ask()
        return str(kwargs["event_id"])


def test_what_a_handler_asks_meanwhile_is_judged(make_llm: MakeLLM, make_handler: MakeHandler) -> None:
    """A guarded LLM judges its own call, and not those of whom it tells of it."""
    guard = Guard(EVIL)
    other = make_llm(make_handler(guard))
    asking = Asking(lambda: other.complete("EVIL"))
    with pytest.raises(Blocked):
        guard_llm(make_llm(asking), guard).complete("fine")
    assert other.calls == 0
