"""A run ends by itself, shares out its time, says what it left out, and repeats no text in any form it is told in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import Conversation, Guard, terminal
from guardmw.evaluate.bench import machine, page, run, scaling
from guardmw.evaluate.bench.machine import Cold
from guardmw.evaluate.bench.run import Benchmark, Budget, Settings, benchmark
from guardmw.evaluate.bench.times import Clock
from guardmw.testing import KeywordBackend, ScriptedBackend
from tests.evaluate.bench.conftest import Slow
from tests.evaluate.test_page import KNOWN, Reader

if TYPE_CHECKING:
    from guardmw import Backend
    from tests.evaluate.bench.conftest import Time

SETTINGS = Settings(lengths=(8, 16, 32), concurrencies=(1, 4, 16), seconds=60.0, price=3.5)
COLD = Cold(3, 1.5, 0.2, 0.8, 12.5, 150.0, 160.0)
TRAFFIC = [Conversation.of(f"SECRET {'DOUBT' if at % 4 == 0 else 'plain'} {at}") for at in range(200)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of three small sizes, and few calls: work of guardmw's own takes no time here, but the test's."""
    every = scaling.growths

    def few(*given: Any) -> list[scaling.Growth]:
        return [one._replace(sizes=one.sizes[:3]) for one in every(*given)]

    monkeypatch.setattr(scaling, "growths", few)
    monkeypatch.setattr(scaling, "_CALLS", 2)
    monkeypatch.setattr(machine, "_SPINS", 10)
    monkeypatch.setattr(run, "_CALLS", 200)
    monkeypatch.setattr(run, "_ARRIVALS", 200)


def of(time: Time, backend: Backend, settings: Settings = SETTINGS) -> Benchmark:
    """A run on a scripted clock."""
    return benchmark(Guard(backend), settings, clock=time.clock, loop=time.loop)


def two(text: str) -> tuple[float, str]:
    """As a cascade does: what is in doubt takes longer, and somebody else judges it."""
    return (0.2, "careful") if "DOUBT" in text else (0.01, "cheap")


def test_a_run_has_every_part(time: Time) -> None:
    """In about the time given."""
    began = time.wall
    found = of(time, Slow(time, two), replace(SETTINGS, cold=COLD))
    assert list(found.lengths) == [8, 16, 32]
    assert [one.concurrency for one in found.closed] == [1, 4, 16]
    assert [one.load for one in found.open] == [0.25, 0.5, 0.75, 0.9]
    assert [one.name for one in found.scaling] == [
        "text", "conversation", "batch", "tool rules", "memory", "stream", "streams at once",
    ]  # fmt: skip
    assert (found.unit, found.asked, found.left_out, found.cold) == ("words", "16 words", [], COLD)
    assert time.wall - began == found.seconds < 60
    # Nobody queues behind anybody here.
    assert found.closed[-1].latency.p50_ms == pytest.approx(10)
    assert found.per_second is not None
    assert found.per_second == pytest.approx(1_600, rel=0.05)
    assert found.open[0].rate == pytest.approx(found.per_second / 4)
    assert found.cost is not None
    assert found.cost.by_p95 == pytest.approx(3.5 / 3600 * 0.01 / 16 * 1e6)


def test_an_instant_backend_ends_too(time: Time) -> None:
    """By the number of calls, as the clock stands still; nothing is divided by no time."""
    found = of(time, KeywordBackend({}))
    assert {one.calls for one in found.lengths.values()} == {200}
    assert (found.open, found.per_second) == ([], None)
    assert found.cost is not None
    assert found.cost.by_throughput is None
    assert found.degraded == (0, 600 + sum(one.latency.calls for one in found.closed))
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_slow_backend_leaves_things_out_and_says_so(time: Time) -> None:
    """No call is begun when time is up; what was measured stands."""
    began = time.wall
    found = of(time, Slow(time, lambda _: (25.0, "slow")))
    assert time.wall - began < 60 + 2 * 25
    assert found.lengths[8].calls == 1
    assert "streams at once" in found.left_out
    assert "16 at once" in found.left_out
    assert found.closed == []


def test_time_is_shared_by_weight() -> None:
    """Who is done early leaves more to those behind, and who is late leaves nothing."""
    now = [0.0]
    budget = Budget(100.0, 1.0, Clock(lambda: now[0]))
    budget.weigh(4.0)
    assert budget.share(1.0) == 25.0
    now[0] = 10.0
    assert budget.share(2.0) == 60.0
    now[0] = 101.0
    assert budget.share(1.0) == 0.0


def test_traffic_tells_who_judged(time: Time) -> None:
    """A quarter of it is in doubt; the callers ask it too."""
    backend = Slow(time, two)
    found = of(time, backend, replace(SETTINGS, conversations=TRAFFIC))
    assert found.traffic is not None
    assert found.asked == "traffic"
    assert found.traffic.latency.calls > 50
    assert found.traffic.escalated == pytest.approx(found.traffic.judges["careful"].share)
    assert 0.15 < found.traffic.judges["careful"].share < 0.35
    assert found.traffic.judges["careful"].latency.p50_ms == pytest.approx(200)
    assert found.closed[0].latency.p95_ms == pytest.approx(200)


@pytest.mark.parametrize("backend", [KeywordBackend({}), ScriptedBackend([])])
@pytest.mark.parametrize("conversations", [[], TRAFFIC])
def test_no_text_is_repeated(
    time: Time, backend: Backend, conversations: list[Conversation], capsys: pytest.CaptureFixture[str]
) -> None:
    """In JSON, on the page, in the table and in the repr, whether the backend answers or not."""
    found = of(time, backend, replace(SETTINGS, conversations=conversations, seconds=2.0))
    terminal.print_benchmark(found)
    told = [json.dumps(found.to_dict()), page.benchmark(found), capsys.readouterr().out, repr(found)]
    assert not any("SECRET" in one for one in told)
    assert all(backend.name in one for one in told)


def test_failures_are_counted(time: Time) -> None:
    """So that nobody takes the speed of a failure for that of a guard."""
    failed, calls = of(time, ScriptedBackend([]), replace(SETTINGS, seconds=2.0)).degraded
    assert failed == calls > 0


def test_json_has_every_figure(time: Time) -> None:
    """Under names that the documentation gives."""
    found = of(time, Slow(time, two), replace(SETTINGS, conversations=TRAFFIC, cold=COLD))
    told: dict[str, Any] = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(told) == [
        "backend", "policy", "seconds", "facts", "noise", "cold", "resident_mb", "unit", "lengths", "asked", "closed",
        "open", "per_second", "per_core", "traffic", "scaling", "cost", "left_out",
    ]  # fmt: skip
    assert told["lengths"]["8"].keys() == {"calls", "mean_ms", "p50_ms", "p95_ms", "p99_ms", "degraded"}
    assert told["closed"][0].keys() == {"concurrency", "latency", "per_second", "per_core", "unfinished"}
    assert told["open"][0].keys() == {"load", "rate", "latency", "per_second", "late_ms", "most", "unfinished"}
    assert told["traffic"].keys() == {"conversations", "characters", "latency", "judges", "escalated"}
    assert told["scaling"][0].keys() == {"name", "unit", "model", "sizes", "ms", "exponent", "last"}
    assert told["cost"].keys() == {"price", "by_p95", "by_throughput", "published", "concurrency"}
    assert told["noise"].keys() == {"spins", "spin_ms", "spread", "idle", "load", "told"}
    assert told["cold"]["runs"] == 3


def test_the_page_stands_alone_and_has_a_plot_for_each_part(time: Time) -> None:
    """Lengths, callers, throughput, arrivals, traffic, and one for each growth."""
    found = of(time, Slow(time, two), replace(SETTINGS, conversations=TRAFFIC, cold=COLD))
    read = Reader(page.benchmark(found))
    assert {tag for tag, _ in read.tags} <= KNOWN
    assert sum(tag == "svg" for tag, _ in read.tags) == 5 + len(found.scaling)
    for said in ("A fresh process", "Traffic", "Cost of a million requests", "How cost grows", "careful"):
        assert read.says(said), said


def test_a_page_of_almost_nothing_is_one_too(time: Time) -> None:
    """Where there was time for the first length only."""
    found = of(time, Slow(time, lambda _: (90.0, "slow")), replace(SETTINGS, price=None))
    read = Reader(page.benchmark(found))
    assert any("No time was left for" in text for text in read.texts)
    assert not read.says("How cost grows")


def test_the_table_has_every_part(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    """And the words to read it by."""
    found = of(time, Slow(time, two), replace(SETTINGS, conversations=TRAFFIC, cold=COLD))
    terminal.print_benchmark(found)
    out = capsys.readouterr().out
    for said in ("machine quiet", "a fresh process: 1.50 s", "4 callers", "25% of it", "careful", "escalated:",
                 "MiniGuard v0.1", "46.93", "streams at once *"):  # fmt: skip
        assert said in out, said
