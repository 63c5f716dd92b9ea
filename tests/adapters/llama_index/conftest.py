"""Models that count their calls, and a LlamaIndex whose settings are its own after every test."""

# Fakes are what they stand in for.
# ruff: noqa: D102

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import CoverageWarning, GuardCallbackHandler
from llama_index.core import Document, MockEmbedding, Settings, VectorStoreIndex
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback

from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_index.core.base.llms.types import CompletionResponseGen
    from llama_index.core.callbacks.base_handler import BaseCallbackHandler

    from guardmw import Backend, Guard


class CountingLLM(CustomLLM):
    """Answers ``reply``, word by word where it streams, or fails; and counts how often it ran."""

    reply: str = "All is well."
    fails: bool = False
    _calls: int = PrivateAttr(default=0)

    @property
    def calls(self) -> int:
        return self._calls

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self._calls += 1
        if self.fails:
            raise RuntimeError(self.reply)
        return CompletionResponse(text=self.reply)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        self._calls += 1

        def words() -> CompletionResponseGen:
            text = ""
            for word in self.reply.split(" "):
                delta = f" {word}" if text else word
                text += delta
                yield CompletionResponse(text=text, delta=delta)
            if self.fails:
                raise RuntimeError(self.reply)

        return words()


@pytest.fixture
def make_handler() -> Callable[..., GuardCallbackHandler]:
    """Makes a handler that has already warned."""

    def make(g: Guard | Backend | str | None) -> GuardCallbackHandler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            return GuardCallbackHandler(g)

    return make


@pytest.fixture
def handler(make_handler: Callable[..., GuardCallbackHandler]) -> GuardCallbackHandler:
    """A handler that blocks the word EVIL."""
    return make_handler(KeywordBackend({"EVIL": 0.99}))


@pytest.fixture
def make_llm() -> Callable[..., CountingLLM]:
    """Makes a counting model with these handlers."""

    def make(*handlers: BaseCallbackHandler, reply: str = "All is well.", fails: bool = False) -> CountingLLM:
        return CountingLLM(reply=reply, fails=fails, callback_manager=CallbackManager(list(handlers)))

    return make


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Every test starts and ends without settings."""
    before = dict(vars(Settings))
    Settings.embed_model = MockEmbedding(embed_dim=4)
    yield
    vars(Settings).clear()
    vars(Settings).update(before)


@pytest.fixture
def index_of() -> Callable[..., VectorStoreIndex]:
    """Makes an index of these texts; its callback manager is that of the settings."""

    def index_of(*texts: str, **metadata: str) -> VectorStoreIndex:
        return VectorStoreIndex.from_documents([Document(text=text, metadata=metadata) for text in texts])

    return index_of
