"""An exception that quotes what a model said is judged as an answer is."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

from traceback import format_exception
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import REFUSAL, guard_chat_engine, guard_llm, guard_query_engine
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer

from guardmw import BackendError, Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Conversation, Scores

# LlamaIndex reports what a chat engine's thread raises on its own, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
BACKEND = KeywordBackend({"EVIL": 0.99})
START = "A first sentence that is long enough to be judged on its own, and that is fine. "


def plain() -> Exception:
    # Query engines swallow a ValueError, and log it.
    return RuntimeError("no JSON: 'something EVIL'")


def caused() -> Exception:
    error = ConnectionError("gone")
    error.__cause__ = ValueError("no JSON: 'something EVIL'")
    return error


def noted() -> Exception:
    error = ConnectionError("gone")
    error.add_note("The answer was: something EVIL")
    return error


def grouped() -> Exception:
    return ExceptionGroup("two of them", [ConnectionError("gone"), plain()])


class Failing(CustomLLM):
    """Fails; where it streams, after a sentence."""

    _error: Callable[[], Exception] = PrivateAttr()

    @classmethod
    def by(cls, error: Callable[[], Exception], *handlers: BaseCallbackHandler) -> Failing:
        made = cls(callback_manager=CallbackManager(list(handlers)))
        made._error = error
        return made

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise self._error()

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        def said() -> Any:
            yield CompletionResponse(text=START, delta=START)
            yield CompletionResponse(text=f"{START}Something", delta="Something")
            raise self._error()

        return said()


MESSAGES = [ChatMessage(content="hi")]


async def chat(llm: Any) -> Any:
    return llm.chat(MESSAGES).message.content


async def achat(llm: Any) -> Any:
    return (await llm.achat(MESSAGES)).message.content


async def complete(llm: Any) -> Any:
    return llm.complete("hi").text


async def stream_chat(llm: Any) -> Any:
    return "".join(chunk.delta for chunk in llm.stream_chat(MESSAGES))


async def astream_chat(llm: Any) -> Any:
    return "".join([chunk.delta async for chunk in await llm.astream_chat(MESSAGES)])


def _guarded(way: Any) -> Any:
    return lambda llm, **options: way(guard_llm(llm, BACKEND, **options))


def _chats(way: Any, make: Any) -> Any:
    return lambda llm, **options: way(guard_chat_engine(make(llm), BACKEND, **options))


def simple(llm: Any) -> Any:
    return SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())


def context(llm: Any) -> Any:
    index = VectorStoreIndex.from_documents([Document(text="Eggs are boiled.")])
    memory = ChatMemoryBuffer.from_defaults()
    return ContextChatEngine.from_defaults(retriever=index.as_retriever(), llm=llm, memory=memory)


async def engine_chat(engine: Any) -> Any:
    return engine.chat("hi").response


async def engine_achat(engine: Any) -> Any:
    return (await engine.achat("hi")).response


async def engine_stream_chat(engine: Any) -> Any:
    return "".join(engine.stream_chat("hi").response_gen)


async def engine_astream_chat(engine: Any) -> Any:
    return "".join([piece async for piece in (await engine.astream_chat("hi")).async_response_gen()])


def _queries(*, streaming: bool) -> Any:
    async def query(llm: Any, **options: Any) -> Any:
        index = VectorStoreIndex.from_documents([Document(text="Eggs are boiled.")])
        return str(
            guard_query_engine(index.as_query_engine(llm=llm, streaming=streaming), BACKEND, **options).query("?")
        )

    return query


async def aquery(llm: Any, **options: Any) -> Any:
    index = VectorStoreIndex.from_documents([Document(text="Eggs are boiled.")])
    return str(await guard_query_engine(index.as_query_engine(llm=llm), BACKEND, **options).aquery("?"))


WAYS: dict[str, Any] = {way.__name__: _guarded(way) for way in (chat, achat, complete, stream_chat, astream_chat)}
for _make in (simple, context):
    for _way in (engine_chat, engine_achat, engine_stream_chat, engine_astream_chat):
        WAYS[f"{_make.__name__} {_way.__name__}"] = _chats(_way, _make)
WAYS |= {"query": _queries(streaming=False), "stream_query": _queries(streaming=True), "aquery": aquery}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


class Told(BaseCallbackHandler):
    """Keeps all it is told."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.told: list[Any] = []

    def on_event_start(self, event_type: Any, payload: Any = None, *_: Any, **__: Any) -> str:
        self.told.append(payload)
        return ""

    def on_event_end(self, event_type: Any, payload: Any = None, *_: Any, **__: Any) -> None:
        self.told.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None:
        pass


@EVERY_WAY
@pytest.mark.parametrize("error", [plain, caused, noted, grouped])
async def test_an_exception_that_quotes_what_is_withheld_is_withheld(way: str, error: Any) -> None:
    """Whether it says so itself or what it came of does; and nobody finds it behind the one that is raised."""
    with pytest.raises(Blocked) as raised:
        await WAYS[way](Failing.by(error))
    assert "EVIL" not in "".join(format_exception(raised.value))
    assert raised.value.__context__ is None
    refused = await WAYS[way](Failing.by(error), on_block="refuse")
    assert refused.endswith(REFUSAL)
    if way in ("stream_chat", "astream_chat"):
        assert refused.startswith(START)


@EVERY_WAY
async def test_another_exception_is_the_models_own(way: str) -> None:
    """With what it carries."""
    error = ConnectionError("gone")
    with pytest.raises(ConnectionError) as raised:
        await WAYS[way](Failing.by(lambda: error))
    assert raised.value is error


@pytest.mark.parametrize("way", [chat, achat, complete, stream_chat, astream_chat])
async def test_callback_handlers_hear_of_no_exception_that_is_withheld(way: Any) -> None:
    """They hear of the block."""
    with pytest.raises(Blocked):
        await way(guard_llm(Failing.by(plain, told := Told()), BACKEND))
    assert "EVIL" not in repr(told.told)
    assert "Blocked" in repr(told.told)


async def test_the_errors_of_guardmw_are_not_judged() -> None:
    """They quote nothing, and a backend that is away could not judge them."""

    class Away(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            assert all(conversation.last.role == "user" for conversation in conversations)
            return super().classify(conversations)

    with pytest.raises(BackendError):
        guard_llm(Failing.by(lambda: BackendError("away")), Away({})).chat(MESSAGES)
