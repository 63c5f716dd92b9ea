"""Whose guard judges, what its verdicts mean, and who is told of them."""

from __future__ import annotations

import asyncio
import logging
import pickle
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from traceback import TracebackException
from typing import TYPE_CHECKING, Any, NoReturn

from llama_index.callbacks.guardmw.metrics import VerdictEvent
from llama_index_instrumentation import get_dispatcher

from guardmw import Backend, BackendError, Blocked, Guard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import GuardmwError, Verdict

log = logging.getLogger("guardmw")

REFUSAL = "I can't help with that."

_dispatcher = get_dispatcher("llama_index.callbacks.guardmw")
_loaded = cache(Guard)
_loading = Lock()


@dataclass(frozen=True, slots=True)
class Judge:
    """A guard, or the promise of the embedded model's, which all share.

    Attributes:
        given: what it was made of, which can be pickled where the guard cannot.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: what was given is none of these.
    """

    guard: Guard | None = None
    given: Guard | Backend | str | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, g: Guard | Backend | str | Judge | None) -> Judge:
        """What users give for a guard."""
        if isinstance(g, Judge):
            return g
        if isinstance(g, str | Backend):
            return cls(Guard(g), g)
        if g is not None and not isinstance(g, Guard):
            raise TypeError(f"give a Guard, a Backend, a spec or None, not {type(g).__name__}")
        return cls(g, g)

    def __deepcopy__(self, memo: dict[int, Any]) -> Judge:
        # What it judges for is copied; the model and its locks stay one.
        return self

    def __reduce__(self) -> tuple[Callable[..., Judge], tuple[Any, ...]]:
        # An error here LlamaIndex swallows, and leaves the guard out, of the original too.
        try:
            pickle.dumps(self.given)
        except Exception as error:  # noqa: BLE001 - whatever a backend's own parts raise
            return _Lost, (None, str(error))
        return Judge.of, (self.given,)

    def ready(self) -> Guard:
        """The guard; the embedded model is loaded here."""
        return self.guard or _embedded()

    async def aready(self) -> Guard:
        """``ready``, without blocking the event loop: loading takes half a second."""
        if self.guard or _loaded.cache_info().currsize:
            return self.ready()
        return await asyncio.to_thread(_embedded)


class _Lost(Judge):
    """What arrives of a guard that cannot be pickled, and why: it judges nothing, and so lets nothing pass."""

    def ready(self) -> Guard:
        raise BackendError(
            f"what was pickled has lost its guard ({self.given}): give it one that can be pickled, "
            "such as a spec ('embedded'), or guard it again where it has arrived"
        )

    async def aready(self) -> Guard:
        return self.ready()

    def __reduce__(self) -> tuple[Callable[..., Judge], tuple[Any, ...]]:
        return _Lost, (None, self.given)


def _embedded() -> Guard:
    # `cache` alone lets two threads load it at once.
    with _loading:
        return _loaded()


def withholds(verdict: Verdict) -> bool:
    """Whether what was judged may not go on, if there is nobody to ask."""
    return verdict.action in ("block", "review")


def strictest(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict that withholds, the first that blocks if there are several; None where none does."""
    withheld = [verdict for verdict in verdicts if withholds(verdict)]
    return max(withheld, key=lambda verdict: verdict.blocked) if withheld else None


def enforced(verdicts: Sequence[Verdict], counted: Sequence[Verdict] | None = None) -> None:
    """Tell of verdicts, and raise for what may not go on, by all of them or by those that are ``counted``.

    Raises:
        Blocked: with the first verdict that blocks, or the first that wants a review.
    """
    tell(verdicts)
    if (verdict := strictest(verdicts if counted is None else counted)) is not None:
        raise blocked_by(verdict)


def tell(verdicts: Sequence[Verdict]) -> None:
    """Let LlamaIndex's dispatcher know of verdicts, and the log "guardmw" of flags and of degraded ones that pass."""
    # Making an event costs more than a verdict; the root has one handler of its own that does nothing.
    heard = len(_dispatcher.event_handlers) + len(_dispatcher.root.event_handlers) > 1
    for verdict in verdicts:
        if heard:
            _dispatcher.event(VerdictEvent.of(verdict))
        if (verdict.degraded or verdict.action == "flag") and not withholds(verdict):
            log.warning("%s at %s: %s", verdict.action, verdict.stage, verdict.summary)


def blocked_by(verdict: Verdict) -> Blocked:
    """The exception, as LlamaIndex may see it pass."""
    blocked = Blocked(verdict)
    mark(blocked)
    return blocked


def withhold(verdict: Verdict) -> NoReturn:
    """Raise the exception, apart from those that are being handled: they may quote what is withheld.

    Raises:
        Blocked: with the verdict.
    """
    blocked = blocked_by(verdict)
    try:
        raise blocked
    finally:
        blocked.__context__ = None


def said_by(error: BaseException) -> str:
    """What an exception says, and those that it came of, as whoever prints it would see."""
    return "".join(TracebackException.from_exception(error, limit=0).format())


def mark(error: GuardmwError) -> None:
    """Keep an error off LlamaIndex's trace stack."""
    # CallbackManager.as_trace pushes an EXCEPTION event on the trace stack for an exception without this mark, and
    # nothing pops it: whatever is traced later would get the wrong parents.
    error.event_added = True  # type: ignore[attr-defined]
