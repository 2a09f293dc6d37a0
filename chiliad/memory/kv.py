"""KV cache geometry and the page table of one sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from chiliad.kernels.base import KVLayout

_ALIGN = 64  # bytes: rows start at multiples of it (arena.ALIGN)
_MAX_WASTE = 0.125  # share of a page that adapter rows may leave empty
_MAX_BLOCK = 64  # tokens: beyond it, half-filled last blocks cost more than rows waste


def kv_layout(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    row_bytes: Iterable[int] = (),
) -> KVLayout:
    """Choose `block_tokens`, and with it the page, for a model and its adapters' rows.

    row_bytes: the byte lengths of adapter rows (each site's in and out features times the
    itemsize of the adapters). A page holds the longest of them; among block sizes up to 64
    tokens the smallest is taken whose pages such rows fill to seven eighths, else the one
    they fill best.
    """
    from chiliad.kernels.base import KVLayout  # here, so that the scheduler's BlockTable needs no torch

    token_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
    rows = [-(-nbytes // _ALIGN) * _ALIGN for nbytes in row_bytes]

    def waste(block_tokens: int) -> float:
        page = token_bytes * block_tokens
        return sum(page % row for row in rows) / (len(rows) * page) if rows else 0.0

    smallest = 16
    while token_bytes * smallest < max(rows, default=0):
        smallest += 16
    sizes = range(smallest, max(smallest, _MAX_BLOCK) + 1, 16)
    best = min(sizes, key=lambda size: (0.0 if waste(size) <= _MAX_WASTE else waste(size), size))
    return KVLayout(num_layers, num_kv_heads, head_dim, best, dtype, token_bytes * best)


class BlockTable:
    """The pages of one sequence, block by block: int32 [num_blocks, num_layers]."""

    __slots__ = ("_rows", "num_blocks")

    def __init__(self, num_layers: int) -> None:
        self._rows = np.empty((4, num_layers), np.int32)
        self.num_blocks = 0

    @property
    def pages(self) -> np.ndarray:
        """int32 [num_blocks, num_layers]; a view, valid until the table grows."""
        return self._rows[: self.num_blocks]

    def append(self, pages: np.ndarray) -> None:
        """Add blocks: int32 [n, num_layers], or [n * num_layers] pages that have no order yet.

        Of the latter, neighbours go to one layer: what it reads in one go then lies together.
        """
        num_layers = self._rows.shape[1]
        stop = self.num_blocks + pages.size // num_layers
        if stop > len(self._rows):
            rows = np.empty((max(stop, 2 * len(self._rows)), num_layers), np.int32)
            rows[: self.num_blocks] = self.pages
            self._rows = rows
        self._rows[self.num_blocks : stop] = pages if pages.ndim == 2 else pages.reshape(num_layers, -1).T
        self.num_blocks = stop

    def clear(self) -> np.ndarray:
        """Forget every block; returns their pages, int32 [n * num_layers], layer after layer."""
        pages = self.pages.T.flatten()
        self.num_blocks = 0
        return pages
