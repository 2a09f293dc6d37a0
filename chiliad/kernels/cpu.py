"""The C++ implementation of the op table: checks here, work in `_core` (csrc/).

A call passes raw addresses after cheap checks, so that a decode step of many small ops is not
ruled by Python. Handles (`native`) hold what is prepared once: packed weights, an adapter's
row addresses, a step's tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import chiliad.kernels._core as _core
from chiliad.errors import InvalidConfig, KernelError
from chiliad.kernels.base import (
    Activation,
    AdapterRows,
    KVLayout,
    LinearSpec,
    NormSpec,
    PackedLinear,
    Step,
    Tensor,
)
from chiliad.kernels.reference import ReferenceKernels

# Codes of the enums in csrc/batch.h and csrc/linear.h.
_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_NORMS = {"rms": 1, "layer": 2}
_ACTIVATIONS = {None: 0, "silu_mul": 1, "gelu_tanh_mul": 2, "gelu_tanh": 3, "gelu": 4}
_NO_NORM = (0, 0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A packed weight; `native` owns the bytes."""

    spec: LinearSpec
    nbytes: int
    native: object


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _handle(adapter: AdapterRows | None) -> object:
    if adapter is None:
        return None
    if not isinstance(adapter.native, _core.Adapter):
        raise KernelError("a segment's adapter was not prepared by these kernels: call prepare_adapter")
    return adapter.native


def _rows(x: Tensor, features: int, what: str) -> int:
    """Number of rows of a contiguous float32 [rows, features]."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.shape[-1] != features or x.dim() != 2:
        raise KernelError(
            f"{what} must be contiguous float32 [rows, {features}], not {x.dtype} {tuple(x.shape)}"
        )
    return int(x.shape[0])


def _norm(spec: NormSpec, features: int) -> tuple[int, int, int, float]:
    for vector in (spec.weight, spec.bias):
        if vector is not None and (
            vector.dtype != torch.float32 or vector.numel() != features or not vector.is_contiguous()
        ):
            raise KernelError(f"norm vectors must be contiguous float32 [{features}]")
    bias = 0 if spec.bias is None else spec.bias.data_ptr()
    return _NORMS[spec.kind], spec.weight.data_ptr(), bias, spec.eps


class CpuKernels(ReferenceKernels):
    """Implements `kernels.base.Kernels`. Ops not yet written in C++ run the reference."""

    name = "cpu"

    def __init__(self, isa: str = "auto", threads: int = 0) -> None:
        try:
            self._core = _core.Kernels(isa, threads)
        except ValueError as bad:
            raise InvalidConfig(str(bad), param="isa") from bad
        super().__init__(f"{self._core.isa}, {self._core.threads} threads")

    @property
    def isa(self) -> str:
        return str(self._core.isa)

    @property
    def threads(self) -> int:
        return int(self._core.threads)

    def read_bandwidth(self, nbytes: int = 1 << 29, repeats: int = 3) -> float:
        """Bytes per second at which these threads read memory: the ceiling of decoding."""
        return float(_core.read_bandwidth(self._core, nbytes, repeats))

    def multiply_rate(self, dtype: str, repeats: int = 5) -> float:
        """Flops per second of multiply-adds out of registers: the ceiling of prefill."""
        return float(_core.multiply_rate(self._core, dtype == "bfloat16", repeats))

    # -- preparation ---------------------------------------------------------------------

    def bind_arena(self, arena: Tensor, layout: KVLayout) -> None:
        if arena.dtype != torch.uint8 or not arena.is_contiguous():
            raise KernelError("the arena must be a contiguous uint8 tensor")
        super().bind_arena(arena, layout)
        self._core.bind_arena(
            arena.data_ptr(),
            arena.numel(),
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_tokens,
            _name(layout.dtype),
            layout.page_bytes,
        )

    def prepare_adapter(self, rows: AdapterRows) -> AdapterRows:
        try:
            native = _core.Adapter(_name(rows.dtype))
            for slot, low in rows.low_rank.items():
                native.low_rank(slot, low.a, low.b, low.scale)
            for slot, vectors in rows.elementwise.items():
                offsets = (-1 if o is None else o for o in (vectors.d, vectors.g, vectors.c))
                native.elementwise(slot, *offsets)
        except TypeError as bad:
            raise KernelError(f"cannot prepare adapter: {bad}") from bad
        return replace(rows, native=native)

    def prepare_step(self, step: Step) -> Step:
        try:
            step.native = _core.Step(
                step.num_tokens,
                step.positions,
                step.row_start,
                step.context,
                step.page_tables,
                [(s.start, s.stop, _handle(s.adapter)) for s in step.segments],
            )
        except (TypeError, RuntimeError) as bad:
            raise KernelError(f"bad step: {bad}") from bad
        return step

    def pack_linear(self, weight: Tensor, bias: Tensor | None, spec: LinearSpec) -> PackedLinear:
        if weight.shape != (spec.out_features, spec.in_features):
            raise KernelError(f"weight {tuple(weight.shape)} does not fit {spec}")
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        weight = weight.contiguous()
        if bias is not None:
            bias = bias.float().contiguous()
            if bias.shape != (spec.out_features,):
                raise KernelError(f"bias {tuple(bias.shape)} does not fit {spec}")
        native = _core.pack_linear(
            self._core,
            weight.data_ptr(),
            _DTYPES[_name(weight.dtype)],
            0 if bias is None else bias.data_ptr(),
            _DTYPES[spec.dtype],
            spec.in_features,
            list(spec.sizes),
            list(spec.slots),
        )
        return CpuLinear(spec, native.nbytes, native)

    # -- ops -----------------------------------------------------------------------------

    def norm(self, x: Tensor, spec: NormSpec, residual: Tensor | None = None) -> Tensor:
        features = x.shape[-1]
        x = x.contiguous()
        if x.dtype != torch.float32:
            raise KernelError(f"norm takes float32, not {x.dtype}")
        y = torch.empty_like(x) if residual is None else residual
        if residual is not None and (residual.shape != x.shape or not residual.is_contiguous()):
            raise KernelError("the residual of a norm must be contiguous and of x's shape")
        rows = x.numel() // features
        _core.norm(
            self._core,
            x.data_ptr(),
            rows,
            features,
            *_norm(spec, features),
            y.data_ptr(),
            residual is not None,
        )
        return y

    def project(
        self,
        x: Tensor,
        linear: PackedLinear,
        step: Step | None,
        *,
        norm: NormSpec | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(linear, CpuLinear):
            raise KernelError("this linear was not packed by these kernels: call pack_linear")
        spec = linear.spec
        rows = _rows(x, spec.in_features, "x")
        out_features = spec.out_features
        if activation in ("silu_mul", "gelu_tanh_mul"):
            out_features //= 2
        if residual is None:
            y = torch.empty(rows, out_features)
        else:
            y = residual
            if _rows(y, out_features, "residual") != rows:
                raise KernelError(f"x has {rows} rows, residual {y.shape[0]}")
        _core.project(
            self._core,
            linear.native,
            None if step is None else step.native,
            x.data_ptr(),
            rows,
            *(_NO_NORM if norm is None else _norm(norm, spec.in_features)),
            _ACTIVATIONS[activation],
            y.data_ptr(),
            residual is not None,
        )
        return y
