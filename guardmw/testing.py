"""Fakes to test with, and the contract every backend keeps.

A package that brings a backend holds it to the contract in one line of its tests::

    test_contract = backend_contract(lambda: MyBackend())
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from guardmw.conversation import Conversation, ToolCall, Turn
from guardmw.errors import BackendError
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from guardmw.backends import Backend


class KeywordBackend:
    """Scores by words on trial: the highest score of the words found, 0.01 where none is.

    Args:
        words: P(unsafe) by word, case-sensitive, looked for in the last turn's text and tool calls.
    """

    def __init__(self, words: Mapping[str, float], *, name: str = "keyword") -> None:
        self.name = name
        self._words = dict(words)

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return [self._scores(conversation.trial) for conversation in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; never waits."""
        return self.classify(conversations)

    def _scores(self, trial: str) -> Scores:
        return Scores(max((p for word, p in self._words.items() if word in trial), default=0.01), backend=self.name)


class ScriptedBackend:
    """Gives what it is told to, one item for each conversation, and remembers what it was asked.

    Args:
        script: Scores, floats (P(unsafe)), or exceptions, which the whole batch then raises. When it is used up, the
            backend raises BackendError.

    Attributes:
        asked: every conversation it was given, in order.
        batches: how many at a time.
    """

    def __init__(self, script: Iterable[Scores | float | Exception], *, name: str = "scripted") -> None:
        self.name = name
        self.asked: list[Conversation] = []
        self.batches: list[int] = []
        self._script = iter(script)
        self._lock = Lock()

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch from the script."""
        with self._lock:
            self.asked += conversations
            self.batches.append(len(conversations))
            return [self._next() for _ in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch from the script; never waits."""
        return self.classify(conversations)

    def _next(self) -> Scores:
        given = next(self._script, BackendError(f"{self.name}: the script is used up"))
        if isinstance(given, Exception):
            raise given
        return given if isinstance(given, Scores) else Scores(given, backend=self.name)


# One of every stage, and the texts that break things.
_SAMPLES: tuple[str | list[Turn], ...] = (
    "How do I bake bread?",
    [Turn("user", "How do I bake bread?"), Turn("assistant", "Mix flour, water, salt and yeast.")],
    [Turn("user", "List my files."), Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": "ls"}),))],
    [Turn("user", "What is the weather?"), Turn("tool", '{"sky": "clear"}', name="weather")],
    [Turn("document", "Bread is a staple food. " * 400)],
    [Turn("system", "You are a helpful baker.")],
    "",
    " \n\t",
    "\x00NUL\x00",
    "half a pair: \ud83d",
    "\u200b\u200b",
    "x" * 5_000,
    "Zażółć gęślą jaźń 你好 👍",
)
SAMPLES: tuple[Conversation, ...] = tuple(Conversation.of(given) for given in _SAMPLES)


def backend_contract(make: Callable[[], Backend]) -> Callable[[], None]:
    """A test function that holds the backend ``make`` returns to the contract.

    One Scores for each conversation, in order, alike alone and in a batch, sync and async, from one thread and from
    several; nothing for nothing; coverage within bounds.

    Raises:
        AssertionError: from the test, names what was broken.
    """

    def test() -> None:
        backend = make()
        assert isinstance(backend.name, str), "a backend has a name"
        assert backend.name, "a backend's name is not empty"
        assert backend.classify([]) == [], "nothing in, nothing out"
        assert asyncio.run(backend.aclassify([])) == [], "nothing in, nothing out (async)"
        batch = backend.classify(SAMPLES)
        assert len(batch) == len(SAMPLES), "one Scores for each conversation"
        for conversation, scores in zip(SAMPLES, batch, strict=True):
            assert isinstance(scores, Scores), "answers are Scores"
            covered = scores.coverage
            assert covered is None or 0 <= covered.judged <= covered.characters == len(conversation.trial), (
                "coverage counts the characters on trial"
            )
        same = "the same scores"
        assert _close(backend.classify(SAMPLES[::-1])[::-1], batch), f"{same} in any order"
        assert _close([backend.classify([one])[0] for one in SAMPLES], batch), f"{same} alone and in a batch"
        assert _close(asyncio.run(backend.aclassify(SAMPLES)), batch), f"{same} sync and async"
        with ThreadPoolExecutor(4) as pool:
            for threaded in pool.map(backend.classify, [SAMPLES] * 4):
                assert _close(threaded, batch), f"{same} from several threads"

    return test


# Padding moves the last bits of a float, and int8 rounding and a low temperature make more of that.
_TOLERANCE = 0.03


def _close(one: Sequence[Scores], other: Sequence[Scores]) -> bool:
    return len(one) == len(other) and all(
        replace(a, unsafe=0, injection=0, categories={}) == replace(b, unsafe=0, injection=0, categories={})
        and a.categories.keys() == b.categories.keys()
        and all(
            abs(x - y) <= _TOLERANCE
            for x, y in zip(
                (a.unsafe, a.injection, *a.categories.values()),
                (b.unsafe, b.injection, *b.categories.values()),
                strict=True,
            )
        )
        for a, b in zip(one, other, strict=True)
    )
