"""Holding back a stream of text until it has been judged. No I/O: text in, pieces to judge out."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

T = TypeVar("T")
C = TypeVar("C", bound="Hashable")

# In characters. A piece is at least as long as the judged text it carries along (only the last may be shorter), so a
# text never costs more than judging 3 times its length, and a long one 2 times.
CARRY = 400
LEAST = 80
STEP = 400
# A longer sentence is not waited for; it is cut at a space.
SENTENCE = 200

# An end needs the character after it, or "3.14" would be two sentences. Full-width stops need none: no space follows.
_END = re.compile(r"""[.!?…]["'”’)\]]{0,4}\s|[。！？｡]|(?<=\S)\n""")  # noqa: RUF001 - the characters as they come in text
_LONGEST_END = 6


@dataclass(frozen=True, slots=True)
class Piece(Generic[C]):
    """Text to judge: some that is new, after up to ``CARRY`` characters that passed before and give it its meaning."""

    channel: C
    text: str


class Hold(Generic[T, C]):
    """Queues the items of one stream, and lets each go when all text up to it has passed.

    Text comes in channels (an answer, its reasoning, …), each a text of its own. It is cut at the ends of sentences,
    into pieces of which the first is due as soon as it is complete, and later ones are longer. Where one text is cut
    depends on its characters alone, so it is judged the same way however a provider chops it. ::

        for chunk in chunks:
            hold.feed(chunk, {"text": chunk.text})
            hold.take([passes(piece.text) for piece in hold.due()])
            yield from hold.released()
        hold.end()
        hold.take([passes(piece.text) for piece in hold.due()])
        yield from hold.released()

    Args:
        leak: how many characters, over all channels, may go out before they have been judged.

    Attributes:
        blocked: a piece did not pass. Items that passed before it still go out, then nothing more.
    """

    def __init__(self, *, leak: int = 0) -> None:
        self.blocked = False
        self._leak = leak
        self._ended = False
        self._fed = 0
        self._queue: deque[tuple[T, list[tuple[_Text, int]]]] = deque()
        self._texts: dict[C, _Text] = {}
        self._open: dict[C, _Text] = {}
        self._asked: list[tuple[_Text, int]] = []

    def feed(self, item: T, texts: Mapping[C, str], *, whole: Collection[C] = ()) -> None:
        """Queue an item with the text it adds to each channel.

        Channels named in ``whole`` are judged in one piece, when they are settled or the stream has ended, and never
        leak: half a tool call means nothing. A channel leaves this state with the first item that feeds it and does
        not name it there.
        """
        ends = []
        for channel, added in texts.items():
            text = self._texts.get(channel)
            if text is None:
                text = self._texts[channel] = _Text()
            self._fed += len(added)
            text.add(added, whole=channel in whole, at=self._fed)
            ends.append((text, text.fed))
            self._open[channel] = text
        self._queue.append((item, ends))

    def settle(self, channel: C) -> None:
        """Take the channel's text for complete, though the stream goes on: what is left of it is due."""
        self._texts[channel].settled = True

    def end(self) -> None:
        """No more items follow: all that is left is due."""
        self._ended = True

    def due(self) -> list[Piece[C]]:
        """The pieces to judge by now. Each is given once, and ``take`` waits for its answer."""
        pieces: list[Piece[C]] = []
        if self.blocked:
            return pieces
        for channel, text in list(self._open.items()):
            # A text that has fallen silent in the middle of a sentence must not hold up all the others to the end.
            silent = not text.whole and self._fed - text.fed_at >= STEP
            for piece, end in text.cut(complete=self._ended or text.settled or silent):
                pieces.append(Piece(channel, piece))
                self._asked.append((text, end))
            if text.asked == text.fed:
                del self._open[channel]
        return pieces

    def take(self, passed: Sequence[bool]) -> None:
        """Say which of the due pieces passed, in their order.

        Raises:
            ValueError: it is not one answer for each piece.
        """
        failed: set[_Text] = set()
        # A short answer must not pass for a safe one.
        for (text, end), ok in zip(self._asked, passed, strict=True):
            if not ok:
                failed.add(text)
            elif text not in failed:
                text.judged = end
        self._asked = []
        self.blocked = self.blocked or bool(failed)

    def released(self) -> Iterator[T]:
        """The items that may go out, in order, each once."""
        while self._queue and self._may_go(self._queue[0][1]):
            item, ends = self._queue.popleft()
            for text, end in ends:
                text.out = end
            yield item

    def _may_go(self, ends: list[tuple[_Text, int]]) -> bool:
        ahead = [(text, end) for text, end in ends if end > text.judged]
        if not ahead:
            return True
        if self.blocked or not self._leak or any(text.whole for text, _ in ahead):
            return False
        out = {text: text.out for text in self._texts.values()} | dict(ahead)
        return sum(max(0, end - text.judged) for text, end in out.items()) <= self._leak


class _Text:
    """The text of one channel, of which only what is still needed is kept."""

    __slots__ = ("_added", "_base", "_kept", "asked", "fed", "fed_at", "judged", "out", "settled", "whole")

    def __init__(self) -> None:
        self.whole = self.settled = False
        # Positions: received, given to be judged, passed, released.
        self.fed = self.asked = self.judged = self.out = 0
        self.fed_at = 0
        self._kept = ""
        self._base = 0
        self._added: list[str] = []

    def add(self, text: str, *, whole: bool, at: int) -> None:
        """Append to the text, when the whole stream has come to ``at`` characters."""
        self.whole = whole
        self.settled = False
        self.fed += len(text)
        self.fed_at = at
        self._added.append(text)

    def cut(self, *, complete: bool) -> Iterator[tuple[str, int]]:
        """The pieces that are ready, each with the position of its end; all of the text where it is complete."""
        if not complete and (self.whole or self.fed - self.asked < self._least):
            return
        # Joined only here: adding every token to one long string would cost the square of its length.
        text = self._kept = self._kept + "".join(self._added)
        self._added.clear()
        start = self.asked - self._base
        while size := self._size(start, complete=complete):
            carried = max(0, start - CARRY)
            start += size
            self.asked += size
            yield text[carried:start], self.asked
        self._base += max(0, start - CARRY)
        self._kept = text[max(0, start - CARRY) :]

    @property
    def _least(self) -> int:
        """Characters that the next piece has at least, except at the end."""
        return min(max(self.asked, LEAST), STEP) if self.asked else 1

    def _size(self, start: int, *, complete: bool) -> int:
        """Length of the next piece; 0 if it is not ready."""
        new = len(self._kept) - start
        if self.whole:
            return new
        least = start + self._least
        most = least + SENTENCE
        for match in _END.finditer(self._kept, max(start, least - _LONGEST_END), most):
            if match.end() >= least:
                return match.end() - start
        if len(self._kept) >= most:
            space = self._kept.rfind(" ", least, most)
            return (space + 1 if space >= 0 else most) - start
        return new if complete else 0
