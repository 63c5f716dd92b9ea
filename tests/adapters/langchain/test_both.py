"""GuardMiddleware and ToolGuardMiddleware in one agent: each call is judged once, and a blocked one ends no run."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from hashlib import blake2b
from inspect import iscoroutinefunction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import langchain_guardmw
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel, FakeMessagesListChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langchain_guardmw import REFUSAL, GuardMiddleware, ToolGuardMiddleware, history, parts, tool_middleware
from langchain_guardmw.calls import Calls
from langchain_guardmw.tools import CALL_WITHHELD
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command
from langsmith import tracing_context

import guardmw
from guardmw import Conversation, Guard, Policy, Scores
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

# Events of the third version are in beta.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

LOOKING_BACK = Policy.model_validate(
    {"tools": {"flows": [{"tools": ["note"], "injection": 0.5}], "budgets": [{"tools": ["note"], "calls": 99}]}}
)
CONFIG: Any = {"configurable": {"thread_id": "1"}}
SAFE = "Two harmless sentences. They are the answer. "


class Witness(KeywordBackend):
    """EVIL is unsafe, DOUBT is for a person to say; keeps the tool calls that it judged."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99, "DOUBT": 0.7})
        self.calls: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """By words."""
        self.calls += [one.trial for one in conversations if one.stage == "tool_call"]
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, after others had their turn."""
        await asyncio.sleep(0)
        return self.classify(conversations)


def in_pieces(texts: Sequence[str]) -> list[AIMessageChunk]:
    """Calls of a tool with these texts, as a model streams them."""
    chunks = []
    for at, text in enumerate(texts):
        pieces: list[Any] = [{"name": "note", "args": "", "id": str(at), "index": at}]
        pieces += [{"name": None, "args": one, "id": None, "index": at} for one in json.dumps({"text": text})]
        chunks += [AIMessageChunk(content="", tool_call_chunks=[piece]) for piece in pieces]
    return chunks


def in_deltas(texts: Sequence[str]) -> list[AIMessageChunk]:
    """The same in blocks, where every piece comes twice, and the block never gets its input."""
    chunks = []
    for chunk in in_pieces(texts):
        (piece,) = chunk.tool_call_chunks
        block: dict[str, Any] = {"type": "input_json_delta", "partial_json": piece["args"], "index": piece["index"]}
        if piece["name"]:
            block = {"type": "tool_use", "id": piece["id"], "name": "note", "input": {}, "index": piece["index"]}
        # Without it LangChain takes the deltas apart, in events of the third version.
        provider = {"model_provider": "anthropic"}
        chunks.append(AIMessageChunk(content=[block], tool_call_chunks=[piece], response_metadata=provider))
    return chunks


def whole(of: Callable[[str, str, dict[str, Any]], dict[str, Any]]) -> Callable[[Sequence[str]], list[AIMessageChunk]]:
    """Calls each of which comes in one piece, with a copy beside it, by id, text and arguments."""

    def chunks(texts: Sequence[str]) -> list[AIMessageChunk]:
        made = []
        for at, text in enumerate(texts):
            arguments = {"text": text}
            piece: Any = {"name": "note", "args": json.dumps(arguments), "id": str(at), "index": at}
            made.append(
                AIMessageChunk(**{"content": "", **of(str(at), piece["args"], arguments)}, tool_call_chunks=[piece])
            )
        return made

    return chunks


# How providers write calls: what LangChain makes of them is always beside what they themselves say.
FORMS: dict[str, Callable[[Sequence[str]], list[AIMessageChunk]]] = {
    "pieces": in_pieces,
    "deltas": in_deltas,
    "tool_use": whole(
        lambda id_, _, given: {"content": [{"type": "tool_use", "id": id_, "name": "note", "input": given}]}
    ),
    "function_call": whole(
        lambda id_, said, _: {
            "content": [
                {"type": "function_call", "call_id": id_, "name": "note", "arguments": said, "index": int(id_) + 1}
            ],
            "response_metadata": {"model_provider": "openai"},
        }
    ),
    "tool_call": whole(
        lambda id_, _, given: {"content": [{"type": "tool_call", "id": id_, "name": "note", "args": given}]}
    ),
    "tool_calls": whole(
        lambda id_, said, _: {
            "additional_kwargs": {
                "tool_calls": [{"id": id_, "type": "function", "function": {"name": "note", "arguments": said}}]
            }
        }
    ),
    "function_call beside": whole(
        lambda _, said, __: {"additional_kwargs": {"function_call": {"name": "note", "arguments": said}}}
    ),
}


class Fake(BaseChatModel):
    """A chat model that makes these calls, then says that it is done; it streams, in small pieces."""

    texts: list[str]
    text: str = "Wait. "
    form: str = "pieces"

    @property
    def _llm_type(self) -> str:
        return "fake"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        return self.bind()

    def _chunks(self, messages: list[BaseMessage]) -> list[AIMessageChunk]:
        if isinstance(messages[-1], ToolMessage):
            return [AIMessageChunk(content=word) for word in (SAFE[:9], SAFE[9:])]
        return [AIMessageChunk(content=self.text), *FORMS[self.form](self.texts)]

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        first, *others = self._chunks(messages)
        for chunk in others:
            first += chunk
        message = message_chunk_to_message(first)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        yield from (ChatGenerationChunk(message=chunk) for chunk in self._chunks(messages))

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            await asyncio.sleep(0)
            yield ChatGenerationChunk(message=chunk)


class Notes:
    """A tool, and what was noted with it."""

    def __init__(self) -> None:
        self.noted: list[str] = []

        @tool
        def note(text: str) -> str:
            """Note something."""
            self.noted.append(text)
            return "Noted."

        self.tool = note


def agent_of(notes: Notes, model: BaseChatModel, *middleware: Any, saver: InMemorySaver | None = None) -> Any:
    """An agent with a checkpointer."""
    return create_agent(model, [notes.tool], middleware=middleware, checkpointer=saver or InMemorySaver())


Run = Callable[[Any, Any], list[Any]]


def invoke(agent: Any, given: Any) -> list[Any]:
    """Run it to its end."""
    return [agent.invoke(given, CONFIG)]


def ainvoke(agent: Any, given: Any) -> list[Any]:
    """The same on an event loop."""
    return [asyncio.run(agent.ainvoke(given, CONFIG))]


def stream(agent: Any, given: Any) -> list[Any]:
    """See all that streaming shows."""
    return list(agent.stream(given, CONFIG, stream_mode=["messages", "updates", "values"]))


def astream(agent: Any, given: Any) -> list[Any]:
    """The same on an event loop."""

    async def consume() -> list[Any]:
        modes = ["messages", "updates", "values"]
        return [one async for one in agent.astream(given, CONFIG, stream_mode=modes)]

    return asyncio.run(consume())


def events(agent: Any, given: Any) -> list[Any]:
    """See all events."""

    async def consume() -> list[Any]:
        return [one async for one in agent.astream_events(given, CONFIG, version="v2")]

    return asyncio.run(consume())


def events_v3(agent: Any, given: Any) -> list[Any]:
    """See all events of the third version."""
    return list(agent.stream_events(given, CONFIG, version="v3"))


def aevents_v3(agent: Any, given: Any) -> list[Any]:
    """The same on an event loop."""

    async def consume() -> list[Any]:
        return [one async for one in await agent.astream_events(given, CONFIG, version="v3")]

    return asyncio.run(consume())


def subgraph(agent: Any, given: Any) -> list[Any]:
    """See all that streaming shows where it is a node of another graph."""
    modes: Any = ["messages", "updates", "values"]
    return list(within_graph(agent).stream(given, CONFIG, stream_mode=modes, subgraphs=True))


def asubgraph(agent: Any, given: Any) -> list[Any]:
    """The same on an event loop."""

    async def consume() -> list[Any]:
        modes: Any = ["messages", "updates", "values"]
        graph = within_graph(agent)
        return [one async for one in graph.astream(given, CONFIG, stream_mode=modes, subgraphs=True)]

    return asyncio.run(consume())


def within_graph(agent: Any) -> Any:
    """A graph with an agent for its only node, which keeps the conversation in its own thread."""
    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_edge(START, "agent")
    return graph.compile(checkpointer=agent.checkpointer)


EVERY_RUN = pytest.mark.parametrize("run", [invoke, ainvoke, stream, astream, events, events_v3, aevents_v3])
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
GIVEN = {"messages": [HumanMessage("Note it.")]}


def messages(agent: Any) -> list[BaseMessage]:
    """The conversation as the agent remembers it."""
    found: list[BaseMessage] = agent.get_state(CONFIG).values["messages"]
    return found


@EVERY_RUN
@EVERY_FORM
@pytest.mark.parametrize("on_block", ["raise", "end", "replace", "review"])
def test_a_blocked_call_is_answered_and_the_run_goes_on(run: Run, form: str, on_block: Any) -> None:
    """Each call is judged once; nobody sees the blocked one, nor does it run, nor rest in a checkpoint."""
    notes, witness = Notes(), Witness()
    judge = Guard(witness)
    model = Fake(texts=["one", "EVIL", "three"], form=form)
    agent = agent_of(notes, model, ToolGuardMiddleware(judge), GuardMiddleware(judge, on_block=on_block))
    shown = run(agent, GIVEN)
    assert sorted(witness.calls) == ['note {"text": "EVIL"}', 'note {"text": "one"}', 'note {"text": "three"}']
    assert sorted(notes.noted) == ["one", "three"]
    _, said, *results, last = messages(agent)
    assert said.text == "Wait. "
    told = {one.tool_call_id: one for one in results if isinstance(one, ToolMessage)}
    assert [told[at].status for at in "012"] == ["success", "error", "success"]
    assert told["1"].text == f"{CALL_WITHHELD} (unsafe)."
    assert last.text == SAFE
    assert "EVIL" not in repr(shown)
    assert "EVIL" not in repr(
        (list(agent.checkpointer.list(None)), agent.checkpointer.blobs, agent.checkpointer.writes)
    )


@EVERY_RUN
def test_the_check_notices_calls_that_leak(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tools' guard is asked for calls only when they are about to be made."""
    monkeypatch.setattr(Calls, "_blocked", lambda calls, *_: setattr(calls, "judged", True) or {})
    notes = Notes()
    shown = run(
        agent_of(notes, Fake(texts=["EVIL"]), ToolGuardMiddleware(Witness()), GuardMiddleware(Witness())), GIVEN
    )
    assert notes.noted == []
    assert "EVIL" in repr(shown)


@pytest.mark.parametrize("run", [invoke, ainvoke, stream, astream, events])
def test_safe_calls_are_as_the_model_made_them(run: Run) -> None:
    """Chunk by chunk."""

    def shown_by(*middleware: Any) -> list[Any]:
        agent = agent_of(Notes(), Fake(texts=["one", "two"]), *middleware)
        shown = run(agent, GIVEN)
        if run in (invoke, ainvoke):
            return [(type(one), one.content, getattr(one, "tool_calls", [])) for one in messages(agent)]
        if run in (stream, astream):
            chunks = [data[0] for mode, data in shown if mode == "messages"]
        else:
            chunks = [one["data"].get("chunk") for one in shown if one["event"] == "on_chat_model_stream"]
        return [(one.content, one.tool_call_chunks) for one in chunks if isinstance(one, AIMessageChunk)]

    assert shown_by(ToolGuardMiddleware(Witness()), GuardMiddleware(Witness())) == shown_by()


@EVERY_RUN
def test_without_a_guard_of_the_tools_a_blocked_call_ends_the_run(run: Run) -> None:
    """Whoever guards the model judges its calls too."""
    notes, witness = Notes(), Witness()
    shown = run(agent_of(notes, Fake(texts=["EVIL"]), GuardMiddleware(witness, on_block="end")), GIVEN)
    assert len(witness.calls) == 1
    assert notes.noted == []
    assert "EVIL" not in repr(shown)


REVIEWED = Policy.model_validate({"stages": {"tool_call": {"threshold": {"review": 0.5, "block": 0.9}}}})


@EVERY_RUN
@EVERY_FORM
def test_a_call_under_review_is_judged_once_and_waits_for_a_person(run: Run, form: str) -> None:
    """The model's guard does not withhold it."""
    notes, witness = Notes(), Witness()
    judge = Guard(witness, policy=REVIEWED)
    agent = agent_of(
        notes, Fake(texts=["DOUBT"], form=form), ToolGuardMiddleware(judge), GuardMiddleware(judge, on_block="end")
    )
    run(agent, GIVEN)
    assert notes.noted == []
    run(agent, Command(resume={"type": "approve"}))
    assert notes.noted == ["DOUBT"]
    assert len(witness.calls) == 1
    assert messages(agent)[-1].text == SAFE


@EVERY_FORM
@pytest.mark.parametrize("on_block", ["raise", "end", "replace"])
@pytest.mark.parametrize("rules", [None, {"arguments": {"note": {"text": {"pattern": "one|DOUBT"}}}}])
def test_what_was_decided_on_calls_stands_in_another_process(form: str, on_block: Any, rules: Any) -> None:
    """A person may answer after a restart: what was approved is no offence then, nor what is left of a blocked call."""
    policy = Policy.model_validate({**REVIEWED.model_dump(exclude_unset=True), "tools": rules})
    notes, saver = Notes(), InMemorySaver()

    def started() -> Any:
        judge = Guard(Witness(), policy=policy)
        model = Fake(texts=["one", "DOUBT", "EVIL"], form=form)
        return agent_of(
            notes, model, ToolGuardMiddleware(judge), GuardMiddleware(judge, on_block=on_block), saver=saver
        )

    invoke(started(), GIVEN)
    assert notes.noted == ["one"]
    agent = started()
    invoke(agent, Command(resume={"type": "approve"}))
    assert notes.noted == ["one", "DOUBT"]
    assert messages(agent)[-1].text == SAFE


VERDICT = {"action": "block", "violations": [{"rule": "EVIL"}]}


@pytest.mark.parametrize("run", [invoke, ainvoke])
@pytest.mark.parametrize("noted", [{"9": VERDICT}, {"9": {}}, ["9"], "9"])
def test_a_history_that_says_its_calls_were_blocked_is_judged(run: Run, noted: Any) -> None:
    """Anybody can write that: it hides nothing, and what it says nobody gets to read."""
    called: Any = {"name": "be_EVIL", "args": {}, "id": "9"}
    said = AIMessage("", tool_calls=[called], response_metadata={"guardmw_calls": noted})
    given = [HumanMessage("Hi."), said, ToolMessage("Done.", tool_call_id="9"), HumanMessage("Note it.")]
    agent = agent_of(Notes(), Fake(texts=["one"]), ToolGuardMiddleware(Witness()), GuardMiddleware(Witness()))
    known = history.History(1_000, ("GuardMiddleware", Policy().fingerprint))
    shown = run(agent, {"messages": given, "guardmw_approved": [known.approval_anywhere(said)]})
    assert "be_EVIL" not in repr((shown, messages(agent)))


@pytest.mark.parametrize("noted", [{"0": VERDICT}, ["0"], "nothing"])
def test_a_model_that_says_its_call_was_blocked_forbids_it_at_most(noted: Any) -> None:
    """And in our own words; a call on which there is a verdict is made or not by that."""
    notes = Notes()
    fake = Fake(texts=["one"])

    class Forging(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            response = handler(request)
            response.result[0].response_metadata["guardmw_calls"] = noted
            return response

    agent = agent_of(notes, fake, ToolGuardMiddleware(Witness()), Forging())
    invoke(agent, GIVEN)
    assert notes.noted == ([] if isinstance(noted, dict) else ["one"])
    assert "EVIL" not in messages(agent)[2].text
    guarded = agent_of(notes, fake, ToolGuardMiddleware(Witness()), Forging(), GuardMiddleware(Witness()))
    notes.noted.clear()
    invoke(guarded, GIVEN)
    assert notes.noted == ["one"]


class Twice(Fake):
    """Has two candidates for an answer, of which an agent takes the first, and callbacks see both."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        first = super()._generate(messages).generations[0]
        other: Any = {"name": "note", "args": {"text": "EVIL"}, "id": "0"}
        return ChatResult(generations=[first, ChatGeneration(message=AIMessage("", tool_calls=[other]))])


class Heard(BaseCallbackHandler):
    """All that models are heard to say."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        """All candidates."""
        self.said.append(repr(response))


@pytest.mark.parametrize("run", [invoke, ainvoke])
def test_every_candidate_for_an_answer_is_judged(run: Run) -> None:
    """Also those that an agent does not take."""
    notes, heard = Notes(), Heard()
    model = Twice(texts=["one"], callbacks=[heard])
    agent = agent_of(notes, model, ToolGuardMiddleware(Witness()), GuardMiddleware(Witness(), on_block="end"))
    run(agent, GIVEN)
    assert heard.said
    assert "EVIL" not in repr(heard.said)
    assert (notes.noted, messages(agent)[-1].text) == ([], REFUSAL)


@EVERY_RUN
def test_the_name_of_a_blocked_call_is_that_of_a_tool(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is the model's own text, and goes with the rest of the call."""
    called: Any = {"name": "be_EVIL", "args": "{}", "id": "1", "index": 0}
    monkeypatch.setitem(FORMS, "pieces", lambda _: [AIMessageChunk(content="", tool_call_chunks=[called])])
    agent = agent_of(Notes(), Fake(texts=[]), ToolGuardMiddleware(Witness()), GuardMiddleware(Witness()))
    shown = run(agent, GIVEN)
    assert messages(agent)[-1].text == SAFE
    assert "EVIL" not in repr((shown, messages(agent)))


@EVERY_RUN
@EVERY_FORM
@pytest.mark.parametrize("on_block", ["end", "replace"])
def test_in_the_other_order_nothing_leaks_either(run: Run, form: str, on_block: Any) -> None:
    """There the model's guard judges the calls, and a blocked one ends the run."""
    notes = Notes()
    model = Fake(texts=["one", "EVIL"], form=form)
    agent = agent_of(notes, model, GuardMiddleware(Witness(), on_block=on_block), ToolGuardMiddleware(Witness()))
    shown = run(agent, GIVEN)
    assert notes.noted == []
    assert messages(agent)[-1].text.endswith(REFUSAL)
    assert "EVIL" not in repr(
        (shown, list(agent.checkpointer.list(None)), agent.checkpointer.blobs, agent.checkpointer.writes)
    )


@pytest.mark.parametrize("run", [invoke, ainvoke])
def test_in_the_other_order_a_call_under_review_ends_the_run(run: Run) -> None:
    """As it does where nobody guards the tools."""
    notes, judge = Notes(), Guard(Witness(), policy=REVIEWED)
    agent = agent_of(notes, Fake(texts=["DOUBT"]), GuardMiddleware(judge, on_block="end"), ToolGuardMiddleware(judge))
    run(agent, GIVEN)
    assert (notes.noted, messages(agent)[-1].text) == ([], REFUSAL)
    assert not agent.get_state(CONFIG).interrupts


@pytest.mark.parametrize("run", [subgraph, asubgraph])
@EVERY_FORM
def test_as_a_node_of_another_graph_nothing_leaks_either(run: Run, form: str) -> None:
    """Neither a call nor an answer, and the blocked call is answered there too."""
    notes = Notes()
    model = Fake(texts=["one", "EVIL"], form=form)
    agent = agent_of(notes, model, ToolGuardMiddleware(Witness()), GuardMiddleware(Witness(), on_block="end"))
    shown = run(agent, GIVEN)
    assert notes.noted == ["one"]
    assert SAFE[:9] in repr(shown)
    assert "EVIL" not in repr(shown)
    evil = agent_of(notes, Fake(texts=[], text="The EVIL part. "), GuardMiddleware(Witness(), on_block="end"))
    shown = run(evil, GIVEN)
    assert "EVIL" not in repr((shown, evil.checkpointer.blobs, evil.checkpointer.writes))
    assert REFUSAL.partition("'t ")[2] in repr(shown)


@EVERY_RUN
def test_what_a_model_says_beside_its_calls_is_still_judged(run: Run) -> None:
    """The run ends with a refusal, and none of the calls is made."""
    notes = Notes()
    model = Fake(texts=["one"], text="The EVIL part. ")
    shown = run(
        agent_of(notes, model, ToolGuardMiddleware(Witness()), GuardMiddleware(Witness(), on_block="end")), GIVEN
    )
    assert notes.noted == []
    assert "EVIL" not in repr(shown)


class Looping(Fake):
    """Notes so many things, one a turn, and reports each time that it is asked."""

    turns: int
    report: Callable[[], object]

    def _chunks(self, messages: list[BaseMessage]) -> list[AIMessageChunk]:
        self.report()
        at = len(messages) // 2
        if at == self.turns:
            return [AIMessageChunk(content="It is done.")]
        piece: Any = {"name": "note", "args": json.dumps({"text": f"item {at:03}"}), "id": f"{at:03}", "index": 0}
        return [AIMessageChunk(content="Next. "), AIMessageChunk(content="", tool_call_chunks=[piece])]


class Counted:
    """blake2b, which counts what it is given."""

    given = 0

    def __init__(self, data: bytes = b"", **options: Any) -> None:
        self._digest = blake2b(**options)
        self.update(data)

    def update(self, data: bytes) -> None:
        """As blake2b does."""
        Counted.given += len(data)
        self._digest.update(data)

    def digest(self) -> bytes:
        """As blake2b does."""
        return self._digest.digest()


def ours(frame: Any, event: str, _: object) -> None:
    """Counts the functions of guardmw that are called."""
    CALLED[0] += event == "call" and "guardmw" in frame.f_code.co_filename


CALLED = [0]


@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("run", [invoke, stream])
def test_a_turn_calls_no_more_functions_the_longer_the_conversation_is(run: Run, ruled: bool) -> None:
    """Nobody goes over the history again, not for rules that look back, either."""
    spent: list[int] = []
    judge = Guard(Witness(), policy=LOOKING_BACK if ruled else None)
    model = Looping(texts=[], turns=25, report=lambda: spent.append(CALLED[0]))
    agent = create_agent(model, [Notes().tool], middleware=[ToolGuardMiddleware(judge), GuardMiddleware(judge)])
    before = sys.getprofile()
    gc.disable()
    threading.setprofile(ours)
    sys.setprofile(ours)
    try:
        run(agent, GIVEN)
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
        gc.enable()
    turns = [b - a for a, b in pairwise(spent)]
    assert len(turns) == 25
    # One that LangChain calls for a message or two may come a turn later; a history's would be dozens.
    assert max(turns[10:]) - min(turns[10:]) <= 5


def test_a_turn_calls_few_functions() -> None:
    """Nothing is copied, looked up or read again that need not be; 206 were counted, on Python 3.11."""
    own = tuple(str(Path(module.__file__ or "").parent) for module in (guardmw, langchain_guardmw))
    count = 0

    def profile(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(own)

    judge = Guard(Witness())
    model = FakeMessagesListChatModel(responses=[AIMessage("Fine.")])
    agent: Any = create_agent(model, [], middleware=[ToolGuardMiddleware(judge), GuardMiddleware(judge)])
    agent.invoke(GIVEN)
    before = sys.getprofile()
    gc.disable()
    sys.setprofile(profile)
    try:
        agent.invoke({"messages": [HumanMessage("Another question.")]})
    finally:
        sys.setprofile(before)
        gc.enable()
    assert 100 < count <= 218, count


@pytest.mark.parametrize("run", [invoke, ainvoke, stream, astream])
def test_a_turn_costs_no_more_the_longer_the_conversation_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of fifty messages: as many trials, characters on trial and hashed, and messages read, in every turn."""
    reads, spent = list[object](), list[tuple[int, ...]]()
    spoken = parts.spoken

    class Reader(Witness):
        trials, characters = 0, 0

        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            self.trials += len(conversations)
            self.characters += sum(len(turn.text) for one in conversations for turn in one.turns)
            return super().classify(conversations)

    def counting(message: BaseMessage) -> Any:
        reads.append(message)
        return spoken(message)

    monkeypatch.setattr(Counted, "given", 0)
    monkeypatch.setattr(history, "blake2b", Counted)
    monkeypatch.setattr(tool_middleware, "blake2b", Counted)
    monkeypatch.setattr(history, "spoken", counting)
    reader = Reader()
    judge = Guard(reader)
    model = Looping(
        texts=[],
        turns=25,
        report=lambda: spent.append((reader.trials, reader.characters, Counted.given, len(reads))),
    )
    agent = create_agent(model, [Notes().tool], middleware=[ToolGuardMiddleware(judge), GuardMiddleware(judge)])
    run(agent, GIVEN)
    turns = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(spent)]
    assert len(turns) == 25
    # From where all the context is there that a message is judged in.
    assert set(turns[6:]) == {turns[6]}
    # The call's result before it is shown, in the history, what is said with the next call, and that call.
    assert turns[6][0] == 4


@pytest.mark.parametrize("traced", [False, True])
async def test_a_turn_takes_no_thread_where_nothing_is_traced(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """LangSmith hops to one four times for each hook that it knows to be async."""
    hops = 0
    loop = asyncio.get_running_loop()
    run = loop.run_in_executor

    def counted(*args: Any) -> Any:
        nonlocal hops
        hops += 1
        return run(*args)

    monkeypatch.setattr(loop, "run_in_executor", counted)
    judge = Guard(Witness())
    with tracing_context(enabled=traced):
        middleware = [ToolGuardMiddleware(judge), GuardMiddleware(judge)]
        agent: Any = create_agent(Fake(texts=["one"]), [Notes().tool], middleware=middleware)
    for hook in (one.awrap_model_call for one in middleware):
        assert not iscoroutinefunction(hook)
    with tracing_context(enabled=False):
        bare: Any = create_agent(Fake(texts=["one"]), [Notes().tool])
        await bare.ainvoke(GIVEN)
        usual, hops = hops, 0
        answer = await agent.ainvoke(GIVEN)
    assert answer["messages"][-1].text == SAFE
    # Two model calls, each with two hooks around it, and a tool call with one.
    assert hops == usual + (10 if traced else 0)


@pytest.mark.parametrize("kind", [GuardMiddleware, ToolGuardMiddleware])
def test_a_subclass_may_be_made_of_what_it_likes(kind: type[Any]) -> None:
    """A guard among it, or not."""

    class Mine(kind):
        def __init__(self, tenant: str, *, strict: bool) -> None:
            super().__init__(KeywordBackend({}))
            self.of = (tenant, strict)

    assert Mine("one", strict=True).of == ("one", True)
