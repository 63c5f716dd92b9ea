"""One OpenAI-compatible server over HTTP: as many connections as are allowed, and no answer that is not whole."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from guardmw.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping

    _Trace = Callable[[str, Mapping[str, Any]], Awaitable[None]]

# An answer of 2,048 tokens with twenty alternatives each has this size.
_LONGEST_ANSWER = 4 * 2**20
# Enough to know what a refusal is about.
_LONGEST_REFUSAL = 2**16
# Uvicorn, and so vLLM, closes what was idle for 5 s: what is closed first on this side is never lost on that one.
_IDLE_S = 4.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whole.

    Attributes:
        refusal: what a status of 400, 413 or 422 says it is about, in lower case; never to be repeated, for it may
            quote the prompt.
    """

    status: int
    body: bytes = b""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and how patient to be with it.

    Attributes:
        url: with the version, as http://localhost:8000/v1.
        key: "" for none.
        key_from: what to look at where the key is not taken.
        connections: at most, and so requests under way.
        retries: of one request, after the first try.
    """

    url: str
    key: str = field(repr=False)
    key_from: str
    connections: int
    retries: int


class Http:
    """What speaks to a server, on one event loop."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._trusted = httpx.create_ssl_context()
        # A pool of httpx looks at each of its connections for every request; one of a single connection has no other.
        self._clients: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []
        self._turns = asyncio.Semaphore(address.connections)
        self._under_way: set[asyncio.Task[Answer | _Failure]] = set()

    async def aclose(self) -> None:
        """Let go of the connections, once those are free that nobody waits for any more."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for client in self._clients:
            await client.aclose()

    async def send(self, path: str, body: bytes | None, until: float) -> Answer:
        """Send until it is answered with success, or refused for what it says.

        Args:
            path: after the address.
            body: of a POST; None for a GET.
            until: the loop's time by which an answer is of no use any more. It is for the caller to stop then.

        Raises:
            BackendError: by an answer that would be the same another time.
            BackendUnavailable: no answer came, or none by then.
        """
        pause, tries = _FIRST_PAUSE_S, 0
        while True:
            came = await self._once(path, body)
            if isinstance(came, Answer):
                return came
            tries += 1
            # Who waits as long as all the others comes back together with them.
            wait = (pause if came.wait is None else came.wait) * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
            if tries > self._address.retries or not came.again:
                raise came.error
            if asyncio.get_running_loop().time() + wait > until:
                raise BackendUnavailable(f"{came.error}, and there is no time to try again")
            await asyncio.sleep(wait)
            pause *= 2

    async def peek(self, path: str, body: bytes) -> Answer:
        """What is answered to one try, of something that a server need not have; status 0 if it may be in a while."""
        came = await self._once(path, body)
        return came if isinstance(came, Answer) else Answer(0 if came.again else came.status)

    def _connected(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            base_url=self._address.url + "/",
            auth=Key({"authorization": f"Bearer {self._address.key}"} if self._address.key else {}),
            # What is compressed may be larger than it looks.
            headers={"accept-encoding": "identity"},
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE_S),
            # Whoever asks has a deadline for everything; a timeout here would be for each piece.
            timeout=None,  # noqa: S113 - see above
            verify=self._trusted,
        )
        self._clients.append(client)
        return client

    async def _once(self, path: str, body: bytes | None) -> Answer | _Failure:
        """One try, which goes on alone where whoever waits for it is cancelled, just to clean up.

        asyncio's cancellation interrupts even what httpx shields from that of anyio: then connections stay open, or
        taken for busy.
        """
        await self._turns.acquire()
        scope = anyio.CancelScope()
        task = asyncio.create_task(self._alone(scope, path, body))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            # Who cancelled may end the loop next, and with it what cleans up.
            await asyncio.wait((task,))
            raise

    async def _alone(self, scope: anyio.CancelScope, path: str, body: bytes | None) -> Answer | _Failure:
        # The last one used: what idles long is closed by the server.
        client = self._free.pop() if self._free else self._connected()
        came: Answer | _Failure | None = None
        opened: list[Any] = []

        async def look_on(event: str, told: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                opened.append(told["return_value"])

        try:
            with scope:
                came = await self._caught(client, path, body, look_on)
        finally:
            if came is None:
                # It may have a connection that it takes for busy, and it has only one.
                self._clients.remove(client)
                await client.aclose()
                # httpcore forgets one whose TLS handshake is cancelled.
                for stream in opened:
                    await stream.aclose()
            else:
                self._free.append(client)
            self._turns.release()
        return came or _Failure(BackendUnavailable("nobody waits for it"))

    async def _caught(
        self, client: httpx.AsyncClient, path: str, body: bytes | None, look_on: _Trace
    ) -> Answer | _Failure:
        try:
            return await self._exchange(client, path, body, look_on)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            # Not raised from here: an error of httpx holds the request, and with it the key and the text.
            return self._broken(error)

    async def _exchange(
        self, client: httpx.AsyncClient, path: str, body: bytes | None, look_on: _Trace
    ) -> Answer | _Failure:
        method, headers = ("GET", {}) if body is None else ("POST", {"content-type": "application/json"})
        traced = {"trace": look_on}
        async with client.stream(method, path, content=body, headers=headers, extensions=traced) as response:
            status = response.status_code
            if status in (400, 413, 422):
                refusal = await _read(response, _LONGEST_REFUSAL)
                return Answer(status, refusal=refusal.decode(errors="replace").lower())
            if status != httpx.codes.OK:
                return self._failed(status, response.headers)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                return self._bad("answers compressed, which it was not asked to", status)
            read = await _read(response, _LONGEST_ANSWER + 1)
        if len(read) > _LONGEST_ANSWER:
            return self._bad(f"answers with more than {_LONGEST_ANSWER // 2**20} MiB", status)
        return Answer(status, read)

    def _bad(self, what: str, status: int) -> _Failure:
        return _Failure(BackendError(f"{self._address.url} {what}"), status)

    def _failed(self, status: int, headers: Mapping[str, str]) -> _Failure:
        said = f"{self._address.url} answers {status}"
        if status in _BUSY:
            wait = retry_after(headers.get("retry-after", ""))
            return _Failure(BackendUnavailable(said), status, again=True, wait=wait)
        if status in (401, 403):
            said += f": it does not take the API key; {self._address.key_from}"
            return _Failure(BackendUnavailable(said), status)
        if status == httpx.codes.NOT_FOUND:
            said += ": it has no such model, or its address is another (…/v1)"
            return _Failure(BackendUnavailable(said), status)
        return _Failure(BackendError(said), status)

    def _broken(self, error: Exception) -> _Failure:
        url = self._address.url
        causes = list(_causes(error))
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return _Failure(BackendUnavailable(f"{url}: no TLS there, or a certificate that is not trusted"))
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return _Failure(BackendUnavailable(f"{url}: its name cannot be resolved"), again=True)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return _Failure(BackendUnavailable(f"{url}: nothing accepts connections there"), again=True)
        if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
            return _Failure(BackendUnavailable(f"{url}: the connection broke"), again=True)
        return _Failure(BackendUnavailable(f"{url}: {type(error).__name__}"))


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why there is no answer.

    Attributes:
        status: of an answer; 0 where there was none.
        again: another try may fare better.
        wait: seconds that the server wants to be left alone.
    """

    error: BackendError
    status: int = 0
    again: bool = False
    wait: float | None = None


class Key(httpx.Auth):
    """Headers that hold a key: put on at the last moment, so that no client shows them."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Put them on."""
        request.headers.update(self._headers)
        yield request


def retry_after(given: str) -> float | None:
    """Seconds, from either form that HTTP knows of the header; None where it says nothing."""
    try:
        seconds = float(given)
    except ValueError:
        pass
    else:
        return seconds if seconds > 0 else 0.0  # and not NaN
    try:
        return max(parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


async def _read(response: httpx.Response, most: int) -> bytes:
    """The body, or as much of it as is wanted."""
    read = bytearray()
    async for chunk in response.aiter_raw():
        read += chunk
        if len(read) >= most:
            break
    return bytes(read[:most])


def _causes(error: BaseException | None) -> Generator[BaseException, None, None]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
