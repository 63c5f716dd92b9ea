"""A pretrained encoder's tokenizer, made to leave nothing of a text unread that it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from guardmw.errors import GuardmwError

if TYPE_CHECKING:
    from pathlib import Path

# WordPiece reads a word of more than 100 characters as one unknown token.
LONGEST_WORD = 64


def harden(path: Path) -> Tokenizer:
    """The tokenizer of a BERT-like encoder, with two holes closed.

    Letters in fancy dress (mathematical, full-width, circled) are read as plain ones, and text without spaces is read
    in pieces instead of as one unknown word.

    Raises:
        GuardmwError: there is no such file, or it is not a WordPiece tokenizer.
    """
    if not path.is_file():
        raise GuardmwError(f"{path} is missing: an encoder's folder holds config.json, weights and tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    if not isinstance(tokenizer.model, models.WordPiece):
        raise GuardmwError(f"{path} holds a {type(tokenizer.model).__name__} model; this recipe knows WordPiece")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), tokenizer.normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [tokenizer.pre_tokenizer, pre_tokenizers.FixedLength(length=LONGEST_WORD)]
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
