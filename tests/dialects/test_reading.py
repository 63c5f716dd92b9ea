"""A verdict's probability is read where the verdict stands, and nothing that is no probability passes for one."""

from __future__ import annotations

from math import inf, log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import BackendError
from guardmw.dialects import Reply, Token
from guardmw.dialects._reading import SAFE_UNSAFE, YES_NO, fields, keyed, labels, only_word, plain, weigh


def one(text: str, logprob: float, **alternatives: float) -> Reply:
    """An answer of one token."""
    return Reply(text, (Token(text, logprob, alternatives),))


def test_without_logprobs_the_word_counts_alone() -> None:
    """As 1 or 0."""
    assert weigh("x", Reply("unsafe"), "unsafe", SAFE_UNSAFE) == (1.0, 1.0)
    assert weigh("x", Reply("safe"), "safe", SAFE_UNSAFE) == (0.0, 1.0)


@pytest.mark.parametrize(("word", "unsafe"), [("safe", 0.1), ("unsafe", 0.9)])
def test_with_one_logprob_the_rest_is_the_others(word: str, unsafe: float) -> None:
    """A server that tells no alternatives tells that much."""
    assert weigh("x", one(word, log(0.9)), word, SAFE_UNSAFE).unsafe == pytest.approx(unsafe)


@pytest.mark.parametrize(
    ("told", "unsafe"),
    [
        ({"safe": log(0.6), " safe": log(0.1)}, 0.3),
        ({"safe": log(0.5), "sure": log(0.2)}, 0.3 / 0.8),
        ({"safe": log(0.6), "un": log(0.2)}, 0.25),
    ],
)
def test_what_was_not_told_may_be_harm(told: dict[str, float], unsafe: float) -> None:
    """A server that tells few alternatives may leave out the one that matters; a told one needs no guess."""
    assert weigh("x", one("safe", told["safe"], **told), "safe", SAFE_UNSAFE).unsafe == pytest.approx(unsafe)


def test_a_letter_alone_may_be_harm_but_is_no_harmlessness() -> None:
    """Where "safe" is one token, "S" begins something else: a code of harm, as in S1."""
    told = {"safe": log(0.5), "S": log(0.3), "u": log(0.2)}
    reading = weigh("x", one("safe", log(0.5), **told), "safe", SAFE_UNSAFE)
    assert reading == (pytest.approx(0.2 / 0.7), pytest.approx(0.7))
    split = weigh("x", one("s", log(0.5), s=log(0.5), S=log(0.3), u=log(0.2)), "safe", SAFE_UNSAFE)
    assert split == (pytest.approx(0.2 / 0.7), pytest.approx(0.7))


def test_where_harm_was_said_a_letter_alone_may_be_the_other_word() -> None:
    """A tokenizer may split "safe" behind its first letter: the probability then moves evenly from one to the other."""
    for harm in (0.51, 0.6, 0.9):
        reading = weigh("x", one("un", log(harm), un=log(harm), s=log(1 - harm)), "unsafe", SAFE_UNSAFE)
        assert reading == (pytest.approx(harm), pytest.approx(1.0))


def test_what_is_covered_is_told() -> None:
    """A share of probability on other words is a sign of ill health, long before it is an error."""
    reading = weigh("x", one("safe", log(0.6), unsafe=log(0.2), sure=log(0.2)), "safe", SAFE_UNSAFE)
    assert (reading.unsafe, reading.covered) == (pytest.approx(0.25), pytest.approx(0.8))


def test_a_word_for_harm_is_never_improbable() -> None:
    """A server that samples may have chosen the less probable word."""
    assert weigh("x", one("unsafe", log(0.1), safe=log(0.9)), "unsafe", SAFE_UNSAFE).unsafe == 0.5
    assert weigh("x", one("safe", log(0.1), unsafe=log(0.9)), "safe", SAFE_UNSAFE).unsafe == pytest.approx(0.9)


@pytest.mark.parametrize("logprob", [nan, inf, 0.5, 1e9])
def test_what_is_no_logprob_is_an_error(logprob: float) -> None:
    """Whether of the verdict or of an alternative."""
    with pytest.raises(BackendError, match="logprobs"):
        weigh("x", one("safe", logprob), "safe", SAFE_UNSAFE)
    with pytest.raises(BackendError, match="logprobs"):
        weigh("x", one("safe", 0.0, other=logprob), "safe", SAFE_UNSAFE)


@pytest.mark.parametrize("logprob", [-inf, -9999.0])
def test_an_impossible_word_has_no_probability(logprob: float) -> None:
    """As vLLM tells it."""
    assert weigh("x", one("safe", 0.0, unsafe=logprob), "safe", SAFE_UNSAFE) == (0.0, 1.0)


def test_tokens_that_contradict_the_text_are_an_error() -> None:
    """One of the two is of another answer."""
    with pytest.raises(BackendError, match="something else"):
        weigh("x", one("unsafe", 0.0), "safe", SAFE_UNSAFE)


def test_the_verdict_is_found_by_what_stands_before_it() -> None:
    """The last time it does: thoughts come before."""
    told = [("Harm", 0), (":", 0), (" yes", 0), (".\n", 0), ("Harm", 0), (" :", 0), (" ", 0), ("no", log(0.7))]
    tokens = tuple(Token(text, logprob, {"no": log(0.7), "yes": log(0.3)}) for text, logprob in told)
    reading = weigh("x", Reply("", tokens), "no", YES_NO, after=r"harm\s*:")
    assert reading.unsafe == pytest.approx(0.3)
    assert weigh("x", Reply("", tokens[:3]), "no", YES_NO, after="absent:") == (0.0, 1.0)


def test_blank_tokens_and_signs_come_before_a_verdict() -> None:
    """Llama Guard's answers begin with two line breaks."""
    tokens = (Token("<|start|>", 0.0), Token("\n\n", 0.0), Token("safe", log(0.75), {"unsafe": log(0.25)}))
    assert weigh("x", Reply("", tokens), "safe", SAFE_UNSAFE).unsafe == pytest.approx(0.25)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["safe", "unsafe", "s", "uns", " Safe", "\n", "", "ſafe", "nothing"]) | st.text(max_size=4),
            st.floats() | st.floats(-20, 0),
            st.dictionaries(st.sampled_from(["safe", "unsafe", "un", "sa", "x"]) | st.text(max_size=3), st.floats()),
        ),
        max_size=5,
    ),
    st.sampled_from(["safe", "unsafe", "unknown"]),
)
def test_any_tokens_give_a_reading_or_an_error(made: list[tuple[str, float, dict[str, float]]], said: str) -> None:
    """And a word for harm never a low one."""
    reply = Reply("", tuple(Token(*token) for token in made))
    try:
        reading = weigh("x", reply, said, SAFE_UNSAFE)
    except BackendError:
        return
    assert 0.0 <= reading.unsafe <= 1.0
    assert 0.5 <= reading.covered <= 1.0
    assert said == "safe" or reading.unsafe >= 0.5


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (" safe <|eot_id|>", "safe"),
        ("<think>\nunsafe?\n</think>\n\nsafe", "safe"),
        ("it may be unsafe</think>safe", "safe"),
        ("yes</s>", "yes"),
    ],
)
def test_signs_and_thoughts_are_no_part_of_an_answer(text: str, left: str) -> None:
    """Servers leave them or not."""
    assert plain("x", Reply(text)) == left


@pytest.mark.parametrize(
    "reply", [Reply(""), Reply(" \n"), Reply("<think>safe"), Reply("<think></think>"), Reply("safe", cut=True)]
)
def test_an_answer_that_is_not_there_is_an_error(reply: Reply) -> None:
    """Empty, cut, or still thinking."""
    with pytest.raises(BackendError, match="cannot be read"):
        plain("x", reply)


def test_fields_are_lines() -> None:
    """In any order and case, each once."""
    text = '"Prompt harm: Harmful\nResponse harm : none"\nother: x'
    assert fields("x", text, ("Response harm", "Prompt harm", "More")) == {
        "Prompt harm": "harmful",
        "Response harm": "none",
    }
    with pytest.raises(BackendError, match="twice"):
        fields("x", "no Harm: yes\nHarm: no", ("Harm",))


@pytest.mark.parametrize("rest", ["unsafe", "Harm is controversial", "Harmful.", "Actually, yes"])
def test_a_verdict_beside_the_fields_is_an_error(rest: str) -> None:
    """Whether it comes before or after."""
    for text in (f"Harm: no\n{rest}", f"{rest}\nHarm: no"):
        with pytest.raises(BackendError, match="more than one verdict"):
            fields("x", text, ("Harm",))


def test_keys_of_an_object_are_one_in_any_case() -> None:
    """And one that comes again, in another case or deeper, leaves open which of the two counts."""
    assert keyed("x", '{"Label ": "safe", "other": [{"more": 1}]}', ("label",)) == {
        "label": "safe",
        "other": [{"more": 1}],
    }
    for twice in ('"LABEL": 1', '"label ": 1', '"l\\u0061bel": 1', '"x": {"label": 1}', '"x": [[{"Label": 1}]]'):
        with pytest.raises(BackendError, match="cannot be read"):
            keyed("x", f'{{"label": "safe", {twice}}}', ("label",))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Violence, Sexual (minor),Threat.", ["Violence", "Sexual (minor)", "Threat"]),
        ("S2, s1: Other name, S99, None, N/A", ["two", "Other name"]),
        ("", []),
        (" , ,", []),
    ],
)
def test_kinds_of_harm_come_as_names_or_codes(text: str, found: list[str]) -> None:
    """A name that comes with a code counts; a code that is not known does not."""
    assert labels(text, {"S1": "one", "S2": "two"}) == found


@pytest.mark.parametrize(("text", "word"), [(' "Yes".', "yes"), ("yes no", ""), ("", ""), ("...", ""), ("no-one", "")])
def test_one_word_is_one_word(text: str, word: str) -> None:
    """With signs around it or without."""
    assert only_word(text) == word
