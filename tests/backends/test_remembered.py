"""What was said once is not asked again, failures are forgotten, and those who ask together ask once."""

from __future__ import annotations

import asyncio
import json
import socketserver
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from time import sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import BackendError, Conversation, Coverage, Scores, ToolCall, Turn
from guardmw.backends import remembered
from guardmw.backends.remembered import Remembered, Store
from guardmw.testing import KeywordBackend, ScriptedBackend, backend_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardmw import Backend

    Classify = Callable[[Backend, Sequence[Conversation]], list[Scores]]

both = pytest.mark.parametrize(
    "classify",
    [lambda b, c: b.classify(c), lambda b, c: asyncio.run(b.aclassify(c))],
    ids=["sync", "async"],
)

test_contract = backend_contract(lambda: Remembered(KeywordBackend({"bread": 0.9})))
test_contract_with_a_store = backend_contract(
    lambda: Remembered(KeywordBackend({"bread": 0.9}), size=2, store=Shelf(), fingerprint="1")
)


def texts(*given: str) -> list[Conversation]:
    """User turns."""
    return [Conversation.of(text) for text in given]


class Shelf:
    """A store in memory, that may fail."""

    def __init__(self, kept: dict[bytes, bytes] | None = None) -> None:
        self.kept = {} if kept is None else kept
        self.asked = 0
        self.fails = False

    def fetch(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """From the dict."""
        self.asked += 1
        if self.fails:
            raise ConnectionError("secret")
        return [self.kept.get(key) for key in keys]

    def keep(self, values: Mapping[bytes, bytes], seconds: float) -> None:
        """In the dict."""
        if self.fails:
            raise ConnectionError("secret")
        self.kept |= values


class Slow(ScriptedBackend):
    """Answers when it is let."""

    def __init__(self, script: Sequence[Scores | float | Exception]) -> None:
        super().__init__(script)
        self.begun = threading.Semaphore(0)
        self.let = threading.Event()

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """After a while."""
        self.begun.release()
        assert self.let.wait(30)
        return super().classify(conversations)

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """After a while."""
        self.begun.release()
        assert await asyncio.to_thread(self.let.wait, 30)
        return super().classify(conversations)


@both
def test_what_was_said_is_not_asked_again(classify: Classify) -> None:
    """Nor twice in one batch; and the answers stand at their places."""
    backend = ScriptedBackend([0.1, 0.2, 0.3])
    memory = Remembered(backend)
    assert [s.unsafe for s in classify(memory, texts("a", "b", "a"))] == [0.1, 0.2, 0.1]
    assert [s.unsafe for s in classify(memory, texts("b", "c", "a"))] == [0.2, 0.3, 0.1]
    assert [c.trial for c in backend.asked] == ["a", "b", "c"]


CALL = ToolCall("shell", {"cmd": "ls"}, id="1")
DISTINCT: list[Any] = [
    "ab",
    "a",
    Turn("assistant", "a"),
    Turn("document", "a"),
    [Turn("user", "a"), Turn("user", "b")],
    [Turn("user", "b"), Turn("user", "a")],
    [Turn("assistant", "a"), Turn("user", "b")],
    Turn("tool", "a", name="b"),
    Turn("tool", "a"),
    Turn("user", "a", media=("image",)),
    Turn("user", "a", media=("image", "image")),
    Turn("assistant", tool_calls=(CALL,)),
    Turn("assistant", tool_calls=(CALL, CALL)),
    Turn("assistant", tool_calls=(ToolCall("shell", '{"cmd": "ls"}'),)),
    Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": 'ls", "x": "y'}),)),
    Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": "ls", "x": "y"}),)),
    'a", "',
    "\ud83d",
]


def test_everything_that_is_judged_tells_conversations_apart() -> None:
    """Its context, who said it, in which order, and what came with it."""
    backend = ScriptedBackend([at / 100 for at in range(len(DISTINCT))])
    memory = Remembered(backend)
    given = [Conversation.of(one) for one in DISTINCT]
    assert len({s.unsafe for s in memory.classify(given)}) == len(given) == len(backend.asked)


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=3)), min_size=1), max_size=9)
)
def test_a_memory_changes_nothing(turns: list[list[tuple[Any, str]]]) -> None:
    """Whatever is asked, asked twice, the answers are the backend's."""
    backend = KeywordBackend({"a": 0.9, "0": 0.5})
    memory = Remembered(backend, size=3)
    given = [Conversation(tuple(Turn(*turn) for turn in one)) for one in turns]
    assert memory.classify(given) == memory.classify(given) == backend.classify(given)


def test_ids_of_calls_do_not_count() -> None:
    """They differ from run to run, and nobody judges them."""
    memory = Remembered(ScriptedBackend([0.5]))
    for id_ in ("1", "2"):
        call = ToolCall("shell", {"cmd": "ls"}, id=id_)
        assert memory.classify([Conversation.of(Turn("assistant", tool_calls=(call,)))])[0].unsafe == 0.5


def test_arguments_that_are_no_json_are_asked_each_time() -> None:
    """Two objects may print alike and be different."""
    call = Conversation.of(Turn("assistant", tool_calls=(ToolCall("shell", {"cmd": object()}),)))
    assert [s.unsafe for s in Remembered(ScriptedBackend([0.1, 0.2])).classify([call, call])] == [0.1, 0.2]


@pytest.mark.parametrize(
    "answer",
    [
        Scores(0.1, coverage=Coverage(1, 0)),
        Scores(0.1, degraded="down"),
        BackendError("down"),
    ],
)
@both
def test_what_may_be_better_next_time_is_not_remembered(classify: Classify, answer: Scores | Exception) -> None:
    """Not here, and not in a store."""
    shelf = Shelf()
    memory = Remembered(ScriptedBackend([answer, 0.2]), store=shelf, fingerprint="1")
    if isinstance(answer, Exception):
        with pytest.raises(BackendError, match="down"):
            classify(memory, texts("a"))
    else:
        assert classify(memory, texts("a")) == [answer]
    assert shelf.kept == {}
    assert classify(memory, texts("a"))[0].unsafe == 0.2


def test_the_longest_unasked_is_forgotten_first() -> None:
    """A memory has a size."""
    backend = ScriptedBackend([0.1, 0.2, 0.3, 0.4])
    memory = Remembered(backend, size=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        memory.classify(texts(text))
    assert [c.trial for c in backend.asked] == ["a", "b", "c", "b"]
    assert repr(memory) == "Remembered('scripted', 2 of 2)"


def test_what_is_old_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is everything, when asked to."""
    now = [0.0]
    monkeypatch.setattr(remembered, "monotonic", lambda: now[0])
    memory = Remembered(ScriptedBackend([0.1, 0.2, 0.3]), ttl=10)
    seen = []
    for now[0] in (0.0, 9.9, 10.0, 11.0):
        seen.append(memory.classify(texts("a"))[0].unsafe)
    assert seen == [0.1, 0.1, 0.2, 0.2]
    memory.forget()
    assert memory.classify(texts("a"))[0].unsafe == 0.3


def _ask(memory: Remembered, count: int) -> list[Any]:
    """The same question by threads and by tasks, all at once, and what each of them heard."""

    def sync(_: int) -> object:
        try:
            return memory.classify(texts("a"))[0].unsafe
        except BackendError as error:
            return str(error)

    async def tasks() -> list[object]:
        async def one() -> object:
            try:
                return (await memory.aclassify(texts("a")))[0].unsafe
            except BackendError as error:
                return str(error)

        return await asyncio.gather(*(one() for _ in range(count)))

    backend: Slow = memory._backend  # type: ignore[assignment]
    with ThreadPoolExecutor(count + 1) as pool:
        heard = pool.submit(lambda: asyncio.run(tasks()))
        assert backend.begun.acquire(timeout=30)
        threads = [pool.submit(sync, at) for at in range(count)]
        # They wait for the answer, one and all.
        flight = next(iter(memory._flights.values()))
        while len(flight._condition._waiters) < count:  # type: ignore[attr-defined]
            sleep(0.001)
        backend.let.set()
        return [thread.result(30) for thread in threads] + heard.result(30)


def test_those_who_ask_together_ask_once() -> None:
    """Threads and tasks alike."""
    backend = Slow([0.7])
    assert _ask(Remembered(backend), 4) == [0.7] * 8
    assert backend.batches == [1]


def test_those_who_ask_together_fail_together() -> None:
    """And the next one asks again."""
    backend = Slow([BackendError("down"), 0.7])
    memory = Remembered(backend)
    assert _ask(memory, 4) == ["down"] * 8
    assert backend.batches == [1]
    assert memory.classify(texts("a"))[0].unsafe == 0.7


def test_a_failure_of_a_batch_is_not_that_of_each_in_it() -> None:
    """Who waited for one of them asks again, alone."""
    backend = Slow([BackendError("down"), 0.7])
    memory = Remembered(backend)
    with ThreadPoolExecutor(2) as pool:
        batch = pool.submit(memory.classify, texts("poison", "a"))
        assert backend.begun.acquire(timeout=30)
        waiting = pool.submit(memory.classify, texts("a"))
        backend.let.set()
        with pytest.raises(BackendError, match="down"):
            batch.result(30)
        assert waiting.result(30)[0].unsafe == 0.7


def test_one_who_is_cancelled_leaves_the_question_to_the_next() -> None:
    """Nobody else hears of it."""

    async def main() -> None:
        backend = Slow([0.7])
        memory = Remembered(backend)
        first, *others = (asyncio.create_task(memory.aclassify(texts("a"))) for _ in range(4))
        assert await asyncio.to_thread(backend.begun.acquire, timeout=30)
        first.cancel()
        others[0].cancel()
        backend.let.set()
        heard = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(one) for one in heard[:2]] == [asyncio.CancelledError] * 2
        assert [one[0].unsafe for one in heard[2:]] == [0.7, 0.7]  # type: ignore[index]
        assert memory._flights == {}

    asyncio.run(main())


def test_a_call_that_blocks_the_event_loop_does_not_wait_for_a_task_on_it() -> None:
    """Both would wait for ever."""

    async def main() -> list[float]:
        backend = Slow([0.7, 0.8])
        memory = Remembered(backend)
        task = asyncio.create_task(memory.aclassify(texts("a")))
        assert await asyncio.to_thread(backend.begun.acquire, timeout=30)
        backend.let.set()
        return [memory.classify(texts("a"))[0].unsafe, (await task)[0].unsafe]

    assert asyncio.run(main()) == [0.7, 0.8]


@both
def test_a_store_remembers_for_other_processes(classify: Classify) -> None:
    """Of the same fingerprint, and with every detail."""
    shelf = Shelf()
    told = Scores(0.25, {"hate": 0.5}, 0.75, "model", Coverage(1, 1, 2, 0, ("image",)))
    assert classify(Remembered(ScriptedBackend([told]), store=shelf, fingerprint="1"), texts("a")) == [told]
    other = Remembered(ScriptedBackend([0.1]), store=shelf, fingerprint="1")
    assert classify(other, texts("a")) == classify(other, texts("a")) == [told]
    assert shelf.asked == 2
    assert classify(Remembered(ScriptedBackend([0.1]), store=shelf, fingerprint="2"), texts("a"))[0].unsafe == 0.1
    assert not any(key == b"a" for key in shelf.kept)


def kept(**given: object) -> bytes:
    """What a store holds of a safe text, with something wrong."""
    right = {"unsafe": 0.0, "categories": {}, "injection": 0.0, "backend": "", "coverage": None, "degraded": ""}
    return json.dumps(right | given).encode()


def covered(**given: object) -> dict[str, object]:
    """A full reading, with something wrong."""
    return {"characters": 1, "judged": 1, "windows": 1, "unreadable": 0, "media": []} | given


@pytest.mark.parametrize(
    "value",
    [
        kept(unsafe="0.0"),
        kept(unsafe=False),
        kept(unsafe=float("nan")),
        kept(unsafe=-1),
        kept(unsafe=None),
        kept(injection=False),
        kept(injection=[0]),
        kept(categories=[]),
        kept(categories={"hate": "0"}),
        kept(categories={"hate": None}),
        kept(backend=7),
        kept(degraded=0),
        kept(degraded=[]),
        kept(coverage=0),
        kept(coverage=""),
        kept(coverage=[]),
        kept(coverage=covered(characters="5", judged="9")),
        kept(coverage=covered(judged=None)),
        kept(coverage=covered(judged=True)),
        kept(coverage=covered(characters=-1)),
        kept(coverage=covered(media="audio")),
        b"[" * 100_000,
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"unsafe": 0.0}',
        b'{"unsafe": 7, "categories": {}, "injection": 0, "backend": "", "coverage": null, "degraded": ""}',
        b'{"unsafe": 0, "categories": {}, "injection": 0, "backend": "", "coverage": null, "degraded": "down"}',
        b'{"unsafe": 0, "categories": {}, "injection": 0, "backend": "", "coverage": null, "degraded": "", "x": 1}',
        b'{"unsafe": 0, "coverage": {"characters": 2, "judged": 1, "media": []}, "degraded": ""}',
        "no bytes",
        kept().decode(),
        7,
        0.0,
        {"unsafe": 0.0},
        Scores(0.0),
    ],
    ids=count(),
)
def test_what_is_no_full_reading_is_asked_again(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A store may hold anything; what it held is told without being quoted, and replaced."""
    shelf = Shelf()
    Remembered(KeywordBackend({}), store=shelf, fingerprint="1").classify(texts("a"))
    shelf.kept = dict.fromkeys(shelf.kept, value)
    assert Remembered(ScriptedBackend([0.7]), store=shelf, fingerprint="1").classify(texts("a"))[0].unsafe == 0.7
    assert [record.message for record in caplog.records] == ["1 of 1 kept verdicts are none, and asked for again"]
    assert Remembered(ScriptedBackend([]), store=shelf, fingerprint="1").classify(texts("a"))[0].unsafe == 0.7


def test_what_is_a_full_reading_is_not_asked_again() -> None:
    """As the one that the others are made of."""
    for value in (kept(), kept(unsafe=0), kept(coverage=covered(media=["audio"]))):
        shelf = Shelf()
        Remembered(KeywordBackend({}), store=shelf, fingerprint="1").classify(texts("a"))
        shelf.kept = dict.fromkeys(shelf.kept, value)
        assert Remembered(ScriptedBackend([]), store=shelf, fingerprint="1").classify(texts("a"))[0].unsafe == 0.0


@both
@pytest.mark.parametrize("values", [None, 7, [], [None] * 3, b"", "0", {}])
def test_a_store_that_answers_in_another_form_is_done_without(
    values: Any, classify: Classify, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two keys, neither has a value then."""
    shelf = Shelf()
    shelf.fetch = lambda keys: values  # type: ignore[method-assign]
    memory = Remembered(ScriptedBackend([0.7, 0.8]), store=shelf, fingerprint="1")
    assert [s.unsafe for s in classify(memory, texts("a", "b"))] == [0.7, 0.8]
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["no earlier verdicts for 5 s"]


@both
def test_scores_that_cannot_be_written_are_told_all_the_same(
    classify: Classify, caplog: pytest.LogCaptureFixture
) -> None:
    """They are the answer, and only not kept."""
    odd = Scores(np.float32(0.5))  # type: ignore[arg-type]
    memory = Remembered(ScriptedBackend([odd]), store=Shelf(), fingerprint="1")
    assert classify(memory, texts("a")) == [odd]
    assert [record.message for record in caplog.records] == ["no earlier verdicts for 5 s: store: TypeError"]


@both
def test_a_store_that_fails_is_done_without(
    classify: Classify, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of, and asked again only after a rest."""
    now = [0.0]
    monkeypatch.setattr(remembered, "monotonic", lambda: now[0])
    shelf = Shelf()
    shelf.fails = True
    memory = Remembered(ScriptedBackend([0.1, 0.2, 0.3]), store=shelf, fingerprint="1")
    assert classify(memory, texts("a"))[0].unsafe == 0.1
    assert classify(memory, texts("b"))[0].unsafe == 0.2
    assert shelf.asked == 1
    assert [record.message for record in caplog.records] == ["no earlier verdicts for 5 s: store: ConnectionError"]
    shelf.fails, now[0] = False, 6.0
    classify(memory, texts("c"))
    assert len(shelf.kept) == 1


def test_settings_that_make_no_sense_are_errors() -> None:
    """A store without a fingerprint would mix up models."""
    with pytest.raises(BackendError, match="fingerprint='NAME@REVISION'"):
        Remembered(KeywordBackend({}), store=Shelf())
    with pytest.raises(BackendError, match="size is at least 1"):
        Remembered(KeywordBackend({}), size=0)


class _Redis(socketserver.StreamRequestHandler):
    """As much of Redis as a store needs."""

    def handle(self) -> None:
        """One connection."""
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2])
            self.wfile.write(self._answer(*words))

    def _answer(self, command: bytes, *words: bytes) -> bytes:
        kept: dict[bytes, bytes] = self.server.kept  # type: ignore[attr-defined]
        if command == b"MGET":
            values = [kept.get(key) for key in words]
            told = [b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value) for value in values]
            return b"*%d\r\n%s" % (len(told), b"".join(told))
        if command == b"SET":
            key, value, px, milliseconds = words
            assert (px, milliseconds) == (b"PX", b"60000")
            kept[key] = value
            return b"+OK\r\n"
        return b"-ERR unknown command\r\n" if command == b"HELLO" else b"+OK\r\n"


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A fake server on this machine."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Redis)
    server.daemon_threads = True
    server.kept = {}  # type: ignore[attr-defined]
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


def test_redis_is_such_a_store(redis_url: str) -> None:
    """With the time to live that the memory has."""
    pytest.importorskip("redis")
    from guardmw.backends.redis import RedisStore

    store: Store = RedisStore(f"{redis_url}?protocol=2", timeout=10)
    first = Remembered(ScriptedBackend([0.3, 0.4]), store=store, fingerprint="1", ttl=60)
    second = Remembered(ScriptedBackend([0.5]), store=store, fingerprint="1", ttl=60)
    assert [s.unsafe for s in first.classify(texts("a", "b"))] == [0.3, 0.4]
    assert [s.unsafe for s in second.classify(texts("b", "c", "a"))] == [0.4, 0.5, 0.3]
    store.close()  # type: ignore[attr-defined]


def test_halves_of_a_surrogate_pair_are_not_the_character() -> None:
    """A model may be unable to read the one, and not the other."""
    backend = ScriptedBackend([0.1, 0.9])
    remembered = Remembered(backend)
    halves, whole = chr(0xD83D) + chr(0xDE00), "\U0001f600"
    scores = [remembered.classify([Conversation.of(text)])[0].unsafe for text in (halves, whole)]
    assert scores == [0.1, 0.9]
