"""Every setting of a TinySafe training run, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from guardmw.backends._artefact import Form

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

# Rows made from templates, or labelled by rules wider than ours, teach less than their number.
SOURCE_WEIGHTS = {
    "davidson": 0.5,
    "decodingtrust_toxicity": 0.5,
    "toxic_spans": 0.3,
    "vicomtech_hate": 0.7,
    "wrapped_tool_call": 0.4,
    "wrapped_tool_result": 0.5,
}


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        epochs: passes over the rows; the last may be a part of one.
        max_tokens: window length, special tokens included; of a longer text one window is drawn each epoch.
        batch_tokens: tokens per step, padding included.
        focal_gamma: of the focal loss (Lin et al. 2017) on the unsafe and the injection head.
        category_weight, injection_weight: of these losses beside the unsafe head's.
        context_dropout: share of rows that are shown without their context, so that a lone answer can be judged too.
        held_out: share of the rows kept for early stopping, temperature and thresholds.
        evaluations: per epoch.
        patience: evaluations without a better AUPRC after which training stops.
        target_fpr: of the shipped thresholds, on held-out rows.
    """

    name: str = "guardmw-minilm-1"
    form: Form = FORM
    max_tokens: int = 256
    overlap: int = 48
    epochs: float = 1.33
    batch_tokens: int = 4096
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.06
    focal_gamma: float = 2.0
    category_weight: float = 0.5
    injection_weight: float = 0.5
    context_dropout: float = 0.15
    source_weights: dict[str, float] = field(default_factory=lambda: dict(SOURCE_WEIGHTS))
    held_out: float = 0.06
    evaluations: int = 3
    patience: int = 4
    target_fpr: float = 0.05
    threads: int = 0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return asdict(self) | {"form": self.form.model_dump(mode="json")}
