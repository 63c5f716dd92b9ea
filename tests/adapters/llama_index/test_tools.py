"""A guarded tool runs only what its guard allows, shows a model only that, and is in all else the tool it was."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import _verdicts as verdicts_module
from llama_index.callbacks.guardmw import guard_llm, guard_tool, guard_tools
from llama_index.callbacks.guardmw import tools as module
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCall, ToolCallResult
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, ImageBlock, LLMMetadata, ToolCallBlock
from llama_index.core.base.response.schema import Response
from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import BaseTool, FunctionTool, QueryEngineTool, ToolMetadata, ToolOutput
from llama_index.core.tools.calling import acall_tool, call_tool
from llama_index.core.workflow import (
    Context,
    HumanResponseEvent,
    InputRequiredEvent,
    JsonSerializer,
    StartEvent,
    StopEvent,
    Workflow,
    step,
)
from workflows.errors import WorkflowCancelledByUser

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from llama_index.core import QueryBundle
    from llama_index.core.agent.workflow.base_agent import BaseWorkflowAgent
    from llama_index.core.base.llms.types import CompletionResponseGen
    from llama_index.core.prompts.mixin import PromptMixinType

# LlamaIndex looks, when an agent is made, at all that its class has, and pydantic has deprecated some of that.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EVIL = KeywordBackend({"EVIL": 0.99})
REFUSED = "This call was blocked by a policy and did not run (unsafe)."
WITHHELD = "The tool ran, but its result was withheld by a policy (unsafe)."


def rules(**tools: Any) -> Policy:
    return Policy.model_validate({"tools": tools})


class Watching(KeywordBackend):
    """Blocks EVIL, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.asked: list[Conversation] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.asked += conversations
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        return self.classify(conversations)

    @property
    def stages(self) -> list[str]:
        return [conversation.stage for conversation in self.asked]


class World:
    """What a tool did, and what it answers."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.results: dict[str, Any] = {}

    def do(self, text: str) -> Any:
        self.ran.append(text)
        result = self.results.get(text, f"Did {text}.")
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def world() -> World:
    return World()


def function_tool(world: World, **settings: Any) -> FunctionTool:
    def act(text: str) -> Any:
        """Act on the world."""
        return world.do(text)

    return FunctionTool.from_defaults(act, **settings)


def async_tool(world: World) -> FunctionTool:
    async def act(text: str) -> Any:
        """Act on the world."""
        return world.do(text)

    return FunctionTool.from_defaults(async_fn=act)


def context_tool(world: World) -> FunctionTool:
    async def act(ctx: Any, text: str) -> Any:
        """Act on the world."""
        await ctx.store.set("acted", text)
        return world.do(text)

    # In a module with postponed annotations LlamaIndex does not find the Context.
    act.__annotations__ = {"ctx": Context, "text": str}
    return FunctionTool.from_defaults(async_fn=act)


class Engine(BaseQueryEngine):
    """A query engine that acts on the world."""

    def __init__(self, world: World) -> None:
        super().__init__(CallbackManager())
        self._world = world

    def _query(self, query_bundle: QueryBundle) -> Response:
        return Response(str(self._world.do(query_bundle.query_str)))

    async def _aquery(self, query_bundle: QueryBundle) -> Response:
        return self._query(query_bundle)

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}


def engine_tool(world: World) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(Engine(world), name="act", description="Act on the world.")


MakeTool = Callable[[World], BaseTool]
TOOLS = pytest.mark.parametrize("make", [function_tool, async_tool, engine_tool])
AGENT_TOOLS = pytest.mark.parametrize("make", [function_tool, async_tool, engine_tool, context_tool])


def argument(tool: BaseTool) -> str:
    return next(iter(tool.metadata.get_parameters_dict()["properties"]))


class Model:
    """What a fake model does, and all that it read."""

    def __init__(self, *turns: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.turns = list(turns)
        self.read: list[str] = []

    def functions(self) -> MockFunctionCallingLLM:
        def answer(messages: Sequence[ChatMessage], **_: Any) -> ChatMessage:
            self.read.append("\n".join(str(message.content) for message in messages if message.role == "tool"))
            if not self.turns:
                return ChatMessage(role="assistant", content="Done.")
            calls = [
                ToolCallBlock(tool_call_id=f"{len(self.turns)}.{at}", tool_name=name, tool_kwargs=dict(arguments))
                for at, (name, arguments) in enumerate(self.turns.pop(0))
            ]
            return ChatMessage(role="assistant", blocks=calls)

        return MockFunctionCallingLLM(response_generator=answer)

    def reasoning(self) -> Reasoning:
        return Reasoning.of(self)


class Reasoning(CustomLLM):
    """Writes calls as a ReAct agent reads them."""

    _model: Model = PrivateAttr()

    @classmethod
    def of(cls, model: Model) -> Reasoning:
        llm = cls()
        llm._model = model
        return llm

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self._model.read.append("\n".join(line for line in prompt.split("\n") if "Observation: " in line))
        if not self._model.turns:
            return CompletionResponse(text="Thought: I can answer.\nAnswer: Done.")
        ((name, arguments),) = self._model.turns.pop(0)
        spelled = str(dict(arguments)).replace("'", '"')
        return CompletionResponse(text=f"Thought: I need a tool.\nAction: {name}\nAction Input: {spelled}")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        whole = self.complete(prompt)

        def pieces() -> CompletionResponseGen:
            yield CompletionResponse(text=whole.text, delta=whole.text)

        return pieces()


async def by_functions(tool: BaseTool, model: Model, streaming: bool = False) -> list[ToolOutput]:
    return await run(FunctionAgent(tools=[tool], llm=model.functions(), streaming=streaming))


async def by_streamed_functions(tool: BaseTool, model: Model) -> list[ToolOutput]:
    return await by_functions(tool, model, streaming=True)


async def by_reasoning(tool: BaseTool, model: Model) -> list[ToolOutput]:
    return await run(ReActAgent(tools=[tool], llm=model.reasoning(), streaming=False))


async def by_streamed_reasoning(tool: BaseTool, model: Model) -> list[ToolOutput]:
    return await run(ReActAgent(tools=[tool], llm=model.reasoning()))


async def by_workflow(tool: BaseTool, model: Model) -> list[ToolOutput]:
    agent = FunctionAgent(name="one", description="One.", tools=[tool], llm=model.functions(), streaming=False)
    return await run(AgentWorkflow(agents=[agent], root_agent="one"))


async def by_reasoning_workflow(tool: BaseTool, model: Model) -> list[ToolOutput]:
    agent = ReActAgent(name="one", description="One.", tools=[tool], llm=model.reasoning(), streaming=False)
    return await run(AgentWorkflow(agents=[agent], root_agent="one"))


async def run(agent: BaseWorkflowAgent | AgentWorkflow, *answers: Mapping[str, Any]) -> list[ToolOutput]:
    """Run an agent; a person answers, in this order, what they are asked."""
    handler = agent.run("Do it.")
    outputs, given = [], iter(answers)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            outputs.append(event.tool_output)
        elif isinstance(event, InputRequiredEvent):
            handler.ctx.send_event(HumanResponseEvent(review=event.review, **next(given)))  # type: ignore[call-arg]
    assert str(await handler) == "Done."
    return outputs


Agent = Callable[[BaseTool, Model], Awaitable[list[ToolOutput]]]
AGENTS = pytest.mark.parametrize(
    "agent",
    [by_functions, by_streamed_functions, by_reasoning, by_streamed_reasoning, by_workflow, by_reasoning_workflow],
)


async def by_call(tool: Any, text: str) -> ToolOutput:
    return tool.call(**{argument(tool): text})  # type: ignore[no-any-return]


async def by_acall(tool: Any, text: str) -> ToolOutput:
    return await tool.acall(**{argument(tool): text})  # type: ignore[no-any-return]


async def by_position(tool: Any, text: str) -> ToolOutput:
    return tool(text)  # type: ignore[no-any-return]


async def by_calling(tool: Any, text: str) -> ToolOutput:
    return call_tool(tool, {argument(tool): text})


async def by_acalling(tool: Any, text: str) -> ToolOutput:
    return await acall_tool(tool, {argument(tool): text})


Way = Callable[[Any, str], Awaitable[ToolOutput]]
WAYS = pytest.mark.parametrize("way", [by_call, by_acall, by_position, by_calling, by_acalling])


@WAYS
@TOOLS
async def test_an_unsafe_call_does_not_run(make: MakeTool, way: Way, world: World) -> None:
    """However it is made; its caller is told so in a result that quotes nothing."""
    output = await way(guard_tool(make(world), EVIL), "EVIL")
    assert world.ran == []
    assert (output.content, output.is_error, output.raw_input, output.raw_output) == (REFUSED, True, {}, None)
    assert isinstance(output.exception, Blocked)
    assert output.exception.verdict.stage == "tool_call"


@WAYS
@TOOLS
async def test_an_unsafe_result_is_not_shown(make: MakeTool, way: Way, world: World) -> None:
    """Neither its text nor the object that the text was made of."""
    world.results["hi"] = "pure EVIL"
    output = await way(guard_tool(make(world), EVIL), "hi")
    assert world.ran == ["hi"]
    assert (output.content, output.is_error, output.raw_output) == (WITHHELD, True, None)
    assert isinstance(output.exception, Blocked)
    assert output.exception.verdict.stage == "tool_result"
    assert "EVIL" not in repr(output)


@WAYS
@TOOLS
async def test_a_safe_call_gives_the_same_as_the_bare_tool(make: MakeTool, way: Way, world: World) -> None:
    """Result, raw output and all."""
    bare, guarded = await way(make(world), "hi"), await way(guard_tool(make(world), EVIL), "hi")
    assert (guarded.content, guarded.raw_input, guarded.is_error) == (bare.content, bare.raw_input, False)
    assert str(guarded.raw_output) == str(bare.raw_output) == "Did hi."
    assert world.ran == ["hi", "hi"]


@AGENTS
@AGENT_TOOLS
async def test_an_agent_goes_on_after_a_blocked_call(make: MakeTool, agent: Agent, world: World) -> None:
    """The tool did not run, the model was told, and its next call ran."""
    tool = make(world)
    model = Model([("act", {argument(tool): "EVIL"})], [("act", {argument(tool): "hi"})])
    outputs = await agent(guard_tool(tool, EVIL), model)
    assert world.ran == ["hi"]
    assert [output.content for output in outputs] == [REFUSED, "Did hi."]
    assert REFUSED in model.read[1]
    assert "EVIL" not in "".join(model.read)


@AGENTS
@AGENT_TOOLS
async def test_an_agent_does_not_read_an_unsafe_result(make: MakeTool, agent: Agent, world: World) -> None:
    """It reads in its place that the result was withheld, and goes on."""
    world.results["hi"] = "pure EVIL"
    tool = make(world)
    model = Model([("act", {argument(tool): "hi"})])
    outputs = await agent(guard_tool(tool, EVIL), model)
    assert world.ran == ["hi"]
    assert [output.content for output in outputs] == [WITHHELD]
    assert WITHHELD in model.read[1]
    assert "EVIL" not in "".join(model.read)


@AGENTS
@AGENT_TOOLS
async def test_an_agent_with_safe_calls_does_as_without_a_guard(make: MakeTool, agent: Agent, world: World) -> None:
    """The same results, read in the same words."""
    tool = make(world)
    turns = [[("act", {argument(tool): "hi"})], [("act", {argument(tool): "ho"})]]
    bare, guarded = Model(*turns), Model(*turns)
    before = [output.content for output in await agent(tool, bare)]
    assert before == [output.content for output in await agent(guard_tool(tool, EVIL), guarded)]
    assert bare.read == guarded.read
    assert world.ran == ["hi", "ho"] * 2


@AGENTS
async def test_each_call_and_each_result_is_judged_once(agent: Agent, world: World) -> None:
    """Call before result, in the light of what was said before."""
    backend = Watching()
    await agent(guard_tool(function_tool(world), backend), Model([("act", {"text": "hi"})], [("act", {"text": "ho"})]))
    assert backend.stages == ["tool_call", "tool_result"] * 2
    last = backend.asked[-1]
    assert [turn.role for turn in last.turns] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [turn.name for turn in last.turns if turn.role == "tool"] == ["act", "act"]
    assert [call.arguments for turn in last.turns for call in turn.tool_calls] == [{"text": "hi"}, {"text": "ho"}]


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a guard that is blind": lambda patch: patch.setattr(EVIL, "_words", {}),
    "a guard that is not asked": lambda patch: patch.setattr(module, "_guarded", lambda tool, _: tool),
    "results that are not withheld": lambda patch: patch.setattr(module, "withholds", lambda _: False),
}


@pytest.mark.parametrize("broken", BREAKS)
@AGENTS
async def test_these_tests_see_a_broken_guard(
    broken: str, agent: Agent, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above look for is there as soon as a guard does not work."""
    BREAKS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        await test_an_agent_does_not_read_an_unsafe_result(function_tool, agent, world)


@pytest.mark.parametrize(
    ("policy", "text", "rule"),
    [
        (rules(block=["act"]), "hi", "tool:act"),
        (rules(allow=["other"]), "hi", "tool:unlisted"),
        (rules(arguments={"act": {"text": {"pattern": "[a-z]+"}}}), "RM -rf", "argument:act.text:pattern"),
    ],
)
@WAYS
async def test_tool_rules_hold_whatever_the_backend_says(
    policy: Policy, text: str, rule: str, way: Way, world: World
) -> None:
    """Even where none is there, and where it may fail."""
    guard = Guard(ScriptedBackend([]), policy=policy.model_copy(update={"on_error": "allow"}))
    output = await way(guard_tool(function_tool(world), guard), text)
    assert world.ran == []
    assert rule in output.content


async def test_a_budget_counts_the_calls_of_an_agent(world: World) -> None:
    """Those of earlier turns, and those that the model makes at once; the first ones run."""
    tool = guard_tool(function_tool(world), Guard(EVIL, policy=rules(budgets=[{"tools": ["act"], "calls": 3}])))
    two = [("act", {"text": "a"}), ("act", {"text": "b"})]
    outputs = await by_functions(tool, Model(two, two))
    assert sorted(world.ran) == ["a", "a", "b"]
    assert [output.is_error for output in outputs].count(True) == 1


@AGENTS
async def test_a_flow_holds_after_an_injection_was_read(agent: Agent, world: World) -> None:
    """What a tool gave earlier decides on a later call, by the name of that tool."""
    scores = {"page": Scores(0.1, injection=0.4)}

    class Suspicious(KeywordBackend):
        def _scores(self, trial: str) -> Scores:
            return scores["page"] if "see page" in trial else Scores(0.0)

    world.results["read"] = "see page"
    turns = [[("act", {"text": "read"})], [("act", {"text": "send"})]]
    flow = {"tools": ["act"], "injection": 0.3, "action": "block"}
    for trusted, ran in ([], ["read"]), (["act"], ["read", "send"]):
        world.ran.clear()
        policy = rules(flows=[flow | {"trusted": trusted}])
        await agent(guard_tool(function_tool(world), Guard(Suspicious({}), policy=policy)), Model(*turns))
        assert world.ran == ran


REVIEW = rules(review=["act"])


@AGENT_TOOLS
@pytest.mark.parametrize("kind", ["function", "react", "workflow"])
@pytest.mark.parametrize(
    ("answer", "ran", "told"),
    [
        ({"response": "approve"}, ["hi"], "Did hi."),
        ({"response": "edit", "tool_kwargs": "new"}, ["ho"], "Did ho."),
        ({"response": "reject"}, [], "This call was rejected by a person and did not run (tool:act)."),
        ({"response": True}, [], "This call was rejected by a person and did not run (tool:act)."),
        ({}, [], "This call was rejected by a person and did not run (tool:act)."),
    ],
)
async def test_a_person_decides_on_a_call_for_review(  # noqa: PLR0917 - pytest gives them by name
    make: MakeTool, kind: str, answer: dict[str, Any], ran: list[str], told: str, world: World
) -> None:
    """Approve, edit or reject, in every kind of agent; only what is clearly a yes is one."""
    tool = make(world)
    if "tool_kwargs" in answer:
        answer = answer | {"tool_kwargs": {argument(tool): "ho"}}
    backend, model = Watching(), Model([("act", {argument(tool): "hi"})])
    guarded = guard_tool(tool, Guard(backend, policy=REVIEW))
    agent: BaseWorkflowAgent = (
        ReActAgent(name="one", tools=[guarded], llm=model.reasoning(), streaming=False)
        if kind == "react"
        else FunctionAgent(name="one", tools=[guarded], llm=model.functions(), streaming=False)
    )
    outputs = await run(AgentWorkflow(agents=[agent]) if kind == "workflow" else agent, answer)
    assert world.ran == ran
    assert [output.content for output in outputs] == [told]
    assert told in model.read[1]
    edited = ["tool_call"] if answer.get("response") == "edit" else []
    assert backend.stages == ["tool_call", *edited, *["tool_result"] * len(ran)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("in_workflow", [False, True])
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
async def test_a_guarded_llm_leaves_a_review_to_its_tools(
    streaming: bool, in_workflow: bool, on_block: Any, world: World
) -> None:
    """The person is asked, and what was approved is no offence when the model reads it again."""
    guard = Guard(EVIL, policy=REVIEW)
    model = guard_llm(Model([("act", {"text": "hi"})], [("act", {"text": "ho"})]).functions(), guard, on_block=on_block)
    tools = guard_tools([function_tool(world)], guard)
    agent: Any = FunctionAgent(name="one", description="One.", tools=tools, llm=model, streaming=streaming)
    if in_workflow:
        agent = AgentWorkflow(agents=[agent], root_agent="one")
    await run(agent, {"response": "approve"}, {"response": "approve"})
    assert world.ran == ["hi", "ho"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("guarded", ["no tool", "by another", "one of two", "one of the same name"])
async def test_a_guarded_llm_withholds_a_review_that_no_tool_sees_to(
    streaming: bool, guarded: str, world: World
) -> None:
    """A tool that judges otherwise, or not at all, would just run."""
    guard = Guard(EVIL, policy=REVIEW)
    tool, other = function_tool(world), FunctionTool.from_defaults(world.do, name="other")
    tools = {
        "no tool": [tool, other],
        "by another": guard_tools([tool, other], Guard(EVIL)),
        "one of two": [guard_tool(tool, guard), other],
        "one of the same name": [*guard_tools([tool, other], guard), tool],
    }[guarded]
    model = guard_llm(Model([("act", {"text": "hi"}), ("other", {"text": "hi"})]).functions(), guard)
    with pytest.raises(Blocked):
        await run(FunctionAgent(tools=tools, llm=model, streaming=streaming))
    assert world.ran == []


async def test_an_edit_is_judged_too(world: World) -> None:
    """What a person writes may break a rule as well."""
    guarded = guard_tool(function_tool(world), Guard(EVIL, policy=REVIEW))
    agent = FunctionAgent(tools=[guarded], llm=Model([("act", {"text": "hi"})]).functions())
    (output,) = await run(agent, {"response": "edit", "tool_kwargs": {"text": "EVIL"}})
    assert world.ran == []
    assert "was blocked by a policy" in output.content


async def test_calls_at_once_are_reviewed_each_by_itself(world: World) -> None:
    """Alike or not: each gets its own answer, and what needs none does not wait."""
    policy = rules(arguments={"act": {"text": {"pattern": "safe", "action": "review"}}})
    guarded = guard_tool(function_tool(world), Guard(EVIL, policy=policy))
    calls = [("act", {"text": text}) for text in ("risky", "safe", "risky", "EVIL")]
    agent = FunctionAgent(tools=[guarded], llm=Model(calls).functions(), streaming=False)
    outputs = await run(agent, {"response": "approve"}, {"response": "reject"})
    assert world.ran == ["safe", "risky"]
    assert sorted(output.is_error for output in outputs) == [False, False, True, True]


async def test_a_review_says_what_it_is_about_and_is_answered_by_its_key(world: World) -> None:
    """An answer with another key is for somebody else."""
    guarded = guard_tool(function_tool(world), Guard(EVIL, policy=REVIEW))
    handler = FunctionAgent(tools=[guarded], llm=Model([("act", {"text": "hi"})]).functions()).run("Do it.")
    asked = []
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            asked.append(event)
            handler.ctx.send_event(HumanResponseEvent(review="another", response="approve"))  # type: ignore[call-arg]
            handler.ctx.send_event(HumanResponseEvent(response="approve"))  # type: ignore[call-arg]
            handler.ctx.send_event(HumanResponseEvent(review=event.review, response="reject"))  # type: ignore[call-arg]
    await handler
    assert world.ran == []
    (event,) = asked
    assert (event.tool_name, event.tool_kwargs, event.reason) == ("act", {"text": "hi"}, "tool:act")


async def test_a_review_outlives_the_process(world: World) -> None:
    """A run that was saved while it waited goes on elsewhere, and the call is not judged again."""
    backend = Watching()
    workflow = own_workflow(guard_tool(function_tool(world), Guard(backend, policy=REVIEW)))
    handler = workflow.run()
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            break
    # An agent's memory cannot be saved with every version of pydantic; the verdict stands beside it.
    saved = json.loads(json.dumps(handler.ctx.to_dict(serializer=JsonSerializer())))
    await handler.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await handler
    restored = workflow.run(ctx=Context.from_dict(workflow, saved, serializer=JsonSerializer()))
    restored.ctx.send_event(HumanResponseEvent(review=event.review, response="approve"))  # type: ignore[call-arg]
    assert await restored == "Did hi."
    assert world.ran == ["hi"]
    assert backend.stages == ["tool_call", "tool_result"]


def own_workflow(tool: Any, context: Any = Context) -> Workflow:
    """A workflow that is no agent, with one step that calls the tool."""

    async def act(self: Any, ctx: Any, ev: Any) -> Any:
        return StopEvent(result=(await tool.acall(text="hi")).content)

    act.__annotations__ = {"ctx": context, "ev": StartEvent, "return": StopEvent}
    act.__qualname__ = "Own.act"
    return type("Own", (Workflow,), {"act": step(act)})()  # type: ignore[no-any-return]


@WAYS
async def test_without_anybody_to_ask_a_review_withholds(way: Way, world: World) -> None:
    """Outside of workflows there is nobody."""
    output = await way(guard_tool(function_tool(world), Guard(EVIL, policy=REVIEW)), "hi")
    assert world.ran == []
    assert "needs the consent of a person" in output.content


async def test_a_person_who_does_not_answer_in_time_is_a_no(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex gives a person half an hour."""

    async def too_late(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(Context, "wait_for_event", too_late)
    guarded = guard_tool(function_tool(world), Guard(EVIL, policy=REVIEW))
    (output,) = await by_functions(guarded, Model([("act", {"text": "hi"})]))
    assert world.ran == []
    assert "needs the consent of a person" in output.content


async def test_a_result_for_review_is_withheld(world: World) -> None:
    """To ask, the step would begin again, and the tool would run twice."""
    policy = Policy.model_validate({"stages": {"tool_result": {"threshold": {"review": 0.5}}}})
    world.results["hi"] = "pure EVIL"
    (output,) = await by_functions(
        guard_tool(function_tool(world), Guard(EVIL, policy=policy)), Model([("act", {"text": "hi"})])
    )
    assert (world.ran, output.content) == (["hi"], WITHHELD)


async def test_a_tool_that_itself_waits_is_judged_once(world: World) -> None:
    """Its step begins again when a person has answered; the verdict stands."""
    backend = Watching()

    async def act(ctx: Any, text: str) -> Any:
        """Act on the world, if a person gives the word."""
        question = InputRequiredEvent(prefix="The word?", review="word")  # type: ignore[call-arg]
        answer = await ctx.wait_for_event(HumanResponseEvent, question, "word", {"review": "word"})
        return world.do(answer.word)

    act.__annotations__ = {"ctx": Context, "text": str}
    for policy, answers in (Policy(), ()), (REVIEW, ({"response": "approve"},)):
        backend.asked.clear()
        guarded = guard_tool(FunctionTool.from_defaults(async_fn=act), Guard(backend, policy=policy))
        agent = FunctionAgent(tools=[guarded], llm=Model([("act", {"text": "hi"})]).functions())
        (output,) = await run(agent, *answers, {"word": "please"})
        assert output.content == "Did please."
        assert backend.stages == ["tool_call", "tool_result"]


@pytest.mark.parametrize("typed", [False, True])
async def test_a_review_works_in_a_workflow_of_ones_own(typed: bool, world: World) -> None:
    """Where a step calls the tool itself; a typed state has no place for the verdict, which is then given again."""

    class State(BaseModel):
        number: int = 0

    backend = Watching()
    guarded = guard_tool(function_tool(world), Guard(backend, policy=REVIEW))

    handler = own_workflow(guarded, Context[State] if typed else Context).run()
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            handler.ctx.send_event(HumanResponseEvent(review=event.review, response="approve"))  # type: ignore[call-arg]
    assert await handler == "Did hi."
    assert backend.stages == ["tool_call", *["tool_call"] * typed, "tool_result"]


@WAYS
@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("bug")])
async def test_a_failing_backend_is_for_the_policy_to_decide(way: Way, failure: Exception, world: World) -> None:
    """By default the call does not run, and the failure's own words stay out of the model's sight."""
    output = await way(guard_tool(function_tool(world), ScriptedBackend([failure])), "hi")
    assert (world.ran, output.content) == ([], "This call was blocked by a policy and did not run.")
    output = await way(guard_tool(function_tool(world), ScriptedBackend([0.0, failure])), "hi")
    assert (world.ran, output.content) == (["hi"], "The tool ran, but its result was withheld by a policy.")
    open_ = Guard(ScriptedBackend([failure, failure]), policy=Policy(on_error="allow"))
    assert (await way(guard_tool(function_tool(world), open_), "hi")).content == "Did hi."


@WAYS
async def test_what_a_tool_raises_is_judged_before_a_model_reads_it(way: Way, world: World) -> None:
    """It is raised again as it was, or withheld."""
    world.results |= {"fail": ValueError("no such thing"), "hi": ValueError("EVIL")}
    tool = guard_tool(function_tool(world), EVIL)
    if way in (by_calling, by_acalling):
        assert (await way(tool, "fail")).content == "Encountered error: no such thing"
    else:
        with pytest.raises(ValueError, match="no such thing"):
            await way(tool, "fail")
    output = await way(tool, "hi")
    assert (output.content, output.is_error) == (WITHHELD, True)


@WAYS
async def test_what_the_failure_of_a_tool_came_of_is_judged_too(way: Way, world: World) -> None:
    """Whoever prints it sees that."""
    failure = ValueError("no such thing")
    failure.__cause__ = RuntimeError("EVIL")
    world.results["hi"] = failure
    assert (await way(guard_tool(function_tool(world), EVIL), "hi")).content == WITHHELD


async def test_an_agent_goes_on_after_a_tool_has_failed(world: World) -> None:
    """As without a guard."""
    world.results["hi"] = ValueError("no such thing")
    (output,) = await by_functions(guard_tool(function_tool(world), EVIL), Model([("act", {"text": "hi"})]))
    assert (output.content, output.is_error) == ("no such thing", True)


class Hanging(KeywordBackend):
    """Never answers."""

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        await asyncio.Event().wait()
        return []


async def test_a_caller_who_gives_up_on_a_backend_leaves_no_task(world: World) -> None:
    """Nor a thread, and the tool did not run."""
    threads = threading.active_count()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guard_tool(async_tool(world), Hanging({})).acall(text="hi"), 0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert threading.active_count() == threads
    assert world.ran == []


async def test_a_run_that_is_cancelled_while_a_call_is_judged_runs_nothing(world: World) -> None:
    """And leaves no task."""
    agent = FunctionAgent(
        tools=[guard_tool(async_tool(world), Hanging({}))],
        llm=Model([("act", {"text": "hi"})]).functions(),
        streaming=False,
    )
    handler = agent.run("Do it.")
    async for event in handler.stream_events():
        if isinstance(event, ToolCall):
            break
    await handler.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await handler
    for _ in range(20):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert world.ran == []


async def test_async_the_event_loop_goes_on_while_a_call_is_judged(world: World) -> None:
    """Another task counts its turns, without which there would be no verdict."""
    turns = 0

    class Elsewhere(KeywordBackend):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            before = turns
            while turns < before + 100:  # noqa: ASYNC110 - the turns are the point
                await asyncio.sleep(0)
            return self.classify(conversations)

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    output = await asyncio.wait_for(guard_tool(function_tool(world), Elsewhere({})).acall(text="hi"), 30)
    counting.cancel()
    assert output.content == "Did hi."


def test_the_embedded_model_is_loaded_off_the_event_loop_and_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first call, not when the tool is made."""
    made: list[int] = []

    def make() -> Guard:
        made.append(threading.get_ident())
        return Guard(EVIL)

    monkeypatch.setattr(verdicts_module, "_loaded", functools.cache(make))
    tools = guard_tools([async_tool(world), async_tool(world)])
    assert made == []

    async def call() -> None:
        await asyncio.gather(*(tool.acall(text="hi") for tool in tools * 2))

    asyncio.run(call())
    assert len(made) == 1
    assert made[0] != threading.get_ident()


@AGENT_TOOLS
def test_a_guarded_tool_is_the_tool_it_was(make: MakeTool, world: World) -> None:
    """Of its class, with its metadata, signature and all."""
    tool = make(world)
    guarded = guard_tool(tool, EVIL)
    assert isinstance(guarded, type(tool))
    assert guarded.metadata is tool.metadata
    assert guarded.metadata.to_openai_tool() == tool.metadata.to_openai_tool()
    assert {name: value for name, value in vars(guarded).items() if name not in ("_inner", "_judge")} == vars(tool)


async def test_return_direct_ends_a_run_unless_the_call_is_blocked(world: World) -> None:
    """A refusal is no answer."""
    guarded = guard_tool(function_tool(world, return_direct=True), EVIL)
    model = Model([("act", {"text": "EVIL"})], [("act", {"text": "hi"})], [("act", {"text": "never"})])
    result = await FunctionAgent(tools=[guarded], llm=model.functions(), streaming=False).run("Do it.")
    assert str(result) == "Did hi."
    assert world.ran == ["hi"]


def test_guards_can_be_put_around_each_other(world: World) -> None:
    """Both judge."""
    tool = guard_tool(guard_tool(function_tool(world), EVIL), KeywordBackend({"BAD": 0.99}))
    assert [tool.call(text=text).is_error for text in ("EVIL", "BAD", "hi")] == [True, True, False]
    assert world.ran == ["hi"]


def test_functions_become_tools(world: World) -> None:
    """As agents make them."""

    def act(text: str) -> str:
        """Act on the world."""
        return str(world.do(text))

    (tool,) = guard_tools([act], EVIL)
    assert tool.metadata == FunctionTool.from_defaults(act).metadata or tool.metadata.name == "act"
    assert tool.call(text="EVIL").is_error


def test_a_tool_without_async_becomes_one_with(world: World) -> None:
    """As agents make it."""

    class Old(BaseTool):
        metadata = ToolMetadata(description="Act on the world.", name="act")  # type: ignore[assignment]

        def __call__(self, input: Any) -> ToolOutput:  # noqa: A002
            return ToolOutput(tool_name="act", content=str(world.do(input)), raw_input={})

    tool = guard_tool(Old(), EVIL)
    assert asyncio.run(tool.acall(input="hi")).content == "Did hi."
    assert asyncio.run(tool.acall(input="EVIL")).is_error


def test_what_the_developer_fixed_is_not_the_models(world: World) -> None:
    """Partial parameters are given to the tool, and neither judged nor sent to a backend."""

    def act(text: str, secret: str) -> str:
        """Act on the world."""
        return str(world.do(text))

    backend = Watching()
    tool = guard_tool(FunctionTool.from_defaults(act, partial_params={"secret": "EVIL"}), backend)
    assert tool.call(text="hi").content == tool(text="hi").content == "Did hi."
    assert backend.asked[0].last.tool_calls[0].arguments == {"text": "hi"}


@pytest.mark.parametrize("value", [object(), {1: object()}, "cycle"])
def test_arguments_that_cannot_be_read_are_partial(value: Any, world: World) -> None:
    """Such a call does not run by default; where the policy lets it, rules hold all the same."""
    if value == "cycle":
        value = []
        value.append(value)
    policy = Policy(on_partial="allow", on_error="allow")
    ran = []

    def act(text: Any) -> str:
        """Act."""
        ran.append(1)
        return "Done."

    tool = FunctionTool.from_defaults(act)
    assert guard_tool(tool, EVIL).call(text=value).is_error
    blocked = policy.model_copy(update={"tools": rules(block=["act"]).tools})
    assert guard_tool(tool, Guard(EVIL, policy=Policy.model_validate(blocked.model_dump()))).call(text=value).is_error
    assert ran == []
    assert guard_tool(tool, Guard(EVIL, policy=policy)).call(text=value).content == "Done."


def test_an_image_among_results_makes_a_verdict_partial(world: World) -> None:
    """Nothing judges it."""
    world.results["hi"] = ImageBlock(image=b"aGk=")
    assert guard_tool(function_tool(world), EVIL).call(text="hi").is_error


def test_what_is_flagged_passes_and_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, without the text."""
    guard = Guard(EVIL, policy=Policy(threshold={"flag": 0.5}))
    assert guard_tool(function_tool(world), guard).call(text="EVIL").content == "Did EVIL."
    assert [record.message for record in caplog.records] == [
        "flag at tool_call: unsafe 0.99 (threshold 0.5)",
        "flag at tool_result: unsafe 0.99 (threshold 0.5)",
    ]


def test_wrong_options_are_named(world: World) -> None:
    """When the tool is made."""
    with pytest.raises(TypeError, match=r"give a list of tools, not one function: guard_tool\(\)"):
        guard_tools(rules)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a tool or a function, not str"):
        guard_tool("act", EVIL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a Guard"):
        guard_tool(function_tool(world), 1)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="unknown backend 'nonesuch'"):
        guard_tools([function_tool(world)], "nonesuch")
