"""A backend scores conversations; ``load`` finds one by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from guardmw.errors import BackendUnavailable, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardmw.conversation import Conversation
    from guardmw.verdict import Scores

__all__ = ["Backend", "load"]

GROUP = "guardmw.backends"


@runtime_checkable
class Backend(Protocol):
    """Anything that scores conversations: one Scores for each, in their order.

    A backend judges the whole text on trial (``conversation.trial``), or says in ``Scores.coverage`` what it left out.
    It raises only BackendError, and may be called from several threads at once. One that knows at which score it
    should act may have an attribute ``thresholds``: a mapping from stage, or "injection", to a score.
    """

    @property
    def name(self) -> str:
        """What verdicts and logs call it."""

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch without blocking the event loop."""


def load(spec: str) -> Backend:
    """Make a backend from a spec: a name, and after a colon what that backend asks for.

    "embedded" is the model in this package; "onnx:FOLDER" and "onnx:OWNER/NAME@REVISION" are models elsewhere. Other
    packages add names through the entry-point group ``guardmw.backends``: a callable that takes the part after the
    colon ("" without one).

    Raises:
        BackendUnavailable: no such name, or what it needs is not installed.
        BackendError: the backend could not be made; the message says why.
    """
    name, _, rest = spec.partition(":")
    from importlib.metadata import entry_points  # noqa: PLC0415 - as long to import as a third of guardmw

    known = entry_points(group=GROUP)
    if name not in known.names:
        names = sorted(known.names)
        hint, known_names = nearest(name, names), ", ".join(names)
        others = "" if known_names in hint else f" There are: {known_names}"
        raise BackendUnavailable(f"unknown backend {name!r}: {hint}{others}")
    try:
        backend: Backend = known[name].load()(rest)
    except ImportError as error:
        raise BackendUnavailable(f"backend {name!r} cannot be loaded: {error}") from error
    return backend
