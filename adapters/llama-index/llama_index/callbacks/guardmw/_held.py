"""The chunks of one stream, held until what they say has been judged."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from llama_index.callbacks.guardmw._parts import (
    CALLS,
    MEDIA,
    PIECES,
    TEXT,
    Channel,
    parts_of_answer,
    spelled_out,
    tool_calls,
    unescaped,
)
from llama_index.callbacks.guardmw._verdicts import strictest, tell, withholds
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse

from guardmw import Conversation
from guardmw.stream import Hold

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from llama_index.callbacks.guardmw._parts import Part, Place

    from guardmw import ToolCall, Turn, Verdict

_MARKUP = re.compile(r"[\W_]+")


class Held:
    """Turns chunks into conversations to judge, and verdicts into chunks that may go out.

    Args:
        context: the turns before the stream, which give all of it its meaning.
        reviewed: the names of tools that see to the reviews of their calls.

    Attributes:
        verdict: the first that withholds; no chunk follows those it already lets go.
        shown: the text of the chunks that went out.
    """

    def __init__(self, context: Sequence[Turn], reviewed: Collection[str] = ()) -> None:
        self.verdict: Verdict | None = None
        self.shown = ""
        self._context = tuple(context)
        self._reviewed = reviewed
        self._asked: list[Conversation] = []
        self._hold: Hold[Any, Channel] = Hold()
        self._streams: dict[Channel, _Stream] = {}

    def feed(self, chunk: object) -> list[Conversation]:
        """Take a chunk in; returns what is to be judged now."""
        texts: dict[Channel, str] = {}
        for part in parts_of_answer(chunk):
            if (stream := self._streams.get(part.channel)) is None:
                stream = self._streams[part.channel] = _Stream(in_pieces=part.channel in PIECES)
            if added := stream.add(part):
                texts[part.channel] = texts.get(part.channel, "") + added
        self._hold.feed(_as_it_is(chunk), texts, whole=(CALLS, MEDIA))
        return self._due()

    def end(self) -> list[Conversation]:
        """The stream has ended; returns what is still to be judged."""
        self._hold.end()
        return self._due()

    def take(self, verdicts: Sequence[Verdict]) -> None:
        """The verdicts on what was to be judged, in its order."""
        tell(verdicts)
        left = [
            leaves_review(conversation, verdict, self._reviewed)
            for conversation, verdict in zip(self._asked, verdicts, strict=True)
        ]
        self._hold.take([one or not withholds(verdict) for one, verdict in zip(left, verdicts, strict=True)])
        if self.verdict is None:
            self.verdict = strictest([verdict for one, verdict in zip(left, verdicts, strict=True) if not one])

    def released(self) -> Iterator[Any]:
        """The chunks that may go out."""
        for chunk in self._hold.released():
            self._show(chunk)
            yield chunk

    def _due(self) -> list[Conversation]:
        self._asked = [
            Conversation((*self._context, self._streams[piece.channel].turn(piece.text))) for piece in self._hold.due()
        ]
        return self._asked

    def _show(self, chunk: object) -> None:
        for part in parts_of_answer(chunk):
            if part.channel == TEXT:
                self.shown = part.turn.text if part.delta is None else self.shown + part.delta


def leaves_review(conversation: Conversation, verdict: Verdict, reviewed: Collection[str]) -> bool:
    """Whether a verdict is only that calls want a review, to which their tools see themselves."""
    calls = conversation.last.tool_calls
    return verdict.action == "review" and bool(calls) and all(call.name in reviewed for call in calls)


class _Stream:
    """What one channel has come to.

    Args:
        in_pieces: it may be all that a chunk adds, and not the state of something.

    Attributes:
        text: all that was given to be judged.
    """

    def __init__(self, *, in_pieces: bool) -> None:
        self.text = ""
        self._in_pieces = in_pieces
        self._said = ""
        self._last = ""
        self._grew = False
        self._calls: list[ToolCall] = []
        self._rest: list[str] = []
        self._pieces: dict[str | Place, _Stream] = {}
        self._ids: dict[Place, str] = {}
        self._names: dict[str | Place, list[str]] = {}
        self._media: dict[str, None] = {}

    def add(self, part: Part) -> str:
        """Take the next part in; returns the text that it adds."""
        self._part = part
        if part.turn.tool_calls:
            return self._add_calls(part)
        if part.turn.media:
            self._media.update(dict.fromkeys(part.turn.media))
            return "\n".join(part.turn.media)
        return self._add_delta(part.delta) + self._add_content(
            part.turn.text, said=part.delta is not None and bool(self._said)
        )

    def turn(self, text: str) -> Turn:
        """A piece of its text on trial; or its tool calls, by now complete."""
        turn = self._part.turn
        if self._calls:
            text = "\n".join((*self._rest, *self._joined()))
            return spelled_out(replace(turn, text=text, tool_calls=tuple(self._calls)))
        if self._media:
            return replace(turn, media=tuple(self._media))
        return replace(turn, text=text)

    def _add_delta(self, delta: str | None) -> str:
        if not delta:
            return ""
        ahead = len(self.text) > len(self._said) and self.text.startswith(self._said)
        self._said += delta
        # A model may send the whole text before it sends its pieces.
        if ahead and self.text.startswith(self._said):
            return ""
        added = self._said[len(self.text) :] if ahead and self._said.startswith(self.text) else delta
        self.text += added
        return added

    def _add_content(self, content: str, *, said: bool) -> str:
        """The text so far, or a piece: which of them, models do not say."""
        last, self._last = self._last, content
        # Where a stream says what is new, its content is mostly that once more, alone or after what came before.
        if not content or (said and (content in self.text or content in self._said)):
            return ""
        if content == last:
            # The same once more, if it has grown to that; or a second piece like the first.
            start = last if not self._in_pieces or self._grew or content == self._said else ""
        else:
            # Where it is neither, it is judged as if it were new: too much rather than too little.
            start = self.text if content.startswith(self.text) else last
            self._grew = bool(last) and content.startswith(start)
        added = content.removeprefix(start)
        self.text += added
        return added

    def _add_calls(self, part: Part) -> str:
        """Arguments grow from chunk to chunk, or every chunk has calls of its own."""
        changed = False
        for call, place in zip(part.turn.tool_calls, part.places, strict=True):
            for key in self._keys(call, place):
                self._names.setdefault(key, []).append(call.name)
                changed |= self._add_arguments(call, key)
            at = next((at for at, before in enumerate(self._calls) if _is_later(before, call)), None)
            if at is None:
                self._calls.append(call)
            elif self._calls[at] == call:
                continue
            else:
                before = self._calls[at]
                joined = isinstance(before.arguments, str) and before.name == call.name
                if not joined and not _grew(before, call):
                    self._rest.append(str(before))
                self._calls[at] = call
            changed = True
        # Judged is what has come together at the end; the text only says that there is something to judge.
        return "." if changed else ""

    def _keys(self, call: ToolCall, place: Place) -> Iterator[str | Place]:
        """By what whoever puts its pieces together may know those of a call: its id, or its index, or its place."""
        # The first piece may have the id alone.
        if id_ := call.id or self._ids.get(place, ""):
            self._ids[place] = id_
            yield id_
        # Some streams have new ids for every piece, others one index for all calls.
        if not id_ or place[0] == "index":
            yield place

    def _add_arguments(self, call: ToolCall, key: str | Place) -> bool:
        """Join arguments that do not parse yet, which may be pieces; returns whether they said more."""
        pieces = self._pieces.get(key)
        if isinstance(call.arguments, str):
            text = call.arguments
        elif pieces is None:
            return False
        else:
            text = str(replace(call, name=""))
            if _bare(text).startswith(_bare(pieces.text)):
                # They have grown to a whole, which is judged as a call.
                del self._pieces[key]
                return False
        if pieces is None:
            pieces = self._pieces[key] = _Stream(in_pieces=True)
        return bool(pieces._add_content(text, said=False))

    def _joined(self) -> Iterator[str]:
        """What names and arguments that came in pieces come to."""
        yield from dict.fromkeys(chain.from_iterable(map(_names_of, self._names.values())))
        said = {call.arguments for call in self._calls if isinstance(call.arguments, str)}
        for text in dict.fromkeys(pieces.text for pieces in self._pieces.values()):
            if text not in said:
                yield from (unescaped(str(call)) for call in tool_calls([{"arguments": text}]))


def _names_of(given: Sequence[str]) -> Iterator[str]:
    """What the names that a stream gave to one call may come to, if it gave several."""
    pieces = [name for name in given if name]
    # With every piece of the arguments most streams give the whole name once more.
    if len(set(pieces)) > 1:
        joined = _Stream(in_pieces=True)
        for piece in pieces:
            joined._add_content(piece, said=False)  # noqa: SLF001 - this module's own
        yield joined.text
        yield "".join(pieces)
        yield "".join(dict.fromkeys(pieces))


def _is_later(before: ToolCall, call: ToolCall) -> bool:
    """Whether a call is what an earlier one has come to."""
    if before.id and call.id:
        return before.id == call.id
    return _grew(before, call)


def _grew(before: ToolCall, call: ToolCall) -> bool:
    """Whether all that an earlier form of a call says is there still: JSON is closed in the meantime, and spaced."""
    return _bare(str(call)).startswith(_bare(str(before)))


def _bare(text: str) -> str:
    return _MARKUP.sub("", text)


def _as_it_is(chunk: Any) -> Any:  # noqa: ANN401 - of its type
    """A copy that does not change while it is held: models go on writing into messages and calls that they sent."""
    if isinstance(chunk, ChatResponse) and isinstance(chunk.message, ChatMessage):
        message = chunk.message
        own = message.model_copy(
            update={
                "blocks": [block.model_copy(deep=True) for block in message.blocks],
                "additional_kwargs": _copied(message.additional_kwargs),
            }
        )
        return chunk.model_copy(update={"message": own, "additional_kwargs": _copied(chunk.additional_kwargs)})
    if isinstance(chunk, CompletionResponse):
        return chunk.model_copy(update={"additional_kwargs": _copied(chunk.additional_kwargs)})
    return chunk


def _copied(value: Any) -> Any:  # noqa: ANN401 - of its type
    """A copy, but for what cannot be copied: a view of memory, or a provider's object that holds a lock."""
    try:
        return deepcopy(value)
    except Exception:  # noqa: BLE001 - whatever an object raises that is none to copy
        if isinstance(value, dict):
            return {key: _copied(item) for key, item in value.items()}
        return [_copied(item) for item in value] if isinstance(value, list) else value
