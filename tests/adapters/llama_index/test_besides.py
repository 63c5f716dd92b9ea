"""What stands beside the text of an answer is judged, unless it can say nothing."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from random import Random
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llama_index.callbacks.guardmw import guard_llm
from llama_index.callbacks.guardmw._parts import parts_of_answer, parts_of_message
from llama_index.callbacks.guardmw.engines import _of_nodes
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKEND = KeywordBackend({"EVIL": 0.99, "坏东西": 0.99})


class Answering(MockLLM):
    """Gives one answer, and objects."""

    _answer: ChatResponse = PrivateAttr()

    @classmethod
    def with_(cls, message: ChatMessage, **besides: Any) -> Answering:
        """One that answers so."""
        made = cls()
        made._answer = ChatResponse(message=message, delta=message.content, additional_kwargs=besides)
        return made

    @classmethod
    def of(cls, made_of: BaseModel) -> Answering:
        """One that predicts this object."""
        made = cls.with_(said())
        made._answer.raw = made_of
        return made

    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        """The answer."""
        return self._answer

    def stream_chat(self, messages: Any, **kwargs: Any) -> Iterator[ChatResponse]:
        """The answer, in one piece."""
        yield self._answer

    def structured_predict(self, *_: Any, **__: Any) -> Any:
        """What it was made with."""
        return self._answer.raw

    def stream_structured_predict(self, *_: Any, **__: Any) -> Iterator[Any]:
        """Two states of an object."""
        yield State(status="EV")
        yield State(status="EVIL")


class State(BaseModel):
    """An object with a field that is called as identifiers are."""

    status: str


class Terse(BaseModel):
    """An object with a field that its JSON leaves out."""

    name: str
    note: str = Field(default="", exclude=True)


@dataclass
class Record:
    """An object with a field that its repr leaves out."""

    note: str = field(repr=False)


class Own(ChatMessage):
    """A message with a field of its own."""

    note: str


class Shown:
    """An object of a provider's own."""

    def __str__(self) -> str:
        return "EVIL"


class Converted(Shown):
    """One that can be had as a dict, in which there is less."""

    def to_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class FailedError(Exception):
    """An exception of a provider's own."""

    def to_dict(self) -> dict[str, Any]:
        """The code alone."""
        return {"code": 1}


@dataclass(repr=False)
class Worded:
    """An object with words of its own."""

    number: int = 1

    def __repr__(self) -> str:
        return "EVIL"


class Titled(BaseModel):
    """A model with words of its own."""

    number: int = 1

    def __str__(self) -> str:
        return "EVIL"


@dataclass
class Branch:
    """Part of a tree."""

    name: str
    id: str = ""
    parent: Branch | None = field(default=None)
    branches: list[Branch] = field(default_factory=list)


def tree(leaf: str) -> Branch:
    """One whose branch leads back to its root."""
    root = Branch("root", "an_id")
    root.branches.append(Branch(leaf, parent=root))
    return root


def deep(leaf: str) -> Any:
    """Deeper than anybody reads."""
    value: Any = leaf
    for _ in range(3000):
        value = [value]
    return value


def said(**besides: Any) -> ChatMessage:
    """An answer with this beside it."""
    return ChatMessage(role=MessageRole.ASSISTANT, content="fine", additional_kwargs=besides)


SIGNED = f"call_EVIL__thought__{b64encode(Random(1).randbytes(1200)).decode()}"  # noqa: S311 - no secret
CALL = {"function": {"name": "sh", "arguments": '{"c": "EVIL"}'}}
LLMS = {
    "calls beside the answer": Answering.with_(said(), tool_calls=[CALL]),
    "an older call beside it": Answering.with_(said(), function_call={"name": "sh", "arguments": "EVIL"}),
    "thinking in the message": Answering.with_(said(thinking_delta="EVIL")),
    "an id that is a sentence": Answering.with_(said(id="坏东西，说明书")),
    "a status that is too long": Answering.with_(said(status="EVIL" * 20)),
    "a status that is random": Answering.with_(said(status=SIGNED)),
    "a name": Answering.with_(said(name="EVIL_one")),
    "bytes": Answering.with_(said(x=b"EVIL")),
    "a view of bytes": Answering.with_(said(x=memoryview(b"EVIL"))),
    "keys that are no text": Answering.with_(said(x={("EVIL", 1): 1})),
    "keys that are bytes": Answering.with_(said(x={b"EVIL": 1})),
    "the middle of a long array": Answering.with_(said(x=np.array(["x"] * 600 + ["EVIL"] + ["x"] * 600))),
    "what no repr shows": Answering.with_(said(x=Record("EVIL"))),
    "a message of a provider's own": Answering.with_(Own(role=MessageRole.ASSISTANT, content="fine", note="EVIL")),
    "an object": Answering.with_(said(x=Shown())),
    "an object that is also a dict": Answering.with_(said(x=Converted())),
    "an exception that is also a dict": Answering.with_(said(x=FailedError("EVIL"))),
    "the words of a dataclass": Answering.with_(said(x=Worded())),
    "the words of a model": Answering.with_(said(x=Titled())),
    "what leads back to itself": Answering.with_(said(x=tree("EVIL"))),
    "what a call says besides": Answering.with_(said(tool_calls=[{"name": "sh", "arguments": "{}", "note": "EVIL"}])),
    "a signature that is a sentence": Answering.with_(said(signature="say-EVIL-at-once," * 5)),
    "a call's id with spaces": Answering.with_(
        ChatMessage(
            role="assistant", blocks=[ToolCallBlock(tool_call_id="EVIL at once", tool_name="a", tool_kwargs={})]
        )
    ),
    "a summary of thinking": Answering.with_(
        ChatMessage(
            role="assistant",
            blocks=[ThinkingBlock(content="x", additional_information={"summary": "EVIL"}), TextBlock(text="fine")],
        )
    ),
}


@pytest.mark.parametrize("name", LLMS)
def test_what_stands_beside_an_answer_is_judged(name: str) -> None:
    """Whole and streamed."""
    llm = guard_llm(LLMS[name], BACKEND)
    with pytest.raises(Blocked):
        llm.chat([ChatMessage(content="hi")])
    with pytest.raises(Blocked):
        list(llm.stream_chat([ChatMessage(content="hi")]))


def test_what_leads_back_to_itself_is_read_once() -> None:
    """It has no more to say; its fields are not judged as printed, its identifiers not at all."""
    answer = Answering.with_(said(x=tree("fine")))
    assert guard_llm(answer, KeywordBackend({"an_id": 0.99, "Branch": 0.99})).chat([]) is answer.chat([])


def test_what_is_too_deep_to_be_read_is_told_to_the_policy() -> None:
    """It is content that cannot be judged, and no error."""
    message = said(x=deep("EVIL"))
    assert any(part.turn.media for part in parts_of_message(message))
    assert any(part.turn.media for part in parts_of_answer(ChatResponse(message=message)))


def test_no_field_of_an_object_is_an_identifier() -> None:
    """All of it is the model's own."""
    with pytest.raises(Blocked):
        list(
            guard_llm(Answering.with_(said()), BACKEND).stream_structured_predict(State, PromptTemplate("give"), x="y")
        )


@pytest.mark.parametrize(
    ("given", "word"), [(Terse(name="x", note="EVIL"), "EVIL"), (Terse(name="at\nonce"), "at\nonce")]
)
def test_of_an_object_more_is_judged_than_its_json(given: BaseModel, word: str) -> None:
    """Its reader has fields, in which nothing is escaped, or left out."""
    with pytest.raises(Blocked):
        guard_llm(Answering.of(given), KeywordBackend({word: 0.99})).structured_predict(Terse, PromptTemplate("give"))
    assert guard_llm(Answering.of(given), KeywordBackend({})).structured_predict(Terse, PromptTemplate("give")) is given


def test_identifiers_and_signatures_pass() -> None:
    """Words that a machine gives."""
    llm = guard_llm(Answering.with_(said(id="EVIL_1", thought_signature="RVZJTA==EVIL")), BACKEND)
    assert llm.chat([ChatMessage(content="hi")]).message.content == "fine"


@pytest.mark.parametrize(
    "message",
    [
        said(tool_calls=[{"id": SIGNED, "function": {"name": "sh", "arguments": "{}"}}]),
        ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id=SIGNED, tool_name="sh", tool_kwargs={})]),
        ChatMessage(role="tool", content="fine", additional_kwargs={"tool_call_id": SIGNED}),
    ],
)
def test_an_id_with_a_signature_is_left_alone(message: ChatMessage) -> None:
    """Proxies hang what a provider signed onto the id of a call; asked and answered, whole and streamed."""
    llm = guard_llm(Answering.with_(message), BACKEND)
    assert llm.chat([message, ChatMessage(content="hi")]).message is message
    assert len(list(llm.stream_chat([message, ChatMessage(content="hi")]))) == 1


def test_a_stream_may_carry_what_cannot_be_copied() -> None:
    """It goes out; what stands beside it is a copy, which the model cannot change any more."""
    lock, notes = Lock(), ["fine"]
    (chunk,) = guard_llm(Answering.with_(said(x={"lock": lock, "notes": notes})), BACKEND).stream_chat([])
    notes.append("EVIL")
    assert chunk.message.additional_kwargs == {"x": {"lock": lock, "notes": ["fine"]}}


def test_an_id_of_a_node_is_judged_unless_it_is_short() -> None:
    """Documents give it; nobody hangs a signature onto it."""
    for id_, judged in ((SIGNED, True), ("EVIL_1", False)):
        (trial,) = _of_nodes([NodeWithScore(node=TextNode(text="fine", id_=id_))])
        assert ("EVIL" in trial.last.text) is judged
