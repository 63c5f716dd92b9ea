"""What is guarded stays guarded where it is copied or sent to another process, or says that it is not."""

# Fakes are what they stand in for.
# ruff: noqa: D103, S301

from __future__ import annotations

import copy
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import GuardCallbackHandler, GuardPostprocessor, guard_llm, guard_tool
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore, TextNode

from guardmw import BackendError, Blocked, Guard
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore::llama_index.callbacks.guardmw.CoverageWarning")

EVIL = KeywordBackend({"EVIL": 0.99})


class Loaded(KeywordBackend):
    """Holds what cannot be pickled or copied, as a loaded model does."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.lock = threading.Lock()


def llm(g: Any) -> Any:
    return guard_llm(MockLLM(), g)


def calling_llm(g: Any) -> Any:
    return guard_llm(MockFunctionCallingLLM(), g)


def handled_llm(g: Any) -> Any:
    return MockLLM(callback_manager=CallbackManager([GuardCallbackHandler(g)]))


def postprocessor(g: Any) -> Any:
    return GuardPostprocessor(g, on_block="raise")


def tool(g: Any) -> Any:
    def say(text: str) -> str:
        """Say it."""
        return text

    return guard_tool(say, g)


def use(guarded: Any, text: str) -> None:
    """Raises what comes of it."""
    if isinstance(guarded, GuardPostprocessor):
        guarded.postprocess_nodes([NodeWithScore(node=TextNode(text=text))], query_str="?")
    elif hasattr(guarded, "complete"):
        guarded.complete(text)
    elif error := guarded.call(text=text).exception:
        raise error


def pickled(guarded: Any) -> Any:
    return pickle.loads(pickle.dumps(guarded))


PICKLED = pytest.mark.parametrize("make", [llm, calling_llm, handled_llm, postprocessor])


@pytest.mark.parametrize("make", [llm, calling_llm, handled_llm, postprocessor, tool])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_is_guarded_by_the_same_model(make: Callable[[Any], Any], way: Callable[[Any], Any]) -> None:
    """Which may be one that cannot be copied."""
    guarded = make(Guard(Loaded()))
    for one in (way(guarded), guarded):
        use(one, "fine")
        with pytest.raises(Blocked):
            use(one, "EVIL")


@PICKLED
@pytest.mark.parametrize("given", [EVIL, Guard(EVIL)], ids=["backend", "guard"])
def test_what_arrives_is_guarded_alike(make: Callable[[Any], Any], given: Any) -> None:
    """And so is what was sent."""
    guarded = make(given)
    for one in (pickled(guarded), pickled(pickled(guarded)), guarded):
        use(one, "fine")
        with pytest.raises(Blocked):
            use(one, "EVIL")


@PICKLED
def test_a_guard_that_cannot_be_sent_lets_nothing_pass_where_it_is_missing(make: Callable[[Any], Any]) -> None:
    """It names the fix; what was sent is as it was."""
    guarded = make(Guard(Loaded()))
    for arrived in (pickled(guarded), pickled(pickled(guarded))):
        with pytest.raises(BackendError, match=r"lost its guard .*lock.* such as a spec"):
            use(arrived, "fine")
    use(guarded, "fine")
    with pytest.raises(Blocked):
        use(guarded, "EVIL")


def test_the_settings_of_what_is_sent_arrive() -> None:
    """Its own, and those that it shares with the LLM that answers."""
    sent = guard_llm(MockLLM(), EVIL, on_block="refuse", input="off")
    sent.system_prompt = "Be kind."
    arrived: Any = pickled(sent)
    assert (arrived.system_prompt, arrived.inner.system_prompt) == ("Be kind.", "Be kind.")
    assert arrived.complete("EVIL").text == sent.complete("EVIL").text == "I can't help with that."
    assert pickled(GuardPostprocessor(EVIL, on_block="flag")).on_block == "flag"


def test_callback_handlers_that_cannot_be_sent_stay_where_they_are() -> None:
    """LlamaIndex drops them; the guard arrives."""
    handler = TokenCountingHandler(tokenizer=lambda text: text.split())
    sent = guard_llm(MockLLM(callback_manager=CallbackManager([handler])), EVIL)
    with pytest.raises(Blocked):
        pickled(sent).complete("EVIL")
    assert sent.callback_manager.handlers == [handler]
