"""Everything guardmw raises, as one tree.

GuardmwError
├── Blocked                 a verdict says block; carries the verdict
├── ConversationError       what was given cannot be read as a conversation
├── PolicyError             a policy is not valid
├── DataError               labelled rows cannot be read, or not be used
└── BackendError            a backend could not score what it was given
    ├── BackendUnavailable  it is not installed, not found or not answering
    └── ArtefactError       a model folder is missing a file, or a file in it is broken

No message quotes the text that was screened.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guardmw.verdict import Verdict


class GuardmwError(Exception):
    """The root of everything guardmw raises."""


class Blocked(GuardmwError):  # noqa: N818 - reads as the fact it states: `except Blocked`
    """The verdict says block.

    Attributes:
        verdict: the verdict that blocks, with its violations and scores.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)
        self.verdict = verdict

    def __str__(self) -> str:
        return f"blocked at {self.verdict.stage}: {self.verdict.summary}"


class ConversationError(GuardmwError):
    """What was given cannot be read as a conversation; the message says what would be."""


class PolicyError(GuardmwError):
    """A policy is not valid; the message names the key, and the nearest valid one."""


class DataError(GuardmwError):
    """Labelled rows cannot be read, or not be used; the message gives file and line, or what they lack."""


class BackendError(GuardmwError):
    """A backend could not score what it was given."""


class BackendUnavailable(BackendError):  # noqa: N818 - a state, as Blocked is
    """A backend is not installed, not found or not answering."""


class ArtefactError(BackendError):
    """A model folder is missing a file, or a file in it is broken."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the known word nearest to this one, or all of them."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(known)}"
