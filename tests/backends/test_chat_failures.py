"""Whatever goes wrong between a guard and its server: nothing unread is let through, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import random
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from guardmw import BackendError, BackendUnavailable, Conversation, Guard
from guardmw.backends import _completions
from guardmw.backends._http import Address, Http
from guardmw.backends.chat import ChatBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guardmw import Verdict

TEXT = "a text that nobody is to read"
KEY = "sk-not-to-be-seen"
BODY = "words of the server"
DEADLINE = 0.3
# Of a busy machine; what is slower than this waits for something else than its deadline.
GRACE = 30.0


class Failure(NamedTuple):
    """What goes wrong, and what comes of it.

    Attributes:
        reason: what the verdict says, in part.
        tries: requests that the server saw; None where it sees none.
    """

    set_up: Callable[[Any, Any], None]
    reason: str
    tries: int | None = 1
    at: str = "http://127.0.0.1"


def wire(given: bytes, *, then: str = "close", pause: float = 0.0) -> Any:
    """Raw bytes, and then the connection closed, reset or left as it is; or a byte every so often."""

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(given), 1 if pause else max(len(given), 1)):
            writer.write(given[at : at + 1] if pause else given)
            await writer.drain()
            await asyncio.sleep(pause)
        if then == "hang":
            await seen.reader.read(1)
        if then == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.close()

    return behave


def said(status: int, headers: dict[str, str] | None = None) -> Callable[[Any, Any], None]:
    """An answer with a status, whose body quotes what was sent."""

    def set_up(server: Any, fake: Any) -> None:
        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            body = {"error": {"message": f"{BODY}: {seen.text} {seen.headers.get('authorization')}"}}
            writer.write(fake.whole(status, body, headers))

        server.behave = behave

    return set_up


def body(given: object) -> Callable[[Any, Any], None]:
    """A body that comes with success."""

    def set_up(server: Any, fake: Any) -> None:
        server.behave = fake.answering(200, given(fake) if callable(given) else given)

    return set_up


def behaving(behave: Any) -> Callable[[Any, Any], None]:
    """Something that happens on the wire."""

    def set_up(server: Any, fake: Any) -> None:
        server.behave = behave

    return set_up


def choice(**changed: Any) -> Callable[[Any], Any]:
    """A completion that says safe, with something about it changed."""

    def make(fake: Any) -> Any:
        made = fake.completion("safe", {"safe": -0.01, "unsafe": -4.6})
        made["choices"][0] |= changed
        return made

    return make


def no_dns(server: Any, fake: Any) -> None:
    """No name is known."""

    def lost(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    fake.patch.setattr(socket, "getaddrinfo", lost)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKS = b"transfer-encoding: chunked\r\n\r\n"
SLOWLY = HEAD + b"content-length: 9000\r\n\r\n" + b" " * 9000
BOTH = "safe unsafe"
SECRETS = (TEXT, KEY, BODY, BOTH)
FAILURES = {
    "connection refused": Failure(lambda server, fake: server.stop(), "nothing accepts connections", None),
    "DNS failure": Failure(no_dns, "its name cannot be resolved", None, "http://guard.invalid"),
    "TLS error": Failure(lambda server, fake: None, "no TLS there", None, "https://127.0.0.1"),
    "301": Failure(said(301, {"location": "http://192.0.2.1/"}), "answers 301"),
    "400": Failure(said(400), "answers 400"),
    "401": Failure(said(401), "does not take the API key"),
    "404, a wrong model name": Failure(said(404), "no such model"),
    "429": Failure(said(429), "answers 429", 3),
    "429 with Retry-After": Failure(said(429, {"retry-after": "0"}), "answers 429", 3),
    "429 with a long Retry-After": Failure(said(429, {"retry-after": "86400"}), "no time to try again"),
    "500": Failure(said(500), "answers 500", 3),
    "503": Failure(said(503), "answers 503", 3),
    "hang": Failure(behaving(wire(b"", then="hang")), "no answer in 0.3 s"),
    "hang in the middle": Failure(behaving(wire(SLOWLY[:200], then="hang")), "no answer in 0.3 s"),
    "slow drip of headers": Failure(behaving(wire(SLOWLY, pause=0.02)), "no answer in 0.3 s"),
    "slow drip of the body": Failure(
        behaving(wire(HEAD + CHUNKS + b"1\r\n \r\n" * 999, pause=0.001)), "no answer in 0.3 s"
    ),
    "no answer at all": Failure(behaving(wire(b"")), "the connection broke", 3),
    "reset": Failure(behaving(wire(b"", then="reset")), "the connection broke", 3),
    "reset in the middle": Failure(behaving(wire(SLOWLY[:200], then="reset")), "the connection broke", 3),
    "cut in the middle": Failure(behaving(wire(SLOWLY[:200])), "the connection broke", 3),
    "no HTTP": Failure(behaving(wire(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")), "the connection broke", 3),
    "empty body": Failure(body(b""), "no JSON"),
    "truncated JSON": Failure(body(b'{"choices": [{"message": {"content": "sa'), "no JSON"),
    "nested JSON": Failure(body(b"[" * 200_000), "no JSON"),
    "another form": Failure(body({"detail": BODY}), "no single choice"),
    "a list": Failure(body([BODY]), "no single choice"),
    "empty choices": Failure(body({"choices": []}), "no single choice"),
    "two choices": Failure(body({"choices": [{}, {}]}), "no single choice"),
    "a number for text": Failure(body(choice(message={"content": 1})), "text is none"),
    "no message": Failure(body(choice(message=[])), "text is none"),
    "aborted": Failure(body(choice(finish_reason="abort")), "broken off"),
    "filtered": Failure(body(choice(finish_reason="content_filter")), "broken off"),
    "empty text": Failure(body(choice(message={"content": None})), "cannot be read"),
    "missing logprobs": Failure(body(choice(logprobs=None)), "cannot be read"),
    "logprobs of another form": Failure(body(choice(logprobs={"content": [1]})), "logprobs are not of the form"),
    "logprobs of no token": Failure(body(choice(logprobs={"content": [{"logprob": -1}]})), "logprobs are not of"),
    "logprobs that are none": Failure(
        body(choice(logprobs={"content": [{"token": "safe", "logprob": float("nan")}]})), "no logarithms"
    ),
    "safe and unsafe both": Failure(body(choice(message={"content": BOTH})), "says both safe and unsafe"),
    "10 MB": Failure(body(b'{"choices": [{"message": {"content": "safe"}}], "more": "' + b" " * 10**7), "than 4 MiB"),
    "10 MB without a length": Failure(
        behaving(wire(HEAD + CHUNKS + (b"80000\r\n" + b" " * 2**19 + b"\r\n") * 20 + b"0\r\n\r\n")), "than 4 MiB"
    ),
    "10 MB with a refusal": Failure(
        lambda server, fake: setattr(server, "behave", fake.answering(400, b" " * 10**7)), "answers 400"
    ),
    "compressed": Failure(
        lambda server, fake: setattr(server, "behave", fake.answering(200, b"", {"content-encoding": "gzip"})),
        "compressed",
    ),
}
every_failure = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
both_ways = pytest.mark.parametrize("way", ["sync", "async"])


def screen(guard: Guard, way: str, text: str = TEXT) -> Verdict:
    """One verdict, either way."""
    return guard.screen(text) if way == "sync" else asyncio.run(guard.ascreen(text))


@pytest.fixture(autouse=True)
def _no_time_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of it passes on a busy machine."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01 * low)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No thread; with it no loop, and no task on it."""
    before = set(threading.enumerate())
    yield
    assert {thread for thread in threading.enumerate() if thread.name.startswith("guardmw")} <= before


@pytest.fixture
def _logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No log repeats what none may, as operators set it up."""
    caplog.set_level(logging.INFO)
    yield
    assert not any(secret in caplog.text for secret in SECRETS)


@pytest.fixture
def backend(server: Any, fake: Any) -> Iterator[Callable[..., ChatBackend]]:
    """Makes backends for the server, and closes them."""
    with contextlib.ExitStack() as closed:

        def make(at: str = "http://127.0.0.1", **changed: Any) -> ChatBackend:
            url = server.url.replace("http://127.0.0.1", at)
            settings: dict[str, Any] = {"dialect": fake.OneWord(), "api_key": KEY, "deadline": DEADLINE}
            made = ChatBackend(url, **(settings | {"model": fake.MODEL} | changed))
            closed.callback(made.close)
            return made

        yield make


@both_ways
@every_failure
@pytest.mark.usefixtures("_logged")
def test_a_failure_lets_nothing_through(server: Any, fake: Any, backend: Any, failure: Failure, way: str) -> None:
    """The verdict blocks, in time, says why without a word of the text, the key or the server, and holds no socket."""
    made = backend(failure.at, deadline=DEADLINE if failure.reason.startswith("no answer") else 60.0)
    failure.set_up(server, fake)
    started = time.monotonic()
    verdict = screen(Guard(made), way)
    assert time.monotonic() - started < DEADLINE + GRACE
    assert (verdict.action, verdict.degraded, verdict.scores) == ("block", True, None)
    assert failure.reason in verdict.reason
    assert verdict.reason.startswith(f"{made.name}: ") or fake.MODEL in verdict.reason
    if failure.tries is not None:
        assert len(server.asked) == failure.tries
    for told in (verdict.to_json(), repr(made), repr(vars(made))):
        assert not any(secret in told for secret in SECRETS)
    made.close()
    assert_idle(server)


def assert_idle(server: Any) -> None:
    """The server, too, sees that every connection is closed."""
    until = time.monotonic() + GRACE
    while server.open and time.monotonic() < until:
        time.sleep(0.005)
    assert server.open == 0


@both_ways
@every_failure
def test_a_failure_raises_nothing_else(server: Any, fake: Any, backend: Any, failure: Failure, way: str) -> None:
    """BackendError, and what it stands for, which may hold the text, is not behind it."""
    made = backend(failure.at, deadline=DEADLINE if failure.reason.startswith("no answer") else 60.0)
    failure.set_up(server, fake)
    given = [Conversation.of(TEXT), Conversation.of("another")]
    with pytest.raises(BackendError, match=failure.reason) as caught:
        made.classify(given) if way == "sync" else asyncio.run(made.aclassify(given))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@both_ways
def test_a_handshake_that_is_cancelled_leaves_nothing_open(fake: Any, way: str) -> None:
    """Of a server that never answers the first word of TLS, at once and without the collector."""
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as ended:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        made = ChatBackend(url, model=fake.MODEL, dialect=fake.OneWord(), deadline=DEADLINE)
        ended.callback(made.close)
        gc.disable()
        ended.callback(gc.enable)
        given = [Conversation.of(TEXT)]
        with pytest.raises(BackendError):
            made.classify(given) if way == "sync" else asyncio.run(made.aclassify(given))
        seen, _ = silent.accept()
        with seen:
            seen.settimeout(5.0)
            while seen.recv(2**16):
                pass


@both_ways
def test_a_server_that_comes_back_is_asked_again(server: Any, fake: Any, backend: Any, way: str) -> None:
    """A failure that passes is not seen."""
    left = [503, 429, 500]

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        if left:
            writer.write(fake.whole(left.pop(), {}))
        else:
            await fake.well(seen, writer)

    server.behave = behave
    assert screen(Guard(backend(retries=3, deadline=60.0)), way).action == "allow"
    assert len(server.asked) == 4


@both_ways
def test_a_server_may_restart_in_the_middle_of_a_run(server: Any, backend: Any, way: str) -> None:
    """What stood on old connections goes to new ones."""
    guard = Guard(backend(deadline=60.0))
    assert screen(guard, way).action == "allow"
    server.stop()
    server.start()
    assert screen(guard, way).action == "allow"
    server.stop()
    assert screen(guard, way).action == "block"
    server.start()
    assert [screen(guard, way, text).action for text in (TEXT, "EVIL")] == ["allow", "block"]


def test_a_busy_server_is_given_the_time_it_asks_for(
    server: Any, fake: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a little more, each caller another little."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    waits = []
    slept = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await slept(0)

    server.behave = fake.answering(429, {}, {"retry-after": "2"})
    made = backend(deadline=60.0)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert Guard(made).screen(TEXT).action == "block"
    assert [wait for wait in waits if wait] == [3.0, 3.0]


async def test_who_is_cancelled_leaves_nothing_under_way(server: Any, backend: Any) -> None:
    """Neither here nor at the server, and the connections are there for others."""
    server.behave = wire(b"", then="hang")
    made = backend(deadline=60.0, connections=2)
    guard = Guard(made)
    tasks = [asyncio.create_task(guard.ascreen(TEXT)) for _ in range(5)]
    while len(server.asked) < 2:  # noqa: ASYNC110 - the server is on another thread
        await asyncio.sleep(0.005)
    # Those that wait for a connection first: else one of them may be given it before its turn to be cancelled comes.
    for task in reversed(tasks):
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in done)
    assert len(server.asked) == 2
    server.behave = server.well
    assert (await guard.ascreen(TEXT)).action == "allow"


async def test_whoever_is_cancelled_at_any_moment_stands_in_nobodys_way(server: Any, fake: Any) -> None:
    """Before, while and after the one connection is made, sent on, and answered on."""
    http = Http(Address(f"{server.url}", "", "", connections=1, retries=0))
    body = _completions.encoded({"messages": [{"content": TEXT}]})
    for steps in range(80):
        task = asyncio.create_task(http.send("chat/completions", body, math.inf))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(GRACE):
            assert (await http.send("chat/completions", body, math.inf)).status == 200
    assert server.open <= 1
    await http.aclose()
    assert_idle(server)


async def test_a_timeout_of_the_caller_counts(server: Any, backend: Any) -> None:
    """Before the deadline."""
    server.behave = wire(b"", then="hang")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await Guard(backend(deadline=60.0)).ascreen(TEXT)


@both_ways
def test_closing_ends_calls_under_way(server: Any, backend: Any, way: str) -> None:
    """With a verdict, not with a cancellation that nobody asked for."""
    server.behave = wire(b"", then="hang")
    made = backend(deadline=60.0)
    verdicts: list[Verdict] = []
    caller = threading.Thread(target=lambda: verdicts.append(screen(Guard(made), way)))
    caller.start()
    while not server.asked:
        time.sleep(0.005)
    made.close()
    caller.join()
    assert [(one.action, "closed" in one.reason) for one in verdicts] == [("block", True)]
    server.behave = server.well
    assert screen(Guard(made), way).action == "allow"


def test_a_backend_that_is_forgotten_ends_its_thread(server: Any, fake: Any) -> None:
    """Without close."""
    made = ChatBackend(server.url, model=fake.MODEL, dialect=fake.OneWord(), name="forgotten")
    assert Guard(made).screen(TEXT).action == "allow"
    assert "guardmw forgotten" in [thread.name for thread in threading.enumerate()]
    del made
    assert "guardmw forgotten" not in [thread.name for thread in threading.enumerate()]
    assert_idle(server)


@both_ways
def test_the_deadline_is_for_the_whole_call(server: Any, fake: Any, backend: Any, way: str) -> None:
    """Many slow answers are not many deadlines."""

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        await fake.well(seen, writer)

    server.behave = behave
    made = backend(connections=1)
    given = [Conversation.of(f"{TEXT} {at}") for at in range(10)]
    with pytest.raises(BackendUnavailable, match=r"no answer in 0\.3 s \(deadline\)"):
        made.classify(given) if way == "sync" else asyncio.run(made.aclassify(given))
    assert len(server.asked) <= 4


def test_one_that_fails_ends_the_others(server: Any, fake: Any, backend: Any) -> None:
    """The batch has failed: nothing more of it is asked."""

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        if "bad" in seen.text:
            writer.write(fake.whole(200, {}))
        else:
            await seen.reader.read(1)

    server.behave = behave
    verdicts = Guard(backend(connections=4, deadline=60.0)).screen_many(["bad", *[TEXT] * 50])
    assert {verdict.action for verdict in verdicts} == {"block"}
    assert len(server.asked) <= 4


def test_ten_thousand_at_once_share_a_few_connections(server: Any, fake: Any, backend: Any) -> None:
    """Of a slow server; each is answered by its own answer, waits for little memory, and leaves none behind."""
    count, most = 10_000, [0]

    async def slowly(seen: Any, writer: asyncio.StreamWriter) -> None:
        server.seen.clear()
        answered[0] += 1
        if answered[0] % (count // 3) == 0:
            most[0] = max(most[0], objects())
        await asyncio.sleep(0.002)
        await fake.well(seen, writer)

    async def many(guard: Guard) -> list[Verdict]:
        asked = (guard.ascreen("EVIL" if at % 100 == 0 else f"{TEXT} {at}") for at in range(count))
        return await asyncio.gather(*asked)

    answered, server.behave = [0], slowly
    guard = Guard(backend(connections=16, deadline=3_600.0))
    asyncio.run(guard.ascreen(TEXT))
    before = objects()
    verdicts = asyncio.run(many(guard))
    assert [at for at, verdict in enumerate(verdicts) if verdict.action == "block"] == list(range(0, count, 100))
    assert not any(verdict.degraded for verdict in verdicts)
    assert server.most <= 16
    assert server.opened < 100
    assert 0 < most[0] - before < 200 * count
    del verdicts
    # Those of connections that are kept, however many asked.
    assert objects() - before < 4_000


def objects() -> int:
    """How much there is to collect."""
    gc.collect()
    return len(gc.get_objects())


def test_an_answer_of_any_bytes_is_no_surprise(server: Any, fake: Any, backend: Any) -> None:
    """A verdict each, and none that allows."""
    rng = random.Random(0)  # noqa: S311 - no secret
    good = json.dumps(fake.completion("safe", {"safe": -0.01, "unsafe": -4.6})).encode()
    guard = Guard(backend(deadline=60.0))
    for _ in range(100):
        bad = bytearray(good[: rng.randrange(len(good))])
        for _ in range(rng.randrange(4)):
            bad.insert(rng.randrange(len(bad) + 1), rng.randrange(256))
        server.behave = fake.answering(200, bytes(bad))
        verdict = guard.screen(TEXT)
        assert (verdict.action, verdict.degraded) == ("block", True)
