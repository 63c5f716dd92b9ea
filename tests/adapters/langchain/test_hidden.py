"""Text that hides where identifiers stand is read all the same."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_guardmw import guard

from guardmw import Blocked
from guardmw.testing import KeywordBackend

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
