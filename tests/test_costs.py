"""What a check costs, in counts that are the same on every machine: calls, blocks of memory, texts and tokens judged.

The limits are some way above what was counted, on Python 3.11; a change that passes one has made every check dearer.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import sys
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import Conversation, Guard, Policy, Scores, ToolCall, Turn
from guardmw.backends.onnx import OnnxBackend
from guardmw.backends.remembered import Remembered
from guardmw.stream import CARRY, STEP, Hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.conftest import MakeArtefact

TEXT = "Please explain to me in simple words how a bakery makes bread from flour, water, salt and yeast."


# Counted: 30 functions a check, 18 one more of a batch, 1 a rule about other tools; 3 blocks a verdict that is kept;
# 1,500 bytes while a check runs.
FUNCTIONS, FUNCTIONS_MORE, FUNCTIONS_A_RULE, BLOCKS, BYTES = 36, 22, 1, 4, 2_500


class Instant:
    """Answers with a score made beforehand, and counts."""

    name = "instant"
    scores = Scores(0.01, backend="instant")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """All is well."""
        self.batches.append(len(conversations))
        return [self.scores] * len(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """All is well."""
        return self.classify(conversations)


def functions_called(step: Callable[[], object]) -> int:
    """Functions written in Python that a step calls, and generators it goes on with."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
    return count


def blocks(step: Callable[[], object]) -> int:
    """Blocks of memory that are taken after a step and were not before it."""
    gc.collect()
    before = sys.getallocatedblocks()
    kept = step()
    gc.collect()
    after = sys.getallocatedblocks()
    del kept
    return after - before


@pytest.fixture
def guard() -> Guard:
    """A guard that has been used before."""
    guard = Guard(Instant())
    guard.screen(TEXT)
    return guard


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector comes when it likes, and runs callbacks."""
    gc.disable()
    yield
    gc.enable()


# A check


@pytest.mark.usefixtures("no_collector")
def test_a_check_calls_few_functions(guard: Guard) -> None:
    """Nothing is looked up, validated or compiled that could be beforehand."""
    assert functions_called(lambda: guard.screen(TEXT)) <= FUNCTIONS


@pytest.mark.usefixtures("no_collector")
def test_an_async_check_calls_hardly_more(guard: Guard) -> None:
    """It is the same route, and takes no thread."""
    coroutine: Any = guard.ascreen(TEXT)

    def step() -> None:
        with suppress(StopIteration):
            coroutine.send(None)
            pytest.fail("it waited")

    assert functions_called(step) <= FUNCTIONS + 3


@pytest.mark.usefixtures("no_collector")
def test_one_more_of_a_batch_calls_fewer(guard: Guard) -> None:
    """What is common to all is done once."""
    guard.screen_many([TEXT])
    few, more, many = (functions_called(lambda size=size: guard.screen_many([TEXT] * size)) for size in (10, 20, 40))
    assert many - more == 2 * (more - few)
    assert (more - few) / 10 <= FUNCTIONS_MORE


@pytest.mark.usefixtures("no_collector")
def test_rules_for_other_tools_cost_next_to_nothing() -> None:
    """One look each."""
    call = Conversation((Turn("assistant", tool_calls=(ToolCall("send", {"to": "a"}),)),))

    def cost(rules: int) -> int:
        arguments = {f"other_{at}": {"to": {"max_length": 9}} for at in range(rules)}
        ruled = Guard(Instant(), policy=Policy.model_validate({"tools": {"arguments": arguments}}))
        ruled.screen(call)
        return functions_called(lambda: ruled.screen(call))

    few, more, many = cost(10), cost(20), cost(40)
    assert many - more == 2 * (more - few)
    assert (more - few) / 10 <= FUNCTIONS_A_RULE


@pytest.mark.usefixtures("no_collector")
def test_rules_that_look_back_cost_no_more_the_longer_the_conversation_is() -> None:
    """What a turn was is worked out once, when it is new."""
    rules = {"flows": [{"tools": ["note"], "injection": 0.5}], "budgets": [{"tools": ["note"], "calls": 1_000}]}
    guard = Guard(Instant(), policy=Policy.model_validate({"tools": rules}))
    turns: tuple[Turn, ...] = (Turn("user", TEXT),)
    costs = []
    for at in range(100):
        cost = []
        for new in (Turn("assistant", tool_calls=(ToolCall("note", {"at": at}),)), Turn("tool", f"noted {at}")):
            turns += (new,)
            conversation = Conversation(turns)
            cost.append(functions_called(lambda: guard.screen(conversation)))  # noqa: B023 - called at once
        costs.append(cost)
    assert all(cost == costs[10] for cost in costs[10:])


def test_a_verdict_that_is_kept_is_small(guard: Guard) -> None:
    """An audit log may hold thousands: itself, what it covered, and how long it took."""
    assert blocks(lambda: [guard.screen(TEXT) for _ in range(1_000)]) / 1_000 <= BLOCKS


def test_a_check_leaves_nothing_behind(guard: Guard) -> None:
    """However many there are."""

    def many(times: int) -> None:
        for at in range(times):
            guard.screen(f"{TEXT} {at}")

    many(100)
    assert blocks(lambda: many(2_000)) < 200


def test_a_check_needs_little_memory_while_it_runs(guard: Guard) -> None:
    """Of a short text some hundreds of bytes; of a long one not the length again."""
    long = "bread " * 20_000
    guard.screen(long)
    tracemalloc.start()
    try:
        for text, limit in ((TEXT, BYTES), (long, len(long) / 2)):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            guard.screen(text)
            assert tracemalloc.get_traced_memory()[1] - before <= limit
    finally:
        tracemalloc.stop()


# Calls of the classifier


def test_the_classifier_is_called_once(guard: Guard) -> None:
    """For one conversation or for many, sync or async; for blank ones alone not at all."""
    backend = Instant()
    guard = Guard(backend)
    guard.screen(TEXT)
    guard.screen_many([TEXT] * 20)
    asyncio.run(guard.ascreen_many([TEXT, "", TEXT]))
    guard.screen(" ")
    assert backend.batches == [1, 20, 2]


def test_the_context_of_a_turn_is_not_judged_again() -> None:
    """A turn of a long conversation is one text to judge, whatever came before."""
    backend = Instant()
    guard = Guard(backend)
    turns = tuple(Turn(("user", "assistant")[at % 2], f"{TEXT} {at}") for at in range(51))
    guard.screen(Conversation(turns))
    assert backend.batches == [1]


@pytest.mark.parametrize("delta", [1, 4, 50])
def test_a_streamed_text_is_judged_about_twice(delta: int) -> None:
    """Some is carried along for its meaning, but no piece begins at the beginning again; calls grow with the text."""
    text = " ".join(f"This is sentence number {at} of an answer." for at in range(200))
    hold: Hold[str, str] = Hold()
    judged: list[int] = []

    def judge() -> None:
        pieces = hold.due()
        judged.extend(len(piece.text) for piece in pieces)
        hold.take([True] * len(pieces))
        list(hold.released())

    for at in range(0, len(text), delta):
        hold.feed(text[at : at + delta], {"text": text[at : at + delta]})
        judge()
    hold.end()
    judge()
    assert sum(judged) / len(text) <= 2
    assert len(judged) <= len(text) / STEP + 5
    assert max(judged) <= CARRY + 2 * STEP


@pytest.mark.usefixtures("no_collector")
def test_a_stream_costs_its_length() -> None:
    """What has been let go is not looked at again: twice as many deltas call twice as many functions."""

    def cost(sentences: int) -> int:
        hold: Hold[str, str] = Hold()
        deltas = [f"This is sentence number {at:04}. " for at in range(sentences)]

        def step() -> None:
            for delta in deltas:
                hold.feed(delta, {"text": delta})
                hold.take([True] * len(hold.due()))
                list(hold.released())

        return functions_called(step)

    few, more, many = cost(200), cost(400), cost(800)
    assert many - more == pytest.approx(2 * (more - few), rel=0.02)


def test_a_stream_keeps_no_more_the_longer_it_is() -> None:
    """Of a long answer the end is held, and not the answer."""

    def held(sentences: int) -> int:
        hold: Hold[str, str] = Hold()
        for at in range(sentences):
            delta = f"This is sentence number {at:05}. "
            hold.feed(delta, {"text": delta})
            hold.take([True] * len(hold.due()))
            list(hold.released())
        tracemalloc.start()
        try:
            copy.deepcopy(hold)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert held(20_000) < 1.5 * held(2_000)


@pytest.mark.usefixtures("no_collector")
def test_a_memory_costs_no_more_the_more_it_holds() -> None:
    """To find a verdict, or to keep one in place of another."""

    def cost(size: int) -> tuple[int, int]:
        memory = Remembered(Instant(), size=size)
        memory.classify([Conversation.of(f"{at}") for at in range(size)])
        known, new = Conversation.of(f"{size - 1}"), Conversation.of("new")
        return functions_called(lambda: memory.classify([known])), functions_called(lambda: memory.classify([new]))

    assert cost(10) == cost(10_000)


# What the model is given


class Counted:
    """Stands for an object, and notes with what its methods were called."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def noted(*given: Any, **options: Any) -> Any:
            self.calls.append((name, given))
            return getattr(self._inner, name)(*given, **options)

        return noted

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of the calls of one method."""
        return [given for called, given in self.calls if called == name]


def counted(backend: OnnxBackend) -> tuple[Counted, Counted]:
    """The backend's tokenizer and session, now counted."""
    tokenizer, session = Counted(backend._windows._tokenizer), Counted(backend._session)
    backend._windows._tokenizer = tokenizer  # type: ignore[assignment]
    backend._session = session  # type: ignore[assignment]
    return tokenizer, session


def test_a_text_is_tokenised_once_and_run_once(artefact: MakeArtefact) -> None:
    """Its offsets, which are dear, are only asked for where the model may have missed something."""
    backend = OnnxBackend(artefact())
    tokenizer, session = counted(backend)
    backend.classify([Conversation.of("bread")])
    assert [name for name, _ in tokenizer.calls] == ["encode_batch_fast"]
    assert [name for name, _ in session.calls] == ["run"]


def test_a_batch_is_tokenised_at_once(artefact: MakeArtefact) -> None:
    """By the tokenizer's own threads, if it has some."""
    backend = OnnxBackend(artefact())
    tokenizer, session = counted(backend)
    backend.classify([Conversation.of("bread " * (1 + at % 3)) for at in range(16)])
    assert len(tokenizer.named("encode_batch_fast")) == 1
    assert len(session.calls) == 1


def test_little_of_what_the_model_runs_is_padding(artefact: MakeArtefact) -> None:
    """Texts of like length run together, whatever their order."""
    backend = OnnxBackend(artefact())
    _, session = counted(backend)
    lengths = [1, 20, 3, 17, 2, 19, 5, 18, 4, 16] * 5
    backend.classify([Conversation.of("bread " * length) for length in lengths])
    masks = [feeds["attention_mask"] for _, feeds in session.named("run")]
    assert sum(mask.size for mask in masks) / sum(int(mask.sum()) for mask in masks) <= 1.3


def test_windows_overlap_by_no_more_than_the_card_says(artefact: MakeArtefact) -> None:
    """A long text costs its length, and the overlaps: here 8 of 29 tokens of each window."""
    backend = OnnxBackend(artefact())
    _, session = counted(backend)
    backend.classify([Conversation.of("bread " * 500)])
    tokens = sum(int(feeds["attention_mask"].sum()) for _, feeds in session.named("run"))
    assert tokens / 500 <= 32 / (29 - 8) * 1.1
