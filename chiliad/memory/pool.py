"""Pages as integers: who owns them, how often, and who gives some back when they run out.

KV blocks and adapter weights are tenants of one pool (Unified Paging, S-LoRA, arXiv
2311.03285), so memory that idle adapters do not need is room for KV, and the reverse. The
pool knows neither bytes (`arena.py`) nor what is inside a page. One thread uses it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np

from chiliad.errors import InvalidConfig, OutOfMemory


class Owner(enum.IntEnum):
    FREE = 0
    KV = 1
    ADAPTER = 2


class Evictable(Protocol):
    """Someone who keeps pages only because they may be useful again.

    `coldest` puts a cache's least valuable item on a scale that all caches share: the seconds
    of work that keeping it is expected to save, per page and second, for which
    `rebuild_seconds / pages / seconds_since_last_use` is a fair guess.
    """

    def evictable_pages(self) -> int:
        """Pages that repeated `evict` calls would return to the pool now."""

    def coldest(self) -> float | None:
        """Worth of the item that `evict` would drop; None when there is none."""

    def evict(self) -> int:
        """Drop the coldest item, free its pages, and return how many became free."""


@dataclass(slots=True)
class PoolCounters:
    """Monotonic counts since start, in pages unless said otherwise."""

    allocated: int = 0
    freed: int = 0
    evicted: int = 0
    evictions: int = 0  # items
    refusals: int = 0  # calls of alloc that raised OutOfMemory


class PagePool:
    """`num_pages` pages with one owner each and a reference count.

    `adapter_share` (0..1) fixes a static split instead of the unified pool: adapters never
    take more than that share, KV never more than the rest. It exists to measure what the
    unified pool gains.
    """

    def __init__(self, num_pages: int, adapter_share: float | None = None) -> None:
        if num_pages <= 0:
            raise InvalidConfig(f"a pool needs at least one page, not {num_pages}: raise --memory")
        if adapter_share is not None and not 0.0 <= adapter_share <= 1.0:
            raise InvalidConfig(f"adapter_share must lie in 0..1, not {adapter_share}")
        self.num_pages = num_pages
        self.counters = PoolCounters()
        # A stack whose top is at `_free - 1`. Low pages lie on top and runs come out ascending,
        # so that a young pool touches little of the arena and rows of one adapter are neighbours.
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._free = num_pages
        self._owner = np.zeros(num_pages, np.int8)
        self._refs = np.zeros(num_pages, np.int32)
        self._used = [0] * len(Owner)  # pages by owner; index FREE is unused
        self._peak = [0] * len(Owner)
        self._limit = [num_pages] * len(Owner)
        self.split = adapter_share is not None
        if adapter_share is not None:
            self._limit[Owner.ADAPTER] = int(num_pages * adapter_share)
            self._limit[Owner.KV] = num_pages - self._limit[Owner.ADAPTER]
        self._evictables: list[tuple[Evictable, Owner]] = []

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return self._free

    @property
    def evictable_pages(self) -> int:
        """Pages that caches would give back on demand."""
        return sum(evictable.evictable_pages() for evictable, _ in self._evictables)

    def limit(self, owner: Owner) -> int:
        """Pages that `owner` could ever hold: all of them, unless there is a split."""
        return self._limit[owner]

    def available(self, owner: Owner) -> int:
        """Pages that `alloc(..., owner)` could deliver now, evictions included."""
        own = other = 0
        for evictable, whose in self._evictables:
            if whose is owner:
                own += evictable.evictable_pages()
            else:
                other += evictable.evictable_pages()
        if not self.split:
            return self._free + own + other
        # Evicting one's own pages makes room in the share; evicting another's only frees pages.
        return min(self._free + own + other, self._limit[owner] - self._used[owner] + own)

    def register(self, evictable: Evictable, owner: Owner = Owner.ADAPTER) -> None:
        """Let `evictable`, whose pages belong to `owner`, be asked when pages run out."""
        self._evictables.append((evictable, owner))

    def alloc(self, n: int, owner: Owner) -> np.ndarray:
        """Take n pages with one reference each -> int32 [n].

        Asks the registered caches for their least valuable items on shortage. Raises
        OutOfMemory, having taken and evicted nothing, when even that would not be enough.
        """
        if n > self._free or (self.split and self._used[owner] + n > self._limit[owner]):
            self._make_room(n, owner)
        top = self._free
        pages = self._stack[top - n : top][::-1].copy()
        self._free = top - n
        self._owner[pages] = owner
        self._refs[pages] = 1
        used = self._used[owner] + n
        self._used[owner] = used
        if used > self._peak[owner]:
            self._peak[owner] = used
        self.counters.allocated += n
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """Add one reference to each of these owned, distinct pages."""
        self._refs[pages] += 1

    def free(self, pages: np.ndarray) -> int:
        """Drop one reference of each page; returns how many became free.

        The pages of one call are distinct and have one owner.
        """
        if not len(pages):
            return 0
        left = self._refs[pages] - 1
        if left.any():  # shared pages, or a mistake: the rare case
            if left.min() < 0:
                raise AssertionError(f"page {int(pages[left.argmin()])} was freed twice")
            self._refs[pages] = left
            pages = pages[left == 0]
            if not len(pages):
                return 0
        else:
            self._refs[pages] = left
        n = len(pages)
        owner = self._owner[pages[0]]
        self._owner[pages] = Owner.FREE
        self._stack[self._free : self._free + n] = pages[::-1]
        self._free += n
        self._used[owner] -= n
        self.counters.freed += n
        return n

    def references(self, pages: np.ndarray) -> np.ndarray:
        """Reference counts of pages, int32."""
        counts: np.ndarray = self._refs[pages]
        return counts

    def usage(self) -> dict[str, int]:
        """Pages by owner: free, kv, adapter."""
        return {owner.name.lower(): self._used[owner] if owner else self._free for owner in Owner}

    def peaks(self) -> dict[str, int]:
        """The most pages that each owner has held at once."""
        return {owner.name.lower(): self._peak[owner] for owner in Owner if owner}

    def check(self, held: Mapping[Owner, Iterable[np.ndarray]] | None = None) -> None:
        """State the conservation laws; AssertionError names the one that broke.

        held: for any owner, every page array it holds (a page once per reference); the sums
        must then equal the reference counts.
        """
        owners = np.bincount(self._owner, minlength=len(Owner))
        _law(int(owners.sum()) == self.num_pages, f"owners {owners} do not sum to {self.num_pages}")
        for owner in Owner:
            count, own = int(owners[owner]), self._used[owner] if owner else self._free
            _law(count == own, f"{owner.name}: {count} tags, {own} pages")
        stack = self._stack[: self._free]
        listed = np.bincount(stack, minlength=self.num_pages)
        _law(int(listed.max(initial=0)) <= 1, f"page {int(listed.argmax())} is twice in the free list")
        _law(not self._owner[stack].any(), "an owned page is in the free list")
        _law(bool(((self._refs > 0) == (self._owner != Owner.FREE)).all()), "references disagree with owners")
        _law(self.counters.allocated - self.counters.freed == self.num_pages - self._free, "counters drifted")
        for owner, arrays in (held or {}).items():
            lists = [np.asarray(pages).reshape(-1) for pages in arrays]
            flat = np.concatenate(lists) if lists else np.empty(0, np.int32)
            count_by_page = np.bincount(flat, minlength=self.num_pages)
            expected = np.where(self._owner == owner, self._refs, 0)
            wrong = np.flatnonzero(count_by_page != expected)
            if len(wrong):
                page = int(wrong[0])
                raise AssertionError(
                    f"{owner.name}: page {page} has {expected[page]} references "
                    f"and {count_by_page[page]} holders"
                )

    def _make_room(self, n: int, owner: Owner) -> None:
        """Evict until `alloc(n, owner)` succeeds, or raise OutOfMemory before evicting anything."""
        if n > self.available(owner):
            raise self._refusal(n, owner)
        # Asking for the coldest item may cost a cache a look at all its items, so each is asked
        # once, and again only after it has lost one.
        worths = [evictable.coldest() for evictable, _ in self._evictables]
        while (over := self._used[owner] + n > self._limit[owner]) or n > self._free:
            coldest, least = -1, inf
            for i, worth in enumerate(worths):
                if worth is not None and worth <= least and not (over and self._evictables[i][1] != owner):
                    coldest, least = i, worth
            freed = self._evictables[coldest][0].evict() if coldest >= 0 else 0
            if freed == 0:  # a cache promised more (evictable_pages) than it gave
                raise self._refusal(n, owner)
            worths[coldest] = self._evictables[coldest][0].coldest()
            self.counters.evicted += freed
            self.counters.evictions += 1

    def _refusal(self, n: int, owner: Owner) -> OutOfMemory:
        self.counters.refusals += 1
        return OutOfMemory(
            f"{n} pages wanted for {owner.name.lower()}, {self.available(owner)} of {self.num_pages} "
            "available: wait for requests to finish, or start with more --memory",
            retry_after=1.0,
        )


def _law(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
