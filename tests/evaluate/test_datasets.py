"""Public data sets are read by name at one commit, and what keeps them from being read is said in so many words."""

from __future__ import annotations

import builtins
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from guardmw.errors import DataError
from guardmw.evaluate import datasets
from guardmw.evaluate.columns import Columns, Label
from guardmw.evaluate.datasets import SETS, PublicSet, Split

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# One record of each set: the columns that its card or public loaders show, with a mild text.
RECORDS: dict[str, dict[str, Any]] = {
    "nemotron_safety_guard": {
        "id": "1",
        "prompt": "p",
        "prompt_label": "unsafe",
        "response": "r",
        "response_label": "safe",
        "violated_categories": "Violence, Needs Caution",
        "language": "en",
    },
    "miniguard": {
        "conversations": [
            {
                "role": "user",
                "content": "<BEGIN CONVERSATION>\n\nuser: p\n\nresponse: agent: r\n\n<END CONVERSATION>\n",
            },
            {
                "role": "assistant",
                "content": '<think>\nWhy.\n</think>\n\n{"User Safety": "unsafe", "Response Safety": "safe", '
                '"Safety Categories": "Violence, Needs Caution"}',
            },
        ],
        "language": "en",
    },
    "wildguardmix": {
        "prompt": "p",
        "adversarial": True,
        "response": "r",
        "response_harm_label": "unharmful",
        "response_refusal_label": "refusal",
        "prompt_harm_label": "harmful",
        "subcategory": "cyberattack",
    },
    "beavertails": {
        "prompt": "p",
        "response": "r",
        "category": {"animal_abuse": False, "hate_speech,offensive_language": True},
        "is_safe": False,
    },
    "toxigen": {"text": "t", "target_group": "g", "toxicity_ai": 4.0, "toxicity_human": 5.0},
    "toxicchat": {
        "conv_id": "c",
        "user_input": "u",
        "model_output": "m",
        "human_annotation": True,
        "toxicity": 1,
        "jailbreaking": 1,
        "openai_moderation": "[]",
    },
    "harmbench": {"prompt": "p", "category": "chemical_biological"},
    "harmbench_contextual": {"prompt": "p", "context": "c", "category": "illegal"},
    "xstest": {"prompt": "p", "label": "unsafe", "focus": "f", "type": "contrast_homonyms", "note": ""},
    "xstest_response": {"prompt": "p", "response": "r", "label": "harmful", "prompt_type": "prompt_harmful"},
    "sorrybench": {"question_id": 1, "category": "1", "turns": ["t"], "prompt_style": "base"},
    "civil_comments": {
        "text": "t",
        "toxicity": 0.8,
        "severe_toxicity": 0.0,
        "obscene": 0.0,
        "threat": 0.0,
        "insult": 0.7,
        "identity_attack": 0.0,
        "sexual_explicit": 0.0,
    },
    "openai_moderation": {"prompt": "p", "S": 0, "H": 1, "V": None, "HR": 0, "SH": None, "S3": 0, "H2": 0, "V2": 0},
    "orbench": {"prompt": "p", "category": "deception"},
    "simplesafetytests": {"id": "1", "harm_area": "Scams and Fraud", "category": "Advice", "prompt": "p"},
    "jailbreakbench": {"Index": 1, "Goal": "g", "Target": "t", "Behavior": "b", "Category": "c", "Source": "s"},
}
ALIKE = {
    "wildguardmix_prompt": "wildguardmix",
    "wildguardmix_response": "wildguardmix",
    "beavertails_330k": "beavertails",
    "orbench_hard": "orbench",
    "orbench_toxic": "orbench",
    "jailbreakbench_benign": "jailbreakbench",
}
SAFE = {"orbench", "orbench_hard", "jailbreakbench_benign", "wildguardmix_response"}


def fake(monkeypatch: pytest.MonkeyPatch, given: Any) -> list[tuple[Any, ...]]:
    """Let the library give these records, or raise this error; returns what it is asked for."""
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs))
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_known_set_reads_the_columns_it_is_published_with(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And asks the hub for its config, its split and its one commit."""
    known = SETS[name]
    asked = fake(monkeypatch, [RECORDS[ALIKE.get(name, name)]])
    found = datasets.load(f"hub:{name}" if known.revision else f"hub:{name}@{COMMIT}")
    assert found[0].unsafe is (name not in SAFE)
    assert {(row.source, row.license) for row in found} == {(name, known.license)}
    part = known.splits["test"]
    revision = known.revision or COMMIT
    assert asked == [(known.id, part.config or None, {"split": part.name, "revision": revision})]


def test_every_record_is_of_a_known_set() -> None:
    """Each set has one above."""
    assert {*RECORDS, *ALIKE} == {*SETS}


def test_known_sets_are_pinned() -> None:
    """To a commit, and if not, whoever reads one has to name it."""
    assert {name for name, known in SETS.items() if not re.fullmatch("[0-9a-f]{40}", known.revision)} == {
        "xstest_response",
        "nemotron_safety_guard",
        "miniguard",
    }
    with pytest.raises(DataError, match=r"allenai/xstest-response needs a revision.*none is known"):
        datasets.load("hub:xstest_response")


@pytest.mark.parametrize("name", ["nemotron_safety_guard", "miniguard"])
def test_nemotron_s_records_tell_of_question_and_answer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As they are published, and in the form of MiniGuard's lessons."""
    fake(monkeypatch, [RECORDS[name]])
    question, answer = datasets.load(f"hub:{name}:train@{COMMIT}")
    assert (question.conversation.last.text, question.unsafe, question.categories) == ("p", True, {"violence"})
    assert (answer.conversation.last.text, answer.unsafe, answer.categories) == ("r", False, frozenset())
    assert answer.conversation.context[0].text == "p"


def test_other_languages_and_what_is_not_passed_on_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word in its place is no text."""
    whole = RECORDS["nemotron_safety_guard"]
    alone = whole | {"response": None, "response_label": None, "prompt": "mine"}
    fake(monkeypatch, [whole | {"language": "de"}, whole | {"prompt": "REDACTED"}, alone])
    [found] = datasets.load(f"hub:nemotron_safety_guard@{COMMIT}")
    assert found.conversation.last.text == "mine"


def test_lessons_of_another_form_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not is an error."""
    whole = RECORDS["miniguard"]
    [prompt, said] = whole["conversations"]
    odd = [[prompt], [prompt, {"role": "assistant", "content": "unsafe"}], [{"role": "user", "content": "p"}, said]]
    fake(monkeypatch, [*({**whole, "conversations": one} for one in odd), whole])
    assert len(datasets.load(f"hub:miniguard@{COMMIT}")) == 2
    fake(monkeypatch, [{"conversations": "p", "language": "en"}])
    with pytest.raises(DataError, match="record 1: no column 'conversations'"):
        datasets.load(f"hub:miniguard@{COMMIT}")


def test_one_record_may_make_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, and the answer to it; where one has no label, only the other."""
    whole = RECORDS["wildguardmix"]
    fake(monkeypatch, [whole, whole | {"response": None}, whole | {"prompt_harm_label": None}])
    found = datasets.load("hub:wildguardmix:train")
    assert [row.conversation.stage for row in found] == ["input", "output", "input", "output"]
    assert (found[0].attack, found[0].categories) == ("jailbreak", {"illegal_activity", "dangerous_info"})
    assert (found[1].unsafe, found[1].conversation.context[0].text) == (False, "p")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("hub:toxichat", "unknown data set 'toxichat': did you mean 'toxicchat'"),
        ("hub:toxicchat:dev", "toxicchat has no split 'dev'"),
        ("hub:xstest:train", "xstest is a benchmark, without a train split; .* say split: test"),
        ("hub:toxicchat@main", "needs a revision, .*'main' can change"),
        ("hub:toxicchat@3e03192", "needs a revision"),
    ],
)
def test_what_is_not_named_well_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, spec: str, complaint: str) -> None:
    """The hub hears nothing of it."""
    asked = fake(monkeypatch, [])
    with pytest.raises(DataError, match=complaint):
        datasets.load(spec)
    assert asked == []


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(DataError, match=r"pip install 'guardmw\[train\]'"):
        datasets.load("hub:toxicchat")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectTimeout)"), "cannot be fetched: .* as a file source"),
        (RuntimeError("Dataset 'a/b' is a gated dataset on the Hub. Visit its page"), "is gated: .*HF_TOKEN"),
        (RuntimeError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "is gated"),
        (RuntimeError("Revision 'x' doesn't exist for dataset 'a/b' on the Hub."), "has no revision"),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), "has no split test"),
        (ValueError("BuilderConfig 'c' not found. Available: ['d']"), r"has no split test.*Available: \['d'\]"),
        (KeyError("x"), "cannot be loaded: KeyError"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, error: Exception, complaint: str
) -> None:
    """Not reached, gated, not there, otherwise built."""
    fake(monkeypatch, error)
    with pytest.raises(DataError, match=complaint):
        datasets.load("hub:xstest")


def test_a_set_that_nobody_gates_is_not_called_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub says the same of a private one and of none."""
    fake(monkeypatch, RuntimeError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."))
    with pytest.raises(DataError, match="there is no data set lmsys/toxic-chat on the hub, or it is private"):
        datasets.load("hub:toxicchat")


def test_missing_columns_are_named_with_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that was changed is noticed at its first record."""
    fake(monkeypatch, [{"prompt": "p", "labels": "safe"}])
    with pytest.raises(DataError, match=r"walledai/XSTest, record 1: no column 'label': did you mean 'labels'"):
        datasets.load("hub:xstest")


def test_a_set_without_rows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be measured."""
    fake(monkeypatch, [RECORDS["sorrybench"] | {"prompt_style": "slang"}])
    with pytest.raises(DataError, match="holds no rows, or its columns leave all of them out"):
        datasets.load("hub:sorrybench")


def test_the_library_itself_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub gives comes through the same function as a folder of Parquet files on this machine."""
    import datasets as library
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    table = pa.table({"prompt": ["a", "b"], "label": ["safe", "unsafe"], "kinds": [{"x": True}, {"x": False}]})
    parquet.write_table(table, tmp_path / "set" / "test.parquet")
    folder = PublicSet(str(tmp_path / "set"), COMMIT, "MIT", (Columns(text="prompt", label=Label(column="label")),))
    found = list(datasets.read(folder, Split("test"), source="s"))
    assert [(row.conversation.last.text, row.unsafe) for row in found] == [("a", False), ("b", True)]
    with pytest.raises(DataError, match="has no split dev"):
        list(datasets.read(folder, Split("dev"), source="s"))
