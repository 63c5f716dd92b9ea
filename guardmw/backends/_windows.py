"""How a conversation becomes token windows: every character on trial is in one. Training and serving share it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardmw.errors import ArtefactError
from guardmw.verdict import Coverage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from guardmw.backends._artefact import Card
    from guardmw.conversation import Conversation

# Unicode "tag" characters are invisible and spell out ASCII: a language model reads them, so a guard must.
_TAGS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
# Half of a surrogate pair is no character, and no tokenizer takes it.
_HIDDEN = re.compile("[\U000e0020-\U000e007e]|[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids with their segments: 0 is on trial, 1 is context."""

    ids: list[int]
    segments: list[int]


class Windows:
    """Cuts conversations into windows as a model's card says.

    Raises:
        ArtefactError: the tokenizer lacks a special token, or the card's windows leave no room for text.
    """

    def __init__(self, tokenizer: Tokenizer, card: Card) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # "[SEP]" written by a user is text, not the end of the text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._card = card
        self.cls, self.sep, self.pad, self.unk = (
            self._special(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
        )
        form = card.form
        self._prefixes = {stage: self._encode([prefix])[0] for stage, prefix in form.prefixes.items()}
        longest = max(map(len, self._prefixes.values()), default=0)
        if card.max_tokens - card.overlap <= longest + form.context_tokens + 4:
            raise ArtefactError(
                f"{card.name}: max_tokens {card.max_tokens} leaves no room beside overlap {card.overlap}, "
                f"context_tokens {form.context_tokens} and prefixes of {longest} tokens"
            )

    def cut(self, conversations: Sequence[Conversation]) -> list[tuple[list[Window], Coverage]]:
        """The windows of each conversation, and what they cover."""
        trials = [_readable(conversation.trial) for conversation in conversations]
        encoded = self._encode(trials)
        cuts = []
        for conversation, trial, ids in zip(conversations, trials, encoded, strict=True):
            prefix = self._prefixes.get(conversation.stage, [])
            tail = [self.sep, *self._context(conversation)]
            room = self._card.max_tokens - 1 - len(prefix) - len(tail)
            step = room - self._card.overlap
            starts = range(0, max(len(ids) - self._card.overlap, 1), step)
            windows = []
            for start in starts:
                body = [self.cls, *prefix, *ids[start : start + room]]
                segments = [0] * (len(body) + 1) + [1] * (len(tail) - 1)
                windows.append(Window(body + tail, segments))
            # Tokenizers drop U+FFFD, which stands where a character was lost.
            unreadable = trial.count("\ufffd") + (self._unreadable(trial) if self.unk in ids else 0)
            cuts.append((windows, Coverage(len(trial), len(trial), len(windows), unreadable)))
        return cuts

    def _context(self, conversation: Conversation) -> list[int]:
        """The user's last turn before the one on trial, as the second segment."""
        form = self._card.form
        if not form.context_tokens or conversation.stage not in form.context_stages:
            return []
        said = next((turn.text for turn in reversed(conversation.context) if turn.role == "user"), "")
        # Sixteen characters a token are plenty: most of a long turn need not be tokenised.
        ids = self._encode([_readable(said[: 16 * form.context_tokens])])[0][: form.context_tokens - 1]
        return [*ids, self.sep] if ids else []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        # A Unigram model has "[SEP]" among its pieces, and so reads the word as the sign all the same.
        signs = {self.cls, self.sep, self.pad}
        return [ids if signs.isdisjoint(ids) else [self.unk if id_ in signs else id_ for id_ in ids] for ids in encoded]

    def _unreadable(self, text: str) -> int:
        """Letters and digits under unknown tokens; an emoji the model never met is no reason for doubt."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = [span for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ == self.unk]
        return sum(character.isalnum() for start, end in unknown for character in text[start:end])

    def _special(self, token: str) -> int:
        id_: int | None = self._tokenizer.token_to_id(token)
        if id_ is None:
            raise ArtefactError(f"{self._card.name}: the tokenizer has no {token} token")
        return id_


def _readable(text: str) -> str:
    """The text with invisible letters made visible and halves of surrogate pairs replaced, character for character."""
    if text.isascii() or not _HIDDEN.search(text):
        return text
    return _HIDDEN.sub(lambda match: _TAGS.get(ord(match[0]), "\ufffd"), text)
