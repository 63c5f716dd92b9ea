"""Guard models on transformers, on a CPU or a GPU: those that write their verdict, and those that are classifiers."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import torch
import transformers

from guardmw import dialects
from guardmw.backends import _artefact, _prompts, _rounds
from guardmw.dialects import Reply, Token
from guardmw.errors import ArtefactError, BackendError, BackendUnavailable, nearest
from guardmw.taxonomy import CATEGORIES
from guardmw.verdict import Coverage, Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from guardmw.conversation import Conversation
    from guardmw.dialects import Dialect, Request

_OPTIONS = ("dialect", "labels", "device", "batch_size")
# What a label may stand for, besides a category.
_SAFE, _UNSAFE, _INJECTION = "safe", "unsafe", "injection"
# By what the names of published classifiers hold; from their cards.
_LABELS: dict[str, Mapping[str, str]] = {
    "prompt-guard-2": {"LABEL_0": _SAFE, "LABEL_1": _INJECTION},
    "toxic-prompt-roberta": {"non-toxic": _SAFE, "toxic": _UNSAFE},
}
# Tokens of one window that are in the next too.
_OVERLAP = 64
_MOST_TOKENS = 512


class GenerativeBackend:
    """A guard model that writes its verdict, asked in its dialect.

    Text that is longer than the model's context is judged in overlapping pieces, and the worst counts.

    Args:
        model: a local folder, or OWNER/NAME of the Hugging Face hub.
        dialect: how it is asked, as an object or by name; by default what its folder's card says, or else its name.
        name: what verdicts call it; by default its folder's or its own.
        revision: of the hub: a commit, or a tag that does not move.
        device: of torch: "cpu", "cuda", …; by default cuda where there is one.
        batch_size: requests at a time, at most.

    Raises:
        ArtefactError: it cannot be loaded.
        BackendError: an argument is not valid.
    """

    def __init__(
        self,
        model: str,
        *,
        dialect: Dialect | str | None = None,
        name: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int = 8,
    ) -> None:
        self.name = name or _named(model)
        if dialect is None:
            dialect = _artefact.told_dialect(Path(model)) or dialects.of_model(model)
        self._dialect = dialects.named(dialect) if isinstance(dialect, str) else dialect
        self._loaded = _load(transformers.AutoModelForCausalLM, model, revision, device, batch_size)
        self._loaded.tokenizer.padding_side = "left"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; questions of like length are answered together.

        Raises:
            BackendError: the model fails, or what it answers cannot be read.
        """
        return _rounds.scores(self.name, self._dialect, conversations, self._answer)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch on a worker thread; torch lets go of the interpreter while it computes."""
        return await asyncio.to_thread(self.classify, conversations)

    def _answer(self, requests: Sequence[Request]) -> list[Reply | None]:
        loaded = self._loaded
        replies: list[Reply | None] = [None] * len(requests)
        with loaded.alone(self.name):
            prompts = [_prompts.tokens(loaded.tokenizer, request) for request in requests]
            fitting = [
                i
                for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
                if len(prompt) + request.max_tokens <= loaded.context
            ]
            for batch in _alike(
                fitting,
                [(request.max_tokens, len(prompts[i])) for i, request in enumerate(requests)],
                loaded.batch_size,
            ):
                given = self._generate([prompts[i] for i in batch], [requests[i] for i in batch])
                for i, reply in zip(batch, given, strict=True):
                    replies[i] = reply
        return replies

    def _generate(self, prompts: list[list[int]], requests: list[Request]) -> list[Reply]:
        """Greedily, as many tokens as the longest of them wants."""
        loaded = self._loaded
        padded = loaded.padded(prompts)
        most, told = max(request.max_tokens for request in requests), max(request.top_logprobs for request in requests)
        seen = _Alternatives(told)
        # A model's own settings may sample, or punish repetition.
        settings = transformers.GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=loaded.ends, pad_token_id=loaded.pad
        )
        with torch.inference_mode():
            ids = loaded.model.generate(
                **padded,
                generation_config=settings,
                logits_processor=transformers.LogitsProcessorList([seen] if told else []),
            )
        rows = ids[:, padded["input_ids"].shape[1] :].tolist()
        return [
            self._reply(row, seen, at, request) for at, (row, request) in enumerate(zip(rows, requests, strict=True))
        ]

    def _reply(self, row: list[int], seen: _Alternatives, at: int, request: Request) -> Reply:
        tokenizer, ends = self._loaded.tokenizer, self._loaded.ends
        end = next((i for i, id_ in enumerate(row) if id_ in ends), None)
        said = row[: request.max_tokens if end is None else min(end, request.max_tokens)]
        tokens = []
        for step in range(len(said) if request.top_logprobs else 0):
            found = seen.steps[step][at]
            # Several tokens may be spelled alike: pieces of a character are. The likeliest comes first.
            others: dict[str, float] = {}
            for id_, logprob in found:
                others.setdefault(tokenizer.decode([id_]), logprob)
            tokens.append(Token(tokenizer.decode([said[step]]), dict(found)[said[step]], others))
        whole = end is not None and end <= request.max_tokens
        return Reply(tokenizer.decode(said, skip_special_tokens=True), tuple(tokens), cut=not whole)


class ClassifierBackend:
    """A sequence classifier: Prompt Guard 2, toxic-prompt-roberta, and any other whose labels are told.

    It reads the text on trial and no context, in overlapping windows, and the worst counts.

    Args:
        model: a local folder, or OWNER/NAME of the Hugging Face hub.
        labels: what each of its labels stands for: "safe", "unsafe", "injection" or a category. Those of the two models
            above are known.
        name: what verdicts call it; by default its folder's or its own.
        revision: of the hub: a commit, or a tag that does not move.
        device: of torch: "cpu", "cuda", …; by default cuda where there is one.
        batch_size: windows at a time, at most.

    Raises:
        ArtefactError: it cannot be loaded.
        BackendError: an argument is not valid, or a label stands for nothing.
    """

    def __init__(
        self,
        model: str,
        *,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        self.name = name or _named(model)
        self._loaded = _load(transformers.AutoModelForSequenceClassification, model, revision, device, batch_size)
        # "[SEP]" written by a user is text, not the end of the text.
        self._loaded.tokenizer.split_special_tokens = True
        config = self._loaded.model.config
        known = labels or next((known for part, known in _LABELS.items() if part in model.lower()), {})
        self._meanings = [_meaning(config.id2label[at], known) for at in range(config.num_labels)]
        self._several = config.problem_type == "multi_label_classification"
        if config.num_labels == 1 or not (self._several or _SAFE in self._meanings):
            raise BackendError(f"{self.name}: one of its labels has to stand for 'safe'")

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; windows of like length run together.

        Raises:
            BackendError: the model fails.
        """
        with self._loaded.alone(self.name):
            cuts = [self._windows(conversation.trial) for conversation in conversations]
            windows = [window for cut, _ in cuts for window in cut]
            rows: list[list[float]] = [[]] * len(windows)
            sizes = [(0, len(window)) for window in windows]
            for batch in _alike(range(len(windows)), sizes, self._loaded.batch_size):
                for i, row in zip(batch, self._run([windows[i] for i in batch]), strict=True):
                    rows[i] = row
        scores, at = [], 0
        for (cut, unreadable), conversation in zip(cuts, conversations, strict=True):
            characters = len(conversation.trial)
            covered = Coverage(characters, characters, len(cut), unreadable)
            scores.append(self._scores(rows[at : at + len(cut)], covered))
            at += len(cut)
        return scores

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch on a worker thread; torch lets go of the interpreter while it computes."""
        return await asyncio.to_thread(self.classify, conversations)

    def _windows(self, text: str) -> tuple[list[list[int]], int]:
        """Token ids, and how many characters came to the unknown token."""
        tokenizer = self._loaded.tokenizer
        cut = tokenizer(
            _prompts.whole(text),
            truncation=True,
            max_length=self._loaded.context,
            stride=min(_OVERLAP, self._loaded.context // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        unknown = {
            span
            for ids, spans in zip(cut["input_ids"], cut["offset_mapping"], strict=True)
            for id_, span in zip(ids, spans, strict=True)
            if id_ == tokenizer.unk_token_id
        }
        # A tokenizer without signs for beginning and end makes nothing of nothing.
        windows = [ids or [self._loaded.pad] for ids in cut["input_ids"]]
        return windows, sum(end - start for start, end in unknown)

    def _run(self, windows: list[list[int]]) -> list[list[float]]:
        with torch.inference_mode():
            logits = self._loaded.model(**self._loaded.padded(windows)).logits.float()
        told = torch.sigmoid(logits) if self._several else torch.softmax(logits, dim=-1)
        rows: list[list[float]] = told.tolist()
        return rows

    def _scores(self, rows: list[list[float]], covered: Coverage) -> Scores:
        # Rounding may leave a little more than all.
        found = [{meaning: min(self._share(row, meaning), 1.0) for meaning in set(self._meanings)} for row in rows]
        worst = {meaning: max(row[meaning] for row in found) for meaning in set(self._meanings)}
        unsafe = max(max(p for at, p in enumerate(row) if self._meanings[at] != _SAFE) for row in rows)
        if not self._several:
            unsafe = max(1.0 - row[_SAFE] for row in found)
        try:
            return Scores(
                unsafe=max(unsafe, 0.0),
                categories={name: p for name, p in worst.items() if name in CATEGORIES},
                injection=worst.get(_INJECTION, 0.0),
                backend=self.name,
                coverage=covered,
            )
        except ValueError:
            raise BackendError(f"{self.name}: the model gave scores that are not numbers") from None

    def _share(self, row: list[float], meaning: str) -> float:
        """Of labels that exclude each other, the sum; of others the highest."""
        of = [p for at, p in enumerate(row) if self._meanings[at] == meaning]
        return max(of) if self._several else sum(of)


def from_spec(rest: str) -> GenerativeBackend | ClassifierBackend:
    """What "transformers:FOLDER" and "transformers:OWNER/NAME@REVISION" load, options behind a question mark."""
    where, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            raise BackendError(f"transformers: unknown option {option!r}: {nearest(option, _OPTIONS)}")
    model, at, revision = where.partition("@")
    if os.path.lexists(where):
        model, revision = where, ""
    elif not at:
        raise BackendUnavailable(
            f"{where} is no local folder; for a model of the hub, pin its revision: transformers:{where}@REVISION"
        )
    try:
        size = int(options.get("batch_size", "8"))
        labels = dict(one.split(":", 1) for one in options["labels"].split(",")) if "labels" in options else None
    except ValueError:
        raise BackendError("transformers: batch_size is a number, labels are as LABEL_0:safe,LABEL_1:unsafe") from None
    device = options.get("device")
    if _is_classifier(model, revision or None):
        return ClassifierBackend(model, labels=labels, revision=revision or None, device=device, batch_size=size)
    dialect = options.get("dialect")
    return GenerativeBackend(model, dialect=dialect, revision=revision or None, device=device, batch_size=size)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model with its tokenizer.

    Attributes:
        context: tokens that it takes.
        ends: tokens that end an answer.
    """

    model: Any
    tokenizer: Any
    context: int
    ends: list[int]
    pad: int
    batch_size: int
    lock: threading.Lock

    def alone(self, name: str) -> _Alone:
        """One caller at a time: more would only share the same processor, and tokenizers do not like it."""
        return _Alone(self.lock, name)

    def padded(self, rows: list[list[int]]) -> dict[str, Any]:
        """Tensors, on the model's device."""
        longest = max(map(len, rows))
        left = self.tokenizer.padding_side == "left"
        ids, mask = [], []
        for row in rows:
            fill, zeros = [self.pad] * (longest - len(row)), [0] * (longest - len(row))
            ids.append(fill + row if left else row + fill)
            mask.append(zeros + [1] * len(row) if left else [1] * len(row) + zeros)
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }


class _Alone:
    """Holds a lock, and makes of whatever torch raises a BackendError that quotes nothing."""

    def __init__(self, lock: threading.Lock, name: str) -> None:
        self._lock = lock
        self._name = name

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._lock.release()
        if isinstance(error, Exception) and not isinstance(error, BackendError):
            raise BackendError(f"{self._name}: the model failed ({type(error).__name__})") from None


class _Alternatives(transformers.LogitsProcessor):
    """Keeps the likeliest tokens of each step, where all logits of all steps would take gigabytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.steps: list[list[list[tuple[int, float]]]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ANN401, ARG002 - as transformers calls it
        """Look on."""
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        found = torch.topk(logprobs, min(max(self._most, 1), logprobs.shape[-1]), dim=-1)
        rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        self.steps.append([list(zip(ids, values, strict=True)) for ids, values in rows])
        return scores


def _load(kind: Any, model: str, revision: str | None, device: str | None, batch_size: int) -> _Loaded:  # noqa: ANN401
    if batch_size < 1:
        raise BackendError(f"batch_size is at least 1, not {batch_size}")
    at = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
        told = getattr(transformers.AutoConfig.from_pretrained(model, revision=revision), "dtype", None)
        own = at != "cpu" or (told == torch.bfloat16 and _cpu_knows_bfloat16())
        loaded = kind.from_pretrained(model, revision=revision, dtype="auto" if own else torch.float32)
        loaded = loaded.to(at).eval()
    except Exception as error:
        raise ArtefactError(f"{model} cannot be loaded by transformers: {type(error).__name__}") from error
    config = loaded.config
    ends = getattr(getattr(loaded, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    if kind is transformers.AutoModelForSequenceClassification:
        limits.append(_MOST_TOKENS)
    context = min(int(limit) for limit in limits if limit and limit > 0)
    known = sorted({id_ for id_ in ends if id_ is not None})
    return _Loaded(loaded, tokenizer, context, known, pad, batch_size, threading.Lock())


def _cpu_knows_bfloat16() -> bool:
    """Whether it has instructions for what most weights are of; without them it would be slower than float32."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)


def _is_classifier(model: str, revision: str | None) -> bool:
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    except Exception as error:
        raise ArtefactError(f"{model} is no model that transformers knows: {type(error).__name__}") from error
    return any("SequenceClassification" in name for name in config.architectures or ())


def _meaning(label: str, known: Mapping[str, str]) -> str:
    meanings = (_SAFE, _UNSAFE, _INJECTION, *CATEGORIES)
    meaning = known.get(label)
    if meaning is None:
        raise BackendError(f"label {label!r} of the model stands for nothing: say for what in labels")
    if meaning not in meanings:
        raise BackendError(f"label {label!r} cannot stand for {meaning!r}: {nearest(meaning, meanings)}")
    return meaning


def _named(model: str) -> str:
    return os.path.basename(os.path.normpath(model)) if os.path.lexists(model) else model  # noqa: PTH119 - a name too


def _alike(which: Sequence[int], sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """In batches of like size, so that little is padding and nobody waits for a longer answer."""
    batch: list[int] = []
    for i in sorted(which, key=lambda i: sizes[i]):
        if batch and (len(batch) == most or sizes[i][0] != sizes[batch[0]][0]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
