"""A refusal is of the type that its caller waits for, whatever the engine is made of."""

# Fakes are what they stand in for.
# ruff: noqa: D102, D103

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.callbacks.guardmw import REFUSAL, guard_query_engine
from llama_index.core import Document, VectorStoreIndex, get_response_synthesizer
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.evaluation import EvaluationResult
from llama_index.core.indices.query.query_transform.base import IdentityQueryTransform
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import (
    FLAREInstructQueryEngine,
    MultiStepQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.tools import QueryEngineTool

from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_index.core.base.base_query_engine import BaseQueryEngine

BACKEND = KeywordBackend({"EVIL": 0.99})
LLM = MockLLM()


class First(BaseSelector):
    """Takes the first engine."""

    def _select(self, choices: Any, query: Any) -> SelectorResult:
        return SelectorResult(selections=[SingleSelection(index=0, reason="It is the first.")])

    async def _aselect(self, choices: Any, query: Any) -> SelectorResult:
        return self._select(choices, query)

    def _get_prompts(self) -> Any:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


class Content:
    """Finds every answer good."""

    def evaluate_response(self, *_: Any) -> EvaluationResult:
        return EvaluationResult(passing=True)


class Asking(BaseQuestionGenerator):
    """Asks what it was asked."""

    def generate(self, tools: Any, query: Any) -> list[SubQuestion]:
        return [SubQuestion(sub_question=query.query_str, tool_name="docs")]

    async def agenerate(self, tools: Any, query: Any) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self) -> Any:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


def retriever(text: str, *, streaming: bool) -> Any:
    index = VectorStoreIndex.from_documents([Document(text=text)])
    return index.as_query_engine(llm=LLM, streaming=streaming)


def _tool(engine: Any) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(engine, name="docs", description="All there is.")


def _synthesizer(*, streaming: bool) -> Any:
    return get_response_synthesizer(llm=LLM, streaming=streaming)


def router(text: str, *, streaming: bool) -> Any:
    return RouterQueryEngine(First(), [_tool(retriever(text, streaming=streaming))], llm=LLM)


def transform(text: str, *, streaming: bool) -> Any:
    return TransformQueryEngine(retriever(text, streaming=streaming), IdentityQueryTransform())


def transform_of_router(text: str, *, streaming: bool) -> Any:
    return TransformQueryEngine(router(text, streaming=streaming), IdentityQueryTransform())


def guarded_transform(text: str, *, streaming: bool) -> Any:
    return guard_query_engine(transform(text, streaming=streaming), BACKEND, on_block="refuse")


def retry(text: str, *, streaming: bool) -> Any:
    return RetryQueryEngine(retriever(text, streaming=streaming), Content())  # type: ignore[arg-type]


def flare(text: str, *, streaming: bool) -> Any:
    return FLAREInstructQueryEngine(retriever(text, streaming=streaming), llm=LLM, max_iterations=1)


def sub_questions(text: str, *, streaming: bool) -> Any:
    tools = [_tool(retriever(text, streaming=False))]
    synthesizer = _synthesizer(streaming=streaming)
    return SubQuestionQueryEngine(Asking(), synthesizer, tools, verbose=False, use_async=False)


def steps(text: str, *, streaming: bool) -> Any:
    engine = retriever(text, streaming=False)
    return MultiStepQueryEngine(engine, IdentityQueryTransform(), _synthesizer(streaming=streaming), num_steps=1)  # type: ignore[arg-type]


ENGINES = [retriever, router, transform, transform_of_router, guarded_transform, retry, flare, sub_questions, steps]


async def ask(engine: BaseQueryEngine, question: str, *, asynchronous: bool) -> Any:
    return await engine.aquery(question) if asynchronous else engine.query(question)


async def said(response: Any) -> str:
    if isinstance(response, AsyncStreamingResponse):
        return "".join([delta async for delta in response.async_response_gen()])
    if isinstance(response, StreamingResponse):
        return "".join(response.response_gen)
    assert isinstance(response, Response)
    return str(response)


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("withheld", ["question", "document"])
async def test_a_refusal_is_of_the_answers_type(
    make: Callable[..., Any], streaming: bool, asynchronous: bool, withheld: str
) -> None:
    """Whether or not there was an answer."""
    if make is flare and withheld == "document":
        pytest.skip("it gives no nodes")
    answer = await ask(make("Eggs are boiled.", streaming=streaming), "How?", asynchronous=asynchronous)
    engine = make("EVIL" if withheld == "document" else "Eggs are boiled.", streaming=streaming)
    question = "EVIL" if withheld == "question" else "How?"
    guarded = guard_query_engine(engine, BACKEND, on_block="refuse")
    refusal = await ask(guarded, question, asynchronous=asynchronous)
    assert isinstance(refusal, type(answer))
    assert refusal.metadata["guardmw"]["action"] == "block"
    assert await said(refusal) == REFUSAL
