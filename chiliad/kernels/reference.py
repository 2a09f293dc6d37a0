"""The definition of every op, in plain torch: slow, obvious, never optimised.

Every other implementation is tested against this file over the case table (`cases.py`). It is
also what runs where no compiled core is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from chiliad.errors import KernelError
from chiliad.kernels.base import (
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
    Segment,
    Step,
    Tensor,
)
from chiliad.kernels.quantize import quantize


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A dense weight kept as it is (quantised ones as the float32 they stand for)."""

    spec: LinearSpec
    weight: Tensor  # [out, in]
    bias: Tensor | None
    nbytes: int


def fitted(weight: Tensor | QuantizedWeight, spec: LinearSpec) -> Tensor | QuantizedWeight:
    """The weight in the form that a spec packs: quantised for int8 and int4, else plain."""
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise KernelError(f"weight {tuple(weight.shape)} does not fit {spec}")
    if isinstance(weight, QuantizedWeight):
        return weight if weight.dtype == spec.dtype else fitted(weight.dequantize(), spec)
    return quantize(weight, spec.dtype) if spec.dtype in ("int8", "int4") else weight


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rank rows [r, n] -> whole numbers -127..127 (int8 [r, n]) and a float32 scale for each row [r]."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1).clamp_min(1e-30) / 127
    return (rows / scale.unsqueeze(1)).round_().to(torch.int8), scale


class ReferenceKernels:
    """Implements `kernels.base.Kernels`."""

    name = "reference"

    def __init__(self, reason: str = "asked for") -> None:
        self.reason = reason
        self._arena: Tensor | None = None
        self._layout: KVLayout | None = None

    # -- preparation ---------------------------------------------------------------------

    def pack_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, spec: LinearSpec
    ) -> PackedLinear:
        fit = fitted(weight, spec)
        kept = fit.dequantize() if isinstance(fit, QuantizedWeight) else fit.to(getattr(torch, spec.dtype))
        return ReferenceLinear(spec, kept, bias, kept.numel() * kept.element_size())

    def pack_embedding(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def bind_arena(self, arena: Tensor, layout: KVLayout) -> None:
        self._arena, self._layout = arena, layout

    def touch_arena(self, begin: int, end: int) -> None:
        pass

    def write_rows(
        self, matrices: Sequence[tuple[Tensor, float]], offsets: np.ndarray, dtype: torch.dtype
    ) -> np.ndarray:
        assert self._arena is not None, "bind_arena comes first"
        places, scales = iter(offsets.tolist()), []
        for matrix, factor in matrices:
            rows = matrix.float() * factor
            scale = torch.ones(len(rows))
            if dtype == torch.int8:
                rows, scale = int8_rows(rows)
            for row, at in zip(rows.to(dtype).contiguous().view(torch.uint8), places, strict=False):
                self._arena[at : at + len(row)] = row
            scales.append(scale)
        return torch.cat(scales).numpy()

    def prepare_adapter(self, rows: AdapterRows) -> AdapterRows:
        return rows

    def prepare_step(self, step: Step) -> Step:
        return step

    # -- ops -----------------------------------------------------------------------------

    def embed(self, table: object, token_ids: Tensor, scale: float = 1.0) -> Tensor:
        assert isinstance(table, torch.Tensor)
        return table[token_ids].float() * scale

    def norm(self, x: Tensor, spec: NormSpec, residual: Tensor | None = None) -> Tensor:
        if spec.kind == "rms":
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.eps) * spec.weight
        else:
            y = F.layer_norm(x, spec.weight.shape, spec.weight, spec.bias, spec.eps)
        return y if residual is None else residual.add_(y)

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
        assert isinstance(linear, ReferenceLinear)
        if norm is not None:
            x = self.norm(x, norm)
        spec, weight = linear.spec, linear.weight.float()
        y = F.linear(self._rounded(x, spec), weight, linear.bias)
        for segment in step.segments if step is not None else []:
            if segment.adapter is not None:
                self._apply_adapter(x, y, linear, segment)
        if activation in ("silu_mul", "gelu_tanh_mul"):
            gate, up = y.chunk(2, dim=-1)
            y = (F.silu(gate) if activation == "silu_mul" else F.gelu(gate, approximate="tanh")) * up
        elif activation is not None:
            y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        return y if residual is None else residual.add_(y)

    @staticmethod
    def _rounded(x: Tensor, spec: LinearSpec) -> Tensor:
        """What rank rows and weights narrower than float32 see of the input."""
        return x if spec.dtype == "float32" else x.to(torch.bfloat16).float()

    def _apply_adapter(self, x: Tensor, y: Tensor, linear: ReferenceLinear, segment: Segment) -> None:
        """y = g * (W (d * x) + bias) + scale * B (A x) + c, on one segment's rows, in place."""
        adapter = segment.adapter
        assert adapter is not None
        rows = slice(segment.start, segment.stop)
        first = 0
        for slot, size in zip(linear.spec.slots, linear.spec.sizes, strict=True):
            columns = slice(first, first + size)
            first += size
            vectors = adapter.elementwise.get(slot)
            if vectors is not None:
                out = y[rows, columns]
                if vectors.d is not None:
                    d = self._row(vectors.d, linear.spec.in_features, adapter.vector_dtype)
                    bias = None if linear.bias is None else linear.bias[columns]
                    scaled = self._rounded(x[rows] * d, linear.spec)
                    out = F.linear(scaled, linear.weight[columns].float(), bias)
                if vectors.g is not None:
                    out = out * self._row(vectors.g, size, adapter.vector_dtype)
                if vectors.c is not None:
                    out = out + self._row(vectors.c, size, adapter.vector_dtype)
                y[rows, columns] = out
            low_rank = adapter.low_rank.get(slot)
            if low_rank is not None and len(low_rank.a):
                a = torch.stack(
                    [self._row(int(o), linear.spec.in_features, adapter.dtype) for o in low_rank.a]
                )
                b = torch.stack([self._row(int(o), size, adapter.dtype) for o in low_rank.b])
                seen = x[rows] if adapter.dtype == torch.float32 else self._rounded(x[rows], linear.spec)
                z = (seen @ a.T) * torch.from_numpy(low_rank.scale)
                y[rows, columns] += z @ b

    def _row(self, offset: int, length: int, dtype: torch.dtype) -> Tensor:
        assert self._arena is not None
        stored = self._arena[offset : offset + length * dtype.itemsize].view(dtype)
        return stored.float()

    def _kv_views(self, page: int) -> tuple[Tensor, Tensor]:
        """K as [heads, head_dim, tokens] and V as [heads, tokens, head_dim], views of one page."""
        assert self._arena is not None
        assert self._layout is not None
        kv, pair = self._layout, self._layout.pair
        numel = kv.num_kv_heads * kv.head_dim * kv.block_tokens
        start = page * kv.page_bytes
        flat = self._arena[start : start + 2 * numel * kv.dtype.itemsize].view(kv.dtype)
        k = flat[:numel].view(kv.num_kv_heads, kv.head_dim // pair, kv.block_tokens, pair)
        v = flat[numel:].view(kv.num_kv_heads, kv.block_tokens // pair, kv.head_dim, pair)
        return k.permute(0, 1, 3, 2), v.permute(0, 1, 3, 2)  # [H, D/p, p, t], [H, t/p, p, D]

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
        kv = self._layout
        assert kv is not None
        assert self._arena is not None
        heads = qkv.view(qkv.shape[0], num_heads + 2 * kv.num_kv_heads, kv.head_dim)
        q = heads[:, :num_heads]
        k = heads[:, num_heads : num_heads + kv.num_kv_heads]
        v = heads[:, num_heads + kv.num_kv_heads :]
        if q_norm is not None:
            q.copy_(self.norm(q, q_norm))
        if k_norm is not None:
            k.copy_(self.norm(k, k_norm))
        if rope is not None:
            positions = torch.from_numpy(step.positions.astype(np.int64))
            cos, sin = (table[positions].unsqueeze(1) for table in rope)
            half = cos.shape[-1]
            for part in (q, k):
                x1, x2 = part[..., :half].clone(), part[..., half : 2 * half].clone()
                part[..., :half] = x1 * cos - x2 * sin
                part[..., half : 2 * half] = x2 * cos + x1 * sin
        pair = kv.pair
        for i, table in enumerate(step.page_tables):
            for row in range(int(step.row_start[i]), int(step.row_start[i + 1])):
                block, offset = divmod(int(step.positions[row]), kv.block_tokens)
                page = int(table[block, layer])
                if offset == 0:
                    self._arena[page * kv.page_bytes : (page + 1) * kv.page_bytes] = 0
                k_view, v_view = self._kv_views(page)
                k_view[:, :, :, offset] = k[row].view(kv.num_kv_heads, -1, pair).to(kv.dtype)
                v_view[:, offset // pair, offset % pair, :] = v[row].to(kv.dtype)

    def attention(
        self, qkv: Tensor, step: Step, layer: int, num_heads: int, scale: float, window: int = 0
    ) -> Tensor:
        kv = self._layout
        assert kv is not None
        out = torch.empty(qkv.shape[0], num_heads, kv.head_dim)
        q_all = qkv[:, : num_heads * kv.head_dim].view(-1, num_heads, kv.head_dim)
        group = num_heads // kv.num_kv_heads
        for i, table in enumerate(step.page_tables):
            start, stop = int(step.row_start[i]), int(step.row_start[i + 1])
            context = int(step.context[i])
            pages = [self._kv_views(int(p)) for p in table[: -(-context // kv.block_tokens), layer]]
            k = torch.cat([p[0].flatten(1, 2) for p in pages], dim=-1)[:, :, :context].float()
            v = torch.cat([p[1].flatten(1, 2) for p in pages], dim=1)[:, :context].float()
            q = q_all[start:stop].transpose(0, 1)  # [heads, rows, head_dim]
            scores = (q @ k.repeat_interleave(group, dim=0)) * scale
            keys = torch.arange(context)
            queries = torch.arange(context - (stop - start), context).unsqueeze(1)
            seen = keys <= queries
            if window:
                seen &= keys > queries - window
            scores = scores.masked_fill(~seen, float("-inf"))
            mixed = torch.softmax(scores, dim=-1) @ v.repeat_interleave(group, dim=0)
            out[start:stop] = mixed.transpose(0, 1)
        return out.flatten(1)

    def pack_layers(self, layers: Sequence[LayerSpec]) -> object:
        return tuple(layers)

    def layers(self, x: Tensor, step: Step, layers: object) -> Tensor:
        assert isinstance(layers, tuple)
        for i, layer in enumerate(layers):
            qkv = self.project(x, layer.qkv, step, norm=layer.input_norm)
            self.rope_kv(qkv, step, i, layer.num_heads, layer.rope, layer.q_norm, layer.k_norm)
            mixed = self.attention(qkv, step, i, layer.num_heads, layer.scale, layer.window)
            if layer.post_attention_norm is None:
                self.project(mixed, layer.out, step, residual=x)
            else:
                self.norm(self.project(mixed, layer.out, step), layer.post_attention_norm, residual=x)
            wide = self.project(x, layer.up, step, norm=layer.mlp_norm, activation=layer.activation)
            if layer.post_mlp_norm is None:
                self.project(wide, layer.down, step, residual=x)
            else:
                self.norm(self.project(wide, layer.down, step), layer.post_mlp_norm, residual=x)
        return x

    def sample(self, logits: Tensor, batch: SampleBatch) -> Sampled:
        """Row by row, in this order: logprobs of the raw distribution; repetition, frequency and
        presence penalties; bias; bans; no token if the largest is not finite; greedy if
        temperature is 0, else divide by it; top-k; top-p; min-p; then the first token whose
        cumulated probability (tokens sorted by falling probability, ties by id) exceeds
        uniform * total.
        """
        tokens, chosen = np.empty(len(logits), np.int32), np.empty(len(logits), np.float32)
        top_ids: list[np.ndarray] = []
        top_logprobs: list[np.ndarray] = []
        for i, raw in enumerate(logits):
            adjusted = self._adjust(raw, batch, i)
            greedy = batch.temperature[i] == 0
            if not adjusted.max().isfinite():  # NaN is larger than any number
                token = -1
            else:
                token = int(adjusted.argmax()) if greedy else self._draw(adjusted, batch, i)
            tokens[i] = token
            k = int(batch.logprobs[i])
            logprobs = torch.log_softmax(raw, dim=-1) if k >= 0 else raw
            chosen[i] = 0.0 if k < 0 else float(logprobs[token]) if token >= 0 else np.nan
            best = torch.sort(logprobs, descending=True, stable=True) if k > 0 else None
            top_ids.append(best.indices[:k].numpy().astype(np.int32) if best else np.empty(0, np.int32))
            top_logprobs.append(best.values[:k].numpy() if best else np.empty(0, np.float32))
        return Sampled(tokens, chosen, top_ids, top_logprobs)

    @staticmethod
    def _adjust(raw: Tensor, batch: SampleBatch, i: int) -> Tensor:
        x = raw.clone()
        prompt, output = batch.prompt_tokens[i], batch.output_tokens[i]
        seen = [ids for ids in (prompt, output) if ids is not None and len(ids)]
        if batch.repetition[i] != 1 and seen:
            ids = torch.from_numpy(np.unique(np.concatenate(seen))).long()
            r = float(batch.repetition[i])
            x[ids] = torch.where(x[ids] > 0, x[ids] / r, x[ids] * r)
        if output is not None and len(output):
            ids, counts = (torch.from_numpy(a) for a in np.unique(output, return_counts=True))
            x[ids.long()] -= float(batch.frequency[i]) * counts + float(batch.presence[i])
        bias, banned = batch.bias[i], batch.banned[i]
        if bias is not None:
            x[torch.from_numpy(bias[0]).long()] += torch.from_numpy(bias[1])
        if banned is not None:
            x[torch.from_numpy(banned).long()] = float("-inf")
        return x

    @staticmethod
    def _draw(x: Tensor, batch: SampleBatch, i: int) -> int:
        order = torch.sort(x / float(batch.temperature[i]), descending=True, stable=True)
        p = torch.softmax(order.values.double(), dim=-1)
        if batch.top_k[i] > 0:
            p[int(batch.top_k[i]) :] = 0
        p = p / p.sum()
        if batch.top_p[i] < 1:
            p[(p.cumsum(0) - p) >= float(batch.top_p[i])] = 0  # the first to cross top_p stays
            p = p / p.sum()
        if batch.min_p[i] > 0:
            p[p < float(batch.min_p[i]) * p[0]] = 0
        total = p.cumsum(0)
        j = int(torch.searchsorted(total, float(batch.uniform[i]) * float(total[-1]), right=True))
        return int(order.indices[min(j, int((p > 0).sum()) - 1)])
