"""Every implementation this machine can run, against the reference, over the case table."""

from __future__ import annotations

import pytest
import torch

from chiliad.kernels.base import GROUP, KVLayout, LinearSpec, NormSpec, Segment
from chiliad.kernels.cases import (
    Case,
    Guarded,
    build_adapters,
    seed_of,
    simple_step,
)
from chiliad.kernels.cases import test_cases as table
from chiliad.kernels.quantize import quantize
from chiliad.kernels.reference import ReferenceKernels

_core = pytest.importorskip("chiliad.kernels._core", reason="the C++ core is not installed")
from chiliad.kernels.cpu import CpuKernels  # noqa: E402

CASES = table()
REFERENCE: dict[str, tuple[torch.Tensor, ...]] = {}


@pytest.fixture(
    scope="module",
    params=[(isa, n) for isa in _core.isas() for n in ((1, 3) if isa == "generic" else (2,))],
    ids=lambda p: f"{p[0]}-{p[1]}t",
)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    isa, threads = request.param
    return CpuKernels(isa=isa, threads=threads)


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    if str(case) not in REFERENCE:
        REFERENCE[str(case)] = case.prepare(ReferenceKernels()).call()
    return REFERENCE[str(case)]


def test_amx_is_emulated_for_tests_only() -> None:
    isas = _core.isas()
    if "avx512bf16" not in isas:
        pytest.skip("emulated AMX needs AVX512-BF16")
    assert "amx_emulated" in isas, "compile the core for tests: make setup, or make build"
    assert CpuKernels(threads=1).isa == isas[-2]


def test_ceilings(kernels: CpuKernels) -> None:
    assert kernels.multiply_rate("bfloat16", repeats=1) > 0
    assert kernels.read_bandwidth(1 << 25, repeats=1) > 0


def test_names_are_unique() -> None:
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(kernels: CpuKernels, case: Case) -> None:
    run = case.prepare(kernels)
    first = tuple(y.clone() for y in run.call())
    again = run.call()
    assert run.guards_intact()
    for y, y2, want in zip(first, again, expected(case), strict=True):
        assert y.dtype == want.dtype
        assert y.shape == want.shape
        assert torch.equal(y, y2), "two runs differ"
        scale = want.float().pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        error = ((y.float() - want.float()).abs() / scale).max()
        assert error <= case.tolerance, f"error {error:.2e}, tolerance {case.tolerance:.0e}"


def in_parts(kernels: CpuKernels, dtype: str) -> bool:
    """Whether up to four rows are multiplied with weights in parts of 8 bits (see linear_quantized.inl)."""
    return kernels.isa.startswith("amx") and dtype in ("int8", "int4")


def project_rows(
    kernels: CpuKernels,
    x: torch.Tensor,
    spec: LinearSpec,
    rows: list[int],
    dtype: torch.dtype,
    activation: object,
) -> torch.Tensor:
    """The chosen rows of x in one step; row i uses adapter i // 13 of a mixed set (negative: base)."""
    g = seed_of("independence")
    weight = torch.randn(spec.out_features, spec.in_features, generator=g) / 8
    norm = NormSpec("rms", torch.rand(spec.in_features, generator=g) + 0.5, 1e-6)
    linear = kernels.pack_linear(weight, torch.randn(spec.out_features, generator=g), spec)
    made, arena, _ = build_adapters("mixed_methods", 8, spec, dtype, 19, g)
    kernels.bind_arena(arena, KVLayout(1, 1, 16, 16, torch.float32, 2048))
    adapters = [kernels.prepare_adapter(a) if a is not None else None for _, _, a in made] + [None]
    segments, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] // 13 != rows[start] // 13:
            segments.append(Segment(start, i, adapters[rows[start] // 13 % len(adapters)]))
            start = i
    step = kernels.prepare_step(simple_step(len(rows), segments))
    residual = Guarded((len(rows), spec.out_features // (2 if activation else 1)))
    residual.tensor.zero_()
    return kernels.project(
        x[rows].contiguous(), linear, step, norm=norm, activation=activation, residual=residual.tensor
    ).clone()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("int8", torch.bfloat16),
        ("int4", torch.bfloat16),
        ("float32", torch.int8),
        ("bfloat16", torch.int8),
    ],
)
@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_rows_do_not_depend_on_their_neighbours(
    kernels: CpuKernels, dtype: str, stored: torch.dtype, activation: str | None
) -> None:
    """Bit for bit: alone, in any chunk of its segment, or in the whole batch; even beside NaN.

    Only with AMX and quantised weights do up to four rows take another way, which rounds less."""
    spec = LinearSpec(83, (40, 40), (0, 1), dtype)
    x = torch.randn(140, 83, generator=seed_of("x"))
    everything = list(range(140))
    whole = project_rows(kernels, x, spec, everything, stored, activation)
    for row in (0, 12, 13, 31, 32, 77, 139):
        alone = project_rows(kernels, x, spec, [row], stored, activation)[0]
        if in_parts(kernels, dtype):
            assert (alone - whole[row]).abs().max() < 1e-2 * whole.pow(2).mean().sqrt()
        else:
            assert torch.equal(alone, whole[row])
    for chunk in (everything[3:50], everything[50:57], everything[1::2]):
        assert torch.equal(project_rows(kernels, x, spec, chunk, stored, activation), whole[chunk])
    poisoned = x.clone()
    poisoned[[5, 44]] = torch.tensor([[float("nan")], [float("inf")]])
    others = [row for row in everything if row not in (5, 44)]
    assert torch.equal(
        project_rows(kernels, poisoned, spec, everything, stored, activation)[others], whole[others]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", _core.isas())
def test_threads_do_not_change_results(isa: str, dtype: str) -> None:
    spec = LinearSpec(64, (100, 28), (0, 1), dtype)
    x = torch.randn(150, 64, generator=seed_of("threads"))
    rows = list(range(150))
    results = [
        project_rows(CpuKernels(isa, threads), x, spec, rows, getattr(torch, dtype), None)
        for threads in (1, 2, 5)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 100, 50), (3, 576, 64), (4, 64, 40), (5, 32, 16), (37, 1536, 70)]
)
def test_quantised_products(kernels: CpuKernels, dtype: str, rows: int, width: int, out: int) -> None:
    """Levels multiplied as they are: float64 says the same; in parts, inputs have 16 bits. Unpacked: bit for
    bit what the bfloat16 linear of scale * level + minimum gives."""
    g = seed_of(dtype)
    weight = quantize(torch.randn(out, width, generator=g), dtype)
    x = torch.randn(rows, width, generator=g)
    y = kernels.project(x, kernels.pack_linear(weight, None, LinearSpec(width, (out,), (-1,), dtype)), None)
    parts = rows <= 4 and in_parts(kernels, dtype)
    if kernels.isa == "avx512bf16" or parts:
        scale, minimum = (
            None if t is None else t.double().repeat_interleave(GROUP, 1)[:, :width]
            for t in (weight.scale, weight.minimum)
        )
        exact = weight.levels.double() * scale + (0 if minimum is None else minimum)
        expected = x.bfloat16().double() @ exact.T
        assert (y - expected).abs().max() < (1e-4 if parts else 2e-6) * expected.pow(2).mean().sqrt()
    else:
        plain = LinearSpec(width, (out,), (-1,), "bfloat16")
        expected = kernels.project(x, kernels.pack_linear(weight.dequantize(), None, plain), None)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
def test_quantised_products_of_extremes(kernels: CpuKernels, dtype: str, rows: int, value: float) -> None:
    """What is not finite stays so, what is large or zero is as exact as anything; in its own row only."""
    g = seed_of(f"extremes {dtype}")
    weight = quantize(torch.randn(48, 96, generator=g), dtype)
    linear = kernels.pack_linear(weight, None, LinearSpec(96, (48,), (-1,), dtype))
    x = torch.randn(rows, 96, generator=g)
    plain = kernels.project(x, linear, None)
    x[0, 32:64] = value
    y = kernels.project(x, linear, None)
    assert torch.equal(y[1:], plain[1:])
    expected = x[:1].double() @ weight.dequantize().double().T
    if expected.isfinite().all():
        assert (y[:1] - expected).abs().max() < 1e-2 * expected.pow(2).mean().sqrt()
    else:
        assert not y[0].isfinite().any()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_packed_as_they_are(kernels: CpuKernels, dtype: str) -> None:
    """Rounding first and packing then is what pack_linear does with plain weights."""
    g = seed_of("packed")
    weight, x = torch.randn(50, 100, generator=g), torch.randn(37, 100, generator=g)
    spec = LinearSpec(100, (50,), (-1,), dtype)
    levels = kernels.pack_linear(quantize(weight, dtype), None, spec)
    plain = kernels.pack_linear(weight, None, spec)
    assert levels.nbytes == plain.nbytes
    assert torch.equal(kernels.project(x, levels, None), kernels.project(x, plain, None))
