"""What a person should know of a MiniGuard before trusting it, beside its weights."""

from __future__ import annotations

import json
from shlex import quote
from typing import TYPE_CHECKING, Any

from guardmw.backends._artefact import CARD
from guardmw.train.telling import failures, figures, number, rounded, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PAGE = "MODEL_CARD.md"
POLICY = "policy.yaml"

_WHAT = """\
A guard model: {base}, tuned to judge a conversation and to answer as nvidia/Llama-3.1-Nemotron-Safety-Guard-8B-v3
does, `{{"User Safety": "…", "Response Safety": "…", "Safety Categories": "…"}}`. The client renders the prompt and
sends it as one user message; the chat template asks for no thoughts. The score is the probability of "unsafe" against
"safe" where the verdict stands. It is a filter for likely cases, not a judge of people."""


def serving(name: str, context: int, folder: str) -> tuple[str, ...]:
    """The commands that serve a model folder and ask it."""
    dialect = "" if "miniguard" in name.lower() else "?dialect=nemotron"
    policy = f"--policy {quote(f'{folder}/{POLICY}')} 'Hello'"
    return (
        f"vllm serve {quote(folder)} --served-model-name {quote(name)} --async-scheduling --max-model-len {context}",
        f"guardmw check --backend {quote(f'vllm:http://127.0.0.1:8000/v1#{name}{dialect}')} {policy}",
        f"guardmw check --backend {quote(f'transformers:{folder}')} {policy}",
    )


def write(folder: Path, stated: Mapping[str, Any]) -> None:
    """Write MODEL_CARD.md and card.json into a model folder, in this order; figures are rounded to 4 places."""
    card = rounded(dict(stated))
    for name, text in ((PAGE, page(card)), (CARD, json.dumps(card, indent=2) + "\n")):
        draft = folder / f"{name}.part"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)


def page(card: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    metrics, training = card["metrics"], card["training"]
    bench: dict[str, Any] = metrics.get("bench", {})
    parts = [
        f"# {card['name']}",
        _WHAT.format(base=card["base"]),
        "## How to serve it",
        "From the folder that this one lies in:",
        "```bash\n" + "\n".join(card["serve"]) + "\n```",
        "## Thresholds",
        f"On the scores as they are ({POLICY}), fitted for a false-positive rate of {card['target_fpr']:.0%}.",
        table(
            ("stage", "threshold", "temperature"),
            (
                (stage, number(of["policy_threshold"]), number(of["temperature"]))
                for stage, of in card["stages"].items()
            ),
        ),
        "## On held-out rows of the training pool",
        "No row of a family that was trained on; at even odds, from the half on which nothing was chosen or fitted.",
        figures({"all": metrics["held_out"]}, ("rows", "unsafe", "macro_f1", "f1", "recall", "fpr", "auprc", "ece")),
        f"Answers that could not be read, and count as unsafe: {metrics['unread']}."
        + (" It is no guard." if metrics["unread"] >= metrics["held_out"]["rows"] else ""),
    ]
    if bench:
        parts += [
            "## On benchmarks",
            _apart(training["of_benchmarks"]),
            figures(bench, ("rows", "unsafe", "macro_f1", "f1", "recall", "fpr", "auprc", "ece")),
            "## Where it fails",
            failures(bench),
        ]
    if limits := card.get("limits"):
        parts += ["## Known limits", "\n".join(f"- {limit}" for limit in limits)]
    if scheme := card.get("scheme"):
        parts += [f"All figures above are of the model with whole weights; these are its weights in {scheme}."]
    parts += ["## Eight bits", _quantised(metrics.get("quantised", {}))]
    parts += ["## How it came about", *_steps(training)]
    if "license" in card:
        parts += [f"Licence: {card['license']}"]
    parts += [
        table(
            ("source", "rows", "licence"),
            ((name, str(of["rows"]), of["license"]) for name, of in card["data"].items()),
        ),
        "`guardmw train miniguard recipe.yaml --out FOLDER` with these settings, all others at their defaults:",
        f"```json\n{json.dumps(card['recipe'], indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _apart(trained: int) -> str:
    """Whether benchmarks are strange to the model."""
    if not trained:
        return "At even odds. Nothing was trained, chosen or fitted on these."
    return (
        f"At even odds. Nothing was chosen or fitted on these, but {trained} rows of them, or near to them, were "
        "trained on: the figures flatter. `filter.contamination.against` was to name these benchmarks."
    )


def _steps(training: Mapping[str, Any]) -> list[str]:
    reason, target, soup = training["reason"], training["target"], training["soup"]
    traces = (
        f"Traces: {reason['traces']} by {reason['teacher']}."
        if reason
        else "Traces: none; there was no teacher, and this step of MiniGuard's recipe was left out."
    )
    aimed = (
        f"Targeted rows: {target['rows']}, {target['written']} of them written by an LLM."
        if target
        else ("Targeted rows: none.")
    )
    stirred = (
        "refused, being worse than the best checkpoint alone"
        if soup["refused"]
        else (
            f"the {soup['way']} mean of {len(soup['taken'])}" if len(soup["taken"]) > 1 else "the best checkpoint alone"
        )
    )
    rows = (
        f"{training['rows']} rows to train on (digest {training['digest']}), {training['held_out']} held out, "
        f"{training['too_long']} examples left out as too long, of which a row has one, or with a trace two."
    )
    tasted = f"macro-F1 of the best alone {number(soup['best'])}, of the soup {number(soup['soup'])}"
    return [rows, traces, aimed, f"Soup: {stirred} ({tasted}, on the rows that checkpoints were chosen by)."]


def _quantised(given: Mapping[str, Any]) -> str:
    if not given:
        return "None were made."
    keys = ("rows", "agreement", "mean_difference", "macro_f1_before", "macro_f1_after")
    refused = [name for name, of in given.items() if of["refused"]]
    text = figures(given, keys)
    return f"{text}\n\nRefused, for they decide otherwise too often: {', '.join(refused)}." if refused else text
