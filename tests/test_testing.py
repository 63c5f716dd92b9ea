"""The fakes do what they are told, and the contract suite catches every backend that does not keep it."""

from __future__ import annotations

import itertools
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import Backend, BackendError, Conversation, Coverage, Scores, Turn
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

test_keyword_keeps_the_contract = backend_contract(lambda: KeywordBackend({"bread": 0.9}))
test_scripted_keeps_the_contract = backend_contract(lambda: ScriptedBackend(itertools.repeat(0.5)))


def test_keyword_gives_the_highest_score_of_the_words_it_finds() -> None:
    """In the text on trial, its tool calls included, and nowhere else."""
    backend = KeywordBackend({"RUDE": 0.6, "EVIL": 0.99})
    scores = backend.classify(
        [
            Conversation.of("RUDE and EVIL"),
            Conversation.of({"role": "assistant", "tool_calls": [{"name": "say", "args": {"text": "RUDE"}}]}),
            Conversation.of([Turn("user", "EVIL"), Turn("assistant", "No.")]),
        ]
    )
    assert [s.unsafe for s in scores] == [0.99, 0.6, 0.01]


def test_scripted_gives_its_script_and_remembers_what_it_was_asked() -> None:
    """Scores, floats and exceptions, in order, and an error when it is used up."""
    backend = ScriptedBackend([Scores(0.3, backend="mine"), 0.5, KeyError("told"), 0.7])
    one, two = Conversation.of("one"), Conversation.of("two")
    assert backend.classify([one, two]) == [Scores(0.3, backend="mine"), Scores(0.5, backend="scripted")]
    with pytest.raises(KeyError, match="told"):
        backend.classify([one])
    assert [s.unsafe for s in backend.classify([two])] == [0.7]
    with pytest.raises(BackendError, match="used up"):
        backend.classify([two])
    assert backend.asked == [one, two, one, two, two]
    assert backend.batches == [2, 1, 1, 1]


class Made:
    """A backend of two functions."""

    def __init__(
        self,
        classify: Callable[[Sequence[Conversation]], Any],
        aclassify: Callable[[Sequence[Conversation]], Any] | None = None,
        name: str = "made",
    ) -> None:
        self.name = name
        self.classify = classify
        self._aclassify = aclassify or classify

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The other function, if there are two."""
        answer: list[Scores] = self._aclassify(conversations)
        return answer


def lengths(conversations: Sequence[Conversation]) -> list[Scores]:
    """Scores that depend on the text alone."""
    return [Scores(1 / (1 + len(conversation.trial))) for conversation in conversations]


def counter() -> Callable[[Sequence[Conversation]], list[Scores]]:
    """Scores that depend on how often it was asked."""
    asked = itertools.count(1)
    return lambda conversations: [Scores(1 / next(asked)) for _ in conversations]


def covering(
    judged: int, characters: Callable[[Conversation], int]
) -> Callable[[Sequence[Conversation]], list[Scores]]:
    """Scores with a coverage."""
    return lambda given: [Scores(0.5, coverage=Coverage(characters(one), judged)) for one in given]


def test_a_backend_that_keeps_the_contract_passes() -> None:
    """The suite asks for no more than it says."""
    backend_contract(lambda: Made(lengths))()


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (Made(lengths, name=""), "name is not empty"),
        (Made(lambda given: lengths(given) or [Scores(0.5)]), "nothing in, nothing out"),
        (Made(lengths, lambda given: lengths(given) or [Scores(0.5)]), r"nothing in, nothing out \(async\)"),
        (Made(lambda given: lengths(given[:3])), "one Scores for each"),
        (Made(lambda given: [0.5 for _ in given]), "answers are Scores"),
        (Made(covering(0, lambda _: 7)), "coverage counts"),
        (Made(covering(9_999_999, lambda one: len(one.trial))), "coverage counts"),
        (Made(counter()), "the same scores in any order"),
        (Made(lambda given: [Scores(1 / (1 + len(given)))] * len(given)), "alone and in a batch"),
        (Made(lengths, lambda given: lengths(given[::-1])), "sync and async"),
        (Made(lambda given: [Scores(float(current_thread() is main_thread()))] * len(given)), "several threads"),
    ],
)
def test_a_backend_that_breaks_the_contract_is_caught(backend: Backend, complaint: str) -> None:
    """Each clause by the backend that breaks just that one."""
    with pytest.raises(AssertionError, match=complaint):
        backend_contract(lambda: backend)()
