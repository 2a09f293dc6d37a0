"""The case table: every op with its shapes, adapter traffic, tolerance, flops and bytes.

One table drives the conformance tests (every implementation and instruction set against
`reference.py`) and the micro-benchmarks (achieved rates beside the machine's ceilings).

A case builds the same inputs for whatever implementation it is given, from its own seed.
Everything around inputs and outputs is poison: unused arena bytes are NaN bits, and outputs
written in place lie between guard values.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch

from chiliad.kernels.base import (
    Activation,
    AdapterRows,
    ElementwiseRows,
    Kernels,
    KVLayout,
    LinearSpec,
    LowRankRows,
    NormSpec,
    Segment,
    Step,
    Tensor,
)
from chiliad.kernels.reference import int8_rows

Traffic = Literal[
    "none",
    "identical",  # one adapter for all rows
    "distinct",  # one per row while decoding, 8 in a prefill
    "uniform",  # segments of 4 rows
    "zipf",
    "skewed",  # one for all but three rows
    "mixed_ranks",  # distinct, ranks 1 to 64
    "mixed_methods",  # distinct, low rank beside elementwise beside both
    "empty_segment",
]
TRAFFIC: tuple[Traffic, ...] = get_args(Traffic)

_GUARD = 64  # floats on either side of a guarded output
_GUARD_VALUE = -1.2345e30


@dataclass(slots=True)
class Run:
    """A case made concrete for one implementation."""

    call: Callable[[], tuple[Tensor, ...]]  # runs the op once; in-place outputs start afresh each time
    guards: list[Tensor] = field(default_factory=list)

    def guards_intact(self) -> bool:
        return all(bool((guard == _GUARD_VALUE).all()) for guard in self.guards)


@dataclass(frozen=True, slots=True)
class Case:
    op: str  # a method of `Kernels`
    name: str  # unique within the op
    tolerance: float  # |y - reference| <= tolerance * rms(reference row)
    flops: float  # multiply-adds count two
    nbytes: float  # read and written at least once: weights, rank rows, activations
    prepare: Callable[[Kernels], Run]
    gemm: bool = False  # compare its flops with the matrix peak

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def seed_of(text: str) -> torch.Generator:
    """A generator of one's own, the same on every machine and run."""
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


class Guarded:
    """A float32 tensor with guard values on both sides of it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        numel = int(np.prod(shape))
        whole = torch.full((numel + 2 * _GUARD,), _GUARD_VALUE)
        self.tensor = whole[_GUARD : _GUARD + numel].view(shape)
        self.guards = [whole[:_GUARD], whole[_GUARD + numel :]]


class ArenaBuilder:
    """Collects rows, then lays them out 64-byte aligned, in order, between NaN bytes.

    dtype: of rank rows; of other vectors too, but bfloat16 beside int8.
    """

    def __init__(self, dtype: torch.dtype, start: int = 0) -> None:
        self.dtype = dtype
        self._start, self._size = start, start
        self._rows: list[tuple[int, Tensor]] = []

    def add(self, row: Tensor) -> int:
        stored = row.to(torch.bfloat16 if self.dtype == torch.int8 else self.dtype)
        return self._add(stored)

    def add_rank_rows(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """rows [r, n] -> where they are (int64 [r]) and what to scale them with (float32 [r])."""
        if self.dtype == torch.int8:
            stored, scale = int8_rows(rows)
        else:
            stored, scale = rows.to(self.dtype), torch.ones(len(rows))
        return np.array([self._add(row) for row in stored], np.int64), scale.numpy()

    def _add(self, stored: Tensor) -> int:
        offset = self._size
        self._rows.append((offset, stored))
        self._size += -(-stored.numel() * stored.dtype.itemsize // 64) * 64
        return offset

    @property
    def nbytes(self) -> int:
        return max(self._size, 64)

    def build(self) -> Tensor:
        whole = torch.full((self.nbytes + 64,), 0xFF, dtype=torch.uint8)
        whole = whole[-whole.data_ptr() % 64 :][: self.nbytes]
        self.write(whole)
        return whole

    def write(self, arena: Tensor) -> None:
        for offset, row in self._rows:
            nbytes = row.numel() * row.dtype.itemsize
            arena[offset : offset + nbytes] = row.contiguous().view(torch.uint8)


def simple_step(num_tokens: int, segments: list[Segment]) -> Step:
    """A step of `num_tokens` sequences of one token each, for ops that never look at the KV cache."""
    return Step(
        num_tokens=num_tokens,
        positions=np.zeros(num_tokens, np.int32),
        row_start=np.arange(num_tokens + 1, dtype=np.int32),
        context=np.ones(num_tokens, np.int32),
        page_tables=[np.zeros((1, 1), np.int32)] * num_tokens,
        segments=segments,
    )


# -- adapters ------------------------------------------------------------------------------


def segment_sizes(traffic: Traffic, rows: int) -> list[tuple[int, int]]:
    """(adapter id, rows) in order; id -1 is the plain base."""
    if traffic == "none":
        return [(-1, rows)]
    if traffic == "identical":
        return [(0, rows)]
    if traffic in ("distinct", "mixed_ranks", "mixed_methods"):
        # one adapter per row while decoding; a prefill holds a few prompts
        count = rows if rows <= 64 else 8
    elif traffic == "uniform":
        count = max(1, rows // 4)
    elif traffic == "zipf":
        shares = 1 / np.arange(1, min(rows, 12) + 1)
        sizes = np.maximum(1, np.floor(rows * shares / shares.sum())).astype(int)
        sizes[0] += rows - sizes.sum()
        return list(enumerate(sizes.tolist()))
    elif traffic == "skewed":
        alone = min(3, rows - 1)
        return [(0, rows - alone), *((i + 1, 1) for i in range(alone))]
    else:  # empty_segment
        half = rows // 2
        return [(0, half), (1, 0), (-1, rows - half), (2, 0)]
    bounds = np.linspace(0, rows, count + 1).round().astype(int)
    return list(enumerate(np.diff(bounds).tolist()))


def build_adapters(
    traffic: Traffic, rows: int, spec: LinearSpec, dtype: torch.dtype, rank: int, g: torch.Generator
) -> tuple[list[tuple[int, int, AdapterRows | None]], Tensor, int]:
    """Segments as (start, stop, adapter), the arena they live in, and bytes of distinct rank rows."""
    builder = ArenaBuilder(dtype)
    made: dict[int, AdapterRows] = {}
    segments: list[tuple[int, int, AdapterRows | None]] = []
    start = nbytes = 0
    for index, size in segment_sizes(traffic, rows):
        if index >= 0 and index not in made:
            low: dict[int, LowRankRows] = {}
            vectors: dict[int, ElementwiseRows] = {}
            for slot, out in zip(spec.slots, spec.sizes, strict=True):
                r = (1, 3, 8, 16, 40, 64)[(index + slot) % 6] if traffic == "mixed_ranks" else rank
                method = (index + slot) % 5 if traffic == "mixed_methods" else 0
                if slot < 0 or method == 4:
                    continue
                if method in (0, 2):
                    a, scale_a = builder.add_rank_rows(torch.randn(r, spec.in_features, generator=g))
                    b, scale_b = builder.add_rank_rows(torch.randn(r, out, generator=g))
                    scale = torch.rand(r, generator=g).numpy() / (3 * spec.in_features**0.5)
                    low[slot] = LowRankRows(a, b, scale * scale_a * scale_b)
                    nbytes += r * (spec.in_features + out) * dtype.itemsize
                if method:
                    d = builder.add(1 + 0.3 * torch.randn(spec.in_features, generator=g))
                    scale_out = builder.add(1 + 0.3 * torch.randn(out, generator=g))
                    c = builder.add(torch.randn(out, generator=g))
                    vectors[slot] = (
                        ElementwiseRows(d=d, g=scale_out, c=c),
                        ElementwiseRows(g=scale_out, c=c),
                        ElementwiseRows(d=d),
                    )[method - 1]
            made[index] = AdapterRows(low, vectors, dtype)
        segments.append((start, start + size, made[index] if index >= 0 else None))
        start += size
    return segments, builder.build(), nbytes


# -- project and norm ------------------------------------------------------------------------

#: Error of float32 sums in another order; and of bfloat16 inputs that round to the neighbour
#: because a fused norm differs in its last bit. int8 and int4: where weights are unpacked to bfloat16,
#: scale * level + minimum is rounded to that.
_TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-3, "int8": 3e-2, "int4": 3e-2}

#: With scales and minima.
BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 4 / 32}


def make_norm(kind: str | None, features: int, g: torch.Generator) -> NormSpec | None:
    if kind is None:
        return None
    weight = 1 + 0.1 * torch.randn(features, generator=g)
    if kind == "rms":
        return NormSpec("rms", weight, 1e-5)
    return NormSpec("layer", weight, 1e-5, 0.1 * torch.randn(features, generator=g))


def project_case(
    name: str,
    rows: int,
    in_features: int,
    sizes: tuple[int, ...],
    dtype: str,
    *,
    traffic: Traffic = "none",
    rank: int = 16,
    bias: bool = False,
    norm: Literal["rms", "layer"] | None = None,
    activation: Activation | None = None,
    residual: bool = False,
    rows_dtype: torch.dtype | None = None,
) -> Case:
    """y = residual + act(Linear(norm(x)) with adapters)."""
    slots = tuple(range(len(sizes)))
    spec = LinearSpec(in_features, sizes, slots, dtype)
    out = sum(sizes) // (2 if activation in ("silu_mul", "gelu_tanh_mul") else 1)
    stored = rows_dtype or (torch.float32 if dtype == "float32" else torch.bfloat16)

    def adapters() -> tuple[list[tuple[int, int, AdapterRows | None]], Tensor, int]:
        return build_adapters(traffic, rows, spec, stored, rank, seed_of(name + "adapters"))

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        x = torch.randn(rows, in_features, generator=g)
        weight = torch.randn(sum(sizes), in_features, generator=g) / in_features**0.5
        biases = torch.randn(sum(sizes), generator=g) if bias else None
        norm_spec = make_norm(norm, in_features, g)
        before = torch.randn(rows, out, generator=g)
        linear = kernels.pack_linear(weight, biases, spec)
        segments, arena, _ = adapters()
        item = torch.float32.itemsize
        kernels.bind_arena(arena, KVLayout(1, 1, 16, 16, torch.float32, 2 * 16 * 16 * item))
        native: dict[int, AdapterRows] = {}
        for _, _, adapter in segments:
            if adapter is not None and id(adapter) not in native:
                native[id(adapter)] = kernels.prepare_adapter(adapter)
        step = kernels.prepare_step(
            simple_step(
                rows, [Segment(a, b, native[id(r)] if r is not None else None) for a, b, r in segments]
            )
        )
        if not residual:
            return Run(lambda: (kernels.project(x, linear, step, norm=norm_spec, activation=activation),))
        guarded = Guarded((rows, out))

        def call() -> tuple[Tensor, ...]:
            guarded.tensor.copy_(before)
            y = kernels.project(
                x, linear, step, norm=norm_spec, activation=activation, residual=guarded.tensor
            )
            return (y,)

        return Run(call, guarded.guards)

    item_bytes = BYTES_PER_WEIGHT[dtype]
    rank_bytes = 0 if traffic == "none" else adapters()[2]
    rank_flops = 2.0 * rank_bytes / stored.itemsize * (rows if traffic == "identical" else 1)
    return Case(
        op="project",
        name=f"{name}-{dtype}-{rows}x{in_features}x{'+'.join(map(str, sizes))}-{traffic}",
        tolerance=_TOLERANCE[dtype],
        flops=2.0 * rows * in_features * sum(sizes) + rank_flops,
        nbytes=item_bytes * in_features * sum(sizes) + rank_bytes + 4.0 * rows * (in_features + out),
        prepare=prepare,
        gemm=rows >= 128,
    )


def norm_case(rows: int, features: int, kind: Literal["rms", "layer"], residual: bool) -> Case:
    name = f"{kind}-{rows}x{features}{'-residual' if residual else ''}"

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        x = 3 * torch.randn(rows, features, generator=g) + 0.5
        spec = make_norm(kind, features, g)
        before = torch.randn(rows, features, generator=g)
        assert spec is not None
        if not residual:
            return Run(lambda: (kernels.norm(x, spec),))
        guarded = Guarded((rows, features))

        def call() -> tuple[Tensor, ...]:
            guarded.tensor.copy_(before)
            return (kernels.norm(x, spec, guarded.tensor),)

        return Run(call, guarded.guards)

    return Case("norm", name, 2e-6, 4.0 * rows * features, 8.0 * rows * features, prepare)


def _project_tests() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        # shapes: one row, odd sizes, exact tiles, several tiles, many panels
        for rows, k, sizes in (
            (1, 64, (64,)), (1, 33, (7,)), (3, 50, (20, 9, 9)), (7, 96, (48, 16, 16)), (16, 128, (32,)),
            (17, 160, (100,)), (33, 64, (40, 40)), (65, 100, (30, 70)), (200, 576, (192, 64, 64)),
        ):  # fmt: skip
            yield project_case("shape", rows, k, sizes, dtype, bias=True)
        for norm in ("rms", "layer"):
            for rows in (1, 5, 40):
                yield project_case(norm, rows, 72, (48, 16, 16), dtype, norm=norm, residual=rows == 5)
        pairs: tuple[Activation, ...] = ("silu_mul", "gelu_tanh_mul")
        for activation in pairs:
            for rows, half in ((1, 64), (6, 56), (37, 24)):
                yield project_case(
                    activation, rows, 64, (half, half), dtype, activation=activation, bias=rows == 6,
                    traffic="uniform", rank=4,
                )  # fmt: skip
        plain: tuple[Activation, ...] = ("gelu", "gelu_tanh")
        for activation in plain:
            yield project_case(activation, 9, 64, (100,), dtype, activation=activation, bias=True)
        yield project_case("residual", 34, 80, (80,), dtype, residual=True, traffic="distinct", norm="rms")
        for traffic in TRAFFIC:
            for rows in (2, 32, 90):
                yield project_case("traffic", rows, 80, (48, 24, 24), dtype, traffic=traffic, bias=True)
            yield project_case(
                "gated", 20, 64, (40, 40), dtype, traffic=traffic, activation="silu_mul", norm="rms"
            )
        for stored in (torch.float32, torch.bfloat16, torch.int8):
            name = f"{str(stored).removeprefix('torch.')}_rows"
            yield project_case(name, 12, 64, (64,), dtype, traffic="mixed_methods", rows_dtype=stored)
            for rows in (3, 21, 90):  # few rows, full row tiles, and beyond what keeps z B aside
                yield project_case(
                    name, rows, 83, (50, 17, 33), dtype, traffic="mixed_ranks", rows_dtype=stored,
                    norm="rms", residual=rows == 21,
                )  # fmt: skip
            yield project_case(
                name, 20, 72, (40, 40), dtype, traffic="zipf", rows_dtype=stored, activation="silu_mul"
            )


def test_cases() -> list[Case]:
    """Small shapes that reach every branch."""
    norms = [
        norm_case(rows, features, kind, residual)
        for kind in ("rms", "layer")
        for rows, features in ((1, 1), (2, 7), (3, 64), (40, 577))
        for residual in (False, True)
    ]
    from chiliad.kernels.cases_attention import attention_test_cases  # these import this module
    from chiliad.kernels.cases_layers import layers_test_cases

    return [*_project_tests(), *norms, *attention_test_cases(), *layers_test_cases()]


def bench_cases() -> list[Case]:
    """SmolLM2-135M's shapes, decode and prefill, with and without adapters."""
    from chiliad.kernels.cases_attention import attention_bench_cases

    h, ff, vocab = 576, 1536, 49152
    cases = attention_bench_cases()
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        for rows in (1, 8, 32, 512):
            traffics: tuple[Traffic, ...] = ("none", "identical", "distinct")
            for t in traffics[: 3 if rows > 1 else 2]:
                cases += [
                    project_case("qkv", rows, h, (576, 192, 192), dtype, norm="rms", traffic=t),
                    project_case("o", rows, h, (h,), dtype, residual=True, traffic=t),
                    project_case(
                        "gate_up", rows, h, (ff, ff), dtype, norm="rms", activation="silu_mul", traffic=t
                    ),
                    project_case("down", rows, ff, (h,), dtype, residual=True, traffic=t),
                ]
            if rows <= 32:
                cases.append(project_case("head", rows, h, (vocab,), dtype, norm="rms"))
    return cases
