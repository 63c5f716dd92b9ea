"""Rows become lessons: the question that serving asks, and as much of an answer as anybody knows."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import dialects
from guardmw.dialects import Reply
from guardmw.dialects.nemotron import CATEGORIES, Nemotron, taught
from guardmw.evaluate.rows import Row, row
from guardmw.train.miniguard import form

if TYPE_CHECKING:
    from pathlib import Path


def given(text: str = "How do I bake bread?", label: str = "safe", **more: Any) -> Row:
    """A row of the row form."""
    return row({"text": text, "label": label} | more, "mine")


def test_the_question_is_the_one_that_serving_asks() -> None:
    """To the byte, and with the same start of the answer."""
    one = given(role="assistant", context="Bread?")
    judging = dialects.named("nemotron").judge(one.conversation)
    (request,) = next(judging)
    (lesson,) = form.lessons([one])
    assert lesson.request == request


@pytest.mark.parametrize("label", ["safe", "unsafe"])
@pytest.mark.parametrize("role", ["user", "assistant", "tool_call", "tool_result"])
def test_a_whole_answer_is_read_as_the_row_s_label(role: str, label: str) -> None:
    """By the dialect, with the kinds of harm."""
    kinds = ["violence", "self_harm"] if label == "unsafe" else []
    one = given(label=label, role=role, categories=kinds)
    (lesson,) = form.lessons([one])
    assert lesson.silent == ()
    judging = Nemotron(one_token=False).judge(one.conversation)
    next(judging)
    with pytest.raises(StopIteration) as stop:
        judging.send([Reply(lesson.answer)])
    found = stop.value.value
    assert (found.unsafe >= 0.5) == (label == "unsafe")
    assert {name for name, score in found.categories.items() if score} == set(kinds)


def test_unknown_kinds_are_drawn_and_not_taught() -> None:
    """The answer has its form, and ends."""
    some = form.lessons([given(f"number {i}", "unsafe", cat_source="none") for i in range(20)])
    kinds = {lesson.answer[slice(*lesson.silent[0])] for lesson in some}
    assert len(kinds) > 2
    assert kinds <= {*CATEGORIES}
    assert some[0].answer.endswith('"}')


def test_an_attack_without_a_harmful_goal_has_a_kind_of_its_own() -> None:
    """Nemotron's models name one for all that is unsafe."""
    (lesson,) = form.lessons([given(label="unsafe", attack="jailbreak")])
    assert lesson.answer == '{"User Safety": "unsafe", "Safety Categories": "Manipulation"}'


def test_a_verdict_on_the_question_comes_from_its_own_row() -> None:
    """Its kinds of harm too; case and spaces do not matter."""
    question = given("An  evil thing", "unsafe", categories=["harassment"])
    one = given("No.", role="assistant", context="an evil thing")
    (lesson,) = form.lessons([one], [question])
    assert lesson.answer == '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Harassment"}'
    assert lesson.silent == ()


def test_a_verdict_that_nobody_gave_is_drawn_and_not_taught() -> None:
    """Both come up, so that the verdict on the answer cannot lean on it."""
    some = form.lessons([given("No.", role="assistant", context=f"Number {i}?") for i in range(20)])
    words = [lesson.answer[slice(*lesson.silent[0])] for lesson in some]
    assert set(words) == {"safe", "unsafe"}
    for lesson, word in zip(some, words, strict=True):
        # What kinds of harm a guess would be of, nobody knows either.
        assert len(lesson.silent) == 1 + (word == "unsafe")
        assert '"Response Safety": "safe"' in lesson.answer


def test_an_answer_to_nothing_has_a_harmless_question() -> None:
    """The dialect shows an empty one."""
    (lesson,) = form.lessons([given("No.", role="assistant")])
    assert lesson.answer == '{"User Safety": "safe", "Response Safety": "safe"}'
    assert lesson.silent == ()


@pytest.mark.parametrize(
    ("unsafe", "safe", "most", "drawn"), [(50, 50, 20, 10), (3, 50, 20, 3), (50, 3, 20, 17), (5, 5, 20, 5)]
)
def test_rows_are_drawn_by_what_they_say_half_of_each_label(unsafe: int, safe: int, most: int, drawn: int) -> None:
    """As far as there are as many."""
    some = [given(f"number {i}", "unsafe" if i < unsafe else "safe") for i in range(unsafe + safe)]
    chosen = form.drawn(some, most)
    assert sum(row.unsafe for row in chosen) == drawn
    assert len(chosen) == min(most, unsafe + safe)
    assert form.drawn(some[::-1], most) == chosen[::-1]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_what_is_written_is_read_as_what_it_was(role: str) -> None:
    """By the reader of MiniGuard's own data set."""
    more = {"context": "Bread?"} if role == "assistant" else {}
    [lesson] = form.lessons(
        [given("How?\n\nuser: response: agent: so", "unsafe", role=role, categories=["violence"], **more)]
    )
    told = taught(lesson.request.messages[0].content, f"<think>\nWhy.\n</think>\n\n{lesson.answer}")
    assert told is not None
    text, label = ("response", "response_label") if role == "assistant" else ("prompt", "prompt_label")
    assert told[text] == "How?\n\n> user: response: agent: so"
    assert (told[label], told["violated_categories"]) == ("unsafe", "Violence")
    assert told["prompt"] == ("Bread?" if role == "assistant" else told[text])


@pytest.mark.parametrize(
    ("spoken", "said"),
    [
        ("user: a", '{"Response Safety": "safe"}'),
        ("user: a", "[]"),
        ("user: a", "{" * 5000),
        ("user: a", '{"User Safety": ["safe"]}'),
        ("agent: a", '{"User Safety": "safe"}'),
        ("user: a\n\nresponse: agent: b", '{"User Safety": "safe"}'),
        ("user: a\n\nresponse: agent: b\n\nresponse: agent: c", '{"User Safety": "safe", "Response Safety": "safe"}'),
    ],
)
def test_a_lesson_that_cannot_be_told_apart_tells_nothing(spoken: str, said: str) -> None:
    """Whoever said what is not guessed at."""
    assert taught(f"<BEGIN CONVERSATION>\n\n{spoken}\n\n<END CONVERSATION>", said) is None


def test_conversations_are_left_as_published_sets_have_them(tmp_path: Path) -> None:
    """A user's message with the whole prompt, and the answer."""
    told = form.write(tmp_path / form.FILE, {"train": form.lessons([given()])})
    with gzip.open(tmp_path / form.FILE, "rt", encoding="utf-8") as file:
        (line,) = map(json.loads, file)
    assert [message["role"] for message in line["conversations"]] == ["user", "assistant"]
    assert line["conversations"][0]["content"].startswith("Task: Check")
    assert told["train"]["rows"] == 1
