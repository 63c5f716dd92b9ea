"""A callback handler that stops a LlamaIndex call where a guard blocks what goes in or comes out."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from llama_index.callbacks.guardmw._asked import Asked, Passed, asked_apart, asked_in_chat, asked_in_words
from llama_index.callbacks.guardmw._gate import Silent, judging
from llama_index.callbacks.guardmw._parts import trials_of
from llama_index.callbacks.guardmw._verdicts import Judge, enforced, log, mark
from llama_index.callbacks.guardmw.llm import GuardedLLM
from llama_index.callbacks.guardmw.nodes import turn_of_node
from llama_index.core import Settings
from llama_index.core.callbacks.base import global_stack_trace
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.llms import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span_handlers import NullSpanHandler

from guardmw import Guard, GuardmwError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.schema import NodeWithScore

    from guardmw import Backend, Turn, Verdict

UNDER_WAY = 1024
"""How many calls a handler waits to see end: there are events that never do."""

_NOTHING = Asked((), ())
_STARTS = (CBEventType.QUERY, CBEventType.RETRIEVE, CBEventType.LLM)
_ENDS = (CBEventType.RETRIEVE, CBEventType.LLM)

_NOT_SEEN = (
    "GuardCallbackHandler judges what LlamaIndex tells its callback handlers: queries, LLM inputs and answers, and "
    "retrieved nodes. It cannot see tools run or agents step, it judges a stream only after its text is out, and it "
    "hears nothing from an LLM with another callback manager, such as one made before Settings.callback_manager was "
    "set. Once you have taken care of that: warnings.simplefilter('ignore', CoverageWarning)"
)


_UNHEARD = (
    "{} is asked, and GuardCallbackHandler hears nothing of it: it was made before Settings.callback_manager was set, "
    "or has another one. Take it from Settings.llm, set its callback_manager to Settings.callback_manager, or guard it "
    "by itself: guard_llm(llm)"
)


class CoverageWarning(UserWarning):
    """Part of an application is out of a guard's sight; the message says which."""


class GuardCallbackHandler(BaseCallbackHandler):
    """Judges queries and LLM inputs before the model runs, nodes when they are retrieved, answers when they end.

    What the policy blocks, or wants reviewed, raises ``guardmw.Blocked`` out of the call that was made; flags and
    degraded verdicts go to the log "guardmw". A chat's turns are judged with the turns before them as context, all new
    ones in one batch. Put it first among several handlers: those after it hear nothing of what it stops. It warns of
    what it cannot see (CoverageWarning) when it is made, and judges on the thread it is called on, an event loop's too.

    Args:
        g: a Guard, a Backend, a spec for ``guardmw.load``, or None for the embedded model, loaded at the first event.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: g is none of these.
    """

    def __init__(self, g: Guard | Backend | str | Judge | None = None) -> None:
        super().__init__(
            event_starts_to_ignore=[kind for kind in CBEventType if kind not in _STARTS],
            event_ends_to_ignore=[kind for kind in CBEventType if kind not in _ENDS],
        )
        self._judge = Judge.of(g)
        self._passed = Passed()
        self._asked: dict[str, Sequence[Turn]] = {}
        self._lock = Lock()
        _look_out(self)
        warnings.warn(_NOT_SEEN, CoverageWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardCallbackHandler:
        # An LLM is copied with its callback manager; the model and the lock stay one.
        return self

    def __reduce__(self) -> tuple[type[GuardCallbackHandler], tuple[Judge]]:
        # An LLM that is pickled drops the handlers that cannot be, and not only from the copy.
        return type(self), (self._judge,)

    @property
    def guard(self) -> Guard:
        """The guard that judges."""
        return self._judge.ready()

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",  # noqa: ARG002 - the framework's signature
        **_: Any,  # noqa: ANN401 - the framework's signature
    ) -> str:
        """Judge what is about to be searched for, or to be sent to a model.

        Raises:
            Blocked: the policy blocks it, or wants it reviewed.
        """
        if self._is_judged(event_id):
            return event_id
        try:
            asked = _asked(event_type, payload or {})
            self._enter(asked)
        except GuardmwError as error:
            mark(error)
            raise
        if event_type == CBEventType.LLM:
            with self._lock:
                self._asked[event_id] = asked.turns
                while len(self._asked) > UNDER_WAY:
                    del self._asked[next(iter(self._asked))]
        return event_id

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        **_: Any,  # noqa: ANN401 - the framework's signature
    ) -> None:
        """Judge what was retrieved, or answered. An event that ended with an exception has nothing to judge.

        Raises:
            Blocked: the policy blocks it, or wants it reviewed.
        """
        payload = payload or {}
        if self._is_judged(event_id):
            return
        try:
            if event_type == CBEventType.RETRIEVE:
                self._retrieved(payload.get(EventPayload.NODES) or ())
            else:
                self._leave(payload, event_id)
        except GuardmwError as error:
            mark(error)
            _pop(event_id)
            raise

    def start_trace(self, trace_id: str | None = None) -> None:
        """Nothing: a verdict does not depend on the trace."""

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None:
        """Nothing: a verdict does not depend on the trace."""

    def _is_judged(self, event_id: str) -> bool:
        """Whether the guard of this handler judges in the LLM itself what this event tells of."""
        return judging.get() == (self._judge, event_id)

    def _enter(self, asked: Asked) -> None:
        """Judge what of this has not passed before."""
        if verdicts := self._judged(asked):
            enforced([*verdicts.values()])

    def _judged(self, asked: Asked) -> dict[bytes, Verdict]:
        """The verdicts on what of this has not passed before, by its digest."""
        if not (fresh := self._passed.fresh(asked)):
            return {}
        verdicts = self.guard.screen_many(fresh.values())
        self._passed.learn(fresh, verdicts)
        return dict(zip(fresh, verdicts, strict=True))

    def _retrieved(self, nodes: Collection[NodeWithScore]) -> None:
        """Judge what was found."""
        self._enter(asked_apart(map(turn_of_node, nodes)))

    def _leave(self, payload: Mapping[str, Any], event_id: str) -> None:
        """Judge what a model answered, in the light of what it was asked."""
        context = self._asked.pop(event_id, None)
        response = payload.get(EventPayload.RESPONSE) or payload.get(EventPayload.COMPLETION)
        if response is None:
            return
        if context is None:
            context = _asked(CBEventType.LLM, payload).turns
        enforced(self.guard.screen_many(trials_of(response, context)))


class _Lookout(NullSpanHandler):
    """Warns of the first LLM that is asked and tells nothing to the handler that stands in Settings."""

    @classmethod
    def class_name(cls) -> str:
        return "GuardmwLookout"

    def span_enter(self, *_: Any, instance: object = None, **__: Any) -> None:  # noqa: ANN401 - the framework's
        if not isinstance(instance, LLM) or not _is_unheard(instance):
            return
        root = get_dispatcher()
        # Another list: the dispatcher is going through this one.
        root.span_handlers = [handler for handler in root.span_handlers if handler is not self]
        warnings.warn(_UNHEARD.format(type(instance).__name__), CoverageWarning, stacklevel=1)


guardmw_callback_handler = GuardCallbackHandler
"""The name by which LlamaIndex's callback packages offer their handler."""


_looking: WeakSet[GuardCallbackHandler] = WeakSet()


def look_away(handler: GuardCallbackHandler) -> None:
    """What is past this handler nobody need be warned of any more."""
    _looking.discard(handler)
    if not _looking:
        root = get_dispatcher()
        root.span_handlers = [one for one in root.span_handlers if not isinstance(one, _Lookout)]


def _look_out(handler: GuardCallbackHandler) -> None:
    _looking.add(handler)
    root = get_dispatcher()
    if not any(isinstance(handler, _Lookout) for handler in root.span_handlers):
        root.add_span_handler(_Lookout())


def _is_unheard(llm: LLM) -> bool:
    # The LLM inside a guarded one is silent; one inside a StructuredLLM speaks for itself.
    if isinstance(llm, GuardedLLM | StructuredLLM) or isinstance(llm.callback_manager, Silent):
        return False
    # Asking for Settings.callback_manager would make one.
    manager = Settings._callback_manager  # noqa: SLF001
    return manager is not None and _is_in(manager) and not _is_in(llm.callback_manager)


def _is_in(manager: CallbackManager) -> bool:
    return any(isinstance(handler, GuardCallbackHandler) for handler in manager.handlers)


def _asked(event_type: CBEventType, payload: Mapping[str, Any]) -> Asked:
    """What goes in, by the payload of an event."""
    if event_type != CBEventType.LLM:
        query = payload.get(EventPayload.QUERY_STR)
        return asked_in_words(query) if query else _NOTHING
    if EventPayload.MESSAGES in payload:
        return asked_in_chat(payload[EventPayload.MESSAGES], own=False)
    if EventPayload.PROMPT in payload:
        return asked_in_words(payload[EventPayload.PROMPT])
    log.warning("an LLM event without messages or a prompt was not judged")
    return _NOTHING


def _pop(event_id: str) -> None:
    # CallbackManager.on_event_end takes an event off the trace stack only after its handlers returned.
    stack = global_stack_trace.get()
    if stack and stack[-1] == event_id:
        global_stack_trace.set(stack[:-1])
