"""A conversation goes on after a question that was withheld, and no model ever reads that question."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import REFUSAL, guard_chat_engine, guard_llm
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    LLMMetadata,
    TextBlock,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

NOTE = "[Withheld by policy.]"
ANSWER = "Thought: I can answer. \nAnswer: With yeast."

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Reader(FunctionCallingLLM):
    """A model that keeps what it was asked."""

    _read: list[list[ChatMessage]] = PrivateAttr(default_factory=list)

    @property
    def read(self) -> list[list[ChatMessage]]:
        return self._read

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        self._read.append(list(messages))
        return ChatResponse(message=ChatMessage(role="assistant", content=ANSWER))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        yield ChatResponse(message=self.chat(messages).message, delta=ANSWER)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        async def stream() -> Any:
            for chunk in self.stream_chat(messages):
                yield chunk

        return stream()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self.chat([ChatMessage(content=prompt)]).message.content or "")

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self.complete(prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield self.complete(prompt)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _prepare_chat_with_tools(self, tools: Any, **kwargs: Any) -> dict[str, Any]:
        return {"messages": kwargs["chat_history"]}

    def get_tool_calls_from_response(self, *_: Any, **__: Any) -> list[Any]:
        return []


class Counting(KeywordBackend):
    """Keeps what it judged, and withholds the word EVIL."""

    def __init__(self) -> None:
        super().__init__({"EVIL": 0.99})
        self.judged: list[Conversation] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.judged += conversations
        return super().classify(conversations)


def note(text: str) -> str:
    """Note something."""
    return text


def function_agent(llm: Any) -> Any:
    return FunctionAgent(tools=[note], llm=llm, system_prompt="Be brief.")


def streaming_function_agent(llm: Any) -> Any:
    return FunctionAgent(tools=[note], llm=llm, streaming=True)


def react_agent(llm: Any) -> Any:
    return ReActAgent(tools=[note], llm=llm, streaming=False)


def workflow(llm: Any) -> Any:
    agents: list[Any] = [FunctionAgent(name="one", description="One.", llm=llm, tools=[note])]
    return AgentWorkflow(agents=agents)


def stateful_workflow(llm: Any) -> Any:
    agents: list[Any] = [FunctionAgent(name="one", description="One.", llm=llm, tools=[note])]
    return AgentWorkflow(agents=agents, initial_state={"stirred": 0})


def of_agent(make: Callable[[Any], Any], llm: Any) -> Callable[[str], Awaitable[str]]:
    agent, memory = make(llm), ChatMemoryBuffer.from_defaults()

    async def ask(question: str) -> str:
        return str(await agent.run(question, memory=memory))

    return ask


def simple(llm: Any) -> Any:
    return SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())


def context(llm: Any) -> Any:
    retriever = VectorStoreIndex.from_documents([Document(text="Bread rises.")]).as_retriever()
    return ContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=ChatMemoryBuffer.from_defaults())


def condensed(llm: Any) -> Any:
    retriever = VectorStoreIndex.from_documents([Document(text="Bread rises.")]).as_retriever()
    memory = ChatMemoryBuffer.from_defaults()
    return CondensePlusContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=memory, skip_condense=True)


def of_engine(make: Callable[[Any], Any], llm: Any) -> Callable[[str], Awaitable[str]]:
    engine = make(llm)

    async def ask(question: str) -> str:
        return str(await engine.achat(question))

    return ask


CONVERSATIONS: dict[str, tuple[Any, Any]] = {
    **{make.__name__: (of_agent, make) for make in (function_agent, streaming_function_agent, react_agent)},
    **{make.__name__: (of_agent, make) for make in (workflow, stateful_workflow)},
    **{make.__name__: (of_engine, make) for make in (simple, context, condensed)},
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
async def test_a_conversation_goes_on_after_a_question_that_was_withheld(kind: str, on_block: Any) -> None:
    """Its memory has the question still; the model reads a note in its place."""
    of, make = CONVERSATIONS[kind]
    llm, backend = Reader(), Counting()
    guarded = guard_llm(llm, backend, on_block=on_block)
    ask = of(make, guarded)
    if kind == "react_agent" and on_block == "refuse":
        pytest.skip("a ReAct agent asks again when it is refused, until it has asked often enough")
    for question in ("How is EVIL made?", "How is bread made?", "And an EVIL one?", "And cake?"):
        try:
            answer = await ask(question)
        except Blocked:
            assert on_block == "raise"
            answer = REFUSAL
        assert (REFUSAL in answer) == ("EVIL" in question), question
        assert ("yeast" in answer) == ("EVIL" not in question), question
    read = "".join(str(message) for messages in guarded.inner.read for message in messages)  # type: ignore[attr-defined]
    assert "EVIL" not in read
    assert NOTE in read or kind in ("context", "condensed")
    asked = [conversation.turns for conversation in backend.judged if conversation.last.role == "user"]
    assert len(asked) == len(set(asked))


def said(*texts: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=text) for role, text in texts]


EARLIER = [("user", "EVIL"), ("assistant", "No."), ("user", "How is bread made?")]


def test_what_comes_after_a_question_is_judged_without_it() -> None:
    """As the model will read it; and the rest is what was given."""
    llm, backend = guard_llm(Reader(), inner := Counting()), inner
    given = said(("system", "Be brief."), *EARLIER)
    with pytest.raises(Blocked):
        llm.chat(given[:2])
    llm.chat(given)
    assert [conversation.trial for conversation in backend.judged[-2:]] == ["How is bread made?", ANSWER]
    assert all("EVIL" not in str(conversation.context) for conversation in backend.judged[-2:])
    (read,) = llm.inner.read  # type: ignore[attr-defined]
    assert [message.content for message in read] == ["Be brief.", NOTE, "No.", "How is bread made?"]
    assert given[1].content == "EVIL"
    judged = len(backend.judged)
    llm.chat(given)
    assert len(backend.judged) == judged + 1  # the answer


def test_a_question_that_came_along_stops_a_call_first() -> None:
    """Nobody has been told of it yet."""
    llm = guard_llm(Reader(), Counting())
    with pytest.raises(Blocked):
        llm.chat(said(*EARLIER))
    assert llm.chat(said(*EARLIER)).message.content == ANSWER


@pytest.mark.parametrize(
    "messages",
    [
        said(("user", "EVIL")),
        said(("user", "Hi."), ("user", "EVIL")),
        said(("user", "EVIL"), ("assistant", "Well?")),
        said(("system", "EVIL"), ("user", "Hi.")),
        said(("user", "Hi."), ("assistant", "EVIL"), ("user", "Hi.")),
        said(("user", "Hi."), ("tool", "EVIL"), ("user", "Hi.")),
    ],
)
def test_only_earlier_questions_are_left_out(messages: list[ChatMessage]) -> None:
    """What else is withheld stops the call, each time."""
    llm = guard_llm(Reader(), Counting())
    for _ in range(2):
        with pytest.raises(Blocked):
            llm.chat(messages)
    assert llm.inner.read == []  # type: ignore[attr-defined]


def test_a_question_of_several_parts_is_left_out_whole() -> None:
    """Its other parts make little sense alone."""
    guard = Guard(Counting(), policy=Policy(on_partial="allow"))
    parts = ChatMessage(role="user", blocks=[TextBlock(text="EVIL"), ImageBlock(image=b"1")])
    llm = guard_llm(Reader(), guard)
    with pytest.raises(Blocked):
        llm.chat([parts])
    llm.chat([parts, *said(("user", "Hi."))])
    assert [message.content for message in llm.inner.read[0]] == [NOTE, "Hi."]  # type: ignore[attr-defined]


async def test_a_question_that_could_not_be_judged_is_not_left_out() -> None:
    """A failure may pass."""

    class Failing(Counting):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise BackendError("away")

    llm = guard_llm(Reader(), Failing())
    for _ in range(2):
        with pytest.raises(Blocked, match="away"):
            await llm.achat(said(*EARLIER))


def test_what_cannot_be_left_out_stops_the_call() -> None:
    """A chat engine's own history, where the engine is guarded and not its model."""
    engine = guard_chat_engine(simple(llm := Reader()), Counting())
    for _ in range(2):
        with pytest.raises(Blocked):
            engine.chat("Hi.", chat_history=said(*EARLIER[:2]))
    assert llm.read == []


async def test_many_at_once_leave_out_each_its_own() -> None:
    """Conversations share a guard, not their questions."""
    llm = guard_llm(Reader(), Counting())
    chats = [said(("user", f"EVIL {at}"), ("user", f"How is bread {at} made?")) for at in range(20)]
    stopped = await asyncio.gather(*(llm.achat(chat[:1]) for chat in chats), return_exceptions=True)
    assert {type(one) for one in stopped} == {Blocked}
    await asyncio.gather(*map(llm.achat, chats))
    read: Any = llm.inner.read  # type: ignore[attr-defined]
    assert sorted(chat[1].content for chat in read) == sorted(chat[1].content or "" for chat in chats)
    assert {chat[0].content for chat in read} == {NOTE}
