"""The life of an adapter's bytes: absent -> loading -> resident -> absent again, or failed.

The engine thread owns the store. `load` reserves pages at once; a small pool of loader threads
reads, checks, lowers and copies into them; `poll` applies what they finished. So a load costs
the engine a table entry, and pages are never promised twice. An adapter in use is never moved
or freed, and one that is idle stays until somebody needs its pages more.

Everything is keyed by the digest: two names of one folder share their rows.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from chiliad.adapters import peft
from chiliad.adapters.base import AdapterPlan, Lowered
from chiliad.core import AdapterUse, AdapterVersion, BaseInfo
from chiliad.errors import AdapterError, AdapterTooLarge, ChiliadError, InvalidAdapter, OutOfMemory
from chiliad.kernels.base import AdapterRows, Kernels, LowRankRows
from chiliad.memory.arena import Arena, Packing, pack_rows
from chiliad.memory.pool import Owner, PagePool
from chiliad.observe import EngineMetrics

log = logging.getLogger(__name__)

State = Literal[
    "absent",  # no pages: never loaded, evicted, or a failure old enough to try again
    "loading",  # owns pages; a loader thread fills them
    "resident",  # owns pages; may be used, and is evictable while nobody does
    "failed",  # no pages: could not be loaded; `error` says why
]

_RETRY_SECONDS = (1.0, 60.0)  # first and longest wait before a failed load may be tried again
_POPULARITY_SECONDS = 100.0  # time constant with which old uses are forgotten
_RANKED_SECONDS = 0.1  # for which an order of idle adapters is good enough
_REMEMBERED = 20_000  # adapters whose history is kept after their pages are gone
_COMPOSED = 1024  # compositions whose rows are kept ready


@dataclass(slots=True, eq=False)
class _Entry:
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
    load_seconds: float = 0.0  # that its loader thread was busy
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
class _Done:
    """A loader's result."""

    entry: _Entry
    rows: AdapterRows | None
    content: str
    seconds: float
    error: Exception | None


class AdapterStore:
    """Residency of adapters in the pool; implements `scheduler.Residency` and `pool.Evictable`.

    dtype: float32 or bfloat16, of the stored rows. on_ready is called on a loader thread when
    `poll` has something to do.
    """

    def __init__(
        self,
        pool: PagePool,
        arena: Arena,
        kernels: Kernels,
        base: BaseInfo,
        dtype: torch.dtype,
        *,
        loaders: int = 2,
        limits: peft.Limits | None = None,
        on_ready: Callable[[], None] = lambda: None,
        metrics: EngineMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._arena, self._kernels, self._base = pool, arena, kernels, base
        self._dtype = dtype
        self._limits = limits or peft.Limits()
        self._on_ready = on_ready
        self._metrics = metrics or EngineMetrics()
        self._clock = clock
        self._bytes = arena.buffer.numpy()  # a view: what loaders write through
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()  # by digest
        self._pages_needed: dict[str, int] = {}  # by digest
        self._contents: dict[str, str] = {}  # by digest: hash of the tensor bytes at the first load
        self._composed: collections.OrderedDict[tuple[tuple[str, float], ...], AdapterRows] = (
            collections.OrderedDict()
        )
        self._idle: dict[_Entry, None] = {}
        self._idle_pages = 0
        # idle adapters by falling worth as of `_ranked_at`, with last_used then: see `coldest`
        self._ranked: list[tuple[float, float, _Entry]] = []
        self._ranked_at = -math.inf
        self._done: collections.deque[_Done] = collections.deque()
        self._loaders = ThreadPoolExecutor(max_workers=loaders, thread_name_prefix="adapter-loader")
        pool.register(self, Owner.ADAPTER)

    # -- life cycle (engine thread) ------------------------------------------------------

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
            pages = self._pack(self._ranks(version)).num_pages
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
            entry = self._entries[version.digest] = _Entry(version)
            self._forget_old()
        entry.version, entry.state, entry.pages, entry.doomed = version, "loading", pages, False
        entry.error, entry.began = None, self._clock()
        self._loaders.submit(self._fetch, entry, version, pages)

    def poll(self) -> None:
        """Apply what loader threads finished since the last call."""
        while self._done:
            done = self._done.popleft()
            entry, error = done.entry, done.error
            rows = None
            if error is None:
                first = self._contents.setdefault(entry.version.digest, done.content)
                if first != done.content:  # in spite of equal size and time
                    error = peft.changed(entry.version.path)
            if error is None and done.rows is not None:
                try:
                    rows = self._kernels.prepare_adapter(done.rows)
                except ChiliadError as refused:
                    error = refused
            entry.loads += 1
            entry.load_seconds = done.seconds
            self._metrics.adapter_loads["ok" if error is None else "error"] += 1
            self._metrics.adapter_load_seconds.observe(self._clock() - entry.began)
            if rows is None:
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
            entry = self._entries.get(version.digest)
            if entry is None:
                continue
            freed += entry.num_pages * self._arena.page_bytes
            entry.pinned = False
            if entry.state == "resident" and not entry.users:
                self._drop(entry, "removed")
            elif entry.pages is not None:
                entry.doomed = True
            if entry.pages is None:
                del self._entries[version.digest]
        return freed

    def pin(self, version: AdapterVersion, pinned: bool = True) -> None:
        """Keep a resident adapter whatever happens, or stop to."""
        entry = self._entries.get(version.digest)
        if entry is None or entry.state != "resident":
            raise AdapterError(f"adapter {version} is not resident: load it first")
        entry.pinned = pinned
        self._set_idle(entry)

    def close(self) -> None:
        """Stop the loaders and give every page back. Nothing may use the store afterwards."""
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._done.clear()
        for entry in self._entries.values():
            if entry.pages is not None:
                self._pool.free(entry.pages)
        self._entries.clear()
        self._composed.clear()
        self._idle.clear()
        self._ranked.clear()
        self._idle_pages = 0

    # -- use -----------------------------------------------------------------------------

    def rows(self, uses: Sequence[AdapterUse]) -> AdapterRows:
        """Rank rows of resident adapters as the kernels take them.

        Several adapters add up: their rank rows are listed one after the other, each with its
        scale, and no byte is copied.
        """
        if len(uses) == 1 and uses[0].scale == 1.0:
            return self._rows_of(uses[0].adapter)
        key = tuple((use.adapter.digest, use.scale) for use in uses)
        composed = self._composed.get(key)
        if composed is None:
            composed = self._composed[key] = self._kernels.prepare_adapter(self._compose(uses))
            if len(self._composed) > _COMPOSED:
                self._composed.popitem(last=False)
        else:
            self._composed.move_to_end(key)
        return composed

    def _rows_of(self, version: AdapterVersion) -> AdapterRows:
        entry = self._entries.get(version.digest)
        if entry is None or entry.rows is None:
            raise AdapterError(f"adapter {version} is not resident: load it first")
        return entry.rows

    def _compose(self, uses: Sequence[AdapterUse]) -> AdapterRows:
        parts: dict[int, list[tuple[LowRankRows, float]]] = {}
        for use in uses:
            for slot, rows in self._rows_of(use.adapter).low_rank.items():
                parts.setdefault(slot, []).append((rows, use.scale))
        low_rank = {
            slot: LowRankRows(
                np.concatenate([rows.a for rows, _ in part]),
                np.concatenate([rows.b for rows, _ in part]),
                np.concatenate([rows.scale * np.float32(scale) for rows, scale in part]),
            )
            for slot, part in parts.items()
        }
        return AdapterRows(low_rank, {}, self._dtype)

    # -- pool.Evictable ------------------------------------------------------------------

    def evictable_pages(self) -> int:
        return self._idle_pages

    def coldest(self) -> float | None:
        """Worth of the idle adapter that is the least missed: see `pool.Evictable`.

        The wait for a new load, per page and per second until the next use, which is guessed
        from the time since the last one and from how popular the adapter has been. Thousands
        are not ranked anew for every page: what became idle since is warmer anyway.
        """
        now = self._clock()
        for fresh in (now - self._ranked_at < _RANKED_SECONDS, False):
            if not fresh:
                ranked = [(self._worth(entry, now), entry.last_used, entry) for entry in self._idle]
                self._ranked = sorted(ranked, key=lambda item: item[0], reverse=True)
                self._ranked_at = now
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
    def _worth(entry: _Entry, now: float) -> float:
        age = now - entry.last_used
        popularity = max(1.0, entry.popularity * math.exp(-age / _POPULARITY_SECONDS))
        return entry.load_seconds * popularity / (entry.num_pages * (age + 1e-3))

    # -- looking at it -------------------------------------------------------------------

    def check(self, folder: str | Path) -> AdapterPlan:
        """Read and check every byte of an adapter folder, on any thread; nothing is kept.

        Raises InvalidAdapter, AdapterMismatch or AdapterTooLarge.
        """
        plan = peft.plan(peft.read_header(folder, self._limits), self._base, self._limits)
        ranks = tuple(plan.low_rank.get(slot, 0) for slot in range(len(self._base.sites)))
        self._refuse_giant(self._pack(ranks).num_pages, f"in {folder}")
        peft.read(folder, self._base, limits=self._limits)
        return plan

    def counts(self) -> tuple[int, int]:
        """How many adapters are resident, and how many loading."""
        states = [entry.state for entry in self._entries.values() if entry.pages is not None]
        return states.count("resident"), states.count("loading")

    def status(self, version: AdapterVersion) -> dict[str, object]:
        """Everything there is to say about one adapter's residency; times in seconds."""
        entry = self._entries.get(version.digest) or _Entry(version)
        state = self.state(version)
        used = entry.hits > 0 or entry.state == "resident"
        return {
            "state": state,
            "tier": "pool" if state == "resident" else "disk",
            "pages": entry.num_pages,
            "bytes": entry.num_pages * self._arena.page_bytes,
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

    def _ranks(self, version: AdapterVersion) -> tuple[int, ...]:
        if len(version.ranks) == len(self._base.sites):
            return version.ranks
        # registered without a base: look now
        plan = peft.plan(peft.read_header(version.path, self._limits), self._base, self._limits)
        return tuple(plan.low_rank.get(slot, 0) for slot in range(len(self._base.sites)))

    def _pack(self, ranks: Sequence[int]) -> Packing:
        """Where rows lie in pages: per slot the rows of A, then those of B."""
        runs = [
            (rank, features * self._dtype.itemsize)
            for site, rank in zip(self._base.sites, ranks, strict=True)
            for features in (site.in_features, site.out_features)
        ]
        return pack_rows(runs, self._arena.page_bytes)

    def _refuse_giant(self, pages: int, what: str) -> None:
        limit = self._pool.limit(Owner.ADAPTER)
        if pages > limit:
            raise AdapterTooLarge(
                f"the adapter {what} takes {pages} pages of {self._arena.page_bytes} bytes, adapters "
                f"can have {limit} at most: start with more --memory, or train a lower rank"
            )

    def _fetch(self, entry: _Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        """Loader thread: from files to pages. Touches nothing of the store but `_done`."""
        rows, content, error, began = None, "", None, self._clock()
        try:
            lowered, content = peft.read(version.path, self._base, version.digest, self._limits)
            rows = self._write(lowered, pages)
        except ChiliadError as refused:
            error = refused
        except OSError as failed:
            error = InvalidAdapter(f"cannot read adapter {version}: {failed}")
        except MemoryError:
            error = OutOfMemory(f"no memory to read adapter {version}: try again later", retry_after=5.0)
        except Exception as bug:
            log.exception("loading adapter %s failed", version)
            error = ChiliadError(f"loading adapter {version} failed: {bug!r}")
        self._done.append(_Done(entry, rows, content, self._clock() - began, error))
        self._on_ready()

    def _write(self, lowered: Lowered, pages: np.ndarray) -> AdapterRows:
        """Copy rows into pages (loader thread)."""
        slots = sorted(lowered.low_rank)
        ranks = [0] * len(self._base.sites)
        for slot in slots:
            ranks[slot] = len(lowered.low_rank[slot].a)
        packing = self._pack(ranks)
        assert packing.num_pages == len(pages), "what was reserved is not what was read"
        offsets = packing.offsets(pages)
        low_rank, first = {}, 0
        for slot in slots:
            pair, rank = lowered.low_rank[slot], ranks[slot]
            a, b = offsets[first : first + rank], offsets[first + rank : first + 2 * rank]
            self._copy(pair.a, a)
            self._copy(pair.b, b)
            low_rank[slot] = LowRankRows(a, b, np.ones(rank, np.float32))
            first += 2 * rank
        return AdapterRows(low_rank, {}, self._dtype)

    def _copy(self, rows: torch.Tensor, offsets: np.ndarray) -> None:
        """Rows [r, n] to their places, as many at once as lie side by side."""
        stored = rows.to(self._dtype).contiguous()
        nbytes = stored.shape[1] * stored.element_size()
        source = stored.view(torch.uint8).numpy().reshape(-1)
        breaks = np.flatnonzero(np.diff(offsets) != nbytes) + 1
        for start, stop in pairwise((0, *breaks.tolist(), len(offsets))):
            at, size = int(offsets[start]), (stop - start) * nbytes
            self._bytes[at : at + size] = source[start * nbytes : stop * nbytes]

    def _fail(self, entry: _Entry, error: Exception | None) -> None:
        assert entry.pages is not None
        self._pool.free(entry.pages)
        entry.pages, entry.state, entry.error = None, "failed", error
        first, longest = _RETRY_SECONDS
        entry.retry_at = self._clock() + min(longest, first * 2.0**entry.failures)
        entry.failures += 1
        if entry.doomed:
            del self._entries[entry.version.digest]

    def _drop(self, entry: _Entry, reason: str) -> int:
        """Free a resident adapter's pages; returns how many."""
        assert entry.pages is not None
        assert entry.users == 0
        freed = self._pool.free(entry.pages)
        entry.state = "absent"
        self._set_idle(entry)
        entry.pages = entry.rows = None
        digest = entry.version.digest
        for key in [key for key in self._composed if any(digest == part for part, _ in key)]:
            del self._composed[key]
        if entry.doomed:
            del self._entries[digest]
        self._metrics.adapter_evictions[reason] += 1
        return freed

    def _set_idle(self, entry: _Entry) -> None:
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
