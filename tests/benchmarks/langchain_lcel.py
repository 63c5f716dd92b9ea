"""What ``guard()`` costs in a chain, beside a RunnableLambda that does nothing, and what a guarded stream costs."""

from __future__ import annotations

import asyncio
from random import Random
from statistics import median, quantiles
from time import perf_counter_ns, process_time_ns
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import FakeMessagesListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_guardmw import guard

from guardmw import Guard, Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardmw import Conversation

ROUNDS = 400
STREAMS = 15
TOKENS = 500
QUESTION = {"q": "Hello, how do I bake bread at home?"}
SENTENCE = (
    "The baker mixes flour with water and salt, lets the dough rest for an hour, and bakes it until it is brown. "
)


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


class Witness:
    """The embedded model, and when it gave its first answer."""

    def __init__(self, guard: Guard) -> None:
        self.name = guard.backend.name
        self.answered = 0
        self._inner = guard.backend

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """What it says."""
        scores = self._inner.classify(conversations)
        self.answered = self.answered or perf_counter_ns()
        return scores

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """What it says."""
        return self.classify(conversations)


def compared(steps: Mapping[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Times in µs, taken in turns, so that all see the same machine, and in changing order.

    Wall time is the median; processor time that of the quickest twentieth, which neighbours disturb least.
    """
    times: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    order, by_chance = list(steps.items()), Random(0)  # noqa: S311 - no secret
    for _ in range(ROUNDS + 20):
        by_chance.shuffle(order)
        for name, step in order:
            began, own = perf_counter_ns(), process_time_ns()
            step()
            times[name].append((perf_counter_ns() - began, process_time_ns() - own))
    return {
        name: (median(wall for wall, _ in each[20:]) / 1000, quantiles((own for _, own in each[20:]), n=20)[0] / 1000)
        for name, each in times.items()
    }


def steps() -> None:
    """Print what one more step of a chain adds."""
    prompt = ChatPromptTemplate.from_template("{q}")
    model = FakeMessagesListChatModel(responses=[AIMessage(SENTENCE)])
    chain, judge = prompt | model, guard(Guard(Instant()))
    chains: dict[str, Any] = {
        "prompt | model": chain,
        "| RunnableLambda": chain | RunnableLambda(lambda message: message),
        "| guard()": chain | judge,
        "guard() before and after": prompt | judge | model | judge,
    }
    loop = asyncio.new_event_loop()
    sync = {name: lambda one=one: one.invoke(QUESTION) for name, one in chains.items()}
    asynchronous = {
        name: lambda one=one: loop.run_until_complete(one.ainvoke(QUESTION)) for name, one in chains.items()
    }
    for way, each in (("sync", sync), ("async", asynchronous)):
        cost = compared(each)
        bare = cost.pop("prompt | model")
        added = {name: (wall - bare[0], own - bare[1]) for name, (wall, own) in cost.items()}
        shown = (f"{name} {wall:+.0f} (cpu {own:+.0f})" for name, (wall, own) in added.items())
        ratios = (ours / its for ours, its in zip(added["| guard()"], added["| RunnableLambda"], strict=True))
        print(
            f"{way}, µs: prompt | model {bare[0]:.0f} (cpu {bare[1]:.0f}), {', '.join(shown)}; "
            "a guard step is {:.2f} RunnableLambdas (cpu {:.2f})".format(*ratios),
            flush=True,
        )
    loop.close()


def streams() -> None:
    """Print what a stream of many tokens costs, judged by the embedded model as it comes."""
    words = (SENTENCE * TOKENS).split(" ")[:TOKENS]
    answer = " ".join(words)
    embedded = Guard()
    witness = Witness(embedded)
    tail = guard(Guard(witness), stage="output")
    model = GenericFakeChatModel(messages=iter(lambda: AIMessage(answer), None))
    bare, whole, streamed, first, after = [], [], [], [], []
    for _ in range(STREAMS):
        began = perf_counter_ns()
        list(model.stream("How?"))
        bare.append(perf_counter_ns() - began)
        began = perf_counter_ns()
        embedded.screen({"role": "assistant", "content": answer})
        whole.append(perf_counter_ns() - began)
        witness.answered, began = 0, perf_counter_ns()
        chunks = (model | tail).stream("How?")
        next(chunks)
        first.append(perf_counter_ns() - began)
        after.append(perf_counter_ns() - witness.answered)
        list(chunks)
        streamed.append(perf_counter_ns() - began)
    alone, once, guarded = (median(each) / 1e6 for each in (bare, whole, streamed))
    print(
        f"stream of {TOKENS} tokens, ms: bare {alone:.1f}, guarded {guarded:.1f}; judging it once {once:.1f}, "
        f"so that guarding it costs ×{(guarded - alone) / once:.2f}"
    )
    print(f"first text after {median(first) / 1e6:.1f} ms, {median(after) / 1e6:.2f} ms after the first verdict")


if __name__ == "__main__":
    steps()
    streams()
