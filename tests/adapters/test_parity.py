"""One policy file means the same in LangChain and in LlamaIndex."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import langchain_guardmw as lc
import llama_index.callbacks.guardmw as li
import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from langchain_core.tools import tool as make_tool
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore, TextNode

from guardmw import Blocked, Guard, Policy
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llama_index.core.schema import QueryBundle

    from guardmw import Conversation, Verdict

POLICY = """
threshold: {flag: 0.3, block: 0.6}
stages:
  output: {threshold: {review: 0.35, block: 0.9}}
tools:
  allow: [search, shell]
  arguments:
    shell: {command: {pattern: "ls( -l)?"}}
"""
BACKEND = KeywordBackend({"DUBIOUS": 0.4, "BAD": 0.7, "EVIL": 0.99})


class Call(NamedTuple):
    """Of a tool, by a model."""

    name: str
    arguments: dict[str, Any]


class Said(NamedTuple):
    """One message."""

    role: str
    text: str = ""
    call: Call | None = None


CONVERSATIONS = {
    "safe": [Said("user", "hi"), Said("assistant", "ho")],
    "a dubious question": [Said("user", "DUBIOUS"), Said("assistant", "ho")],
    "a bad question": [Said("user", "BAD"), Said("assistant", "ho")],
    "a bad system prompt": [Said("system", "BAD"), Said("user", "hi"), Said("assistant", "ho")],
    "a dubious answer": [Said("user", "hi"), Said("assistant", "DUBIOUS")],
    "a bad answer": [Said("user", "hi"), Said("assistant", "BAD")],
    "an evil answer": [Said("user", "hi"), Said("assistant", "EVIL")],
    "an earlier bad question": [
        Said("user", "BAD"),
        Said("assistant", "ho"),
        Said("user", "hi"),
        Said("assistant", "ho"),
    ],
    "an allowed call": [Said("user", "hi"), Said("assistant", call=Call("shell", {"command": "ls -l"}))],
    "a call that breaks a rule": [Said("user", "hi"), Said("assistant", call=Call("shell", {"command": "rm"}))],
    "a call of a tool that is not allowed": [Said("user", "hi"), Said("assistant", call=Call("pay", {"amount": 1}))],
    "a call that says something evil": [Said("user", "hi"), Said("assistant", call=Call("search", {"q": "EVIL"}))],
    "a bad tool result": [
        Said("user", "hi"),
        Said("assistant", call=Call("search", {"q": "eggs"})),
        Said("tool", "BAD"),
        Said("assistant", "ho"),
    ],
}


@pytest.mark.parametrize("said", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_policy_file_gives_the_same_verdicts(said: list[Said], tmp_path: Path) -> None:
    """The last message is what the model answers."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    one, other = (Guard(BACKEND, policy=Policy.load(path)) for _ in range(2))
    verdicts = in_langchain(said, one), in_llama_index(said, other)
    assert verdicts[0] == verdicts[1]


def test_the_verdicts_are_not_all_the_same(tmp_path: Path) -> None:
    """What is blocked, and where, depends on the conversation and on the policy."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    guard = Guard(BACKEND, policy=Policy.load(path))
    verdicts = {name: in_llama_index(said, guard) for name, said in CONVERSATIONS.items()}
    assert {name for name, verdict in verdicts.items() if verdict is None} == {
        "safe",
        "a dubious question",
        "an allowed call",
    }
    stages = {verdict["stage"] for verdict in verdicts.values() if verdict}
    assert stages == {"input", "output", "tool_call", "tool_result"}
    assert {verdict["action"] for verdict in verdicts.values() if verdict} == {"block", "review"}


class Recording(Guard):
    """Keeps its verdicts, by what they are on, all of each but its time."""

    def __init__(self, path: Path) -> None:
        path.write_text(POLICY, encoding="utf-8")
        super().__init__(BACKEND, policy=Policy.load(path))
        self.verdicts: dict[tuple[str, str], dict[str, Any]] = {}

    def _plan(self, conversations: list[Conversation]) -> Any:
        verdicts = yield from super()._plan(conversations)
        for conversation, verdict in zip(conversations, verdicts, strict=True):
            self.verdicts[conversation.stage, conversation.trial] = _known(verdict)
        return verdicts

    @property
    def found(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The verdicts that are not "allow": in its own words each framework tells a model what was withheld."""
        return {on: verdict for on, verdict in self.verdicts.items() if verdict["action"] != "allow"}


@pytest.fixture
def guards(tmp_path: Path) -> tuple[Recording, Recording]:
    """Of one policy file."""
    return Recording(tmp_path / "policy.yaml"), Recording(tmp_path / "policy.yaml")


class World:
    """A tool for each framework, and what they did."""

    def __init__(self, result: str) -> None:
        self.ran: list[str] = []

        def shell(command: str) -> str:
            """Run a command."""
            self.ran.append(command)
            return result

        self.function = shell


TOOLS = {
    "safe": ("ls -l", "two files", 0),
    "a call that breaks a rule": ("rm", "gone", 1),
    "a call that says something evil": ("EVIL", "gone", 1),
    "a dubious result": ("ls", "DUBIOUS", 1),
    "a bad result": ("ls", "BAD", 1),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("command", "result", "found"), TOOLS.values(), ids=TOOLS)
async def test_a_tool_is_called_with_the_same_verdicts(
    command: str, result: str, found: int, asynchronous: bool, guards: tuple[Recording, Recording]
) -> None:
    """On the call and on its result; and it runs in both or in neither."""
    one, other = guards
    worlds = World(result), World(result)
    tool: Any = lc.guard_tool(make_tool(worlds[0].function), one)
    given = {"name": "shell", "args": {"command": command}, "id": "1", "type": "tool_call"}
    message = await tool.ainvoke(given) if asynchronous else tool.invoke(given)
    guarded: Any = li.guard_tool(worlds[1].function, other)
    output = await guarded.acall(command=command) if asynchronous else guarded.call(command=command)
    assert one.verdicts == other.verdicts
    assert len(one.found) == found
    assert worlds[0].ran == worlds[1].ran
    assert (result in message.content) == (result in output.content)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_the_same_documents_are_found(asynchronous: bool, guards: tuple[Recording, Recording]) -> None:
    """With the same verdicts on each."""
    one, other = guards
    texts = ["bread", "DUBIOUS", "BAD", "EVIL", "two\nlines", ""]
    shelf: Any = lc.guard_retriever(Shelf(texts=texts), one)
    found = await shelf.ainvoke("?") if asynchronous else shelf.invoke("?")
    fixed = li.guard_retriever(Fixed(texts), other)
    nodes = await fixed.aretrieve("?") if asynchronous else fixed.retrieve("?")
    assert one.verdicts == other.verdicts
    assert {verdict["action"] for verdict in one.verdicts.values()} == {"allow", "flag", "block"}
    kept = [*texts[:2], *texts[4:]]
    assert [document.page_content for document in found] == [node.text for node in nodes] == kept


AGENTS: dict[str, tuple[tuple[str, str, str], str, set[str]]] = {
    "safe": (("hi", "ls", "ho"), "two files", set()),
    "a bad question": (("BAD", "ls", "ho"), "two files", {"input"}),
    "a call that breaks a rule": (("hi", "rm", "ho"), "gone", {"tool_call"}),
    "a bad result": (("hi", "ls", "ho"), "BAD", {"tool_result"}),
    "an evil answer": (("hi", "ls", "EVIL"), "two files", {"output"}),
    "a dubious answer": (("hi", "ls", "DUBIOUS"), "two files", {"output"}),
}


# LlamaIndex looks, when an agent is made, at all that its class has, and pydantic has deprecated some of that.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("said", "result", "stages"), AGENTS.values(), ids=AGENTS)
async def test_an_agent_runs_with_the_same_verdicts(
    said: tuple[str, str, str], result: str, stages: set[str], guards: tuple[Recording, Recording]
) -> None:
    """A question, a call of a tool, its result, and an answer."""
    (one, other), (question, command, answer) = guards, said
    worlds = World(result), World(result)
    answers = [Said("assistant", call=Call("shell", {"command": command})), Said("assistant", answer)]
    tool = make_tool(worlds[0].function)
    middleware = [lc.ToolGuardMiddleware(one), lc.GuardMiddleware(one, on_block="end")]
    agent: Any = create_agent(Bound(messages=iter(map(_langchain, answers))), [tool], middleware=middleware)
    state = await agent.ainvoke({"messages": [HumanMessage(question)]})
    llm: Any = li.guard_llm(Answering.with_(*map(_llama_index, answers)), other, on_block="refuse")
    tools = li.guard_tools([worlds[1].function], other)
    ended = await FunctionAgent(tools=tools, llm=llm, streaming=False).run(question)
    assert one.found == other.found
    assert {stage for stage, _ in one.found} == stages
    assert worlds[0].ran == worlds[1].ran
    # A guarded LLM of LlamaIndex withholds a call with the answer that makes it; LangChain's agent goes on without it.
    if "tool_call" not in stages:
        assert state["messages"][-1].content == ended.response.content


def in_langchain(said: Sequence[Said], guard: Guard) -> dict[str, Any] | None:
    *messages, answer = [_langchain(message) for message in said]
    assert isinstance(answer, AIMessage)
    model = lc.guard_model(GenericFakeChatModel(messages=iter([answer])), guard)
    try:
        model.invoke(messages)
    except Blocked as blocked:
        return _kept(blocked)
    return None


def in_llama_index(said: Sequence[Said], guard: Guard) -> dict[str, Any] | None:
    *messages, answer = [_llama_index(message) for message in said]
    try:
        li.guard_llm(Answering.with_(answer), guard).chat(messages)
    except Blocked as blocked:
        return _kept(blocked)
    return None


def _kept(blocked: Blocked) -> dict[str, Any]:
    """All of a verdict but its time."""
    return _known(blocked.verdict)


def _known(verdict: Verdict) -> dict[str, Any]:
    return {key: value for key, value in verdict.to_dict().items() if key != "elapsed_ms"}


class Answering(MockFunctionCallingLLM):
    """Gives these answers in turn."""

    _answers: Iterator[ChatMessage] = PrivateAttr()

    @classmethod
    def with_(cls, *answers: ChatMessage) -> Answering:
        llm = cls()
        llm._answers = iter(answers)
        return llm

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return ChatResponse(message=next(self._answers))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages)


class Bound(GenericFakeChatModel):
    """Gives its messages in turn, whatever tools it has."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


class Shelf(LangChainRetriever):
    """Finds these texts."""

    texts: list[str]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(text) for text in self.texts]


class Fixed(BaseRetriever):
    """Finds these texts."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self._texts = texts

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text)) for text in self._texts]


def _langchain(message: Said) -> BaseMessage:
    if message.role == "tool":
        return ToolMessage(message.text, tool_call_id="1", name="search")
    if message.call:
        call = {"name": message.call.name, "args": message.call.arguments, "id": "1", "type": "tool_call"}
        return AIMessage("", tool_calls=[call])
    if message.role == "assistant":
        return AIMessage(message.text)
    return SystemMessage(message.text) if message.role == "system" else HumanMessage(message.text)


def _llama_index(message: Said) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage(role="tool", content=message.text, additional_kwargs={"tool_call_id": "1", "name": "search"})
    if message.call:
        block = ToolCallBlock(
            tool_call_id="1", tool_name=message.call.name, tool_kwargs=json.dumps(message.call.arguments)
        )
        return ChatMessage(role="assistant", blocks=[block])
    return ChatMessage(role=message.role, content=message.text)
