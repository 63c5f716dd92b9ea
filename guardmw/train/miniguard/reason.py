"""Why each row has its label: traces of a larger model, of which those count that come to the same verdict."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from guardmw.dialects._turns import Frame
from guardmw.dialects.policy import POLICY
from guardmw.errors import GuardmwError
from guardmw.evaluate.rows import key
from guardmw.settings import Part
from guardmw.train.llm import Answers, Model, Questions, ask, check
from guardmw.train.miniguard.form import drawn
from guardmw.train.relabel import prompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from guardmw.evaluate.rows import Row
    from guardmw.train.miniguard.recipe import Reason
    from guardmw.train.stages import Say

FILE = "traces.jsonl"
JOURNAL = "answers.jsonl"
# Enough to tell a teacher that judges from one that does not.
_FIRST = 40
_TOKENS_PER_WORD = 1.5
_ABOUT_JSON = 30
# Changes what would end a thought early, or begin a turn, in any family of models.
_FRAME = Frame()
# The label, or the form's own dots, in the place of reasons.
_ECHO = re.compile(r"\W|_|\b(?:un)?safe\b|\b(?:the|this|text|it|is|so|label|reasoning|verdict|answer)\b", re.IGNORECASE)
# The policy's own word on the form of an answer; another is asked for here.
_OWN_FORM = "\n\nAnswer with one JSON object"
_FORM = """

Answer with one JSON object and nothing else:
{{"reasoning": "...", "label": "safe" or "unsafe"}}
reasoning comes first: at most {words} words that lead to the label, on what the text says, means or does, and on the
part of the policy that it falls under. Do not quote the text at length, and add nothing that could help to do harm."""

_STAGES = {
    "input": "a user's message",
    "output": "an assistant's answer",
    "tool_call": "what an agent is about to do",
    "tool_result": "what a tool returned",
    "document": "a document",
}


class Trace(Part):
    """What a teacher says."""

    reasoning: Annotated[str, Field(pattern=r"\S")]
    label: Literal["safe", "unsafe"]


def reason(rows: Sequence[Row], settings: Reason, folder: Path, say: Say) -> tuple[dict[str, str], dict[str, Any]]:
    """Traces by the key of their row, and a report.

    Args:
        rows: with their labels, which the teacher is not told.
        settings: who is asked, and what counts.
        folder: holds the teacher's answers, and is made if need be; a second run asks only what the first did not.
        say: hears of progress and costs.

    Raises:
        GuardmwError: the teacher does not answer, answers nonsense, seldom gives a trace that can be used, or would
            cost more than its limit; what came before is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    some = drawn(rows, settings.rows)
    if settings.teacher is None:
        traces = {key(row): templated(row) for row in some}
        report: dict[str, Any] = {"teacher": "templated rationales, which hold no knowledge", "asked": len(some)}
    else:
        traces, report = _asked(settings.teacher, some, settings, folder / JOURNAL, say)
    draft = folder / f"{FILE}.part"
    draft.write_text("".join(json.dumps({"key": k, "trace": t}) + "\n" for k, t in traces.items()), encoding="utf-8")
    draft.replace(folder / FILE)
    return traces, report | {"traces": len(traces)}


def read(folder: Path) -> dict[str, str]:
    """The traces that ``reason`` left."""
    lines = map(json.loads, (folder / FILE).read_text(encoding="utf-8").splitlines())
    return {line["key"]: line["trace"] for line in lines}


def templated(row: Row) -> str:
    """A sentence that follows from the label alone."""
    about = f"This is {_STAGES[row.conversation.stage]}."
    if not row.unsafe:
        return f"{about} Nothing in it is harmful, so it is safe."
    kinds = ", ".join(name.replace("_", " ") for name in sorted(row.categories or ()))
    attack = row.attack.replace("_", " ")
    what = " and ".join(filter(None, (kinds, attack))) or "harm"
    return f"{about} It shows {what}, so it is unsafe."


def system(settings: Reason) -> str:
    """What the teacher is told before each row."""
    policy = settings.policy.partition(_OWN_FORM)[0] if settings.policy == POLICY else settings.policy
    return policy + _FORM.format(words=settings.max_words)


def trace(text: str) -> Trace | None:
    """What an answer says; None unless it is just the object asked for, in a code fence or not."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        return Trace.model_validate_json(text)
    except ValidationError:
        return None


def _asked(
    teacher: Model, rows: Sequence[Row], settings: Reason, journal: Path, say: Say
) -> tuple[dict[str, str], dict[str, Any]]:
    said = {str(at): prompt(row, settings.characters) for at, row in enumerate(rows)}
    tokens = int(settings.max_words * _TOKENS_PER_WORD) + _ABOUT_JSON

    def questions(some: Mapping[str, str]) -> Questions[Trace]:
        return Questions(some, trace, system(settings), teacher, journal, tokens)

    # Of all, before anything is spent on the first.
    check(questions(said), say)
    # The rows come in the order of their sources; the first of them are of one kind.
    few = {str(rows.index(row)): said[str(rows.index(row))] for row in drawn(rows, _FIRST)}
    first = ask(questions(few), say)
    traces, dropped = _sorted_out(rows, first, settings.max_words)
    if len(traces) < settings.least_agreement * len(few):
        raise GuardmwError(
            f"of {teacher.model}'s first {len(few)} answers {len(traces)} are traces to the row's label that can be "
            f"used; dropped {dropped}. Look at the policy, the labels, the model and reason.max_words, or lower "
            "reason.least_agreement"
        )
    answers = ask(questions(said), say)
    traces, dropped = _sorted_out(rows, answers, settings.max_words)
    say(f"{len(traces)} traces of {len(rows)} rows; dropped {dropped}")
    cost = answers.cost() | {"requests": first.requests + answers.requests}
    if first.estimated_usd is not None and answers.estimated_usd is not None:
        cost["estimated_usd"] = first.estimated_usd + answers.estimated_usd
    say(f"{teacher.model} answered {cost['requests']} requests: {_spent(answers)}")
    return traces, {"teacher": teacher.model, "asked": len(rows), "dropped": dropped, "cost": cost}


def _spent(answers: Answers[Trace]) -> str:
    tokens = f"{answers.input_tokens} tokens read and {answers.output_tokens} written, of all runs"
    return tokens if answers.usd is None else f"{tokens}, for ${answers.usd:.2f}"


def _sorted_out(rows: Sequence[Row], answers: Answers[Trace], most: int) -> tuple[dict[str, str], dict[str, int]]:
    """The traces that can be used, by the key of their row, and how many cannot, and why."""
    traces: dict[str, str] = {}
    dropped = {"another verdict": 0, "too long": 0, "no reasons": 0, "signs of turns": 0, "unread": len(answers.unread)}
    for at, found in answers.found.items():
        row = rows[int(at)]
        if fault := _fault(row, found, most):
            dropped[fault] += 1
        else:
            traces[key(row)] = " ".join(found.reasoning.split())
    return traces, dropped


def _fault(row: Row, found: Trace, most: int) -> str:
    """Why a trace is not used, or nothing."""
    if (found.label == "unsafe") != row.unsafe:
        return "another verdict"
    if len(found.reasoning.split()) > most:
        return "too long"
    if not _ECHO.sub("", found.reasoning):
        return "no reasons"
    return "signs of turns" if _FRAME.hold(found.reasoning) != found.reasoning else ""
