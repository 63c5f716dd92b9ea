"""install(): a guard in Settings, which says what it covers and undoes itself."""

from __future__ import annotations

import gc
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
from llama_index.callbacks.guardmw import install
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index_instrumentation import get_dispatcher

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_index.core import VectorStoreIndex
    from llama_index.core.llms import LLM

KEYWORD = KeywordBackend({"EVIL": 0.99})


def test_guards_the_llm_of_settings_and_puts_back_what_was_there(make_llm: Callable[..., LLM]) -> None:
    """Inside, an unsafe prompt is blocked; outside, all is as before."""
    llm, manager = make_llm(), CallbackManager([])
    Settings.llm, Settings.callback_manager = llm, manager
    with install(KEYWORD) as installed:
        assert Settings.llm is installed.llm
        assert manager.handlers == [installed.handler]
        with pytest.raises(Blocked):
            Settings.llm.complete("EVIL")
    assert Settings.llm is llm
    assert Settings.callback_manager is manager
    assert manager.handlers == []


def test_a_guard_that_was_installed_later_stays(make_llm: Callable[..., LLM]) -> None:
    """Also where the first one made the callback manager, and goes first."""
    llm = Settings.llm = make_llm()
    Settings._callback_manager = None
    first, second = install(KEYWORD), install(KEYWORD)
    first.uninstall()
    assert Settings.callback_manager.handlers == [second.handler]
    assert Settings.llm is second.llm
    second.uninstall()
    assert Settings.callback_manager.handlers == []
    assert Settings.llm is llm


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_guards_that_are_taken_away_in_any_order_leave_what_was_there(
    order: tuple[int, ...], make_llm: Callable[..., LLM]
) -> None:
    """Also twice, and however many there are."""
    llm = Settings.llm = make_llm()
    installed = [install(KEYWORD) for _ in order]
    for at in order:
        installed[at].uninstall()
        installed[at].uninstall()
    assert Settings.llm is llm


def test_nobody_looks_out_for_llms_once_the_last_handler_is_gone(make_llm: Callable[..., LLM]) -> None:
    """The dispatcher has the span handlers again that it had."""
    gc.collect()
    root, Settings.llm = get_dispatcher(), make_llm()

    def looking() -> bool:
        return any(handler.class_name() == "GuardmwLookout" for handler in root.span_handlers)

    first, second = install(KEYWORD), install(KEYWORD)
    first.uninstall()
    assert looking()
    second.uninstall()
    assert not looking()


def test_says_what_it_does_not_cover() -> None:
    """Without an LLM it says so, and makes none."""
    Settings._llm = None
    with install(KEYWORD) as installed:
        assert installed.llm is None
        assert "an LLM: none is set" in str(installed)
        assert "guard_tool(tool)" in str(installed)
    assert Settings._llm is None


def test_has_a_postprocessor_for_engines(index_of: Callable[..., VectorStoreIndex]) -> None:
    """With the same guard; Settings has no place for one."""
    nodes = index_of("EVIL", "Eggs").as_retriever().retrieve("?")
    with install(KEYWORD) as installed:
        kept = installed.postprocessor.postprocess_nodes(nodes, query_str="?")
    assert [node.text for node in kept] == ["Eggs"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("given", [False, True])
async def test_an_unsafe_node_is_dropped_and_does_not_stop_the_query(
    given: bool,
    asynchronous: bool,
    index_of: Callable[..., VectorStoreIndex],
    make_llm: Callable[..., LLM],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The handler hears of it first, and does as the postprocessor would, whether an engine was given that or not."""
    Settings.llm = make_llm()
    with install(KEYWORD) as installed:
        postprocessors = [installed.postprocessor] if given else []
        index = index_of("pure EVIL", "Eggs")
        engine = index.as_query_engine(node_postprocessors=postprocessors)
        response = await engine.aquery("?") if asynchronous else engine.query("?")
        assert [node.text for node in response.source_nodes] == ["Eggs"]
        assert str(response) == "All is well."
        assert [node.text for node in index.as_retriever().retrieve("?")] == ["Eggs"]
    assert "EVIL" not in caplog.text
    assert "dropped a node" in caplog.text


def test_nodes_that_cannot_be_dropped_stop_the_query(index_of: Callable[..., VectorStoreIndex]) -> None:
    """A retriever may tell of what it found by other than the list that it returns."""
    nodes = index_of("EVIL", "Eggs").as_retriever().retrieve("?")
    with install(KEYWORD) as installed, pytest.raises(Blocked):
        installed.handler.on_event_end(CBEventType.RETRIEVE, {EventPayload.NODES: tuple(nodes)})
