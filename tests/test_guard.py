"""A guard has a verdict on anything it can read, the same sync and async, and never allows what nothing judged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import (
    BackendError,
    BackendUnavailable,
    Blocked,
    Conversation,
    ConversationError,
    Coverage,
    Guard,
    Policy,
    PolicyError,
    Scores,
    ToolCall,
    Turn,
    Verdict,
    enforce,
)
from guardmw.policy import StagePolicy
from guardmw.testing import SAMPLES, KeywordBackend, ScriptedBackend
from guardmw.verdict import ACTIONS

KEYWORD = KeywordBackend({"EVIL": 0.99, "RUDE": 0.6})
TEXTS = st.text(st.characters(), max_size=30) | st.sampled_from(["EVIL", "so EVIL", "RUDE", "", " \n"])

Way = Callable[[Guard, Any], list[Verdict]]


def screen(guard: Guard, given_: Sequence[Any]) -> list[Verdict]:
    """One after the other, sync."""
    return [guard.screen(one) for one in given_]


def ascreen(guard: Guard, given_: Sequence[Any]) -> list[Verdict]:
    """All at once, async."""

    async def gathered() -> list[Verdict]:
        waiting: list[Awaitable[Verdict]] = [guard.ascreen(one) for one in given_]
        return list(await asyncio.gather(*waiting))

    return asyncio.run(gathered())


def screen_many(guard: Guard, given_: Sequence[Any]) -> list[Verdict]:
    """One batch, sync."""
    return guard.screen_many(given_)


def ascreen_many(guard: Guard, given_: Sequence[Any]) -> list[Verdict]:
    """One batch, async."""
    return asyncio.run(guard.ascreen_many(given_))


every_way = pytest.mark.parametrize("way", [screen, ascreen, screen_many, ascreen_many])


def timeless(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Verdicts without what differs from run to run."""
    return [{key: value for key, value in v.to_dict().items() if key != "elapsed_ms"} for v in verdicts]


@every_way
def test_the_last_turn_is_judged_whatever_it_is(way: Way) -> None:
    """All five stages, each with its own name for itself in the verdict."""
    verdicts = way(
        Guard(KEYWORD),
        [
            "EVIL",
            [Turn("user", "Hello"), Turn("assistant", "EVIL")],
            [Turn("user", "Hello"), Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": "EVIL"}),))],
            [Turn("user", "Hello"), Turn("tool", "EVIL")],
            {"role": "document", "content": "EVIL"},
        ],
    )
    assert [v.action for v in verdicts] == ["block"] * 5
    assert [v.stage for v in verdicts] == ["input", "output", "tool_call", "tool_result", "document"]


@every_way
def test_context_is_not_on_trial(way: Way) -> None:
    """What was said before has had its verdict."""
    (verdict,) = way(Guard(KEYWORD), [[Turn("user", "EVIL"), Turn("assistant", "I cannot help with that.")]])
    assert verdict.action == "allow"


@every_way
def test_a_verdict_tells_how_it_came_about(way: Way) -> None:
    """Which score by which backend, how much was read, under which policy, and how long it took."""
    guard = Guard(KEYWORD, policy=Policy(threshold={"flag": 0.5, "block": 0.9}))
    (verdict,) = way(guard, ["RUDE words"])
    assert verdict.action == "flag"
    assert not verdict.blocked
    assert [(v.rule, v.score, v.threshold, v.action) for v in verdict.violations] == [("unsafe", 0.6, 0.5, "flag")]
    assert verdict.scores == Scores(0.6, backend="keyword")
    assert verdict.coverage == Coverage(10, 10)
    assert not verdict.degraded
    assert verdict.policy == guard.policy.fingerprint
    assert verdict.elapsed_ms > 0


@given(st.lists(TEXTS, max_size=5))
def test_every_way_of_asking_gives_the_same_verdicts(texts: list[str]) -> None:
    """Sync = async, batch = single."""
    guard = Guard(KEYWORD)
    one = timeless(screen(guard, texts))
    assert timeless(ascreen(guard, texts)) == one
    assert timeless(screen_many(guard, texts)) == one
    assert timeless(ascreen_many(guard, texts)) == one


def test_a_batch_is_one_batch_for_the_backend() -> None:
    """And what needs no opinion is not asked about."""
    backend = ScriptedBackend([0.1, 0.9])
    verdicts = Guard(backend).screen_many(iter(["Hello", "", "EVIL", "   "]))
    assert [v.action for v in verdicts] == ["allow", "allow", "block", "allow"]
    assert backend.batches == [2]


def test_no_conversations_get_no_verdicts() -> None:
    """Nothing in, nothing out, and nobody asked."""
    backend = ScriptedBackend([])
    assert Guard(backend).screen_many([]) == []
    assert backend.batches == []


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u2003"])
def test_blank_text_is_allowed_unasked(text: str) -> None:
    """There is nothing in it to judge, and that is a whole reading."""
    backend = ScriptedBackend([])
    verdict = Guard(backend).screen(text)
    assert (verdict.action, verdict.degraded, verdict.scores) == ("allow", False, None)
    assert verdict.coverage == Coverage(len(text), len(text), 0)
    assert not backend.batches


class Broken:
    """A backend that answers whatever it is given to, or raises it."""

    name = "broken"

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Raise an exception, call a callable, give anything else."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer(conversations) if callable(self._answer) else self._answer  # type: ignore[return-value]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same."""
        return self.classify(conversations)


BREAKAGES = {
    "says it cannot": BackendError("broken: it fell over"),
    "is not there": BackendUnavailable("broken: nobody answers"),
    "says nothing": BackendError(),
    "raises anything": RuntimeError("could not read 'an EVIL secret'"),
    "raises KeyError": KeyError("an EVIL secret"),
    "raises StopIteration": StopIteration("an EVIL secret"),
    "raises StopAsyncIteration": StopAsyncIteration("an EVIL secret"),
    "gives too few": [],
    "gives too many": lambda given_: [Scores(0.0)] * (len(given_) + 1),
    "gives nothing": None,
    "gives a number": 0.0,
    "gives numbers": lambda given_: [0.0] * len(given_),
    "gives dicts": lambda given_: [{"unsafe": 0.0}] * len(given_),
    "gives None for each": lambda given_: [None] * len(given_),
    "gives NaN": lambda given_: [Scores(float("nan"))] * len(given_),
    "gives a score beyond 1": lambda given_: [Scores(-1.0)] * len(given_),
    "gives an iterator": lambda given_: iter([Scores(0.0)] * len(given_)),
}


@every_way
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_backend_is_never_an_allow(way: Way, breakage: str) -> None:
    """Whatever it does instead of scoring: blocked, marked as degraded, with a reason that quotes nothing."""
    for verdict in way(Guard(Broken(BREAKAGES[breakage])), ["an EVIL secret", "another secret"]):
        assert verdict.action == "block"
        assert verdict.degraded
        assert verdict.reason
        assert "secret" not in verdict.reason + verdict.to_json() + repr(verdict)
        assert verdict.scores is None
        assert verdict.coverage.judged == 0


@every_way
@pytest.mark.parametrize("action", ACTIONS)
def test_what_failure_means_is_the_policys_to_say(way: Way, action: Any) -> None:
    """Even allow, where somebody has said so; and it is still told."""
    (verdict,) = way(Guard(Broken(BackendError("broken: it fell over")), policy=Policy(on_error=action)), ["Hello"])
    assert (verdict.action, verdict.degraded, verdict.reason) == (action, True, "broken: it fell over")


def test_a_failure_without_a_message_is_one_all_the_same() -> None:
    """It is told by its type."""
    verdict = Guard(Broken(BackendUnavailable()), policy=Policy(on_error="review")).screen("Hello")
    assert (verdict.action, verdict.reason) == ("review", "BackendUnavailable")


def test_failure_can_mean_something_else_at_one_stage() -> None:
    """A document can wait for a person where a user cannot."""
    policy = Policy(stages={"document": StagePolicy(on_error="review")})
    guard = Guard(Broken(RuntimeError()), policy=policy)
    verdicts = guard.screen_many(["Hello", {"role": "document", "content": "Hello"}])
    assert [v.action for v in verdicts] == ["block", "review"]


def test_blank_text_is_allowed_beside_a_failure() -> None:
    """A batch fails for those that were asked about."""
    verdicts = Guard(Broken(RuntimeError())).screen_many(["Hello", ""])
    assert [(v.action, v.degraded) for v in verdicts] == [("block", True), ("allow", False)]


@every_way
def test_text_beyond_the_limit_is_not_judged_and_not_allowed(way: Way) -> None:
    """Ten million characters cost no time and get a defined verdict."""
    backend = ScriptedBackend([])
    (verdict,) = way(Guard(backend), ["x" * 10_000_000])
    assert (verdict.action, verdict.degraded) == ("block", True)
    assert verdict.reason == "10000000 characters are more than max_characters: none was judged"
    assert not backend.batches
    (lenient,) = way(Guard(backend, policy=Policy(max_characters=5, on_partial="review")), ["too long"])
    assert lenient.action == "review"


@every_way
@pytest.mark.parametrize("text", ["", "Look at this!"])
def test_a_picture_is_not_judged_and_not_allowed(way: Way, text: str) -> None:
    """With harmless words beside it, and without."""
    turn = Turn("user", text, media=("image_url",))
    (verdict,) = way(Guard(KEYWORD), [turn])
    assert (verdict.action, verdict.degraded, verdict.reason) == ("block", True, "not judged: image_url")
    assert verdict.coverage.media == ("image_url",)
    (lenient,) = way(Guard(KEYWORD, policy=Policy(on_partial="allow")), [turn])
    assert (lenient.action, lenient.degraded) == ("allow", True)


@every_way
def test_a_backend_that_left_something_out_is_not_believed(way: Way) -> None:
    """Half a text may be the harmless half."""
    scores = Scores(0.01, backend="scripted", coverage=Coverage(8, 4))
    (verdict,) = way(Guard(ScriptedBackend([scores])), ["8 signs."])
    assert (verdict.action, verdict.reason) == ("block", "4 of 8 characters were judged")


@every_way
def test_strange_text_gets_a_verdict(way: Way) -> None:
    """One of every stage, and the texts that break things."""
    verdicts = way(Guard(KEYWORD), SAMPLES)
    assert [v.action for v in verdicts] == ["allow"] * len(SAMPLES)
    assert [v.stage for v in verdicts] == [sample.stage for sample in SAMPLES]
    for verdict in verdicts:
        assert verdict.to_json().isascii()


def test_what_cannot_be_read_is_an_error_and_no_verdict() -> None:
    """In a batch the message says which, and nobody is asked about the others."""
    backend = ScriptedBackend([0.1])
    with pytest.raises(ConversationError, match="cannot read a int"):
        Guard(backend).screen(7)  # type: ignore[arg-type]
    with pytest.raises(ConversationError, match=r"^conversation 1: "):
        Guard(backend).screen_many(["Hello", {"role": "usr", "content": "Hello"}])
    assert not backend.batches


def test_thresholds_of_the_backend_are_the_default() -> None:
    """A backend knows at which score it should act, and a policy knows better."""
    backend = KeywordBackend({"RUDE": 0.6})
    backend.thresholds = {"input": 0.7, "output": 0.55}  # type: ignore[attr-defined]
    answer = [Turn("user", "Hello"), Turn("assistant", "RUDE")]
    assert not Guard(backend).screen("RUDE").blocked
    assert Guard(backend).screen(answer).blocked
    assert Guard(backend, policy=Policy(threshold=0.5)).screen("RUDE").blocked


@pytest.mark.parametrize("action", ["allow", "flag", "review"])
def test_enforce_lets_everything_through_but_a_block(action: Any) -> None:
    """And hands the verdict on, so that it can stand in an expression."""
    verdict = Guard(KEYWORD, policy=Policy(threshold={action: 0.5})).screen("EVIL")
    assert enforce(verdict) is verdict


def test_enforce_raises_on_a_block() -> None:
    """With the verdict, for whoever catches it."""
    verdict = Guard(KEYWORD).screen("EVIL")
    with pytest.raises(Blocked) as caught:
        enforce(verdict)
    assert caught.value.verdict is verdict


async def test_a_cancelled_screening_is_no_verdict() -> None:
    """A timeout of the caller's own stays the caller's."""

    class Slow:
        name = "slow"

        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise NotImplementedError

        async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            await asyncio.Event().wait()
            raise NotImplementedError

    task = asyncio.create_task(Guard(Slow()).ascreen("Hello"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_interrupt_is_not_a_failure_of_the_backend() -> None:
    """Control-C stops the program, whatever the policy says of failures."""

    class Interrupted(KeywordBackend):
        def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guard(Interrupted({}), policy=Policy(on_error="allow")).screen("Hello")


def test_one_guard_serves_many_threads() -> None:
    """Each gets the verdict on its own text."""
    guard = Guard(KEYWORD)
    wrong: list[str] = []

    def ask(text: str, *, blocked: bool) -> None:
        wrong.extend(text for _ in range(200) if guard.screen(text).blocked is not blocked)

    threads = [threading.Thread(target=ask, args=(t,), kwargs={"blocked": "EVIL" in t}) for t in ("EVIL", "bread") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_guard_prints_its_backend_and_policy() -> None:
    """And nothing it ever screened."""
    guard = Guard(KEYWORD)
    guard.screen("EVIL")
    assert repr(guard) == f"Guard('keyword', policy={guard.policy.fingerprint})"


@pytest.mark.parametrize("given_", ["say EVIL", b"EVIL", {"role": "user", "content": "EVIL"}, Turn("user", "EVIL"), 5])
def test_many_is_a_list_and_not_one(given_: Any) -> None:
    """A str is an iterable of letters, none of which is EVIL."""
    with pytest.raises(ConversationError, match="list"):
        Guard(KeywordBackend({"EVIL": 0.99})).screen_many(given_)


@pytest.mark.parametrize("backend", [None, 3, object()])
def test_what_is_no_backend_is_refused_at_once(backend: Any) -> None:
    """Not at the first text."""
    with pytest.raises(BackendError, match="no backend"):
        Guard(backend)


def test_what_is_no_policy_is_refused_with_the_way_to_load_one() -> None:
    """A path is the likely mistake."""
    with pytest.raises(PolicyError, match=r"Policy\.load"):
        Guard(KeywordBackend({}), policy="policy.yaml")  # type: ignore[arg-type]


@pytest.mark.parametrize("stated", [Coverage(5, 5), Coverage(0, 0)])
def test_how_long_the_text_is_is_not_for_the_backend_to_say(stated: Coverage) -> None:
    """A backend that cut the text and counted what was left has not read all of it."""
    verdict = Guard(ScriptedBackend([Scores(0.1, coverage=stated)])).screen("x" * 100)
    assert verdict.action == "block"
    assert verdict.coverage.characters == 100
    assert "of 100 characters were judged" in verdict.reason
