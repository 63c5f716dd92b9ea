"""Two GuardMiddlewares in one agent: what a person approves to one of them the other judges before it goes anywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.tools import tool
from langchain_guardmw import REFUSAL, GuardMiddleware, ToolGuardMiddleware, asking
from langgraph.types import Command

from guardmw.testing import KeywordBackend
from tests.adapters.langchain.test_agent import (
    ASKED,
    BOTH,
    EVERY_RUN,
    THREAD,
    Answer,
    Fake,
    Run,
    agent_of,
    call,
    invoke,
    outcome,
    pending,
    said,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw import Conversation, Scores

# Events of the third version are in beta.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

NOTED: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    NOTED.clear()


@tool
def note(text: str = "everything") -> str:
    """Note something."""
    NOTED.append(text)
    return "Noted."


class Witness(KeywordBackend):
    """Knows one word, and keeps what it read."""

    def __init__(self, word: str) -> None:
        super().__init__({word: 0.99})
        self.trials: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """By that word."""
        self.trials += [conversation.trial for conversation in conversations]
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same."""
        return self.classify(conversations)


def guards(how: Any, *, first: bool = True, word: str = "TWO") -> tuple[list[Any], Witness]:
    """One that has a person decide on ONE, and another that withholds TWO; and what the other has read."""
    other = Witness(word)
    both: list[Any] = [
        GuardMiddleware(Witness("ONE"), on_block="review", name="first"),
        GuardMiddleware(other, on_block=how, name="second"),
    ]
    return (both if first else both[::-1]), other


def calls_of(text: str, *noted: str) -> list[AIMessageChunk]:
    """An answer that has these noted, after a few words."""
    pieces: list[Any] = [
        {"name": "note", "args": '{"text": "' + one + '"}', "id": str(at), "index": at} for at, one in enumerate(noted)
    ]
    return [AIMessageChunk(content=text), AIMessageChunk(content="", tool_call_chunks=pieces)]


ORDER = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
HOW = pytest.mark.parametrize("how", ["raise", "end", "replace", "review"])


@EVERY_RUN
@ORDER
@HOW
def test_an_approved_answer_is_judged_by_the_other_guard(run: Run, first: bool, how: Any) -> None:
    """What that one lets pass is the answer, without the model being asked again, and stays it."""
    both, other = guards(how, first=first)
    model = Fake.saying("The ONE answer.", "Fine.")
    agent = agent_of(model, *both, tools=[])
    run(agent, said("Hello."), lambda _: None)
    assert (pending(agent)["content"], other.trials.count("The ONE answer. ")) == ("The ONE answer. ", not first)
    run(agent, Command(resume="approve"), lambda _: None)
    assert (texts(agent), len(model._asked)) == (["Hello.", "The ONE answer. "], 1)
    assert other.trials[-1] == "The ONE answer. "
    run(agent, said("And now?"), lambda _: None)
    assert texts(agent) == ["Hello.", "The ONE answer. ", "And now?", "Fine. "]
    judged = [one for one in other.trials if "ONE" in one]
    assert set(judged) == {"The ONE answer. "}
    # In a stream it is another message that comes out of a guard around it, and is judged as that.
    assert len(judged) in ((1,) if first else (2, 3))


@EVERY_RUN
@HOW
@pytest.mark.parametrize("shape", ["text", "call"])
def test_what_the_other_guard_withholds_goes_nowhere(run: Run, how: Any, shape: str) -> None:
    """Neither to a reader nor into the state, and no call of it is made; where that one asks, too, it waits."""
    both, _ = guards(how)
    text = "ONE, TWO."
    model = Fake.saying(text if shape == "text" else call(text), "Fine.")
    agent = agent_of(model, *both, tools=[note])
    run(agent, said("Hello."), lambda _: None)
    shown: list[Any] = []
    blocked = outcome(run, agent, Command(resume="approve"), shown.append)
    assert (blocked is not None) == (how == "raise")
    if how != "review":
        assert "TWO" not in repr(shown)
        assert not agent.get_state(THREAD).interrupts
    else:
        assert pending(agent)["guardmw"]["stage"] == ("output" if shape == "text" else "tool_call")
    assert NOTED == []
    assert all("TWO" not in repr(one.values["messages"]) for one in agent.get_state_history(THREAD) if one.values)
    run(agent, said("And now?"), lambda _: None)
    assert texts(agent)[-2:] == ["And now?", "Fine. "]
    assert (NOTED, len(model._asked)) == ([], 2)


@BOTH
@ORDER
@pytest.mark.parametrize("shape", ["text", "call"])
def test_both_may_ask_about_one_answer(run: Run, first: bool, shape: str) -> None:
    """Each once, whatever the other's person said before; the call that both approve is made once."""
    both, _ = guards("review", first=first)
    text = "ONE, TWO."
    model = Fake.saying(text if shape == "text" else call(text), "Fine.")
    agent = agent_of(model, *both, tools=[note])
    run(agent, said("Hello."), lambda _: None)
    asked = []
    while agent.get_state(THREAD).interrupts:
        asked.append(pending(agent)["about"])
        run(agent, Command(resume="approve"), lambda _: None)
    first_time, second_time = asked
    assert first_time != second_time
    assert texts(agent)[1:] == ([f"{text} "] if shape == "text" else ["Wait. ", "Noted.", "Fine. "])
    assert [text] * (shape == "call") == NOTED


@EVERY_RUN
@ORDER
@HOW
def test_nobody_sees_an_edited_answer_before_the_other_guard_has_judged_it(run: Run, first: bool, how: Any) -> None:
    """Not in any stream, whichever of them is nearer to the model; who raises does."""
    both, other = guards(how, first=first)
    model = Fake.saying("The ONE answer.")
    agent = agent_of(model, *both, tools=[])
    run(agent, said("Hello."), lambda _: None)
    shown: list[Any] = []
    blocked = outcome(run, agent, Command(resume={"type": "edit", "content": "A TWO answer."}), shown.append)
    assert (blocked is not None) == (how == "raise")
    # What a person is asked, and what they said.
    assert "TWO" not in repr([one for one in shown if "nterrupt" not in repr(one) and "resume" not in repr(one)])
    assert bool(agent.get_state(THREAD).interrupts) == (how == "review")
    assert (texts(agent), len(model._asked)) == (["Hello.", REFUSAL], 1)
    assert other.trials.count("A TWO answer.") == 1


@BOTH
@ORDER
@pytest.mark.parametrize("moved", [False, True])
def test_an_edited_answer_is_judged_by_the_other_guard(run: Run, first: bool, moved: bool) -> None:
    """In another process, too."""
    both, _ = guards("end", first=first)
    model = Fake.saying("The ONE answer.")
    agent = agent_of(model, *both, tools=[])
    run(agent, said("Hello."), lambda _: None)
    if moved:
        both, _ = guards("end", first=first)
        agent = create_agent(model, [], middleware=both, checkpointer=agent.checkpointer)
    run(agent, Command(resume={"type": "edit", "content": "A TWO answer."}), lambda _: None)
    assert texts(agent) == ["Hello.", REFUSAL]


@BOTH
@ORDER
@pytest.mark.parametrize("text", ["ONE", "ONE, TWO"])
@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
@pytest.mark.parametrize("tools", [[], [note]])
def test_structured_output_is_approved_to_both(run: Run, first: bool, text: str, strategy: Any, tools: Any) -> None:
    """By a person where it has to be, and the object is made of what the model said first."""
    both, _ = guards("review", first=first)
    answer = call(text, "Answer") if strategy is ToolStrategy else [AIMessageChunk(content=f'{{"text": "{text}"}}')]
    model = Fake.saying(answer)
    agent = agent_of(model, *both, tools=tools, response_format=strategy(Answer))
    run(agent, said("Hello."), lambda _: None)
    count = 0
    while agent.get_state(THREAD).interrupts:
        count += 1
        assert agent.get_state(THREAD).values.get("structured_response") is None
        run(agent, Command(resume="approve"), lambda _: None)
    state = agent.get_state(THREAD)
    assert (count, len(model._asked), state.next) == (1 + ("TWO" in text), 1, ())
    assert state.values["structured_response"] == Answer(text=text)
    assert not state.values["guardmw_held"]


@BOTH
@ORDER
@pytest.mark.parametrize("word", ["ONE", "TWO"])
def test_a_run_that_either_ended_is_over_by_its_verdict(run: Run, first: bool, word: str) -> None:
    """Where LangChain forgets that it is, behind another middleware's node."""

    class After(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> None:
            """Nothing."""

    both = [GuardMiddleware(KeywordBackend({one: 0.9}), on_block="end", name=one) for one in ("ONE", "TWO")]
    model = Fake.saying(call(word, "Answer"))
    agent = agent_of(model, After(), *both[:: 1 if first else -1], tools=[], response_format=ToolStrategy(Answer))
    blocked = outcome(run, agent, said("Hello."))
    assert str(blocked) == "blocked at tool_call: unsafe 0.90 (threshold 0.5)"


@BOTH
@ORDER
@HOW
def test_a_rejected_answer_stays_refused(run: Run, first: bool, how: Any) -> None:
    """And nobody goes on with it."""
    both, other = guards(how, first=first)
    agent = agent_of(Fake.saying("The ONE answer."), *both, tools=[])
    run(agent, said("Hello."), lambda _: None)
    other.trials.clear()
    run(agent, Command(resume="reject"), lambda _: None)
    assert (texts(agent), other.trials) == (["Hello.", REFUSAL], [])


@BOTH
@ORDER
def test_calls_of_an_approved_answer_are_for_the_guard_of_the_tools(run: Run, first: bool) -> None:
    """It blocks one, and that is not made when the answer is said again, though nothing is left of it to judge."""
    both, _ = guards("end", first=first)
    model = Fake.saying(calls_of("ONE. ", "milk", "EVIL"), "Fine.")
    of_tools = ToolGuardMiddleware(KeywordBackend({"EVIL": 0.99}))
    agent = agent_of(model, of_tools, *both, tools=[note])
    run(agent, said("Hello."), lambda _: None)
    assert NOTED == []
    run(agent, Command(resume="approve"), lambda _: None)
    assert NOTED == ["milk"]
    assert texts(agent)[-1] == "Fine. "


@EVERY_RUN
@ORDER
def test_a_call_that_is_blocked_is_not_made_where_two_guards_have_it_judged(run: Run, first: bool) -> None:
    """The second has what the first left of it judged, which is no verdict on the call."""
    both, _ = guards("end", first=first)
    model = Fake.saying(calls_of("Wait. ", "EVIL", "milk"), "Fine.")
    agent = agent_of(model, ToolGuardMiddleware(KeywordBackend({"EVIL": 0.99})), *both, tools=[note])
    run(agent, said("Hello."), lambda _: None)
    assert NOTED == ["milk"]
    assert texts(agent)[-1] == "Fine. "


@EVERY_RUN
def test_calls_stay_blocked_where_a_second_verdict_blocks_others(run: Run) -> None:
    """A judge that goes by what it heard before blocks one for each guard, and neither is made."""

    class Moody(Witness):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            """First EVIL is unsafe, and then milk."""
            scores = super().classify(conversations)
            self._words = {"milk": 0.99}
            return scores

    both, _ = guards("end")
    model = Fake.saying(calls_of("Wait. ", "milk", "EVIL"), "Fine.")
    agent = agent_of(model, ToolGuardMiddleware(Moody("EVIL")), *both, tools=[note])
    run(agent, said("Hello."), lambda _: None)
    assert NOTED == []
    assert texts(agent)[-1] == "Fine. "


@ORDER
@pytest.mark.parametrize("text", ["ONE", "ONE, TWO"])
def test_they_know_of_each_other_through_a_thread(first: bool, text: str) -> None:
    """Where a middleware between them takes what is inside of it to another, without the context."""

    class Threaded(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(handler, request).result()

    (one, two), _ = guards("end", first=first)
    agent = agent_of(Fake.saying(call(text), "Fine."), one, Threaded(), two, tools=[note])
    invoke(agent, said("Hello."), lambda _: None)
    if agent.get_state(THREAD).interrupts:
        invoke(agent, Command(resume="approve"), lambda _: None)
    assert ["ONE"] * (text == "ONE") == NOTED


@BOTH
def test_an_answer_that_is_changed_after_it_was_approved_is_judged_again(run: Run) -> None:
    """By the guard to which another was approved, under the same id."""

    class Meddling(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            response = handler(request)
            if response.result[0].text == "The ONE answer. ":
                response.result[0].content = "Quite another ONE."
            return response

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            response = await handler(request)
            if response.result[0].text == "The ONE answer. ":
                response.result = [AIMessage("Quite another ONE.", id=response.result[0].id)]
            return response

    (one, two), _ = guards("end")
    agent = agent_of(Fake.saying("The ONE answer."), one, Meddling(), two, tools=[])
    run(agent, said("Hello."), lambda _: None)
    run(agent, Command(resume="approve"), lambda _: None)
    assert pending(agent)["content"] == "Quite another ONE."
    run(agent, Command(resume="reject"), lambda _: None)
    assert texts(agent) == ["Hello.", REFUSAL]


def test_what_is_approved_in_a_thread_is_asked_about_in_another() -> None:
    """The guards share what they know of verdicts, and no approval."""
    both, _ = guards("end")
    agent = agent_of(Fake.saying("The ONE answer.", "The ONE answer.", "Fine."), *both, tools=[])
    invoke(agent, said("Hello."), lambda _: None)
    invoke(agent, Command(resume="approve"), lambda _: None)
    other: Any = {"configurable": {"thread_id": "2"}}
    agent.invoke(said("Hello."), other)
    assert agent.get_state(other).interrupts
    third: Any = {"configurable": {"thread_id": "3"}}
    given: Any = [("user", "Hello."), ("assistant", "The ONE answer. "), ("user", "And now?")]
    assert "ONE" not in repr(agent.invoke({"messages": given}, third)["messages"])


@pytest.mark.parametrize("run", ASKED)
def test_the_checks_notice_a_guard_that_does_not_know_of_the_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that puts what was approved right into the state."""
    unpacked = asking.Pending.unpacked
    monkeypatch.setattr(asking.Pending, "unpacked", lambda packed: unpacked(packed)._replace(beside=False))
    with pytest.raises(AssertionError):
        test_what_the_other_guard_withholds_goes_nowhere(run, "end", "call")
