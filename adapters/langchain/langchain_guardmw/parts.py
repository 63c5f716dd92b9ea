"""What a LangChain value says: every text, tool call and picture in it, with who says it and where it stands."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import date, time, timedelta
from enum import Enum
from hashlib import blake2b
from numbers import Number
from operator import is_
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.messages.base import TextAccessor
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompt_values import ImagePromptValue, PromptValue
from langchain_core.runnables import AddableDict
from pydantic import BaseModel

from guardmw import Conversation, ConversationError, ToolCall, Turn
from guardmw.identifiers import is_ciphertext, is_mark, is_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guardmw.conversation import Role, Stage

Kind = tuple[str, ...]
"""What kind of text in a message it is, as the keys that lead to it."""

Channel = tuple[Hashable, ...]
"""The way to a part: keys and positions, a Kind or a Beside."""


class Beside(Enum):
    """What stands beside the texts of a value; no key can be mistaken for it."""

    ARTIFACT = "artifact"
    CALLS = "calls"
    KEYS = "keys"
    MEDIA = "media"
    METADATA = "metadata"


# A backend reads the user's last turn, a guard model a few more; a verdict's cost must not grow with the history.
CONTEXT_TURNS = 10

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}
_SPEAKERS: dict[Stage, Role] = {
    "input": "user",
    "output": "assistant",
    "tool_result": "tool",
    "document": "document",
}
# Numbers, dates and identifiers carry no message.
_BYTES = (bytes, bytearray, memoryview)
_WORDLESS = (type(None), Number, date, time, timedelta, UUID)
# Beside the text, providers put identifiers, which nobody reads.
_MARKS = frozenset({"id", "call_id", "tool_call_id", "type", "index", "status", "mime_type"})
_MEDIA = ("image", "audio", "video", "file", "document", "media")
# Where providers put the arguments of a call; what has streamed is in the last, and the others are empty.
_ARGUMENTS = ("input", "args", "arguments", "partial_json")
_TEXT: Kind = ("text",)
# One name for what every provider calls differently.
_KINDS: dict[Kind, Kind] = {
    ("text", "text"): _TEXT,
    ("input_text", "text"): _TEXT,
    ("output_text", "text"): _TEXT,
    ("reasoning", "reasoning"): ("reasoning",),
    ("thinking", "thinking"): ("reasoning",),
    ("reasoning_content",): ("reasoning",),
}
# Where in what a model said its provider puts ciphertext; anywhere else it is whoever wrote the JSON.
_CIPHERS: frozenset[Kind] = frozenset(
    {
        ("thinking", "signature"),
        ("reasoning", "signature"),
        ("reasoning", "encrypted_content"),
        ("reasoning", "reasoning", "encrypted_content"),
        ("reasoning_content", "reasoning_content", "signature"),
        ("redacted_thinking", "data"),
        ("web_search_tool_result", "content", "web_search_result", "encrypted_content"),
        *((kind, "extras", "signature") for kind in ("text", "reasoning", "tool_call", "function_call")),
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """One text, the tool calls of one message, or content that cannot be judged.

    Attributes:
        channel: where it stands. In a stream, parts of one channel belong together.
        turn: the part alone: text, tool calls (of which some may be unreadable, as media) or media.
        context: the turns before it.
        delta: it continues its channel; otherwise it is all that the channel has come to.
        plain: text that nobody is known to have spoken; the turn takes it for a user's.
    """

    channel: Channel
    turn: Turn
    context: tuple[Turn, ...] = ()
    delta: bool = False
    plain: bool = False

    @property
    def conversation(self) -> Conversation:
        """The part on trial, in its context."""
        turn = self.turn
        if turn.tool_calls:
            turn = replace(turn, tool_calls=joined(turn.tool_calls))
        return Conversation((*self.context, turn))


def parts(value: object, stage: Stage | None = None) -> list[Part]:
    """All there is to judge in a value; ``stage`` is that of text which nobody is known to have spoken."""
    try:
        return list(_walk(value, (), stage, delta=True))
    except RecursionError:
        return [_unreadable(value, (), stage)]


def spoken(message: BaseMessage) -> tuple[list[Part], Turn]:
    """The parts of one message, as if nothing came before it, and all of it as the context of others."""
    try:
        found = list(_message(message, ()))
    except RecursionError:
        found = [_unreadable(message, (), None)]
    return found, _turn(message, found)


def unsaid(value: object, said: Iterable[str]) -> list[Part]:
    """What an object that was made of an answer says beyond these texts of it: what JSON escapes stand for."""
    texts = [text for text in said if text]
    # What nobody can read in it is some of those texts, unless they are not all that they seem.
    seen = bool(texts) and not any("\\" in text for text in texts)
    return [
        part
        for part in parts(value, "output")
        if not (any(part.turn.text in text for text in texts) if part.turn.text else seen)
    ]


def is_plain(message: BaseMessage) -> bool:
    """Whether it says nothing but one text, in its name and its role."""
    # Asked for at every turn of an agent, again and again: of the usual classes only what they have.
    fields = message.__dict__
    if type(fields["content"]) is not str or fields["additional_kwargs"] or message.__pydantic_extra__:
        return False
    if (id_ := fields.get("id")) is not None and not is_mark(id_):
        return False
    kind = type(message)
    if kind is HumanMessage:
        return True
    if fields.get("tool_calls") or fields.get("invalid_tool_calls"):
        return False
    return kind is AIMessage or not (
        fields.get("artifact") is not None
        or fields.get("tool_call_chunks")
        or not is_role(fields.get("role", "user"))
        or not is_mark(fields.get("tool_call_id"))
    )


def as_mark(id_: str | None) -> str | None:
    """An id that may stand in the place of this one: itself where it is a mark, else always the same other."""
    if id_ is None or is_mark(id_):
        return id_
    return blake2b(id_.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def is_role(word: object) -> bool:
    """Whether it is a word for one of those who speak; another may be anybody's text."""
    return word in _ROLES


def within(context: tuple[Turn, ...], conversation: Conversation) -> Conversation:
    """The conversation as the end of a longer one."""
    return Conversation((*context, *conversation.turns)) if context else conversation


def said(text: str, stage: Stage) -> Turn:
    """A text as a turn at this stage."""
    if stage == "tool_call":
        return Turn("assistant", "", (ToolCall("", text),))
    return Turn(_SPEAKERS[stage], text)


def called(calls: Iterable[ToolCall], name: str = "") -> Turn:
    """Calls as a turn; what in their arguments cannot be read makes a verdict partial."""
    given = tuple(calls)
    read = tuple(map(_legible, given))
    return Turn("assistant", "", read, name, () if all(map(is_, read, given)) else ("arguments",))


def _legible(call: ToolCall) -> ToolCall:
    try:
        str(call)
    except ConversationError:
        texts = (part.turn.text for part in parts(call.arguments))
        return replace(call, arguments="\n".join(filter(None, texts)))
    return call


def joined(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Put the pieces of streamed tool calls together; arguments in escaped JSON are there a second time, unescaped."""
    whole: dict[str, ToolCall] = {}
    done = []
    for call in calls:
        if not isinstance(call.arguments, str):
            done.append(call)
            continue
        so_far = whole.get(call.id, ToolCall("", "", call.id))
        whole[call.id] = ToolCall(so_far.name + call.name, f"{so_far.arguments}{call.arguments}", call.id)
    return (*done, *whole.values(), *filter(None, map(_unescaped, whole.values())))


def _unescaped(call: ToolCall) -> ToolCall | None:
    if not isinstance(call.arguments, str) or "\\" not in call.arguments:
        return None
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return None
    return replace(call, arguments=arguments if isinstance(arguments, dict) else {"": arguments})


def _walk(value: object, path: Channel, stage: Stage | None, *, delta: bool = False) -> Iterator[Part]:
    if isinstance(value, str):
        yield _text(value, path, stage, delta=delta)
    elif isinstance(value, BaseMessage):
        yield from _message(value, path)
    elif isinstance(value, Document):
        yield from _document(value, path)
    elif isinstance(value, Mapping):
        yield from _mapping(value, path, stage, delta=delta and isinstance(value, AddableDict))
    elif isinstance(value, Sequence | AbstractSet) and not isinstance(value, _BYTES):
        yield from _items(list(value), path, stage)
    elif (opened := _opened(value)) is not value:
        yield from _walk(opened, path, stage)
    elif not isinstance(value, _WORDLESS):
        yield _unreadable(value, path, stage)


def _opened(value: object) -> object:
    """What is in an object whose fields, or whose only value, are its whole meaning; other values as they are."""
    if isinstance(value, ImagePromptValue):
        # Its own message does not say that it is a picture.
        return HumanMessage([{"type": "image_url", "image_url": dict(value.image_url)}])
    if isinstance(value, PromptValue):
        return value.to_messages()
    # A model's own, of which the other fields are provider's data, as response_metadata is.
    if isinstance(value, ChatGeneration):
        return value.message
    if isinstance(value, ChatResult):
        return value.generations
    if isinstance(value, BaseModel):
        computed = {name: getattr(value, name) for name in type(value).model_computed_fields}
        return {**dict(value), **computed, **_own_words(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)} | _own_words(value)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value


def _own_words(value: object) -> dict[str, str]:
    """What a prompt would say of an object whose class has made that up itself."""
    own = type(value).__str__ not in (BaseModel.__str__, object.__str__)
    return {"__str__": str(value)} if own else {}


def _text(text: str, path: Channel, stage: Stage | None, *, delta: bool) -> Part:
    if stage is not None:
        return Part(path, said(text, stage), delta=delta)
    # What a message's text, or a parser behind a model, comes as.
    if isinstance(text, TextAccessor):
        return Part(path, Turn("assistant", text), delta=delta)
    return Part(path, Turn("user", text), delta=delta, plain=True)


def _unreadable(value: object, path: Channel, stage: Stage | None) -> Part:
    """Nobody can tell what it says, so that the policy has to."""
    return Part(
        (*path, Beside.MEDIA), Turn(_SPEAKERS.get(stage or "input", "assistant"), media=(type(value).__name__,))
    )


def _document(document: Document, path: Channel) -> Iterator[Part]:
    """Content and metadata as one text: prompts show both."""
    noted = list(_walk(document.metadata, (*path, Beside.METADATA), "document"))
    words = filter(None, (document.page_content, *(part.turn.text for part in noted)))
    yield Part(path, Turn("document", "\n".join(words), name=str(document.metadata.get("source") or "")))
    yield from (part for part in noted if not part.turn.text)


def _mapping(value: Mapping[Any, Any], path: Channel, stage: Stage | None, *, delta: bool = False) -> Iterator[Part]:
    message = _as_message(value)
    if message:
        yield from _message(message, path)
        return
    keys = [key for key in value if isinstance(key, str) and not is_name(key)]
    if keys:
        yield from _walk("\n".join(keys), (*path, Beside.KEYS), stage)
    for key, item in value.items():
        if not isinstance(key, str):
            yield from _walk(key, (*path, Beside.KEYS, key), stage)
        yield from _walk(item, (*path, key), stage, delta=delta)


def _items(items: Sequence[object], path: Channel, stage: Stage | None) -> Iterator[Part]:
    messages = _as_messages(items)
    if messages:
        yield from _messages(messages, path)
        return
    for at, item in enumerate(items):
        yield from _walk(item, (*path, at), stage)


def _as_messages(items: Sequence[object]) -> list[BaseMessage] | None:
    """The items as messages, if that is what they are: a str is one only among others that are more clearly so."""
    messages = [_as_message(item) for item in items]
    if not any(messages):
        return None
    read = [
        message or (HumanMessage(item) if isinstance(item, str) else None)
        for message, item in zip(messages, items, strict=True)
    ]
    # Not one is lost by this: where one is no message, none is.
    return [message for message in read if message] if all(read) else None


def _as_message(value: object) -> BaseMessage | None:
    if isinstance(value, BaseMessage):
        return value
    if isinstance(value, Mapping):
        role = value.get("role", value.get("type")) if "content" in value else None
        value = dict(value)
    else:
        role = value[0] if isinstance(value, tuple | list) and len(value) == 2 else None  # noqa: PLR2004 - role, text
    if not isinstance(role, str) or role not in _ROLES:
        return None
    try:
        message = convert_to_messages([value])[0]  # type: ignore[list-item] # what it is not, it raises for
    except Exception:  # noqa: BLE001 - it looked like a message, and is walked as what it is
        return None
    if isinstance(value, dict) and value.get("response_metadata"):
        # Of a message it is its provider's, of a dict whoever wrote that; the message is ours.
        noted = _strings(value["response_metadata"], _role(message))
        words = [text for _, text in noted if text]
        message.additional_kwargs["response_metadata"] = "\n".join(words)
    return message


def _messages(messages: Sequence[BaseMessage], path: Channel) -> Iterator[Part]:
    before: tuple[Turn, ...] = ()
    for at, message in enumerate(messages):
        found = list(_message(message, (*path, at), before))
        yield from found
        before = (*before, _turn(message, found))[-CONTEXT_TURNS:]


def _turn(message: BaseMessage, found: Sequence[Part]) -> Turn:
    """A whole message as the context of others."""
    if len(found) == 1 and found[0].channel[-1] == _TEXT:
        return found[0].turn
    return Turn(
        _role(message),
        "".join(part.turn.text for part in found if part.channel[-1] == _TEXT),
        joined(call for part in found for call in part.turn.tool_calls),
        message.name or "",
        tuple(kind for part in found for kind in part.turn.media),
    )


def _role(message: BaseMessage) -> Role:
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool"
    if isinstance(message, ChatMessage):
        return _ROLES.get(message.role, "user")
    return "user"


def _message(message: BaseMessage, path: Channel, context: tuple[Turn, ...] = ()) -> Iterator[Part]:
    name = message.name or ""
    if not is_plain(message) or (name and not is_name(name)):
        yield from _all_of(message, path, context)
    elif message.content:
        turn = Turn(_role(message), str(message.content), name=name)
        yield Part((*path, _TEXT), turn, context, delta=isinstance(message, BaseMessageChunk))


def _all_of(message: BaseMessage, path: Channel, context: tuple[Turn, ...]) -> Iterator[Part]:
    """The parts of a message that says more than one text."""
    role, name, delta = _role(message), message.name or "", isinstance(message, BaseMessageChunk)
    calls = tuple(_calls(message))
    texts: dict[Kind, list[str]] = {}
    media: list[str] = []
    for kind, text in _said(message, calls):
        if text is None:
            media.append(str(kind[-1]))
        elif text:
            texts.setdefault(kind, []).append(text)
    for kind, pieces in texts.items():
        yield Part((*path, kind), Turn(role, "".join(pieces), name=name), context, delta=delta)
    if calls:
        yield Part((*path, Beside.CALLS), called(calls, name), context, delta=delta)
    if media:
        yield Part((*path, Beside.MEDIA), Turn(role, "", (), name, tuple(media)), context, delta=delta)
    artifact = message.__dict__.get("artifact")
    if artifact is not None:
        for part in _walk(artifact, (*path, Beside.ARTIFACT), "tool_result"):
            yield replace(part, context=context)


def _said(message: BaseMessage, calls: Sequence[ToolCall]) -> Iterator[tuple[Kind, str | None]]:
    """The strings of a message, without those that say once more what its calls say."""
    besides = {
        # An answer in sound comes as {"audio": {"data": …, "transcript": …}}.
        key: {"type": key, **value} if key in _MEDIA and isinstance(value, Mapping) else value
        for key, value in message.additional_kwargs.items()
        if key != "function_call" or not isinstance(value, Mapping)
    }
    content: object = message.content
    if calls:
        content = _uncopied(content, calls)
        besides = {key: _uncopied(value, calls) if key == "tool_calls" else value for key, value in besides.items()}
    for said in (content, besides, message.model_extra or {}):
        yield from _strings(said, _role(message))
    if message.name and not is_name(message.name):
        yield ("name",), message.name
    if not is_role(title := message.__dict__.get("role", "user")):
        yield ("role",), str(title)
    ids = dict.fromkeys(str(id_) for id_ in _ids(message) if not is_mark(id_))
    if ids:
        yield ("id",), "\n".join(ids)


def _ids(message: BaseMessage) -> Iterator[object]:
    """Its own, that of the call that it answers, and those of its calls."""
    fields = message.__dict__
    yield fields.get("id")
    yield fields.get("tool_call_id")
    for calls in ("tool_calls", "invalid_tool_calls", "tool_call_chunks"):
        for call in fields.get(calls) or ():
            yield call.get("id")


def _calls(message: BaseMessage) -> Iterator[ToolCall]:
    pieces = message.tool_call_chunks if isinstance(message, AIMessageChunk) else []
    known: list[ToolCall] = []
    for piece in pieces:
        index = piece.get("index")
        id_ = piece.get("id") if index is None else index
        known.append(ToolCall(piece.get("name") or "", piece.get("args") or "", str(id_)))
    if isinstance(message, AIMessage) and not pieces:
        known += [ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls]
        known += [ToolCall(bad["name"] or "", bad["args"] or "", bad["id"] or "") for bad in message.invalid_tool_calls]
    yield from known
    if not pieces and not isinstance(message.content, str) and _role(message) == "assistant":
        yield from _calls_in_blocks(message, known)
    legacy = message.additional_kwargs.get("function_call")
    if isinstance(legacy, Mapping):
        call = ToolCall(str(legacy.get("name") or ""), str(legacy.get("arguments") or ""), "function_call")
        # Where there were several, streaming has put their names and their arguments in a row.
        names = (*(one.name for one in known), "".join(one.name for one in known))
        if call.name not in names or not _is_copy(call.arguments, known):
            yield call


def _calls_in_blocks(message: BaseMessage, known: Sequence[ToolCall]) -> Iterator[ToolCall]:
    """Calls that stand among a message's content, as providers write them, and not among its tool calls."""
    for block in message.content or ():
        if not isinstance(block, Mapping) or not _is_call(block):
            continue
        given = (block[key] for key in _ARGUMENTS if block.get(key) and isinstance(block[key], str | Mapping))
        arguments: str | Mapping[str, Any] = next(given, {})
        if not _is_copy(arguments, [call for call in known if call.name == block["name"]]):
            yield ToolCall(block["name"], arguments, str(block.get("id") or block.get("call_id") or ""))


def _uncopied(value: object, calls: Sequence[ToolCall]) -> object:
    """Blocks without what they say of these calls once more, which is judged as a call, and not as text."""
    if isinstance(value, list):
        return [_uncopied(one, calls) for one in value]
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("function"), Mapping):
        return {**value, "function": _uncopied(value["function"], calls)}
    names = [call.name for call in calls]
    return {
        key: item
        for key, item in value.items()
        if not ((key == "name" and item in names) or (key in _ARGUMENTS and _is_copy(item, calls)))
    }


def _is_call(block: Mapping[Any, Any]) -> bool:
    kind = block.get("type")
    return isinstance(kind, str) and kind.endswith(("tool_use", "_call")) and isinstance(block.get("name"), str)


def _is_copy(arguments: object, calls: Sequence[ToolCall]) -> bool:
    """Whether these are the arguments of one of these calls, or of several in a row."""
    given = [call.arguments for call in calls]
    if arguments in given:
        return True
    objects = [one for each in given for one in _objects(each)]
    found = _objects(arguments)
    return bool(found) and all(one in objects for one in found)


def _objects(arguments: object) -> list[object]:
    """The objects that arguments are, or spell out in JSON; none where they spell out anything else."""
    if not isinstance(arguments, str):
        return [arguments] if isinstance(arguments, Mapping) else []
    found = []
    rest = arguments.strip()
    try:
        while rest:
            one, end = _DECODER.raw_decode(rest)
            found.append(one)
            rest = rest[end:].lstrip()
    except (ValueError, RecursionError):
        return []
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values of a key only the last is in the object; the other is in the text, and would be in no call.
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _strings(value: object, role: Role, path: Kind = ()) -> Iterator[tuple[Kind, str | None]]:
    """Every string in what somebody said, with its kind; None in place of content that is not text."""
    if isinstance(value, str):
        yield _KINDS.get(path, path or _TEXT), value
    elif isinstance(value, Mapping):
        yield from _block(value, role, path)
    elif isinstance(value, Sequence | AbstractSet) and not isinstance(value, _BYTES):
        for item in value:
            yield from _strings(item, role, path)
    elif (opened := _opened(value)) is not value:
        yield from _strings(opened, role, path)
    elif not isinstance(value, _WORDLESS):
        yield (*path, type(value).__name__), None


def _block(block: Mapping[Any, Any], role: Role, path: Kind) -> Iterator[tuple[Kind, str | None]]:
    kind = block.get("type")
    nested = bool(path)
    keys = [key for key in block if isinstance(key, str) and not is_name(key)]
    if keys:
        yield (*path, "keys"), "\n".join(keys)
    if isinstance(kind, str):
        path = (*path, kind)
        if not kind.endswith("_call") and any(word in kind for word in _MEDIA):
            yield path, None
            block = {key: block[key] for key in ("text", "transcript") if key in block}
    for key, item in block.items():
        if not isinstance(key, str):
            yield from _strings(key, role, (*path, "keys"))
        at = (*path, str(key))
        own = role == "tool" and nested
        if not (isinstance(item, str) and (_is_cipher(at, item, role) or (not own and _is_mark(at[-1], item)))):
            yield from _strings(item, role, at)


def _is_mark(key: str, item: str) -> bool:
    return key in _MARKS and is_mark(item)


def _is_cipher(at: Kind, item: str, role: Role) -> bool:
    """Whether it is ciphertext, where providers put that."""
    return role == "assistant" and at in _CIPHERS and is_ciphertext(item)
