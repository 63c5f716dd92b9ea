"""Streams through guard(): not a character is out before it has been judged, and a block closes what is above."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import AddableDict, RunnableGenerator, RunnableSequence
from langchain_guardmw import REFUSAL, guard
from pydantic import PrivateAttr

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.stream import Hold
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable
    from langchain_guardmw import GuardRunnable

# No two of these sentences are alike, so a judged text stands at one place only.
SENTENCES = [f"This is sentence number {at} of a long and harmless answer. " for at in range(20)]
SAFE = "".join(SENTENCES)
UNSAFE = "".join([*SENTENCES[:10], "Here comes the EVIL part. ", *SENTENCES[10:]])


class Witness:
    """A keyword backend that keeps what it read."""

    name = "witness"

    def __init__(self) -> None:
        self.read: list[str] = []
        self._covered = self._counted = 0

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """EVIL is unsafe."""
        trials = [conversation.trial for conversation in conversations]
        self.read += trials
        return [Scores(0.99 if "EVIL" in trial else 0.01) for trial in trials]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, after others had their turn."""
        await asyncio.sleep(0)
        return self.classify(conversations)

    def unjudged(self, out: str, text: str) -> int:
        """How many of the characters that are out, of this text, it has not read or found unsafe."""
        for trial in self.read[self._counted :]:
            start = text.find(trial)
            if 0 <= start <= self._covered and "EVIL" not in trial:
                self._covered = max(self._covered, start + len(trial))
        self._counted = len(self.read)
        return max(0, len(out) - self._covered)


@dataclass
class Source:
    """What a model would send, and how far it came."""

    chunks: Sequence[Any]
    sent: int = 0
    closed: bool = False

    def sync(self) -> Iterator[Any]:
        """Send chunk by chunk."""
        try:
            for chunk in self.chunks:
                self.sent += 1
                yield chunk
        finally:
            self.closed = True

    async def asynchronous(self) -> AsyncIterator[Any]:
        """Send chunk by chunk, on an event loop."""
        try:
            for chunk in self.chunks:
                await asyncio.sleep(0)
                self.sent += 1
                yield chunk
        finally:
            self.closed = True


class Model(BaseChatModel):
    """A chat model that streams what a source gives."""

    _source: Source = PrivateAttr()

    @classmethod
    def of(cls, source: Source) -> Model:
        """A model that sends these chunks."""
        model = cls()
        model._source = source
        return model

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        first, *rest = self._source.chunks
        return ChatResult(generations=[ChatGeneration(message=AIMessage((first + rest).text))])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for chunk in self._source.sync():
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for chunk in self._source.asynchronous():
            yield ChatGenerationChunk(message=chunk)


See = Callable[[Any], None]


def transform(step: Runnable[Any, Any], source: Source, see: See) -> None:
    """Stream chunks through the step alone."""
    for chunk in step.transform(source.sync()):
        see(chunk)


def atransform(step: Runnable[Any, Any], source: Source, see: See) -> None:
    """The same on an event loop."""

    async def consume() -> None:
        async for chunk in step.atransform(source.asynchronous()):
            see(chunk)

    asyncio.run(consume())


def stream(step: Runnable[Any, Any], source: Source, see: See) -> None:
    """Stream through a chain, behind a step that streams."""

    def answer(_: Any) -> Iterator[Any]:
        yield from source.sync()

    chain: Runnable[Any, Any] = RunnableGenerator(answer) | step
    for chunk in chain.stream("question"):
        see(chunk)


def astream(step: Runnable[Any, Any], source: Source, see: See) -> None:
    """The same on an event loop."""

    async def answer(_: Any) -> AsyncIterator[Any]:
        async for chunk in source.asynchronous():
            yield chunk

    async def consume() -> None:
        chain: Runnable[Any, Any] = RunnableGenerator(answer) | step
        async for chunk in chain.astream("question"):
            see(chunk)

    asyncio.run(consume())


STREAMS = pytest.mark.parametrize("way", [transform, atransform, stream, astream])
Way = Callable[["Runnable[Any, Any]", Source, See], None]


def messages(*texts: str) -> list[AIMessageChunk]:
    """Texts as a chat model streams them."""
    return [AIMessageChunk(content=text, id="run-1") for text in texts]


def tokens(text: str, size: int = 5) -> list[str]:
    """A text in pieces of a size."""
    return [text[at : at + size] for at in range(0, len(text), size)]


def with_empty_chunks(text: str) -> list[AIMessageChunk]:
    """Empty chunks around every piece, the last with the usage."""
    usage: Any = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    empty = AIMessageChunk(content="", id="run-1")
    last = AIMessageChunk(content="", usage_metadata=usage, chunk_position="last")
    return [empty, *(chunk for piece in tokens(text) for chunk in (*messages(piece), empty)), last]


# One text in every form in which an answer streams.
SHAPES: dict[str, Callable[[str], list[Any]]] = {
    "messages": lambda text: messages(*tokens(text)),
    "letters": lambda text: messages(*text),
    "one chunk": messages,
    "empty chunks": with_empty_chunks,
    "blocks": lambda text: [AIMessageChunk(content=[{"type": "text", "text": t, "index": 0}]) for t in tokens(text)],
    "reasoning": lambda text: [
        AIMessageChunk(content="", additional_kwargs={"reasoning_content": t}) for t in tokens(text)
    ],
    "thinking": lambda text: [AIMessageChunk(content=[{"type": "thinking", "thinking": t}]) for t in tokens(text)],
    "str": tokens,
    "parsed": lambda text: [chunk.text for chunk in messages(*tokens(text))],
    "dict": lambda text: [AddableDict(answer=piece) for piece in tokens(text)],
    "dict of messages": lambda text: [AddableDict(answer=chunk) for chunk in messages(*tokens(text))],
    "plain dict": lambda text: [{"answer": piece} for piece in tokens(text)],
    "lists": lambda text: [[piece] for piece in tokens(text)],
}


def text_of(chunk: Any) -> str:
    """What a chunk says to its reader."""
    if isinstance(chunk, dict):
        return text_of(chunk["answer"])
    if isinstance(chunk, list):
        return "".join(map(text_of, chunk))
    if isinstance(chunk, str):
        return chunk
    blocks = [chunk.content] if isinstance(chunk.content, str) else chunk.content
    written = [
        block if isinstance(block, str) else block.get("text") or block.get("thinking") or "" for block in blocks
    ]
    return "".join([chunk.additional_kwargs.get("reasoning_content", ""), *written])


@dataclass
class Seen:
    """What came out of a stream, and how much of it was out too early."""

    witness: Witness
    text: str
    chunks: list[Any] = field(default_factory=list)
    out: str = ""
    leaked: int = 0

    def __call__(self, chunk: Any) -> None:
        """See a chunk."""
        self.chunks.append(chunk)
        self.out += text_of(chunk)
        self.leaked = max(self.leaked, self.witness.unjudged(self.out, self.text))


def run(way: Way, text: str, chunks: Sequence[Any], **options: Any) -> tuple[Seen, Source, Blocked | None]:
    """Send chunks through a guard, watched."""
    witness, source = Witness(), Source(chunks)
    seen = Seen(witness, text)
    try:
        way(guard(witness, **options), source, seen)
    except Blocked as blocked:
        return seen, source, blocked
    return seen, source, None


async def until(fact: Callable[[], bool]) -> None:
    """Let others have their turn until it is so."""
    for _ in range(100):
        if fact():
            return
        await asyncio.sleep(0)
    pytest.fail("it did not come to pass")


@STREAMS
@pytest.mark.parametrize("mode", ["hold", "buffer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_safe_stream_comes_out_as_it_went_in(way: Way, mode: str, shape: str) -> None:
    """The same objects in the same order, none of them early."""
    chunks = SHAPES[shape](SAFE)
    seen, source, blocked = run(way, SAFE, chunks, stream=mode)
    assert blocked is None
    assert len(seen.chunks) == len(chunks)
    assert all(out is given for out, given in zip(seen.chunks, chunks, strict=True))
    assert (seen.out, seen.leaked) == (SAFE, 0)
    assert source.closed


@STREAMS
@pytest.mark.parametrize("mode", ["hold", "buffer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_unsafe_stream_ends_where_it_is_still_safe(way: Way, mode: str, shape: str) -> None:
    """What is out was judged, and what is above is closed by the time the caller knows."""
    chunks = SHAPES[shape](UNSAFE)
    seen, source, blocked = run(way, UNSAFE, chunks, stream=mode)
    assert blocked is not None
    assert blocked.verdict.stage == "output"
    assert UNSAFE.startswith(seen.out)
    assert "EVIL" not in seen.out
    assert seen.leaked == 0
    assert source.closed
    if mode == "hold" and shape != "one chunk":
        assert seen.out
        assert source.sent < len(chunks)
    if mode == "buffer":
        assert seen.out == ""


@STREAMS
@pytest.mark.parametrize("leak", [1, 60, 1_000])
def test_no_more_than_the_leak_is_out_early(way: Way, leak: int) -> None:
    """But some is, for those who prefer that."""
    seen, _, blocked = run(way, UNSAFE, SHAPES["messages"](UNSAFE), leak=leak)
    assert blocked is not None
    assert seen.leaked <= leak
    assert leak < 5 or seen.leaked > 0


@STREAMS
def test_observing_leaks_and_tells(way: Way) -> None:
    """Everything is out before the block is known: the checks of this file notice a guard that leaks."""
    seen, _, blocked = run(way, UNSAFE, SHAPES["messages"](UNSAFE), stream="observe")
    assert blocked is not None
    assert seen.out == UNSAFE
    assert seen.leaked > len(UNSAFE) / 2


@STREAMS
def test_the_checks_notice_a_hold_that_is_broken(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets go of what nobody has judged."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    seen, _, _ = run(way, UNSAFE, SHAPES["messages"](UNSAFE))
    assert seen.leaked > 0


@STREAMS
def test_the_first_sentence_is_out_before_the_second_is_there(way: Way) -> None:
    """Nobody waits for the end of the answer."""
    source, out_after = Source(SHAPES["messages"](SAFE)), []
    way(guard(Witness()), source, lambda _: out_after.append(source.sent))
    assert out_after[0] <= len(SENTENCES[0]) / 5 + 2
    assert max(b - a for a, b in pairwise(out_after)) <= (400 + 200) / 5 + 2


@STREAMS
def test_a_long_answer_costs_no_more_than_two_and_a_half_times_its_length(way: Way) -> None:
    """Of 500 words that come one by one; the first are out as soon as one sentence, and no more, has been judged."""
    answer = "".join(f"This is sentence number {at} of a long and harmless answer. " for at in range(45))
    words = [f"{word} " for word in answer.split()]
    witness, judged_before = Witness(), list[int]()
    way(guard(witness), Source(messages(*words)), lambda _: judged_before.append(len(witness.read)))
    assert len(words) == len(judged_before) == 495
    assert [trial.strip() for trial in witness.read[: judged_before[0]]] == [SENTENCES[0].strip()]
    assert sum(len(trial.split()) for trial in witness.read) <= 2.5 * len(words)


@STREAMS
@pytest.mark.parametrize(
    "text", ["Zażółć gęślą jaźń. ", "你好。今天天气很好。", "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301. ", "half \ud83d a pair. "]
)
def test_any_script_is_released_letter_by_letter(way: Way, text: str) -> None:
    """A character that is made of several may come in several chunks."""
    text *= 60
    seen, _, blocked = run(way, text, messages(*text))
    assert blocked is None
    assert seen.out == text


@STREAMS
def test_a_megabyte_in_one_chunk_is_judged(way: Way) -> None:
    """In the middle of a stream it is cut; at the end of it something may be wrong."""
    text = ("word " * 200_000)[:1_000_000]
    seen, _, blocked = run(way, "", messages("First. ", text, "Last."))
    assert blocked is None
    assert len(seen.out) == len(text) + 12
    seen, _, blocked = run(way, "", messages("First. ", text + "EVIL", "Last."))
    assert blocked is not None
    assert seen.out == "First. "


def call_chunks(arguments: str) -> list[AIMessageChunk]:
    """A tool call after some text, as chat models stream them."""
    pieces = tokens(arguments, 3)
    first: Any = {"name": "shell", "args": pieces[0], "id": "1", "index": 0}
    rest: Any = [{"name": None, "args": piece, "id": None, "index": 0} for piece in pieces[1:]]
    return [
        *messages("I will look. ", "Wait"),
        *(AIMessageChunk(content="", tool_call_chunks=[chunk]) for chunk in (first, *rest)),
        AIMessageChunk(content="", response_metadata={"finish_reason": "tool_calls"}, chunk_position="last"),
    ]


@STREAMS
@pytest.mark.parametrize("leak", [0, 1_000])
def test_a_tool_call_is_held_until_it_is_complete_and_judged(way: Way, leak: int) -> None:
    """Whatever may leak otherwise."""
    witness = Witness()
    chunks = call_chunks('{"cmd": "ls. -l. /home. "}')
    source = Source(chunks)
    seen: list[AIMessageChunk] = []

    def see(chunk: AIMessageChunk) -> None:
        if chunk.tool_call_chunks:
            assert source.sent == len(chunks)
            assert 'shell {"cmd": "ls. -l. /home. "}' in witness.read
        seen.append(chunk)

    way(guard(witness, leak=leak), source, see)
    assert all(out is given for out, given in zip(seen, chunks, strict=True))


@STREAMS
@pytest.mark.parametrize("arguments", ['{"cmd": "EVIL"}', '{"cmd": "\\u0045VIL"}', '{"cmd": "EVIL', "EVIL"])
def test_a_bad_tool_call_never_comes_out(way: Way, arguments: str) -> None:
    """Nor a bad half of one, nor one in escapes, nor what is no JSON at all."""
    seen, source, blocked = run(way, "", call_chunks(arguments))
    assert blocked is not None
    assert blocked.verdict.stage == "tool_call"
    assert [chunk.text for chunk in seen.chunks] == ["I will look. "] + ["Wait"] * (len(seen.chunks) - 1)
    assert not any(chunk.tool_call_chunks for chunk in seen.chunks)
    assert source.closed


@STREAMS
def test_pictures_in_a_stream_are_for_the_policy_to_decide(way: Way) -> None:
    """Blocked by default; released in their place where the policy allows what is partial."""
    picture = AIMessageChunk(content=[{"type": "image_url", "image_url": {"url": "data:,x"}}])
    chunks = [*messages("Look. "), picture, *messages("Nice")]
    seen, _, blocked = run(way, "", chunks)
    assert blocked is not None
    assert seen.chunks == chunks[:1]
    source, out = Source(chunks), list[Any]()
    way(guard(Guard(Witness(), policy=Policy(on_partial="allow"))), source, out.append)
    assert out == chunks


@STREAMS
@pytest.mark.parametrize("shape", ["messages", "str", "parsed"])
def test_a_refusal_ends_the_stream(way: Way, shape: str) -> None:
    """In a chunk of the same type, after what was safe; what is above is closed as if it had been raised."""
    chunks = SHAPES[shape](UNSAFE)
    seen, source, blocked = run(way, UNSAFE, chunks, on_block="refuse")
    assert blocked is None
    assert source.closed
    assert source.sent < len(chunks)
    *answer, last = seen.chunks
    assert text_of(last).strip() == REFUSAL
    assert UNSAFE.startswith("".join(map(text_of, answer)))
    if shape == "messages":
        assert isinstance(last, AIMessageChunk)
        assert (last.id, last.chunk_position) == ("run-1", "last")
        assert last.response_metadata["guardmw"]["action"] == "block"
        merged = answer[0] + [*answer[1:], last]
        assert merged.text.endswith(REFUSAL)


@STREAMS
def test_a_refusal_may_be_all_there_is(way: Way) -> None:
    """Then it needs no line of its own."""
    seen, _, _ = run(way, "", messages("EVIL. ", *SENTENCES), on_block="refuse")
    assert [text_of(chunk) for chunk in seen.chunks] == [REFUSAL]


@STREAMS
def test_a_dict_has_no_refusal(way: Way) -> None:
    """What would stand in it depends on who reads it."""
    _, source, blocked = run(way, UNSAFE, SHAPES["dict"](UNSAFE), on_block="refuse")
    assert blocked is not None
    assert source.closed


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("between", [[], [StrOutputParser()], [StrOutputParser(), guard(KeywordBackend({}))]])
@pytest.mark.parametrize("on_block", ["raise", "refuse"])
def test_a_block_stops_the_model_through_other_steps(asynchronous: bool, between: list[Any], on_block: Any) -> None:
    """langchain-core would read the model's whole answer for tracing."""
    source = Source(messages(*tokens(UNSAFE)))
    chain: Runnable[Any, Any] = RunnableSequence(Model.of(source), *between, guard(Witness(), on_block=on_block))
    out: list[Any] = []

    async def consume() -> None:
        try:
            async for chunk in chain.astream("question"):
                out.append(chunk)  # noqa: PERF401 - what came before the block counts
        finally:
            # What is above a step between is closed by the garbage collector, which asks the event loop to do it.
            await until(lambda: source.closed)

    with nullcontext() if on_block == "refuse" else pytest.raises(Blocked):
        if asynchronous:
            asyncio.run(consume())
        else:
            out.extend(chain.stream("question"))
    assert source.closed
    assert source.sent < len(source.chunks)
    assert "EVIL" not in "".join(map(text_of, out))


def test_a_caller_who_stops_reading_stops_the_model() -> None:
    """Though nothing was blocked."""
    source = Source(messages(*tokens(SAFE)))
    chain = Model.of(source) | StrOutputParser() | guard(Witness())
    reading = chain.stream("question")
    next(reading)
    reading.close()  # type: ignore[attr-defined] # a generator
    assert source.closed
    assert source.sent < len(source.chunks)


def test_a_caller_who_stops_reading_stops_the_model_on_an_event_loop() -> None:
    """Cancellation leaves no task behind."""
    source = Source(messages(*tokens(SAFE)))
    chain = Model.of(source) | guard(Witness())

    async def consume() -> None:
        first = asyncio.Event()

        async def read() -> None:
            async for _ in chain.astream("question"):
                first.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        await until(lambda: source.closed and asyncio.all_tasks() == {asyncio.current_task()})

    asyncio.run(consume())
    assert source.sent < len(source.chunks)


def test_closing_an_asynchronous_stream_closes_what_is_above() -> None:
    """At once, not when the garbage is collected."""
    source = Source(messages(*SENTENCES))

    async def consume() -> None:
        reading = guard(Witness()).atransform(source.asynchronous())
        await anext(reading)
        await reading.aclose()  # type: ignore[attr-defined] # a generator
        assert source.closed

    asyncio.run(consume())


def test_a_backend_that_hangs_lets_nothing_out() -> None:
    """Until the caller gives up, and then neither text nor tasks are left."""

    class Hanging(Witness):
        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            await asyncio.Event().wait()
            return []

    source, out = Source(messages(*SENTENCES)), list[Any]()

    async def consume() -> None:
        async def read() -> None:
            async for chunk in guard(Hanging()).atransform(source.asynchronous()):
                out.append(chunk)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(), 0.05)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(consume())
    assert out == []
    assert source.closed


@STREAMS
@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("bug")])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failing_backend_is_for_the_policy_to_decide(way: Way, failure: Exception, at: int) -> None:
    """At the first judgement, or in the middle: by default nothing more comes out."""
    answers: list[Any] = [*[0.0] * at, failure, *[0.0] * 100]
    chunks = messages(*SENTENCES)
    source, out = Source(chunks), list[Any]()
    with pytest.raises(Blocked) as caught:
        way(guard(ScriptedBackend(answers)), source, out.append)
    assert caught.value.verdict.degraded
    assert source.closed
    assert out == chunks[: len(out)]
    assert (len(out) > 0) == (at > 0)
    assert len(out) < len(chunks)
    lenient = Guard(ScriptedBackend(answers), policy=Policy(on_error="allow"))
    released: list[Any] = []
    way(guard(lenient), Source(chunks), released.append)
    assert released == chunks


@STREAMS
def test_too_few_answers_release_nothing(way: Way) -> None:
    """A short answer must not pass for a safe one."""

    class Short(Witness):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            return []

    out: list[Any] = []
    with pytest.raises(Blocked):
        way(guard(Short()), Source(messages(*SENTENCES)), out.append)
    assert out == []


@STREAMS
def test_a_model_that_fails_is_not_hidden(way: Way) -> None:
    """Its error reaches the caller, after what was judged, and without what was not."""

    class Failing(Source):
        def sync(self) -> Iterator[Any]:
            yield from super().sync()
            raise ConnectionError

        async def asynchronous(self) -> AsyncIterator[Any]:
            async for chunk in super().asynchronous():
                yield chunk
            raise ConnectionError

    out: list[Any] = []
    with pytest.raises(ConnectionError):
        way(guard(Witness()), Failing(messages("One. ", "Two")), out.append)
    assert [chunk.text for chunk in out] == ["One. "]


@STREAMS
def test_text_beside_a_tool_call_is_judged_though_it_is_called_so(way: Way) -> None:
    """A key of the provider's is no part of the call."""
    chunk = call_chunks("{}")[2].model_copy(update={"additional_kwargs": {"calls": "EVIL"}})
    seen, _, blocked = run(way, "", [*messages("One. "), chunk])
    assert blocked is not None
    assert len(seen.chunks) == 1


@STREAMS
def test_an_empty_stream_stays_empty(way: Way) -> None:
    """And asks nobody."""
    seen, _, blocked = run(way, "", [])
    assert (seen.chunks, blocked, seen.witness.read) == ([], None, [])


@STREAMS
def test_garbage_passes_in_its_place(way: Way) -> None:
    """Chunks that say nothing are kept where they were."""
    chunks: list[Any] = ["One. ", None, 5, "", "Two", [], {}]
    seen: list[Any] = []
    way(guard(Witness()), Source(chunks), seen.append)
    assert seen == chunks


@STREAMS
def test_json_that_grows_is_judged_once(way: Way) -> None:
    """A JSON parser sends all there is so far, each time; judging that each time would cost the square."""
    witness = Witness()
    text = '{"title": "A long answer", "body": "' + SAFE.strip() + '", "end": "Bye"}'
    chain = JsonOutputParser() | guard(witness)
    out: list[Any] = []
    way(chain, Source(messages(*tokens(text))), out.append)
    assert out[-1] == {"title": "A long answer", "body": SAFE.strip(), "end": "Bye"}
    assert sum(map(len, witness.read)) <= 3 * len(text)
    bad: list[Any] = []
    with pytest.raises(Blocked):
        way(chain, Source(messages(*tokens(text.replace("number 15", "EVIL")))), bad.append)
    assert 0 < len(bad) < len(out)
    assert "EVIL" not in str(bad)


@STREAMS
def test_several_answers_at_once_do_not_wait_for_each_other(way: Way) -> None:
    """The short one ends without a space after its full stop, before the long one has begun in earnest."""
    chunks = [AddableDict(short="Yes."), *(AddableDict(long=piece) for piece in tokens(SAFE))]
    source, after = Source(chunks), []
    way(guard(Witness()), source, lambda _: after.append(source.sent))
    assert len(after) == len(chunks)
    assert after[0] < len(chunks) / 2


@STREAMS
def test_what_came_alone_is_judged_as_invoke_would(way: Way) -> None:
    """In one piece and at its own stage, though it came through a stream."""
    witness = Witness()
    chunks = [AddableDict(question="What? " * 50), AddableDict(context=[Document("Some. " * 50)])]
    way(guard(witness), Source(chunks), lambda _: None)
    assert witness.read == ["What? " * 50, "Some. " * 50]


@STREAMS
def test_a_str_in_several_chunks_is_output(way: Way) -> None:
    """One in one chunk may be a question on its way to the model."""
    backend = ScriptedBackend([0.0] * 10)
    way(guard(backend), Source(["Hello. ", "World. "]), lambda _: None)
    assert {conversation.stage for conversation in backend.asked} == {"output"}
    backend = ScriptedBackend([0.0])
    way(guard(backend), Source(["Hello. World. "]), lambda _: None)
    assert [conversation.stage for conversation in backend.asked] == ["input"]


@given(st.lists(st.text(max_size=40) | st.just("EVIL") | st.just("Yes. "), max_size=40), st.booleans())
def test_sync_and_async_release_the_same(pieces: list[str], as_messages: bool) -> None:
    """And block at the same place."""
    chunks: list[Any] = list(messages(*pieces)) if as_messages else list(pieces)
    outcomes = []
    for way in (transform, atransform):
        out: list[Any] = []
        try:
            way(guard(KeywordBackend({"EVIL": 0.99})), Source(chunks), out.append)
        except Blocked as blocked:
            out.append(blocked.verdict.stage)
        outcomes.append(out)
    assert outcomes[0] == outcomes[1]


def test_events_show_the_guard_s_stream_without_what_is_blocked() -> None:
    """Those of the model itself show everything: they have to be filtered, as the docs say."""
    source = Source(messages(*tokens(UNSAFE)))
    chain = Model.of(source) | guard(Witness(), on_block="refuse")
    shown: dict[str, str] = {"guard": "", "Model": ""}

    async def consume() -> None:
        async for event in chain.astream_events("question", version="v2"):
            if event["event"] in ("on_chain_stream", "on_chat_model_stream") and event["name"] in shown:
                shown[event["name"]] += text_of(event["data"]["chunk"])

    asyncio.run(consume())
    assert "EVIL" not in shown["guard"]
    assert shown["guard"].endswith(REFUSAL)
    assert "EVIL" in shown["Model"]


def test_modes_are_what_they_say() -> None:
    """The runnable keeps them under names that do not hide its methods."""
    step: GuardRunnable = guard(KeywordBackend({}), stream="buffer", leak=3)
    assert (step.mode, step.leak) == ("buffer", 3)
