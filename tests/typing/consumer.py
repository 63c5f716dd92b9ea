"""What a user's code looks like to a type checker: read by mypy in test_typing.py, never run."""

from collections.abc import Mapping, Sequence
from typing import Literal, assert_type

from langchain_core.runnables import RunnableLambda
from langchain_guardmw import guard
from llama_index.callbacks.guardmw import GuardCallbackHandler, guard_tool, guard_tools
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool

from guardmw import Backend, Conversation, Coverage, Guard, Policy, Scores, ToolCall, Turn, Verdict, enforce, load
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract


class Mine:
    """A backend is any object of this shape."""

    name = "mine"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return [Scores(unsafe=0.97, categories={"violence": 0.9}, backend=self.name) for _ in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return self.classify(conversations)


class Half:
    """Without its other half it is none."""

    name = "half"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return [Scores(0.5) for _ in conversations]


mine: Backend = Mine()
half: Backend = Half()  # type: ignore[assignment]
fakes: list[Backend] = [KeywordBackend({"EVIL": 0.99}), ScriptedBackend([0.5])]
test_contract = backend_contract(Mine)

policy = Policy(threshold=0.5, categories={"violence": {"flag": 0.3}}, on_error="block")
Policy(on_error="explode")  # type: ignore[arg-type]
guard_ = Guard(Mine(), policy=policy)
assert_type(Guard("embedded").backend, Backend)
assert_type(load("embedded"), Backend)

verdict = guard_.screen("Hello")
assert_type(verdict, Verdict)
assert_type(verdict.action, Literal["allow", "flag", "review", "block"])
assert_type(verdict.stage, Literal["input", "output", "tool_call", "tool_result", "document"])
assert_type(verdict.scores, Scores | None)
assert_type(verdict.coverage, Coverage)
assert_type(enforce(verdict), Verdict)
assert_type(guard_.screen_many(["Hello", Turn("user", "Hello")]), list[Verdict])

guard_.screen([{"role": "user", "content": "Hello"}])
guard_.screen([Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": "ls"}),))])
guard_.screen(Conversation.of("Hello"))
guard_.screen(7)  # type: ignore[arg-type]
Turn("usr", "Hello")  # type: ignore[arg-type]
verdict.action = "allow"  # type: ignore[misc]


async def twins() -> None:
    """The async twin of each."""
    assert_type(await guard_.ascreen("Hello"), Verdict)
    assert_type(await guard_.ascreen_many(["Hello"]), list[Verdict])


def thresholds(backend: Backend) -> Mapping[str, float]:
    """What a backend may have besides."""
    return {"input": 0.5} if backend.name else {}


chain = RunnableLambda(str.upper) | guard(Mine())
manager = CallbackManager([GuardCallbackHandler(mine)])


def shell(command: str) -> str:
    """Run a command."""
    return command


own: list[FunctionTool] = [FunctionTool.from_defaults(shell)]
FunctionAgent(tools=guard_tools(own), llm=MockFunctionCallingLLM())
FunctionAgent(tools=[guard_tool(shell), *guard_tools((shell, own[0]))], llm=MockFunctionCallingLLM())
AgentWorkflow.from_tools_or_functions(guard_tools({shell}), llm=MockFunctionCallingLLM())
MockFunctionCallingLLM().chat_with_tools(guard_tools(iter(own)), "Hello")
guard_tools(shell)  # type: ignore[arg-type]
