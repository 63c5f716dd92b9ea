"""Guard models on vLLM in this process, for offline batches: all that can be asked is asked at once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import vllm

from guardmw import dialects
from guardmw.backends import _artefact, _prompts, _rounds
from guardmw.dialects import Reply, Token
from guardmw.errors import ArtefactError, BackendError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardmw.conversation import Conversation
    from guardmw.dialects import Dialect, Request
    from guardmw.verdict import Scores

_OPTIONS = ("dialect",)


class EngineBackend:
    """A guard model on vLLM's engine, asked in its dialect.

    One batch is under way at a time: for many small calls at once, run a server (``guardmw serve-model``) and ask it.
    Text that is longer than the model's context is judged in overlapping pieces, and the worst counts.

    Args:
        model: a local folder, or OWNER/NAME of the Hugging Face hub.
        dialect: how it is asked, as an object or by name; by default what its folder's card says, or else its name.
        name: what verdicts call it; by default its folder's or its own.
        options: more arguments of ``vllm.LLM``: quantization, gpu_memory_utilization, max_model_len, revision, …

    Raises:
        ArtefactError: vLLM cannot load it, or not with these options.
        BackendUnavailable: its dialect is not known.
    """

    def __init__(
        self,
        model: str,
        *,
        dialect: Dialect | str | None = None,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name or (Path(model).resolve().name if Path(model).is_dir() else model)
        if dialect is None:
            dialect = _artefact.told_dialect(Path(model)) or dialects.of_model(model)
        self._dialect = dialects.named(dialect) if isinstance(dialect, str) else dialect
        try:
            self._engine = vllm.LLM(model, **dict(options or {}))
        except Exception as error:
            # Nothing was screened yet that the message could quote, and it tells what to set.
            raise ArtefactError(f"{model} cannot be loaded by vLLM: {type(error).__name__}: {error}") from error
        self._tokenizer = self._engine.get_tokenizer()
        self._context: int = self._engine.llm_engine.model_config.max_model_len
        self._lock = threading.Lock()

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch.

        Raises:
            BackendError: the engine fails, or what the model answers cannot be read.
        """
        return _rounds.scores(self.name, self._dialect, conversations, self._answer)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch on a worker thread."""
        return await asyncio.to_thread(self.classify, conversations)

    def _answer(self, requests: Sequence[Request]) -> list[Reply | None]:
        replies: list[Reply | None] = [None] * len(requests)
        with self._lock:
            prompts = [_prompts.tokens(self._tokenizer, request) for request in requests]
            sizes = [len(prompt) + request.max_tokens for prompt, request in zip(prompts, requests, strict=True)]
            fitting = [i for i, size in enumerate(sizes) if size <= self._context]
            outputs = self._generate([prompts[i] for i in fitting], [requests[i] for i in fitting]) if fitting else []
        for i, output in zip(fitting, outputs, strict=True):
            replies[i] = _reply(output.outputs[0])
        return replies

    def _generate(self, prompts: list[list[int]], requests: list[Request]) -> list[Any]:
        settings = [
            vllm.SamplingParams(temperature=0.0, max_tokens=request.max_tokens, logprobs=request.top_logprobs or None)
            for request in requests
        ]
        try:
            outputs: list[Any] = self._engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False
            )
        except Exception as error:  # noqa: BLE001 - vLLM raises without a common root, and may quote the prompt
            failure = type(error).__name__
        else:
            return outputs
        raise BackendError(f"{self.name}: vLLM failed ({failure})")


def from_spec(rest: str) -> EngineBackend:
    """What "engine:FOLDER" and "engine:OWNER/NAME" load; ``?dialect=`` says how it is asked."""
    model, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            raise BackendError(f"engine: unknown option {option!r}: {nearest(option, _OPTIONS)}")
    return EngineBackend(model, dialect=options.get("dialect"))


def _reply(output: Any) -> Reply:  # noqa: ANN401 - of vLLM, which need not be installed
    if output.finish_reason not in ("stop", "length"):
        raise BackendError("vLLM broke an answer off")
    told = zip(output.token_ids, output.logprobs or (), strict=False)
    return Reply(output.text, tuple(_token(id_, found) for id_, found in told), cut=output.finish_reason == "length")


def _token(id_: int, found: Mapping[int, Any]) -> Token:
    """The chosen one with its alternatives, likeliest first."""
    others: dict[str, float] = {}
    for one in sorted(found.values(), key=lambda one: -one.logprob):
        others.setdefault(one.decoded_token or "", one.logprob)
    return Token(found[id_].decoded_token or "", found[id_].logprob, others)
