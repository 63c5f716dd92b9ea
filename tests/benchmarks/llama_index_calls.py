"""What a guard adds to calls of LlamaIndex, in µs: ``guard_llm`` and the callback handler, the backend instant."""

from __future__ import annotations

import asyncio
import warnings
from statistics import median
from time import perf_counter_ns, process_time_ns
from typing import TYPE_CHECKING, Any

from llama_index.callbacks.guardmw import GuardCallbackHandler, guard_llm
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.llms import MockLLM

from guardmw import Guard, Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS = 1_000


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


class Empty(BaseCallbackHandler):
    """A handler that counts its events: what LlamaIndex itself asks for telling one."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.events = 0

    def on_event_start(self, event_type: Any, payload: Any = None, event_id: str = "", *_: Any, **__: Any) -> str:
        """An event."""
        self.events += 1
        return event_id

    def on_event_end(self, event_type: Any, payload: Any = None, event_id: str = "", **_: Any) -> None:
        """An event."""
        self.events += 1

    def start_trace(self, trace_id: str | None = None) -> None:
        """Nothing."""

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None:
        """Nothing."""


def chat(length: int, earlier: int, last: int) -> list[ChatMessage]:
    """So many messages, told from those of other chats by two numbers."""
    roles = ("user", "assistant")
    said = [(roles[(length - 1 - at) % 2], f"This is message {at} of chat {earlier}.") for at in range(length - 1)]
    question = f"How is bread made, for the {last}th time?"
    return [ChatMessage(role=role, content=text) for role, text in (*said, ("user", question))]


def compared(steps: dict[str, Callable[[list[ChatMessage]], object]], length: int, new: int) -> dict[str, float]:
    """Medians in µs, wall time and (as "… cpu") the process's own, taken in turns: all see the same machine."""
    times: dict[str, list[int]] = {f"{name}{kind}": [] for name in steps for kind in ("", " cpu")}
    for at in range(ROUNDS + 20):
        for name, step in steps.items():
            messages = chat(length, at if new > 1 else 0, at if new else 0)
            began, own = perf_counter_ns(), process_time_ns()
            step(messages)
            times[f"{name} cpu"].append(process_time_ns() - own)
            times[name].append(perf_counter_ns() - began)
    return {name: median(each[20:]) / 1000 for name, each in times.items()}


def told(cost: dict[str, float], name: str, bare: str, count: int = 1) -> str:
    """What it adds, each time."""
    wall, own = ((cost[f"{name}{kind}"] - cost[f"{bare}{kind}"]) / count for kind in ("", " cpu"))
    return f"{name} {cost[name]:.0f} (+{wall:.1f} each, cpu +{own:.1f})"


def main() -> None:
    """Print a line for each kind of call."""
    warnings.simplefilter("ignore")
    guard = Guard(Instant())
    bare = MockLLM()
    guarded = guard_llm(MockLLM(), guard)
    counting = Empty()
    empty = MockLLM(callback_manager=CallbackManager([counting]))
    handled = MockLLM(callback_manager=CallbackManager([GuardCallbackHandler(guard)]))
    llms: dict[str, Any] = {"bare": bare, "guard_llm": guarded, "empty handler": empty, "our handler": handled}
    loop = asyncio.new_event_loop()
    ways: dict[str, dict[str, Any]] = {
        "chat": {name: llm.chat for name, llm in llms.items()},
        "achat": {name: lambda given, llm=llm: loop.run_until_complete(llm.achat(given)) for name, llm in llms.items()},
    }
    for way, steps in ways.items():
        # MockLLM completes what it is asked in chat, and tells of both: each is judged.
        counting.events = 0
        steps["empty handler"](chat(1, 0, 0))
        events = counting.events
        for length, new in ((1, 0), (1, 1), (10, 0), (10, 1), (10, 10)):
            cost = compared(steps, length, new)
            shown = (
                f"bare {cost['bare']:.0f}",
                told(cost, "guard_llm", "bare"),
                told(cost, "empty handler", "bare", events),
                told(cost, "our handler", "empty handler", events),
            )
            print(f"{way}, {length} messages, {new} new, {events} events, µs a call: {', '.join(shown)}", flush=True)
    loop.close()


if __name__ == "__main__":
    main()
