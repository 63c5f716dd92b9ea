"""What models are asked and answer, taken apart: texts, tool calls and pictures, each judged as what it is."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.tools import ToolOutput

from guardmw import Conversation, ToolCall, Turn
from guardmw.identifiers import LONGEST, is_ciphertext, is_mark, is_name

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from llama_index.core.base.llms.types import ContentBlock

    _Placed = tuple[ToolCall, "Place"]

Channel = tuple["Hashable", ...]
"""Where a part stands; in a stream, parts of one channel belong together."""

Place = tuple[Literal["index", "at"], int | str]
"""By which the pieces of a tool call are known to belong together, where they have no id."""

TEXT: Channel = ("text",)
CALLS: Channel = ("calls",)
MEDIA: Channel = ("media",)
_THINKING: Channel = ("thinking",)
PIECES = (TEXT, _THINKING)
"""What models send piece by piece; other things they send, if more than once, as they are by then."""

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
_ARGUMENTS = ("arguments", "args", "input", "tool_kwargs")
# What stands beside the text of a message: identifiers, which nobody reads, and what is read elsewhere or is a picture.
_CALL_IDS = ("id", "call_id", "tool_call_id", "tool_id")
_MARKS = (
    *_CALL_IDS,
    "response_id",
    "type",
    "block_type",
    "index",
    "status",
    "finish_reason",
    "stop_reason",
)
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
_BESIDE = ("message", "response")
_ELSEWHERE = ("tool_calls", "function_call", "images")


class Part(NamedTuple):
    """One text, the tool calls of one message, or content that cannot be judged.

    Attributes:
        turn: the part alone: text, tool calls or media, never two of them. In a stream, all there is of it so far, or
            only what is new, as the model has it.
        delta: what the stream says is new in the text; None where it says nothing.
        places: of the tool calls, each its own: the index that the stream gives to it, or else where it stands.
    """

    channel: Channel
    turn: Turn
    delta: str | None = None
    places: tuple[Place, ...] = ()


def parts_of_message(message: ChatMessage) -> list[Part]:
    """The parts of a message, with the speaker that it names."""
    return list(_message(message, ROLES[message.role]))


def parts_of_answer(answer: object) -> list[Part]:
    """The parts of what a model answered, or of one chunk of it. Of what is no answer, the policy has to decide."""
    if answer is None:
        return []
    if isinstance(answer, str):
        return [Part(TEXT, Turn("assistant", ""), answer)]
    if isinstance(answer, ChatResponse) and isinstance(answer.message, ChatMessage):
        text = only_text(answer.message)
        if text and answer.delta is None and not answer.additional_kwargs:
            return [Part(TEXT, Turn("assistant", text))]
        return _answer(list(_message(answer.message, "assistant", answered=True)), answer)
    if isinstance(answer, CompletionResponse) and isinstance(answer.text, str):
        return _answer([Part(TEXT, Turn("assistant", answer.text))], answer)
    if isinstance(answer, BaseModel | list):
        # An object is the model's own words, whatever its fields are called.
        return list(_texts(answer, ("object",), "assistant", marks=False))
    return [_unreadable(answer)]


def trials_of(answer: object, context: Sequence[Turn]) -> list[Conversation]:
    """Each part of what a model answered, on trial."""
    trials = []
    for part in parts_of_answer(answer):
        turn = spelled_out(part.turn) if part.turn.tool_calls else part.turn
        # What was not streamed may name as new what it says anyway.
        if part.delta and part.delta not in turn.text:
            turn = Turn(turn.role, turn.text + part.delta, name=turn.name)
        trials.append(Conversation((*context, turn)))
    return trials


def turn_of_result(output: object, name: str) -> Turn:
    """What a tool of this name gave, as a model will read it."""
    if not isinstance(output, ToolOutput):
        return Turn("tool", str(output), name=name)
    parts = parts_of_message(ChatMessage(role=MessageRole.TOOL, blocks=output.blocks))
    return replace(merged(parts), role="tool", name=name) if parts else Turn("tool", name=name)


def only_text(message: ChatMessage) -> str | None:
    """What a message says that is nothing but one text; None for any other."""
    blocks = message.blocks
    if len(blocks) != 1 or type(blocks[0]) is not TextBlock or message.additional_kwargs:
        return None
    return blocks[0].text if type(message) is ChatMessage else None


def object_text(value: object) -> str:
    """An object as its reader may see it: as JSON, and what of it JSON says in another way, or not at all."""
    said = value.model_dump_json() if isinstance(value, BaseModel) else repr(value)
    return "\n".join((said, *(text for _, text in _strings(value, (), marks=False) if text not in said)))


def texts_in(value: object) -> str:
    """All that a value of any shape says, a line for each text."""
    return "\n".join(text for _, text in _strings(value, (), marks=False) if text)


def spelled_out(turn: Turn) -> Turn:
    """A turn with what arguments that do not parse come to all the same: LlamaIndex adds the end that they lack."""
    raw = [call.arguments for call in turn.tool_calls if isinstance(call.arguments, str)]
    plain = [text for text in map(unescaped, raw) if text not in raw]
    return replace(turn, text="\n".join((turn.text, *plain) if turn.text else plain)) if plain else turn


def unescaped(text: str) -> str:
    """The text with the characters of which JSON has the numbers."""
    return _ESCAPES.sub(lambda found: _character(found[0]), text) if "\\u" in text else text


def _character(escapes: str) -> str:
    # Half a pair is no character, and no backend could read it.
    said: str = json.loads(f'"{escapes}"')
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merged(parts: Sequence[Part]) -> Turn:
    """A whole message as the context of others, without what stands beside its blocks."""
    if len(parts) == 1:
        return parts[0].turn
    return Turn(
        next((part.turn.role for part in parts if part.channel != CALLS), "assistant"),
        "\n".join(part.turn.text for part in parts if part.turn.text and part.channel[0] not in _BESIDE),
        tuple(call for part in parts for call in part.turn.tool_calls),
        parts[0].turn.name,
        tuple(kind for part in parts for kind in part.turn.media),
    )


def _answer(parts: list[Part], answer: ChatResponse | CompletionResponse) -> list[Part]:
    """These parts of a chunk, with what the chunk itself says beside its message."""
    beside = answer.additional_kwargs
    if beside:
        parts += _besides(
            {key: value for key, value in beside.items() if key != "thinking_delta"}, "assistant", "response"
        )
        for called in _calls([_beside_calls(beside)], ""):
            _join_calls(parts, called)
    for channel, delta in ((TEXT, answer.delta), (_THINKING, beside.get("thinking_delta"))):
        if delta is None:
            continue
        if not isinstance(delta, str):
            parts.append(_unreadable(delta))
            continue
        at = next((at for at, part in enumerate(parts) if part.channel == channel), None)
        if at is None:
            parts.append(Part(channel, Turn("assistant", ""), delta))
        else:
            parts[at] = Part(channel, parts[at].turn, delta)
    return parts


def _join_calls(parts: list[Part], called: Part) -> None:
    """Add calls to those that a message names, less the ones that it names too."""
    at = next((at for at, part in enumerate(parts) if part.channel == CALLS == called.channel), None)
    if at is None:
        parts.append(called)
        return
    placed = list(zip(parts[at].turn.tool_calls, parts[at].places, strict=True))
    placed += _unknown(zip(called.turn.tool_calls, called.places, strict=True), placed)
    parts[at] = _of_calls(placed, parts[at].turn.name)


def _message(message: ChatMessage, role: Any, *, answered: bool = False) -> Iterator[Part]:  # noqa: ANN401 - one of ROLES
    text = only_text(message)
    if text is None:
        yield from _all_of(message, role, answered=answered)
    elif text:
        yield Part(TEXT, Turn(role, text))


def _all_of(message: ChatMessage, role: Any, *, answered: bool) -> Iterator[Part]:  # noqa: ANN401 - one of ROLES
    """The parts of a message that says more than one text."""
    beside = message.additional_kwargs
    name = str(beside.get("name") or "") if beside else ""
    texts: dict[str, list[str]] = {}
    media: list[str] = []
    calls: list[object] = []
    for at, block in enumerate(message.blocks):
        if block.block_type == "tool_call":
            calls.append(block)
        else:
            _read_block(block, texts.setdefault(block.block_type, []), media)
        if block.block_type == "thinking" and block.additional_information:
            yield from _texts(block.additional_information, ("thinking", at), role, name)
    for kind, pieces in texts.items():
        # LlamaIndex puts every block on a line of its own; in an answer a block may be a piece of a word.
        text, lines = "".join(pieces), "\n".join(pieces)
        if text:
            yield Part((kind,), Turn(role, text if answered else lines, name=name))
        if text and answered and lines != text:
            yield Part((kind, "lines"), Turn(role, lines, name=name))
    if beside:
        yield from _besides(beside, role, "message")
    if type(message) is not ChatMessage:
        # An integration's own, with fields of its own.
        own = {key: value for key, value in message if key not in ChatMessage.model_fields}
        yield from _besides(own, role, "message")
    yield from _calls([calls, _beside_calls(beside)], name)
    if media:
        yield Part(MEDIA, Turn(role, name=name, media=tuple(media)))


def _read_block(block: ContentBlock, texts: list[str], media: list[str]) -> None:
    """Add the texts of a block to these; or, where it is none, its kind to ``media``."""
    if block.block_type == "text":
        texts.append(block.text)
    elif block.block_type == "thinking":
        texts.append(block.content or "")
    elif block.block_type == "citable":
        texts += (block.title, block.source)
        for inner in block.content:
            _read_block(inner, texts, media)
    elif block.block_type == "citation":
        texts += (block.title, block.source)
        _read_block(block.cited_content, texts, media)
    elif block.block_type not in ("tool_call", "cache"):
        # A kind that is not text, or is newer than this code: the verdict will be partial.
        media.append(block.block_type)


def _calls(forms: Sequence[Sequence[object]], name: str) -> Iterator[Part]:
    """Calls that a message may have in several forms: as blocks, and in the provider's own."""
    placed: list[_Placed] = []
    for given in forms:
        placed += _unknown(zip(tool_calls(given), map(_place, given, count()), strict=True), placed)
    if placed:
        yield _of_calls(placed, name)
    for at, call in enumerate(chain.from_iterable(forms)):
        yield from _texts(_beside_arguments(call), ("call", at), "assistant", name)


def _of_calls(placed: Sequence[_Placed], name: str) -> Part:
    calls, places = zip(*placed, strict=True)
    return Part(CALLS, Turn("assistant", tool_calls=calls, name=name), places=places)


def _unknown(placed: Iterable[_Placed], known: Sequence[_Placed]) -> list[_Placed]:
    """Those of these calls that are not among others."""
    said = {(call.id, str(call)) for call, _ in known}
    return [(call, place) for call, place in placed if (call.id, str(call)) not in said]


def _place(call: object, at: int) -> Place:
    index = call.get("index") if isinstance(call, Mapping) else getattr(call, "index", None)
    return ("index", index) if isinstance(index, int | str) else ("at", at)


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
    arguments = next((call[key] for key in _ARGUMENTS if key in call), dict(call))
    return {
        "name": str(call.get("name") or call.get("tool_name") or ""),
        "arguments": arguments if isinstance(arguments, str | Mapping) else str(arguments),
        "id": call.get("id") or call.get("tool_id") or call.get("tool_call_id"),
    }


def _beside_arguments(call: object) -> object:
    """What a call says besides its name and its arguments."""
    said = call.model_dump() if isinstance(call, BaseModel) else call
    if not isinstance(said, Mapping):
        return None
    inner = said.get("function")
    said = {**said, **inner} if isinstance(inner, Mapping) else said
    return {key: item for key, item in said.items() if key not in (*_ARGUMENTS, "name", "tool_name", "function")}


def _beside_calls(beside: Mapping[str, Any]) -> list[object]:
    calls = beside.get("tool_calls") or ()
    # OpenAI's form before there were several calls in a turn.
    older = beside.get("function_call")
    return [*(calls if isinstance(calls, list | tuple) else [calls]), *([older] if older else [])]


def _besides(beside: Mapping[str, Any], role: Any, where: str) -> Iterator[Part]:  # noqa: ANN401 - one of ROLES
    read = {key: value for key, value in beside.items() if key not in _ELSEWHERE}
    yield from _texts(read, (where,), role)


def _texts(value: object, path: Channel, role: Any, name: str = "", *, marks: bool = True) -> Iterator[Part]:  # noqa: ANN401 - one of ROLES
    """A part for every text in a value, and for what is too deep to be read."""
    try:
        for at, text in _strings(value, path, marks=marks):
            if text:
                yield Part(at, Turn(role, text, name=name))
    except RecursionError:
        yield Part(MEDIA, Turn(role, name=name, media=(type(value).__name__,)))


def _strings(  # noqa: C901 - a branch for each kind of value
    value: object, path: Channel, *, marks: bool = True, within: frozenset[int] = frozenset()
) -> Iterator[tuple[Channel, str]]:
    """Every text in a value, but for identifiers (``marks``); keys too, where they are text rather than names.

    What leads back to a value that it is in, whose id is ``within``, has no more to say.
    """
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, bytes | bytearray | memoryview):
        yield path, bytes(value).decode("utf-8", "replace")
    elif id(value) in within:
        return
    elif isinstance(value, Mapping):
        keys = [key for key in value if not isinstance(key, str) or not is_name(key)]
        if keys:
            yield (*path, None), "\n".join(key if isinstance(key, str) else texts_in(key) for key in keys)
        for key, item in value.items():
            if not (marks and _is_mark(key, item)):
                yield from _strings(item, (*path, key), marks=marks, within=within | {id(value)})
    elif isinstance(value, Sequence | AbstractSet):
        for at, item in enumerate(value):
            yield from _strings(item, (*path, at), marks=marks, within=within | {id(value)})
    elif (opened := _opened(value)) is not None:
        if words := _own_words(value):
            yield path, words
        yield from _strings(opened, path, marks=marks, within=within | {id(value)})
    elif value is not None and not isinstance(value, bool | int | float):
        # Of no kind that is known: what it shows of itself, as whoever prints it would see.
        yield path, str(value)


def _opened(value: object) -> object:
    """What is in an object that has more than it shows when it is printed; None for any other."""
    if isinstance(value, BaseModel):
        return {**dict(value), **(value.model_extra or {})}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in fields(value)}
    # Long arrays and tables leave their middle out.
    for name in ("tolist", "to_dict"):
        with suppress(Exception):
            if isinstance(held := getattr(value, name)(), list | Mapping):
                return held
    return None


def _own_words(value: object) -> str:
    """What an object shows of itself when it is printed, unless that is its fields and nothing else."""
    kind, said = type(value), str(value)
    if isinstance(value, BaseModel):
        listed = [getattr(kind, name) is getattr(BaseModel, name) for name in ("__repr_str__", "__repr_args__")]
        generated = not type(value).model_computed_fields and all(listed)
        # OpenAI's own print themselves in the second way.
        return "" if generated and said in (BaseModel.__str__(value), BaseModel.__repr__(value)) else said
    # Nothing but its place tells a __repr__ that was made for a dataclass: it is in no file.
    code = getattr(inspect.unwrap(kind.__repr__), "__code__", None)
    generated = is_dataclass(value) and code is not None and code.co_filename == "<string>"
    return "" if generated and kind.__str__ is object.__str__ else said


def is_short_mark(item: object) -> bool:
    """Whether it is one word that a machine gives, where machines give no longer ones."""
    return is_mark(item) and len(str(item)) <= LONGEST


def _is_mark(key: object, item: object) -> bool:
    """Whether it is what a machine gives, where machines give that."""
    if isinstance(key, str) and "signature" in key:
        return isinstance(item, bytes) or (isinstance(item, str) and is_ciphertext(item))
    # Proxies hang a signature onto the ids of calls, and onto nothing else.
    return key in _MARKS and (is_mark(item) if key in _CALL_IDS else is_short_mark(item))


def _unreadable(value: object) -> Part:
    """Nobody can tell what it says, so that the policy has to."""
    return Part(MEDIA, Turn("assistant", media=(type(value).__name__,)))
