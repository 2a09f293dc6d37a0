"""Prefix cache: full KV blocks that later requests with the same beginning can use again.

A block is known by a chained hash: blake2b over the hash of the block before it and the block's
tokens. The chain starts from a seed that names everything else that KV depends on (adapter
content and scales, tenant, salt), so a replaced adapter or another tenant can never meet a
block. The hash is cryptographic because a collision would show one request's context to another.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from chiliad.memory.pool import Owner, PagePool


class Block:
    """One cached block. `users` counts the sequences that hold it besides the cache."""

    __slots__ = ("idle_since", "key", "pages", "users")

    def __init__(self, key: bytes, pages: np.ndarray) -> None:
        self.key = key
        self.pages = pages  # int32 [num_layers]
        self.users = 1
        self.idle_since = 0.0


class PrefixCache:
    """Blocks by chained hash. Blocks that nobody uses are evictable, least recently used first.

    The cache holds one pool reference per block, each sequence that uses the block another.
    `rebuild_seconds` is what computing one block takes; the scheduler keeps it up to date.
    """

    def __init__(
        self, pool: PagePool, block_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.block_tokens = block_tokens
        self.rebuild_seconds = block_tokens * 1e-3
        self._pool = pool
        self._clock = clock
        self._blocks: dict[bytes, Block] = {}
        self._idle: OrderedDict[bytes, Block] = OrderedDict()  # least recently used first
        self._idle_pages = 0
        pool.register(self, Owner.KV)

    def __len__(self) -> int:
        return len(self._blocks)

    def seed(self, *identity: object) -> bytes:
        """Start of a chain: everything besides the tokens that decides the KV contents."""
        return blake2b(repr(identity).encode(), digest_size=32).digest()

    def extend(self, chain: list[bytes], tokens: Sequence[int], num_tokens: int) -> None:
        """Bring `chain` (seed first, then one hash per full block) up to tokens[:num_tokens]."""
        size = self.block_tokens
        for start in range((len(chain) - 1) * size, num_tokens - size + 1, size):
            data = array("q", tokens[start : start + size]).tobytes()
            chain.append(blake2b(chain[-1] + data, digest_size=32).digest())

    def match(self, chain: list[bytes], num_blocks: int) -> list[Block]:
        """The longest run of cached blocks among the chain's first `num_blocks`, now in use.

        Every block returned must be given back through `release`.
        """
        found: list[Block] = []
        for key in chain[1 : num_blocks + 1]:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        for block in found:
            if block.users == 0:
                del self._idle[block.key]
                self._idle_pages -= len(block.pages)
            block.users += 1
            self._pool.retain(block.pages)
        return found

    def insert(self, key: bytes, pages: np.ndarray) -> Block | None:
        """Offer a block that a sequence has filled (int32 [num_layers]); the sequence keeps using it.

        None when an equal block is cached already: the sequence's copy then stays its own.
        """
        if key in self._blocks:
            return None
        block = Block(key, pages.copy())
        self._blocks[key] = block
        self._pool.retain(block.pages)
        return block

    def release(self, blocks: list[Block]) -> None:
        """A sequence stops using blocks (in chain order). It frees its own references itself, before."""
        now = self._clock()
        for block in reversed(blocks):  # the end of a chain is worth nothing without its beginning
            block.users -= 1
            if block.users == 0:
                block.idle_since = now
                self._idle[block.key] = block
                self._idle_pages += len(block.pages)

    def clear(self) -> int:
        """Drop every block that nobody uses; returns the pages freed."""
        freed = 0
        while self._idle:
            freed += self.evict()
        return freed

    # -- pool.Evictable ------------------------------------------------------------------

    def evictable_pages(self) -> int:
        return self._idle_pages

    def coldest(self) -> float | None:
        for block in self._idle.values():
            age = max(self._clock() - block.idle_since, 1e-3)
            return self.rebuild_seconds / (len(block.pages) * age)
        return None

    def evict(self) -> int:
        if not self._idle:
            return 0
        key, block = self._idle.popitem(last=False)
        del self._blocks[key]
        self._idle_pages -= len(block.pages)
        return self._pool.free(block.pages)

    def held(self) -> list[np.ndarray]:
        """The page references of the cache itself, for `PagePool.check`."""
        return [block.pages for block in self._blocks.values()]

    def check(self) -> None:
        """State the cache's own laws; AssertionError names the one that broke."""
        idle = [block for block in self._blocks.values() if block.users == 0]
        assert {id(b) for b in idle} == {id(b) for b in self._idle.values()}, "idle blocks and users disagree"
        assert self._idle_pages == sum(len(block.pages) for block in idle), "idle pages drifted"
        assert all(block.key == key for key, block in self._blocks.items()), "a block lies under another key"
        if self._blocks:
            pages = np.stack([block.pages for block in self._blocks.values()])
            users = np.array([block.users for block in self._blocks.values()])
            assert (self._pool.references(pages) == users[:, None] + 1).all(), "references and users disagree"
