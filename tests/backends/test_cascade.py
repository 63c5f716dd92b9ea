"""Only the doubtful go on, what the careful tier says stands, and a tier that fails is told of."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import (
    BackendError,
    BackendUnavailable,
    Cascade,
    Conversation,
    Coverage,
    Guard,
    Policy,
    PolicyError,
    Scores,
    Turn,
    load,
)
from guardmw.backends.resilient import Resilient
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardmw import Backend

    Classify = Callable[[Backend, Sequence[Conversation]], list[Scores]]

both = pytest.mark.parametrize(
    "classify",
    [lambda b, c: b.classify(c), lambda b, c: asyncio.run(b.aclassify(c))],
    ids=["sync", "async"],
)


def texts(*given: str) -> list[Conversation]:
    """User turns."""
    return [Conversation.of(text) for text in given]


test_contract = backend_contract(
    lambda: Cascade(KeywordBackend({"bread": 0.5, "x": 0.9}), KeywordBackend({"Bread": 0.9}, name="careful"))
)
test_contract_of_a_cascade_whose_second_tier_is_down = backend_contract(
    lambda: Cascade(KeywordBackend({"bread": 0.5, "x": 0.9}), ScriptedBackend([]))
)


@both
def test_escalates_only_the_doubtful(classify: Classify) -> None:
    """In one batch; both ends of the band are doubtful, and the answers come back to their places."""
    first, second = ScriptedBackend([0.1, 0.2, 0.5, 0.8, 0.9]), ScriptedBackend([0.01, 0.99, 0.02], name="careful")
    scores = classify(Cascade(first, second), texts(*"abcde"))
    assert [s.unsafe for s in scores] == [0.1, 0.01, 0.99, 0.02, 0.9]
    assert [s.backend for s in scores] == ["scripted", "careful", "careful", "careful", "scripted"]
    assert second.batches == [3]
    assert [c.trial for c in second.asked] == ["b", "c", "d"]
    assert not any(s.degraded for s in scores)


@both
def test_the_sure_cost_the_second_tier_nothing(classify: Classify) -> None:
    """It is not even asked about nobody."""
    second = ScriptedBackend([])
    assert [s.unsafe for s in classify(Cascade(KeywordBackend({}), second), texts("a", "b"))] == [0.01, 0.01]
    assert second.batches == []


@both
def test_a_third_tier_is_asked_what_the_second_doubts(classify: Classify) -> None:
    """As many tiers as there are."""
    tiers = ScriptedBackend([0.5, 0.5]), ScriptedBackend([0.6, 0.1]), ScriptedBackend([0.7])
    cascade = Cascade(*tiers)
    assert [s.unsafe for s in classify(cascade, texts("a", "b"))] == [0.7, 0.1]
    assert cascade.name == "scripted>scripted>scripted"


@pytest.mark.parametrize(
    ("scores", "asked"),
    [
        (Scores(0.01, injection=0.5), True),
        (Scores(0.01, injection=0.1), False),
        (Scores(0.01, {"hate": 0.4}), True),
        (Scores(0.01, {"hate": 0.6}), False),
        (Scores(0.01, {"violence": 0.4}), False),
        (Scores(0.15), True),
    ],
)
def test_each_score_may_have_a_band(scores: Scores, asked: bool) -> None:
    """Injection has the default one unless it is named; a category has none."""
    second = ScriptedBackend([0.0])
    Cascade(ScriptedBackend([scores]), second, band={"hate": (0.3, 0.5), "unsafe": (0.1, 0.2)}).classify(texts("a"))
    assert bool(second.asked) == asked


def test_each_stage_may_have_a_band() -> None:
    """On top of the one for all stages."""
    second = ScriptedBackend([0.0] * 9)
    cascade = Cascade(
        ScriptedBackend([0.3] * 9), second, band=(0.4, 0.6), stages={"output": (0.2, 0.4), "document": {"hate": (0, 1)}}
    )
    cascade.classify([Conversation.of(Turn(role, "a")) for role in ("user", "assistant", "document")])
    assert [c.stage for c in second.asked] == ["output"]


@pytest.mark.parametrize("coverage", [Coverage(10, 9), Coverage(10, 10, unreadable=1)])
@pytest.mark.parametrize("unsafe", [0.0, 1.0])
def test_what_the_first_tier_read_in_part_is_never_sure(coverage: Coverage, unsafe: float) -> None:
    """However sure the score of the part."""
    second = ScriptedBackend([0.4])
    (scores,) = Cascade(ScriptedBackend([Scores(unsafe, coverage=coverage)]), second).classify(texts("a" * 10))
    assert (scores.unsafe, scores.coverage) == (0.4, None)


def test_what_the_second_tier_leaves_out_is_told() -> None:
    """The doubt of the rest is not dispelled."""
    part = Scores(0.01, coverage=Coverage(10, 5))
    verdict = Guard(Cascade(ScriptedBackend([0.5]), ScriptedBackend([part]))).screen("a" * 10)
    assert (verdict.action, verdict.degraded, verdict.coverage.judged) == ("block", True, 5)


def test_what_a_tier_has_no_opinion_on_stands_as_before() -> None:
    """A model without an injection score says 0, and one may name kinds of harm only where it sees one."""
    before = Scores(0.5, {"hate": 0.7}, injection=0.7, backend="first")
    silent, spoken = Scores(0.1, backend="second"), Scores(0.1, {"hate": 0.2}, injection=0.01, backend="second")
    cascade = Cascade(ScriptedBackend([before, before]), ScriptedBackend([silent, spoken]))
    first, second = cascade.classify(texts("a", "b"))
    assert first == Scores(0.5, {"hate": 0.7}, injection=0.7, backend="second")
    assert second is spoken


def test_a_sure_attack_is_not_put_to_a_tier_that_knows_none() -> None:
    """Of harm and of attacks alike, what is above a band is final."""
    sure = [Scores(0.5, injection=0.97), Scores(0.95, injection=0.4)]
    second = ScriptedBackend([])
    guard = Guard(Cascade(ScriptedBackend(sure), second))
    assert [verdict.action for verdict in guard.screen_many(["a", "b"])] == ["block", "block"]
    assert second.asked == []


def test_who_knows_no_attacks_clears_none() -> None:
    """The first tier found it harmful, and perhaps an attack; the second looked for harm alone."""
    cascade = Cascade(ScriptedBackend([Scores(0.79, injection=0.4)]), ScriptedBackend([Scores(0.05, {"hate": 0.01})]))
    assert Guard(cascade).screen("a").blocked


def test_a_kind_of_harm_that_only_the_first_tier_names_stands() -> None:
    """Each kind is judged by the last tier that knows it."""
    first = ScriptedBackend([Scores(0.5, {"violence": 0.95, "hate": 0.6})])
    (scores,) = Cascade(first, ScriptedBackend([Scores(0.05, {"hate": 0.01})])).classify(texts("a"))
    assert scores.categories == {"violence": 0.95, "hate": 0.01}


def test_what_stands_of_a_tier_stands_with_what_was_wrong_with_it() -> None:
    """An injection score of part of the text is none of all of it."""
    part = Scores(0.5, injection=0.01, coverage=Coverage(10, 1))
    verdict = Guard(Cascade(ScriptedBackend([part]), ScriptedBackend([0.01]))).screen("a" * 10)
    assert (verdict.action, verdict.degraded) == ("block", True)


def test_a_policy_that_names_one_band_leaves_the_others() -> None:
    """They were set for a reason."""
    cascade = Cascade(ScriptedBackend([0.1]), ScriptedBackend([0.9]), band=(0.05, 0.95))
    policy = Policy(stages={"output": {"band": (0.4, 0.6)}})
    assert Guard(cascade, policy=policy).screen("a").blocked


@both
def test_a_first_tier_that_fails_leaves_all_to_the_second(classify: Classify) -> None:
    """Which is the more careful one: nothing is degraded."""
    second = ScriptedBackend([0.1, 0.9])
    scores = classify(Cascade(ScriptedBackend([KeyError()]), second), texts("a", "b"))
    assert [(s.unsafe, s.degraded) for s in scores] == [(0.1, ""), (0.9, "")]


class Watchful(ScriptedBackend):
    """One that advises on injections, and so looks for them."""

    thresholds: ClassVar = {"injection": 0.5}


@both
def test_a_first_tier_that_alone_looks_for_attacks_is_missed(classify: Classify) -> None:
    """The second looked for harm: that nobody looked for attacks is told, and the policy decides."""
    scores = classify(Cascade(Watchful([KeyError()]), ScriptedBackend([0.1, 0.9])), texts("a", "b"))
    why = "injections were not judged: scripted: KeyError"
    assert [(s.unsafe, s.degraded) for s in scores] == [(0.1, why), (0.9, why)]
    for on_degraded, action in (("block", "block"), ("allow", "allow")):
        down = Cascade(Watchful([KeyError()]), ScriptedBackend([0.1]))
        verdict = Guard(down, policy=Policy(on_degraded=on_degraded)).screen("a")  # type: ignore[arg-type]
        assert (verdict.action, verdict.degraded, verdict.reason) == (action, True, why)


@both
def test_a_first_tier_is_not_missed_by_who_looks_for_attacks(classify: Classify) -> None:
    """A score of 0 is an opinion where the tier is known to have some: by its advice, or by what it said."""
    assert not classify(Cascade(Watchful([KeyError()]), Watchful([0.1])), texts("a"))[0].degraded
    assert not classify(Cascade(Watchful([KeyError()]), ScriptedBackend([Scores(0.1, {}, 0.1)])), texts("a"))[
        0
    ].degraded


def test_a_tier_that_scored_an_attack_once_is_missed_without() -> None:
    """Not every model has advice to give."""
    cascade = Cascade(ScriptedBackend([Scores(0.5, {}, 0.1), KeyError()]), ScriptedBackend([0.1, 0.1]))
    assert [s.degraded for s in (cascade.classify(texts(text))[0] for text in "ab")] == [
        "",
        "injections were not judged: scripted: KeyError",
    ]


@both
def test_where_attacks_were_not_judged_the_next_tier_is_asked(classify: Classify) -> None:
    """However sure the one between is of harm."""
    last = Watchful([Scores(0.1, {}, 0.9)])
    scores = classify(Cascade(Watchful([KeyError()]), ScriptedBackend([0.01]), last), texts("a"))
    assert [(s.injection, s.degraded) for s in scores] == [(0.9, "")]


@both
def test_what_was_judged_of_attacks_before_a_failure_stands(classify: Classify) -> None:
    """Of the doubtful ones, whom the failed tier was to ask about harm."""
    tiers = (Watchful([Scores(0.5, {}, 0.1)]), Watchful([KeyError()]), ScriptedBackend([0.1]))
    assert [(s.injection, s.degraded) for s in classify(Cascade(*tiers), texts("a"))] == [(0.1, "")]


@both
def test_a_last_tier_that_fails_is_told_of_where_it_was_needed(classify: Classify) -> None:
    """The sure ones do not suffer."""
    down = ScriptedBackend([BackendUnavailable("careful: no answer in 2 s")])
    scores = classify(Cascade(ScriptedBackend([0.1, 0.5, 0.9]), down), texts("a", "b", "c"))
    assert [(s.unsafe, s.degraded) for s in scores] == [(0.1, ""), (0.5, "careful: no answer in 2 s"), (0.9, "")]


@both
def test_a_tier_between_that_fails_is_skipped(classify: Classify) -> None:
    """The last one has the last word."""
    scores = classify(Cascade(ScriptedBackend([0.5]), ScriptedBackend([]), ScriptedBackend([0.9])), texts("a"))
    assert [(s.unsafe, s.degraded) for s in scores] == [(0.9, "")]


@both
def test_where_every_tier_fails_so_does_the_cascade(classify: Classify) -> None:
    """With the failure of the last; the policy's on_error decides."""
    with pytest.raises(BackendError, match="last: the script is used up"):
        classify(Cascade(ScriptedBackend([]), ScriptedBackend([], name="last")), texts("a"))


@pytest.mark.parametrize(
    ("policy", "unsafe", "action"),
    [
        ({}, 0.3, "block"),
        ({"on_degraded": "review"}, 0.3, "review"),
        ({"on_degraded": "review"}, 0.6, "block"),
        ({"on_degraded": "allow"}, 0.3, "allow"),
        ({"on_degraded": "allow"}, 0.6, "block"),
        ({"on_degraded": "degrade"}, 0.24, "allow"),
        ({"on_degraded": "degrade"}, 0.25, "block"),
        ({"on_degraded": "degrade", "degraded_limits": 0.8}, 0.39, "allow"),
        ({"on_degraded": "degrade", "degraded_limits": 0.8}, 0.41, "block"),
        ({"on_degraded": "allow", "stages": {"input": {"on_degraded": "block"}}}, 0.3, "block"),
        ({"on_degraded": "degrade", "threshold": {"flag": 0.5, "block": 0.9}}, 0.3, "flag"),
    ],
)
def test_what_is_done_without_the_second_tier_is_policy(policy: dict[str, Any], unsafe: float, action: str) -> None:
    """And whatever it is, the verdict is degraded and says why."""
    guard = Guard(Cascade(ScriptedBackend([unsafe]), ScriptedBackend([])), policy=Policy.model_validate(policy))
    verdict = guard.screen("a")
    assert (verdict.action, verdict.degraded) == (action, True)
    assert verdict.reason == "scripted: the script is used up"


def test_stricter_limits_hold_for_every_score() -> None:
    """Injection and categories too."""
    policy = Policy(on_degraded="degrade", categories={"hate": {"review": 0.8}}, injection=0.9)
    rules = policy.at("input")
    verdict = rules.decide(Scores(0.1, {"hate": 0.4}, 0.45, degraded="down"), Coverage(1, 1), 0)
    assert [(v.rule, v.threshold, v.action) for v in verdict.violations] == [
        ("injection", 0.45, "block"),
        ("hate", 0.4, "review"),
    ]
    assert rules.decide(Scores(0.1, {"hate": 0.4}, 0.45), Coverage(1, 1), 0).violations == ()


def test_two_reasons_are_both_told() -> None:
    """Nobody careful answered, and part was not read."""
    scores = Scores(0.1, degraded="down")
    verdict = Policy(on_degraded="allow", on_partial="review").decide("input", scores, Coverage(10, 5))
    assert (verdict.action, verdict.reason) == ("review", "down; 5 of 10 characters were judged")


def test_a_policys_band_replaces_the_cascades() -> None:
    """It is where `guardmw calibrate` writes it."""
    policy = Policy.model_validate({"band": [0.4, 0.6], "stages": {"output": {"band": {"unsafe": [0.1, 0.9]}}}})
    second = ScriptedBackend([0.0] * 9)
    guard = Guard(Cascade(ScriptedBackend([0.3, 0.3]), second), policy=policy)
    guard.screen_many([Turn("user", "a"), Turn("assistant", "b")])
    assert [c.trial for c in second.asked] == ["b"]


def test_a_band_is_kept_by_a_file(tmp_path: Any) -> None:
    """As the same settings."""
    policy = Policy(band=(0.25, 0.75), stages={"output": {"band": {"hate": (0.1, 0.2)}}})  # type: ignore[dict-item]
    policy.dump(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy


def test_a_band_without_a_cascade_is_an_error() -> None:
    """Or somebody would believe in a second opinion that nobody gives."""
    with pytest.raises(PolicyError, match=r"keyword is no cascade: Guard\(…, escalate=…\)"):
        Guard(KeywordBackend({}), policy=Policy(band=(0.2, 0.8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"band": [0.8, 0.2]}, "band: a band goes from its lower to its higher score, not from 0.8 to 0.2"),
        ({"band": [0.2, 1.8]}, r"band\.1 is 1\.8; it lies in 0 to 1"),
        ({"band": {"violense": [0.2, 0.8]}}, "band.violense: unknown 'violense': did you mean 'violence'"),
        ({"on_degraded": "blok"}, "on_degraded: unknown 'blok': did you mean 'block'"),
    ],
)
def test_a_wrong_band_is_named(settings: dict[str, Any], message: str) -> None:
    """With what a right one is like."""
    with pytest.raises(PolicyError, match=message):
        Policy.model_validate(settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"band": (0.8, 0.2)}, "a band is two scores from 0 to 1"),
        ({"band": (0.2,)}, "a band is two scores from 0 to 1"),
        ({"band": {"insafe": (0.2, 0.8)}}, "no band for 'insafe': did you mean 'unsafe'"),
        ({"stages": {"inptu": (0.2, 0.8)}}, "unknown stage 'inptu': did you mean 'input'"),
    ],
)
def test_a_cascade_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    """And what would be right."""
    with pytest.raises(BackendError, match=message):
        Cascade(KeywordBackend({}), KeywordBackend({}), **options)


def test_a_cascade_is_made_of_backends() -> None:
    """At least two of them."""
    with pytest.raises(BackendError, match="two tiers"):
        Cascade(KeywordBackend({}))
    with pytest.raises(BackendError, match="str is no backend"):
        Cascade(KeywordBackend({}), "embedded")  # type: ignore[arg-type]


def test_a_spec_names_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as for load, the cheapest first."""
    from guardmw.backends import cascade

    monkeypatch.setattr(cascade, "load", lambda spec: KeywordBackend({}, name=spec))
    made = cascade.from_spec("embedded, vllm:http://host:8000/v1#owner/name")
    assert made.name == "embedded>vllm:http://host:8000/v1#owner/name"
    with pytest.raises(BackendError, match="two specs or more"):
        cascade.from_spec("embedded")
    assert load.__name__ == "load"


def test_a_guard_escalates_to_a_backend() -> None:
    """Or to a spec, or to the URL of a server, which gets a circuit breaker."""
    guard = Guard(KeywordBackend({"x": 0.5}), escalate=KeywordBackend({"x": 0.9}, name="careful"))
    assert guard.backend.name == "keyword>careful"
    assert guard.screen("x").blocked


def test_a_guard_escalates_to_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load("vllm:URL")` makes, behind a circuit breaker."""
    from guardmw import guard as module

    asked = []

    def fake(spec: str) -> KeywordBackend:
        asked.append(spec)
        return KeywordBackend({}, name=spec)

    monkeypatch.setattr(module, "load", fake)
    backend = Guard("embedded", escalate="http://host:8000/v1").backend
    assert isinstance(backend, Cascade)
    assert asked == ["embedded", "vllm:http://host:8000/v1"]
    assert isinstance(backend.tiers[1], Resilient)
    assert isinstance(Guard("embedded", escalate="onnx:folder").backend, Cascade)


def said(answer: float | Scores | Exception, by: str) -> float | Scores | Exception:
    """With the name of who said it."""
    return replace(answer, backend=by) if isinstance(answer, Scores) else answer


SCORE = st.floats(0, 1)
ANSWER = st.one_of(SCORE, st.builds(Scores, SCORE, injection=SCORE), st.just(BackendError("down")))


@given(st.lists(st.lists(ANSWER, min_size=3, max_size=3), min_size=2, max_size=4), st.integers(1, 3))
def test_nothing_is_allowed_on_doubt(script: list[list[float | Scores | Exception]], count: int) -> None:
    """Whatever tiers say or fail to: what goes through was sure, or the last tier's to say; sync and async alike."""

    def verdicts(screen: Callable[[Guard], Any]) -> list[Any]:
        tiers = [
            ScriptedBackend((said(one, str(at)) for one in given), name=str(at)) for at, given in enumerate(script)
        ]
        return [(v.action, v.reason, v.scores) for v in screen(Guard(Cascade(*tiers)))]

    given = ["a", "b", "c"][:count]
    judged = verdicts(lambda guard: guard.screen_many(given))
    assert judged == verdicts(lambda guard: asyncio.run(guard.ascreen_many(given)))
    for action, reason, scores in judged:
        if action == "block":
            continue
        assert not reason
        sure = scores.unsafe < 0.2 and not 0.2 <= scores.injection <= 0.8
        assert sure or scores.backend == str(len(script) - 1)
