"""Swap: KV blocks of preempted sequences, kept outside the pool until they run again.

Copying a token's KV out and back is far less work than computing it again, but its bytes have to
be somewhere: the space is memory beyond the pool's, and bounded. Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from chiliad.errors import InvalidConfig, OutOfMemory


class SwapSpace:
    """Room for `nbytes // bytes of a block` blocks, reserved now and touched when first needed.

    pages: uint8 [num_pages, page_bytes], the pool's own memory; a block is `num_layers` of them.
    `block_seconds` is what copying one block one way takes, a moving average.
    """

    def __init__(
        self,
        pages: np.ndarray,
        num_layers: int,
        nbytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        block_bytes = num_layers * int(pages[0].nbytes)
        self.num_blocks = nbytes // block_bytes
        if not self.num_blocks:
            raise InvalidConfig(
                f"{nbytes} bytes of swap hold no block of {block_bytes} bytes: give more, or 0", param="swap"
            )
        self.block_seconds = block_bytes / 1e9  # fresh memory is dear; warm memory copies faster
        self._pages = pages
        # Never freed and handed out from its low end: page faults cost more than the copies.
        try:
            self._space = np.empty((self.num_blocks, num_layers, pages.shape[1]), pages.dtype)
        except MemoryError as error:
            raise OutOfMemory(f"the system refused {nbytes / 1e9:.2f} GB of swap: lower --swap") from error
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._clock = clock

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def used_pages(self) -> int:
        return self.used_blocks * int(self._space.shape[1])

    @property
    def num_pages(self) -> int:
        return self.num_blocks * int(self._space.shape[1])

    def save(self, table: np.ndarray) -> list[int]:
        """Copy blocks out (their pages, int32 [n, num_layers]) -> their places; [] if there is no room."""
        if len(table) > len(self._free):
            return []
        began = self._clock()
        places = [self._free.pop() for _ in table]
        for place, pages in zip(places, table, strict=True):
            # "clip" writes in place, where the default mode makes a copy first
            np.take(self._pages, pages, axis=0, out=self._space[place], mode="clip")
        self._learn(began, len(places))
        return places

    def restore(self, places: list[int], table: np.ndarray) -> None:
        """Copy blocks back into other pages, int32 [n, num_layers]. The places stay taken."""
        began = self._clock()
        for place, pages in zip(places, table, strict=True):
            self._pages[pages] = self._space[place]
        self._learn(began, len(places))

    def free(self, places: list[int]) -> None:
        self._free.extend(reversed(places))

    def check(self, held: list[int]) -> None:
        """State the conservation law, given every place in use; AssertionError if it is broken."""
        every = sorted(held + self._free)
        assert every == list(range(self.num_blocks)), "a place in swap is lost, or has two owners"

    def _learn(self, began: float, blocks: int) -> None:
        if blocks:
            self.block_seconds += 0.3 * ((self._clock() - began) / blocks - self.block_seconds)
