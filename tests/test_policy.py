"""Scores in, verdict out: thresholds, what reaching them means, what failure means, and files that hold them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guardmw import Coverage, Policy, PolicyError, Scores
from guardmw.conversation import STAGES, Stage
from guardmw.policy import StagePolicy
from guardmw.taxonomy import CATEGORIES
from guardmw.verdict import ACTIONS, SEVERITY, Action

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = Coverage(10, 10)
SCORE = st.floats(0, 1)
LIMIT = SCORE | st.dictionaries(st.sampled_from(ACTIONS), SCORE, max_size=3)
ACTION = st.sampled_from(ACTIONS)
STAGE_POLICY = st.fixed_dictionaries(
    {},
    optional={
        "threshold": LIMIT,
        "categories": st.dictionaries(st.sampled_from(CATEGORIES), LIMIT, max_size=2),
        "injection": LIMIT,
        "on_error": ACTION,
        "on_partial": ACTION,
    },
)
SETTINGS = st.builds(
    lambda common, own: common | own,
    STAGE_POLICY,
    st.fixed_dictionaries(
        {},
        optional={
            "stages": st.dictionaries(st.sampled_from(STAGES), STAGE_POLICY, max_size=2),
            "max_characters": st.integers(1, 10**9),
            "max_unreadable": SCORE,
        },
    ),
)
POLICIES = SETTINGS.map(Policy.model_validate)
SCORES = st.builds(Scores, SCORE, st.dictionaries(st.sampled_from((*CATEGORIES, "spam")), SCORE, max_size=3), SCORE)


def decided(policy: Policy, scores: Scores | None, stage: Stage = "input", coverage: Coverage = WHOLE) -> Action:
    """The action alone."""
    return policy.decide(stage, scores, coverage).action


@pytest.mark.parametrize(("unsafe", "action"), [(0.49, "allow"), (0.5, "block"), (0.51, "block")])
def test_a_threshold_is_reached_at_its_own_value(unsafe: float, action: Action) -> None:
    """Acting at >=, as the papers count it."""
    assert decided(Policy(threshold=0.5), Scores(unsafe)) == action


@pytest.mark.parametrize(
    ("unsafe", "action"),
    [(0.1, "allow"), (0.3, "flag"), (0.5, "flag"), (0.6, "review"), (0.9, "block"), (1.0, "block")],
)
def test_steps_act_more_strictly_the_higher_the_score(unsafe: float, action: Action) -> None:
    """Flag, review, block, in whatever order they were written."""
    assert decided(Policy(threshold={"review": 0.6, "flag": 0.3, "block": 0.9}), Scores(unsafe)) == action


def test_an_injection_is_a_violation_of_its_own() -> None:
    """Harmless words may carry an attack."""
    verdict = Policy(threshold=0.5, injection=0.8).decide("tool_result", Scores(0.1, injection=0.9), WHOLE)
    assert verdict.blocked
    assert [(v.rule, v.threshold) for v in verdict.violations] == [("injection", 0.8)]


def test_a_category_can_have_a_limit_of_its_own() -> None:
    """Below the threshold for everything, above the one for this."""
    policy = Policy(threshold=0.9, categories={"self_harm": {"review": 0.3}})
    assert decided(policy, Scores(0.5, {"self_harm": 0.4})) == "review"
    assert decided(policy, Scores(0.5, {"hate": 0.4})) == "allow"


def test_a_category_without_a_limit_is_named_where_the_text_is_unsafe() -> None:
    """By itself it decides nothing; beside an unsafe score it says which kind."""
    policy = Policy(threshold=0.5)
    assert policy.decide("input", Scores(0.9, {"hate": 0.8, "sexual": 0.1}), WHOLE).categories == ("hate",)
    assert decided(policy, Scores(0.1, {"hate": 0.8})) == "allow"


def test_a_stage_has_its_own_limits_and_the_rest_from_the_policy() -> None:
    """What a stage leaves out is as everywhere."""
    policy = Policy(threshold=0.5, injection=0.5, stages={"tool_result": StagePolicy(injection=0.2, on_error="review")})
    scores = Scores(0.1, injection=0.3)
    assert decided(policy, scores, "input") == "allow"
    assert decided(policy, scores, "tool_result") == "block"
    assert decided(policy, Scores(0.6), "tool_result") == "block"
    assert policy.fail("tool_result", "it fell over", WHOLE).action == "review"
    assert policy.fail("input", "it fell over", WHOLE).action == "block"


def test_the_strictest_violation_rules_and_comes_first() -> None:
    """A flag does not soften a block."""
    policy = Policy(threshold={"flag": 0.1}, categories={"violence": 0.5})
    verdict = policy.decide("input", Scores(0.9, {"violence": 0.6}), WHOLE)
    assert [(v.rule, v.action) for v in verdict.violations] == [("violence", "block"), ("unsafe", "flag")]
    assert verdict.blocked


@pytest.mark.parametrize(
    ("coverage", "reason"),
    [
        (Coverage(10, 4), "4 of 10 characters were judged"),
        (Coverage(10, 10, media=("image_url", "image_url", "audio")), "not judged: image_url, audio"),
        (Coverage(10, 10, unreadable=2), "2 of 10 characters are unreadable to the model"),
    ],
)
def test_a_partial_reading_is_blocked_unless_the_policy_says_otherwise(coverage: Coverage, reason: str) -> None:
    """Whatever was read of it, the rest may be worse."""
    verdict = Policy().decide("input", Scores(0.01), coverage)
    assert (verdict.action, verdict.degraded, verdict.reason) == ("block", True, reason)
    lenient = Policy(on_partial="flag").decide("input", Scores(0.01), coverage)
    assert (lenient.action, lenient.degraded) == ("flag", True)


def test_a_partial_reading_softens_nothing() -> None:
    """What was found in the part that was read still counts."""
    assert decided(Policy(on_partial="allow"), Scores(0.99), coverage=Coverage(10, 4)) == "block"


def test_a_whole_reading_is_not_degraded() -> None:
    """A few unreadable signs are no reason for doubt."""
    assert not Policy().decide("input", Scores(0.01), Coverage(100, 100, unreadable=10)).degraded


def test_advice_fills_what_the_policy_leaves_open() -> None:
    """A backend knows its thresholds; a user who names one knows better."""
    advice = {"input": 0.3, "output": 0.4, "injection": 0.6}
    policy = Policy().advised(advice)
    assert decided(policy, Scores(0.3), "input") == "block"
    assert decided(policy, Scores(0.3), "output") == "allow"
    assert decided(policy, Scores(0.4), "document") == "allow"
    assert decided(policy, Scores(0.0, injection=0.55)) == "allow"
    assert decided(Policy(threshold=0.7).advised(advice), Scores(0.65), "input") == "allow"
    own = Policy(stages={"input": StagePolicy(threshold=0.2)}, injection=0.1).advised(advice)
    assert decided(own, Scores(0.25), "input") == "block"
    assert decided(own, Scores(0.0, injection=0.1), "input") == "block"


def test_no_advice_changes_nothing() -> None:
    """Not even the fingerprint."""
    policy = Policy(threshold=0.7, stages={"output": StagePolicy(on_error="flag")})
    assert policy.advised({}) == policy
    assert policy.advised({}).fingerprint == policy.fingerprint


@given(POLICIES, SCORES, st.sampled_from(STAGES), st.data())
def test_a_higher_score_never_gets_a_milder_action(
    policy: Policy, scores: Scores, stage: Stage, data: st.DataObject
) -> None:
    """Whichever score rises, and whatever the policy."""
    higher = Scores(
        data.draw(st.floats(scores.unsafe, 1)),
        {name: data.draw(st.floats(score, 1)) for name, score in scores.categories.items()},
        data.draw(st.floats(scores.injection, 1)),
    )
    assert SEVERITY[decided(policy, higher, stage)] >= SEVERITY[decided(policy, scores, stage)]


@given(POLICIES, SCORES | st.none(), st.sampled_from(STAGES), st.integers(0, 10), st.integers(0, 10))
def test_degraded_comes_with_a_reason_and_only_then(
    policy: Policy, scores: Scores | None, stage: Stage, judged: int, unreadable: int
) -> None:
    """Whoever sees one can rely on the other, and the action is never milder than ``on_partial``."""
    verdict = policy.decide(stage, scores, Coverage(10, judged, unreadable=unreadable))
    assert verdict.degraded == bool(verdict.reason)
    assert verdict.degraded >= (judged < 10)
    if verdict.degraded:
        on_partial = policy.stages.get(stage, StagePolicy()).on_partial or policy.on_partial
        assert SEVERITY[verdict.action] >= SEVERITY[on_partial]


@given(POLICIES)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_policy_is_what_it_was_after_a_file(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, policy: Policy
) -> None:
    """Dumped and loaded, as YAML and as JSON: equal, alike in print and in fingerprint."""
    path = tmp_path_factory.mktemp("policy") / f"policy{suffix}"
    text = policy.dump(path)
    assert path.read_text(encoding="utf-8") == text
    loaded = Policy.load(path)
    assert loaded == policy
    assert loaded.fingerprint == policy.fingerprint


@given(POLICIES, POLICIES)
def test_a_fingerprint_tells_policies_apart(one: Policy, other: Policy) -> None:
    """Two verdicts with one fingerprint were decided by one policy."""
    assert (one.fingerprint == other.fingerprint) == (one == other) == (len({one, other}) == 1)
    assert len(one.fingerprint) == 12


def test_a_dump_holds_only_what_was_set() -> None:
    """A file says what its author meant, and defaults may improve beneath it."""
    assert Policy().dump() == "{}\n"
    assert yaml.safe_load(Policy(threshold=0.4, on_error="review").dump()) == {"threshold": 0.4, "on_error": "review"}


def test_json_with_tabs_and_small_numbers_is_json(tmp_path: Path) -> None:
    """What JSON allows and YAML does not."""
    path = tmp_path / "policy.json"
    path.write_text('{\n\t"threshold": 1e-05\n}', encoding="utf-8")
    assert Policy.load(path) == Policy(threshold=0.00001)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    """Nothing set, nothing changed."""
    path = tmp_path / "policy.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert Policy.load(path) == Policy()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treshold": 0.5}, "unknown key 'treshold': did you mean 'threshold'?"),
        ({"stages": {"input": {"injektion": 0.5}}}, "'stages.input.injektion': did you mean 'injection'?"),
        ({"stages": {"imput": {}}}, "unknown 'imput': did you mean 'input'?"),
        ({"categories": {"violense": 0.5}}, "unknown 'violense': did you mean 'violence'?"),
        ({"threshold": {"blok": 0.5}}, "unknown 'blok': did you mean 'block'?"),
        ({"on_error": "blok"}, "on_error: unknown 'blok': did you mean 'block'?"),
        ({"threshold": 1.5}, "threshold is 1.5; it lies in 0 to 1"),
        ({"threshold": {"flag": -0.5}}, r"threshold\.flag is -0\.5; it lies in 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan; it lies in 0 to 1"),
        ({"stages": {"output": {"injection": 7}}}, "injection is 7; it lies in 0 to 1"),
        ({"max_unreadable": 2}, "max_unreadable is 2; it lies in 0 to 1"),
        ({"threshold": "0.5"}, "threshold: "),
        ({"threshold": True}, "threshold: "),
        ({"max_characters": 0}, "max_characters: "),
        ({"max_characters": 1.5}, "max_characters: "),
        ({"stages": []}, "stages: "),
    ],
)
def test_a_wrong_setting_is_named_with_the_right_one(settings: dict[str, Any], message: str) -> None:
    """Made in code or read from a file, and never pydantic's own error."""
    with pytest.raises(PolicyError, match=message):
        Policy(**settings)


def test_every_fault_is_told_at_once() -> None:
    """A file is mended in one go."""
    with pytest.raises(PolicyError, match=r"on_error.*treshold"):
        Policy.model_validate({"treshold": 0.5, "on_error": "blok"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"threshold: 1.5", r"policy\.yaml: threshold is 1\.5"),
        (b"- threshold", r"policy\.yaml holds a list; a policy is a mapping"),
        (b"threshold: [", r"policy\.yaml is not YAML or JSON"),
        (b"\xff\xfe\x00", r"cannot read the policy .*policy\.yaml"),
        (None, r"cannot read the policy .*policy\.yaml"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    """The message says which file, and what is wrong with it."""
    path = tmp_path / "policy.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=message):
        Policy.load(path)


def test_a_broken_json_file_is_named(tmp_path: Path) -> None:
    """Cut off in the middle, say."""
    path = tmp_path / "policy.json"
    path.write_text('{"threshold": ', encoding="utf-8")
    with pytest.raises(PolicyError, match=r"policy\.json is not"):
        Policy.load(path)


def test_a_policy_cannot_be_changed() -> None:
    """A fingerprint in yesterday's log is still true."""
    policy = Policy()
    with pytest.raises(ValidationError, match="frozen"):
        policy.threshold = 0.9


def test_the_json_schema_describes_every_setting() -> None:
    """Editors complete and check policy files by it."""
    schema = Policy.model_json_schema()
    assert schema["properties"].keys() == Policy.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("twice.yaml", "on_error: block\non_error: allow\n"),
        ("twice.json", '{"on_error": "block", "on_error": "allow"}'),
        ("inner.yaml", "stages:\n  input: {threshold: 0.5, threshold: 1.0}\n"),
    ],
)
def test_a_key_that_comes_twice_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    """The second would win, and the first be what its writer believes in."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError, match="twice"):
        Policy.load(path)


@pytest.mark.parametrize("text", ["threshold: 2024-13-45", "threshold: !!float abc", "threshold: " + "9" * 5000])
def test_values_that_break_a_parser_are_policy_errors(tmp_path: Path, text: str) -> None:
    """YAML's constructors raise plain ValueErrors."""
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError):
        Policy.load(path)


def test_an_unread_passage_counts_however_long_the_text() -> None:
    """A tenth of a long text may be a whole message."""
    coverage = Coverage(6380, 6380, windows=6, unreadable=250)
    verdict = Policy().decide("document", Scores(0.01), coverage)
    assert (verdict.action, verdict.degraded) == ("block", True)
