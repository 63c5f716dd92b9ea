"""What a person should know of a model before trusting it, from its card.json, as a page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from guardmw.backends._artefact import CARD
from guardmw.train.telling import failures, figures, number, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PAGE = "MODEL_CARD.md"

_WHAT = """\
A guard model. It reads one turn of a conversation (what a user, an assistant, a tool call or a tool's result says, with
the user's last words before it) and gives a score for harm, one for each kind of harm, and one for text that carries
instructions of its own (jailbreak or prompt injection).

Windows of {max_tokens} tokens that overlap by {overlap}; the highest score of them counts. English. It is a filter for
likely cases, not a judge of people."""

_INT8 = """\
Against fp32 on {rows} held-out rows: {agreement:.1%} same decisions, mean difference of scores {mean_difference:.4f},
AUPRC {auprc_int8:.4f} ({auprc_fp32:.4f} in fp32)."""


def write(folder: Path) -> Path:
    """Write MODEL_CARD.md beside an artefact's card.json."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    path = folder / PAGE
    path.write_text(page(card), encoding="utf-8")
    return path


def page(card: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    metrics = card["metrics"]
    bench: dict[str, Any] = metrics.get("bench", {})
    training = card["training"]
    parts = [
        f"# {card['name']}",
        _WHAT.format_map(card),
        "## Thresholds",
        table(
            ("stage", "threshold", "temperature"),
            ((stage, number(at), number(card["temperature"][stage])) for stage, at in card["thresholds"].items()),
        ),
        "## On held-out rows of the training pool",
        "No row of a family that was trained on; figures from the half on which nothing was fitted.",
        figures(metrics["held_out"], ("rows", "unsafe", "auprc", "recall", "fpr", "ece_before", "ece_after")),
    ]
    if bench:
        parts += [
            "## On benchmarks",
            "At the thresholds above. Nothing was trained or fitted on these.",
            figures(bench, ("rows", "unsafe", "f1", "macro_f1", "recall", "fpr", "auprc", "ece")),
            "## Where it fails",
            failures(bench),
        ]
    if limits := card.get("limits"):
        parts += ["## Known limits", "\n".join(f"- {limit}" for limit in limits)]
    int8 = metrics["int8"]
    parts += [
        "## int8",
        _INT8.format_map(int8),
        "## Licence and data",
        *(f"{name.capitalize()}: {card[name]}" for name in ("license", "base") if name in card),
        f"{training['rows']} rows to train on and {training['held_out']} held out (digest {training['digest']}):",
        table(
            ("source", "rows", "licence"),
            ((name, str(of["rows"]), of["license"]) for name, of in card["data"].items()),
        ),
        "## Recipe",
        *([note] if (note := training.get("note")) else []),
        "`guardmw train tinysafe recipe.yaml --out FOLDER` with these settings, all others at their defaults:",
        f"```json\n{json.dumps(card['recipe'], indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"
