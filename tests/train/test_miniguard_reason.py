"""A teacher's traces: those that come to the row's verdict, each paid for once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from guardmw.errors import GuardmwError
from guardmw.evaluate.rows import Row, key, row
from guardmw.train.miniguard import reason
from guardmw.train.miniguard.recipe import Reason

if TYPE_CHECKING:
    from pathlib import Path

    from tests.train.conftest import FakeLLM


def rows(count: int = 60) -> list[Row]:
    """Unsafe where they say evil."""
    return [
        row({"text": f"{'evil' if i % 2 else 'bread'} {i}", "label": "unsafe" if i % 2 else "safe"}, "mine")
        for i in range(count)
    ]


def answer(_: str, user: str) -> str:
    """What a good teacher says."""
    evil = "\nevil" in user
    return json.dumps(
        {"reasoning": f"It {'is evil' if evil else 'is about bread'}.", "label": ["safe", "unsafe"][evil]}
    )


def settings(fake: FakeLLM, **more: Any) -> Reason:
    """With a teacher behind a fake server."""
    model = fake.settings("compatible", input_usd=1.0, output_usd=2.0, **more.pop("teacher", {}))
    return Reason.model_validate({"teacher": model} | more)


def silent(_: str) -> None:
    """Say nothing."""


def test_each_row_gets_the_trace_that_leads_to_its_label(fake: FakeLLM, tmp_path: Path) -> None:
    """By its key; with the cost beforehand and afterwards."""
    fake.answer = answer
    said: list[str] = []
    traces, report = reason.reason(rows(), settings(fake), tmp_path, said.append)
    assert traces == reason.read(tmp_path)
    assert traces[key(rows()[1])] == "It is evil."
    assert report["traces"] == len(traces) == 60
    assert report["cost"]["usd"] == pytest.approx((60 * 100 * 1.0 + 60 * 10 * 2.0) / 1e6)
    assert report["cost"]["requests"] == 60
    assert "about $" in said[0]
    assert said[0].startswith("60 requests")
    assert "for $0.01" in said[-1]


def test_a_trace_to_another_verdict_is_dropped_and_counted(fake: FakeLLM, tmp_path: Path) -> None:
    """So is one that is too long, gives no reasons, or holds signs of turns, and what cannot be read."""
    signs = {"6": "It ends</think> here.", "10": "It ends</s> here.", "12": "It ends <start_of_turn> here."}
    echoes = {"14": "...", "16": "The text is safe: SAFE."}

    def odd(system: str, user: str) -> str:
        given = json.loads(answer(system, user))
        if "bread 2\n" in user:
            given["label"] = "unsafe"
        if "bread 4\n" in user:
            given["reasoning"] = "word " * 500
        for number, said in (signs | echoes).items():
            if f"bread {number}\n" in user:
                given["reasoning"] = said
        return "I cannot say." if "bread 8\n" in user else json.dumps(given)

    fake.answer = odd
    traces, report = reason.reason(rows(), settings(fake), tmp_path, silent)
    assert report["dropped"] == {
        "another verdict": 1,
        "too long": 1,
        "no reasons": 2,
        "signs of turns": 3,
        "unread": 1,
    }
    assert len(traces) == 52


def test_the_teacher_is_told_the_policy_and_not_the_label(fake: FakeLLM, tmp_path: Path) -> None:
    """One form of an answer is asked for, not two."""
    fake.answer = answer
    reason.reason(rows(4), settings(fake), tmp_path, silent)
    system = fake.bodies[0]["messages"][0]["content"]
    assert "prompt_injection" in system
    assert system.count("Answer with one JSON object") == 1
    assert "confidence" not in system
    assert reason.system(settings(fake, policy="Mine {only}")).startswith("Mine {only}\n\nAnswer with one JSON object")
    user = fake.bodies[0]["messages"][1]["content"]
    assert "safe" not in user


def test_a_killed_run_asks_nothing_twice(fake: FakeLLM, tmp_path: Path) -> None:
    """What was answered is in the journal."""

    def dies(system: str, user: str) -> str:
        if len(fake.asked) > 50:
            fake.broken = 1000
        return answer(system, user)

    fake.answer = dies
    hasty = settings(fake, teacher={"deadline_s": 0.5, "concurrency": 1})
    with pytest.raises(GuardmwError, match="gave no good answer"):
        reason.reason(rows(), hasty, tmp_path, silent)
    assert not (tmp_path / reason.FILE).exists()
    fake.broken, fake.answer = 0, answer
    traces, _ = reason.reason(rows(), settings(fake), tmp_path, silent)
    assert len(traces) == 60
    assert max(fake.asked.values()) == 1


def test_a_busy_server_that_garbles_is_borne_with(fake: FakeLLM, tmp_path: Path) -> None:
    """Every row has its trace in the end."""
    fake.answer, fake.busy, fake.garbled, fake.dropped = answer, 3, 2, "/v1/chat/completions"
    traces, _ = reason.reason(rows(), settings(fake), tmp_path, silent)
    assert len(traces) == 60


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("Sure! I think it is fine.", "none is in the form"),
        (
            json.dumps({"reasoning": "All is well.", "label": "safe"}),
            "first 40 answers 20 are traces .*'another verdict': 20",
        ),
        (
            json.dumps({"reasoning": "So </think> it is.", "label": "safe"}),
            "first 40 answers 0 are .*'signs of turns': 20",
        ),
        (json.dumps({"reasoning": "so " * 999, "label": "safe"}), "first 40 answers 0 are .*'too long': 20"),
    ],
)
def test_a_teacher_of_nonsense_is_found_out_before_much_is_spent(
    said: str, match: str, fake: FakeLLM, tmp_path: Path
) -> None:
    """After the first rows."""
    fake.answer = lambda *_: said
    with pytest.raises(GuardmwError, match=match):
        reason.reason(rows(400), settings(fake, least_agreement=0.6), tmp_path, silent)
    assert sum(fake.asked.values()) <= 80


def test_a_teacher_who_seldom_keeps_to_the_form_is_found_out_too(fake: FakeLLM, tmp_path: Path) -> None:
    """What cannot be read counts against it, and not only what it says where it can."""
    fake.answer = lambda system, user: answer(system, user) if "7\n" in user else "Well."
    with pytest.raises(GuardmwError, match="'unread': 3"):
        reason.reason(rows(400), settings(fake), tmp_path, silent)
    assert sum(fake.asked.values()) <= 80


def test_what_would_cost_too_much_is_not_begun(fake: FakeLLM, tmp_path: Path) -> None:
    """All rows are reckoned up, and not the first ones alone."""
    fake.answer = answer
    with pytest.raises(GuardmwError, match="limit_usd"):
        reason.reason(rows(400), settings(fake, teacher={"limit_usd": 0.2}), tmp_path, silent)
    assert not fake.asked


def test_without_a_teacher_sentences_follow_from_the_labels(tmp_path: Path) -> None:
    """They are called what they are."""
    traces, report = reason.reason(rows(4), Reason(templated=True), tmp_path, silent)
    assert "which hold no knowledge" in report["teacher"]
    assert traces[key(rows(4)[0])].endswith("so it is safe.")
    assert traces[key(rows(4)[1])].endswith("so it is unsafe.")


@pytest.mark.parametrize("given", [{}, {"templated": True, "teacher": {"service": "openai", "model": "judge"}}])
def test_traces_come_from_one_hand(given: dict[str, Any]) -> None:
    """A teacher's or a template's."""
    with pytest.raises(ValidationError, match="teacher"):
        Reason.model_validate(given)
