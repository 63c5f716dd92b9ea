"""What stands beside text and carries no message of its own: names, identifiers, ciphertext; anything else is text."""

from __future__ import annotations

import re

LONGEST = 64
"""Letters of a name or an identifier, unless it is random; a script without spaces says little in as many of ASCII."""

_SPAN = 120
# Vowels, consonants and digits, of either case.
_KINDS = bytes.maketrans(
    b"aeiouAEIOUbcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ0123456789",
    b"v" * 5 + b"V" * 5 + b"c" * 21 + b"C" * 21 + b"1" * 10,
)
_word = re.compile(r"[!-~]{0,64}").fullmatch
_base64 = re.compile(r"[\w+/=-]*", re.ASCII).fullmatch


def is_name(text: str) -> bool:
    """Whether a key or a name is one that a programmer gives; another may be anybody's text."""
    # Whole sentences are identifiers in scripts that do without spaces.
    return text.isascii() and len(text) <= LONGEST and text.replace("-", "_").replace(".", "_").isidentifier()


def is_mark(id_: object) -> bool:
    """Whether an id, if there is one, is one word that a machine gives; no sentence of a script without spaces is."""
    # Proxies hang a signature onto the ids of calls.
    return id_ is None or (isinstance(id_, str) and (_word(id_) is not None or is_random(id_)))


def is_ciphertext(text: str) -> bool:
    """Whether it is, where ciphertext is to be expected."""
    return is_random(text) or (len(text) <= LONGEST and _base64(text) is not None)


def is_random(text: str) -> bool:
    """Whether it is as random as base64 is; else a long word is some text without spaces, however it is capitalised."""
    if not _base64(text):
        return False
    kinds = text.encode("ascii").translate(_KINDS)
    # Chance gives 10, 26 and 26 of 64.
    capitals = kinds.count(b"V") + kinds.count(b"C")
    if not (kinds.count(b"1") * 16 > len(text) and len(text) < capitals * 8 < 6 * len(text)):
        return False
    # Of letters, a fifth are vowels by chance, and two fifths in words, which show wherever they stand.
    ends = (*range(_SPAN, len(kinds), _SPAN // 2), len(kinds))
    return _wordless(kinds, 0.3) and all(_wordless(kinds[max(0, end - _SPAN) : end], 0.36) for end in ends)


def _wordless(kinds: bytes, share: float) -> bool:
    vowels = kinds.count(b"v") + kinds.count(b"V")
    return vowels <= share * (vowels + kinds.count(b"c") + kinds.count(b"C"))
