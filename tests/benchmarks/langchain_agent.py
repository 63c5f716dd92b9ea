"""What both middlewares add to a turn of an agent, without a tool call and with one, and what an empty pair adds."""

from __future__ import annotations

import asyncio
from random import Random
from statistics import median, quantiles
from time import perf_counter_ns, process_time_ns
from typing import TYPE_CHECKING, Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models import BaseChatModel, FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langchain_guardmw import GuardMiddleware, ToolGuardMiddleware

from guardmw import Guard, Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from langchain_core.runnables import Runnable

ROUNDS = 300


class Instant:
    """A backend that costs nothing."""

    name = "instant"
    scores = Scores(0.0)

    def classify(self, conversations: Sequence[object]) -> list[Scores]:
        """All is well."""
        return [self.scores] * len(conversations)

    async def aclassify(self, conversations: Sequence[object]) -> list[Scores]:
        """All is well."""
        return [self.scores] * len(conversations)


class Model(AgentMiddleware[Any, Any, Any]):
    """GuardMiddleware's hooks, with nothing in them."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        """Nothing."""
        return handler(request)

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        """Nothing."""
        return await handler(request)


class Tool(Model):
    """ToolGuardMiddleware's hooks, with nothing in them."""

    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Nothing."""
        return handler(request)

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Nothing."""
        return await handler(request)


class Node(Model):
    """The same as Model, and a hook that is a node of the graph, which GuardMiddleware has for reviews only."""

    def before_model(self, state: Any, runtime: Any) -> None:
        """Nothing."""

    async def abefore_model(self, state: Any, runtime: Any) -> None:
        """Nothing."""


class Scripted(FakeMessagesListChatModel):
    """Calls a tool, then answers."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        return self.bind()


class Answering(BaseChatModel):
    """Answers at once, and calls no tool; it could stream, and nobody asks it to."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As providers do."""
        return self.bind()

    @property
    def _llm_type(self) -> str:
        return "answering"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("Mix flour and water."))])

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(messages)

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=AIMessageChunk(content="Mix flour and water."))


@tool
def note(text: str) -> str:
    """Note something."""
    return f"Noted: {text}"


def agent_of(*middleware: Any) -> Any:
    """An agent whose every run makes two model calls and a tool call."""
    calls: Any = [{"name": "note", "args": {"text": "Bread is flour, water and salt."}, "id": "1"}]
    answers: list[BaseMessage] = [AIMessage("", tool_calls=calls), AIMessage("It has been noted.")]
    return create_agent(Scripted(responses=answers), [note], middleware=middleware)


def answering(*middleware: Any) -> Any:
    """An agent whose runs are one model call each."""
    return create_agent(Answering(), [note], middleware=middleware)


def history(length: int) -> list[BaseMessage]:
    """So many messages, the last of them new in every run."""
    kinds: list[type[Any]] = [HumanMessage, AIMessage]
    return [kinds[(length - 1 - at) % 2](f"This is message number {at} of a conversation.") for at in range(length)]


def compared(steps: Mapping[str, Callable[[list[BaseMessage]], object]], length: int) -> dict[str, tuple[float, float]]:
    """Times in µs, taken in turns, so that all see the same machine, and in changing order.

    Wall time is the median; processor time that of the quickest twentieth, which neighbours disturb least.
    """
    times: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    earlier = history(length)
    order, by_chance = list(steps.items()), Random(0)  # noqa: S311 - no secret
    for at in range(ROUNDS + 20):
        by_chance.shuffle(order)
        for name, step in order:
            messages = [*earlier[:-1], HumanMessage(f"Note this, please, for the {at}th time.")]
            began, own = perf_counter_ns(), process_time_ns()
            step(messages)
            times[name].append((perf_counter_ns() - began, process_time_ns() - own))
    return {
        name: (median(wall for wall, _ in each[20:]) / 1000, quantiles((own for _, own in each[20:]), n=20)[0] / 1000)
        for name, each in times.items()
    }


def report(kind: str, make: Callable[..., Any], lengths: Sequence[int]) -> None:
    """Print a line for each way of running and each length of the conversation."""
    guard = Guard(Instant())
    agents = {
        "bare": make(),
        "empty pair": make(Tool(), Model()),
        "empty pair with a node": make(Tool(), Node()),
        "tools guarded": make(ToolGuardMiddleware(guard)),
        "model guarded": make(GuardMiddleware(guard)),
        "both": make(ToolGuardMiddleware(guard), GuardMiddleware(guard)),
    }
    loop = asyncio.new_event_loop()
    sync = {name: lambda given, agent=agent: agent.invoke({"messages": given}) for name, agent in agents.items()}
    asynchronous = {
        name: lambda given, agent=agent: loop.run_until_complete(agent.ainvoke({"messages": given}))
        for name, agent in agents.items()
    }
    for way, steps in (("sync", sync), ("async", asynchronous)):
        for length in lengths:
            cost = compared(steps, length)
            bare, empty = cost["bare"], cost["empty pair"]
            added = {name: (wall - bare[0], own - bare[1]) for name, (wall, own) in cost.items() if name != "bare"}
            shown = ", ".join(f"{name} {wall:+.0f} (cpu {own:+.0f})" for name, (wall, own) in added.items())
            ours = [both - none for both, none in zip(cost["both"], empty, strict=True)]
            print(
                f"{kind}, {way}, {length} messages, µs: bare {bare[0]:.0f} (cpu {bare[1]:.0f}), {shown}; "
                f"both beyond the empty pair {ours[0]:+.0f} (cpu {ours[1]:+.0f})",
                flush=True,
            )
    loop.close()


def main() -> None:
    """Both workloads."""
    report("one model call", answering, (1,))
    report("two model calls and a tool call", agent_of, (2, 10, 50))


if __name__ == "__main__":
    main()
