"""Wherever an adapter has a guard that escalates, the second tier has the last word, and its absence is policy."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import langchain_guardmw as lc
import llama_index.callbacks.guardmw as li
import pytest
from llama_index.core.llms import MockLLM

from guardmw import Blocked, Guard, Policy, load
from guardmw.testing import KeywordBackend, ScriptedBackend
from tests.adapters.test_servers import ANSWER, DROPPED, PLACES, TEXT, caught_at_once, each_in_turn
from tests.backends import conftest as parts
from tests.backends.test_chat_failures import both_ways

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guardmw import Backend

FIRST = KeywordBackend({"nobody": 0.45}, name="first")
every_adapter = pytest.mark.parametrize("adapter", PLACES)


def came_of(adapter: str, way: str, guard: Guard) -> dict[str, Any]:
    """What comes of each place, of text that leaves the first tier in doubt."""
    places = list(PLACES[adapter].values())
    if way == "sync":
        came = [caught_at_once(place.sync, guard) for place in places]
    else:
        came = asyncio.run(each_in_turn(places, guard))
    return dict(zip(PLACES[adapter], came, strict=True))


@both_ways
@every_adapter
@pytest.mark.parametrize(("word", "passes"), [("bread", True), ("nobody", False)])
def test_the_second_tier_has_the_last_word(adapter: str, way: str, word: str, passes: bool) -> None:
    """Either way."""
    assert all("nobody" in text for text in (TEXT, ANSWER))
    second = KeywordBackend({word: 0.99}, name="second")
    for one in came_of(adapter, way, Guard(FIRST, escalate=second)).values():
        if passes:
            assert not isinstance(one, Exception)
        elif one is not DROPPED:
            assert (one.verdict.scores.backend, one.verdict.degraded) == ("second", False)


@both_ways
@every_adapter
@pytest.mark.parametrize(
    ("on_degraded", "passes"),
    [("block", False), ("review", False), ("degrade", False), ("flag", True), ("allow", True)],
)
def test_without_it_the_policy_decides(adapter: str, way: str, on_degraded: Any, passes: bool) -> None:
    """At every place alike; what is withheld says why."""
    down: Backend = ScriptedBackend([], name="second")
    guard = Guard(FIRST, escalate=down, policy=Policy(on_degraded=on_degraded))
    for one in came_of(adapter, way, guard).values():
        if passes:
            assert not isinstance(one, Exception)
        elif one is not DROPPED:
            assert isinstance(one, Blocked)
            assert one.verdict.degraded
            assert one.verdict.reason == "second: the script is used up"


async def miniguard(seen: parts.Seen, writer: Any) -> None:
    """One token after the beginning of an answer, and in whole where an assistant is judged; unsafe for EVIL."""
    if seen.body["messages"][-1]["role"] == "assistant":
        writer.write(parts.whole(200, parts.judged(seen)))
    else:
        evil = "unsafe" if "EVIL" in seen.text else "safe"
        text = f'{{"User Safety": "{evil}", "Response Safety": "{evil}"}}'
        writer.write(parts.whole(200, parts.completion(text)))


@pytest.fixture
def server() -> Iterator[parts.Server]:
    """One that serves a guard of MiniGuard's kind."""
    made = parts.Server()
    made.behave = miniguard
    made.models = {"data": [{"id": "guard", "root": "acme/MiniGuard-1"}]}
    yield made
    made.end()


ONE_LINE: dict[str, Callable[[str], Callable[[str], Any]]] = {
    "langchain": lambda url: lc.guard(escalate=url).invoke,
    "langchain, async": lambda url: lambda text: asyncio.run(lc.guard(escalate=url).ainvoke(text)),
    "llama_index": lambda url: li.guard_llm(MockLLM(), Guard(escalate=url)).complete,
    "llama_index, async": lambda url: (
        lambda text: asyncio.run(li.guard_llm(MockLLM(), Guard(escalate=url)).acomplete(text))
    ),
}


@pytest.mark.parametrize("line", ONE_LINE)
def test_a_url_is_all_it_takes(server: parts.Server, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doubtful is asked of the server in its model's dialect; when that is gone, nothing doubtful passes."""
    monkeypatch.setattr("guardmw.guard.load", lambda spec: FIRST if spec == "embedded" else load(spec))
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01 * low)
    ask = ONE_LINE[line](server.url)
    assert ask("bread")
    assert server.seen == []
    assert ask("nobody")
    assert server.asked[0].body["messages"][-1]["content"] == '{"User Safety": "'
    with pytest.raises(Blocked) as caught:
        ask("nobody is EVIL")
    verdict = caught.value.verdict
    assert (verdict.scores.backend, verdict.degraded) == (f"127.0.0.1:{server.port}", False)
    server.stop()
    with pytest.raises(Blocked) as caught:
        ask("nobody else")
    assert caught.value.verdict.degraded
    assert "nothing accepts connections" in caught.value.verdict.reason
    assert ask("bread and salt")
