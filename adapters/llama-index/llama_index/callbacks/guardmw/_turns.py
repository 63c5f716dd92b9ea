"""What LlamaIndex hands to models and gets from them, read as turns; none of it is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.schema import BaseNode, ImageNode, IndexNode, MetadataMode, NodeWithScore
from llama_index.core.tools import ToolOutput

from guardmw import Conversation, ToolCall, Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.base.llms.types import ChatMessage, ContentBlock

ROLES: dict[str, Literal["system", "user", "assistant", "tool"]] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
# Where the integrations of OpenAI, Anthropic and LlamaIndex itself keep the arguments of a tool call.
ARGUMENTS = ("arguments", "args", "input", "tool_kwargs")


def turns_of(messages: Sequence[ChatMessage]) -> tuple[Turn, ...]:
    """The turns of a chat."""
    return tuple(map(_turn_of_message, messages))


def turn_of_answer(response: ChatResponse | CompletionResponse) -> Turn:
    """What a model answered, as the assistant's turn: a ChatMessage without a role would be the user's."""
    plain = only_text(response.message) if isinstance(response, ChatResponse) else None
    if isinstance(response, CompletionResponse) and not response.additional_kwargs:
        plain = response.text
    if plain is not None:
        return Turn("assistant", plain)
    if isinstance(response, CompletionResponse):
        return _turn(MessageRole.ASSISTANT, [TextBlock(text=response.text)], response.additional_kwargs)
    return _turn(MessageRole.ASSISTANT, response.message.blocks, response.message.additional_kwargs)


def turn_of_result(output: object, name: str) -> Turn:
    """What a tool of this name gave, as a model will read it."""
    if not isinstance(output, ToolOutput):
        return Turn("tool", str(output), name=name)
    return _turn(MessageRole.TOOL, output.blocks, {"name": name})


def turn_of_node(node: NodeWithScore) -> Turn:
    """A retrieved node as a model will read it, with the metadata that it is shown, and with what it leads to."""
    text = node.get_content(MetadataMode.LLM)
    kinds = [kind for kind in ("image", "audio", "video") if getattr(node.node, f"{kind}_resource", None)]
    if isinstance(node.node, ImageNode):
        kinds.append("image")
    behind = node.node.obj if isinstance(node.node, IndexNode) else None
    if isinstance(behind, BaseNode):
        behind = NodeWithScore(node=behind)
    if isinstance(behind, NodeWithScore):
        turn = turn_of_node(behind)
        text, kinds = f"{text}\n{turn.text}", [*kinds, *turn.media]
    elif isinstance(behind, str):
        text = f"{text}\n{behind}"
    elif behind is not None:
        # What an engine or a retriever will say nobody can tell before it is asked.
        kinds.append(type(behind).__name__)
    return Turn("document", text, name=node.node_id, media=tuple(kinds))


def only_text(message: ChatMessage) -> str | None:
    """What a message says that is nothing but one text; None for any other."""
    blocks = message.blocks
    return (
        blocks[0].text if len(blocks) == 1 and type(blocks[0]) is TextBlock and not message.additional_kwargs else None
    )


def _turn_of_message(message: ChatMessage) -> Turn:
    text = only_text(message)
    if text is None:
        return _turn(message.role, message.blocks, message.additional_kwargs)
    return Turn(ROLES[message.role], text)


def _turn(role: str, blocks: Sequence[ContentBlock], extra: Mapping[str, Any]) -> Turn:
    texts: list[str] = []
    media: list[str] = []
    for block in blocks:
        read_block(block, texts, media)
    calls: list[object] = [block for block in blocks if block.block_type == "tool_call"]
    calls += extra.get("tool_calls") or ()
    # OpenAI's form before there were several calls in a turn.
    if extra.get("function_call"):
        calls.append(extra["function_call"])
    return Turn(ROLES[role], "\n".join(texts), tool_calls(calls), str(extra.get("name") or ""), tuple(media))


def read_block(block: ContentBlock, texts: list[str], media: list[str]) -> None:
    """Add the texts of a block to these; or, where it is none, its kind to ``media``."""
    if block.block_type == "text":
        texts.append(block.text)
    elif block.block_type == "thinking":
        texts.append(block.content or "")
    elif block.block_type == "citable":
        texts += (block.title, block.source)
        for inner in block.content:
            read_block(inner, texts, media)
    elif block.block_type == "citation":
        texts += (block.title, block.source)
        read_block(block.cited_content, texts, media)
    elif block.block_type not in ("tool_call", "cache"):
        # A kind that is not text, or is newer than this code: the verdict will be partial.
        media.append(block.block_type)


def tool_calls(given: Sequence[object]) -> tuple[ToolCall, ...]:
    """The tool calls in any of the forms that models give them."""
    if not given:
        return ()
    return Conversation.of({"role": "assistant", "tool_calls": list(map(_tool_call, given))}).last.tool_calls


def _tool_call(given: object) -> dict[str, Any]:
    """A tool call in the form guardmw reads. What is in no known form is judged whole, as its arguments."""
    call = given.model_dump() if isinstance(given, BaseModel) else given
    if not isinstance(call, Mapping):
        return {"name": "", "arguments": str(call)}
    if isinstance(call.get("function"), Mapping):
        call = {**call, **call["function"]}
    arguments = next((call[key] for key in ARGUMENTS if key in call), dict(call))
    return {
        "name": str(call.get("name") or call.get("tool_name") or ""),
        "arguments": arguments if isinstance(arguments, str | Mapping) else str(arguments),
        "id": call.get("id") or call.get("tool_id") or call.get("tool_call_id"),
    }
