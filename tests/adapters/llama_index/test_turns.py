"""Every block, tool call and node that a model reads or writes is in its turn."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.callbacks.guardmw._turns import turn_of_answer, turn_of_node, turns_of
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
from llama_index.core.schema import ImageNode, MediaResource, Node, NodeWithScore, TextNode

from guardmw import Conversation, ToolCall, Turn


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
    assert turns_of([ChatMessage(role=role, content="hi")]) == (Turn(read_as, "hi"),)  # type: ignore[arg-type]


def test_the_roles_tested_are_all_there_are() -> None:
    """A role that LlamaIndex adds is noticed here."""
    assert len(MessageRole) == 8


def test_reads_a_role_that_was_assigned_as_a_str() -> None:
    """LlamaIndex does not validate an assigned role, and neither does it matter."""
    message = ChatMessage(content="hi")
    message.role = "assistant"  # type: ignore[assignment]
    assert turns_of([message]) == (Turn("assistant", "hi"),)


@given(st.lists(st.text()))
def test_text_is_what_llama_index_calls_the_content(texts: list[str]) -> None:
    """The text of a message's text blocks is its content, to the character."""
    message = ChatMessage(blocks=[TextBlock(text=text) for text in texts])
    assert turns_of([message])[0].text == (message.content or "")


def test_names_what_is_not_text() -> None:
    """An image is named as media, so that the verdict is partial."""
    message = ChatMessage(blocks=[TextBlock(text="what is this?"), ImageBlock(image=b"\x89PNG")])
    assert turns_of([message]) == (Turn("user", "what is this?", media=("image",)),)


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
    (turn,) = turns_of([message])
    assert turn.text.split("\n") == ["a thought", "", "a title", "a source", "body", "second", "another", "cited"]
    assert turn.media == ("image",)


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
    (turn,) = turns_of([message])
    assert turn.tool_calls == (ToolCall("shell", {"cmd": "ls"}, "1"),)


@pytest.mark.parametrize("arguments", [{"cmd": "ls"}, '{"cmd": "ls"}'])
def test_reads_tool_call_blocks(arguments: dict[str, str] | str) -> None:
    """A tool call in a block, its arguments parsed or not."""
    block = ToolCallBlock(tool_call_id="1", tool_name="shell", tool_kwargs=arguments)
    (turn,) = turns_of([ChatMessage(role="assistant", blocks=[block])])
    assert turn == Turn("assistant", "", (ToolCall("shell", {"cmd": "ls"}, "1"),))


@pytest.mark.parametrize(
    "call", ["EVIL", 5, {"surprise": "EVIL"}, {"name": "shell", "surprise": ["EVIL"]}, {"args": ["EVIL"], "name": None}]
)
def test_a_tool_call_in_no_known_form_is_judged_whole(call: object) -> None:
    """What cannot be read as a call is on trial all the same."""
    message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
    trial = Conversation(turns_of([message])).trial
    assert ("5" if call == 5 else "EVIL") in trial


def test_reads_the_older_function_call() -> None:
    """OpenAI's single function_call."""
    call = {"name": "shell", "arguments": '{"cmd": "ls"}'}
    (turn,) = turns_of([ChatMessage(role="assistant", content="", additional_kwargs={"function_call": call})])
    assert turn.tool_calls == (ToolCall("shell", {"cmd": "ls"}),)


def test_names_the_tool_that_answered() -> None:
    """A tool's result carries its name where LlamaIndex has it."""
    message = ChatMessage(role="tool", content="sunny", additional_kwargs={"name": "weather", "tool_call_id": "1"})
    assert turns_of([message]) == (Turn("tool", "sunny", name="weather"),)


def test_an_answer_is_the_assistants() -> None:
    """A response whose message was made without a role is not taken for the user's."""
    assert turn_of_answer(ChatResponse(message=ChatMessage(content="hi"))) == Turn("assistant", "hi")
    assert turn_of_answer(CompletionResponse(text="hi")) == Turn("assistant", "hi")


def test_a_completion_keeps_its_tool_calls() -> None:
    """A completion made from a chat carries the calls beside it."""
    answer = turn_of_answer(CompletionResponse(text="", additional_kwargs={"tool_calls": CALLS}))
    assert answer.tool_calls == (ToolCall("shell", {"cmd": "ls"}, "1"),) * len(CALLS)


def test_changes_nothing() -> None:
    """The caller's messages are as they were."""
    messages = [
        ChatMessage(content="hi", additional_kwargs={"name": "me"}),
        ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": copy.deepcopy(CALLS)}),
    ]
    before = copy.deepcopy(messages)
    turns_of(messages)
    assert messages == before


def test_a_node_is_read_with_the_metadata_its_reader_sees() -> None:
    """Text and metadata for LLMs are judged; metadata kept from LLMs is not."""
    node = TextNode(
        id_="n1", text="body", metadata={"title": "EVIL", "path": "hidden"}, excluded_llm_metadata_keys=["path"]
    )
    turn = turn_of_node(NodeWithScore(node=node))
    assert (turn.role, turn.name, turn.media) == ("document", "n1", ())
    assert "EVIL" in turn.text
    assert "body" in turn.text
    assert "hidden" not in turn.text


@pytest.mark.parametrize(
    ("node", "media"),
    [
        (ImageNode(text="a caption", image_url="u"), ("image",)),
        (Node(text_resource=MediaResource(text="a caption"), audio_resource=MediaResource(data=b"x")), ("audio",)),
    ],
)
def test_a_node_that_is_more_than_text_says_so(node: Node, media: tuple[str, ...]) -> None:
    """Images, audio and video of a node make its verdict partial."""
    turn = turn_of_node(NodeWithScore(node=node))
    assert (turn.text, turn.media) == ("a caption", media)
