"""Every setting of a TinySafe model's making, in one place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from guardmw.backends._artefact import Card, Form
from guardmw.settings import Part
from guardmw.train.filter import Filter
from guardmw.train.ingest import Benchmark, Ingest
from guardmw.train.presets import names
from guardmw.train.presets import read as read_preset
from guardmw.train.relabel import Relabel
from guardmw.train.synthesise import Synthesise

if TYPE_CHECKING:
    from collections.abc import Sequence

PRESETS = Path(__file__).parent / "recipes"

# A response is judged with its prompt, a tool call with its user's wish. A document reads as a tool's result does.
FORM = Form(
    prefixes={
        "input": "user:",
        "output": "assistant:",
        "tool_call": "tool call:",
        "tool_result": "tool result:",
        "document": "tool result:",
    },
    context_tokens=64,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Training(Part):
    """How one network is trained.

    Attributes:
        encoder: a folder, or a name on the Hugging Face hub.
        revision: of a name on the hub.
        start: the teacher whose weights to begin with, instead of the encoder's own; or several, by name, each with its
            share of every weight.
        layers: the encoder's layers that are kept, counted from 0; all if empty.
        pooling: "mean" of the text on trial, or the state of the first token ("cls").
        dropout: in the encoder's layers and before the heads. Attention has none: drawing its random numbers takes
            longer than the attention.
        dropout_samples: how many masks a training step averages before the heads (Inoue 2019).
        epochs: passes over the rows; the last may be a part of one.
        batch_tokens: tokens per step, padding included.
        batch_rows: rows per step, whatever their length; null goes by tokens.
        short_tokens, long_share: most rows are shown cut to this length, and this share of them in full length. Meaning
            mostly shows early, and time is spent by the token.
        context_dropout: share of rows that are shown without their context, so that a lone answer can be judged too.
        source_weights: what a source's rows weigh in the loss; 1 where none is named.
        source_shares: how many times an epoch shows a source's rows, a part of them being drawn anew each epoch; "*"
            stands for sources that are not named, 1 without it.
        learning_rate, weight_decay: of AdamW.
        warmup, schedule: the share of steps that rise to the learning rate, and how it falls to 0 from there.
        focal_gamma: of the focal loss (Lin et al. 2017) on the unsafe and the injection head.
        label_smoothing: how far hard labels are from 0 and 1.
        category_loss: "bce", or "asymmetric" (Ridnik et al. 2021, gammas 1 and 4, clip 0.05).
        category_balance: the beta of class-balanced weights (Cui et al. 2019), by which rarer categories weigh more; 0
            weighs all alike.
        category_weight, injection_weight: of these losses beside the unsafe head's.
        distillation, distillation_temperature: the share of the loss that comes from the teachers' logits (Hinton et
            al. 2015), where there are any.
        ema: decay a step of the moving average of weights that is kept instead of the last ones; 0 keeps the last.
        fgm: length of the adversarial step on word embeddings (Miyato et al. 2017), which doubles the time; 0 for none.
        evaluations: per epoch.
        watched: how many of the held-out rows an evaluation looks at.
        watch: what an evaluation is judged by: the mean AUPRC of the stages, or the recall at even odds.
        patience: evaluations without a better one after which training stops.
        learns: as a teacher: whether it learns from the logits of those before it, as the network which ships does.
        teaches: as a teacher: whether the student learns from its logits, or it only is where another one starts.
    """

    encoder: str
    revision: str | None = None
    start: str | dict[str, Annotated[float, Field(gt=0, le=1)]] = ""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    pooling: Literal["mean", "cls"] = "mean"
    dropout: Share = 0.1
    dropout_samples: Count = 1
    epochs: Positive = 2.0
    batch_tokens: Count = 4096
    batch_rows: Count | None = None
    short_tokens: Annotated[int, Field(ge=16)] = 128
    long_share: Share = 0.25
    context_dropout: Share = 0.15
    source_weights: dict[str, NotNegative] = {}
    source_shares: dict[str, NotNegative] = {}
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 0.01
    warmup: Share = 0.06
    schedule: Literal["cosine", "linear"] = "cosine"
    focal_gamma: NotNegative = 2.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    category_loss: Literal["bce", "asymmetric"] = "bce"
    category_balance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    category_weight: NotNegative = 0.5
    injection_weight: NotNegative = 0.5
    distillation: Share = 0.5
    distillation_temperature: Positive = 2.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fgm: NotNegative = 0.0
    evaluations: Count = 3
    watched: Count = 2000
    watch: Literal["auprc", "recall"] = "auprc"
    patience: Count = 4
    learns: bool = False
    teaches: bool = True

    @property
    def starts(self) -> dict[str, float]:
        """The teachers to begin with, by name, with their shares."""
        return self.start if isinstance(self.start, dict) else {self.start: 1.0} if self.start else {}

    @model_validator(mode="after")
    def _starts_are_whole(self) -> Training:
        if self.starts and not math.isclose(sum(self.starts.values()), 1):
            raise ValueError("start: the shares do not come to 1")
        return self


class Recipe(Part):
    """From rows to an artefact: the stages in the order in which they run.

    Attributes:
        name: of the artefact.
        about: what the card says besides: "license", "base" and "limits" are shown on its page.
        max_tokens, overlap: length of a window, special tokens included, and what two neighbours share.
        form: how a conversation reads; the default gives each stage its prefix and answers their prompt.
        seed: of everything drawn.
        threads: of the CPU; 0 for all.
        ingest: where rows come from.
        relabel: the model that labels them anew; null leaves labels as they are.
        synthesise: the model that writes hard pairs; null for none.
        contrast: whether the hand-written pairs join the rows.
        readings: whether public rows that were read again take the labels they were read to have, before any LLM's;
            what could not be decided keeps its label with a confidence of 0.5, for the filter.
        filter: what rows are dropped.
        held_out: share of the rows kept for early stopping, temperatures and thresholds.
        teachers: networks trained first, by name.
        train: the network that ships.
        soup: teachers of which it is mixed after its training, by name, each with its share of every weight; the
            trained network is the rest (Wortsman et al. 2022). They come from one start, as branches do.
        target_fpr: of the shipped thresholds, on held-out rows.
        bench: files or data sets that the finished artefact is measured on; nothing is chosen by them.
    """

    name: str
    about: dict[str, str | tuple[str, ...]] = {}
    max_tokens: Annotated[int, Field(ge=16)] = 256
    overlap: Annotated[int, Field(ge=0)] = 48
    form: Form = FORM
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    ingest: Ingest
    relabel: Relabel | None = None
    synthesise: Synthesise | None = None
    contrast: bool = True
    readings: bool = True
    filter: Filter = Filter()
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.06
    teachers: dict[str, Training] = {}
    train: Training
    soup: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    target_fpr: Annotated[float, Field(gt=0, lt=1)] = 0.05
    bench: tuple[Benchmark, ...] = ()

    @model_validator(mode="after")
    def _says_nothing_else(self) -> Recipe:
        taken = self.about.keys() & {*Card.model_fields, "metrics", "recipe", "data", "training"}
        if taken:
            raise ValueError(f"about: {', '.join(sorted(taken))}: the card says that by itself")
        return self

    @model_validator(mode="after")
    def _starts_are_known(self) -> Recipe:
        known: set[str] = set()
        for name, training in (*self.teachers.items(), ("train", self.train)):
            for start in training.starts.keys() - known:
                raise ValueError(f"{name} starts from {start!r}, which is no teacher before it")
            known.add(name)
        return self

    @model_validator(mode="after")
    def _soup_is_of_teachers(self) -> Recipe:
        if unknown := sorted(self.soup.keys() - self.teachers.keys()):
            raise ValueError(f"soup: {', '.join(unknown)}: no teacher of that name")
        if sum(self.soup.values()) >= 1:
            raise ValueError("soup: the shares come to 1 or more, and leave nothing for the trained network")
        return self


def read(
    source: str,
    *,
    rows: Sequence[str] | None = None,
    encoder: str | None = None,
    bench: Sequence[str] | None = None,
) -> Recipe:
    """The recipe in a YAML file, or a preset's.

    Args:
        source: the file's path, or the preset's name.
        rows: files and hub sets, instead of those it ingests.
        encoder: instead of that of the network which ships.
        bench: files to measure on, instead of its own.

    Raises:
        GuardmwError: there is no such file or preset, or a setting is not valid; names it.
    """

    def change(given: dict[str, Any]) -> None:
        if rows:
            given["ingest"] = {"sources": list(rows)}
        if encoder and isinstance(given.setdefault("train", {}), dict):
            given["train"]["encoder"] = encoder
        if bench:
            given["bench"] = list(bench)

    return read_preset(Recipe, PRESETS, source, change)


def presets() -> list[str]:
    """The names of the recipes that come with guardmw."""
    return names(PRESETS)
