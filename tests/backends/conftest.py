"""A server of completions on this machine that can be made to misbehave in every way."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from guardmw.dialects import Message, Reply, Request, Token
from guardmw.errors import BackendError
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from guardmw.conversation import Conversation
    from guardmw.dialects import Judging

    Behaviour = Callable[["Seen", asyncio.StreamWriter], Awaitable[None]]

MODEL = "acme/Guard-1"
TLS_HELLO = b"\x16"


class Seen:
    """One request that came."""

    def __init__(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        self.method, self.path, self.headers, self.raw = method, path, headers, raw
        self.body: Any = json.loads(raw) if raw else None
        self.reader: asyncio.StreamReader | None = None

    @property
    def text(self) -> str:
        """What is to be judged, with the instructions before it."""
        if "prompt" in self.body:
            return str(self.body["prompt"])
        return str(self.body["messages"][0]["content"])


def whole(status: int, body: object, headers: dict[str, str] | None = None) -> bytes:
    """An answer as it goes over the wire."""
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"content-type": "application/json", "content-length": str(len(given))} | (headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 {status} Told\r\n{lines}\r\n".encode() + given


def completion(text: str, logprobs: dict[str, float] | None = None, ended: str | None = "stop") -> dict[str, Any]:
    """A chat completion of one token; ``logprobs`` are of it and its alternatives."""
    told = None
    if logprobs is not None:
        others = [{"token": token, "logprob": p} for token, p in logprobs.items()]
        told = {"content": [{"token": text, "logprob": logprobs.get(text, -9.0), "top_logprobs": others}]}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "logprobs": told, "finish_reason": ended}]}


def judged(seen: Seen) -> dict[str, Any]:
    """What a guard model would say: unsafe where it reads EVIL."""
    evil = "EVIL" in seen.text
    logprobs = {"unsafe": -0.01, "safe": -4.61} if evil else {"safe": -0.01, "unsafe": -4.61}
    return completion("unsafe" if evil else "safe", logprobs)


class Server:
    """Listens on a port of its own; ``behave`` answers what is asked of the model.

    Attributes:
        template: shows a prompt as vLLM does, from messages and whether the last of them goes on; None where the server
            has no such thing.
        seen: requests, in order.
        opened: connections, ever.
        open: connections now.
        most: the most at one time.
    """

    def __init__(self) -> None:
        self.behave: Behaviour = well
        self.models: object = {"data": [{"id": MODEL}]}
        self.template: Callable[[Any, bool], str] | None = None
        self.seen: list[Seen] = []
        self.opened = self.open = self.most = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake server")
        self._thread.start()
        self._serving: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> list[Seen]:
        """Completions that were asked for."""
        return [seen for seen in self.seen if seen.path.endswith("completions")]

    async def well(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """Behave again."""
        await well(seen, writer)

    def start(self) -> None:
        """Listen, where it did before if it did."""
        self._listening = self._do(asyncio.start_server(self._connected, "127.0.0.1", self.port))
        self.port = self._listening.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Drop everything, as a process that dies does."""
        self._do(self._stop())

    def end(self) -> None:
        """Stop for good."""
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _shown(self, body: Any) -> bytes:
        if self.template is None:
            return whole(404, {})
        if "tokens" in body:
            return whole(200, {"prompt": "".join(map(chr, body["tokens"]))})
        assert body["add_generation_prompt"] is not body["continue_final_message"]
        return whole(200, {"tokens": [*map(ord, self.template(body["messages"], body["continue_final_message"]))]})

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _stop(self) -> None:
        # asyncio loses, and leaves open, whom it accepts in the turn in which it closes.
        for _ in range(5):
            await asyncio.sleep(0)
        self._listening.close()
        for writer in self._serving:
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Known before its task runs, which may be cancelled first.
        self._serving[writer] = self._loop.create_task(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            while not writer.is_closing():
                seen = await _request(reader)
                seen.reader = reader
                self.seen.append(seen)
                if seen.path == "/v1/models":
                    writer.write(whole(200, self.models))
                elif seen.path in ("/tokenize", "/detokenize"):
                    writer.write(self._shown(seen.body))
                else:
                    await self.behave(seen, writer)
                await writer.drain()
        except ValueError:
            writer.write(whole(400, {}))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            del self._serving[writer]
            writer.close()


async def _request(reader: asyncio.StreamReader) -> Seen:
    first = await reader.readexactly(1)
    if first == TLS_HELLO:
        raise ValueError("not HTTP")
    head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return Seen(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


async def well(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """As it should."""
    writer.write(whole(200, judged(seen)))


def answering(status: int, body: object, headers: dict[str, str] | None = None) -> Behaviour:
    """Always the same answer."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(status, body, headers))

    return behave


class OneWord:
    """A dialect of one token, safe or unsafe, scored by its logprobs; without them it does not answer."""

    name = "one-word"

    def __init__(self, **changed: Any) -> None:
        self.changed = {"max_tokens": 1, "top_logprobs": 20} | changed

    def judge(self, conversation: Conversation) -> Judging:
        """Ask once."""
        told = Message("user", f"Is this safe?\n{conversation.trial}")
        [reply] = yield [Request((told,), **self.changed)]
        return self.read(reply)

    def read(self, reply: Reply) -> Scores:
        """The score of the first token."""
        words = reply.text.split()
        if {"safe", "unsafe"} <= set(words):
            raise BackendError("the answer says both safe and unsafe")
        if not words or words[0] not in ("safe", "unsafe") or not reply.tokens:
            raise BackendError("the answer cannot be read")
        return Scores(_share(reply.tokens[0]))


def _share(token: Token) -> float:
    safe, unsafe = (2.718281828 ** token.alternatives.get(word, -99.0) for word in ("safe", "unsafe"))
    return unsafe / (safe + unsafe)


class Fake(NamedTuple):
    """What the server and its answers are made with, for tests, which import nothing of each other."""

    patch: pytest.MonkeyPatch
    OneWord: type[OneWord] = OneWord
    MODEL: str = MODEL
    answering: Any = staticmethod(answering)
    completion: Any = staticmethod(completion)
    well: Any = staticmethod(well)
    whole: Any = staticmethod(whole)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The parts."""
    return Fake(monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that behaves."""
    made = Server()
    yield made
    made.end()
