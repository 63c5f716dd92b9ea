"""What is judged: a conversation, whose last turn is on trial and whose earlier turns are its context."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Literal, get_args
from uuid import UUID

from guardmw.errors import ConversationError, nearest

Role = Literal["system", "user", "assistant", "tool", "document"]
Stage = Literal["input", "output", "tool_call", "tool_result", "document"]

ROLES: tuple[Role, ...] = get_args(Role)
STAGES: tuple[Stage, ...] = get_args(Stage)

_STAGE_OF: dict[str, Stage] = {
    "system": "input",
    "user": "input",
    "assistant": "output",
    "tool": "tool_result",
    "document": "document",
}
# The names other libraries give the same speakers.
_ALIASES: dict[str, Role] = {"human": "user", "ai": "assistant", "developer": "system", "function": "tool"}
_TEXT_BLOCKS = ("text", "input_text", "output_text")
# Where providers put text and media beside "content"; whatever else a message holds is metadata, and not judged.
_TEXT_KEYS = ("reasoning_content", "reasoning", "thinking", "refusal")
_MEDIA_KEYS = ("attachments", "audio", "files", "images", "parts", "videos")
_ARGUMENT_KEYS = ("arguments", "args", "input", "parameters")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model wants to make.

    Attributes:
        arguments: by parameter name; or the raw string, where a model wrote arguments that do not parse.
    """

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    id: str = ""

    def __str__(self) -> str:
        arguments = self.arguments if isinstance(self.arguments, str) else _spelled(self.arguments)
        return f"{self.name} {arguments}" if self.name else arguments


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Turn:
    """One message by one speaker.

    Attributes:
        role: system, user, assistant, tool (a tool's result) or document (retrieved text).
        name: of the tool that answered, or of the document's source; it is not judged.
        media: kinds of content that came with the text and that guardmw cannot judge ("image_url", …); a verdict on
            this turn is partial.

    Raises:
        ConversationError: the role is unknown or the text is not a string.
    """

    role: Role
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    media: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            word = _told(self.role)
            raise ConversationError(f"unknown role {repr(word) if word else 'of that kind'}: {nearest(word, ROLES)}")
        if not isinstance(self.text, str):
            raise ConversationError(f"the text of a turn is a str, not {type(self.text).__name__}")
        if self.tool_calls != ():
            _check_all(self.tool_calls, ToolCall, "tool_calls")
        if self.media != ():
            _check_all(self.media, str, "media")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, oldest first. The last is on trial, the earlier ones are its context.

    Raises:
        ConversationError: there is no turn.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ConversationError("a conversation needs at least one turn")
        _check_all(self.turns, Turn, "turns")

    @classmethod
    def of(
        cls, given: str | Turn | Conversation | Mapping[str, Any] | Sequence[Turn | Mapping[str, Any]]
    ) -> Conversation:
        """Read a str (a user turn), a Turn, role/content dicts as chat APIs use them, or a list of either.

        Raises:
            ConversationError: names what is wrong with which turn.
        """
        if isinstance(given, Conversation):
            return given
        if isinstance(given, str):
            return cls((Turn("user", given),))
        if isinstance(given, Turn | Mapping):
            return cls((_turn(given),))
        if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
            raise ConversationError(
                f"cannot read a {type(given).__name__} as a conversation: "
                "give a str, a Turn, a role/content dict, or a list of those",
            )
        turns = []
        for at, one in enumerate(given, 1):
            try:
                turns.append(_turn(one))
            except ConversationError as error:
                raise ConversationError(f"turn {at} of {len(given)}: {error}") from None
        return cls(tuple(turns))

    @property
    def last(self) -> Turn:
        """The turn on trial."""
        return self.turns[-1]

    @property
    def context(self) -> tuple[Turn, ...]:
        """The turns before the last."""
        return self.turns[:-1]

    @property
    def stage(self) -> Stage:
        """The surface that the last turn is."""
        last = self.turns[-1]
        return "tool_call" if last.tool_calls and last.role == "assistant" else _STAGE_OF[last.role]

    @property
    def trial(self) -> str:
        """The whole text on trial: the last turn's text and, line by line, its tool calls as ``name {arguments}``."""
        last = self.turns[-1]
        if not last.tool_calls:
            return last.text
        calls = "\n".join(map(str, last.tool_calls))
        return f"{last.text}\n{calls}" if last.text else calls


def _turn(given: object) -> Turn:
    if isinstance(given, Turn):
        return given
    if not isinstance(given, Mapping):
        raise ConversationError(f"a turn is a Turn or a role/content dict, not {type(given).__name__}")
    if "role" not in given:
        raise ConversationError("a turn needs a role: {'role': 'user', 'content': '…'}")
    role = given["role"]
    if not isinstance(role, str):
        raise ConversationError(f"a role is a str, not {type(role).__name__}")
    calls = [_tool_call(call) for call in _calls(given)]
    if given.get("content") is not None and given.get("text") is not None:
        raise ConversationError("a turn has either 'content' or 'text', not both")
    # OpenAI's form gives a turn that only calls tools the content None.
    content = given.get("text") if given.get("content") is None else given["content"]
    beside = [given[key] for key in _TEXT_KEYS if given.get(key)]
    if content is None and not calls and not beside:
        raise ConversationError("a turn needs content: {'role': 'user', 'content': '…'}")
    read = _Content()
    try:
        for part in (*beside, content):
            read.add(part)
    except RecursionError:
        raise ConversationError("content is nested too deeply to be read") from None
    read.media += [key for key in _MEDIA_KEYS if given.get(key)]
    known = {call.id for call in calls if call.id}
    calls += [call for call in read.calls if call.id not in known]
    # Anthropic's form has the user speak what tools answer.
    speaker = "tool" if read.answers else _ALIASES.get(role, role)
    text, name = "\n".join(read.texts), str(given.get("name") or "")
    return Turn(speaker, text, tuple(calls), name, tuple(read.media))  # type: ignore[arg-type]


def _calls(given: Mapping[str, Any]) -> Sequence[object]:
    """The tool calls of a message: a list, or the single one of OpenAI's older form."""
    calls = given.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise ConversationError(f"tool_calls is a list, not {type(calls).__name__}")
    older = given.get("function_call")
    return [*calls, older] if older else calls


@dataclass(slots=True)
class _Content:
    """What a message's content holds: a str, or typed blocks.

    Attributes:
        answers: some of it is what a tool answered.
    """

    texts: list[str] = field(default_factory=list)
    media: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    answers: bool = False

    def add(self, content: object) -> None:
        if content is None:
            return
        if isinstance(content, str):
            self.texts.append(content)
            return
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
            raise ConversationError(f"content is a str or a list of blocks, not {type(content).__name__}")
        for block in content:
            self._add_block(block)

    def _add_block(self, block: object) -> None:
        if isinstance(block, str):
            self.texts.append(block)
            return
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            raise ConversationError("a content block is a str or a dict with a type: {'type': 'text', 'text': '…'}")
        kind = block["type"]
        if kind in _TEXT_BLOCKS and isinstance(block.get("text"), str):
            self.texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            self.texts.append(block["thinking"])
        elif kind == "tool_use":
            self.calls.append(_tool_call(block))
        elif kind == "tool_result":
            self.answers = True
            self.add(block.get("content"))
        else:
            self.media.append(_told(kind) or "unknown")


def _told(word: object) -> str:
    """A word as a message may repeat it; nothing where it may be text that is to be screened."""
    return word if isinstance(word, str) and word.isidentifier() and len(word) <= 20 else ""  # noqa: PLR2004 - a word


def _check_all(given: object, kind: type, what: str) -> None:
    if not isinstance(given, tuple):
        raise ConversationError(f"{what} is a tuple of {kind.__name__}, not {type(given).__name__}")
    for one in given:
        if not isinstance(one, kind):
            raise ConversationError(f"{what} holds {kind.__name__}, not {type(one).__name__}")


def _spelled(arguments: Mapping[str, Any]) -> str:
    """Arguments as a reader sees them: JSON, but with line breaks and quotes for their escapes, which glue to words."""
    try:
        spelled = json.dumps(dict(arguments), ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        raise ConversationError(
            "the arguments of a tool call are plain JSON values: str keys, no cycles, no deep nesting"
        ) from None
    return unescaped(spelled)


def unescaped(text: str) -> str:
    """JSON text with the characters that its escapes stand for."""
    if "\\" not in text:
        return text
    # A character beyond the first plane is escaped as two halves, which belong together.
    plain = _ESCAPE.sub(lambda match: chr(int(match[1][1:], 16)) if len(match[1]) > 1 else _plainly(match), text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if "\\u" in text else plain


def _plainly(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[1], match[0])


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return list(value)
    if hasattr(value, "tolist"):  # numpy's arrays abbreviate themselves as text
        return value.tolist()
    if isinstance(value, date | time | Decimal | UUID | PurePath):
        return str(value)
    raise TypeError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key comes twice: parsers differ in which they keep."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def loads(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The JSON value of a text.

    Raises:
        ValueError: it is none, is nested too deeply, or has an object with the same key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _tool_call(given: object) -> ToolCall:
    """A ToolCall from OpenAI's form ({"function": {"name", "arguments"}}) or LangChain's ({"name", "args"})."""
    if isinstance(given, ToolCall):
        return given
    if not isinstance(given, Mapping):
        raise ConversationError(f"a tool call is a ToolCall or a dict, not {type(given).__name__}")
    call = given.get("function", given)
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ConversationError("a tool call needs a name: {'name': '…', 'arguments': {…}}")
    holders = (call,) if call is given else (call, given)
    found = [holder[key] for holder in holders for key in _ARGUMENT_KEYS if holder.get(key) is not None]
    if len(found) > 1:
        raise ConversationError("a tool call has its arguments once: {'name': '…', 'arguments': {…}}")
    arguments = found[0] if found else {}
    if isinstance(arguments, str):
        try:
            parsed = loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    if not isinstance(arguments, str | Mapping):
        raise ConversationError(f"a tool call's arguments are a dict or a str, not {type(arguments).__name__}")
    return ToolCall(call["name"], arguments, str(given.get("id") or ""))
