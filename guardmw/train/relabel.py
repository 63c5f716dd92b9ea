"""Labels given anew by an LLM under a written policy, a second one to check the first, and every change on record."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from guardmw.conversation import STAGES
from guardmw.dialects.policy import POLICY, question
from guardmw.settings import Part, Score
from guardmw.taxonomy import Category
from guardmw.train.llm import Answers, Journal, Model, Questions, ask, check, client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from guardmw.conversation import Turn
    from guardmw.evaluate.rows import Row

# Tokens of a verdict.
_EXPECTED_TOKENS = 40


class Relabel(Part):
    """How labels are given anew.

    Attributes:
        labeller: judges every row.
        second: judges a sample, to see how far the first can be trusted.
        sample: share of the rows that the second sees; which ones follows from their words.
        policy: what the labellers are told, in place of POLICY.
        least_confidence: below it a verdict is doubted.
        overrule: whose labels a confident verdict replaces: "weak" ones only (by construction or by machine), "all", or
            none ("never"). One that is not replaced is marked as doubted.
        characters: of each turn that are shown; of a longer one its start and its end.
    """

    labeller: Model
    second: Model | None = None
    sample: Score = 0.1
    policy: Annotated[str, Field(min_length=1)] = POLICY
    least_confidence: Score = 0.7
    overrule: Literal["weak", "all", "never"] = "weak"
    characters: Annotated[int, Field(ge=200)] = 6000


def reach(settings: Relabel, folder: Path) -> None:
    """Fail where no labeller could be asked, before other stages are paid for.

    Raises:
        GuardmwError: an API key or a library is missing.
    """
    for model in filter(None, (settings.labeller, settings.second)):
        with Journal(folder / "labels.jsonl") as kept:
            client(model, kept, lambda _: None).close()


class Verdict(Part):
    """What a labeller says."""

    label: Literal["safe", "unsafe"]
    categories: list[Category]
    attack: Literal["jailbreak", "prompt_injection"] | None
    confidence: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]

    @field_validator("attack", mode="after")
    @classmethod
    def _attacks_are_unsafe(cls, attack: str | None, info: Any) -> str | None:  # noqa: ANN401 - pydantic's
        if info.data.get("label") == "safe" and (attack or info.data.get("categories")):
            raise ValueError("a safe text has neither categories nor an attack")
        return attack

    @property
    def unsafe(self) -> bool:
        """The label."""
        return self.label == "unsafe"


class Relabelled(NamedTuple):
    """Rows in the order they came, and what happened to them."""

    rows: list[Row]
    report: dict[str, Any]


def relabel(
    rows: Sequence[Row], settings: Relabel, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Relabelled:
    """Ask about every row, and put verdicts in the place of labels where the settings let them.

    With verdict and label in agreement, unknown or weak categories and attacks become the verdict's, and its confidence
    the row's. Where they differ, a confident verdict replaces a label that may be overruled; the row is weak then, with
    the verdict's confidence. A label that stays against a verdict, or with a doubted one, makes the row weak, with the
    confidence that the verdict leaves to the label; and so does a second labeller who contradicts the first: its row
    keeps its label, with a confidence of 0.5 at most. A row without a verdict stays as it is.

    Args:
        rows: what to judge.
        settings: who judges, and what it changes.
        folder: holds the journals of both labellers, and is made if need be; with them a second run asks only what the
            first did not.
        say: hears of progress and costs.

    Raises:
        GuardmwError: a labeller does not answer, or would cost more than its limit; what came before is kept.
    """
    prompts = [prompt(row, settings.characters) for row in rows]
    asked = {str(at): text for at, text in enumerate(prompts)}
    sampled = {at: text for at, text in asked.items() if settings.second and _share(text) < settings.sample}
    judging = _questions(settings.labeller, settings, asked, folder / "labels.jsonl")
    checking = settings.second and _questions(settings.second, settings, sampled, folder / "second-labels.jsonl")
    if checking:
        # Before anything is spent on the first.
        check(checking, say)
    first = ask(judging, say)
    second: Answers[Verdict] = ask(checking, say) if checking else Answers({})
    made = [_decided(row, first.found.get(str(at)), second.found.get(str(at)), settings) for at, row in enumerate(rows)]
    report: dict[str, Any] = {
        "rows": len(rows),
        "unlabelled": len(first.unread),
        "changed": sum(old.unsafe != new.unsafe for old, new in zip(rows, made, strict=True)),
        "sources": _by_source(rows, made, first.found),
        "labeller": {"model": settings.labeller.model, **first.cost()},
    }
    if settings.second:
        pairs = [
            (rows[int(at)].conversation.stage, first.found[at], verdict)
            for at, verdict in second.found.items()
            if at in first.found
        ]
        report["second"] = {
            "model": settings.second.model,
            "rows": len(sampled),
            "unlabelled": len(second.unread),
            **second.cost(),
            "agreement": agreement([(a.unsafe, b.unsafe) for _, a, b in pairs]),
            "attacks": agreement([(a.attack or "", b.attack or "") for _, a, b in pairs]),
            "stages": {
                stage: agreement([(a.unsafe, b.unsafe) for at, a, b in pairs if at == stage])
                for stage in STAGES
                if any(at == stage for at, _, _ in pairs)
            },
        }
    return Relabelled(made, report)


def prompt(row: Row, characters: int) -> str:
    """The question about a row. Its tags hold a word that follows from all that is inside: no text can close them.

    The labels that the row has are not told.
    """
    told = [(turn.role, _cut(_spoken(turn), characters)) for turn in row.conversation.context]
    judged = _cut(row.conversation.trial, characters)
    return question(told, judged, row.conversation.stage)


def verdict(text: str) -> Verdict | None:
    """What an answer says; None unless it is just the object asked for, in a code fence or not."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        return Verdict.model_validate_json(text)
    except ValidationError:
        return None


def agreement(pairs: Sequence[tuple[object, object]]) -> dict[str, float | int | None]:
    """How often two say the same, and Cohen's kappa: how much of what chance leaves to agree on (Cohen 1960).

    It is None where there is nothing, or where both always say one thing and chance leaves none.
    """
    count = len(pairs)
    if not count:
        return {"rows": 0, "share": None, "kappa": None}
    share = sum(a == b for a, b in pairs) / count
    one, other = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    chance = sum(one[label] * other[label] for label in one) / count**2
    return {"rows": count, "share": share, "kappa": None if chance == 1 else (share - chance) / (1 - chance)}


def _questions(model: Model, settings: Relabel, said: Mapping[str, str], journal: Path) -> Questions[Verdict]:
    return Questions(said, verdict, settings.policy, model, journal, _EXPECTED_TOKENS)


def _decided(row: Row, first: Verdict | None, second: Verdict | None, settings: Relabel) -> Row:
    """A row, by the policy that ``relabel`` tells."""
    if first is None:
        return row
    contradicted = second is not None and second.unsafe != first.unsafe
    sure = first.confidence >= settings.least_confidence and not contradicted
    agreed = first.unsafe == row.unsafe
    most = 0.5 if contradicted else 1.0
    if agreed and sure:
        return replace(row, **_told(row, first), confidence=first.confidence)
    if agreed:
        return replace(row, weak=True, confidence=min(first.confidence, most))
    overruled = settings.overrule == "all" or (settings.overrule == "weak" and row.weak)
    if sure and overruled:
        return replace(
            row,
            unsafe=first.unsafe,
            categories=_categories(first),
            attack=first.attack or "",
            weak=True,
            confidence=first.confidence,
        )
    return replace(row, weak=True, confidence=min(1 - first.confidence, most))


def _told(row: Row, given: Verdict) -> dict[str, Any]:
    """Categories and attack of a row whose label a verdict confirms."""
    if row.weak:
        return {"categories": _categories(given), "attack": given.attack or ""}
    return {"categories": _categories(given)} if row.categories is None else {}


def _categories(given: Verdict) -> frozenset[str] | None:
    # A bare attack has no kind of harm; any other unsafe row without one is of a kind unknown.
    return frozenset(given.categories) if given.categories or given.attack or not given.unsafe else None


def _by_source(rows: Iterable[Row], made: Iterable[Row], found: Mapping[str, Verdict]) -> dict[str, dict[str, int]]:
    """What happened to the rows of each source."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for at, (old, new) in enumerate(zip(rows, made, strict=True)):
        given, of = found.get(str(at)), counts[old.source]
        of["rows"] += 1
        of["unlabelled"] += given is None
        of["now_unsafe"] += new.unsafe and not old.unsafe
        of["now_safe"] += old.unsafe and not new.unsafe
        of["kept_against_verdict"] += given is not None and given.unsafe != new.unsafe
        of["weak"] += new.weak
    return {source: dict(of) for source, of in sorted(counts.items())}


def _spoken(turn: Turn) -> str:
    return "\n".join(filter(None, (turn.text, *map(str, turn.tool_calls))))


def _cut(text: str, most: int) -> str:
    """The start and the end of a long text: what is planted stands at either."""
    if len(text) <= most:
        return text
    return f"{text[: most - most // 3]}\n[…]\n{text[-(most // 3) :]}"


def _share(text: str) -> float:
    """Where in [0, 1) a text falls, evenly."""
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / 2**32
