"""How late an event loop is while LlamaIndex's async calls are judged by the embedded model, in ms."""

from __future__ import annotations

import asyncio
import warnings
from statistics import median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any

from llama_index.callbacks.guardmw import GuardCallbackHandler, guard_llm, guard_query_engine
from llama_index.core import Document, MockEmbedding, Settings, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM

from guardmw import Guard

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROUNDS = 7
WORDS = 2_000
TICK = 0.001  # s between two looks at the clock


def answer(*_: Any, **__: Any) -> ChatMessage:
    """What the model says."""
    return ChatMessage(role="assistant", content="It rises. It is baked. It is eaten.")


async def lags(work: Callable[[], Awaitable[object]]) -> tuple[float, list[float]]:
    """How long this takes, in ms, and by how much each tick of the loop meanwhile was late."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            began = perf_counter()
            await asyncio.sleep(TICK)
            late.append((perf_counter() - began - TICK) * 1000)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(5 * TICK)
    late.clear()
    began = perf_counter()
    await work()
    took = (perf_counter() - began) * 1000
    # Where the loop stood still to the end, its tick is still to come.
    await asyncio.sleep(2 * TICK)
    ticking.cancel()
    return took, late


def question(at: int) -> str:
    """A text of 2,000 words, never the same."""
    return f"How is bread number {at} made? " + "Flour and water rest until the dough has risen enough to bake. " * (
        WORDS // 11
    )


def ways(guard: Guard) -> dict[str, Callable[[str], Awaitable[object]]]:
    """Each kind of call, guarded, without a guard, and with the callback handler alone."""
    Settings.embed_model = MockEmbedding(embed_dim=4)
    Settings.llm = MockLLM()
    index = VectorStoreIndex.from_documents([Document(text="Bread rises.")])
    bare = MockFunctionCallingLLM(response_generator=answer)
    guarded = guard_llm(bare, guard)
    handled = MockFunctionCallingLLM(
        response_generator=answer, callback_manager=CallbackManager([GuardCallbackHandler(guard)])
    )
    engine = index.as_query_engine(llm=MockLLM())

    def chat(llm: Any) -> Callable[[str], Awaitable[object]]:
        return lambda text: llm.achat([ChatMessage(content=text)])

    def stream(llm: Any) -> Callable[[str], Awaitable[object]]:
        async def read(text: str) -> None:
            async for _ in await llm.astream_chat([ChatMessage(content=text)]):
                pass

        return read

    async def agent(text: str, llm: Any) -> object:
        return await FunctionAgent(tools=[print], llm=llm).run(text)

    return {
        "nothing, for a second": lambda _: asyncio.sleep(1),
        "achat, no guard": chat(bare),
        "achat, guarded": chat(guarded),
        "astream_chat, no guard": stream(bare),
        "astream_chat, guarded": stream(guarded),
        "aquery, no guard": engine.aquery,
        "aquery, guarded": guard_query_engine(engine, guard).aquery,
        "FunctionAgent, no guard": lambda text: agent(text, bare),
        "FunctionAgent, guarded": lambda text: agent(text, guarded),
        "achat, callback handler": chat(handled),
    }


async def main() -> None:
    """Print a line for each kind of call."""
    warnings.simplefilter("ignore")
    guard = Guard()
    one = perf_counter()
    guard.screen(question(0))
    print(f"one classification of {WORDS} words: {(perf_counter() - one) * 1000:.0f} ms")
    asked = 0
    for name, way in ways(guard).items():
        took: list[float] = []
        late: list[float] = []
        worst: list[float] = []
        for at in range(ROUNDS + 1):
            asked += 1
            text = question(asked)
            spent, lag = await lags(lambda way=way, text=text: way(text))  # type: ignore[misc]
            if at:
                took.append(spent)
                late += lag
                worst.append(max(lag, default=0.0))
        ticks = f"{median(late):.2f} ms (median), {quantiles(late, n=100)[-1]:.1f} (p99)"
        latest = f"{median(worst):.1f} (median of {ROUNDS} calls), {max(worst):.1f} (of all)"
        print(f"{name}: call {median(took):.0f} ms; a tick is late by {ticks}; the latest by {latest}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
