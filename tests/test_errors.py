"""One tree of errors, whose messages help and quote nothing that was screened."""

from __future__ import annotations

import pickle

import pytest

from guardmw import (
    ArtefactError,
    BackendError,
    BackendUnavailable,
    Blocked,
    ConversationError,
    Guard,
    GuardmwError,
    PolicyError,
    enforce,
)
from guardmw.errors import nearest
from guardmw.testing import KeywordBackend


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (GuardmwError, Exception),
        (Blocked, GuardmwError),
        (ConversationError, GuardmwError),
        (PolicyError, GuardmwError),
        (BackendError, GuardmwError),
        (BackendUnavailable, BackendError),
        (ArtefactError, BackendError),
    ],
)
def test_one_except_catches_everything_guardmw_raises(error: type[Exception], parent: type[Exception]) -> None:
    """The tree in the module's docstring is the tree of the classes."""
    assert error.__bases__ == (parent,)


def blocked() -> Blocked:
    """What enforce raises."""
    with pytest.raises(Blocked) as caught:
        enforce(Guard(KeywordBackend({"EVIL": 0.99})).screen("an EVIL secret"))
    return caught.value


def test_blocked_tells_the_stage_and_the_score() -> None:
    """A log line says what happened without the text it happened to."""
    assert str(blocked()) == "blocked at input: unsafe 0.99 (threshold 0.5)"


def test_blocked_quotes_nothing() -> None:
    """Neither its text nor its repr, nor those of its verdict."""
    error = blocked()
    for told in (str(error), repr(error), repr(error.verdict), error.verdict.to_json()):
        assert "secret" not in told


def test_blocked_survives_a_change_of_process() -> None:
    """Workers hand exceptions back pickled."""
    error = blocked()
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - its own pickle
    assert copy.verdict == error.verdict
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("tresholds", "did you mean 'threshold'?"), ("qqq", "expected one of: threshold, stages")],
)
def test_a_hint_names_the_nearest_word_or_all(word: str, hint: str) -> None:
    """A typo is corrected; for anything else the choice is shown."""
    assert nearest(word, ["threshold", "stages"]) == hint
