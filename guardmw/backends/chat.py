"""Guard models behind any OpenAI-compatible server, vLLM first: asked in their dialect, within a deadline."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from guardmw import dialects
from guardmw.backends import _completions, _pieces
from guardmw.backends._aside import Aside
from guardmw.backends._completions import Manner
from guardmw.errors import BackendError, BackendUnavailable, nearest
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from guardmw.backends._http import Address, Answer, Http
    from guardmw.conversation import Conversation
    from guardmw.dialects import Dialect, Reply, Request

T = TypeVar("T")

DEADLINE_S = 10.0
OPENAI = "https://api.openai.com/v1"
CONNECTIONS = 64
RETRIES = 2
# Enough for a million characters, for a model of the smallest context that guards have.
_MOST_CUTS = 1_000
_OK, _LARGE = 200, 413
_OPTIONS = ("dialect", "deadline", "connections", "retries", "key_env")


class ChatBackend:
    """A guard model on a server that speaks OpenAI's API, as vLLM does.

    It may be shared between threads, tasks and event loops: its connections are on an event loop of its own. Text that
    is longer than the model's context is judged in overlapping pieces, and the worst counts.

    Args:
        url: as far as the version: http://localhost:8000/v1.
        model: what the server calls it; by default the one it serves.
        dialect: how the model is asked, as an object or by name; by default what its name says.
        name: what verdicts call it; the model's name by default.
        api_key: by default the value of ``key_env``, if there is one. It is kept out of errors, logs and reprs.
        key_env: the environment variable that holds the key.
        deadline: seconds for one call of ``classify`` or ``aclassify``, waiting and retries included.
        retries: of a request that was not answered, or by a server that is busy or broke down.
        connections: to the server, at most, and so requests under way; others wait.
        cache_salt: of vLLM's prefix cache: tenants of different salts do not share it, nor learn from its speed what
            others asked. A callable is asked in each call, on the caller's thread and in the caller's context.

    Raises:
        BackendUnavailable: httpx is not installed.
        BackendError: an argument is not valid.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        dialect: Dialect | str | None = None,
        name: str | None = None,
        api_key: str | None = None,
        key_env: str | None = None,
        deadline: float = DEADLINE_S,
        retries: int = RETRIES,
        connections: int = CONNECTIONS,
        cache_salt: str | Callable[[], str] = "",
    ) -> None:
        # `not >` also refuses what is no number.
        if not 0 < deadline <= 86_400 or connections < 1 or retries < 0:  # noqa: PLR2004 - a day
            raise BackendError("deadline is in seconds, connections at least 1 and retries at least 0")
        key = os.environ.get(key_env, "") if api_key is None and key_env else api_key or ""
        key_from = f"look at {key_env}" if key_env and api_key is None else "look at api_key"
        at = _address(_plain(url), key.strip(), key_from, connections, retries)
        self.name = name or model or urlsplit(at.url).netloc
        self._url = at.url
        self._salt = cache_salt
        spoken = _spoken(dialect, model)
        told = self.name
        self._aside = Aside(lambda: _Server(told, at, model, spoken, deadline), f"guardmw {told}")

    def __repr__(self) -> str:
        return f"ChatBackend({self._url!r}, name={self.name!r})"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; its requests are under way at the same time.

        Raises:
            BackendUnavailable: the server does not answer, or not before the deadline.
            BackendError: what it answers cannot be used.
        """
        if not conversations:
            return []
        salt = self._salted()
        return self._aside.run(lambda server: server.classify(conversations, salt))

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """``classify``, without blocking the event loop."""
        if not conversations:
            return []
        salt = self._salted()
        return await self._aside.arun(lambda server: server.classify(conversations, salt))

    def close(self) -> None:
        """Close the connections and end the thread they are on, with all calls under way; another call opens anew."""
        self._aside.close()

    def _salted(self) -> str:
        return self._salt() if callable(self._salt) else self._salt


def vllm(rest: str) -> ChatBackend:
    """What "vllm:http://host:8000/v1#OWNER/MODEL" loads; the key, if it wants one, is in VLLM_API_KEY."""
    return _from_spec("vllm", rest, "", "VLLM_API_KEY")


def openai(rest: str) -> ChatBackend:
    """What "openai:MODEL" and "openai:https://host/v1#MODEL" load; the key is in OPENAI_API_KEY."""
    return _from_spec("openai", rest, OPENAI, "OPENAI_API_KEY")


class _TooLong(Exception):  # noqa: N818 - a state, and nobody outside sees it
    """A prompt is longer than the model takes."""


@dataclass(slots=True)
class _Call:
    """One call of classify.

    Attributes:
        until: the loop's time by which it ends.
    """

    salt: str
    until: float


@dataclass(slots=True)
class _Cuts:
    """How many times one text was cut."""

    count: int = 0


class _Server:
    """A server as an event loop sees it, with what was learned of it."""

    def __init__(
        self, told: str, address: Address, model: str | None, dialect: Dialect | None, deadline: float
    ) -> None:
        from guardmw.backends._http import Http  # noqa: PLC0415 - httpx comes with an extra

        self._told = told
        self._http: Http = Http(address)
        self._url = address.url
        self._model = model
        self._root = ""
        self._dialect = dialect
        self._deadline = deadline
        self._manner = Manner()
        self._at_once = address.connections
        self._learning = asyncio.Lock()
        self._looked = not address.url.endswith("/v1")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def classify(self, conversations: Sequence[Conversation], salt: str) -> list[Scores]:
        try:
            async with asyncio.timeout(self._deadline):
                call = _Call(salt, asyncio.get_running_loop().time() + self._deadline)
                await self._learn(call)
                return await self._all(conversations, call)
        except TimeoutError:
            failure: BackendError = BackendUnavailable(f"{self._told}: no answer in {self._deadline:g} s (deadline)")
        except _TooLong:
            failure = BackendError(f"{self._told}: the text is longer than the model takes, even in pieces")
        except BackendUnavailable as error:
            failure = BackendUnavailable(f"{self._told}: {error}")
        except BackendError as error:
            failure = BackendError(f"{self._told}: {error}")
        except Exception as error:  # noqa: BLE001 - of a dialect; its message may quote the text, so its type is told
            failure = BackendError(f"{self._told}: {type(error).__name__}")
        # Raised out here, it does not carry what it stands for, which may hold the text or the key.
        raise failure

    async def _learn(self, call: _Call) -> None:
        """Which model it serves, where that was not said, and how that is asked."""
        if self._model is not None and self._dialect is not None:
            return
        async with self._learning:
            if self._model is None:
                answer = await self._http.send("models", None, call.until)
                served = _completions.models(_completions.value(answer.body))
                if len(served) != 1:
                    raise BackendError(f"the server has {len(served)} models: name one, as in vllm:{self._url}#MODEL")
                self._model, self._root = next(iter(served.items()))
            if self._dialect is None:
                self._dialect = dialects.of_model(self._root or self._model)

    async def _all(self, conversations: Sequence[Conversation], call: _Call) -> list[Scores]:
        """As many at a time as there are connections, and no more tasks than that."""
        left = iter(enumerate(conversations))
        scores: dict[int, Scores] = {}

        async def work() -> None:
            for i, conversation in left:
                scores[i] = await self._score(conversation, call)

        await _together(work() for _ in range(min(len(conversations), self._at_once)))
        return [scores[i] for i in range(len(conversations))]

    async def _score(self, conversation: Conversation, call: _Call) -> Scores:
        pieces = await self._pieces(conversation, call, _Cuts())
        scores = pieces[0] if len(pieces) == 1 else _pieces.joined(conversation, pieces)
        return replace(scores, backend=self._told)

    async def _pieces(self, conversation: Conversation, call: _Call, cuts: _Cuts) -> list[Scores]:
        """The scores of the text on trial, or of its pieces where it is longer than the model takes."""
        try:
            return [await self._judge(conversation, call)]
        except _TooLong:
            pieces = _pieces.smaller(conversation)
            cuts.count += 1
            if not pieces or cuts.count > _MOST_CUTS:
                raise
        found = await _together(self._pieces(piece, call, cuts) for piece in pieces)
        return [scores for several in found for scores in several]

    async def _judge(self, conversation: Conversation, call: _Call) -> Scores:
        if self._dialect is None:
            raise BackendError("it is not known how the model is asked")
        judging = self._dialect.judge(conversation)
        try:
            requests = next(judging)
            while True:
                requests = judging.send(await _together(self._ask(request, call) for request in requests))
        except StopIteration as stop:
            scores = stop.value
        finally:
            judging.close()
        if not isinstance(scores, Scores):
            raise BackendError(f"the dialect gives {type(scores).__name__} instead of Scores")
        return scores

    async def _ask(self, request: Request, call: _Call) -> Reply:
        """Ask in the manner that the server is known to like, and in another where it turns out not to."""
        if request.messages and request.prefill and not self._looked:
            await self._look(request)
        known = manner = self._manner
        while True:
            path, sent = _completions.body(self._model or "", request, manner, call.salt)
            answer = await self._http.send(path, _completions.encoded(sent), call.until)
            if answer.status != _OK:
                manner = _changed(manner, answer)
                continue
            given = _completions.value(answer.body)
            reply = _completions.read(given)
            if _completions.ran_out(given, reply, sent[manner.limit]):
                raise _TooLong
            if request.messages and request.prefill:
                if manner.prefill and _completions.begins_anew(reply, request.prefill):
                    manner = replace(manner, prefill=False)
                    continue
                if not manner.prefill:
                    reply = _completions.without(reply, request.prefill, request.max_tokens)
            if manner != known:
                self._manner = manner
            return reply

    async def _look(self, request: Request) -> None:
        """Have the beginning of an answer stand where the model would begin, as far as the server shows.

        Templates put something before an answer, an empty thought as a rule, and may leave it out where an answer has
        begun, or the other way round. Nothing of a text that is to be judged is sent.
        """
        async with self._learning:
            if self._looked:
                return
            anew, lead = await self._shown(request, None), ""
            begun = anew and await self._shown(request, lead)
            if anew and begun and begun != anew + request.prefill:
                lead = anew.removeprefix(begun.removesuffix(request.prefill))
                begun = await self._shown(request, lead)
            if anew and begun:
                right = begun == anew + request.prefill
                self._manner = replace(self._manner, lead=lead) if right else replace(self._manner, prefill=False)
            self._looked = "" not in (anew, begun)

    async def _shown(self, request: Request, lead: str | None) -> str | None:
        """The text that the model is shown, as vLLM tells it; None where the server does not, "" where not now."""
        sent: dict[str, Any] = _completions.shown(request, lead)
        told: Any = None
        for path, wanted in (("/tokenize", "tokens"), ("/detokenize", "prompt")):
            body = _completions.encoded({"model": self._model, **sent})
            answer = await self._http.peek(self._url.removesuffix("/v1") + path, body)
            told = _completions.told(answer.body, wanted) if answer.status == _OK else None
            if not told:
                return None if answer.status else ""
            sent = {"tokens": told}
        return told if isinstance(told, str) else None


def _changed(manner: Manner, answer: Answer) -> Manner:
    """Another manner to ask in, after an answer that refuses this one."""
    if answer.status == _LARGE or _completions.too_long(answer.refusal):
        raise _TooLong
    changed = manner.after(answer.refusal)
    if changed is None:
        raise BackendError(f"the server answers {answer.status}: it does not take the request, or not for this model")
    return changed


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first failure, once the others have ended."""
    works = list(works)
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as several:
        failure = several.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise failure


def _spoken(dialect: Dialect | str | None, model: str | None) -> Dialect | None:
    if isinstance(dialect, str):
        return dialects.named(dialect)
    return dialects.of_model(model) if dialect is None and model else dialect


def _address(url: str, key: str, key_from: str, connections: int, retries: int) -> Address:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise BackendError(f"the API key has characters that no HTTP header takes: {key_from}")
    try:
        from guardmw.backends._http import Address  # noqa: PLC0415 - httpx comes with an extra
    except ModuleNotFoundError as error:
        missing = error.name
    else:
        return Address(url, key, key_from, connections, retries)
    raise BackendUnavailable(f"asking a server needs {missing}: pip install 'guardmw[chat]'")


def _plain(url: str) -> str:
    """A URL that holds nothing but an address. One with a password in it is not repeated."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        plain = False
    if not plain or parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise BackendError("a server's URL is as http://host:8000/v1, without a user, a query or a fragment")
    return url.rstrip("/")


def _from_spec(kind: str, rest: str, url: str, key_env: str) -> ChatBackend:
    """URL?options#MODEL; the options may come last, and where the URL is known it may be left out."""
    where, _, model = rest.partition("#")
    where, _, query = where.partition("?")
    model, _, more = model.partition("?")
    if "://" not in where and url:
        where, model = url, model or where
    options = dict(parse_qsl(f"{query}&{more}", keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            raise BackendError(f"{kind}: unknown option {option!r}: {nearest(option, _OPTIONS)}")
    try:
        return ChatBackend(
            where,
            model=unquote(model) or None,
            dialect=options.get("dialect"),
            key_env=options.get("key_env", key_env),
            deadline=float(options.get("deadline", DEADLINE_S)),
            connections=int(options.get("connections", CONNECTIONS)),
            retries=int(options.get("retries", RETRIES)),
        )
    except ValueError:
        raise BackendError(f"{kind}: deadline, connections and retries are numbers") from None
