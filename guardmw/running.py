"""What is worked out of a history step by step, and goes on from where it stood when more has been said."""

from __future__ import annotations

from itertools import compress, count, repeat
from operator import is_, is_not
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")
S = TypeVar("S")

# How many of the latest states are kept: what is said in another way later on is seldom further back.
_KEPT = 16
_UNCHANGING = frozenset({str, int, float, bool, type(None), bytes})


class Running(Generic[T, S]):
    """States of histories, kept for as long as the first of their messages lives. May be shared between threads.

    A state counts where all messages before it are the objects that they were, and hold what they held. Else all is
    worked out anew, and so it is where one holds what is no plain value, which may change unseen.

    Args:
        start: the state where nothing has been said; no state may hold a message.
        look: what of each message may change.
        frozen: these objects may change, but the message will always hold them.
    """

    def __init__(self, start: S, look: Callable[[Sequence[T]], Iterable[object]], *, frozen: bool) -> None:
        self._start = start
        self._look = look
        self._frozen = frozen
        self._known: dict[int, _Known[T, S]] = {}

    def after(self, messages: Sequence[T], step: Callable[[S, T], S], refresh: Callable[[S], S]) -> S:
        """The state after these messages; ``refresh`` brings up to date what ``step`` goes on from, and the last."""
        if not messages:
            return self._start
        known = self._known.get(id(messages[0]))
        same = self._shared(known, messages) if known else 0
        states = known.states_to(same) if known and same else [self._start]
        states[-1] = refresh(states[-1])
        for message in messages[same:]:
            states.append(step(states[-1], message))
        if same < len(messages):
            self._keep(messages, states[-_KEPT:], known if same else None, same)
        return refresh(states[-1])

    def _shared(self, known: _Known[T, S], messages: Sequence[T]) -> int:
        """How many messages they begin with that are known; 0 where the state after them is not."""
        if known.first() is not messages[0]:
            return 0
        shorter = min(len(known.rest), len(messages) - 1)
        same = 1 + next(compress(count(), map(is_not, known.rest, messages[1:])), shorter)
        if len(known.copies) - same >= len(known.states):
            return 0
        held = known.held[:same] if self._frozen else tuple(self._look(messages[:same]))
        try:
            return same if held == known.copies[:same] else 0
        except Exception:  # noqa: BLE001 - of anybody's values
            return 0

    def _keep(self, messages: Sequence[T], states: list[S], known: _Known[T, S] | None, same: int) -> None:
        first, *rest = messages
        # Held by anything but its history, the first would never die.
        if any(map(is_, rest, repeat(first))):
            return
        held = tuple(self._look(messages[same:]))
        try:
            copies = tuple(map(_copied, held))
        except (TypeError, RecursionError):
            return
        if known:
            held, copies = known.held[:same] + held, known.copies[:same] + copies
        at = id(first)
        own = ref(first, lambda _: self._known.pop(at, None))
        self._known[at] = _Known(own, tuple(rest), held if self._frozen else (), copies, tuple(states))


class _Known(NamedTuple, Generic[T, S]):
    """What is known of a history.

    Attributes:
        rest: its messages after the first.
        held: what each of them holds, if that is frozen.
        copies: what it was.
        states: after the latest messages.
    """

    first: ref[T]
    rest: tuple[T, ...]
    held: tuple[Any, ...]
    copies: tuple[Any, ...]
    states: tuple[S, ...]

    def states_to(self, same: int) -> list[S]:
        """The states, without those after later messages."""
        return list(self.states[: len(self.states) - len(self.copies) + same])


def _copied(value: Any) -> Any:  # noqa: ANN401 - any plain value
    """A copy that has what cannot change in common with the value, which makes it quick to compare with."""
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if kind is dict and not value:
        return {}
    if kind is dict:
        return {
            key if type(key) is str else _copied(key): item if type(item) in _UNCHANGING else _copied(item)
            for key, item in value.items()
        }
    if kind is list or kind is tuple:
        return kind(map(_copied, value)) if value else kind()
    raise TypeError(kind.__name__)
