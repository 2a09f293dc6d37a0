"""What kernels remember from step to step: the uses of a batch, and which linear follows which."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.errors import KernelError
from chiliad.kernels.base import (
    AdapterRows,
    KVLayout,
    LayerSpec,
    LinearSpec,
    LowRankRows,
    NormSpec,
    Segment,
)
from chiliad.kernels.cases import ArenaBuilder, seed_of, simple_step
from chiliad.kernels.cases import test_cases as table
from chiliad.kernels.cases_layers import FAMILIES, layers_case
from chiliad.kernels.reference import ReferenceKernels

pytest.importorskip("chiliad.kernels._core", reason="the C++ core is not installed")
from chiliad.kernels.cpu import CpuKernels

WIDTH, ROWS, ADAPTERS = 64, 6, 4
SPECS = (LinearSpec(WIDTH, (32, 32), (0, 1), "float32"), LinearSpec(WIDTH, (WIDTH,), (2,), "float32"))


class World:
    """Two linears that follow each other, and adapters, on some kernels."""

    def __init__(self, kernels: CpuKernels | ReferenceKernels, seed: str = "world") -> None:
        self.kernels, g = kernels, seed_of(seed)
        self.linears = [
            kernels.pack_linear(torch.randn(spec.out_features, WIDTH, generator=g) / 8, None, spec)
            for spec in SPECS
        ]
        builder = ArenaBuilder(torch.float32)
        made = []
        for i in range(ADAPTERS):
            low = {}
            for slot, out in enumerate((32, 32, WIDTH)):
                a, _ = builder.add_rank_rows(torch.randn(i + 1, WIDTH, generator=g))
                b, _ = builder.add_rank_rows(torch.randn(i + 1, out, generator=g))
                low[slot] = LowRankRows(a, b, np.full(i + 1, 0.1, np.float32))
            made.append(AdapterRows(low, {}, torch.float32))
        self.arena, self.made = builder.build(), made
        self.bind(self.arena)
        self.adapters = [kernels.prepare_adapter(rows) for rows in made]

    def bind(self, arena: torch.Tensor) -> None:
        self.kernels.bind_arena(arena, KVLayout(1, 1, 16, 16, torch.float32, 2048))

    def run(self, x: torch.Tensor, batch: list[int]) -> torch.Tensor:
        """Row i uses adapter batch[i], negative: the base."""
        segments = [Segment(i, i + 1, self.adapters[a] if a >= 0 else None) for i, a in enumerate(batch)]
        step = self.kernels.prepare_step(simple_step(len(batch), segments))
        hidden = x[: len(batch)].contiguous()
        for linear in self.linears:
            hidden = self.kernels.project(hidden, linear, step)
        return self.kernels.project(hidden, self.linears[0], None)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(-1, ADAPTERS - 1), min_size=1, max_size=ROWS), min_size=1, max_size=8))
def test_batches_that_come_and_go(batches: list[list[int]]) -> None:
    """Whatever came before, a batch gives what the reference gives."""
    world, reference = World(CpuKernels(threads=2)), World(ReferenceKernels())
    x = torch.randn(ROWS, WIDTH, generator=seed_of("x"))
    for batch in batches:
        assert (world.run(x, batch) - reference.run(x, batch)).abs().max() < 1e-4


def test_another_adapter_in_the_same_place() -> None:
    """Same rows, same number of them, and maybe the same address: but not the same adapter."""
    world = World(CpuKernels(threads=2))
    x = torch.randn(ROWS, WIDTH, generator=seed_of("x"))
    expected = [world.run(x, [i] * ROWS) for i in range(ADAPTERS)]
    for i in (1, 3, 2, 0):
        world.adapters[0] = None  # type: ignore[call-overload]
        gc.collect()
        world.adapters[0] = world.kernels.prepare_adapter(world.made[i])
        assert torch.equal(world.run(x, [0] * ROWS), expected[i])


def test_another_arena() -> None:
    world = World(CpuKernels(threads=2))
    x = torch.randn(ROWS, WIDTH, generator=seed_of("x"))
    batch = [0, 1, 2, 3, -1, 1]
    first = world.run(x, batch)
    moved = torch.empty(world.arena.numel() + 64, dtype=torch.uint8)
    moved = moved[-moved.data_ptr() % 64 :][: world.arena.numel()].copy_(world.arena)
    world.arena.fill_(0xFF)  # NaN for whoever still reads here
    world.bind(moved)
    assert torch.equal(world.run(x, batch), first)


def test_linears_shared_by_two_kernels() -> None:
    one, other = World(CpuKernels(threads=1)), World(CpuKernels(threads=1), "other")
    x = torch.randn(ROWS, WIDTH, generator=seed_of("x"))
    expected = other.run(x, [1, 2, 0, 3])
    one.run(x, [1, 2, 0, 3])
    packed, other.linears = other.linears, one.linears
    other.run(x, [1, 2, 0, 3])
    other.linears = packed
    assert torch.equal(other.run(x, [1, 2, 0, 3]), expected)


def test_an_adapter_out_of_bounds_fails_only_its_own_step() -> None:
    """Also where only a later linear would read it; what came before is not remembered as done."""
    world = World(CpuKernels(threads=2))
    x = torch.randn(ROWS, WIDTH, generator=seed_of("x"))
    good = world.run(x, [0, 1])
    far = np.array([1 << 40], np.int64)
    bad = replace(world.made[0], low_rank={2: LowRankRows(far, far, np.ones(1, np.float32))})
    world.adapters[3] = world.kernels.prepare_adapter(bad)
    for _ in range(2):
        with pytest.raises(KernelError, match="beyond the arena"):
            world.run(x, [0, 3])
        assert torch.equal(world.run(x, [0, 1]), good)


def test_sampling_after_layers() -> None:
    """What one op leaves in memory, no other stumbles over: penalties count from nought."""
    kernels, reference = CpuKernels(threads=2), ReferenceKernels()
    layers = layers_case(FAMILIES[0], [(9, 9), (40, 17), (33, 1)], "float32").prepare(kernels)
    for case in table():
        if case.op == "sample":
            sample, expected = case.prepare(kernels), case.prepare(reference).call()
            layers.call()
            for y, want in zip(sample.call(), expected, strict=True):
                if want.is_floating_point():
                    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(y, want)


def layer_of(kernels: CpuKernels, qkv: int = 64, out: int = 32, up: int = 48, down: int = 24) -> LayerSpec:
    """Two heads of 16 that share one key-value head: zeros, hidden size 32."""

    def linear(width: int, *sizes: int) -> object:
        spec = LinearSpec(width, sizes, (-1,) * len(sizes), "float32")
        return kernels.pack_linear(torch.zeros(sum(sizes), width), None, spec)

    norm = NormSpec("rms", torch.ones(32), 1e-5)
    return LayerSpec(
        norm, linear(32, qkv), None, None, None, 2, 0.25, 0, linear(out, 32), None,
        norm, linear(32, up // 2, up // 2), "silu_mul", linear(down, 32), None,
    )  # fmt: skip


def test_layers_refuse_what_does_not_fit() -> None:
    kernels = CpuKernels(threads=1)
    x, layout = torch.ones(1, 32), KVLayout(1, 1, 16, 16, torch.float32, 2048)
    arena = torch.zeros(4096 + 64, dtype=torch.uint8)
    kernels.bind_arena(arena[-arena.data_ptr() % 64 :][:4096], layout)
    step = simple_step(1, [Segment(0, 1, None)])
    layers = kernels.pack_layers([layer_of(kernels)])
    with pytest.raises(KernelError, match="prepare_step"):
        kernels.layers(x, step, layers)
    step = kernels.prepare_step(step)
    assert torch.equal(kernels.layers(x, step, layers), torch.ones(1, 32))
    for wrong in (torch.ones(2, 32), torch.ones(1, 31), torch.ones(1, 32).double()):
        with pytest.raises(KernelError, match="x "):
            kernels.layers(wrong, step, layers)
    with pytest.raises(KernelError, match="pack_layers"):
        kernels.layers(x, step, object())
    with pytest.raises(KernelError, match="at least one layer"):
        kernels.pack_layers([])
    for sizes in ({"out": 64}, {"up": 50}, {"down": 23}):
        with pytest.raises(KernelError, match="do not fit each other"):
            kernels.pack_layers([layer_of(kernels, **sizes)])
    with pytest.raises(KernelError, match="pack_linear"):
        kernels.pack_layers([replace(layer_of(kernels), qkv=object())])
    with pytest.raises(KernelError, match="0 heads"):
        kernels.pack_layers([replace(layer_of(kernels), num_heads=0)])
    uneven = kernels.pack_linear(torch.zeros(48, 32), None, LinearSpec(32, (28, 20), (-1, -1), "float32"))
    with pytest.raises(KernelError, match="do not fit each other"):
        kernels.pack_layers([replace(layer_of(kernels), up=uneven)])
    with pytest.raises(KernelError, match="KV layout"):
        kernels.layers(x, step, kernels.pack_layers([layer_of(kernels, qkv=96)]))
    with pytest.raises(KernelError, match="layer 1 is not"):
        kernels.layers(x, step, kernels.pack_layers([layer_of(kernels)] * 2))
