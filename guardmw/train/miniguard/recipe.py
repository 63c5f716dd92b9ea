"""Every setting of a MiniGuard's making, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from guardmw.dialects.policy import POLICY
from guardmw.settings import Part
from guardmw.train.filter import Filter
from guardmw.train.ingest import Benchmark, Ingest
from guardmw.train.llm import Model
from guardmw.train.presets import names
from guardmw.train.presets import read as read_preset

if TYPE_CHECKING:
    from collections.abc import Sequence

PRESETS = Path(__file__).parent / "recipes"

Share = Annotated[float, Field(ge=0, le=1)]
Inner = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Form(Part):
    """Which rows become conversations.

    Attributes:
        rows: to train on, at most; which ones follows from their words. As many of each label, where there are.
        max_tokens: of prompt and answer, thoughts included; rows that need more are left out, and counted. The
            prompt's own words take 400 to 500.
    """

    rows: Annotated[int, Field(ge=2)] | None = None
    max_tokens: Annotated[int, Field(ge=64)] = 1536


class Reason(Part):
    """Who writes why a row has its label.

    Attributes:
        teacher: a model behind a server; null for templated rationales.
        templated: sentences that follow from the label alone. They hold no knowledge: for a run in miniature only.
        policy: what the teacher judges by.
        rows: that it is asked about, at most; those that are too long to be learnt are left out.
        max_words: of a trace; a longer one is dropped.
        least_agreement: share of answers that are a trace to the row's label, and short enough; with less among the
            first ones, nothing more is asked.
        characters: of each turn that are shown to the teacher.
    """

    teacher: Model | None = None
    templated: bool = False
    policy: Annotated[str, Field(min_length=1)] = POLICY
    rows: Count | None = None
    max_words: Count = 120
    least_agreement: Share = 0.5
    characters: Annotated[int, Field(ge=200)] = 6000

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.teacher is None) != self.templated:
            raise ValueError("give a teacher, or `templated: true`; or leave `reason` out")
        return self


class Target(Part):
    """Data aimed at what the student gets wrong.

    Attributes:
        contrast: how many of the pairs written by hand join the rows, those around trigger words first.
        writer: an LLM that writes pairs around the student's false alarms and misses; null for none.
        probe: share of the rows that is never trained on, in which those errors are looked for.
        errors: that are written around, at most; half of them false alarms.
        pairs: for each error.
        ratio: how many times as long as the other a side of a pair may be.
        alike: share of its three-word pieces from which on a text is a near duplicate.
        license: what the rows name as theirs.
    """

    contrast: Annotated[int, Field(ge=0)] = 600
    writer: Model | None = None
    probe: Inner = 0.05
    errors: Count = 150
    pairs: Annotated[int, Field(gt=0, le=20)] = 4
    ratio: Annotated[float, Field(gt=1)] = 1.6
    alike: Annotated[float, Field(gt=0, le=1)] = 0.5
    license: str = "generated"


class Tune(Part):
    """How the model is trained.

    Attributes:
        model: with a chat template; a folder, or a name on the Hugging Face hub.
        revision: of a name on the hub.
        method: "lora" (Hu et al. 2021), or "full": all weights.
        rank, alpha, dropout, targets: of the LoRA; ``targets`` are names of linear layers.
        epochs: passes over the rows; the last may be a part of one.
        batch_tokens: tokens that are computed at once, padding included; those that all prompts begin with come on top.
        accumulate: batches in one step.
        learning_rate, weight_decay: of AdamW.
        warmup, schedule: the share of steps that rise to the learning rate, and how it falls to 0 from there.
        plain_weight, trace_weight: of the two tasks, the verdict alone and a trace before it (Hsieh et al. 2023).
        checkpoint_every: steps from one checkpoint and evaluation to the next.
        watched: held-out rows that an evaluation looks at.
        patience: evaluations without a better one after which training stops.
    """

    model: str
    revision: str | None = None
    method: Literal["lora", "full"] = "lora"
    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    epochs: Positive = 2.0
    batch_tokens: Count = 8192
    accumulate: Count = 1
    learning_rate: Positive = 2e-4
    weight_decay: NotNegative = 0.0
    warmup: Share = 0.05
    schedule: Literal["cosine", "linear"] = "cosine"
    plain_weight: Positive = 1.0
    trace_weight: NotNegative = 0.5
    checkpoint_every: Count = 100
    watched: Count = 500
    patience: Count = 5


class Soup(Part):
    """Which checkpoints become one (Wortsman et al. 2022).

    Attributes:
        k: of the best; 1 takes the best alone.
        way: "uniform", the mean of all of them, or "greedy", each only if it does not make it worse.
    """

    k: Count = 3
    way: Literal["uniform", "greedy"] = "uniform"


class Recipe(Part):
    """From rows to a model folder: the stages in the order in which they run.

    Attributes:
        name: of the model; with "miniguard" in it, guardmw knows its dialect by itself.
        about: what the card says besides: "license", "base" and "limits" are shown on its page.
        seed: of everything drawn.
        threads: of the CPU; 0 for all.
        ingest: where rows come from.
        filter: what rows are dropped.
        held_out: share of the rows not trained on: one half for early stopping, soup and thresholds, the other for
            figures.
        form: which rows become conversations.
        reason: who writes traces; null for none.
        target: data aimed at errors; null for none.
        tune, soup: how the model is trained, and which checkpoints become one.
        quantise: schemes of llmcompressor, each of which leaves a folder beside the model's.
        least_agreement: share of decisions that a quantised model must share with the whole one.
        target_fpr: of the shipped thresholds, on held-out rows.
        bench: files or data sets that the finished model is measured on; nothing is chosen by them.
    """

    name: str
    about: dict[str, str | tuple[str, ...]] = {}
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    ingest: Ingest
    filter: Filter = Filter()
    held_out: Inner = 0.06
    form: Form = Form()
    reason: Reason | None = None
    target: Target | None = Target()
    tune: Tune
    soup: Soup = Soup()
    quantise: tuple[Literal["FP8_DYNAMIC", "W8A8"], ...] = ()
    least_agreement: Share = 0.95
    target_fpr: Inner = 0.05
    bench: tuple[Benchmark, ...] = ()


def read(
    source: str,
    *,
    rows: Sequence[str] | None = None,
    model: str | None = None,
    bench: Sequence[str] | None = None,
) -> Recipe:
    """The recipe in a YAML file, or a preset's.

    Args:
        source: the file's path, or the preset's name.
        rows: files and hub sets, instead of those it ingests.
        model: instead of its base model.
        bench: files to measure on, instead of its own.

    Raises:
        GuardmwError: there is no such file or preset, or a setting is not valid; names it.
    """

    def change(given: dict[str, Any]) -> None:
        if rows:
            given["ingest"] = {"sources": list(rows)}
        if model and isinstance(given.setdefault("tune", {}), dict):
            # A revision is one of the model that it was given with.
            given["tune"] = {**given["tune"], "model": model, "revision": None}
        if bench:
            given["bench"] = list(bench)

    return read_preset(Recipe, PRESETS, source, change)


def presets() -> list[str]:
    """The names of the recipes that come with guardmw."""
    return names(PRESETS)
