"""The C++ implementation of the op table: checks here, work in `_core` (csrc/).

A call passes raw addresses after cheap checks, so that a decode step of many small ops is not
ruled by Python. Handles (`native`) hold what is prepared once: packed weights, an adapter's
row addresses, a step's tables.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from chiliad.errors import InvalidConfig, KernelError
from chiliad.kernels import _core
from chiliad.kernels.base import AdapterRows, KVLayout, Step, Tensor
from chiliad.kernels.reference import ReferenceKernels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _handle(adapter: AdapterRows | None) -> object:
    if adapter is None:
        return None
    if not isinstance(adapter.native, _core.Adapter):
        raise KernelError("a segment's adapter was not prepared by these kernels: call prepare_adapter")
    return adapter.native


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
