"""The one buffer behind the pages, and how rank rows are laid into them."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Sequence
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


class TouchAhead(threading.Thread):
    """Has the system give an arena its memory before somebody waits for it.

    To clear a huge page takes the system up to 8 ms (on a virtual machine that gets it from its
    host), in the middle of a step or of a load beside one. A busy server comes to use all of its
    pool, as caches fill it. So this thread touches all while nobody computes, low pages first as
    they are given out (`pool.py`), and at least `AHEAD` more than was ever in use if somebody
    always does.
    """

    AHEAD = 128 * 2**20  # bytes

    def __init__(
        self,
        nbytes: int,
        used: Callable[[], int],
        busy: Callable[[], bool],
        touch: Callable[[int, int], None],
    ) -> None:
        """nbytes: of the arena. used: bytes that were in use at most. busy: whether somebody
        computes. touch: `Kernels.touch_arena`."""
        super().__init__(name="touch-ahead", daemon=True)
        self._nbytes, self._used, self._busy, self._touch = nbytes, used, busy, touch
        self._stop_now = threading.Event()
        self.ended = threading.Event()

    def run(self) -> None:
        done = 0
        while done < self._nbytes and not self._stop_now.wait(0.1 if done else 0):
            needed = min(self._nbytes, self._used() + self.AHEAD)
            while done < (needed if self._busy() else self._nbytes) and not self._stop_now.is_set():
                end = min(self._nbytes, done + _HUGE)
                self._touch(done, end)
                done = end
        self.ended.set()

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


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
