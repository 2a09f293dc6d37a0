"""The pool against a plain model of it: thousands of random histories, laws checked after each step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from chiliad.errors import InvalidConfig, OutOfMemory
from chiliad.memory.pool import Owner, PagePool

OWNERS = st.sampled_from([Owner.KV, Owner.ADAPTER])


class Cache:
    """An evictable that keeps whole allocations, each with a worth."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.items: list[tuple[float, np.ndarray]] = []
        self.evicted: list[float] = []

    def evictable_pages(self) -> int:
        return sum(len(pages) for _, pages in self.items)

    def coldest(self) -> float | None:
        return min((worth for worth, _ in self.items), default=None)

    def evict(self) -> int:
        item = min(self.items, key=lambda entry: entry[0])
        self.items = [entry for entry in self.items if entry is not item]
        self.evicted.append(item[0])
        return self.pool.free(item[1])


class PoolMachine(RuleBasedStateMachine):
    """Allocations are held by hand, retained, freed, or handed to a cache that may lose them."""

    held = Bundle("held")

    @initialize(num_pages=st.integers(1, 60), share=st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]))
    def start(self, num_pages: int, share: float | None) -> None:
        self.pool = PagePool(num_pages, adapter_share=share)
        self.caches = {Owner.KV: Cache(self.pool), Owner.ADAPTER: Cache(self.pool)}
        for owner, cache in self.caches.items():
            self.pool.register(cache, owner)
        self.refs: dict[int, int] = {}  # page -> references held by hand
        self.owner: dict[int, Owner] = {}

    @rule(target=held, n=st.integers(1, 25), owner=OWNERS)
    def alloc(self, n: int, owner: Owner) -> object:
        free, before = self.pool.free_pages, self.pool.usage()
        evicted = [len(cache.evicted) for cache in self.caches.values()]
        available = self.pool.available(owner)
        try:
            pages = self.pool.alloc(n, owner)
        except OutOfMemory:
            assert n > available
            assert self.pool.usage() == before
            assert evicted == [len(cache.evicted) for cache in self.caches.values()]
            return multiple()
        assert n <= available
        assert pages.dtype == np.int32
        assert len(set(pages.tolist())) == n
        assert not set(pages.tolist()) & set(self.refs)
        if n <= free and self.pool.limit(owner) == self.pool.num_pages:
            assert evicted == [len(cache.evicted) for cache in self.caches.values()]
        for page in pages.tolist():
            self.refs[page] = 1
            self.owner[page] = owner
        return (owner, pages)

    @rule(target=held, item=held)
    def retain(self, item: tuple[Owner, np.ndarray]) -> tuple[Owner, np.ndarray]:
        self.pool.retain(item[1])
        for page in item[1].tolist():
            self.refs[page] += 1
        return item

    @rule(item=consumes(held))
    def free(self, item: tuple[Owner, np.ndarray]) -> None:
        self._drop(item[1])

    @rule(item=consumes(held), cut=st.floats(0, 1))
    def free_in_parts(self, item: tuple[Owner, np.ndarray], cut: float) -> None:
        middle = int(cut * len(item[1]))
        self._drop(item[1][middle:])
        self._drop(item[1][:middle])

    def _drop(self, pages: np.ndarray) -> None:
        gone = 0
        for page in pages.tolist():
            self.refs[page] -= 1
            if not self.refs[page]:
                gone += 1
                del self.refs[page], self.owner[page]
        assert self.pool.free(pages) == gone

    @rule(item=consumes(held), worth=st.floats(0, 10))
    def give_to_cache(self, item: tuple[Owner, np.ndarray], worth: float) -> None:
        owner, pages = item
        if (self.pool.references(pages) > 1).any():
            self._drop(pages)
            return
        self.caches[owner].items.append((worth, pages))
        for page in pages.tolist():
            del self.refs[page], self.owner[page]

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        held: dict[Owner, list[np.ndarray]] = {
            owner: [pages for _, pages in cache.items] for owner, cache in self.caches.items()
        }
        for page, count in self.refs.items():
            held[self.owner[page]] += [np.array([page], np.int32)] * count
        pool.check(held)
        cached = sum(cache.evictable_pages() for cache in self.caches.values())
        assert pool.free_pages + len(self.refs) + cached == pool.num_pages
        assert pool.evictable_pages == cached
        assert all(pool.usage()[name] <= peak <= pool.num_pages for name, peak in pool.peaks().items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_young_pool_gives_low_pages_in_order_and_reuses_them() -> None:
    pool = PagePool(100)
    first = pool.alloc(5, Owner.KV)
    assert first.tolist() == [0, 1, 2, 3, 4]
    pool.free(first)
    assert pool.alloc(5, Owner.ADAPTER).tolist() == [0, 1, 2, 3, 4]


def test_eviction_takes_the_least_valuable_across_caches() -> None:
    pool = PagePool(6)
    kv, adapters = Cache(pool), Cache(pool)
    pool.register(kv, Owner.KV)
    pool.register(adapters, Owner.ADAPTER)
    kv.items = [(3.0, pool.alloc(2, Owner.KV))]
    adapters.items = [(1.0, pool.alloc(2, Owner.ADAPTER)), (4.0, pool.alloc(2, Owner.ADAPTER))]
    assert len(pool.alloc(3, Owner.KV)) == 3
    assert adapters.evicted == [1.0]
    assert kv.evicted == [3.0]
    assert pool.counters.evictions == 2
    assert pool.counters.evicted == 4


def test_static_split_keeps_each_within_its_share() -> None:
    pool = PagePool(10, adapter_share=0.3)
    assert (pool.limit(Owner.ADAPTER), pool.limit(Owner.KV)) == (3, 7)
    pool.alloc(3, Owner.ADAPTER)
    with pytest.raises(OutOfMemory):
        pool.alloc(1, Owner.ADAPTER)
    pool.alloc(7, Owner.KV)
    with pytest.raises(OutOfMemory):
        pool.alloc(1, Owner.KV)


def test_double_free_is_noticed() -> None:
    pool = PagePool(4)
    pages = pool.alloc(2, Owner.KV)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(4)
    pages = pool.alloc(2, Owner.KV)
    pool.check({Owner.KV: [pages]})
    with pytest.raises(AssertionError, match="KV: page 0 has 1 references and 0 holders"):
        pool.check({Owner.KV: []})


@pytest.mark.parametrize("arguments", [(0, None), (-3, None), (4, 1.5), (4, -0.1)])
def test_bad_sizes_are_refused(arguments: tuple[int, float | None]) -> None:
    with pytest.raises(InvalidConfig):
        PagePool(*arguments)
