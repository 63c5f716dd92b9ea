"""What comes with an answer beside its text, wherever it hangs, has been judged or is not there."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import REFUSAL, guard_chat_engine, guard_query_engine
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, LLMMetadata, ToolCallBlock
from llama_index.core.base.response.schema import Response
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import CondenseQuestionChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.llms import CustomLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.tools import ToolOutput

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Conversation, Scores

# LlamaIndex reports what a chat engine's thread raises on its own, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
HISTORY = [ChatMessage(content="Who?"), ChatMessage(role="assistant", content="He.")]
ANSWER = "A first sentence that is long enough to be judged on its own, and that is fine as it is. {} is the end."


class Witness(KeywordBackend):
    """Blocks a word, and counts what it read."""

    def __init__(self, word: str) -> None:
        super().__init__({word: 0.99})
        self.read: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.read += [conversation.trial for conversation in conversations]
        return super().classify(conversations)


class Condensing(CustomLLM):
    """Rewrites questions, and answers them."""

    question: str = "The whole question?"
    answer: str = ANSWER.format("It")
    _open: int = PrivateAttr(default=0)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def _said(self, prompt: str) -> str:
        return self.question if "standalone" in prompt.lower() else self.answer

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self._said(prompt))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        self._open += 1
        try:
            so_far = ""
            for word in self._said(prompt).split(" "):
                delta = f"{word} "
                so_far += delta
                yield CompletionResponse(text=so_far, delta=delta)
        finally:
            self._open -= 1


def condensing(llm: Condensing, *, node: str = "Eggs are boiled.", **metadata: str) -> CondenseQuestionChatEngine:
    """A chat engine over a query engine."""
    index = VectorStoreIndex.from_documents([Document(text=node, metadata=metadata)])
    return CondenseQuestionChatEngine.from_defaults(
        query_engine=index.as_query_engine(llm=llm),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(chat_history=list(HISTORY)),
    )


async def chat(engine: Any) -> tuple[Any, str]:
    response = engine.chat("What?")
    return response, response.response


async def achat(engine: Any) -> tuple[Any, str]:
    response = await engine.achat("What?")
    return response, response.response


async def stream_chat(engine: Any) -> tuple[Any, str]:
    response = engine.stream_chat("What?")
    return response, "".join(response.response_gen)


async def astream_chat(engine: Any) -> tuple[Any, str]:
    response = await engine.astream_chat("What?")
    return response, "".join([delta async for delta in response.async_response_gen()])


WAYS = pytest.mark.parametrize("way", [chat, achat, stream_chat, astream_chat])
STREAMS = pytest.mark.parametrize("way", [stream_chat, astream_chat])


@WAYS
async def test_a_question_that_a_model_rewrote_is_judged(way: Callable[[Any], Any]) -> None:
    """It hangs in the sources, as what the engine was asked."""
    llm = Condensing(question="An EVIL question?")
    response, said = await way(condensing(llm))
    assert "EVIL" in repr(response.sources)
    with pytest.raises(Blocked):
        await way(guard_chat_engine(condensing(llm), Witness("EVIL")))
    response, said = await way(guard_chat_engine(condensing(llm), Witness("EVIL"), on_block="refuse"))
    assert said == REFUSAL
    assert response.sources == []


@WAYS
async def test_nodes_and_notes_in_the_sources_are_judged(way: Callable[[Any], Any]) -> None:
    """An asynchronous stream has them nowhere else."""
    for beside in ({"node": "An EVIL node."}, {"note": "EVIL"}):
        with pytest.raises(Blocked):
            await way(guard_chat_engine(condensing(Condensing(), **beside), Witness("EVIL")))


@STREAMS
async def test_the_stream_that_an_engine_reads_itself_is_not_in_the_sources(way: Callable[[Any], Any]) -> None:
    """Whoever took it would read what nobody has judged."""
    llm = Condensing(answer=ANSWER.format("EVIL"))
    refused, said = await way(guard_chat_engine(condensing(llm), Witness("EVIL"), on_block="refuse"))
    assert said.endswith(REFUSAL)
    (source,) = refused.sources
    assert source.raw_output.response_gen is None
    assert "EVIL" not in repr(refused) + str(source.raw_output.response_txt)
    assert llm._open == 0


@WAYS
async def test_safe_sources_are_as_they_were(way: Callable[[Any], Any]) -> None:
    """But for that stream; and what is in them twice is read once."""
    bare, said = await way(condensing(Condensing()))
    response, guarded = await way(guard_chat_engine(condensing(Condensing()), witness := Witness("EVIL")))
    assert guarded == said
    for one, other in zip(response.sources, bare.sources, strict=True):
        assert (one.tool_name, one.content, one.raw_input) == (other.tool_name, other.content, other.raw_input)
        assert type(one.raw_output) is type(other.raw_output)
        assert [node.text for node in one.raw_output.source_nodes] == ["Eggs are boiled."]
    assert witness.read.count("Eggs are boiled.") == 1
    assert witness.read.count("The whole question?") == 1
    assert sum("is the end" in read for read in witness.read) == 1


@WAYS
async def test_a_question_that_stays_as_it_was_is_judged_once(way: Callable[[Any], Any]) -> None:
    """As are the nodes of an engine that retrieves them."""
    index = VectorStoreIndex.from_documents([Document(text="Eggs are boiled.")])
    engine = ContextChatEngine.from_defaults(
        index.as_retriever(), llm=Condensing(), memory=ChatMemoryBuffer.from_defaults()
    )
    await way(guard_chat_engine(engine, witness := Witness("EVIL")))
    assert witness.read.count("What?") == 1
    assert sum("Eggs" in read for read in witness.read) == 1


@WAYS
async def test_a_history_with_calls_of_tools_is_gone_on_from(way: Callable[[Any], Any]) -> None:
    """What an agent left in it is the context of what is judged."""
    history = [
        ChatMessage("Weather?"),
        ChatMessage(
            role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="weather", tool_kwargs={"at": "sea"})]
        ),
        ChatMessage("Sunny.", role="tool", additional_kwargs={"tool_call_id": "1"}),
    ]
    memory = ChatMemoryBuffer.from_defaults(chat_history=history)
    engine = SimpleChatEngine.from_defaults(llm=Condensing(), memory=memory)
    assert "is the end" in (await way(guard_chat_engine(engine, Witness("EVIL"))))[1]


class Noting(SimpleChatEngine):
    """Says harmless things, of a tool's harmful ones."""

    output: ToolOutput

    def chat(self, message: str, chat_history: Any = None) -> AgentChatResponse:
        return AgentChatResponse("Fine.", sources=[self.output])


@pytest.mark.parametrize(
    "output",
    [
        ToolOutput("retriever", content="EVIL", raw_input={}, raw_output=None),
        ToolOutput("query_engine", content="EVIL", raw_input={}, raw_output=None),
        ToolOutput("search", content="Found.", raw_input={"for": "EVIL"}, raw_output=None),
        ToolOutput("search", content="Found.", raw_input={}, raw_output={"rows": [("EVIL",)]}),
        ToolOutput("search", content="Found.", raw_input={}, raw_output=Response("EVIL")),
        ToolOutput("search", content="Failed.", raw_input={}, is_error=True, exception=OSError("EVIL")),
    ],
    ids=["a retriever's", "a query engine's", "what it was given", "what it gave", "an answer in it", "why it failed"],
)
def test_all_that_a_tool_was_given_and_gave_is_judged(output: ToolOutput) -> None:
    """Whatever the tool is called."""
    engine = Noting.from_defaults(llm=Condensing(), memory=ChatMemoryBuffer.from_defaults())
    engine.output = output
    with pytest.raises(Blocked):
        guard_chat_engine(engine, Witness("EVIL")).chat("What?")


RELATED = RelatedNodeInfo(node_id="1", metadata={"note": "EVIL"})


@pytest.mark.parametrize("related", [RELATED, [RelatedNodeInfo(node_id="2"), RELATED]])
def test_the_metadata_of_a_nodes_relatives_is_judged(related: Any) -> None:
    """No model is shown it; whoever has the node has it."""
    kind = NodeRelationship.CHILD if isinstance(related, list) else NodeRelationship.SOURCE
    found = NodeWithScore(node=TextNode(text="Eggs are boiled.", relationships={kind: related}))
    engine = VectorStoreIndex([]).as_query_engine(llm=Condensing())
    guarded = guard_query_engine(engine, witness := Witness("EVIL"))
    with pytest.raises(Blocked):
        guarded.synthesize(QueryBundle("How?"), [found])
    assert "Eggs are boiled.\nEVIL" in witness.read


def test_metadata_that_relatives_have_in_common_is_read_once() -> None:
    """As a parser gives them: all have that of their document."""
    shared = {"file": "eggs.txt"}
    relatives: Any = {kind: RelatedNodeInfo(node_id="1", metadata=shared) for kind in ("1", "2", "3")}
    found = NodeWithScore(node=TextNode(text="Eggs are boiled.", metadata=shared, relationships=relatives))
    engine = VectorStoreIndex([]).as_query_engine(llm=Condensing())
    guard_query_engine(engine, witness := Witness("EVIL")).synthesize(QueryBundle("How?"), [found])
    assert "file: eggs.txt\n\nEggs are boiled." in witness.read
