"""Backends that hang or answer late at tools, retrievers, chains and audits: nothing unjudged is out, and all ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool, tool
from langchain_guardmw import REFUSAL, GuardCallbackHandler, guard_retriever, guard_tool, guarded, outcome

from guardmw import Blocked, Conversation, Guard, Policy, Scores, Verdict
from guardmw.backends.resilient import Resilient

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds that nothing here takes unless it hangs.
LONG = 30


async def until(event: threading.Event) -> None:
    """Wait for what may happen in a thread, without one."""
    while not event.is_set():  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.001)


class Stuck:
    """A backend that reads a SECRET until it is told to go on, or cancelled, and knows who was."""

    name = "stuck"

    def __init__(self, unsafe: float = 0.0) -> None:
        self.scores = Scores(unsafe)
        self.reached, self.go = threading.Event(), threading.Event()
        self.cancelled = 0

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """In a thread of whoever asks."""
        if any("SECRET" in one.trial for one in conversations):
            self.reached.set()
            assert self.go.wait(LONG)
        return [self.scores if "SECRET" in one.trial else Scores(0.0) for one in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, without a thread."""
        if any("SECRET" in one.trial for one in conversations):
            self.reached.set()
            try:
                await until(self.go)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return [self.scores if "SECRET" in one.trial else Scores(0.0) for one in conversations]


class Shown(BaseCallbackHandler):
    """Keeps all that callbacks are told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        self.told.append((args, {key: value for key, value in kwargs.items() if key != "inputs"}))

    on_tool_start = on_tool_end = on_tool_error = on_retriever_end = on_retriever_error = on_chain_end = _keep


class Model(BaseChatModel):
    """Has a secret, and keeps count of who asks for it."""

    asked: int = 0

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.asked += 1
        return ChatResult(generations=[ChatGeneration(message=AIMessage("A SECRET."))])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        self.asked += 1
        for word in ("A ", "SECRET. ", "And more of it."):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))


class Finding(BaseRetriever):
    """Finds a secret."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document("A SECRET.")]


class Telling(BaseTool):
    """Tells a secret, and knows of no event loop."""

    name: str = "telling"
    description: str = "Tells."

    def _run(self, text: str) -> str:
        return "A SECRET."


MADE: list[str] = []


@tool
def note(text: str) -> str:
    """Note something."""
    MADE.append(text)
    return "Noted."


@tool
def tell(text: str) -> str:
    """Tell something."""
    return "A SECRET."


@tool
async def atell(text: str) -> str:
    """Tell something."""
    return "A SECRET."


@tool
def fail(text: str) -> str:
    """Fail."""
    raise ValueError("A SECRET.")


@pytest.fixture(autouse=True)
def _nothing_made() -> None:
    MADE.clear()


Way = Callable[[Any, Any], Any]
Make = Callable[[Guard], Any]


class Place(NamedTuple):
    """Where a guard stands.

    Attributes:
        guarded: what it guards.
        given: what that is given.
        stood: whether a result of it is one that says nothing.
    """

    guarded: Make
    given: Any
    stood: Callable[[Any], bool]


def called(given: Any) -> dict[str, Any]:
    """As a model calls it."""
    return {"type": "tool_call", "name": "note", "args": {"text": given}, "id": "1"}


def is_error(result: Any) -> bool:
    """What a model is told in place of a result."""
    return isinstance(result, Blocked) or getattr(result, "status", "") == "error"


def is_refusal(result: Any) -> bool:
    """What a chain answers."""
    return str(getattr(result, "text", result)).endswith(REFUSAL)


PLACES = {
    "call": Place(lambda g: guard_tool(note, g), called("A SECRET."), is_error),
    "call by code": Place(lambda g: guard_tool(note, g), {"text": "A SECRET."}, is_error),
    "result": Place(lambda g: guard_tool(tell, g), called("x"), is_error),
    "result for code": Place(lambda g: guard_tool(tell, g), {"text": "x"}, is_error),
    "result of a class": Place(lambda g: guard_tool(Telling(), g), called("x"), is_error),
    "error": Place(lambda g: guard_tool(fail, g), called("x"), is_error),
    "documents": Place(lambda g: guard_retriever(Finding(), g), "x", lambda found: found == []),
    "question": Place(lambda g: guarded(Model(), g), "A SECRET.", is_refusal),
    "answer": Place(lambda g: guarded(Model(), g), "x", is_refusal),
}
EVERY_PLACE = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
# An event loop is no place for a coroutine's tool without one.
ASYNC_ONLY = {"result of a coroutine": Place(lambda g: guard_tool(atell, g), called("x"), is_error)}
EVERY_ASYNC_PLACE = pytest.mark.parametrize("place", (PLACES | ASYNC_ONLY).values(), ids=PLACES | ASYNC_ONLY)


def invoke(runnable: Any, given: Any, config: Any) -> Any:
    """Run it; what it raises is its result."""
    try:
        return runnable.invoke(given, config)
    except (Blocked, ValueError) as error:
        return error


def stream(runnable: Any, given: Any, config: Any) -> Any:
    """The same, as it comes."""
    try:
        chunks = list(runnable.stream(given, config))
    except (Blocked, ValueError) as error:
        return error
    return chunks[0] if len(chunks) == 1 else "".join(chunk.text for chunk in chunks)


async def ainvoke(runnable: Any, given: Any, config: Any) -> Any:
    """The same on an event loop."""
    try:
        return await runnable.ainvoke(given, config)
    except (Blocked, ValueError) as error:
        return error


async def astream(runnable: Any, given: Any, config: Any) -> Any:
    """The same, as it comes."""
    try:
        chunks = [chunk async for chunk in runnable.astream(given, config)]
    except (Blocked, ValueError) as error:
        return error
    return chunks[0] if len(chunks) == 1 else "".join(chunk.text for chunk in chunks)


SYNC = pytest.mark.parametrize("way", [invoke, stream])
ASYNC = pytest.mark.parametrize("way", [ainvoke, astream])


def is_out(result: Any, shown: Shown) -> bool:
    """Whether anybody has got the secret: who called, callbacks, or a tool that was not to be called with it."""
    return "SECRET" in f"{result!r} {shown.told} {MADE}"


def left_behind(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that do not end."""
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
    return [thread for thread in threading.enumerate() if thread not in before]


def on_loop(main: Callable[[], Awaitable[None]]) -> None:
    """Run it on an event loop of its own, and see that it leaves neither task nor thread behind."""
    before = set(threading.enumerate())

    async def run() -> None:
        await main()
        for _ in range(20):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert left_behind(before) == []


def deadline(place: Place, way: Any, action: Any) -> None:
    """Run it with a backend that hangs, which has a twentieth of a second."""
    before, backend, shown = set(threading.enumerate()), Stuck(), Shown()
    judge = Guard(Resilient(backend, deadline=0.05, attempts=1), policy=Policy(on_error=action))
    result = way(place.guarded(judge), place.given, {"callbacks": [shown]})
    assert not backend.go.is_set()
    assert is_out(result, shown) == (action == "allow")
    assert place.stood(result) == (action == "block")
    # What comes after its deadline is nobody's any more.
    backend.go.set()
    assert left_behind(before) == []
    assert is_out(result, shown) == (action == "allow")


@SYNC
@EVERY_PLACE
@pytest.mark.parametrize("action", ["block", "allow"])
def test_a_deadline_is_a_failure_for_the_policy(place: Place, way: Any, action: Any) -> None:
    """Where the backend hangs; its thread ends when it comes back."""
    deadline(place, way, action)


@ASYNC
@EVERY_ASYNC_PLACE
@pytest.mark.parametrize("action", ["block", "allow"])
def test_a_deadline_is_a_failure_for_the_policy_on_an_event_loop(place: Place, way: Any, action: Any) -> None:
    """The backend's call is cancelled."""
    backend, shown = Stuck(), Shown()
    judge = Guard(Resilient(backend, deadline=0.05, attempts=1), policy=Policy(on_error=action))

    async def main() -> None:
        result = await way(place.guarded(judge), place.given, {"callbacks": [shown]})
        assert backend.cancelled
        assert is_out(result, shown) == (action == "allow")
        assert place.stood(result) == (action == "block")

    on_loop(main)


@SYNC
@EVERY_PLACE
@pytest.mark.parametrize("unsafe", [0.0, 0.99])
def test_a_late_verdict_is_waited_for(place: Place, way: Any, unsafe: float) -> None:
    """Nothing is out before it."""
    before, backend, shown, results = set(threading.enumerate()), Stuck(unsafe), Shown(), list[Any]()
    runnable = place.guarded(Guard(backend))
    thread = threading.Thread(
        target=lambda: results.append(way(runnable, place.given, {"callbacks": [shown]})), daemon=True
    )
    thread.start()
    assert backend.reached.wait(LONG)
    assert not is_out(results, shown)
    assert results == []
    backend.go.set()
    assert left_behind(before) == []
    (result,) = results
    assert is_out(result, shown) == (unsafe == 0)
    assert place.stood(result) == (unsafe > 0)


@ASYNC
@EVERY_ASYNC_PLACE
@pytest.mark.parametrize("unsafe", [0.0, 0.99])
def test_a_late_verdict_is_waited_for_on_an_event_loop(place: Place, way: Any, unsafe: float) -> None:
    """Nothing is out before it."""
    backend, shown = Stuck(unsafe), Shown()

    async def main() -> None:
        running = asyncio.create_task(way(place.guarded(Guard(backend)), place.given, {"callbacks": [shown]}))
        await until(backend.reached)
        assert not is_out(None, shown)
        assert not running.done()
        backend.go.set()
        result = await running
        assert is_out(result, shown) == (unsafe == 0)
        assert place.stood(result) == (unsafe > 0)

    on_loop(main)


@ASYNC
@EVERY_ASYNC_PLACE
@pytest.mark.parametrize("limit", [True, False], ids=["timeout", "cancel"])
def test_who_gives_up_leaves_nothing_behind(place: Place, way: Any, limit: bool) -> None:
    """The backend's call is cancelled with its caller's, and nothing was out."""
    backend, shown = Stuck(), Shown()

    async def main() -> None:
        running = asyncio.create_task(way(place.guarded(Guard(backend)), place.given, {"callbacks": [shown]}))
        await until(backend.reached)
        if limit:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(running, 0.01)
        else:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert backend.cancelled == 1
        assert not is_out(None, shown)

    on_loop(main)
    assert not backend.go.is_set()


@SYNC
@EVERY_PLACE
def test_the_check_notices_a_guard_that_leaks(place: Place, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a failure for a yes."""
    monkeypatch.setattr(outcome, "withholds", lambda _: False)
    with pytest.raises(AssertionError):
        deadline(place, way, "block")


# An audit


AUDITED = {
    "model": (Model, "A SECRET."),
    "tool": (lambda: tell, called("x")),
    "retriever": (Finding, "x"),
}
EVERY_AUDITED = pytest.mark.parametrize(("make", "given"), AUDITED.values(), ids=AUDITED)


@SYNC
@EVERY_AUDITED
def test_an_audit_gives_up_at_a_deadline(make: Any, given: Any, way: Any) -> None:
    """The run goes on as if there were none, and the verdict says that it was not judged."""
    before, backend, verdicts = set(threading.enumerate()), Stuck(), list[Verdict]()
    judge = Guard(Resilient(backend, deadline=0.05, attempts=1))
    audit = GuardCallbackHandler(judge, on_verdict=lambda verdict, _: verdicts.append(verdict))
    result = way(make(), given, {"callbacks": [audit]})
    assert "SECRET" in repr(result)
    assert any(verdict.degraded for verdict in verdicts)
    backend.go.set()
    assert left_behind(before) == []


@ASYNC
@EVERY_AUDITED
def test_an_audit_gives_up_at_a_deadline_on_an_event_loop(make: Any, given: Any, way: Any) -> None:
    """The same; LangChain asks it in a thread there."""
    backend, verdicts = Stuck(), list[Verdict]()
    judge = Guard(Resilient(backend, deadline=0.05, attempts=1))
    audit = GuardCallbackHandler(judge, on_verdict=lambda verdict, _: verdicts.append(verdict))

    async def main() -> None:
        result = await way(make(), given, {"callbacks": [audit]})
        assert "SECRET" in repr(result)
        assert any(verdict.degraded for verdict in verdicts)
        backend.go.set()

    on_loop(main)


@ASYNC
@EVERY_AUDITED
def test_an_audited_run_can_be_given_up(make: Any, given: Any, way: Any) -> None:
    """At once, while the backend hangs in its thread, which ends when that comes back."""
    backend = Stuck()
    audit = GuardCallbackHandler(backend)

    async def main() -> None:
        running = asyncio.create_task(way(make(), given, {"callbacks": [audit]}))
        await until(backend.reached)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not backend.go.is_set()
        backend.go.set()
        # LangChain still waits for the thread, and for nothing else.
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()} or {asyncio.create_task(asyncio.sleep(0))})

    on_loop(main)
