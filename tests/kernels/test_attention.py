"""attention and rope_kv beyond the case table: exactness, poison, errors, an independent truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.errors import KernelError
from chiliad.kernels.base import Kernels, KVLayout, Step
from chiliad.kernels.cases import seed_of
from chiliad.kernels.cases_attention import PagedKV, kv_layout
from chiliad.kernels.reference import ReferenceKernels

_core = pytest.importorskip("chiliad.kernels._core", reason="the C++ core is not installed")
from chiliad.kernels.cpu import CpuKernels  # noqa: E402

ISAS = _core.isas()
KERNELS = {isa: CpuKernels(isa=isa, threads=2) for isa in ISAS}
DTYPES = [torch.float32, torch.bfloat16]


def sub_step(kv: PagedKV, work: Sequence[tuple[int, int, int]]) -> Step:
    """A step of rows [start, stop) of sequences: (sequence, start, stop)."""
    step = kv.step([(stop, stop - start) for _, start, stop in work])
    step.page_tables = [kv.tables[i] for i, _, _ in work]
    return step


def run(
    kernels: Kernels,
    kv: PagedKV,
    qkvs: list[torch.Tensor],
    steps: Sequence[Sequence[tuple[int, int, int]]],
    num_heads: int,
    window: int = 0,
) -> list[torch.Tensor]:
    """Write k and v of every sequence's rows and attend, step by step; one output per sequence."""
    kernels.bind_arena(kv.arena, kv.layout)
    outputs: list[list[torch.Tensor]] = [[] for _ in qkvs]
    rope = (torch.linspace(-1, 1, 4096).view(-1, 1).cos(), torch.linspace(-1, 1, 4096).view(-1, 1).sin())
    for work in steps:
        step = kernels.prepare_step(sub_step(kv, work))
        rows = torch.cat([qkvs[i][start:stop] for i, start, stop in work])
        kernels.rope_kv(rows, step, 0, num_heads, rope)
        out = kernels.attention(rows, step, 0, num_heads, kv.layout.head_dim**-0.5, window)
        for (i, start, _), part in zip(work, out.split([b - a for _, a, b in work]), strict=True):
            assert sum(map(len, outputs[i])) == start
            outputs[i].append(part)
    return [torch.cat(parts) for parts in outputs]


def make(
    lengths: Sequence[int], heads: tuple[int, int], head_dim: int, block: int, dtype: torch.dtype
) -> tuple[PagedKV, list[torch.Tensor]]:
    kv = PagedKV(kv_layout(1, heads[1], head_dim, block, dtype), lengths)
    g = seed_of(f"{lengths}{heads}{head_dim}")
    return kv, [torch.randn(n, (heads[0] + 2 * heads[1]) * head_dim, generator=g) for n in lengths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block", "window"),
    [((6, 2), 64, 16, 0), ((3, 3), 32, 48, 0), ((8, 1), 80, 32, 50), ((2, 2), 12, 160, 0)],
)
def test_chunks_and_neighbours_change_no_bit(
    isa: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block: int, window: int
) -> None:
    """A row's output does not depend on how prompts are cut into steps, nor on who shares them."""
    lengths = [700, 1, block + 1, 129]
    kv, qkvs = make(lengths, heads, head_dim, block, dtype)
    whole = [[(i, 0, n) for i, n in enumerate(lengths)]]
    alone = [[(i, 0, n)] for i, n in enumerate(lengths)]
    first, third = block // 2 + 1, 100
    chunks = [
        [(0, 0, 300), (1, 0, 1), (2, 0, first)],
        [(2, first, block), (3, 0, third), (0, 300, 301)],
        [(0, 301, 699), (2, block, block + 1)],
        [(3, third, 129), (0, 699, 700)],
    ]
    kernels = KERNELS[isa]
    expected = run(kernels, kv, qkvs, whole, heads[0], window)
    for steps in (alone, chunks):
        for y, want in zip(run(kernels, kv, qkvs, steps, heads[0], window), expected, strict=True):
            assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_decoding_token_by_token_equals_prefill(isa: str, dtype: torch.dtype) -> None:
    kv, qkvs = make([140], (6, 2), 64, 16, dtype)
    prefill = run(KERNELS[isa], kv, qkvs, [[(0, 0, 140)]], 6)
    decode = run(KERNELS[isa], kv, qkvs, [[(0, i, i + 1)] for i in range(140)], 6)
    assert torch.equal(prefill[0], decode[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    """Long contexts of few rows are cut among threads; many rows are not."""
    kv, qkvs = make([2300, 40], (4, 2), 64, 32, dtype)
    steps = [[(0, 0, 2295), (1, 0, 39)], [(0, 2295, 2299)], [(1, 39, 40), (0, 2299, 2300)]]
    results = [run(CpuKernels(isa, threads=n), kv, qkvs, steps, 4) for n in (1, 2, 7)]
    for other in results[1:]:
        for y, want in zip(other, results[0], strict=True):
            assert torch.equal(y, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64_attention(isa: str, dtype: torch.dtype) -> None:
    """torch's own attention, in float64, on the values that the pages hold."""
    heads, length = (6, 2), 200
    kv, (qkv,) = make([length], heads, 64, 32, dtype)
    kernels = KERNELS[isa]
    kernels.bind_arena(kv.arena, kv.layout)
    rows = qkv.clone()
    step = kernels.prepare_step(sub_step(kv, [(0, 0, length)]))
    kernels.rope_kv(rows, step, 0, 6, None)
    y = kernels.attention(rows, step, 0, 6, 0.3)
    q, k, v = rows.view(length, -1, 64).split([6, 2, 2], dim=1)
    k, v = (x.to(dtype).double().transpose(0, 1).repeat_interleave(3, 0) for x in (k, v))
    want = F.scaled_dot_product_attention(q.double().transpose(0, 1), k, v, is_causal=True, scale=0.3)
    error = (y.view(length, 6, 64).double() - want.transpose(0, 1)).abs().max()
    rounded = isa in ("avx512bf16", "amx", "amx_emulated") and dtype == torch.bfloat16  # q and weights, too
    assert error < (3e-2 if rounded else 5e-6)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_shapes_match_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    group, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    head_dim = draw(st.sampled_from([2, 8, 10, 32, 64, 72, 96]))
    block = draw(st.sampled_from([16, 32, 48, 80]))
    window = draw(st.sampled_from([0, 0, 1, 7, 40]))
    lengths = draw(st.lists(st.integers(1, 170), min_size=1, max_size=4))
    heads = (group * kv_heads, kv_heads)
    kv, qkvs = make(lengths, heads, head_dim, block, dtype)
    first = [(i, 0, draw(st.integers(1, n))) for i, n in enumerate(lengths)]
    second = [(i, stop, lengths[i]) for i, _, stop in first if stop < lengths[i]]
    steps = [work for work in (first, second) if work]
    got = run(KERNELS[draw(st.sampled_from(ISAS))], kv, qkvs, steps, heads[0], window)
    other = PagedKV(kv.layout, kv.contexts)
    want = run(ReferenceKernels(), other, qkvs, steps, heads[0], window)
    for y, expected in zip(got, want, strict=True):
        assert (y - expected).abs().max() < (2e-5 if dtype == torch.float32 else 6e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_new_pages_are_zeroed_and_others_untouched(isa: str) -> None:
    """The first write clears what the page's last owner left; NaN everywhere else stays NaN."""
    kernels = KERNELS[isa]
    for dtype in DTYPES:
        kv, (qkv,) = make([16 + 5], (2, 1), 8, 16, dtype)
        kernels.bind_arena(kv.arena, kv.layout)
        poison = kv.arena.clone()
        for start, stop in ((0, 3), (3, 16), (16, 21)):
            step = kernels.prepare_step(sub_step(kv, [(0, start, stop)]))
            kernels.rope_kv(qkv[start:stop].contiguous(), step, 0, 2, None)
            page = kv.views(int(kv.tables[0][(stop - 1) // 16, 0]))
            k, v = page[0].float(), page[1].float()
            used = (stop - 1) % 16 + 1
            assert (k[:, :, :used] != 0).all()
            assert (k[:, :, used:] == 0).all()
            tokens = v.transpose(2, 3).flatten(1, 2)  # [heads, tokens, head_dim]
            assert (tokens[:, :used] != 0).all()
            assert (tokens[:, used:] == 0).all()
        pages = set(kv.tables[0][:, 0].tolist())
        size = kv.layout.page_bytes
        for page_id in range(len(kv.arena) // size):
            if page_id not in pages:
                part = slice(page_id * size, (page_id + 1) * size)
                assert torch.equal(kv.arena[part], poison[part])


def test_nan_of_another_sequence_stays_there() -> None:
    for isa in ISAS:
        kv, qkvs = make([50, 50], (2, 2), 32, 16, torch.bfloat16)
        steps = [[(0, 0, 50), (1, 0, 50)]]
        want = run(KERNELS[isa], kv, qkvs, steps, 2)[0]
        qkvs[1][10:] = float("nan")
        got = run(KERNELS[isa], kv, qkvs, steps, 2)
        assert torch.equal(got[0], want)
        assert got[1][10:].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_empty_step(isa: str) -> None:
    kernels = KERNELS[isa]
    kv, _ = make([5], (2, 1), 16, 16, torch.float32)
    kernels.bind_arena(kv.arena, kv.layout)
    step = kernels.prepare_step(sub_step(kv, []))
    qkv = torch.empty(0, 4 * 16)
    kernels.rope_kv(qkv, step, 0, 2, None)
    assert kernels.attention(qkv, step, 0, 2, 1.0).shape == (0, 32)


def test_refusals() -> None:
    kernels = CpuKernels(threads=1)
    kv, (qkv,) = make([20], (2, 1), 16, 16, torch.float32)
    step = sub_step(kv, [(0, 0, 20)])
    with pytest.raises(KernelError, match="bind_arena"):
        kernels.attention(qkv, step, 0, 2, 1.0)
    kernels.bind_arena(kv.arena, kv.layout)
    with pytest.raises(KernelError, match="prepare_step"):
        kernels.attention(qkv, step, 0, 2, 1.0)
    kernels.prepare_step(step)
    with pytest.raises(KernelError, match="layer 1"):
        kernels.attention(qkv, step, 1, 2, 1.0)
    with pytest.raises(KernelError, match="rows"):
        kernels.attention(qkv[:19], step, 0, 2, 1.0)
    with pytest.raises(KernelError, match="contiguous"):
        kernels.attention(qkv, step, 0, 3, 1.0)
    with pytest.raises(KernelError, match="beyond the rope table"):
        kernels.rope_kv(qkv, step, 0, 2, (torch.ones(19, 8), torch.ones(19, 8)))
    with pytest.raises(KernelError, match="does not fit head_dim"):
        kernels.rope_kv(qkv, step, 0, 2, (torch.ones(20, 9), torch.ones(20, 9)))
    for bad, match in (
        ({"page_tables": [np.full((2, 1), 99, np.int32)]}, "page 99"),
        ({"page_tables": [np.full((2, 1), -1, np.int32)]}, "page -1"),
        ({"page_tables": [kv.tables[0][:1]]}, "do not fit"),
        ({"page_tables": [np.zeros((2, 2), np.int32)]}, "one column per layer"),
        ({"context": np.array([19], np.int32)}, "do not fit"),
        ({"context": np.array([33], np.int32)}, "do not fit"),
    ):
        broken = sub_step(kv, [(0, 0, 20)])
        for name, value in bad.items():
            setattr(broken, name, value)
        kernels.prepare_step(broken)
        for call in (
            lambda step=broken: kernels.attention(qkv, step, 0, 2, 1.0),
            lambda step=broken: kernels.rope_kv(qkv, step, 0, 2, None),
        ):
            with pytest.raises(KernelError, match=match):
                call()
    for table in (kv.tables[0].astype(np.int64), np.repeat(kv.tables[0], 2, 0)[::2], np.zeros(2, np.int32)):
        broken.page_tables = [table]  # would have to be copied, and the copy kept
        with pytest.raises(KernelError, match="bad step"):
            kernels.prepare_step(broken)
    odd = KVLayout(1, 1, 15, 16, torch.bfloat16, 1024)
    with pytest.raises(KernelError, match="even head_dim"):
        kernels.bind_arena(torch.zeros(1 << 16, dtype=torch.uint8), odd)
