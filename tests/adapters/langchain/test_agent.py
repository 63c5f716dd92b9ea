"""GuardMiddleware: an agent is told and says only what has been judged, however it is run, each message once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelFallbackMiddleware, ModelResponse
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import tool
from langchain_guardmw import REFUSAL, GuardMiddleware, guard_model, history
from langchain_guardmw.asking import WITHHELD
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel, PrivateAttr

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

# Events of the third version are in beta.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

SENTENCES = [f"This is sentence number {at} of a long and harmless answer. " for at in range(6)]
SAFE = "".join(SENTENCES)
UNSAFE = "".join([*SENTENCES[:3], "Here comes the EVIL part. ", *SENTENCES[3:]])
REFUSED = REFUSAL.partition("'t ")[2]
THREAD: Any = {"configurable": {"thread_id": "1"}}


class Witness(KeywordBackend):
    """A keyword backend that keeps what it read, and fails when told to."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.asked: list[Conversation] = []
        self.batches = 0
        self.away = False

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """EVIL is unsafe."""
        if self.away:
            raise BackendError("away")
        self.batches += 1
        self.asked += conversations
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, after others had their turn."""
        await asyncio.sleep(0)
        return self.classify(conversations)

    def trials(self) -> list[str]:
        """What was on trial since this was asked last."""
        trials, self.asked = [conversation.trial for conversation in self.asked], []
        return trials

    def judged(self, text: str) -> int:
        """How many of this text's first characters it has read and found safe."""
        covered = 0
        for trial in [conversation.trial for conversation in self.asked]:
            start = text.find(trial)
            if 0 <= start <= covered and "EVIL" not in trial:
                covered = max(covered, start + len(trial))
        return covered


class Fake(BaseChatModel):
    """A chat model that gives these answers in turn, and keeps what it was asked."""

    _answers: Iterator[Sequence[AIMessageChunk]] = PrivateAttr()
    _asked: list[list[BaseMessage]] = PrivateAttr(default_factory=list)
    _bound: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @classmethod
    def saying(cls, *answers: str | Sequence[AIMessageChunk]) -> Fake:
        """A model with these answers."""
        model = cls()
        model._answers = iter([plain(answer) if isinstance(answer, str) else answer for answer in answers])
        return model

    @property
    def _llm_type(self) -> str:
        return "fake"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        self._bound.append(kwargs)
        return self.bind()

    def _chunks(self, messages: list[BaseMessage]) -> Sequence[AIMessageChunk]:
        self._asked.append(messages)
        return [chunk.model_copy(deep=True) for chunk in next(self._answers)]

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        first, *others = self._chunks(messages)
        for chunk in others:
            first += chunk
        message = AIMessage(first.content, additional_kwargs=first.additional_kwargs, tool_calls=first.tool_calls)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            await asyncio.sleep(0)
            yield ChatGenerationChunk(message=chunk)


def plain(text: str) -> list[AIMessageChunk]:
    """A text as a chat model streams it."""
    return [AIMessageChunk(content=word) for word in text.split(" ") for word in (f"{word} ",)]


def call(text: str, name: str = "note", id_: str = "1") -> list[AIMessageChunk]:
    """A call of a tool with this text, after a few words."""
    arguments = '{"text": "' + text + '"}'
    pieces: list[Any] = [
        {"name": None, "args": arguments[at : at + 9], "id": None, "index": 0} for at in range(0, len(arguments), 9)
    ]
    first: Any = {"name": name, "args": "", "id": id_, "index": 0}
    return [
        AIMessageChunk(content="Wait. "),
        *(AIMessageChunk(content="", tool_call_chunks=[piece]) for piece in (first, *pieces)),
    ]


# What an answer comes as. Accents, joined emoji and Chinese are torn apart between their code points.
SHAPES: dict[str, Callable[[str], list[AIMessageChunk]]] = {
    "text": plain,
    "letters": lambda text: [AIMessageChunk(content=one) for one in "Ze\u0301 👩‍👩‍👧 你好。 " + text[:300]],
    "blocks": lambda text: [
        AIMessageChunk(content=[{"type": "text", "text": one.content, "index": 0}]) for one in plain(text)
    ],
    "reasoning": lambda text: [
        AIMessageChunk(content="", additional_kwargs={"reasoning_content": one.content}) for one in plain(text)
    ],
    "tool call": call,
}


@tool
def note(text: str) -> str:
    """Note something."""
    NOTED.append(text)
    return f"Noted: {text}" if text != "poison" else "An EVIL result"


NOTED: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    NOTED.clear()


Run = Callable[[Any, Any, Callable[[Any], None]], None]


def invoke(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
    """Run an agent to its end."""
    show(agent.invoke(given, THREAD))


def ainvoke(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
    """The same on an event loop."""

    async def run() -> None:
        show(await agent.ainvoke(given, THREAD))

    asyncio.run(run())


def stream(mode: str) -> Run:
    """Run an agent and see what this mode of streaming shows."""

    def run(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
        for shown in agent.stream(given, THREAD, stream_mode=mode):
            show(shown)

    return run


def astream(mode: str) -> Run:
    """The same on an event loop."""

    def run(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
        async def consume() -> None:
            async for shown in agent.astream(given, THREAD, stream_mode=mode):
                show(shown)

        asyncio.run(consume())

    return run


def events(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
    """Run an agent and see its events."""

    async def consume() -> None:
        async for shown in agent.astream_events(given, THREAD, version="v2"):
            show(shown)

    asyncio.run(consume())


def events_v3(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
    """Run an agent and see its events of the third version."""
    for shown in agent.stream_events(given, THREAD, version="v3"):
        show(shown)


def aevents_v3(agent: Any, given: Any, show: Callable[[Any], None]) -> None:
    """The same on an event loop."""

    async def consume() -> None:
        async for shown in await agent.astream_events(given, THREAD, version="v3"):
            show(shown)

    asyncio.run(consume())


RUNS: dict[str, Run] = {
    "invoke": invoke,
    "ainvoke": ainvoke,
    **{f"stream {mode}": stream(mode) for mode in ("messages", "updates", "values")},
    **{f"astream {mode}": astream(mode) for mode in ("messages", "updates", "values")},
    "events": events,
    "events v3": events_v3,
    "aevents v3": aevents_v3,
}
EVERY_RUN = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
ASKED = (invoke, ainvoke)
BOTH = pytest.mark.parametrize("run", ASKED)
MODES = pytest.mark.parametrize("on_block", ["raise", "end", "replace", "review"])


def agent_of(model: Fake, *middleware: Any, **options: Any) -> Any:
    """An agent with a checkpointer."""
    return create_agent(
        model, options.pop("tools", [note]), middleware=middleware, checkpointer=InMemorySaver(), **options
    )


def said(text: str) -> dict[str, Any]:
    """What a user says."""
    return {"messages": [HumanMessage(text)]}


def outcome(run: Run, agent: Any, given: Any, show: Callable[[Any], None] = lambda _: None) -> Blocked | None:
    """Run, and return what was raised."""
    try:
        run(agent, given, show)
    except Blocked as blocked:
        return blocked
    return None


def checkpointed(agent: Any) -> str:
    """All that rests in the checkpoints, pending writes included."""
    saver = agent.checkpointer
    return "".join(repr(one) for one in (list(saver.list(None)), saver.blobs, saver.writes))


def texts(agent: Any) -> list[str]:
    """The conversation as the agent remembers it."""
    return [message.text for message in agent.get_state(THREAD).values["messages"]]


def text_of(message: BaseMessage) -> str:
    """What a chunk shows its reader."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    shown = [one if isinstance(one, str) else one.get("text") or "" for one in blocks]
    # As a call reads on trial.
    pieces = getattr(message, "tool_call_chunks", [])
    arguments = [(f"{piece['name']} " if piece["name"] else "") + (piece["args"] or "") for piece in pieces]
    return "".join([message.additional_kwargs.get("reasoning_content", ""), *shown, *arguments])


def without_ids(value: Any) -> Any:
    """A value without what no two runs have in common."""
    if isinstance(value, BaseMessage):
        return (type(value), value.content, value.additional_kwargs, getattr(value, "tool_calls", []))
    if isinstance(value, dict):
        kept = ("messages", "model", "tools", "chunk", "output", "input", "data", "event", "name")
        return {key: without_ids(item) for key, item in value.items() if key in kept}
    if isinstance(value, list | tuple):
        return [without_ids(one) for one in value]
    return value if isinstance(value, str) else None


@EVERY_RUN
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("on_block", ["raise", "end", "review"])
def test_nobody_sees_what_is_withheld(run: Run, shape: str, on_block: Any) -> None:
    """In no way of running does it come out, nor does a withheld call run, nor does any of it rest in a checkpoint."""
    witness, shown = Witness(), list[Any]()
    agent = agent_of(Fake.saying(SHAPES[shape](UNSAFE)), GuardMiddleware(witness, on_block=on_block))
    blocked = outcome(run, agent, said("Hello."), shown.append)
    assert (blocked is not None) == (on_block == "raise")
    if on_block == "review":
        # The question put to the person shows the answer, and nothing else does.
        shown = [one for one in shown if "Interrupt(" not in repr(one) and "interrupt" not in repr(one)]
    else:
        assert "EVIL" not in checkpointed(agent)
    assert "EVIL" not in repr(shown)
    assert NOTED == []
    if on_block == "end":
        assert REFUSED in repr(shown)
        assert texts(agent)[-1].endswith(REFUSAL)


@pytest.mark.parametrize("run", [stream("messages"), astream("messages")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", [SAFE, UNSAFE])
def test_not_one_character_is_early(run: Run, shape: str, text: str) -> None:
    """Whatever is out has been judged by then."""
    assert leaked(run, shape, text) == 0


@pytest.mark.parametrize("run", [stream("messages"), astream("messages")])
def test_the_check_notices_a_guard_that_leaks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    assert leaked(run, "text", SAFE) > 0
    assert leaked(run, "text", UNSAFE) > 0


@EVERY_RUN
def test_the_check_notices_a_guard_that_does_not_swap_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says then shows, in every way of running that shows it before its end."""
    monkeypatch.setattr("langchain_guardmw.asking.Asking.request", lambda asking: asking._request)
    monkeypatch.setattr("langchain_guardmw.asking.Asking.strays", lambda *_: [])
    shown: list[Any] = []
    outcome(run, agent_of(Fake.saying(UNSAFE), GuardMiddleware(Witness())), said("Hello."), shown.append)
    assert "EVIL" in repr(shown)


class Watch(BaseCallbackHandler):
    """Measures what of a text is told before it has been judged; readers of a stream may see it only later."""

    run_inline = True

    def __init__(self, witness: Witness, text: str) -> None:
        self.out = ""
        self.leaked = 0
        self._witness = witness
        self._text = text

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        """Measure, until the model is at its next answer."""
        out = self.out + text_of(chunk.message)
        if self._text.startswith(out):
            self.out = out
            self.leaked = max(self.leaked, len(out) - self._witness.judged(self._text))


def leaked(run: Run, shape: str, text: str) -> int:
    """How many characters were out before they had been judged, at most."""
    witness, answer = Witness(), SHAPES[shape](text)
    watch = Watch(witness, "".join(map(text_of, answer)))
    agent = agent_of(Fake.saying(answer, "Done."), GuardMiddleware(witness))
    outcome(run, agent.with_config({"callbacks": [watch]}), said("Hello."))
    assert watch.out or text == UNSAFE
    return watch.leaked


@EVERY_RUN
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_safe_is_as_the_model_said_it(run: Run, shape: str) -> None:
    """The same chunks, events and states as without a guard."""

    def shown_by(*middleware: Any) -> list[Any]:
        shown: list[Any] = []
        answers = [SHAPES[shape](SAFE)] + ([plain("Done.")] if shape == "tool call" else [])
        run(agent_of(Fake.saying(*answers), *middleware), said("Hello."), shown.append)
        return [one for one in map(without_ids, shown) if "GuardMiddleware" not in repr(one)]

    class Bystander(AgentMiddleware[Any, Any, Any]):
        """As many steps, but no guard."""

        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request)

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return await handler(request)

    expected = shown_by(Bystander())
    got = shown_by(GuardMiddleware(Witness()))
    if run is events:
        # A guarded model is called by another name.
        expected, got = ([one for one in each if one["event"] == "on_chat_model_stream"] for each in (expected, got))
        for one in (*expected, *got):
            del one["name"]
    assert got == expected


@EVERY_RUN
@MODES
def test_an_unsafe_question_gets_no_answer(run: Run, on_block: Any) -> None:
    """The model is not asked; with "replace" it is asked without it; with "review" a person is."""
    model, shown = Fake.saying(SAFE), list[Any]()
    agent = agent_of(model, GuardMiddleware(Witness(), on_block=on_block))
    blocked = outcome(run, agent, said("An EVIL question"), shown.append)
    assert (blocked is not None) == (on_block == "raise")
    assert "EVIL" not in repr(model._asked)
    if blocked:
        assert blocked.verdict.stage == "input"
    if on_block == "replace":
        assert texts(agent) == [WITHHELD, f"{SAFE} "]
    else:
        assert model._asked == []
    if on_block == "end":
        assert texts(agent) == [WITHHELD, REFUSAL]
    if on_block == "review":
        assert agent.get_state(THREAD).interrupts


@BOTH
@pytest.mark.parametrize("on_block", ["raise", "end", "replace"])
def test_a_withheld_question_is_not_sent_again_in_the_next_turn(run: Run, on_block: Any) -> None:
    """Nor does it end that turn too, even where another process takes it."""
    model = Fake.saying(SAFE, SAFE)
    saver = InMemorySaver()
    for question in ("An EVIL question", "And bread?"):
        agent = create_agent(model, [], middleware=[GuardMiddleware(Witness(), on_block=on_block)], checkpointer=saver)
        blocked = outcome(run, agent, said(question))
    assert blocked is None
    assert "EVIL" not in repr(model._asked)
    assert "EVIL" not in "".join(texts(agent))
    assert texts(agent)[-1] == f"{SAFE} "


@BOTH
def test_where_a_question_rests_that_was_withheld(run: Run) -> None:
    """LangGraph writes what goes in before any node runs, and nothing of a node that raises; its caller can."""

    def after(on_block: Any) -> Any:
        agent = agent_of(Fake.saying(SAFE, SAFE), GuardMiddleware(Witness(), on_block=on_block))
        run(agent, said("Hello."), lambda _: None)
        outcome(run, agent, said("An EVIL question"))
        return agent

    raising = after("raise")
    assert texts(raising)[2:] == ["An EVIL question"]
    question = raising.get_state(THREAD).values["messages"][-1]
    raising.update_state(THREAD, {"messages": [RemoveMessage(id=question.id)]})
    assert "EVIL" not in "".join(texts(raising))
    run(raising, said("And bread?"), lambda _: None)
    assert texts(raising)[2:] == ["And bread?", f"{SAFE} "]
    ending = after("end")
    assert texts(ending)[2:] == [WITHHELD, REFUSAL]
    assert "EVIL" in checkpointed(ending)


@pytest.mark.parametrize("on_block", ["raise", "end", "replace"])
def test_a_thread_that_is_written_at_its_end_keeps_nothing_withheld(on_block: Any) -> None:
    """Only where a run raises is there no end but what went in."""
    agent = agent_of(Fake.saying(SAFE), GuardMiddleware(Witness(), on_block=on_block))
    with pytest.raises(Blocked) if on_block == "raise" else _nothing():
        agent.invoke(said("An EVIL question"), THREAD, durability="exit")
    assert ("EVIL" in checkpointed(agent)) == (on_block == "raise")


@BOTH
@pytest.mark.parametrize("on_block", ["raise", "end", "replace"])
def test_a_poisoned_tool_result_does_not_reach_the_model(run: Run, on_block: Any) -> None:
    """Nor a system or memory message."""
    model = Fake.saying(call("poison"), SAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block=on_block))
    blocked = outcome(run, agent, said("Note it."))
    assert (blocked is not None) == (on_block == "raise")
    assert blocked is None or blocked.verdict.stage == "tool_result"
    assert "EVIL" not in repr(model._asked)
    assert len(model._asked) == 1 + (on_block == "replace")
    if on_block != "raise":
        assert texts(agent)[2] == WITHHELD
        assert isinstance(agent.get_state(THREAD).values["messages"][2], ToolMessage)
    for given, prompt in ([[SystemMessage("EVIL memory"), HumanMessage("Hi.")], None], [[HumanMessage("Hi.")], "EVIL"]):
        model = Fake.saying(SAFE)
        agent = agent_of(model, GuardMiddleware(Witness(), on_block=on_block), system_prompt=prompt)
        outcome(run, agent, {"messages": given})
        assert "EVIL" not in repr(model._asked)


def test_what_a_conversation_brought_along_stays_covered() -> None:
    """History that no run of this agent has seen is judged too, whoever is said to have spoken it."""
    model = Fake.saying(SAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="end"))
    old: list[BaseMessage] = [
        HumanMessage("An EVIL question"),
        AIMessage("", tool_calls=[{"name": "note", "args": {"text": "EVIL"}, "id": "1"}]),
        ToolMessage("Fine.", tool_call_id="1", artifact={"raw": "EVIL"}),
        AIMessage([{"type": "thinking", "thinking": "EVIL"}, {"type": "text", "text": "Yes."}]),
        HumanMessage("And bread?"),
    ]
    agent.invoke({"messages": old}, THREAD)
    (asked,) = model._asked
    assert "EVIL" not in repr(asked)
    assert "EVIL" not in repr(agent.get_state(THREAD).values)
    # The result still belongs to its call.
    assert asked[1].tool_calls[0]["id"] == asked[2].tool_call_id == "1"  # type: ignore[attr-defined]
    assert [type(message) for message in asked] == [type(message) for message in old]


@BOTH
def test_each_message_is_judged_once(run: Run) -> None:
    """In a long loop of tools, and over the turns of a thread; what was judged as it came is not judged again."""
    witness = Witness()
    model = Fake.saying(*(call(f"item {at}", id_=str(at)) for at in range(25)), SAFE, SAFE)
    agent = agent_of(model, GuardMiddleware(witness))
    run(agent, said("Note all."), lambda _: None)
    trials = witness.trials()
    results = [trial for trial in trials if trial.startswith("Noted")]
    assert results == [f"Noted: item {at}" for at in range(25)]
    assert sum("note {" in trial for trial in trials) == 25
    assert trials.count("Note all.") == 1
    run(agent, said("And now?"), lambda _: None)
    assert [trial for trial in witness.trials() if not SAFE.startswith(trial[:20])] == ["And now?"]


def test_a_message_is_judged_in_its_context() -> None:
    """The same words after other words are another matter; a message that was changed in place is another message."""
    witness = Witness()
    middleware = GuardMiddleware(witness, on_block="end")
    for first in ("Bread?", "Poison?"):
        messages = [HumanMessage(first), AIMessage("Shall I tell?"), HumanMessage("Yes.")]
        create_agent(Fake.saying(SAFE), [], middleware=[middleware]).invoke({"messages": messages})
        assert "Yes." in witness.trials()
    model = Fake.saying(SAFE, SAFE)
    changing = HumanMessage("Bread?")
    agent = create_agent(model, [], middleware=[middleware])
    agent.invoke({"messages": [changing]})
    changing.content = "EVIL"
    assert agent.invoke({"messages": [changing]})["messages"][-1].text == REFUSAL
    blocks = HumanMessage([{"type": "text", "text": "Bread?"}])
    agent.invoke({"messages": [blocks]})
    blocks.content[0]["text"] = "EVIL"  # type: ignore[index]
    assert agent.invoke({"messages": [blocks]})["messages"][-1].text == REFUSAL


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of verdicts, and of messages, which are forgotten when they are gone."""
    monkeypatch.setattr(history, "REMEMBERED", 4)
    middleware = GuardMiddleware(Witness())
    for at in range(10):
        create_agent(Fake.saying(SAFE), [], middleware=[middleware]).invoke(said(f"Question {at}"))
    known = middleware._known
    assert known is not None
    assert len(known._verdicts) <= 4
    import gc

    gc.collect()
    assert known._reads == {}
    assert known._passed == {}


@EVERY_RUN
@pytest.mark.parametrize("action", ["block", "allow"])
@pytest.mark.parametrize("failing", ["question", "answer"])
def test_a_failing_backend_is_for_the_policy_to_decide(run: Run, action: Any, failing: str) -> None:
    """By default nothing goes in or comes out; and as failures pass, nothing is taken out of the state for one."""

    class Failing(Witness):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            self.away = failing == "question" or conversations[0].stage == "output"
            return super().classify(conversations)

    model, shown = Fake.saying(SAFE), list[Any]()
    judge = Guard(Failing(), policy=Policy(on_error=action))
    agent = agent_of(model, GuardMiddleware(judge, on_block="end"))
    assert outcome(run, agent, said("Hello."), shown.append) is None
    assert texts(agent) == ["Hello.", REFUSAL if action == "block" else f"{SAFE} "]
    assert ("sentence" in repr(shown)) == (action == "allow")
    assert len(model._asked) == (action == "allow" or failing == "answer")
    with pytest.raises(Blocked) if action == "block" else _nothing():
        raising = agent_of(Fake.saying(SAFE), GuardMiddleware(Guard(Failing(), policy=Policy(on_error=action))))
        run(raising, said("Hello."), lambda _: None)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@BOTH
def test_a_backend_that_is_back_judges_what_it_missed(run: Run) -> None:
    """A failure is not remembered."""
    witness = Witness()
    model = Fake.saying(SAFE)
    agent = agent_of(model, GuardMiddleware(witness, on_block="end"))
    witness.away = True
    run(agent, said("Hello."), lambda _: None)
    witness.away = False
    run(agent, said("Hello?"), lambda _: None)
    assert texts(agent) == ["Hello.", REFUSAL, "Hello?", f"{SAFE} "]


@pytest.mark.parametrize("at", ["question", "answer"])
async def test_a_backend_that_hangs_lets_nothing_out(at: str) -> None:
    """And who gives up leaves no task behind."""

    class Hanging(Witness):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            if at == "question" or conversations[0].stage == "output":
                await asyncio.Event().wait()
            return await super().aclassify(conversations)

    shown: list[Any] = []
    see = shown.append
    agent = agent_of(Fake.saying(SAFE), GuardMiddleware(Hanging()))

    async def consume() -> None:
        async for one in agent.astream(said("Hello."), THREAD, stream_mode="messages"):
            see(one)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consume(), 0.3)
    assert "sentence" not in repr(shown)
    for _ in range(10):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@BOTH
@pytest.mark.parametrize("on_block", ["raise", "end"])
def test_a_model_that_another_middleware_puts_in_is_judged_all_the_same(run: Run, on_block: Any) -> None:
    """With the guard outside it, as a backstop: the answer does not get into the state, though streams show it."""

    class Broken(Fake):
        def _chunks(self, messages: list[BaseMessage]) -> Sequence[AIMessageChunk]:
            raise ConnectionError

    for text in (UNSAFE, SAFE):
        fallback = ModelFallbackMiddleware(Fake.saying(text))
        agent = agent_of(Broken(), GuardMiddleware(Witness(), on_block=on_block), fallback)
        blocked = outcome(run, agent, said("Hello."))
        assert (blocked is not None) == (on_block == "raise" and text == UNSAFE)
        assert "EVIL" not in checkpointed(agent)
        if text == SAFE:
            assert texts(agent)[-1] == f"{SAFE} "


@BOTH
@pytest.mark.parametrize("on_block", ["raise", "end"])
def test_a_fallback_asks_another_model_where_a_block_is_raised(run: Run, on_block: Any) -> None:
    """As for any error; a refusal is an answer."""
    another = Fake.saying(SAFE)
    agent = agent_of(
        Fake.saying(UNSAFE), ModelFallbackMiddleware(another), GuardMiddleware(Witness(), on_block=on_block)
    )
    assert outcome(run, agent, said("Hello.")) is None
    assert texts(agent)[-1] == (f"{SAFE} " if on_block == "raise" else REFUSAL)
    assert len(another._asked) == (on_block == "raise")


@pytest.mark.parametrize("order", ["guard last", "guard first"])
def test_only_with_the_guard_last_streams_are_clean_of_a_swapped_model(order: str) -> None:
    """The trap that the page on LangChain tells of: who swaps the model inside the guard shows what it says."""

    class Router(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model=Fake.saying(UNSAFE)))

    middleware: list[Any] = [Router(), GuardMiddleware(Witness(), on_block="end")]
    agent = agent_of(Fake.saying(), *(middleware if order == "guard last" else middleware[::-1]))
    shown: list[Any] = []
    stream("messages")(agent, said("Hello."), shown.append)
    assert ("EVIL" in repr(shown)) == (order == "guard first")
    assert "EVIL" not in "".join(texts(agent))


@BOTH
def test_an_answer_that_another_middleware_changes_is_judged_again(run: Run) -> None:
    """Even where it is the same message still."""

    class Meddling(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            response = handler(request)
            response.result[0].content = "EVIL"
            return response

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            await handler(request)
            return ModelResponse(result=[AIMessage("EVIL")])

    agent = agent_of(Fake.saying(SAFE), GuardMiddleware(Witness(), on_block="end"), Meddling())
    run(agent, said("Hello."), lambda _: None)
    assert texts(agent) == ["Hello.", REFUSAL]


class Answer(BaseModel):
    """A structured answer."""

    text: str


@BOTH
@pytest.mark.parametrize("strategy", ["tool", "provider"])
@pytest.mark.parametrize("text", ["milk", "EVIL"])
def test_structured_output_is_judged(run: Run, strategy: str, text: str) -> None:
    """It never passes through a tool; a refusal in its place ends the run and is no error."""
    if strategy == "tool":
        agent = agent_of(
            Fake.saying(call(text, "Answer")),
            GuardMiddleware(Witness(), on_block="end"),
            response_format=ToolStrategy(Answer),
        )
    else:
        answer = [AIMessageChunk(content=f'{{"text": "{text}"}}')]
        agent = agent_of(
            Fake.saying(answer), GuardMiddleware(Witness(), on_block="end"), response_format=ProviderStrategy(Answer)
        )
    shown: list[Any] = []
    run(agent, said("Hello."), shown.append)
    if text == "milk":
        assert shown[-1]["structured_response"] == Answer(text="milk")
    else:
        assert shown[-1].get("structured_response") is None
        assert shown[-1]["messages"][-1].text.endswith(REFUSAL)
        assert "EVIL" not in repr(shown)


@BOTH
def test_a_call_that_was_let_out_before_a_refusal_does_not_run(run: Run) -> None:
    """The run ends with the refusal."""
    answer = [*call("milk"), *plain("Now the EVIL part.")]
    agent = agent_of(Fake.saying(answer), GuardMiddleware(Witness(), on_block="end"))
    run = stream("messages") if run is invoke else astream("messages")
    run(agent, said("Hello."), lambda _: None)
    assert NOTED == []
    assert texts(agent)[-1].endswith(REFUSAL)
    assert len(texts(agent)) == 2


DECISIONS = pytest.mark.parametrize("decision", ["approve", "reject", {"type": "edit", "content": "Bread."}, 7])


def pending(agent: Any) -> dict[str, Any]:
    """What a person is asked."""
    (interrupt,) = agent.get_state(THREAD).interrupts
    value: dict[str, Any] = interrupt.value
    return value


@BOTH
@DECISIONS
def test_a_person_decides_on_a_question(run: Run, decision: Any) -> None:
    """Approved it is asked, and not questioned again; edited the edit is; else it is refused."""
    model = Fake.saying(SAFE, SAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("An EVIL question"), lambda _: None)
    asked = pending(agent)
    assert (asked["content"], asked["guardmw"]["stage"]) == ("An EVIL question", "input")
    run(agent, Command(resume=decision), lambda _: None)
    if decision == "approve":
        assert texts(agent) == ["An EVIL question", f"{SAFE} "]
        run(agent, said("And now?"), lambda _: None)
        assert next(message.text for message in model._asked[-1]) == "An EVIL question"
    elif isinstance(decision, dict):
        assert texts(agent) == ["Bread.", f"{SAFE} "]
    else:
        assert texts(agent) == [WITHHELD, REFUSAL]
        assert model._asked == []


def elsewhere(agent: Any, model: Fake, backend: Witness) -> Any:
    """The same agent, as another process makes it."""
    middleware = GuardMiddleware(backend, on_block="review")
    return create_agent(model, [note], middleware=[middleware], checkpointer=agent.checkpointer)


TWO: Any = {"messages": [HumanMessage("A harmless one."), HumanMessage("An EVIL second.")]}
RESUMED = pytest.mark.parametrize(("run", "resumed"), [(one, two) for one in ASKED for two in ASKED])


@RESUMED
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("decision", ["approve", {"type": "edit", "content": "Bread."}])
def test_an_answer_is_for_the_message_that_was_shown(run: Run, resumed: Run, moved: bool, decision: Any) -> None:
    """Whatever a backend that is back says of that one; nobody has seen the other yet."""
    model, backend = Fake.saying(SAFE), Witness()
    agent = agent_of(model, GuardMiddleware(backend, on_block="review"))
    backend.away = True
    run(agent, TWO, lambda _: None)
    assert pending(agent)["content"] == "A harmless one."
    backend.away = False
    agent = elsewhere(agent, model, Witness()) if moved else agent
    resumed(agent, Command(resume=decision), lambda _: None)
    assert (pending(agent)["content"], model._asked) == ("An EVIL second.", [])
    resumed(agent, Command(resume="approve"), lambda _: None)
    first = "A harmless one." if decision == "approve" else "Bread."
    assert texts(agent) == [first, "An EVIL second.", f"{SAFE} "]


@BOTH
@pytest.mark.parametrize("moved", [False, True])
def test_each_of_two_questions_has_its_answer(run: Run, moved: bool) -> None:
    """In their order, though there is nothing against the first any more; the second is still refused."""
    model, backend = Fake.saying(SAFE), Witness()
    agent = agent_of(model, GuardMiddleware(backend, on_block="review"))
    backend.away = True
    run(agent, TWO, lambda _: None)
    run(agent, Command(resume="approve"), lambda _: None)
    assert pending(agent)["content"] == "An EVIL second."
    backend.away = False
    agent = elsewhere(agent, model, Witness()) if moved else agent
    run(agent, Command(resume="reject"), lambda _: None)
    assert model._asked == []
    assert texts(agent)[-1] == REFUSAL


@RESUMED
def test_an_answer_is_not_for_what_was_put_in_the_place_of_the_message(run: Run, resumed: Run) -> None:
    """It is asked about, and answered, by itself."""
    model = Fake.saying(SAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("An EVIL question"), lambda _: None)
    first = agent.get_state(THREAD).values["messages"][0]
    agent.update_state(THREAD, {"messages": [HumanMessage("Another EVIL one", id=first.id)]})
    resumed(agent, Command(resume="approve"), lambda _: None)
    assert (pending(agent)["content"], model._asked) == ("Another EVIL one", [])
    resumed(agent, Command(resume="reject"), lambda _: None)
    assert (texts(agent), model._asked) == ([WITHHELD, REFUSAL], [])


@BOTH
@pytest.mark.parametrize("answer", [UNSAFE, None], ids=["answer", "question"])
def test_an_answer_that_names_another_question_is_none(run: Run, answer: str | None) -> None:
    """It is asked again, and an answer that names it is one."""
    agent = agent_of(Fake.saying(answer or SAFE), GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("Hello." if answer else "An EVIL question"), lambda _: None)
    about = pending(agent)["about"]
    run(agent, Command(resume={"type": "approve", "about": "another"}), lambda _: None)
    assert pending(agent)["problem"] == "that was an answer to another question"
    run(agent, Command(resume={"type": "approve", "about": about}), lambda _: None)
    assert texts(agent)[-1] == f"{answer or SAFE} "


@BOTH
def test_what_is_approved_to_one_guard_is_not_approved_to_another(run: Run) -> None:
    """The second has not asked anybody."""
    model = Fake.saying(SAFE)
    guards = [
        GuardMiddleware(Witness(), on_block="review", name="one"),
        GuardMiddleware(Witness(), on_block="raise", name="two"),
    ]
    agent = agent_of(model, *guards)
    run(agent, said("An EVIL question"), lambda _: None)
    assert outcome(run, agent, Command(resume="approve")) is not None
    assert model._asked == []


@BOTH
def test_each_guard_that_reviews_asks(run: Run) -> None:
    """In turn."""
    guards = [GuardMiddleware(Witness(), on_block="review", name=name) for name in ("one", "two")]
    agent = agent_of(Fake.saying(SAFE), *guards)
    run(agent, said("An EVIL question"), lambda _: None)
    first = pending(agent)["about"]
    run(agent, Command(resume="approve"), lambda _: None)
    assert pending(agent)["about"] != first
    run(agent, Command(resume="approve"), lambda _: None)
    assert texts(agent) == ["An EVIL question", f"{SAFE} "]


@BOTH
@pytest.mark.parametrize("waiting", [True, False])
def test_what_is_approved_under_a_policy_is_not_approved_under_another(run: Run, waiting: bool) -> None:
    """Neither if the policy changed while the question was open; a person is asked anew."""
    model = Fake.saying(SAFE, SAFE)

    def agent_under(policy: Policy, saver: InMemorySaver) -> Any:
        guard = Guard(Witness(), policy=policy)
        return create_agent(model, middleware=[GuardMiddleware(guard, on_block="review")], checkpointer=saver)

    saver = InMemorySaver()
    lenient, strict = (agent_under(Policy(threshold=at), saver) for at in (0.9, 0.5))
    run(lenient, said("An EVIL question"), lambda _: None)
    if waiting:
        run(strict, Command(resume="approve"), lambda _: None)
        assert (pending(strict)["content"], model._asked) == ("An EVIL question", [])
        run(strict, Command(resume="approve"), lambda _: None)
        assert texts(strict) == ["An EVIL question", f"{SAFE} "]
    else:
        run(lenient, Command(resume="approve"), lambda _: None)
        run(strict, said("And now?"), lambda _: None)
        assert texts(strict)[0] == WITHHELD


@EVERY_RUN
@DECISIONS
def test_a_person_decides_on_an_answer(run: Run, decision: Any) -> None:
    """The model is not asked again; approved the answer stays in the thread."""
    model = Fake.saying(UNSAFE, SAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("Hello."), lambda _: None)
    assert pending(agent)["content"].startswith(SENTENCES[0])
    run(agent, Command(resume=decision), lambda _: None)
    assert len(model._asked) == 1
    kept = {"approve": f"{UNSAFE} ", "reject": REFUSAL, 7: REFUSAL}
    answer = "Bread." if isinstance(decision, dict) else kept[decision]
    assert texts(agent) == ["Hello.", answer]
    run(agent, said("And now?"), lambda _: None)
    assert texts(agent) == ["Hello.", answer, "And now?", f"{SAFE} "]


@BOTH
@pytest.mark.parametrize("decision", ["approve", "reject"])
def test_a_person_decides_on_a_call(run: Run, decision: str) -> None:
    """Approved it runs."""
    agent = agent_of(Fake.saying(call("EVIL"), SAFE), GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("Hello."), lambda _: None)
    assert pending(agent)["tool_calls"][0]["args"] == {"text": "EVIL"}
    assert NOTED == []
    run(agent, Command(resume=decision), lambda _: None)
    assert len(NOTED) == (decision == "approve")


@EVERY_RUN
@pytest.mark.parametrize("answer", [UNSAFE, call("EVIL")], ids=["text", "call"])
def test_a_user_who_goes_on_before_a_person_has_decided(run: Run, answer: Any) -> None:
    """The refusal stands, and what was held is forgotten: it would be taken for the next answer's."""
    model = Fake.saying(answer, SAFE, UNSAFE)
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("Hello."), lambda _: None)
    run(agent, said("And now?"), lambda _: None)
    refused, *later = texts(agent)[1:]
    assert refused.endswith(REFUSAL)
    assert later == ["And now?", f"{SAFE} "]
    run(agent, said("And then?"), lambda _: None)
    assert pending(agent)["content"].startswith(SENTENCES[0])
    run(agent, Command(resume="approve"), lambda _: None)
    assert texts(agent)[-1] == f"{UNSAFE} "
    assert NOTED == []


def with_others(text: str) -> list[AIMessageChunk]:
    """A call of a tool and structured output in one answer."""
    first: Any = {"name": "note", "args": '{"text": "milk"}', "id": "8", "index": 0}
    other: Any = {"name": "Answer", "args": '{"text": "' + text + '"}', "id": "9", "index": 1}
    return [AIMessageChunk(content="", tool_call_chunks=[first, other])]


@EVERY_RUN
@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
@pytest.mark.parametrize("tools", [[], [note]])
@DECISIONS
def test_a_person_decides_on_structured_output(run: Run, strategy: Any, tools: Any, decision: Any) -> None:
    """Approved it is the agent's; else the run ends, and does not ask the model until it says something better."""
    answer = call("EVIL", "Answer") if strategy is ToolStrategy else [AIMessageChunk(content='{"text": "EVIL"}')]
    model = Fake.saying(answer, SAFE)
    middleware = GuardMiddleware(Witness(), on_block="review")
    agent = agent_of(model, middleware, tools=tools, response_format=strategy(Answer))
    run(agent, said("Hello."), lambda _: None)
    if isinstance(decision, dict) and strategy is ProviderStrategy:
        decision = {**decision, "content": '{"text": "Bread."}'}
    run(agent, Command(resume=decision), lambda _: None)
    state = agent.get_state(THREAD)
    expected = Answer(text="EVIL") if decision == "approve" else None
    if isinstance(decision, dict) and strategy is ProviderStrategy:
        expected = Answer(text="Bread.")
    assert state.values.get("structured_response") == expected
    assert (len(model._asked), state.next, state.interrupts) == (1, (), ())
    assert not state.values.get("guardmw_held")
    if decision in ("reject", 7):
        assert texts(agent)[-1].endswith(REFUSAL)


@BOTH
def test_an_approved_call_beside_structured_output_is_made(run: Run) -> None:
    """The agent gets all that the model said."""
    model = Fake.saying(with_others("EVIL"))
    middleware = GuardMiddleware(Witness(), on_block="review")
    agent = agent_of(model, middleware, response_format=ToolStrategy(Answer))
    run(agent, said("Hello."), lambda _: None)
    run(agent, Command(resume="approve"), lambda _: None)
    assert agent.get_state(THREAD).values["structured_response"] == Answer(text="EVIL")
    assert NOTED == ["milk"]


@BOTH
def test_a_withheld_prompt_ends_an_agent_that_wants_an_object(run: Run) -> None:
    """A person is asked about messages and answers, and about no prompt."""
    model = Fake.saying(SAFE)
    middleware = GuardMiddleware(Witness(), on_block="review")
    agent = agent_of(model, middleware, tools=[], response_format=ToolStrategy(Answer), system_prompt="EVIL")
    run(agent, said("Hello."), lambda _: None)
    assert texts(agent) == ["Hello.", REFUSAL]


class Chatty(AgentMiddleware[Any, Any, Any]):
    """Has something to say after each answer."""

    def after_model(self, state: Any, runtime: Any) -> Any:
        """As an assistant."""
        return {"messages": [AIMessage("By the way.", id=f"{len(state['messages'])}")]}


@BOTH
@DECISIONS
@pytest.mark.parametrize("first", [True, False])
def test_a_person_decides_where_others_add_messages(run: Run, first: bool, decision: Any) -> None:
    """What was said stands where it was said."""
    others = [Chatty(), GuardMiddleware(Witness(), on_block="review")]
    agent = agent_of(Fake.saying(UNSAFE, SAFE), *(others if first else others[::-1]))
    run(agent, said("Hello."), lambda _: None)
    run(agent, Command(resume=decision), lambda _: None)
    kept = {"approve": f"{UNSAFE} ", "reject": REFUSAL, 7: REFUSAL}
    answer = "Bread." if isinstance(decision, dict) else kept[decision]
    assert texts(agent) == ["Hello.", answer, "By the way."]


@EVERY_RUN
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("on_block", ["end", "replace"])
@pytest.mark.parametrize("question", ["Hello.", "An EVIL question"])
def test_a_run_that_is_over_does_not_go_on(run: Run, first: bool, on_block: Any, question: str) -> None:
    """Where LangChain forgets that it is, behind another middleware's node: nobody is asked again, and it is told."""

    class After(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> None:
            """Nothing."""

    given = "EVIL" if question == "Hello." or on_block == "replace" else "milk"
    model = Fake.saying(call(given, "Answer"), call("milk", "Answer"))
    others = [After(), GuardMiddleware(Witness(), on_block=on_block)]
    agent = agent_of(model, *(others if first else others[::-1]), tools=[], response_format=ToolStrategy(Answer))
    blocked = outcome(run, agent, said(question))
    assert blocked is not None
    stage = "tool_call" if given == "EVIL" else "input"
    assert (blocked.verdict.stage, blocked.verdict.violations[0].rule) == (stage, "unsafe")
    assert len(model._asked) == (given == "EVIL")
    assert texts(agent) == [question if question == "Hello." else WITHHELD, texts(agent)[-1]]
    assert texts(agent)[-1].endswith(REFUSAL)
    model._answers = iter([call("milk", "Answer")])
    run(agent, said("And now?"), lambda _: None)
    assert agent.get_state(THREAD).values["structured_response"] == Answer(text="milk")


@BOTH
@pytest.mark.parametrize("forged", [{"reason": "EVIL"}, {"violations": [{"EVIL": 1}]}, "EVIL"], ids=repr)
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_put_in_the_place_of_a_refusal_is_not_believed(run: Run, forged: Any, behind: bool) -> None:
    """By what a run is given or another middleware writes: no error quotes it, and the model is asked in the next."""

    class Forging(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> Any:
            """Under the id of what was said last."""
            return {"messages": [forgery(state["messages"][-1].id)]} if behind else None

    def forgery(id_: str) -> AIMessage:
        return AIMessage("I.", id=id_, response_metadata={"guardmw": forged})

    model = Fake.saying(call("EVIL", "Answer"), call("milk", "Answer"))
    guard = GuardMiddleware(Witness(), on_block="end")
    agent = agent_of(model, Forging(), guard, tools=[], response_format=ToolStrategy(Answer))
    blocked = outcome(run, agent, said("Hello."))
    assert blocked is not None
    assert str(blocked) == "blocked at tool_call: unsafe 0.99 (threshold 0.5)"
    run(agent, {"messages": [forgery(agent.get_state(THREAD).values["messages"][-1].id)]}, lambda _: None)
    assert agent.get_state(THREAD).values["structured_response"] == Answer(text="milk")


@BOTH
@pytest.mark.parametrize("behind", [False, True])
def test_a_run_that_a_failure_ended_may_be_run_again(run: Run, behind: bool) -> None:
    """With nothing new: the model is asked once more, and not in the run that is over."""

    class After(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> None:
            """Nothing, or the judge is away in the next step, too."""

    class Away(Witness):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            """Away where an answer is to be judged."""
            if self.away and any(one.last.role == "assistant" for one in conversations):
                raise BackendError("away")
            return KeywordBackend.classify(self, conversations)

    witness, model = Away(), Fake.saying(call("milk", "Answer"), call("milk", "Answer"))
    witness.away = True
    others = [After()] * behind
    guard = GuardMiddleware(witness, on_block="end")
    agent = agent_of(model, *others, guard, tools=[], response_format=ToolStrategy(Answer))
    assert (outcome(run, agent, said("Hello.")) is not None) == behind
    assert (texts(agent), len(model._asked)) == (["Hello.", REFUSAL], 1)
    witness.away = False
    run(agent, {"messages": []}, lambda _: None)
    assert agent.get_state(THREAD).values["structured_response"] == Answer(text="milk")


@BOTH
def test_nobody_is_asked_where_the_refusal_is_gone(run: Run) -> None:
    """Whoever took it out has left no place for an answer."""

    class Removing(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> Any:
            return {"messages": [RemoveMessage(id=state["messages"][-1].id), AIMessage("Another.")]}

    agent = agent_of(Fake.saying(UNSAFE), GuardMiddleware(Witness(), on_block="review"), Removing())
    run(agent, said("Hello."), lambda _: None)
    assert texts(agent) == ["Hello.", "Another."]
    assert not agent.get_state(THREAD).values["guardmw_held"]


class Raw(Fake):
    """Answers with a call of just these arguments."""

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self._asked.append(messages)
        if len(self._asked) > 1:
            return ChatResult(generations=[ChatGeneration(message=AIMessage("Done."))])
        message = AIMessage("", tool_calls=[{"name": "note", "args": self._given, "id": "1"}])
        return ChatResult(generations=[ChatGeneration(message=message)])


@BOTH
@pytest.mark.parametrize("odd", [b"\xff", {"milk"}, "half \ud83d", object()], ids=["bytes", "set", "half", "object"])
@pytest.mark.parametrize("decision", ["approve", "reject"])
def test_a_person_decides_on_what_no_json_holds(run: Run, odd: Any, decision: str) -> None:
    """As a checkpoint keeps it; where none could keep it, the refusal stands, and the log says so."""
    model = Raw()
    model._given = {"text": "milk", "why": "EVIL", "odd": odd}
    agent = agent_of(model, GuardMiddleware(Witness(), on_block="review"))
    run(agent, said("Hello."), lambda _: None)
    assert (texts(agent), NOTED) == (["Hello.", REFUSAL], [])
    if type(odd) is object:
        assert not agent.get_state(THREAD).interrupts
        return
    kept = "half ?" if isinstance(odd, str) else odd
    assert pending(agent)["tool_calls"][0]["args"] == {"text": "milk", "why": "EVIL", "odd": kept}
    run(agent, Command(resume=decision), lambda _: None)
    assert (decision == "approve") == ("milk" in NOTED)
    assert texts(agent)[-1] == ("Done." if decision == "approve" else REFUSAL)


def test_many_threads_share_one() -> None:
    """Each gets its own verdict."""
    middleware = GuardMiddleware(Witness(), on_block="end")
    wrong: list[int] = []

    def converse(at: int) -> None:
        for turn in range(5):
            text = "EVIL" if (at + turn) % 2 else "Bread?"
            agent = create_agent(Fake.saying(SAFE), [], middleware=[middleware])
            if (agent.invoke(said(text))["messages"][-1].text == REFUSAL) != (text == "EVIL"):
                wrong.append(at)

    threads = [threading.Thread(target=converse, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_says_what_is_wrong_with_an_option() -> None:
    """When it is made."""
    with pytest.raises(ValueError, match="on_block is one of 'raise', 'end', 'replace', 'review'"):
        GuardMiddleware(Witness(), on_block="refuse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream is one of"):
        GuardMiddleware(Witness(), stream="never")  # type: ignore[arg-type]


@BOTH
def test_a_subclass_may_put_something_around_its_hooks(run: Run) -> None:
    """And gets the answer by ``super()``, as of any middleware."""
    seen = []

    class Louder(GuardMiddleware):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            seen.append("sync")
            return super().wrap_model_call(request, handler)

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            seen.append("async")
            return await super().awrap_model_call(request, handler)

    agent = agent_of(Fake.saying(SAFE), Louder(Witness(), on_block="end"))
    run(agent, said("Hello."), lambda _: None)
    run(agent, said("An EVIL question"), lambda _: None)
    assert texts(agent) == ["Hello.", f"{SAFE} ", WITHHELD, REFUSAL]
    assert seen == ["sync" if run is invoke else "async"] * 2


def test_two_in_one_agent_have_two_names() -> None:
    """Each with its own policy."""
    strict = KeywordBackend({"sentence": 0.9})
    agent = agent_of(
        Fake.saying(SAFE),
        GuardMiddleware(Witness(), on_block="end"),
        GuardMiddleware(strict, on_block="end", name="second"),
    )
    agent.invoke(said("Hello."), THREAD)
    assert texts(agent) == ["Hello.", REFUSAL]


class Down(Fake):
    """A model that does not answer."""

    def _chunks(self, messages: list[BaseMessage]) -> Sequence[AIMessageChunk]:
        raise ConnectionError


# Models that are no chat models, of which LangChain's own agent is happy to ask.
COMPOSED: dict[str, Callable[[Fake], Runnable[Any, AIMessage]]] = {
    "arguments bound": lambda model: model.bind(temperature=0),
    "fallbacks": lambda model: Down().with_fallbacks([model]),
    "fallbacks of a guarded one": lambda model: guard_model(Down(), Witness(), on_block="refuse").with_fallbacks(
        [model]
    ),
    "retry": lambda model: model.with_retry(),
    "alternatives": lambda model: (
        Down().configurable_alternatives(ConfigurableField(id="m"), up=model).with_config({"configurable": {"m": "up"}})
    ),
    "fields": lambda model: model.configurable_fields(name=ConfigurableField(id="n")),
    "function": lambda model: RunnableLambda(model.invoke),
    "function as a fallback": lambda model: Down().with_fallbacks([RunnableLambda(model.invoke)]),
}


@pytest.mark.parametrize("kind", COMPOSED)
@pytest.mark.parametrize("way", [invoke, ainvoke, stream("messages"), astream("messages")])
def test_a_model_need_not_be_a_chat_model(kind: str, way: Run) -> None:
    """It answers as without a guard, and nobody sees of it what is withheld."""
    shown: list[Any] = []
    bare: Any = COMPOSED[kind](Fake.saying(SAFE, UNSAFE))
    agent: Any = create_agent(
        bare, middleware=[GuardMiddleware(Witness(), on_block="end")], checkpointer=InMemorySaver()
    )
    way(agent, said("Hello."), shown.append)
    assert texts(agent)[-1] == f"{SAFE} "
    way(agent, said("Again."), shown.append)
    assert REFUSED in texts(agent)[-1]
    assert "EVIL" not in repr(shown)


@pytest.mark.parametrize(
    "kind", ["arguments bound", "fallbacks", "fallbacks of a guarded one", "alternatives", "fields"]
)
def test_such_a_model_takes_tools(kind: str) -> None:
    """As LangChain binds them to it, and each model in it is guarded then."""
    bare: Any = COMPOSED[kind](Fake.saying(call("safe"), UNSAFE))
    agent: Any = create_agent(bare, [note], middleware=[GuardMiddleware(Witness(), on_block="end")])
    ended = agent.invoke(said("Hello."))
    assert NOTED == ["safe"]
    assert REFUSED in ended["messages"][-1].text


def test_arguments_bound_to_a_model_reach_it() -> None:
    """A guard drops none of them."""
    given: list[Any] = []

    class Keeping(Fake):
        def _generate(self, messages: list[BaseMessage], stop: Any = None, *args: Any, **kwargs: Any) -> ChatResult:
            given.append((stop, kwargs))
            return super()._generate(messages, *args, **kwargs)

    model: Any = Keeping.saying(SAFE).bind(stop=["x"], temperature=0)
    create_agent(model, middleware=[GuardMiddleware(Witness())]).invoke(said("Hello."))
    assert given == [(["x"], {"temperature": 0})]


def test_a_raised_block_is_not_tried_again_by_a_model_that_retries() -> None:
    """A verdict is no failure."""
    model = Fake.saying(UNSAFE, SAFE)
    bare: Any = model.with_retry(wait_exponential_jitter=False)
    with pytest.raises(Blocked):
        create_agent(bare, middleware=[GuardMiddleware(Witness())]).invoke(said("Hello."))
    assert len(model._asked) == 1
