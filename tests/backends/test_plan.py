"""A route written once runs the same with and without an event loop, and hears of every failure as BackendError."""

from __future__ import annotations

import asyncio
from traceback import format_exception
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import BackendError, BackendUnavailable, Conversation, Scores
from guardmw.backends._plan import Ask, Plan, arun, run
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw import Backend

ONE = [Conversation.of("one")]
both = pytest.mark.parametrize("drive", [run, lambda plan: asyncio.run(arun(plan))], ids=["run", "arun"])
Drive = "Callable[[Plan[list[float]]], list[float]]"


def cautious(first: Backend, second: Backend, conversations: Sequence[Conversation]) -> Plan[list[float]]:
    """A route that asks the second where the first fails, then again where the second is in doubt."""
    try:
        scores = yield Ask(first, conversations)
    except BackendError:
        scores = yield Ask(second, conversations)
    doubtful = [c for c, s in zip(conversations, scores, strict=True) if 0.2 < s.unsafe < 0.8]
    if doubtful:
        scores += yield Ask(second, doubtful)
    return [s.unsafe for s in scores]


@both
def test_a_plan_gets_the_scores_it_asks_for(drive: Drive) -> None:
    """As often as it asks, from whom it asks."""
    assert drive(cautious(ScriptedBackend([0.5]), ScriptedBackend([0.9]), ONE)) == [0.5, 0.9]


@both
def test_a_plan_can_go_on_after_a_failure(drive: Drive) -> None:
    """It is thrown in where the plan asked, so that an except clause is all it takes."""
    assert drive(cautious(ScriptedBackend([KeyError()]), ScriptedBackend([0.9]), ONE)) == [0.9]


@both
def test_a_failure_that_the_plan_does_not_expect_comes_out(drive: Drive) -> None:
    """Of the second backend, which nothing stands behind."""
    with pytest.raises(BackendError, match="scripted: KeyError"):
        drive(cautious(ScriptedBackend([KeyError()]), ScriptedBackend([KeyError()]), ONE))


@both
def test_an_error_of_its_own_comes_out_as_it_is(drive: Drive) -> None:
    """Which kind, and its message, are the backend's to choose."""
    told = BackendUnavailable("nobody answers")
    with pytest.raises(BackendUnavailable) as caught:
        drive(cautious(ScriptedBackend([told]), ScriptedBackend([told]), ONE))
    assert caught.value is told


@both
def test_of_a_foreign_error_only_the_type_is_told(drive: Drive) -> None:
    """Its message may quote the text, and a traceback would print it."""
    foreign = RuntimeError("a secret")
    with pytest.raises(BackendError) as caught:
        drive(cautious(ScriptedBackend([foreign]), ScriptedBackend([foreign]), ONE))
    assert str(caught.value) == "scripted: RuntimeError"
    assert "a secret" not in "".join(format_exception(caught.value))


@both
def test_a_short_answer_is_a_failure(drive: Drive) -> None:
    """It must not pass for a safe one."""

    class Short(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return super().classify(conversations[1:])

    short = Short({})
    with pytest.raises(BackendError, match="keyword: 1 scores for 2 conversations"):
        drive(cautious(short, short, ONE * 2))


@both
def test_an_answer_of_another_type_is_a_failure(drive: Drive) -> None:
    """A number is no Scores, however plausible."""

    class Number(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return [0.0 for _ in conversations]  # type: ignore[misc]

    number = Number({})
    with pytest.raises(BackendError, match="keyword: answered with float instead of Scores"):
        drive(cautious(number, number, ONE))


@both
def test_an_error_of_the_plan_itself_comes_out(drive: Drive) -> None:
    """It is no backend's failure, and is not dressed up as one."""

    def faulty() -> Plan[list[float]]:
        yield Ask(ScriptedBackend([0.5]), ONE)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(faulty())


@both
def test_a_plan_may_ask_nobody(drive: Drive) -> None:
    """A verdict that needs no opinion costs none."""

    def sure() -> Plan[list[float]]:
        return [0.0]
        yield

    assert drive(sure()) == [0.0]


@given(
    st.lists(st.floats(0, 1) | st.just(KeyError()) | st.just(BackendError("no")), max_size=4),
    st.lists(st.floats(0, 1) | st.just(KeyError()), max_size=4),
    st.integers(0, 3),
)
def test_sync_and_async_are_one_logic(
    first: list[float | Exception], second: list[float | Exception], count: int
) -> None:
    """Same answer or same error, and the same questions on the way."""

    def outcome(drive: Drive) -> object:
        backends = ScriptedBackend(first), ScriptedBackend(second)
        try:
            result: object = drive(cautious(*backends, ONE * count))
        except BackendError as error:
            result = str(error)
        return result, [backend.batches for backend in backends]

    assert outcome(run) == outcome(lambda plan: asyncio.run(arun(plan)))
