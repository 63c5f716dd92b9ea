"""What is worked out of a conversation turn by turn, and goes on from where it stood when more has been said."""

from __future__ import annotations

import marshal
from itertools import compress, count
from operator import is_not
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardmw.conversation import Turn

S = TypeVar("S")

# How many of the latest states are kept: what is said in another way later on is seldom further back.
_KEPT = 16


class Running(Generic[S]):
    """States of conversations, kept for as long as their first turns live. May be shared between threads.

    A state counts where all turns before it are the objects that they were, and their calls have the arguments that
    they had. Else all is worked out anew, and so it is where arguments are not plain values, which may change unseen.

    Args:
        start: the state where nothing has been said; no state may hold a turn.
    """

    def __init__(self, start: S) -> None:
        self._start = start
        self._known: dict[int, _Known[S]] = {}

    def after(self, turns: tuple[Turn, ...], step: Callable[[S, Turn], S], refresh: Callable[[S], S]) -> S:
        """The state after these turns; ``refresh`` brings up to date one that ``step`` goes on from, and the last."""
        if not turns:
            return self._start
        known = self._known.get(id(turns[0]))
        same = known.shared_with(turns) if known else 0
        states = known.states_to(same) if known and same else [self._start]
        states[-1] = refresh(states[-1])
        for turn in turns[same:]:
            states.append(step(states[-1], turn))
        if same < len(turns):
            self._keep(turns, states[-_KEPT:], known if same else None, same)
        return refresh(states[-1])

    def _keep(self, turns: tuple[Turn, ...], states: list[S], known: _Known[S] | None, same: int) -> None:
        first, *rest = turns
        # Held by anything but its conversation, the first turn would never die.
        if any(turn is first for turn in rest[max(same - 1, 0) :]):
            return
        given: Any = tuple(tuple(call.arguments for call in turn.tool_calls) for turn in turns[same:])
        try:
            copies = marshal.loads(marshal.dumps(given, 2))  # noqa: S302 - of our own making
        except ValueError:
            return
        if known:
            given, copies = known.given[:same] + given, known.copies[:same] + copies
        at = id(first)
        own = ref(first, lambda _: self._known.pop(at, None))
        self._known[at] = _Known(own, tuple(rest), given, copies, tuple(states))


class _Known(NamedTuple, Generic[S]):
    """What is known of a conversation.

    Attributes:
        rest: its turns after the first.
        given: the arguments of each turn's calls.
        copies: what they were.
        states: after the latest turns.
    """

    first: ref[Turn]
    rest: tuple[Turn, ...]
    given: tuple[Any, ...]
    copies: tuple[Any, ...]
    states: tuple[S, ...]

    def shared_with(self, turns: tuple[Turn, ...]) -> int:
        """How many turns they begin with that are known; 0 where their state is not."""
        try:
            if self.first() is not turns[0] or self.given != self.copies:
                return 0
        except Exception:  # noqa: BLE001 - of anybody's values
            return 0
        shorter = min(len(self.rest), len(turns) - 1)
        same = 1 + next(compress(count(), map(is_not, self.rest, turns[1:])), shorter)
        return same if len(self.given) - same < len(self.states) else 0

    def states_to(self, same: int) -> list[S]:
        """The states, without those after later turns."""
        return list(self.states[: len(self.states) - len(self.given) + same])
