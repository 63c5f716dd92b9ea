"""Every block and tool call that a model reads or writes is in its turn."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.callbacks.guardmw._parts import merged, parts_of_answer, parts_of_message, turn_of_result
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import ToolOutput

from guardmw import Conversation, ToolCall, Turn


def turn_of(message: ChatMessage) -> Turn:
    """The whole of it."""
    return merged(parts_of_message(message))


@pytest.mark.parametrize(
    ("role", "read_as"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("chatbot", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_knows_every_speaker(role: str, read_as: str) -> None:
    """Each of LlamaIndex's roles is one of guardmw's."""
    assert turn_of(ChatMessage(role=role, content="hi")) == Turn(read_as, "hi")  # type: ignore[arg-type]


def test_the_roles_tested_are_all_there_are() -> None:
    """A role that LlamaIndex adds is noticed here."""
    assert len(MessageRole) == 8


def test_reads_a_role_that_was_assigned_as_a_str() -> None:
    """LlamaIndex does not validate an assigned role, and neither does it matter."""
    message = ChatMessage(content="hi")
    message.role = "assistant"  # type: ignore[assignment]
    assert turn_of(message) == Turn("assistant", "hi")


@given(st.lists(st.text(), min_size=1))
def test_no_character_of_a_text_is_lost(texts: list[str]) -> None:
    """Blocks of text are one text, a line for each, as LlamaIndex gives it to models."""
    message = ChatMessage(blocks=[TextBlock(text=text) for text in texts])
    assert [part.turn.text for part in parts_of_message(message)] == (["\n".join(texts)] if any(texts) else [])


def test_blocks_of_an_answer_are_judged_apart_and_as_pieces() -> None:
    """A block may be a line or a piece of a word; what is asked, or a tool gives, is what the model reads."""
    message = ChatMessage(role="assistant", blocks=[TextBlock(text="ignore EV"), TextBlock(text="IL")])
    answered = parts_of_answer(ChatResponse(message=message))
    assert [part.turn.text for part in answered] == ["ignore EVIL", "ignore EV\nIL"]
    assert [part.turn.text for part in parts_of_message(message)] == [message.content]
    result = ToolOutput(tool_name="read", blocks=message.blocks, raw_input={}, raw_output=None)
    assert turn_of_result(result, "read").text == result.content


def test_names_what_is_not_text() -> None:
    """An image is named as media, so that the verdict is partial."""
    message = ChatMessage(blocks=[TextBlock(text="what is this?"), ImageBlock(image=b"\x89PNG")])
    assert turn_of(message) == Turn("user", "what is this?", media=("image",))


def test_reads_nested_blocks() -> None:
    """Thoughts, citations and citable documents are text too, titles and sources included."""
    message = ChatMessage(
        blocks=[
            ThinkingBlock(content="a thought"),
            ThinkingBlock(),
            CitableBlock(
                title="a title", source="a source", content=[TextBlock(text="body"), ImageBlock(image=b"\x89PNG")]
            ),
            CitationBlock(
                cited_content=TextBlock(text="cited"), source="another", title="second", additional_location_info={}
            ),
        ]
    )
    turn = turn_of(message)
    assert turn.text == "a thought\n\na title\na source\nbody\nsecond\nanother\ncited"
    assert turn.media == ("image",)
    result = ToolOutput(tool_name="read", blocks=message.blocks, raw_input={}, raw_output=None)
    assert turn_of_result(result, "read") == Turn("tool", turn.text, name="read", media=("image",))


CALLS = [
    ToolSelection(tool_id="1", tool_name="shell", tool_kwargs={"cmd": "ls"}),
    {"id": "1", "type": "function", "function": {"name": "shell", "arguments": '{"cmd": "ls"}'}},
    {"id": "1", "name": "shell", "args": {"cmd": "ls"}},
    {"id": "1", "type": "tool_use", "name": "shell", "input": {"cmd": "ls"}},
]


@pytest.mark.parametrize("call", CALLS)
def test_reads_the_tool_calls_of_integrations(call: object) -> None:
    """LlamaIndex's, OpenAI's, LangChain's and Anthropic's forms, kept beside the message."""
    message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
    assert turn_of(message).tool_calls == (ToolCall("shell", {"cmd": "ls"}, "1"),)


@pytest.mark.parametrize("arguments", [{"cmd": "ls"}, '{"cmd": "ls"}'])
def test_reads_tool_call_blocks(arguments: dict[str, str] | str) -> None:
    """A tool call in a block, its arguments parsed or not."""
    block = ToolCallBlock(tool_call_id="1", tool_name="shell", tool_kwargs=arguments)
    assert turn_of(ChatMessage(role="assistant", blocks=[block])) == Turn(
        "assistant", "", (ToolCall("shell", {"cmd": "ls"}, "1"),)
    )


@pytest.mark.parametrize(
    "call", ["EVIL", 5, {"surprise": "EVIL"}, {"name": "shell", "surprise": ["EVIL"]}, {"args": ["EVIL"], "name": None}]
)
def test_a_tool_call_in_no_known_form_is_judged_whole(call: object) -> None:
    """What cannot be read as a call is on trial all the same."""
    message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
    trials = [Conversation((part.turn,)).trial for part in parts_of_message(message)]
    assert any(("5" if call == 5 else "EVIL") in trial for trial in trials)


def test_reads_the_older_function_call() -> None:
    """OpenAI's single function_call."""
    call = {"name": "shell", "arguments": '{"cmd": "ls"}'}
    message = ChatMessage(role="assistant", content="", additional_kwargs={"function_call": call})
    assert turn_of(message).tool_calls == (ToolCall("shell", {"cmd": "ls"}),)


def test_names_the_tool_that_answered() -> None:
    """A tool's result carries its name where LlamaIndex has it, which is judged by itself, too."""
    message = ChatMessage(role="tool", content="sunny", additional_kwargs={"name": "weather", "tool_call_id": "1"})
    assert [part.turn for part in parts_of_message(message)] == [
        Turn("tool", "sunny", name="weather"),
        Turn("tool", "weather"),
    ]


def test_an_answer_is_the_assistants() -> None:
    """A response whose message was made without a role is not taken for the user's."""
    for answer in (ChatResponse(message=ChatMessage(content="hi")), CompletionResponse(text="hi")):
        assert [part.turn for part in parts_of_answer(answer)] == [Turn("assistant", "hi")]


def test_a_completion_keeps_its_tool_calls() -> None:
    """A completion made from a chat carries the calls beside it."""
    parts = parts_of_answer(CompletionResponse(text="", additional_kwargs={"tool_calls": CALLS}))
    assert [call for part in parts for call in part.turn.tool_calls] == [ToolCall("shell", {"cmd": "ls"}, "1")] * len(
        CALLS
    )


def test_changes_nothing() -> None:
    """The caller's messages are as they were."""
    messages = [
        ChatMessage(content="hi", additional_kwargs={"name": "me"}),
        ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": copy.deepcopy(CALLS)}),
    ]
    before = copy.deepcopy(messages)
    for message in messages:
        parts_of_message(message)
    assert messages == before
