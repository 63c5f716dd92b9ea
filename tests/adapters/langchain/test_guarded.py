"""guarded(): a chain refuses instead of raising, wherever in it and whenever the block comes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableGenerator, RunnableLambda, RunnablePassthrough
from langchain_guardmw import REFUSAL, GuardedChain, guard, guard_model, guarded
from langchain_guardmw.gate import quoted
from pydantic import BaseModel

from guardmw import BackendError, Blocked, Conversation, Guard, Policy, Scores
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

KEYWORD = KeywordBackend({"EVIL": 0.99})
SAFE = "".join(f"This is sentence number {at} of a harmless answer. " for at in range(9))
UNSAFE = SAFE.replace("number 3", "EVIL")
GUARD = guard(KEYWORD)
PROMPT = ChatPromptTemplate.from_template("Tell me about {topic}.")


def model(text: str) -> FakeListChatModel:
    """A chat model of LangChain's own, which streams letter by letter."""
    return FakeListChatModel(responses=[text])


# Chains that return a message, and such that return a str; with guards of their own, and with none.
CHAINS: dict[str, Callable[[str], Runnable[Any, Any]]] = {
    "model": lambda text: guarded(PROMPT | model(text), KEYWORD),
    "parser": lambda text: guarded(PROMPT | model(text) | StrOutputParser(), KEYWORD),
    "llm": lambda text: guarded(PROMPT | FakeListLLM(responses=[text]), KEYWORD),
    "own guards": lambda text: guarded(PROMPT | GUARD | model(text) | GUARD),
    "own guards, named": lambda text: guarded(PROMPT | GUARD | model(text) | GUARD.with_config(tags=["x"])),
    "own guards, parser": lambda text: guarded(PROMPT | GUARD | model(text) | GUARD | StrOutputParser()),
    "guarded model": lambda text: guarded(PROMPT | guard_model(model(text), KEYWORD)),
    "guarded model, parser": lambda text: guarded(PROMPT | guard_model(model(text), KEYWORD) | StrOutputParser()),
    "guarded": lambda text: guarded(guarded(PROMPT | model(text), KEYWORD)),
    "bound": lambda text: guarded((PROMPT | model(text)).with_config(run_name="x"), KEYWORD),
    "fallbacks": lambda text: guarded((PROMPT | model(text)).with_fallbacks([PROMPT | model(text)]), KEYWORD),
    "typed": lambda text: guarded(
        (PROMPT | model(text) | RunnableLambda(lambda message: message.text)).with_types(output_type=str), KEYWORD
    ),
}


def invoke(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """A whole answer."""
    return [chain.invoke(given)]


def ainvoke(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """The same on an event loop."""
    return [asyncio.run(chain.ainvoke(given))]


def batch(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """One of several."""
    return chain.batch([given, given])[1:]


def abatch(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """The same on an event loop."""
    return asyncio.run(chain.abatch([given, given]))[1:]


def stream(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """All chunks."""
    return list(chain.stream(given))


def astream(chain: Runnable[Any, Any], given: Any) -> list[Any]:
    """The same on an event loop."""

    async def read() -> list[Any]:
        return [chunk async for chunk in chain.astream(given)]

    return asyncio.run(read())


Way = Callable[["Runnable[Any, Any]", Any], list[Any]]
WHOLE: list[Way] = [invoke, ainvoke, batch, abatch]
STREAMED: list[Way] = [stream, astream]
WAYS = pytest.mark.parametrize("way", WHOLE + STREAMED)
STREAMS = pytest.mark.parametrize("way", STREAMED)
SHAPES = pytest.mark.parametrize("shape", CHAINS)


def text_of(value: Any) -> str:
    """What an answer says."""
    return value if isinstance(value, str) else str(value.text)


@WAYS
@SHAPES
def test_a_safe_answer_comes_as_from_the_chain_itself(way: Way, shape: str) -> None:
    """In the same pieces."""
    chain = CHAINS[shape](SAFE)
    assert isinstance(chain, GuardedChain)
    plain = [text_of(one) for one in way(chain.chain, {"topic": "bread"})]
    assert [text_of(one) for one in way(chain, {"topic": "bread"})] == plain


@WAYS
@SHAPES
def test_an_unsafe_question_is_refused(way: Way, shape: str) -> None:
    """By a value of the type that the chain returns; no exception gets out."""
    (answer,) = way(CHAINS[shape](SAFE), {"topic": "EVIL"})
    assert text_of(answer) == REFUSAL
    if shape.endswith(("parser", "llm", "typed")):
        assert isinstance(answer, str)
    else:
        assert isinstance(answer, AIMessageChunk if way in STREAMED else AIMessage)
        assert answer.response_metadata["guardmw"]["stage"] == "input"


@WAYS
@SHAPES
def test_an_unsafe_answer_is_refused(way: Way, shape: str) -> None:
    """In a stream, what was released stays, and the refusal follows in a chunk of the same type."""
    *before, last = way(CHAINS[shape](UNSAFE), {"topic": "bread"})
    assert text_of(last).strip() == REFUSAL
    assert UNSAFE.startswith("".join(map(text_of, before)))
    assert "EVIL" not in "".join(map(text_of, before))
    if way in STREAMED and shape not in ("llm", "typed"):
        assert "number 0" in "".join(map(text_of, before))
        assert isinstance(last, str if isinstance(before[0], str) else AIMessageChunk)
        whole = before[0]
        for chunk in [*before[1:], last]:
            whole += chunk
        assert text_of(whole).endswith(f". \n\n{REFUSAL}")


@WAYS
def test_a_refusal_says_what_it_is_told_to(way: Way) -> None:
    """At either end."""
    chain = guarded(PROMPT | model(UNSAFE) | StrOutputParser(), KEYWORD, refusal="Not here.")
    assert "".join(way(chain, {"topic": "EVIL"})) == "Not here."
    assert "".join(way(chain, {"topic": "bread"})).endswith("Not here.")


@WAYS
@pytest.mark.parametrize("given", [{"topic": "bread"}, {"topic": "EVIL"}])
def test_what_has_no_refusal_is_raised(way: Way, given: Any) -> None:
    """A dict's would break whoever reads it, and a chain that does not tell may return one."""
    chain = guarded(PROMPT | model('{"a": "EVIL"}') | JsonOutputParser(), KEYWORD)
    with pytest.raises(Blocked):
        way(chain, given)


class Strict(BaseOutputParser[str]):
    """Reads nothing."""

    def parse(self, text: str) -> str:
        """Quote it, as LangChain's own do."""
        raise OutputParserException("this is no answer", llm_output=text)


class Note(BaseModel):
    """Something noted."""

    text: str


PARSERS: dict[str, Runnable[Any, Any]] = {
    "parser": Strict(),
    "validation": RunnableLambda(lambda message: Note.model_validate_json(message.text)).with_types(output_type=str),
}


@WAYS
@pytest.mark.parametrize("parser", PARSERS)
def test_an_error_that_quotes_an_answer_is_judged(way: Way, parser: str) -> None:
    """What a parser could not read, nobody has judged before."""
    for text in (f'{{"note": "{"x" * 60} EVIL {"x" * 60}"}}', "EVIL", "Nothing."):
        chain = PROMPT | model(text) | PARSERS[parser]
        if text == "Nothing.":
            with pytest.raises(ValueError) as raised:
                way(guarded(chain, KEYWORD), {"topic": "bread"})
            assert text in repr(quoted(raised.value))
            continue
        assert "".join(way(guarded(chain, KEYWORD), {"topic": "bread"})) == REFUSAL
        with pytest.raises(Blocked) as blocked:
            way(guarded(chain.with_types(output_type=dict), KEYWORD), {"topic": "bread"})
        assert "EVIL" not in repr(quoted(blocked.value))


@WAYS
def test_a_guard_behind_a_parser_does_not_see_its_errors(way: Way) -> None:
    """Which the page on LangChain says; the guard in front of the parser does, or a guarded model."""
    for chain in (PROMPT | GUARD | model("EVIL") | Strict() | GUARD, PROMPT | model("EVIL") | Strict()):
        with pytest.raises(OutputParserException) as raised:
            way(chain, {"topic": "bread"})
        assert raised.value.llm_output == "EVIL"
    for chain in (PROMPT | model("EVIL") | GUARD | Strict(), PROMPT | guard_model(model("EVIL"), KEYWORD) | Strict()):
        with pytest.raises(Blocked):
            way(chain, {"topic": "bread"})


@STREAMS
@pytest.mark.parametrize("own", [False, True])
def test_a_block_stops_the_chain(way: Way, own: bool) -> None:
    """No token is paid for after that."""
    sent, closed = [], []
    pieces = re.findall(r"\S+\s*", UNSAFE)

    def answer(_: Any) -> Iterator[str]:
        try:
            for piece in pieces:
                sent.append(piece)
                yield piece
        finally:
            closed.append(True)

    async def aanswer(given: Any) -> AsyncIterator[str]:
        async for _ in given:
            try:
                for piece in pieces:
                    sent.append(piece)
                    await asyncio.sleep(0)
                    yield piece
            finally:
                closed.append(True)

    step: Runnable[Any, str] = RunnableGenerator(answer, aanswer)
    chain = guarded(RunnablePassthrough() | step | guard(KEYWORD)) if own else guarded(step, KEYWORD)
    *_, last = way(chain.with_types(output_type=str), "bread")
    assert last.strip() == REFUSAL
    assert closed
    assert len(sent) < len(pieces)


@WAYS
def test_the_answer_is_judged_with_its_question(way: Way) -> None:
    """As output, whatever its type."""
    backend = ScriptedBackend([0.0] * 10)
    way(guarded(PROMPT | model("Yes.") | StrOutputParser(), backend), {"topic": "bread"})
    question, answer = backend.asked[0], backend.asked[-1]
    assert (question.stage, question.last.text) == ("input", "bread")
    assert (answer.stage, answer.last.text) == ("output", "Yes.")
    assert [turn.text for turn in answer.context] == ["bread"]


def test_guards_of_its_own_are_not_doubled() -> None:
    """Nor is the embedded model loaded beside them; a guard that is given, though, judges as well."""
    own, given = ScriptedBackend([0.0] * 4), ScriptedBackend([0.0] * 4)
    chain = PROMPT | guard(own) | model("Yes.") | guard(own)
    assert guarded(chain).invoke({"topic": "bread"}).text == "Yes."
    assert len(own.asked) == 2
    guarded(chain, given).invoke({"topic": "bread"})
    assert (len(own.asked), len(given.asked)) == (4, 2)


def test_without_a_guard_it_is_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that has none is never left unjudged."""
    monkeypatch.setattr("langchain_guardmw.gate._loaded", lambda: Guard(KEYWORD))
    assert text_of(guarded(PROMPT | model(SAFE)).invoke({"topic": "EVIL"})) == REFUSAL


@WAYS
@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("bug")])
def test_a_failing_backend_is_for_the_policy_to_decide(way: Way, failure: Exception) -> None:
    """By default that is a refusal."""

    class Failing(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise failure

        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise failure

    chain = PROMPT | model(SAFE) | StrOutputParser()
    assert way(guarded(chain, Failing({})), {"topic": "bread"}) == [REFUSAL]
    lenient = Guard(Failing({}), policy=Policy(on_error="allow"))
    assert "".join(way(guarded(chain, lenient), {"topic": "bread"})) == SAFE


@WAYS
def test_other_errors_are_not_refusals(way: Way) -> None:
    """A chain that fails says so."""

    def fail(_: Any) -> str:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        way(guarded(RunnableLambda(fail), KEYWORD), "bread")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_in_traces_it_succeeds(asynchronous: bool) -> None:
    """The block is an error of the chain inside; the run that contains it ends well."""

    class Log(BaseCallbackHandler):
        def __init__(self) -> None:
            self.ended: list[str] = []
            self.names: dict[Any, str] = {}

        def on_chain_start(self, *args: Any, run_id: Any, name: str = "", **kwargs: Any) -> None:
            self.names[run_id] = name

        def on_chain_end(self, *args: Any, run_id: Any, **kwargs: Any) -> None:
            self.ended.append(self.names[run_id])

        def on_chain_error(self, *args: Any, run_id: Any, **kwargs: Any) -> None:
            self.ended.append(f"{self.names[run_id]} failed")

    log = Log()
    chain, config = CHAINS["own guards"](UNSAFE), {"callbacks": [log]}
    if asynchronous:
        asyncio.run(chain.ainvoke({"topic": "bread"}, config))  # type: ignore[arg-type]
    else:
        chain.invoke({"topic": "bread"}, config)  # type: ignore[arg-type]
    assert log.ended[-1] == "guarded"
    assert "guard failed" in log.ended


def test_events_show_the_refusal_and_not_what_it_replaced() -> None:
    """Where the model is guarded itself, so that no part of the chain can tell."""
    shown: list[Any] = []

    async def read() -> None:
        async for event in CHAINS["guarded model, parser"](UNSAFE).astream_events({"topic": "bread"}, version="v2"):
            shown.append(event)  # noqa: PERF401 - some were there before an error

    asyncio.run(read())
    assert "EVIL" not in repr(shown)
    assert "help with that" in repr(shown)


def test_it_has_the_types_of_its_chain() -> None:
    """And composes like any runnable."""
    chain = PROMPT | model(SAFE) | StrOutputParser()
    made = guarded(chain, KEYWORD)
    assert (made.InputType, made.OutputType) == (chain.InputType, chain.OutputType)
    assert (made | RunnableLambda(len)).invoke({"topic": "EVIL"}) == len(REFUSAL)
    with pytest.raises(TypeError):
        guarded(chain, 5)  # type: ignore[arg-type]


def test_what_is_no_chain_is_refused_without_being_quoted() -> None:
    """The message names what to give."""
    nothing: Any = "my secret text"
    with pytest.raises(TypeError, match="give a chain, a model or another Runnable, not str") as raised:
        guarded(nothing)
    assert "secret" not in str(raised.value)
