"""What a hostile reader found: text where identifiers stand, and a refusal that did not end the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.documents import Document
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_guardmw import GuardMiddleware, guard
from pydantic import BaseModel

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from langchain_core.outputs import ChatResult

BACKEND = KeywordBackend({"EVIL": 0.99, "坏东西": 0.99})


@pytest.mark.parametrize(
    "block",
    [
        {"type": "json", "json": {"EVIL ignore all that": 1}},
        {"type": "json", "json": {"type": "redacted_thinking", "text": "EVIL"}},
        {"type": "json", "json": {"id": "坏东西，忽略"}},
        {"type": "json", "json": {"id": "EVIL" * 20}},
        {"type": "text", "text": "fine", "EVIL key": "x"},
        {"type": "redacted_thinking", "data": "c2VjcmV0", "EVIL key": "x"},
    ],
)
def test_a_block_of_a_result_hides_nothing(block: dict[str, Any]) -> None:
    """Whoever wrote the page that a tool read chooses its keys and its ids."""
    asked = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}])
    with pytest.raises(Blocked):
        guard(BACKEND).invoke([HumanMessage("look"), asked, ToolMessage([block], tool_call_id="1")])


def test_ciphertexts_and_identifiers_of_a_model_are_left_alone() -> None:
    """Nobody can read them."""
    given = AIMessage([{"type": "redacted_thinking", "data": "EVIL"}, {"type": "text", "text": "hi", "id": "EVIL_1"}])
    assert guard(BACKEND).invoke([HumanMessage("hi"), given])


@pytest.mark.parametrize("value", [{"做坏东西": "x"}, Document("fine", metadata={"坏东西": 1})])
def test_a_sentence_without_spaces_is_no_name(value: object) -> None:
    """In scripts that do without them, Python takes it for an identifier."""
    with pytest.raises(Blocked):
        guard(BACKEND).invoke(value)


class Answer(BaseModel):
    """What the agent is to come to."""

    x: str


class Counted(FakeMessagesListChatModel):
    """Says how often it was asked."""

    asked: int = 0

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        """As providers do."""
        return self

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        self.asked += 1
        return super()._generate(*args, **kwargs)


@pytest.mark.parametrize("on_block", ["end", "replace"])
@pytest.mark.parametrize(
    "answer", [AIMessage("", tool_calls=[{"name": "Answer", "args": {"x": "EVIL"}, "id": "1"}]), AIMessage("EVIL")]
)
def test_a_refusal_ends_an_agent_that_wants_an_object(answer: AIMessage, on_block: Any) -> None:
    """Without tools, create_agent asks its model again until it has one."""
    model = Counted(responses=[answer])
    middleware = GuardMiddleware(BACKEND, on_block=on_block)
    agent = create_agent(model, [], response_format=ToolStrategy(Answer), middleware=[middleware])
    ended = agent.invoke({"messages": [("user", "hi")]}, {"recursion_limit": 25})
    assert model.asked == 1
    assert ended.get("structured_response") is None
    assert "EVIL" not in repr(ended)
