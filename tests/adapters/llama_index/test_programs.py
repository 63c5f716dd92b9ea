"""A program of LlamaIndex's own, which makes objects of answers, gives what is allowed, or Blocked."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import REFUSAL, guard_llm
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram

from guardmw import Blocked
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

EVIL = KeywordBackend({"EVIL": 0.99})


class Song(BaseModel):
    """An object."""

    name: str


class Singing(CustomLLM):
    """Completes to a song."""

    song: str
    chats: bool = False

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=self.chats)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=Song(name=self.song).model_dump_json())

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        text = ""
        for letter in self.complete(prompt).text:
            text += letter
            yield CompletionResponse(text=text, delta=letter)


class Calling(MockFunctionCallingLLM):
    """Calls for a song."""

    song: str = ""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_function_calling_model=True, is_chat_model=True)

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        call = ToolSelection(tool_id="1", tool_name="Song", tool_kwargs={"name": self.song})
        return ChatResponse(message=ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]}))

    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        return self.chat(messages)

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        yield self.chat(messages)

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        async def chunks() -> Any:
            yield self.chat(messages)

        return chunks()


def text_program(llm: Any) -> Any:
    return LLMTextCompletionProgram.from_defaults(output_cls=Song, prompt_template_str="A song of {it}", llm=llm)


def calling_program(llm: Any) -> Any:
    return FunctionCallingProgram.from_defaults(output_cls=Song, prompt_template_str="A song of {it}", llm=llm)


async def call(program: Any, it: str) -> Any:
    return program(it=it)


async def acall(program: Any, it: str) -> Any:
    return await program.acall(it=it)


async def stream_call(program: Any, it: str) -> Any:
    return list(program.stream_call(it=it))[-1]


async def astream_call(program: Any, it: str) -> Any:
    return [song async for song in await _stream(program.astream_call(it=it))][-1]


async def _stream(stream: Any) -> Any:
    # One kind of program has it awaited, the other not.
    return await stream if hasattr(stream, "__await__") else stream


KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[str], Any]]] = {
    "completion": (text_program, lambda song: Singing(song=song)),
    "chat": (text_program, lambda song: Singing(song=song, chats=True)),
    "calling": (calling_program, lambda song: Calling().model_copy(update={"song": song})),
}


@pytest.mark.parametrize("way", [call, acall, stream_call, astream_call])
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_program_is_told_what_is_withheld(kind: str, on_block: Any, way: Any) -> None:
    """It would take a refusal for an object, or for one that is broken."""
    program, llm = KINDS[kind]
    allowed = await way(program(guard_llm(llm("Sun"), EVIL, on_block=on_block)), "it")
    assert allowed.name == "Sun"
    with pytest.raises(Blocked):
        await way(program(guard_llm(llm("Sun"), EVIL, on_block=on_block)), "EVIL")
    with pytest.raises(Blocked):
        await way(program(guard_llm(llm("EVIL"), EVIL, on_block=on_block)), "it")


@pytest.mark.parametrize("way", [call, acall, stream_call, astream_call])
@pytest.mark.parametrize("kind", KINDS)
async def test_so_is_one_whose_llm_has_two_guards(kind: str, way: Any) -> None:
    """It is the inner one that would refuse."""
    program, llm = KINDS[kind]
    guarded = guard_llm(guard_llm(llm("EVIL"), EVIL, on_block="refuse"), KeywordBackend({}), on_block="refuse")
    with pytest.raises(Blocked):
        await way(program(guarded), "it")


class Around(Singing):
    """An LLM of one's own around another."""

    other: Any

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        answer: CompletionResponse = self.other.complete(prompt)
        return answer


def test_so_is_one_whose_llm_asks_a_guarded_one() -> None:
    """What that answers is the answer."""
    around = Around(song="", other=guard_llm(Singing(song="EVIL"), EVIL, on_block="refuse"))
    with pytest.raises(Blocked):
        text_program(around)(it="it")


def test_an_llm_that_is_asked_while_another_ones_program_works_refuses() -> None:
    """The object asks it for a note, and the program sees nothing of that."""
    helper = guard_llm(Singing(song="EVIL"), EVIL, on_block="refuse")

    class Noted(Song):
        """An object that asks for a note when it is made."""

        note: str = ""

        def model_post_init(self, _: Any) -> None:
            self.note = helper.complete("A note?").text

    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Noted, prompt_template_str="A song of {it}", llm=Singing(song="Sun")
    )
    assert program(it="it") == Noted(name="Sun", note=REFUSAL)
