"""MiniGuard and the Nemotron guards: the prompt as published, the verdict's probability, every form of an answer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import BackendError
from guardmw.dialects import Reply, named
from guardmw.dialects.nemotron import CATEGORIES, Nemotron, answer
from guardmw.taxonomy import IN_NEMOTRON, categories_of

if TYPE_CHECKING:
    from collections.abc import Callable

EXCHANGE = [{"role": "user", "content": "<<USER>>"}, {"role": "assistant", "content": "<<RESPONSE>>"}]
ANSWER = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
FULL = Nemotron(one_token=False)

# From the published forms: a changed byte changes what a model was trained on.
DIGESTS = [
    ("nemotron", EXCHANGE[:1], "ff68aa2a4fc58368"),
    ("nemotron", EXCHANGE, "b5a3ebb5cb14e34a"),
    ("nemoguard", EXCHANGE[:1], "7b3fef9804b76d42"),
    ("nemoguard", EXCHANGE, "fde4e72bbd7f0aaf"),
]


@pytest.mark.parametrize(("name", "given", "digest"), DIGESTS)
def test_a_prompt_is_the_published_one(name: str, given: Any, digest: str, asked: Callable[..., Any]) -> None:
    """To the byte, trailing spaces included."""
    (request,) = asked(named(name), given)
    (message,) = request.messages
    assert message.role == "user"
    assert hashlib.sha256(message.content.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("name", "given", "file"),
    [
        ("nemotron", EXCHANGE[:1], "nemotron_safety_guard_8b_v3__rendered_prompt_only.txt"),
        ("nemotron", EXCHANGE, "nemotron_safety_guard_8b_v3__rendered_prompt_response.txt"),
        ("nemoguard", EXCHANGE[:1], "nemo_guardrails__content_safety_check_input.jinja.txt"),
        ("nemoguard", EXCHANGE, "nemo_guardrails__content_safety_check_output.jinja.txt"),
    ],
)
def test_a_prompt_is_the_published_file(
    name: str, given: Any, file: str, asked: Callable[..., Any], published: Callable[[str], str]
) -> None:
    """Where that is at hand."""
    form = published(file).replace("{{ user_input }}", "<<USER>>").replace("{{ bot_response }}", "<<RESPONSE>>")
    assert asked(named(name), given)[0].messages[0].content == form


def test_turns_alternate_in_the_conversation(asked: Callable[..., Any]) -> None:
    """Tool calls are the assistant's, and what tools return is read as the user's words are."""
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "args": {"city": "Oslo"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    prompt = asked(Nemotron(), given)[0].messages[0].content
    shown = prompt.partition("<BEGIN CONVERSATION>\n\n")[2].partition("\n\n<END CONVERSATION>")[0]
    assert shown == (
        'user: Weather?\n\nresponse: agent: weather {"city": "Oslo"}\n\nuser: rain\n\nresponse: agent: It rains.'
    )


def test_the_score_is_asked_for_in_one_token(asked: Callable[..., Any]) -> None:
    """After the quote that the verdict stands in."""
    (request,) = asked(Nemotron(), "Hello")
    assert (request.prefill, request.max_tokens, request.top_logprobs) == ('{"User Safety": "', 1, 20)


def test_an_answer_is_asked_about_in_full(asked: Callable[..., Any]) -> None:
    """A guessed verdict on the user would sway that on the answer."""
    (request,) = asked(Nemotron(), ANSWER)
    assert (request.prefill, request.max_tokens) == ("", 100)


def test_a_safe_score_needs_no_second_question(scored: Callable[..., Any], replied: Callable[..., Any]) -> None:
    """The kinds of harm are all at nothing then."""
    scores = scored(Nemotron(), "Hello", replied({"safe": 0.9, "unsafe": 0.1}, cut=True))
    assert scores.unsafe == pytest.approx(0.1)
    assert set(scores.categories.values()) == {0.0}


def test_an_unsafe_score_is_followed_by_the_kinds_of_harm(
    scored: Callable[..., Any], replied: Callable[..., Any]
) -> None:
    """Each as probable as the verdict."""
    scores = scored(
        Nemotron(), "Hello", replied({"unsafe": 0.6, "safe": 0.2}, cut=True), ' "Safety Categories": "Violence,Threat"}'
    )
    assert scores.unsafe == pytest.approx(0.75)
    assert {name for name, score in scores.categories.items() if score} == {"violence"}
    assert scores.categories["violence"] == scores.unsafe


@pytest.mark.parametrize(
    "second", ["", "Violence", "\ufffd{{{", ' "Response Safety": "safe"}', ' "Safety Categories": ""}']
)
def test_an_unsafe_verdict_outlives_unreadable_kinds(
    second: str, scored: Callable[..., Any], replied: Callable[..., Any]
) -> None:
    """What kind it is matters less than that it is."""
    scores = scored(Nemotron(), "Hello", replied({"unsafe": 0.9, "safe": 0.1}, cut=True), second)
    assert scores.unsafe == pytest.approx(0.9)
    assert set(scores.categories.values()) == {0.0}


@pytest.mark.parametrize(
    ("reply", "unsafe"), [("safe", 0.0), ('safe"', 0.0), (" unsafe", 1.0), ("UNSAFE", 1.0), ("uns", 1.0), ("un", 1.0)]
)
def test_a_bare_word_is_a_label(reply: str, unsafe: float, scored: Callable[..., Any]) -> None:
    """Where a server tells no logprobs."""
    assert scored(Nemotron(), "Hello", Reply(reply, cut=True), *([""] if unsafe else [])).unsafe == unsafe


@pytest.mark.parametrize("reply", ["", '{"', "not", "safe unsafe", "safely", "maybe", '"'])
def test_what_is_no_word_is_no_verdict(reply: str, scored: Callable[..., Any]) -> None:
    """Nor is a word that only begins as one."""
    with pytest.raises(BackendError):
        scored(Nemotron(), "Hello", Reply(reply, cut=True))


@pytest.mark.parametrize("pieces", [("s", "a", "f", "e", '",'), ("Saf", 'e"'), ("sa", "fe")])
def test_a_split_word_is_told_by_its_first_piece(
    pieces: tuple[str, ...], scored: Callable[..., Any], replied: Callable[..., Any]
) -> None:
    """Tokenizers differ; the rest of the word is asked for."""
    first, *rest = pieces
    shares = {first: 0.75, "uns": 0.25}
    for cut in (replied(shares, cut=True), Reply(first, cut=True)):
        scores = scored(Nemotron(), "Hello", cut, replied(shares, *rest, cut=True))
        assert scores.unsafe == pytest.approx(0.25)
        assert set(scores.categories.values()) == {0.0}
    assert scored(Nemotron(), "Hello", Reply(first, cut=True), Reply("".join(pieces), cut=True)).unsafe == 0.0


@pytest.mark.parametrize(
    "whole", ["S", "S1", 'S1", "Response Safety": "', "Severe", "safely", "safe or unsafe", 'Sa"fe', "", "sa fe"]
)
def test_what_only_begins_as_safe_is_no_verdict(
    whole: str, scored: Callable[..., Any], replied: Callable[..., Any]
) -> None:
    """An untuned model names a code of harm there, S1."""
    for first in (replied({"S": 0.9, "unsafe": 0.1}, cut=True), Reply("S", cut=True)):
        for reply in (replied({"S": 0.9, "unsafe": 0.1}, whole[1:], cut=True), Reply(whole, cut=True)):
            with pytest.raises(BackendError):
                scored(Nemotron(), "Hello", first, reply)


def test_spellings_of_a_word_are_one(scored: Callable[..., Any], replied: Callable[..., Any]) -> None:
    """Their probabilities add up; that of other words is left out."""
    shares = {"safe": 0.3, "Safe": 0.2, " safe": 0.1, "unsafe": 0.15, "UNSAFE": 0.05, "sure": 0.2}
    scores = scored(Nemotron(), "Hello", replied(shares, cut=True))
    assert scores.unsafe == pytest.approx(0.25)


def test_a_model_that_would_say_something_else_is_refused(
    scored: Callable[..., Any], replied: Callable[..., Any]
) -> None:
    """It was asked wrongly, or is no guard: a random model must not pass for one."""
    with pytest.raises(BackendError, match="only 5% of the probability"):
        scored(Nemotron(), "Hello", replied({"safe": 0.04, "unsafe": 0.01, "the": 0.3}, cut=True))


def test_the_verdict_on_an_answer_is_its_own(scored: Callable[..., Any], replied: Callable[..., Any]) -> None:
    """Found by its name among the tokens, wherever it stands; never that on the user."""
    head = [
        '{"',
        "User",
        " Safety",
        '":',
        ' "',
        {"unsafe": 0.99, "safe": 0.01},
        '",',
        ' "',
        "Response",
        " Safety",
        '":',
    ]
    tail = ['",', ' "', "Safety", " Categories", '":', ' "', "Violence", '"}']
    safe = scored(Nemotron(), ANSWER, replied(*head, ' "', {"safe": 0.8, "unsafe": 0.2}, *tail))
    assert safe.unsafe == pytest.approx(0.2)
    assert set(safe.categories.values()) == {0.0}
    joined = scored(Nemotron(), ANSWER, replied(*head, {' "unsafe': 0.7, ' "safe': 0.3}, *tail))
    assert joined.unsafe == pytest.approx(0.7)
    assert joined.categories["violence"] == joined.unsafe


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (
            '{"User Safety": "unsafe", "Safety Categories": "Violence, Criminal Planning/Confessions"}',
            "violence illegal_activity",
        ),
        ('{"User Safety":"unsafe","Safety Categories":"Violence,Profanity"} ', "violence"),
        ('{"User Safety": "unsafe ", "Safety Categories": "Suicide and Self Harm "}\n', "self_harm"),
        (
            '{"User Safety": "unsafe", "Safety Categories": "guns and illegal weapons"}',
            "dangerous_info illegal_activity",
        ),
        ('{"User Safety": "unsafe", "Safety Categories": "S1, S8, S10"}', "violence hate harassment"),
        ('{"User Safety": "unsafe", "Safety Categories": "S17: Malware"}', "dangerous_info illegal_activity"),
        (
            '{"User Safety": "unsafe", "Safety Categories": ["Violence", "Sexual (minor)"]}',
            "violence sexual illegal_activity",
        ),
        ('```json\n{"User Safety": "unsafe", "Safety Categories": "Violence"}\n```', "violence"),
        ('{"User Safety": unsafe, "Safety Categories": Violence}<|im_end|>', "violence"),
        ('{"User Safety": "Unsafe", "Safety Categories": "A Novel Harm"}', ""),
        ('<think>\n\n</think>\n\n{"User Safety": "unsafe"}', ""),
    ],
)
def test_answers_seen_in_the_wild_are_read(answer: str, kinds: str, scored: Callable[..., Any]) -> None:
    """Kinds of harm by name, code, or both."""
    scores = scored(FULL, "Hello", answer)
    assert scores.unsafe == 1.0
    assert {name for name, score in scores.categories.items() if score} == set(kinds.split())


@pytest.mark.parametrize("answer", ['{"User Safety": "safe"} ', '{"User Safety": "safe", "Response Safety": "unsafe"}'])
def test_a_safe_user_is_safe(answer: str, scored: Callable[..., Any]) -> None:
    """Whatever is said of an answer that is not on trial."""
    assert scored(FULL, "Hello", answer).unsafe == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "safe",
        "{}",
        '{"User Safety": "safe"',
        '{"User Safety": "safe or unsafe"}',
        '{"User Safety": "safe", "User Safety": "unsafe"}',
        '{"User Safety": "safe", "user safety": "safe"}',
        '{"User Safety": "safe"}{"User Safety": "unsafe"}',
        '{"User Safety": "safe"} In fact it is unsafe.',
        '{"User Safety": "unknown"}',
        '{"User Safety": ""}',
        '{"User Safety": true}',
        '{"Response Safety": "safe"}',
        '{"User Safety": "safe", "Response Safety": "maybe"}',
        '{"Safety Categories": "Violence"}',
        "I cannot help with that.",
        '<think>{"User Safety": "safe"}',
        '{"User Safety": "safe", "Safety Categories": "Violence"}',
        r'{"User Safety": "safe", "User\u0020Safety": "uns\u0061fe"}',
        'This is harmful. {"User Safety": "safe"}',
    ],
)
def test_what_is_not_one_whole_verdict_is_an_error(answer: str, scored: Callable[..., Any]) -> None:
    """It never passes for a safe one, and the message does not quote it."""
    with pytest.raises(BackendError) as caught:
        scored(FULL, "Hello", answer)
    assert "In fact" not in str(caught.value)


def test_an_answer_without_a_verdict_on_itself_is_an_error(scored: Callable[..., Any]) -> None:
    """That on the user does not stand in for it."""
    with pytest.raises(BackendError, match="Response Safety"):
        scored(Nemotron(), ANSWER, '{"User Safety": "safe"}')


def test_a_cut_answer_counts_only_if_it_is_whole(scored: Callable[..., Any]) -> None:
    """The limit may be reached with the last brace."""
    assert scored(FULL, "Hello", Reply('{"User Safety": "unsafe"}', cut=True)).unsafe == 1.0
    with pytest.raises(BackendError, match="cut"):
        scored(FULL, "Hello", Reply('{"User Safety": "safe", "Response', cut=True))


def test_a_thought_cut_at_a_brace_is_no_answer(scored: Callable[..., Any]) -> None:
    """Whatever verdict it weighs."""
    with pytest.raises(BackendError, match="thought"):
        scored(FULL, "Hello", Reply('<think>Perhaps {"User Safety": "safe"}', cut=True))


def test_every_category_of_the_prompt_is_mapped() -> None:
    """To one of ours, or knowingly to none."""
    assert len(CATEGORIES) == 23
    assert [name for name in CATEGORIES if categories_of(name) is None] == []


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("given", [EXCHANGE[:1], EXCHANGE])
def test_what_a_model_is_taught_to_say_is_read_as_it_was_meant(
    given: Any, unsafe: bool, scored: Callable[..., Any]
) -> None:
    """The kinds of harm too."""
    verdicts = {"user": unsafe} if len(given) == 1 else {"user": not unsafe, "assistant": unsafe}
    found = scored(FULL, given, answer(verdicts, ["Harassment", "Violence"] if unsafe else []))  # type: ignore[arg-type]
    assert found.unsafe == unsafe
    assert {name for name, score in found.categories.items() if score} == (
        {"violence", "harassment"} if unsafe else set()
    )


def test_an_answer_has_the_published_form() -> None:
    """As the card shows it."""
    assert answer({"user": False}) == '{"User Safety": "safe"}'
    assert answer({"assistant": False, "user": True}, ["Criminal Planning/Confessions", "Violence"]) == (
        '{"User Safety": "unsafe", "Response Safety": "safe", '
        '"Safety Categories": "Violence, Criminal Planning/Confessions"}'
    )


def test_each_of_our_categories_has_a_name_that_means_it() -> None:
    """Among those that the prompt lists."""
    for category, name in IN_NEMOTRON.items():
        assert name in CATEGORIES
        assert category in (categories_of(name) or ())
