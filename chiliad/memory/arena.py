"""The one buffer behind the pages, and how rank rows are laid into them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chiliad.errors import AdapterTooLarge, InvalidConfig, OutOfMemory

ALIGN = 64  # bytes: a cache line, and the widest vector register
_HUGE = 2 * 2**20  # bytes of a huge page


class Arena:
    """`num_pages` pages of `page_bytes` bytes: zeroed, and touched only when first written.

    `buffer` is torch.uint8 [num_pages * page_bytes]. It starts on a huge page, so that the
    kernel may back it by huge pages (fewer TLB misses when rows are gathered from all over).
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        if page_bytes <= 0 or page_bytes % ALIGN:
            raise InvalidConfig(f"page_bytes must be a positive multiple of {ALIGN}, not {page_bytes}")
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.nbytes = num_pages * page_bytes
        try:
            # Anonymous and private: zero pages until touched, returned when the tensor dies.
            memory = mmap.mmap(-1, self.nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OutOfMemory(
                f"the system refused {self.nbytes / 1e9:.2f} GB for the pool ({error}): lower --memory"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages is only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % _HUGE
        self.buffer = whole[start : start + self.nbytes]

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """Copy a tensor's bytes to byte `offset`."""
        self.view(offset, tensor.shape, tensor.dtype).copy_(tensor)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The bytes at `offset` as a tensor that shares the arena's memory."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if offset < 0 or offset + nbytes > self.nbytes:
            raise IndexError(f"bytes {offset}..{offset + nbytes} lie outside an arena of {self.nbytes}")
        return self.buffer[offset : offset + nbytes].view(dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where rows lie in pages that are yet to be taken: row i starts at byte `offset[i]` of
    the `page_index[i]`-th page."""

    num_pages: int
    page_bytes: int
    page_index: np.ndarray  # int64 [rows]
    offset: np.ndarray  # int64 [rows]

    def offsets(self, pages: np.ndarray) -> np.ndarray:
        """Byte offsets into the arena -> int64 [rows], given the pages taken (int32 [num_pages])."""
        offsets: np.ndarray = pages.astype(np.int64)[self.page_index] * self.page_bytes + self.offset
        return offsets


def pack_rows(runs: Sequence[tuple[int, int]], page_bytes: int) -> Packing:
    """Lay rows into pages in their order; a row starts at a multiple of 64 and never crosses a page.

    runs: (number of rows, bytes of each), so that the work grows with runs and pages instead of
    rows. Neighbours stay neighbours in memory unless a page ends between them. Raises
    AdapterTooLarge when a row is longer than a page.
    """
    pieces: list[tuple[int, int, int, int]] = []  # page, offset of the first row, rows, stride
    page, position = -1, page_bytes
    for count, nbytes in runs:
        if count and nbytes > page_bytes:
            raise AdapterTooLarge(
                f"an adapter row of {nbytes} bytes does not fit a page of {page_bytes} bytes: "
                "load adapters in a narrower dtype"
            )
        stride = -(-nbytes // ALIGN) * ALIGN
        while count:
            if position + nbytes > page_bytes:
                page, position = page + 1, 0
            fit = min(count, (page_bytes - position - nbytes) // stride + 1)
            pieces.append((page, position, fit, stride))
            position += fit * stride
            count -= fit
    pages, firsts, counts, strides = np.array(pieces, np.int64).reshape(-1, 4).T
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    offset = np.repeat(firsts, counts) + within * np.repeat(strides, counts)
    return Packing(page + 1, page_bytes, np.repeat(pages, counts), offset)
