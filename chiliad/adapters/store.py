"""The life of an adapter's bytes: absent -> loading -> resident -> absent again, or failed.

The engine thread owns the store. `load` reserves pages at once; a small pool of loader threads
reads, checks, lowers and copies into them; `poll` applies what they finished. So a load costs
the engine a table entry, pages are never promised twice, and while it computes loaders take only
a small share of the machine (`_rest`). An adapter in use is never moved
or freed, and one that is idle stays until somebody needs its pages more.

Everything is keyed by the digest: two names of one folder share their rows.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from chiliad.adapters import peft
from chiliad.adapters.base import AdapterPlan, Lowered
from chiliad.adapters.residency import Done, Entry, Residents
from chiliad.core import AdapterUse, AdapterVersion, BaseInfo
from chiliad.errors import AdapterError, ChiliadError, InvalidAdapter, OutOfMemory
from chiliad.kernels.base import AdapterRows, Kernels, LowRankRows
from chiliad.memory.arena import Arena, Packing, pack_rows
from chiliad.memory.pool import PagePool
from chiliad.observe import EngineMetrics

log = logging.getLogger(__name__)

_COMPOSED = 1024  # compositions whose rows are kept ready
_SHARE = 0.1  # of a core that a loader takes while the engine computes
_STINT = 5e-4  # seconds of work between two rests
_WRITTEN = 2**19  # numbers written between two rests, at least
_PACKINGS = 64  # remembered: adapters of one training script have the same ranks
_ROOM = 2**26  # bytes of file contents for which a loader thread keeps its buffer


class AdapterStore(Residents):
    """Residency of adapters and the bytes behind it: reads, checks, lowers and packs their files.

    dtype: float32, bfloat16 or int8 (with a scale for each row), of the stored rows. on_ready is
    called on a loader thread when `poll` has something to do.
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
        super().__init__(pool, arena.page_bytes, metrics=metrics, clock=clock)
        self._arena, self._kernels, self._base = arena, kernels, base
        self._dtype = dtype
        self._limits = limits or peft.Limits()
        self._recipes = peft.Recipes(base, self._limits)
        self._pack = functools.lru_cache(_PACKINGS)(self._pack_ranks)
        self._on_ready = on_ready
        self._composed: collections.OrderedDict[tuple[tuple[str, float], ...], AdapterRows] = (
            collections.OrderedDict()
        )
        self._fetching: set[Entry] = set()
        self._local = threading.local()  # of each loader thread
        #: whether the engine computes, so that loaders should leave it most of the machine
        self.busy = False
        self._loaders = ThreadPoolExecutor(max_workers=loaders, thread_name_prefix="adapter-loader")

    def close(self) -> None:
        """Stop the loaders and give every page back. Nothing may use the store afterwards."""
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._clear()
        self._composed.clear()

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

    def check(self, folder: str | Path) -> AdapterPlan:
        """Read and check every byte of an adapter folder, on any thread; nothing is kept.

        Raises InvalidAdapter, AdapterMismatch or AdapterTooLarge.
        """
        with peft.PeftFolder(folder, self._limits) as files:
            plan = self._recipes.plan(files)
        self._refuse_giant(self._pack(self._by_slot(plan)).num_pages, f"in {folder}")
        self._recipes.read(folder)
        return plan

    # -- residency.Residents -------------------------------------------------------------

    def _count_pages(self, version: AdapterVersion) -> int:
        return self._pack(self._ranks(version)).num_pages

    def _begin(self, entry: Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        self._fetching.add(entry)
        self._loaders.submit(self._fetch, entry, version, pages)

    def _accept(self, done: Done) -> AdapterRows:
        entry = done.entry
        entry.content = entry.content or done.content
        if entry.content != done.content:  # in spite of equal size and time
            raise peft.changed(entry.version.path)
        assert done.rows is not None
        return self._kernels.prepare_adapter(done.rows)

    def _forget(self, digest: str) -> None:
        for key in [key for key in self._composed if any(digest == part for part, _ in key)]:
            del self._composed[key]

    # -- inside --------------------------------------------------------------------------

    def _ranks(self, version: AdapterVersion) -> tuple[int, ...]:
        if len(version.ranks) == len(self._base.sites):
            return version.ranks
        with peft.PeftFolder(version.path, self._limits) as files:  # registered without a base: look now
            return self._by_slot(self._recipes.plan(files))

    def _by_slot(self, plan: AdapterPlan) -> tuple[int, ...]:
        return tuple(plan.low_rank.get(slot, 0) for slot in range(len(self._base.sites)))

    def _pack_ranks(self, ranks: tuple[int, ...]) -> Packing:
        """Where rows lie in pages: per slot the rows of A, then those of B."""
        runs = [
            (rank, features * self._dtype.itemsize)
            for site, rank in zip(self._base.sites, ranks, strict=True)
            for features in (site.in_features, site.out_features)
        ]
        return pack_rows(runs, self._arena.page_bytes)

    def _fetch(self, entry: Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        """Loader thread: from files to pages. Touches nothing of the store but `_done`."""
        rows, content, error, began = None, "", None, self._clock()
        self._local.rested = time.thread_time()
        try:
            lowered, content = self._recipes.read(version.path, version.digest, self._room, self._rest)
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
        self._fetching.discard(entry)
        self._done.append(Done(entry, rows, content, self._clock() - began, error))
        self._on_ready()

    def _write(self, lowered: Lowered, pages: np.ndarray) -> AdapterRows:
        """Copy rows into pages (loader thread)."""
        slots = sorted(lowered.low_rank)
        ranks = {slot: len(lowered.low_rank[slot].a) for slot in slots}
        packing = self._pack(tuple(ranks.get(slot, 0) for slot in range(len(self._base.sites))))
        assert packing.num_pages == len(pages), "what was reserved is not what was read"
        offsets = packing.offsets(pages)
        scale = np.empty(len(offsets), np.float32)
        matrices: list[tuple[torch.Tensor, float]] = []
        begin = end = numbers = 0
        for slot in slots:
            pair = lowered.low_rank[slot]
            matrices += (pair.a, 1.0), (pair.b, pair.scale)
            end += 2 * ranks[slot]
            numbers += pair.a.numel() + pair.b.numel()
            if numbers > _WRITTEN or slot == slots[-1]:
                scale[begin:end] = self._kernels.write_rows(matrices, offsets[begin:end], self._dtype)
                matrices, begin, numbers = [], end, 0
                self._rest()
        low_rank, first = {}, 0
        for slot in slots:
            middle, last = first + ranks[slot], first + 2 * ranks[slot]
            of_both = scale[first:middle] * scale[middle:last]
            low_rank[slot] = LowRankRows(offsets[first:middle], offsets[middle:last], of_both)
            first = last
        return AdapterRows(low_rank, {}, self._dtype)

    def _room(self, nbytes: int) -> torch.Tensor:
        """This loader thread's buffer for file contents: fresh memory is dear."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            if nbytes <= _ROOM:
                self._local.buffer = buffer
        return buffer[:nbytes]

    def _rest(self) -> None:
        """While the engine computes, a loader thread pauses after every bit of work.

        Alone it takes a tenth of a core, so that those who decode hardly notice; the more loads
        wait, the larger the share, so that the queue does not wait for the disk's sake.
        """
        now = time.thread_time()
        worked = now - self._local.rested
        if worked < _STINT:
            return
        self._local.rested = now
        share = _SHARE * max(1, len(self._fetching))
        if self.busy and share < 1:
            time.sleep(worked * (1 - share) / share)
