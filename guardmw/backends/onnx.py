"""Dual-head classifiers on onnxruntime: the embedded model, TinySafe 1 and 2, and any of their shape."""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from guardmw.backends import _artefact
from guardmw.backends._windows import Window, Windows
from guardmw.errors import ArtefactError, BackendError, BackendUnavailable
from guardmw.verdict import Coverage, Scores, worst

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from guardmw.conversation import Conversation, Stage

# With more tokens in a run its activations leave the caches, and each window takes longer, not less.
_RUN_TOKENS = 640

EMBEDDED = Path(__file__).parent.parent / "models"


class OnnxBackend:
    """A model folder: model.onnx, tokenizer.json and card.json, or a published TinySafe as it is.

    The graph takes ``input_ids`` and ``attention_mask`` (and ``token_type_ids`` if it likes), int64 of shape (B, L),
    and gives ``binary_logit`` (B, 1) and ``category_logits`` (B, labels), and ``injection_logit`` (B, 1) if it has one.
    Text longer than a window is judged in overlapping windows, and the worst counts.

    Args:
        folder: a local folder.
        name: what verdicts call it; the card's name by default.
        threads: of onnxruntime per run. More than one pays only on idle cores.
        providers: onnxruntime's execution providers, in order of preference.
        batch_size: windows per run at most; long ones run in smaller groups.
        graph: file name of the graph, where the folder has several.

    Raises:
        ArtefactError: a file is missing or broken.
        BackendUnavailable: a provider is not in this build of onnxruntime.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        batch_size: int = 16,
        graph: str | None = None,
    ) -> None:
        if threads < 1 or batch_size < 1:
            raise BackendError(f"threads and batch_size are at least 1, not {threads} and {batch_size}")
        artefact = _artefact.read(Path(folder), graph=graph)
        self.card = artefact.card
        self.name = name or self.card.name
        self.thresholds = self.card.thresholds
        self._batch_size = batch_size
        self._session = _session(artefact.graph, threads, list(providers))
        inputs = {node.name: node.shape for node in self._session.get_inputs()}
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        self._check(artefact.graph, inputs, outputs)
        self._segments = "token_type_ids" in inputs
        self._injection = "injection_logit" in outputs
        self._outputs = ["binary_logit", "category_logits"] + ["injection_logit"] * self._injection
        length = inputs["input_ids"][1]
        # A graph exported with a fixed length (TinySafe 2: 512) has to be filled up to it.
        self._length: int | None = length if isinstance(length, int) else None
        if self._length is not None and self._length < self.card.max_tokens:
            self.card = self.card.model_copy(update={"max_tokens": self._length})
        self._windows = Windows(_tokenizer(artefact.tokenizer), self.card)

    @classmethod
    def from_hub(cls, repository: str, *, revision: str) -> OnnxBackend:
        """A model folder of the Hugging Face hub, at one revision, kept in the hub's local cache.

        Args:
            repository: as OWNER/NAME.
            revision: a commit, or a tag that does not move.

        Raises:
            BackendUnavailable: the hub, the repository or the revision cannot be reached.
        """
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - takes as long to import as everything else

        try:
            folder = snapshot_download(repository, revision=revision, allow_patterns=["*.onnx", "*.json", "*.model"])
        except Exception as error:
            raise BackendUnavailable(f"{repository}@{revision} is not to be had: {type(error).__name__}") from error
        return cls(folder, name=repository)

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch: windows of like length run together."""
        if not conversations:
            return []
        cuts = self._windows.cut(conversations)
        stages = [conversation.stage for conversation in conversations]
        if len(cuts) == 1 and len(cuts[0][0]) == 1:
            rows = self._run(cuts[0][0])
            return [self._scores([rows[0]], stages[0], cuts[0][1])]
        windows = [window for cut, _ in cuts for window in cut]
        logits: list[list[float]] = [[]] * len(windows)
        for batch in self._batches([len(window.ids) for window in windows]):
            for i, row in zip(batch, self._run([windows[i] for i in batch]), strict=True):
                logits[i] = row
        scores, at = [], 0
        for (cut, coverage), stage in zip(cuts, stages, strict=True):
            scores.append(self._scores(logits[at : at + len(cut)], stage, coverage))
            at += len(cut)
        return scores

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch on a worker thread; onnxruntime lets go of the interpreter while it runs."""
        return await asyncio.to_thread(self.classify, conversations)

    def tokens(self, text: str) -> int:
        """How many tokens a text has, by the model's own tokenizer."""
        return self._windows.tokens(text)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of windows to run together: of like length, so that little is padding."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) == self._batch_size or (len(batch) + 1) * lengths[i] > _RUN_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _run(self, windows: Sequence[Window]) -> list[list[float]]:
        """One row of logits a window: unsafe, injection, then the categories."""
        length = self._length or max(len(window.ids) for window in windows)
        feeds = {
            "input_ids": _padded([window.ids for window in windows], length, self._windows.pad),
            "attention_mask": _padded([[1] * len(window.ids) for window in windows], length, 0),
        }
        if self._segments:
            feeds["token_type_ids"] = _padded([window.segments for window in windows], length, 0)
        try:
            outputs = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise BackendError(f"{self.name}: onnxruntime failed ({type(error).__name__})") from error
        injection = outputs[2] if self._injection else np.full_like(outputs[0], -np.inf)
        rows: list[list[float]] = np.concatenate((outputs[0], injection, outputs[1]), axis=1).tolist()
        return rows

    def _scores(self, rows: Sequence[Sequence[float]], stage: Stage, coverage: Coverage) -> Scores:
        temperature = self.card.temperature.get(stage, 1.0)
        injection_temperature = self.card.temperature.get("injection", 1.0)
        try:
            windows = [
                Scores(
                    unsafe=_sigmoid(row[0] / temperature),
                    categories=dict(zip(self.card.labels, map(_sigmoid, row[2:]), strict=True)),
                    injection=_sigmoid(row[1] / injection_temperature),
                    backend=self.name,
                    coverage=coverage,
                )
                for row in rows
            ]
        except ValueError:
            raise BackendError(f"{self.name}: the model gave scores that are not numbers") from None
        return worst(windows)

    def _check(self, graph: Path, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, have, kind in (
            ("input_ids", inputs, "input"),
            ("attention_mask", inputs, "input"),
            ("binary_logit", outputs, "output"),
            ("category_logits", outputs, "output"),
        ):
            if name not in have:
                raise ArtefactError(f"{graph} has no {kind} {name!r}; its {kind}s are: {', '.join(have)}")
        width = outputs["category_logits"][-1]
        if isinstance(width, int) and width != len(self.card.labels):
            raise ArtefactError(f"{graph} gives {width} category logits, but there are {len(self.card.labels)} labels")


def embedded(rest: str = "") -> OnnxBackend:
    """The model that ships in this package; what "embedded" loads."""
    if rest:
        raise BackendUnavailable("there is one embedded model; for one of yours: onnx:FOLDER")
    return OnnxBackend(EMBEDDED, name="embedded")


def from_spec(rest: str) -> OnnxBackend:
    """What "onnx:FOLDER" and "onnx:OWNER/NAME@REVISION" load."""
    repository, at, revision = rest.partition("@")
    local = os.path.lexists(rest)  # a path too long to be one is none, not an error
    if at and not local:
        return OnnxBackend.from_hub(repository, revision=revision)
    if not local and rest.count("/") == 1:
        raise BackendUnavailable(
            f"{rest} is no local folder; for a model of the hub, pin its revision: onnx:{rest}@REVISION"
        )
    return OnnxBackend(rest)


def _session(graph: Path, threads: int, providers: list[str]) -> ort.InferenceSession:
    missing = set(providers) - set(ort.get_available_providers())
    if missing:
        raise BackendUnavailable(
            f"this onnxruntime has no {', '.join(sorted(missing))}; it has: {', '.join(ort.get_available_providers())}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads win microseconds on an idle machine and lose milliseconds on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:  # noqa: BLE001 - tokenizers and onnxruntime raise without a common root
        raise ArtefactError(f"{graph} is not a graph onnxruntime can load: {error}") from None


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers and onnxruntime raise without a common root
        raise ArtefactError(f"{path} is not a tokenizer: {error}") from None


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    if len(rows) == 1 and len(rows[0]) == length:
        return np.array(rows, dtype=np.int64)
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    scaled = math.exp(logit)
    return scaled / (1.0 + scaled)
