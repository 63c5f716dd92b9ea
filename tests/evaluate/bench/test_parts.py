"""Percentiles, prompts, costs, traffic, noise and exponents are what they say they are."""

from __future__ import annotations

import gzip
import json
import os
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from guardmw import Conversation, DataError, Guard, GuardmwError
from guardmw.backends.onnx import OnnxBackend
from guardmw.evaluate.bench import cost, machine, options, scaling, traffic
from guardmw.evaluate.bench.prompts import Prompts
from guardmw.evaluate.bench.times import Call, Clock, Latency
from guardmw.testing import KeywordBackend, ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import MakeArtefact
    from tests.evaluate.bench.conftest import Time


def calls(count: int) -> list[Call]:
    """That took 1 ms, 2 ms and so on."""
    return [Call((at + 1) / 1000, "one", degraded=at == 0) for at in range(count)]


# Latency


def test_percentiles_are_told_where_there_are_calls_enough() -> None:
    """With fewer, the p99 would be the slowest call."""
    assert Latency.of([]) == Latency(0, None, None, None, None)
    few, more, many = (Latency.of(calls(count)) for count in (19, 99, 101))
    assert (few.p50_ms, few.p95_ms, few.p99_ms) == (pytest.approx(10), None, None)
    assert (more.p95_ms, more.p99_ms) == (pytest.approx(94.1), None)
    assert (many.p95_ms, many.p99_ms, many.mean_ms) == pytest.approx((96, 100, 51))
    assert (many.calls, many.degraded) == (101, 1)


# Prompts


@pytest.mark.parametrize("length", [1, 32, 513])
def test_prompts_have_the_tokens_asked_for(length: int) -> None:
    """A word is a token or more; the length is not exceeded, but by a first word."""
    single = Prompts(lambda text: len(text.split()))
    assert {len(text.split()) for text in islice(single.of(length), 20)} == {length}
    double = Prompts(lambda text: 2 * len(text.split()))
    assert {len(text.split()) for text in islice(double.of(length), 20)} == {max(length // 2, 1)}


def test_prompts_have_words_where_nobody_counts_tokens() -> None:
    """And say so."""
    prompts = Prompts()
    assert prompts.unit == "words"
    assert len(next(prompts.of(32)).split()) == 32


def test_prompts_have_the_characters_asked_for() -> None:
    """To the letter."""
    prompts = Prompts()
    assert [len(next(prompts.characters(length))) for length in (1, 250, 64_000)] == [1, 250, 64_000]


def test_no_two_prompts_are_alike() -> None:
    """A memory of verdicts must not pass for speed, in one measurement or from one to the next."""
    prompts = Prompts()
    texts = [*islice(prompts.of(32), 2_000), *islice(prompts.of(32), 2_000)]
    assert len(set(texts)) == 4_000


def test_the_embedded_models_tokenizer_counts(artefact: MakeArtefact) -> None:
    """Without the tokens that are put around a text."""
    backend = OnnxBackend(artefact())
    assert [backend.tokens(text) for text in ("bread", "bread evil", "")] == [1, 2, 0]
    assert Prompts(backend.tokens).unit == "tokens"


# Cost


@pytest.mark.parametrize(("usd", "p95_ms"), [(15.54, 255.75), (46.93, 772.33)])
def test_published_costs_follow_from_the_formula(usd: float, p95_ms: float) -> None:
    """At the price and concurrency published, from a p95 that is derived: the publisher does not tell it."""
    assert usd in cost.PUBLISHED.values()
    assert cost.assumed_p95_ms(usd) == pytest.approx(p95_ms, abs=0.01)
    assert cost.per_million(cost.H200, p95_ms) == pytest.approx(usd, abs=0.001)


def test_cost_goes_by_the_p95_and_by_the_throughput() -> None:
    """An hour of 3,600 requests a second is 12.96 million."""
    found = cost.cost(3.6, 160.0, 3_600.0)
    assert (found.by_p95, found.by_throughput) == (pytest.approx(10.0), pytest.approx(3.6 / 12.96))
    assert cost.cost(3.6, None, None) == cost.Cost(3.6, None, None)


# Traffic


def test_traffic_is_read_in_an_order_of_its_own(tmp_path: Path) -> None:
    """The same every time, so that a part of it is a fair sample; gzip'd or not, blank lines passed over."""
    lines = [json.dumps(f"text {at}") for at in range(50)]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("\n\n".join(lines), encoding="utf-8")
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = [one.trial for one in traffic.read(plain)]
    assert found == [one.trial for one in traffic.read(packed)]
    assert sorted(found) == sorted(f"text {at}" for at in range(50))
    assert found != [f"text {at}" for at in range(50)]


@pytest.mark.parametrize(
    ("content", "told"), [("", "no conversations"), ('"one"\n{"secret": 1}', "line 2"), ('"a"\nsecret', "line 2")]
)
def test_traffic_that_is_none_is_told_without_a_word_of_it(tmp_path: Path, content: str, told: str) -> None:
    """By file and line."""
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=told) as failure:
        traffic.read(path)
    assert "secret" not in str(failure.value)


def test_traffic_that_breaks_off_is_told(tmp_path: Path) -> None:
    """A file that was not copied to its end."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'"one"\n' * 100)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        traffic.read(path)


def test_what_the_quickest_did_not_judge_was_escalated() -> None:
    """Whoever judges second waits for the first, so the first is the quickest; a failure is nobody's."""
    some = [Call(0.002, "cheap", degraded=False)] * 6 + [Call(0.5, "careful", degraded=False)] * 2
    found = traffic.told([Conversation.of("four")] * 9, [*some, Call(0.1, "", degraded=True)])
    assert list(found.judges) == ["cheap", "", "careful"]
    assert found.escalated == pytest.approx(0.25)
    assert found.judges["careful"].share == pytest.approx(2 / 9)
    assert found.judges["careful"].latency.p50_ms == pytest.approx(500)
    assert (found.conversations, found.characters, found.latency.degraded) == (9, (4, 4), 1)
    assert traffic.told([Conversation.of("a")], some[:3]).escalated is None


# The machine


def test_noise_is_the_spread_of_work_that_is_always_the_same() -> None:
    """Ten times a second, and once two; half of the time somebody else had the processor."""
    wall, own = ([float(at) for at in ticks] for ticks in ([0, 1] * 10 + [0, 2] * 2, [0, 0.5] * 10 + [0, 1] * 2))
    now, cpu = iter(wall), iter(own)
    spins = machine.Spins(Clock(lambda: next(now), lambda: next(cpu)))
    for _ in range(12):
        spins.spin()
    found = spins.noise()
    assert (found.spins, found.spin_ms, found.idle) == (12, 1_000, 0.5)
    assert found.spread == pytest.approx(0.9)
    assert found.told == "very noisy"


@pytest.mark.parametrize(("spread", "told"), [(0.05, "quiet"), (0.3, "noisy"), (3.0, "very noisy")])
def test_noise_has_a_word(spread: float, told: str) -> None:
    """For who does not know what to make of a number."""
    assert machine.Noise(9, 1.0, spread, 0.0, None).told == told


def test_a_system_without_a_load_has_none(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "getloadavg", raising=False)
    spins = machine.Spins(time.clock)
    spins.spin()
    assert spins.noise().load is None


def test_a_fresh_process_tells_what_a_start_costs(artefact: MakeArtefact, time: Time, tmp_path: Path) -> None:
    """One where there is no time for more."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("threshold: 0.9", encoding="utf-8")
    found = machine.cold(f"onnx:{artefact()}", str(policy), 0.0, time.clock)
    assert found is not None
    assert found.runs == 1
    assert min(found.import_s, found.load_s, found.first_ms) > 0
    if found.resident_mb is not None:
        assert found.peak_mb is not None
        assert 1 < found.resident_mb <= found.peak_mb


def test_a_start_that_fails_has_no_figures(time: Time) -> None:
    """The same failure is told where the guard itself is made."""
    assert machine.cold("no-such-backend", None, 0.0, time.clock) is None


# How cost grows


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_the_power_that_cost_goes_by(power: float) -> None:
    """Whatever it is a multiple of."""
    sizes = [1, 4, 16, 64]
    assert scaling.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_two_sizes_or_no_time_have_no_exponent() -> None:
    """A line goes through any two points."""
    assert scaling.exponent([1, 2], [1.0, 2.0]) is None
    assert scaling.exponent([1, 2, 3], [0.0, 0.0, 0.0]) is None


def growth(time: Time, cost_of: Callable[[int], float]) -> scaling.Growth:
    """Something that takes time by its size."""

    def steps(size: int) -> Iterator[Callable[[], object]]:
        while True:
            yield lambda: time.passes(cost_of(size))

    return scaling.Growth("squares", "sides", (1, 10, 100, 1_000), steps, model=False)


def test_a_curve_ends_where_it_would_take_too_long(time: Time) -> None:
    """Going by the size before: 100 squared is still affordable, 1,000 squared is not."""
    began = time.wall
    found = scaling.measured(growth(time, lambda size: size**2 / 10_000), 30.0, time.clock)
    assert (found.sizes, found.ms) == ([1, 10, 100], pytest.approx([0.1, 10.0, 1_000.0]))
    assert found.exponent == pytest.approx(2.0)
    assert found.last == pytest.approx(2.0)
    assert time.wall - began < 30


def test_a_fixed_cost_weighs_least_at_the_end(time: Time) -> None:
    """So the end tells more of what is to come."""
    found = scaling.measured(growth(time, lambda size: 0.01 + size / 1_000), 1e9, time.clock)
    assert found.exponent is not None
    assert found.last is not None
    assert found.exponent < found.last < 1


def test_the_quickest_counts(time: Time) -> None:
    """What disturbs a call only ever makes it longer."""
    times = iter([9.0, 3.0, 2.0, 5.0])
    found = scaling.measured(growth(time, lambda _: next(times, 2.5)), 60.0, time.clock)
    assert found.ms[0] == pytest.approx(2_000)


def test_every_growth_can_be_measured() -> None:
    """Two steps of each smallest size, and a backend that notes whether it was asked."""
    backend = ScriptedBackend([0.1] * 100)
    guard = Guard(backend)
    for one in scaling.growths(guard, Prompts(), 8):
        before = len(backend.asked)
        for step in islice(one.steps(one.sizes[1]), 2):
            step()
        assert (len(backend.asked) > before) == one.model, one.name
    assert {4, 1} == set(backend.batches)


@pytest.mark.parametrize("size", [10, 100])
def test_a_memory_is_full_and_half_of_what_it_is_asked_is_known(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """At every call that counts, even where the memory has turned over since: else sizes would not do the same work."""
    asked: list[int] = []

    class Noting(KeywordBackend):
        def classify(self, conversations):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            asked.append(len(conversations))
            return super().classify(conversations)

    monkeypatch.setattr(scaling, "KeywordBackend", Noting)
    growths = scaling.growths(Guard(KeywordBackend({})), Prompts(), 8)
    (memory,) = (one for one in growths if one.name == "memory")
    for step in islice(memory.steps(size), scaling._CALLS + 1):
        step()
    assert asked == [size, *[1] * (scaling._CALLS + 1)]


def test_streams_come_out_whole() -> None:
    """All that was held has been judged and let go."""
    judged: list[str] = []

    class Noting(KeywordBackend):
        def classify(self, conversations):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            judged.extend(one.trial for one in conversations)
            return super().classify(conversations)

    scaling._streams(Guard(Noting({})), ["One sentence. Another one.", "A third."])()
    assert {"A third."} <= set(judged)
    assert any("Another one." in text for text in judged)


# Options


def test_options_are_read() -> None:
    """In any order, and each number once."""
    found = options.settings(lengths="64, 8,8", concurrency="16,1", price="3.5", seconds="0.5")
    assert (found.lengths, found.concurrencies, found.price, found.seconds) == ((8, 64), (1, 16), 3.5, 0.5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lengths": "0"}, "--lengths"),
        ({"lengths": "many"}, "--lengths"),
        ({"lengths": ""}, "--lengths"),
        ({"lengths": "1000000"}, "20,000"),
        ({"concurrency": "-1"}, "--concurrency"),
        ({"price": "free"}, "--price"),
        ({"price": "0"}, "--price"),
        ({"price": "1", "concurrency": "1,2"}, "add 16"),
        ({"seconds": "inf"}, "--seconds"),
        ({"seconds": "nan"}, "--seconds"),
    ],
)
def test_options_that_mean_nothing_are_errors(given: dict[str, str], told: str) -> None:
    """That name the option and what it takes."""
    known: dict[str, str | None] = {"lengths": "8", "concurrency": "1,16", "price": None, "seconds": "1"}
    with pytest.raises(GuardmwError, match=told):
        options.settings(**(known | given))  # type: ignore[arg-type]
