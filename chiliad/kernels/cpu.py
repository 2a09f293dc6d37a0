"""The C++ implementation of the op table: checks here, work in `_core` (csrc/).

A call passes raw addresses after cheap checks, so that a decode step of many small ops is not
ruled by Python. Handles (`native`) hold what is prepared once: packed weights, an adapter's
row addresses, a step's tables.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import chiliad.kernels._core as _core
from chiliad.errors import InvalidConfig, KernelError
from chiliad.kernels.base import (
    GROUP,
    Activation,
    AdapterRows,
    KVLayout,
    LayerSpec,
    LinearSpec,
    NormSpec,
    PackedLinear,
    QuantizedWeight,
    SampleBatch,
    Sampled,
    Step,
    Tensor,
)
from chiliad.kernels.reference import ReferenceKernels, fitted

# Codes of the enums in csrc/batch.h, csrc/write_rows.h and csrc/linear.h.
_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_FILE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORMS = {"rms": 1, "layer": 2}
_ACTIVATIONS = {None: 0, "silu_mul": 1, "gelu_tanh_mul": 2, "gelu_tanh": 3, "gelu": 4}
_NO_NORM = (0, 0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class CpuLayers:
    """A decoder's layers; `native` points into what `specs` keeps."""

    specs: tuple[LayerSpec, ...]
    hidden: int
    native: object


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A packed weight; `native` owns the bytes."""

    spec: LinearSpec
    nbytes: int
    native: object


def _packed(linear: PackedLinear) -> CpuLinear:
    if not isinstance(linear, CpuLinear):
        raise KernelError("this linear was not packed by these kernels: call pack_linear")
    return linear


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


def _rope(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[int, int, int, int]:
    max_position, half = cos.shape
    if sin.shape != cos.shape or _rows(sin, half, "sin") != _rows(cos, half, "cos"):
        raise KernelError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ")
    if 2 * half > head_dim:
        raise KernelError(f"rope of {2 * half} dimensions does not fit head_dim {head_dim}")
    return cos.data_ptr(), sin.data_ptr(), half, max_position


def _check_levels(levels: Tensor, scale: Tensor, minimum: Tensor | None) -> None:
    groups = (levels.shape[0], -(-levels.shape[1] // GROUP))
    stored = torch.int8 if minimum is None else torch.uint8
    if levels.dtype != stored or any(
        t is not None and (t.dtype != torch.float16 or t.shape != groups) for t in (scale, minimum)
    ):
        raise KernelError(f"levels are {stored} [out, in], scales and minima float16 {list(groups)}")


class CpuKernels(ReferenceKernels):
    """Implements `kernels.base.Kernels`. Ops not yet written in C++ run the reference."""

    name = "cpu"

    def __init__(self, isa: str = "auto", threads: int = 0) -> None:
        try:
            self._core = _core.Kernels(isa, threads)
        except ValueError as bad:
            raise InvalidConfig(str(bad), param="isa") from bad
        super().__init__(f"{self._core.isa}, {self._core.threads} threads")
        self._norm = functools.lru_cache(4096)(_norm)  # checked once: every step asks for the same norms

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
            slots = sorted(rows.low_rank)
            if slots:
                lows = [rows.low_rank[slot] for slot in slots]
                if any(not len(low.a) == len(low.b) == len(low.scale) for low in lows):
                    raise KernelError("an adapter needs as many rows of A as of B as scales")
                a, b, scale = ([getattr(low, name) for low in lows] for name in ("a", "b", "scale"))
                ranks = [len(part) for part in a]
                native.low_ranks(slots, ranks, np.concatenate(a), np.concatenate(b), np.concatenate(scale))
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

    def pack_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, spec: LinearSpec
    ) -> PackedLinear:
        fit = fitted(weight, spec)
        scale = minimum = None
        if isinstance(fit, QuantizedWeight):
            data, dtype = fit.levels.contiguous(), fit.dtype
            scale = fit.scale.contiguous()
            minimum = None if fit.minimum is None else fit.minimum.contiguous()
            _check_levels(data, scale, minimum)
        else:
            data = fit if fit.dtype in (torch.float32, torch.bfloat16) else fit.float()
            data, dtype = data.contiguous(), _name(data.dtype)
        if bias is not None:
            bias = bias.float().contiguous()
            if bias.shape != (spec.out_features,):
                raise KernelError(f"bias {tuple(bias.shape)} does not fit {spec}")
        native = _core.pack_linear(
            self._core,
            data.data_ptr(),
            _DTYPES[dtype],
            0 if scale is None else scale.data_ptr(),
            0 if minimum is None else minimum.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            _DTYPES[spec.dtype],
            spec.in_features,
            list(spec.sizes),
            list(spec.slots),
        )
        return CpuLinear(spec, native.nbytes, native)

    def touch_arena(self, begin: int, end: int) -> None:
        self._core.touch_arena(begin, end)

    def write_rows(
        self, matrices: Sequence[tuple[Tensor, float]], offsets: np.ndarray, dtype: torch.dtype
    ) -> np.ndarray:
        scale = np.empty(len(offsets), np.float32)
        described = [
            (m.data_ptr(), _FILE_TYPES[m.dtype], *m.shape, *m.stride(), factor) for m, factor in matrices
        ]
        self._core.write_rows(described, offsets, _name(dtype), scale.ctypes.data)
        return scale

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
            *self._norm(spec, features),
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
        packed = _packed(linear)
        spec = packed.spec
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
            packed.native,
            None if step is None else step.native,
            x.data_ptr(),
            rows,
            *(_NO_NORM if norm is None else self._norm(norm, spec.in_features)),
            _ACTIVATIONS[activation],
            y.data_ptr(),
            residual is not None,
        )
        return y

    def pack_embedding(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return super().pack_embedding(weight, dtype).contiguous()

    def embed(self, table: object, token_ids: Tensor, scale: float = 1.0) -> Tensor:
        assert isinstance(table, torch.Tensor)
        if token_ids.dtype != torch.int64 or token_ids.dim() != 1:
            raise KernelError(f"token ids must be int64 [T], not {token_ids.dtype} {tuple(token_ids.shape)}")
        if table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
            raise KernelError("an embedding table is contiguous float32 or bfloat16: call pack_embedding")
        ids = token_ids.contiguous()
        vocab, hidden = table.shape
        out = torch.empty(len(ids), hidden)
        _core.embed(
            self._core,
            table.data_ptr(),
            vocab,
            hidden,
            table.dtype == torch.bfloat16,
            ids.data_ptr(),
            len(ids),
            scale,
            out.data_ptr(),
        )
        return out

    def _qkv(self, qkv: Tensor, step: Step, num_heads: int) -> KVLayout:
        kv = self._layout
        if kv is None:
            raise KernelError("bind_arena comes before attention")
        if step.native is None:
            raise KernelError("the step was not prepared: call prepare_step")
        if _rows(qkv, (num_heads + 2 * kv.num_kv_heads) * kv.head_dim, "qkv") != step.num_tokens:
            raise KernelError(f"qkv has {qkv.shape[0]} rows, the step {step.num_tokens}")
        return kv

    def rope_kv(
        self,
        qkv: Tensor,
        step: Step,
        layer: int,
        num_heads: int,
        rope: tuple[Tensor, Tensor] | None,
        q_norm: NormSpec | None = None,
        k_norm: NormSpec | None = None,
    ) -> None:
        kv = self._qkv(qkv, step, num_heads)
        tables = (0, 0, 0, 0) if rope is None else _rope(*rope, kv.head_dim)
        norms = (_NO_NORM if n is None else self._norm(n, kv.head_dim) for n in (q_norm, k_norm))
        q_args, k_args = norms
        _core.rope_kv(self._core, step.native, layer, qkv.data_ptr(), num_heads, *tables, *q_args, *k_args)

    def attention(
        self, qkv: Tensor, step: Step, layer: int, num_heads: int, scale: float, window: int = 0
    ) -> Tensor:
        kv = self._qkv(qkv, step, num_heads)
        out = torch.empty(step.num_tokens, num_heads * kv.head_dim)
        _core.attention(
            self._core, step.native, layer, qkv.data_ptr(), num_heads, scale, window, out.data_ptr()
        )
        return out

    def pack_layers(self, layers: Sequence[LayerSpec]) -> CpuLayers:
        described = []
        for layer in layers:
            linears = [_packed(linear) for linear in (layer.qkv, layer.out, layer.up, layer.down)]
            if layer.num_heads <= 0 or layer.activation not in _ACTIVATIONS:
                raise KernelError(f"no layer has {layer.num_heads} heads and activation {layer.activation}")
            hidden, head_dim = linears[0].spec.in_features, linears[1].spec.in_features // layer.num_heads
            norms = [
                (layer.input_norm, hidden),
                (layer.q_norm, head_dim),
                (layer.k_norm, head_dim),
                (layer.post_attention_norm, hidden),
                (layer.mlp_norm, hidden),
                (layer.post_mlp_norm, hidden),
            ]
            described.append(
                (
                    [_NO_NORM if norm is None else _norm(norm, size) for norm, size in norms],
                    [linear.native for linear in linears],
                    (0, 0, 0, 0) if layer.rope is None else _rope(*layer.rope, head_dim),
                    layer.num_heads,
                    layer.window,
                    layer.scale,
                    _ACTIVATIONS[layer.activation],
                )
            )
        if not described:
            raise KernelError("a decoder needs at least one layer")
        return CpuLayers(tuple(layers), hidden, _core.pack_layers(described))

    def layers(self, x: Tensor, step: Step, layers: object) -> Tensor:
        if not isinstance(layers, CpuLayers):
            raise KernelError("these layers were not packed by these kernels: call pack_layers")
        if step.native is None:
            raise KernelError("the step was not prepared: call prepare_step")
        if _rows(x, layers.hidden, "x") != step.num_tokens:
            raise KernelError(f"x has {x.shape[0]} rows, the step {step.num_tokens}")
        _core.layers(self._core, layers.native, step.native, x.data_ptr())
        return x

    def sample(self, logits: Tensor, batch: SampleBatch) -> Sampled:
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise KernelError(f"logits must be float32 [R, vocab], not {tuple(logits.shape)}")
        vocab = logits.shape[1]
        rows = _rows(logits, vocab, "logits")
        wanted = np.minimum(batch.logprobs, vocab)
        width = max(int(wanted.max(initial=0)), 0)
        tokens, logprob = np.empty(rows, np.int32), np.empty(rows, np.float32)
        top_ids, top_logprobs = np.empty((rows, width), np.int32), np.empty((rows, width), np.float32)
        try:
            _core.sample(
                self._core,
                logits.data_ptr(),
                rows,
                vocab,
                batch.temperature,
                batch.top_p,
                batch.top_k,
                batch.min_p,
                batch.presence,
                batch.frequency,
                batch.repetition,
                batch.uniform,
                batch.prompt_tokens,
                batch.output_tokens,
                batch.bias,
                batch.banned,
                wanted,
                tokens.ctypes.data,
                logprob.ctypes.data,
                top_ids.ctypes.data,
                top_logprobs.ctypes.data,
                width,
            )
        except (TypeError, RuntimeError) as bad:
            raise KernelError(f"bad sample batch: {bad}") from bad
        if width == 0:
            return Sampled(tokens, logprob, list(top_ids), list(top_logprobs))
        counts = np.maximum(wanted, 0).tolist()
        return Sampled(
            tokens,
            logprob,
            [ids[:k] for ids, k in zip(top_ids, counts, strict=True)],
            [values[:k] for values, k in zip(top_logprobs, counts, strict=True)],
        )
