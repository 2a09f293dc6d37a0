"""Which adapters are in the pool, since when, and who leaves when pages run out.

Everything about residency but the bytes: the store (`store.py`) reads files on loader threads,
the simulator (`bench/simulate.py`) lets virtual time pass. Torch-free.
"""

from __future__ import annotations

import collections
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from chiliad.core import AdapterVersion
from chiliad.errors import AdapterError, AdapterTooLarge, OutOfMemory
from chiliad.memory.pool import Owner, PagePool
from chiliad.observe import EngineMetrics

if TYPE_CHECKING:
    from chiliad.kernels.base import AdapterRows

State = Literal[
    "absent",  # no pages: never loaded, evicted, or a failure old enough to try again
    "loading",  # owns pages; a loader fills them
    "resident",  # owns pages; may be used, and is evictable while nobody does
    "failed",  # no pages: could not be loaded; `error` says why
]

_RETRY_SECONDS = (1.0, 60.0)  # first and longest wait before a failed load may be tried again
_POPULARITY_SECONDS = 100.0  # time constant with which old uses are forgotten
_RANKED_SECONDS = 0.1  # for which an order of idle adapters is good enough
_REMEMBERED = 20_000  # adapters whose history is kept after their pages are gone


@dataclass(slots=True, eq=False)
class Entry:
    """What the store knows of one digest."""

    version: AdapterVersion
    state: State = "absent"
    pages: np.ndarray | None = None  # int32, while loading or resident
    rows: AdapterRows | None = None  # while resident
    users: int = 0
    pinned: bool = False
    doomed: bool = False  # removed: its pages go as soon as nobody uses them
    last_used: float = 0.0
    popularity: float = 0.0  # uses, each fading with _POPULARITY_SECONDS, as of last_used
    hits: int = 0  # times that somebody began to use it
    loads: int = 0
    began: float = 0.0  # when the last load was asked for
    load_seconds: float = 0.0  # that its loader was busy
    content: str = ""  # hash of the tensor bytes, as of the first load
    failures: int = 0  # in a row
    retry_at: float = 0.0
    error: Exception | None = None

    @property
    def idle(self) -> bool:
        return self.state == "resident" and not self.users and not self.pinned

    @property
    def num_pages(self) -> int:
        return 0 if self.pages is None else len(self.pages)


@dataclass(frozen=True, slots=True)
class Done:
    """A loader's result."""

    entry: Entry
    rows: AdapterRows | None
    content: str
    seconds: float
    error: Exception | None


class Residents(ABC):
    """Adapters by digest, with their pages; implements `scheduler.Residency` and `pool.Evictable`.

    One thread drives it. A subclass fetches what `_begin` names and appends a `Done`.
    """

    def __init__(
        self,
        pool: PagePool,
        page_bytes: int,
        *,
        metrics: EngineMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._page_bytes = page_bytes
        self._metrics = metrics or EngineMetrics()
        self._clock = clock
        self._entries: collections.OrderedDict[str, Entry] = collections.OrderedDict()  # by digest
        self._pages_needed: dict[str, int] = {}  # by digest
        self._idle: dict[Entry, None] = {}
        self._idle_pages = 0
        self.pinned_pages = 0
        # idle adapters by falling worth, with last_used when they were ranked: see `coldest`
        self._ranked: list[tuple[float, float, Entry]] = []
        self._ranked_until = -math.inf
        self._done: collections.deque[Done] = collections.deque()
        pool.register(self, Owner.ADAPTER)

    # -- what a subclass does ------------------------------------------------------------

    @abstractmethod
    def _count_pages(self, version: AdapterVersion) -> int:
        """Pages that an adapter takes. Raises AdapterError if that cannot be known."""

    @abstractmethod
    def _begin(self, entry: Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        """Start to fill pages; `_done` gets the result, from any thread."""

    @abstractmethod
    def _accept(self, done: Done) -> AdapterRows | None:
        """The rows of a load that went well. Raises ChiliadError to refuse it."""

    @abstractmethod
    def _forget(self, digest: str) -> None:
        """An adapter leaves the pool: drop what was derived from its rows."""

    # -- life cycle ----------------------------------------------------------------------

    def state(self, version: AdapterVersion) -> State:
        entry = self._entries.get(version.digest)
        if entry is None:
            return "absent"
        if entry.state == "failed" and self._clock() >= entry.retry_at:
            return "absent"
        return entry.state

    def error(self, version: AdapterVersion) -> Exception | None:
        """Why the adapter is in state "failed"."""
        entry = self._entries.get(version.digest)
        return None if entry is None else entry.error

    def pages_needed(self, version: AdapterVersion) -> int:
        """Pages that the adapter takes when resident. Raises AdapterError if its files are bad."""
        pages = self._pages_needed.get(version.digest)
        if pages is None:
            if len(self._pages_needed) >= _REMEMBERED:
                self._pages_needed.clear()
            pages = self._count_pages(version)
            self._pages_needed[version.digest] = pages
        return pages

    def load(self, version: AdapterVersion) -> None:
        """Reserve pages now and fill them in the background; nothing happens if that is under way.

        Raises OutOfMemory when the pages cannot be had now, AdapterTooLarge when they never
        can. An adapter that failed lately stays failed until its time to retry has come.
        """
        entry = self._entries.get(version.digest)
        if entry is not None and self.state(version) != "absent":
            return
        needed = self.pages_needed(version)
        self._refuse_giant(needed, str(version))
        pages = self._pool.alloc(needed, Owner.ADAPTER)
        if entry is None:
            entry = self._entries[version.digest] = Entry(version)
            self._forget_old()
        entry.version, entry.state, entry.pages, entry.doomed = version, "loading", pages, False
        entry.error, entry.began = None, self._clock()
        self._begin(entry, version, pages)

    def poll(self) -> None:
        """Apply the loads that ended since the last call."""
        while self._done:
            done = self._done.popleft()
            entry, error = done.entry, done.error
            rows = None
            if error is None:
                try:
                    rows = self._accept(done)
                except Exception as refused:  # this adapter's requests fail, nobody else's
                    error = refused
            entry.loads += 1
            entry.load_seconds = done.seconds
            self._metrics.adapter_loads["ok" if error is None else "error"] += 1
            self._metrics.adapter_load_seconds.observe(self._clock() - entry.began)
            if error is not None:
                self._fail(entry, error)
                continue
            entry.state, entry.rows, entry.failures = "resident", rows, 0
            entry.last_used = self._clock()
            self._set_idle(entry)
            if entry.doomed:
                self._drop(entry, "removed")

    def retain(self, version: AdapterVersion) -> None:
        """One more user of a resident adapter; it stays where it is while it has any."""
        entry = self._entries.get(version.digest)
        if entry is None or entry.state != "resident":
            raise AdapterError(f"adapter {version} is not resident: load it first")
        now = self._clock()
        faded = math.exp((entry.last_used - now) / _POPULARITY_SECONDS)
        entry.popularity = entry.popularity * faded + 1.0
        entry.last_used = now
        entry.hits += 1
        entry.users += 1
        self._set_idle(entry)
        self._entries.move_to_end(version.digest)

    def release(self, version: AdapterVersion) -> None:
        """One user less. The last one of a removed adapter frees it."""
        entry = self._entries[version.digest]
        assert entry.users > 0, f"{version} was released more often than retained"
        entry.users -= 1
        if entry.users == 0:
            now = self._clock()
            entry.popularity *= math.exp((entry.last_used - now) / _POPULARITY_SECONDS)
            entry.last_used = now
            if entry.doomed and entry.state == "resident":
                self._drop(entry, "removed")
            else:
                self._set_idle(entry)

    def remove(self, versions: Iterable[AdapterVersion]) -> int:
        """Give up the pages of adapters; returns the bytes this frees, now or at the last release."""
        freed = 0
        for version in versions:
            self._pages_needed.pop(version.digest, None)
            entry = self._entries.get(version.digest)
            if entry is None:
                continue
            freed += entry.num_pages * self._page_bytes
            if entry.pinned:
                entry.pinned = False
                self.pinned_pages -= entry.num_pages
            if entry.state == "resident" and not entry.users:
                self._drop(entry, "removed")
            elif entry.pages is not None:
                entry.doomed = True
            if entry.pages is None:
                del self._entries[version.digest]
        return freed

    def pin(self, version: AdapterVersion, pinned: bool = True) -> None:
        """Keep a resident adapter until it is removed or unpinned.

        Raises AdapterError when it is not resident, OutOfMemory when pinned adapters would take
        more than half of what adapters may have: requests need the rest.
        """
        entry = self._entries.get(version.digest)
        if entry is None or entry.state != "resident" or entry.doomed:
            if not pinned:
                return
            raise AdapterError(f"adapter {version} is not resident: load it first")
        if pinned and not entry.pinned:
            limit = self._pool.limit(Owner.ADAPTER) // 2
            if self.pinned_pages + entry.num_pages > limit:
                raise OutOfMemory(
                    f"adapter {version} takes {entry.num_pages} pages, {self.pinned_pages} are pinned and "
                    f"{limit} may be: unpin others, or start with more --memory"
                )
            self.pinned_pages += entry.num_pages
        elif entry.pinned and not pinned:
            self.pinned_pages -= entry.num_pages
        entry.pinned = pinned
        self._set_idle(entry)

    # -- pool.Evictable ------------------------------------------------------------------

    def evictable_pages(self) -> int:
        return self._idle_pages

    def coldest(self) -> float | None:
        """Worth of the idle adapter that is the least missed: see `pool.Evictable`.

        The wait for a new load, per page and per second until the next use, which is guessed
        from the time since the last one and from how popular the adapter has been. Thousands
        are not ranked anew for every page: a ranking is used until it is a tenth of a second
        old (longer, if making it took more than 2 % of that). What became idle since is warmer.
        """
        now = self._clock()
        for fresh in (now < self._ranked_until, False):
            if not fresh:
                ranked = [(self._worth(entry, now), entry.last_used, entry) for entry in self._idle]
                self._ranked = sorted(ranked, key=lambda item: item[0], reverse=True)
                self._ranked_until = now + max(_RANKED_SECONDS, 50 * (self._clock() - now))
            while self._ranked:
                worth, last_used, entry = self._ranked[-1]
                if entry.idle and entry.last_used == last_used:
                    return worth
                self._ranked.pop()
        return None

    def evict(self) -> int:
        if self.coldest() is None:
            return 0
        return self._drop(self._ranked.pop()[2], "memory")

    @staticmethod
    def _worth(entry: Entry, now: float) -> float:
        age = now - entry.last_used
        popularity = max(1.0, entry.popularity * math.exp(-age / _POPULARITY_SECONDS))
        return entry.load_seconds * popularity / (entry.num_pages * (age + 1e-3))

    # -- looking at it -------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """How many adapters are resident, and how many loading."""
        states = [entry.state for entry in self._entries.values() if entry.pages is not None]
        return states.count("resident"), states.count("loading")

    def count_pinned(self) -> int:
        """How many adapters are pinned; they hold `pinned_pages`."""
        return sum(entry.pinned for entry in self._entries.values())

    def status(self, version: AdapterVersion) -> dict[str, object]:
        """Everything there is to say about one adapter's residency; times in seconds."""
        entry = self._entries.get(version.digest) or Entry(version)
        state = self.state(version)
        used = entry.hits > 0 or entry.state == "resident"
        return {
            "state": state,
            "tier": "pool" if state == "resident" else "disk",
            "pages": entry.num_pages,
            "bytes": entry.num_pages * self._page_bytes,
            "users": entry.users,
            "pinned": entry.pinned,
            "hits": entry.hits,
            "loads": entry.loads,
            "load_seconds": entry.load_seconds,
            "idle_seconds": max(0.0, self._clock() - entry.last_used) if used else None,
            "error": str(entry.error) if entry.error else None,
        }

    def held(self) -> list[np.ndarray]:
        """Page arrays of loading and resident adapters, for `PagePool.check`."""
        return [entry.pages for entry in self._entries.values() if entry.pages is not None]

    # -- inside --------------------------------------------------------------------------

    def _refuse_giant(self, pages: int, what: str) -> None:
        limit = self._pool.limit(Owner.ADAPTER)
        if pages > limit:
            raise AdapterTooLarge(
                f"the adapter {what} takes {pages} pages of {self._page_bytes} bytes, adapters "
                f"can have {limit} at most: start with more --memory, or train a lower rank"
            )

    def _fail(self, entry: Entry, error: Exception) -> None:
        assert entry.pages is not None
        self._pool.free(entry.pages)
        entry.pages, entry.state, entry.error = None, "failed", error
        first, longest = _RETRY_SECONDS
        entry.retry_at = self._clock() + min(longest, first * 2.0**entry.failures)
        entry.failures += 1
        if entry.doomed:
            del self._entries[entry.version.digest]

    def _drop(self, entry: Entry, reason: str) -> int:
        """Free a resident adapter's pages; returns how many."""
        assert entry.pages is not None
        assert entry.users == 0
        freed = self._pool.free(entry.pages)
        entry.state = "absent"
        self._set_idle(entry)
        entry.pages = entry.rows = None
        digest = entry.version.digest
        self._forget(digest)
        if entry.doomed:
            del self._entries[digest]
        self._metrics.adapter_evictions[reason] += 1
        return freed

    def _set_idle(self, entry: Entry) -> None:
        """Keep the books of what may be evicted; called before `pages` changes."""
        if entry.idle and entry not in self._idle:
            self._idle[entry] = None
            self._idle_pages += entry.num_pages
        elif not entry.idle and entry in self._idle:
            del self._idle[entry]
            self._idle_pages -= entry.num_pages

    def _forget_old(self) -> None:
        """Bound the history: drop the longest unused entries that own nothing."""
        if len(self._entries) > _REMEMBERED:
            for digest in [d for d, e in self._entries.items() if e.pages is None][: _REMEMBERED // 10]:
                del self._entries[digest]

    def _clear(self) -> None:
        """Give every page back."""
        self._done.clear()
        for entry in self._entries.values():
            if entry.pages is not None:
                self._pool.free(entry.pages)
        self._entries.clear()
        self._idle.clear()
        self._ranked.clear()
        self._idle_pages = self.pinned_pages = 0
