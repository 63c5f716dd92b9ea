"""What comes with an answer and no model is shown has been judged, too, before a caller of an engine has it."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import guard_chat_engine, guard_query_engine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import Response
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CustomQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import ImageNode, IndexNode, NodeWithScore, QueryBundle, TextNode

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from guardmw import Conversation, Scores

# LlamaIndex reports what a chat engine's thread raises on its own, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
EXCLUDED = {"original_text": "BAD"}
BESIDE = TextNode(text="fine", metadata=EXCLUDED, excluded_llm_metadata_keys=["original_text"])
UNTOLD = TextNode(text="fine", metadata=EXCLUDED, text_template="{content}")
KEYED = TextNode(text="fine", metadata={"is it BAD?": 1}, excluded_llm_metadata_keys=["is it BAD?"])
BEHIND = IndexNode(text="fine", index_id="1", obj=BESIDE)
UNSHOWN = TextNode(text="BAD", metadata={"author": "Somebody"}, text_template="{metadata_str}")
NAMED = TextNode(text="fine", id_="What a BAD name.")


class Witness(KeywordBackend):
    """Blocks a word, and keeps what it read."""

    def __init__(self) -> None:
        super().__init__({"BAD": 0.99})
        self.read: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        self.read += [conversation.trial for conversation in conversations]
        return super().classify(conversations)


class Finding(BaseRetriever):
    """Finds one node."""

    def __init__(self, node: TextNode) -> None:
        super().__init__()
        self._node = node

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=self._node, score=1.0)]


class Noting(CustomQueryEngine):
    """Says nothing harmful, and something beside it."""

    response: Any

    def custom_query(self, query_str: str) -> Any:
        return self.response


class Saying(SimpleChatEngine):
    """The same in a chat."""

    response: Any

    def chat(self, message: str, chat_history: Any = None) -> AgentChatResponse:
        answer: AgentChatResponse = self.response
        return answer


def saying(response: AgentChatResponse) -> Saying:
    engine = Saying.from_defaults(llm=MockLLM(max_tokens=2), memory=ChatMemoryBuffer.from_defaults())
    engine.response = response
    return engine


async def query(node: TextNode, g: Any) -> None:
    guard_query_engine(RetrieverQueryEngine.from_args(Finding(node), llm=MockLLM(max_tokens=2)), g).query("What?")


async def aquery(node: TextNode, g: Any) -> None:
    await guard_query_engine(RetrieverQueryEngine.from_args(Finding(node), llm=MockLLM(max_tokens=2)), g).aquery(
        "What?"
    )


async def retrieve(node: TextNode, g: Any) -> None:
    guard_query_engine(RetrieverQueryEngine.from_args(Finding(node), llm=MockLLM(max_tokens=2)), g).retrieve(
        QueryBundle("What?")
    )


def chatting(node: TextNode, g: Any) -> Any:
    engine = ContextChatEngine.from_defaults(
        Finding(node), llm=MockLLM(max_tokens=2), memory=ChatMemoryBuffer.from_defaults()
    )
    return guard_chat_engine(engine, g)


async def chat(node: TextNode, g: Any) -> None:
    chatting(node, g).chat("What?")


async def stream_chat(node: TextNode, g: Any) -> None:
    chatting(node, g).stream_chat("What?")


async def astream_chat(node: TextNode, g: Any) -> None:
    await chatting(node, g).astream_chat("What?")


WAYS = pytest.mark.parametrize("way", [query, aquery, retrieve, chat, stream_chat, astream_chat])
NODES = pytest.mark.parametrize(
    "node",
    [BESIDE, UNTOLD, KEYED, BEHIND, UNSHOWN, NAMED],
    ids=["excluded", "no place", "key", "behind", "unshown", "id"],
)


@WAYS
@NODES
async def test_metadata_that_no_model_is_shown_is_judged(way: Callable[..., Awaitable[None]], node: TextNode) -> None:
    """Whether a key is excluded, or the template has no place for it, or for the text; and where a node leads, too."""
    with pytest.raises(Blocked):
        await way(node, Witness())


@WAYS
async def test_metadata_that_a_model_is_shown_is_read_once(way: Callable[..., Awaitable[None]]) -> None:
    """With the text, and not again among the notes of the answer."""
    await way(TextNode(text="fine", metadata={"author": "Somebody"}), witness := Witness())
    assert sum("Somebody" in text for text in witness.read) == 1


@pytest.mark.parametrize("noted", ["BAD", {"original_text": "BAD"}, {}], ids=["text", "another's", "less"])
def test_a_note_under_the_name_of_a_node_is_judged(noted: Any) -> None:
    """Unless it is that node's metadata, which is judged with it."""
    node = TextNode(text="fine", metadata={"author": "Somebody"})
    nodes = [NodeWithScore(node=node)]
    engine = Noting(response=Response("fine", nodes, {node.node_id: noted}))
    if not noted:
        guard_query_engine(engine, Witness()).query("What?")
        return
    with pytest.raises(Blocked):
        guard_query_engine(engine, Witness()).query("What?")


@pytest.mark.parametrize("noted", ["BAD", [NodeWithScore(node=BESIDE)]], ids=["text", "nodes"])
def test_what_a_chat_engine_notes_beside_its_answer_is_judged(noted: Any) -> None:
    """Nodes among it as those are that come with the answer."""
    engine = saying(AgentChatResponse("fine", metadata={"noted": noted}))
    with pytest.raises(Blocked):
        guard_chat_engine(engine, Witness()).chat("What?")


def test_nodes_that_are_noted_too_are_read_once_and_their_pictures_are_no_text() -> None:
    """Engines with pictures note them so."""
    nodes = [NodeWithScore(node=TextNode(text="Eggs are boiled."))]
    pictures = [NodeWithScore(node=ImageNode(text="An egg.", image="QkFE"))]
    response = AgentChatResponse("fine", source_nodes=nodes, metadata={"text_nodes": nodes, "image_nodes": pictures})
    with pytest.raises(Blocked, match="not judged: image"):
        guard_chat_engine(saying(response), witness := Witness()).chat("What?")
    assert witness.read.count("Eggs are boiled.") == 1
    assert "An egg." in witness.read
    assert not any("QkFE" in text for text in witness.read)
