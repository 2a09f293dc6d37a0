"""The prefix cache alone: what is found, what is never found, what goes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.memory.pool import Owner, PagePool
from chiliad.memory.prefix import Block, PrefixCache

LAYERS, SIZE = 2, 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(num_pages: int = 40) -> tuple[PagePool, PrefixCache, Clock]:
    pool, clock = PagePool(num_pages), Clock()
    return pool, PrefixCache(pool, SIZE, clock), clock


def compute(pool: PagePool, cache: PrefixCache, chain: list[bytes], tokens: list[int]) -> list[Block]:
    """A sequence computes its full blocks, publishes them and ends: its cached blocks go idle."""
    cache.extend(chain, tokens, len(tokens))
    found = cache.match(chain, len(chain) - 1)
    blocks = list(found)
    for key in chain[1 + len(found) :]:
        pages = pool.alloc(LAYERS, Owner.KV)
        block = cache.insert(key, pages)
        pool.free(pages)
        if block is not None:
            blocks.append(block)
    for block in found:
        pool.free(block.pages)
    cache.release(blocks)
    return blocks


def find(pool: PagePool, cache: PrefixCache, chain: list[bytes], tokens: list[int]) -> int:
    """How many tokens a new sequence would find."""
    cache.extend(chain, tokens, len(tokens) - 1)
    found = cache.match(chain, (len(tokens) - 1) // SIZE)
    for block in found:
        pool.free(block.pages)
    cache.release(found)
    cache.check()
    return len(found) * SIZE


def test_a_common_beginning_is_found_in_whole_blocks() -> None:
    pool, cache, _ = make()
    seed = cache.seed("x")
    compute(pool, cache, [seed], list(range(10)))
    assert len(cache) == 2
    assert find(pool, cache, [seed], list(range(20))) == 8
    assert find(pool, cache, [seed], [0, 1, 2, 3, 4, 5, 6, 99, 8]) == 4
    assert find(pool, cache, [seed], [99, *range(1, 20)]) == 0


def test_at_least_one_token_is_left_to_compute() -> None:
    pool, cache, _ = make()
    seed = cache.seed("x")
    compute(pool, cache, [seed], list(range(8)))
    assert find(pool, cache, [seed], list(range(8))) == 4
    assert find(pool, cache, [seed], list(range(9))) == 8
    assert find(pool, cache, [seed], list(range(4))) == 0


def test_blocks_of_another_seed_are_never_found() -> None:
    pool, cache, _ = make()
    tokens = list(range(12))
    compute(pool, cache, [cache.seed((("digest", 1.0),), "tenant", "salt")], tokens)
    for identity in [
        ((), "tenant", "salt"),
        ((("digest", 0.5),), "tenant", "salt"),
        ((("other", 1.0),), "tenant", "salt"),
        ((("digest", 1.0),), "", "salt"),
        ((("digest", 1.0),), "tenant", ""),
        ((("digest", 1.0),), "tenantsalt", ""),
    ]:
        assert find(pool, cache, [cache.seed(*identity)], tokens) == 0


def test_equal_tokens_at_another_place_are_not_found() -> None:
    """KV depends on everything before it: a block is its whole history."""
    pool, cache, _ = make()
    seed = cache.seed()
    compute(pool, cache, [seed], [1, 1, 1, 1, 2, 2, 2, 2])
    assert find(pool, cache, [seed], [2, 2, 2, 2, 1, 1, 1, 1, 0]) == 0
    assert find(pool, cache, [seed], [1, 1, 1, 1, 1, 1, 1, 1, 0]) == 4


def test_the_least_recently_used_chain_goes_first_and_its_end_before_its_beginning() -> None:
    pool, cache, clock = make(num_pages=8)
    old, new = [cache.seed("old")], [cache.seed("new")]
    compute(pool, cache, old, list(range(8)))
    clock.now = 1.0
    compute(pool, cache, new, list(range(8)))
    assert pool.free_pages == 0
    assert cache.evictable_pages() == 8
    pool.free(pool.alloc(2, Owner.KV))
    assert find(pool, cache, old[:1], list(range(9))) == 4
    clock.now = 2.0
    pool.free(pool.alloc(6, Owner.KV))  # 2 free, so two blocks go: the one just looked at stays
    assert find(pool, cache, old[:1], list(range(9))) == 4
    assert find(pool, cache, new[:1], list(range(9))) == 0
    pool.check({Owner.KV: cache.held()})


def test_blocks_in_use_are_not_evictable() -> None:
    pool, cache, _ = make(num_pages=4)
    chain = [cache.seed()]
    compute(pool, cache, chain, list(range(8)))
    used = cache.match(chain, 1)
    assert cache.evictable_pages() == 2
    pool.free(pool.alloc(2, Owner.KV))
    assert len(cache) == 1
    assert cache.evict() == 0
    assert cache.coldest() is None
    pool.free(used[0].pages)
    cache.release(used)
    assert cache.clear() == 2
    assert pool.free_pages == 4


def test_worth_falls_with_age_and_rises_with_the_cost_of_a_block() -> None:
    pool, cache, clock = make()
    assert cache.coldest() is None
    compute(pool, cache, [cache.seed()], list(range(4)))
    clock.now = 1.0
    young = cache.coldest()
    clock.now = 10.0
    old = cache.coldest()
    assert young is not None
    assert old is not None
    assert old == pytest.approx(young / 10)
    cache.rebuild_seconds *= 3
    assert cache.coldest() == pytest.approx(old * 3)


def test_a_second_copy_of_a_block_is_not_taken() -> None:
    pool, cache, _ = make()
    chain = [cache.seed()]
    compute(pool, cache, chain, list(range(4)))
    copy = pool.alloc(LAYERS, Owner.KV)
    assert cache.insert(chain[1], copy) is None
    assert pool.free(copy) == LAYERS
    cache.check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=18), st.booleans()),
        max_size=25,
    ),
    st.integers(6, 20),
)
def test_found_blocks_always_hold_the_right_tokens(
    histories: list[tuple[str, list[int], bool]], num_pages: int
) -> None:
    """Against the truth of what each page was filled with, with evictions all the time."""
    pool, cache, clock = make(num_pages)
    written: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> seed, all tokens up to its end
    live: list[tuple[list[Block], list[np.ndarray]]] = []
    for name, tokens, stays in histories:
        clock.now += 1.0
        chain = [cache.seed(name)]
        cache.extend(chain, tokens, len(tokens))
        blocks = cache.match(chain, (len(tokens) - 1) // SIZE)
        pages = [block.pages for block in blocks]
        for i, block in enumerate(blocks):
            for page in block.pages.tolist():
                assert written[page] == (name, tuple(tokens[: (i + 1) * SIZE]))
        for i in range(len(blocks), len(tokens) // SIZE):
            if pool.available(Owner.KV) < LAYERS:
                break
            pages.append(pool.alloc(LAYERS, Owner.KV))
            for page in pages[-1].tolist():
                written[page] = (name, tuple(tokens[: (i + 1) * SIZE]))
            block = cache.insert(chain[i + 1], pages[-1])
            if block is not None:
                blocks.append(block)
        live.append((blocks, pages))
        if not stays:
            for blocks, pages in live:
                for each in pages:
                    pool.free(each)
                cache.release(blocks)
            live.clear()
        cache.check()
        pool.check({Owner.KV: cache.held() + [page for _, pages in live for page in pages]})
