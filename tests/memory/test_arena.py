import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiliad.errors import AdapterTooLarge, InvalidConfig, KernelError
from chiliad.kernels import load
from chiliad.kernels.base import KVLayout
from chiliad.memory.arena import ALIGN, Arena, TouchAhead, pack_rows
from chiliad.memory.kv import BlockTable, kv_layout


def test_arena_is_zeroed_aligned_and_of_the_asked_size() -> None:
    arena = Arena(7, 4096)
    assert arena.buffer.dtype == torch.uint8
    assert arena.buffer.shape == (7 * 4096,)
    assert arena.buffer.data_ptr() % 64 == 0
    assert not arena.buffer.any()


def test_write_and_view_round_trip() -> None:
    arena = Arena(2, 4096)
    rows = torch.randn(3, 16).to(torch.bfloat16)
    arena.write(4096 + 64, rows)
    assert torch.equal(arena.view(4096 + 64, (3, 16), torch.bfloat16), rows)
    assert not arena.buffer[: 4096 + 64].any()
    assert not arena.buffer[4096 + 64 + rows.nbytes :].any()


@pytest.mark.parametrize("offset", [-64, 4096 - 32, 10_000])
def test_write_outside_is_refused(offset: int) -> None:
    with pytest.raises(IndexError):
        Arena(1, 4096).write(offset, torch.zeros(16))


def test_bad_page_size_is_refused() -> None:
    with pytest.raises(InvalidConfig):
        Arena(1, 100)


def test_arena_is_lazy() -> None:
    """More address space than this machine may have memory: only touched pages cost."""
    arena = Arena(1_000_000, 12288)
    arena.buffer[-1] = 1
    assert arena.buffer.numel() == 1_000_000 * 12288


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4096)), max_size=30),
    st.sampled_from([4096, 8192, 12288]),
)
def test_packed_rows_are_aligned_disjoint_and_in_order(runs: list[tuple[int, int]], page_bytes: int) -> None:
    packing = pack_rows(runs, page_bytes)
    sizes = [nbytes for count, nbytes in runs for _ in range(count)]
    pages = np.arange(packing.num_pages, dtype=np.int32)[::-1] + 5
    offsets = packing.offsets(pages)
    assert offsets.dtype == np.int64
    taken = np.zeros((packing.num_pages + 5) * page_bytes, bool)
    for offset, size in zip(offsets.tolist(), sizes, strict=True):
        assert offset % ALIGN == 0
        assert offset // page_bytes == (offset + size - 1) // page_bytes
        assert not taken[offset : offset + size].any()
        taken[offset : offset + size] = True
    order = packing.page_index * page_bytes + packing.offset
    assert (np.diff(order) > 0).all()
    # Next-fit: two neighbouring pages together hold more than one page's worth.
    assert packing.num_pages <= 2 * sum(-(-s // ALIGN) * ALIGN for s in sizes) / page_bytes + 1
    if sizes:
        assert sorted(set(packing.page_index.tolist())) == list(range(packing.num_pages))


def test_equal_rows_are_contiguous_within_a_page() -> None:
    packing = pack_rows([(6, 1152), (4, 1152)], 12288)
    assert packing.num_pages == 1
    assert np.diff(packing.offset).tolist() == [1152] * 9


def test_a_row_longer_than_a_page_is_refused() -> None:
    with pytest.raises(AdapterTooLarge, match="5000 bytes"):
        pack_rows([(1, 64), (2, 5000)], 4096)


def test_layout_of_the_demo_model() -> None:
    """SmolLM2-135M: 30 layers, 3 KV heads of 64, rows of 576 and 1536."""
    layout = kv_layout(
        num_layers=30, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16, row_bytes=[1152, 384, 3072]
    )
    assert (layout.block_tokens, layout.page_bytes) == (16, 12288)


@given(
    st.integers(1, 8),
    st.sampled_from([8, 16, 32, 64, 96, 128, 256]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.integers(1, 30000), max_size=6),
)
def test_layout_holds_every_row(heads: int, head_dim: int, dtype: torch.dtype, rows: list[int]) -> None:
    layout = kv_layout(num_layers=2, num_kv_heads=heads, head_dim=head_dim, dtype=dtype, row_bytes=rows)
    assert layout.block_tokens % 16 == 0
    assert layout.page_bytes % ALIGN == 0
    assert layout.page_bytes >= max(rows, default=0)
    assert layout.page_bytes == 2 * heads * head_dim * layout.block_tokens * dtype.itemsize


def test_block_table_grows_and_clears() -> None:
    table = BlockTable(3)
    assert table.pages.shape == (0, 3)
    for block in range(11):
        table.append(np.arange(3, dtype=np.int32) + 3 * block)
    table.append(np.arange(33, 45, dtype=np.int32).reshape(4, 3))
    assert table.num_blocks == 15
    assert table.pages.tolist() == np.arange(45).reshape(15, 3).tolist()
    assert table.clear().tolist() == np.arange(45).reshape(15, 3).T.flatten().tolist()
    assert table.num_blocks == 0
    table.append(np.arange(12))  # four blocks in no order: a layer's pages are neighbours
    assert table.pages.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert table.clear().tolist() == list(range(12))
    assert table.clear().size == 0


class TestTouchAhead:
    SIZE = 40 * 2**20

    def run(self, used: int, busy: bool, until: int) -> list[tuple[int, int]]:
        """What it has touched once it has come to byte `until`."""
        touched: list[tuple[int, int]] = []
        there = threading.Event()

        def touch(begin: int, end: int) -> None:
            touched.append((begin, end))
            if end >= until:
                there.set()

        thread = TouchAhead(self.SIZE, lambda: used, lambda: busy, touch)
        thread.AHEAD = 8 * 2**20
        thread.start()
        assert there.wait(60)
        thread.stop()
        assert thread.ended.is_set()
        return touched

    def test_all_of_it_in_order_while_nobody_computes(self) -> None:
        touched = self.run(used=0, busy=False, until=self.SIZE)
        assert [begin for begin, _ in touched] == [0, *(end for _, end in touched[:-1])]
        assert touched[-1][1] == self.SIZE

    def test_what_is_needed_next_while_somebody_computes(self) -> None:
        touched = self.run(used=10 * 2**20, busy=True, until=18 * 2**20)
        assert touched[-1][1] == 18 * 2**20

    def test_never_beyond_the_end(self) -> None:
        assert self.run(used=self.SIZE, busy=True, until=self.SIZE)[-1][1] == self.SIZE


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_touching_changes_nothing(kernels: str) -> None:
    arena = Arena(3, 8192)
    arena.buffer.copy_(torch.arange(arena.nbytes) % 251)
    before = arena.buffer.clone()
    op_table = load(kernels)
    op_table.bind_arena(arena.buffer, KVLayout(1, 1, 16, 16, torch.float32, 8192))
    op_table.touch_arena(0, arena.nbytes)
    assert torch.equal(arena.buffer, before)
    if op_table.name == "cpu":
        with pytest.raises(KernelError, match="not in the arena"):
            op_table.touch_arena(0, arena.nbytes + 1)
