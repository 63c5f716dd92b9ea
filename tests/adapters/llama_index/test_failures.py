"""What fails around a guarded agent or chat engine never lets out what nobody has judged, and leaves nothing behind."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import _gate, _held, _verdicts, guard_llm, guard_tool
from llama_index.core.base.llms.types import ChatMessage, ChatResponse

from guardmw import BackendError, Blocked, Guard, Policy
from guardmw.testing import KeywordBackend
from tests.adapters.llama_index import test_llm as llms
from tests.adapters.llama_index import test_tools as tools

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw import Conversation, Scores

pytestmark = llms.pytestmark

AGENTS = [name for name in llms.PATHS if "agent" in name or "workflow" in name]
ENGINES = [name for name in llms.PATHS if "context" in name or "condensed" in name]
PATHS = pytest.mark.parametrize("path", [*AGENTS, *ENGINES])
EVIL = KeywordBackend({"EVIL": 0.99})


@dataclass
class Odd(KeywordBackend):
    """Fails in some way, at what this speaker says."""

    failure: Any
    role: str
    name: str = "odd"

    def __post_init__(self) -> None:
        super().__init__({})

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        if self.role in {conversation.last.role for conversation in conversations}:
            if self.failure == "late":
                time.sleep(0.01)
            elif self.failure == "too few":
                return []
            else:
                raise self.failure
        return super().classify(conversations)


class Seen(llms.Watch):
    """What a caller sees, whoever judged it."""

    def content(self, content: str | None) -> None:
        self.out = content or ""
        self.seen.append(self.out)


async def outcome(path: str, source: llms.Source, g: Any) -> tuple[str, llms.Watch]:
    """What came of it, and what was seen of it; without a guard where there is none."""
    watch = Seen("", witness=g)
    fake = llms.Fake.of(source)
    way = llms.PATHS[path if g else path.removeprefix("guarded ")]
    try:
        if (waiting := way(guard_llm(fake, g) if g else fake, watch)) is not None:
            await waiting
    except Blocked:
        return "blocked", watch
    except Exception as error:  # noqa: BLE001 - as without a guard
        return type(error).__name__, watch
    return watch.out, watch


def shows(watch: llms.Watch, word: str) -> bool:
    """Whether this was seen: a plain answer, for pytest would compare a megabyte character by character."""
    return word in repr(watch.seen)


async def nothing_left(threads: set[str]) -> None:
    await llms.settled()
    # An engine's own thread or task may still be on its way out.
    for _ in range(50):
        if asyncio.all_tasks() == {asyncio.current_task()} and llms.own_threads() == threads:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"left: {len(asyncio.all_tasks()) - 1} tasks, {llms.own_threads() - threads}")


@PATHS
@pytest.mark.parametrize(
    ("failure", "role", "action"),
    [
        (BackendError("away"), "user", "block"),
        (RuntimeError("bug"), "assistant", "review"),
        ("too few", "assistant", "flag"),
        ("late", "assistant", "block"),
    ],
    ids=str,
)
async def test_a_failing_backend_is_for_the_policy_to_decide(path: str, failure: Any, role: str, action: Any) -> None:
    """At the question and at the answer; a verdict that only comes late is one."""
    threads = llms.own_threads()
    source = llms.Source(llms.said(path, llms.SAFE))
    came, watch = await outcome(path, source, Guard(Odd(failure, role), policy=Policy(on_error=action)))
    if failure == "late" or action == "flag":
        assert "number 8" in came
    else:
        assert came == "blocked"
        assert "sentence" not in repr(watch.seen)
        assert (source.asked == 0) == (role == "user")
    await nothing_left(threads)


def chunks(*texts: str | None) -> list[ChatResponse]:
    """Chunks that say these texts, one after the other."""
    made, so_far = [], ""
    for text in texts:
        so_far += text or ""
        made.append(ChatResponse(message=ChatMessage(role="assistant", content=so_far), delta=text))
    return made


@dataclass
class Strange(llms.Source):
    """Says these chunks; the last is what it says as a whole."""

    given: list[Any] = field(default_factory=list)

    def chunks(self) -> list[Any]:
        return self.given

    def whole(self) -> ChatResponse:
        return self.given[-1]  # type: ignore[no-any-return]


MEGABYTE = "All is well with bread. " * 41_000
ODD: dict[str, tuple[Any, bool]] = {
    "empty chunks": (lambda path: chunks("", None, llms.said(path, llms.SAFE), "", None), True),
    "nothing": (lambda _: chunks("", None), True),
    "a megabyte": (lambda path: chunks(llms.said(path, MEGABYTE)), True),
    "a megabyte and a word": (lambda path: chunks(llms.said(path, MEGABYTE + "EVIL")), False),
    "an object": (lambda path: [*chunks(llms.said(path, "Fine. ")), object()], False),
    "half a word each": (lambda path: chunks(llms.said(path, "E"), "V", "IL"), False),
}


@PATHS
@pytest.mark.parametrize("kind", ODD)
async def test_a_model_that_says_odd_things_is_judged_like_any(path: str, kind: str) -> None:
    """What passes is as without a guard; what cannot be read, or not all of it, is not shown."""
    made, passes = ODD[kind]
    threads = llms.own_threads()
    bare, _ = await outcome(path, Strange(given=made(path)), None)
    came, watch = await outcome(path, Strange(given=made(path)), EVIL)
    # Of what is no chunk at all LlamaIndex itself says so, before a guard is given it.
    as_without = came == bare
    assert as_without or (not passes and came == "blocked")
    assert not shows(watch, "EVIL")
    await nothing_left(threads)


@pytest.mark.parametrize("agent", tools.AGENTS.args[1])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("says", ["broken", "pure EVIL"])
async def test_no_model_reads_what_a_tool_raises_unless_it_is_judged(agent: Any, guarded: bool, says: str) -> None:
    """By the tool's guard, with which the run goes on, or by that of the LLM, which ends it."""
    world, model = tools.World(), tools.Model([("act", {"text": "hi"})])
    world.results["hi"] = ValueError(says)
    tool: Any = tools.function_tool(world)
    tool = guard_tool(tool, EVIL) if guarded else tool
    for kind in ("functions", "reasoning"):
        made = getattr(model, kind)
        setattr(model, kind, lambda made=made: guard_llm(made(), EVIL))
    threads = llms.own_threads()
    if says == "broken" or guarded:
        (output,) = await agent(tool, model)
        assert output.is_error
        assert says in model.read[-1] or says != "broken"
    else:
        with pytest.raises(Blocked):
            await agent(tool, model)
    assert world.ran == ["hi"]
    assert "EVIL" not in repr(model.read)
    await nothing_left(threads)


STUCK = [name for name in ENGINES if name.startswith("guarded") and "engine_a" in name]


@pytest.mark.parametrize("where", ["user", "assistant", "model"])
@pytest.mark.parametrize("path", STUCK)
async def test_what_is_cancelled_is_over(path: str, where: str) -> None:
    """While a backend hangs at the question or at the answer, or the model does in mid-stream: nothing is left."""
    if where == "model" and "stream" not in path:
        pytest.skip("it is the model's own")
    threads, stuck = llms.own_threads(), llms.Stuck(where)
    source = llms.StuckSource(llms.UNSAFE if where == "assistant" else llms.SAFE, stuck=stuck)
    watch = llms.Watch(source.text, witness=llms.StuckWitness(stuck))
    await llms.cancelled_task(llms.PATHS[path], guard_llm(llms.Fake.of(source), watch.witness), watch, stuck)
    assert watch.leaked == 0
    assert "EVIL" not in repr(watch.seen)
    assert ("number 0" in repr(watch.seen)) == (where == "model")
    assert source.closed == (source.sent > 0)
    await nothing_left(threads)


@pytest.mark.parametrize("where", ["user", "assistant"])
@pytest.mark.parametrize("agent", llms.AGENTS.values())
async def test_a_run_that_does_not_stream_is_cancelled_too(agent: Any, where: str) -> None:
    """While a backend hangs."""
    threads, stuck = llms.own_threads(), llms.Stuck(where)
    source = llms.Source(llms.said(agent.__name__, llms.UNSAFE))
    watch = llms.Watch(source.text, witness=llms.StuckWitness(stuck))
    llm = guard_llm(llms.Fake.of(source), watch.witness)
    await llms.cancelled_agent(agent(llm, streaming=False), watch, stuck)
    assert "sentence" not in repr(watch.seen)
    await nothing_left(threads)


@PATHS
async def test_a_broken_guard_would_be_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lets pass what it should not."""
    for module in (_verdicts, _held):
        monkeypatch.setattr(module, "withholds", lambda _: False)
    monkeypatch.setattr(_gate.Held, "take", lambda held, _: held._hold.take([True] * len(held._asked)))
    with pytest.raises(AssertionError):
        await test_a_model_that_says_odd_things_is_judged_like_any(path, "a megabyte and a word")
    with pytest.raises(AssertionError):
        await test_a_failing_backend_is_for_the_policy_to_decide(path, BackendError("away"), "assistant", "block")
