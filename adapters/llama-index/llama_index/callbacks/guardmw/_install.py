"""``install()``: a guard in LlamaIndex's Settings, with a report of what it covers there and what not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from llama_index.callbacks.guardmw._asked import asked_apart
from llama_index.callbacks.guardmw._verdicts import Judge, log, tell, withholds
from llama_index.callbacks.guardmw.handler import CoverageWarning, GuardCallbackHandler, look_away
from llama_index.callbacks.guardmw.llm import guard_llm
from llama_index.callbacks.guardmw.nodes import GuardPostprocessor, turn_of_node
from llama_index.core import Settings

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from llama_index.callbacks.guardmw._gate import OnBlock
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.llms import LLM
    from llama_index.core.schema import NodeWithScore

    from guardmw import Backend, Guard

_LLM = "Settings.llm: what goes into it and what comes out, streams and tool calls included"
_HANDLER = "queries, and retrieved nodes, which are dropped, in whatever has the callback manager of Settings"
_NO_LLM = "an LLM: none is set. Set Settings.llm, then install"
_NOT_COVERED = (
    "LLMs that are set later, or were handed to engines and agents already (the first is warned of): guard_llm(llm)",
    "tools that run: guard_tool(tool)",
    (
        "nodes of a retriever with another callback manager: guard_retriever(retriever), or node_postprocessors="
        "[installed.postprocessor], as Settings has no place for one"
    ),
    "text that is embedded or ingested",
    "the event loop, which waits while the callback handler judges queries and nodes of async calls",
)


class _Dropping(GuardCallbackHandler):
    """Does with retrieved nodes what the postprocessor would, which hears of them later."""

    def _retrieved(self, nodes: Collection[NodeWithScore]) -> None:
        # LlamaIndex's retrievers give the very list that they return; a view of it cannot be cut.
        if not isinstance(nodes, list):
            super()._retrieved(nodes)
            return
        asked = asked_apart(map(turn_of_node, nodes))
        verdicts = self._judged(asked)
        tell([*verdicts.values()])
        withheld = {digest: verdict for digest, verdict in verdicts.items() if withholds(verdict)}
        for verdict in withheld.values():
            log.warning("dropped a node: %s", verdict.summary)
        nodes[:] = [node for node, (digest, *_) in zip(nodes, asked.trials, strict=True) if digest not in withheld]


@dataclass(slots=True)
class _Before:
    """What was in Settings; nothing that has been taken away since."""

    llm: LLM | None
    manager: CallbackManager | None


@dataclass(frozen=True, eq=False)
class Installed:
    """What ``install()`` has put in place. As a context manager it takes that away at the end.

    Attributes:
        guard: the guard that judges.
        llm: the guarded LLM; None if Settings had none.
        handler: the callback handler.
        postprocessor: a GuardPostprocessor for engines whose retrievers have another callback manager.
        covered: what is judged now.
        not_covered: what is not, and what would cover it.
    """

    guard: Guard
    llm: LLM | None
    handler: GuardCallbackHandler
    postprocessor: GuardPostprocessor
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    _before: _Before
    _manager: CallbackManager

    def __str__(self) -> str:
        return "\n".join(
            ["covered:", *(f"  {one}" for one in self.covered), "not covered:", *map("  {}".format, self.not_covered)]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def uninstall(self) -> None:
        """Put back what was there; what has been replaced since stays. Engines made meanwhile stay guarded."""
        # Settings has setters, but no way to be without an LLM again.
        if self.llm is not None and Settings._llm is self.llm:  # noqa: SLF001
            Settings._llm = self._before.llm  # noqa: SLF001
        if self in _installed:
            _installed.remove(self)
            for later in _installed:
                if self.llm is not None and later._before.llm is self.llm:  # noqa: SLF001 - its own class's
                    later._before.llm = self._before.llm  # noqa: SLF001
        if self.handler in self._manager.handlers:
            self._manager.remove_handler(self.handler)
        look_away(self.handler)
        # Another guard that was installed meanwhile is in the same manager.
        others = any(isinstance(handler, GuardCallbackHandler) for handler in self._manager.handlers)
        if self._before.manager is None and Settings._callback_manager is self._manager and not others:  # noqa: SLF001
            Settings._callback_manager = None  # noqa: SLF001


_installed: list[Installed] = []


def install(g: Guard | Backend | str | None = None, *, on_block: OnBlock = "raise") -> Installed:
    """Put a guarded LLM and a callback handler into LlamaIndex's ``Settings``, for all that takes them from there.

    Args:
        g: a Guard; a Backend or its spec, judged by the default policy; None for the embedded model, loaded here.
        on_block: what the guarded LLM does: as in ``guard_llm()``. The handler raises for a query, and drops nodes.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: g is no guard.
        ValueError: on_block is none of those that there are.
    """
    guard = Judge.of(g).ready()
    # Asking for Settings.llm would make one.
    before = _Before(Settings._llm, Settings._callback_manager)  # noqa: SLF001
    llm = None if before.llm is None else guard_llm(before.llm, guard, on_block=on_block)
    with warnings.catch_warnings():
        # What it warns of is in the report.
        warnings.simplefilter("ignore", CoverageWarning)
        handler = _Dropping(guard)
    manager = Settings.callback_manager
    # In place, for what has this callback manager already; and first, so that the others hear nothing of what it stops.
    manager.handlers.insert(0, handler)
    if llm is not None:
        Settings._llm = llm  # noqa: SLF001 - its setter would give it another callback manager
    installed = Installed(
        guard=guard,
        llm=llm,
        handler=handler,
        postprocessor=GuardPostprocessor(guard),
        covered=(_HANDLER,) if llm is None else (_LLM, _HANDLER),
        not_covered=(_NO_LLM, *_NOT_COVERED) if llm is None else _NOT_COVERED,
        _before=before,
        _manager=manager,
    )
    _installed.append(installed)
    return installed
