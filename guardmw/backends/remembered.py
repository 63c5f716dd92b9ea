"""A backend that is asked once: what it said of a conversation is remembered, and those who ask meanwhile wait."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import asdict
from hashlib import sha256
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import NonNegativeInt, ValidationError

from guardmw.backends._plan import Ask, Plan, arun, blocks_a_loop, run
from guardmw.errors import BackendError
from guardmw.settings import Part, Score
from guardmw.verdict import Coverage, Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from guardmw.backends import Backend
    from guardmw.conversation import Conversation

    # A number stands for a conversation that nothing can be remembered of.
    Key = bytes | int

# A store that failed is let be for so many seconds, as it may have cost as many to find out.
_REST = 5.0

_logger = logging.getLogger(__name__)


class Store(Protocol):
    """Where scores are kept for other processes: bytes by key, for a while.

    Any error counts as not having them, and so does a value that is no full reading; either is told in the log.
    """

    def fetch(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """What is kept under each key."""

    def keep(self, values: Mapping[bytes, bytes], seconds: float) -> None:
        """Keep these so long."""


class Remembered:
    """Remembers scores by the whole conversation: its turns, their order, tools and media; by hash, never the text.

    Only full readings are remembered: no failure, nothing degraded, nothing partial. Of several that ask the same at
    the same time, threads or tasks, one asks the backend, and all share its answer or its failure.

    Args:
        backend: what to ask.
        size: how many conversations are remembered here; the one that was not asked for longest is forgotten first.
        ttl: seconds after which one is forgotten.
        store: where scores are kept besides, for other processes. Whoever may write there may declare a text safe.
        fingerprint: what tells this backend's scores from those of others in one store: model, revision, bands.

    Raises:
        BackendError: size or ttl make no sense, or there is a store and no fingerprint.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        size: int = 10_000,
        ttl: float = 3600.0,
        store: Store | None = None,
        fingerprint: str = "",
    ) -> None:
        if size < 1 or ttl <= 0:
            raise BackendError("size is at least 1, and ttl in seconds above 0")
        self._fingerprint = fingerprint or str(getattr(backend, "fingerprint", ""))
        if store is not None and not self._fingerprint:
            raise BackendError("a store is shared by several models: say which this is, as fingerprint='NAME@REVISION'")
        self.name = backend.name
        self.thresholds: Mapping[str, float] = getattr(backend, "thresholds", {})
        self._backend = backend
        self._size = size
        self._ttl = ttl
        self._store = store
        self._store_rests = 0.0
        self._kept: OrderedDict[Key, tuple[float, Scores]] = OrderedDict()
        self._flights: dict[Key, Future[Scores | None]] = {}
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"Remembered({self.name!r}, {len(self._kept)} of {self._size})"

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch; only what is not remembered is asked."""
        keys = [_key(conversation, at) for at, conversation in enumerate(conversations)]
        known = self._recall(keys)
        if len(known) < len(keys):
            run(self._plan(keys, conversations, known, alone=blocks_a_loop()))
        return [known[key] for key in keys]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch without blocking the event loop. One who is cancelled leaves the question to the next."""
        keys = [_key(conversation, at) for at, conversation in enumerate(conversations)]
        known = self._recall(keys)
        if len(known) < len(keys):
            await arun(self._plan(keys, conversations, known, alone=False))
        return [known[key] for key in keys]

    def forget(self) -> None:
        """Remember nothing of what was said so far, here; a store keeps it."""
        with self._lock:
            self._kept.clear()

    def _recall(self, keys: Sequence[Key]) -> dict[Key, Scores]:
        with self._lock:
            return self._held(keys)

    def _held(self, keys: Iterable[Key]) -> dict[Key, Scores]:
        """What is remembered of keys; the lock is taken."""
        now, known = monotonic(), {}
        for key in keys:
            kept = self._kept.get(key)
            if kept is None:
                continue
            if kept[0] <= now:
                del self._kept[key]
                continue
            self._kept.move_to_end(key)
            known[key] = kept[1]
        return known

    def _plan(
        self, keys: Sequence[Key], conversations: Sequence[Conversation], known: dict[Key, Scores], *, alone: bool
    ) -> Plan[None]:
        """Learn of every key; waiting for nobody else, if ``alone``."""
        while wanted := {key: one for key, one in zip(keys, conversations, strict=True) if key not in known}:
            own, others = self._claim(wanted, known, alone=alone)
            # Others are waited for last: they may be waiting for this one.
            if own:
                yield from self._ask({key: wanted[key] for key in own}, own, known)
            if others:
                yield Ask(_Landing(list(others.values())), ())
                # Those whose asker gave up are asked again.
                known |= {key: scores for key, flight in others.items() if (scores := flight.result())}

    def _claim(
        self, wanted: Iterable[Key], known: dict[Key, Scores], *, alone: bool
    ) -> tuple[dict[Key, Future[Scores | None] | None], dict[Key, Future[Scores | None]]]:
        """What this caller is to ask, and who asks the rest; what has come to be known meanwhile is neither."""
        own: dict[Key, Future[Scores | None] | None] = {}
        others = {}
        with self._lock:
            known |= self._held(wanted)
            for key in wanted:
                if key in known:
                    continue
                flight = self._flights.get(key)
                if flight is None and isinstance(key, bytes):
                    # Running, so that a task which is cancelled cannot cancel it for the others.
                    new: Future[Scores | None] = Future()
                    new.set_running_or_notify_cancel()
                    own[key] = self._flights[key] = new
                elif flight is None or alone:
                    own[key] = None
                else:
                    others[key] = flight
        return own, others

    def _ask(
        self,
        wanted: dict[Key, Conversation],
        flights: Mapping[Key, Future[Scores | None] | None],
        known: dict[Key, Scores],
    ) -> Plan[None]:
        failure = None
        try:
            stored = yield from self._fetched(wanted)
            missing = {key: one for key, one in wanted.items() if key not in stored}
            if missing:
                given = yield Ask(self._backend, list(missing.values()))
                new = dict(zip(missing, given, strict=True))
                known |= new
                yield from self._kept_there({key: scores for key, scores in new.items() if _is_full(scores)})
            known |= stored
        except BackendError as error:
            # That of a batch may be due to another conversation in it.
            failure = error if len(wanted) == 1 else None
            raise
        finally:
            self._land({key: flight for key, flight in flights.items() if flight}, known, failure)

    def _land(
        self, flights: Mapping[Key, Future[Scores | None]], known: Mapping[Key, Scores], failure: BackendError | None
    ) -> None:
        until = monotonic() + self._ttl
        with self._lock:
            for key in flights:
                # Not before it is remembered, or somebody in between would ask again.
                if key in known and _is_full(known[key]):
                    self._kept[key] = until, known[key]
                    self._kept.move_to_end(key)
                del self._flights[key]
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        for key, flight in flights.items():
            if failure:
                flight.set_exception(failure)
            else:
                flight.set_result(known.get(key))

    def _fetched(self, wanted: Mapping[Key, Conversation]) -> Plan[dict[Key, Scores]]:
        keys = [key for key in wanted if isinstance(key, bytes)]
        if not self._store or not keys or monotonic() < self._store_rests:
            return {}
        errand = _Fetching(self._store, [self._stored_as(key) for key in keys])
        yield from self._run_errand(errand)
        kept = {key: value for key, value in zip(keys, errand.values, strict=False) if value is not None}
        read: dict[Key, Scores] = {key: scores for key, value in kept.items() if (scores := _read(value))}
        if len(read) < len(kept):
            _logger.warning("%d of %d kept verdicts are none, and asked for again", len(kept) - len(read), len(kept))
        return read

    def _kept_there(self, scores: Mapping[Key, Scores]) -> Plan[None]:
        values = {self._stored_as(key): given for key, given in scores.items() if isinstance(key, bytes)}
        if self._store and values and monotonic() >= self._store_rests:
            yield from self._run_errand(_Keeping(self._store, values, self._ttl))

    def _run_errand(self, errand: _Fetching | _Keeping) -> Plan[None]:
        try:
            yield Ask(errand, ())
        except BackendError as error:
            self._store_rests = monotonic() + _REST
            _logger.warning("no earlier verdicts for %g s: %s", _REST, error)

    def _stored_as(self, key: bytes) -> bytes:
        return sha256(self._fingerprint.encode() + b"\0" + key).digest()


class _Landing:
    """An errand: waiting until others have asked."""

    name = "remembered"

    def __init__(self, flights: list[Future[Scores | None]]) -> None:
        self._flights = flights

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        for flight in self._flights:
            flight.result()
        return []

    async def aclassify(self, _: Sequence[Conversation]) -> list[Scores]:
        for flight in self._flights:
            await asyncio.wrap_future(flight)
        return []


class _Fetching:
    """An errand to a store."""

    name = "store"

    def __init__(self, store: Store, keys: Sequence[bytes]) -> None:
        self.values: Sequence[bytes | None] = ()
        self._store = store
        self._keys = keys

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        values = list(self._store.fetch(self._keys))
        if len(values) != len(self._keys):
            raise BackendError(f"{self.name}: {len(values)} values for {len(self._keys)} keys")
        self.values = values
        return []

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        return await asyncio.to_thread(self.classify, conversations)


class _Keeping:
    """An errand to a store."""

    name = "store"

    def __init__(self, store: Store, scores: Mapping[bytes, Scores], seconds: float) -> None:
        self._store = store
        self._scores = scores
        self._seconds = seconds

    def classify(self, _: Sequence[Conversation]) -> list[Scores]:
        self._store.keep({key: _written(given) for key, given in self._scores.items()}, self._seconds)
        return []

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        return await asyncio.to_thread(self.classify, conversations)


def _key(conversation: Conversation, at: int) -> Key:
    """A hash of everything in it but the ids of calls, which differ from run to run."""
    turns = [
        (turn.role, turn.text, turn.name, turn.media, [(call.name, call.arguments) for call in turn.tool_calls])
        for turn in conversation.turns
    ]
    try:
        # JSON tells every two lists of strings apart, and keeps halves of surrogate pairs.
        return sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()
    except (TypeError, ValueError, RecursionError):
        # Arguments that are no JSON, and of which two may look the same.
        return at


def _is_full(scores: Scores) -> bool:
    covered = scores.coverage
    return not scores.degraded and (covered is None or covered.judged >= covered.characters)


def _written(scores: Scores) -> bytes:
    return json.dumps(asdict(scores)).encode()


def _read(value: object) -> Scores | None:
    """Scores that were written; None for anything else."""
    try:
        # Strictly by type: "false" would pass for a score of 0, and that for a safe text.
        kept = _Kept.model_validate_json(value, strict=True) if isinstance(value, bytes) else None
    except ValidationError:
        return None
    if kept is None:
        return None
    covered = Coverage(**dict(kept.coverage)) if kept.coverage else None
    scores = Scores(kept.unsafe, kept.categories, kept.injection, kept.backend, covered)
    return scores if _is_full(scores) else None


class _KeptCoverage(Part):
    characters: NonNegativeInt
    judged: NonNegativeInt
    windows: NonNegativeInt
    unreadable: NonNegativeInt
    media: tuple[str, ...]


class _Kept(Part):
    """Scores in a store; nothing degraded is kept."""

    unsafe: Score
    categories: dict[str, Score]
    injection: Score
    backend: str
    coverage: _KeptCoverage | None
    degraded: Literal[""]
