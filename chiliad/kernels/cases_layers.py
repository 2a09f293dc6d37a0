"""The case table's last part: whole decoder layers, of different families. See `cases.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from chiliad.kernels.base import (
    Activation,
    AdapterRows,
    ElementwiseRows,
    Kernels,
    LayerSpec,
    LinearSpec,
    LowRankRows,
    NormSpec,
    PackedLinear,
    Segment,
    Tensor,
)
from chiliad.kernels.cases import BYTES_PER_WEIGHT, ArenaBuilder, Case, Guarded, Run, make_norm, seed_of
from chiliad.kernels.cases_attention import Lengths, PagedKV, kv_layout


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between decoders."""

    name: str
    norm: str
    activation: Activation
    heads: tuple[int, int]  # query, key-value
    head_dim: int = 16
    hidden: int = 80
    ffn: int = 112
    bias: bool = False
    rope: bool = True
    head_norms: bool = False
    post_norms: bool = False
    window: int = 0  # of every other layer

    @property
    def sites(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's adapter slots: q, k, v, o, gate and up or up alone, down."""
        q, kv = self.heads[0] * self.head_dim, self.heads[1] * self.head_dim
        wide = [(self.hidden, self.ffn)] * (2 if self.activation.endswith("_mul") else 1)
        return [
            (self.hidden, q),
            (self.hidden, kv),
            (self.hidden, kv),
            (q, self.hidden),
            *wide,
            (self.ffn, self.hidden),
        ]


FAMILIES = (
    Family("llama", "rms", "silu_mul", (6, 2)),
    Family("gpt2", "layer", "gelu_tanh", (4, 4), bias=True, rope=False),
    Family("gemma", "rms", "gelu_tanh_mul", (4, 1), head_norms=True, post_norms=True, window=20),
)
_LAYERS = 3


def layers_case(family: Family, lengths: Lengths, dtype: str) -> Case:
    """Sequences whose earlier tokens are in the pool; the first uses the base, the others an adapter each."""
    name = f"{family.name}-{dtype}-{'+'.join(f'{rows}of{context}' for context, rows in lengths)}"
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    layout = kv_layout(_LAYERS, family.heads[1], family.head_dim, 16, stored)
    rows, sites = sum(count for _, count in lengths), family.sites
    per_layer = len(sites)

    def specs(kernels: Kernels, g: torch.Generator) -> list[LayerSpec]:
        def linear(first: int, count: int, layer: int) -> PackedLinear:
            part = sites[first : first + count]
            slots = tuple(per_layer * layer + first + i for i in range(count))
            spec = LinearSpec(part[0][0], tuple(out for _, out in part), slots, dtype)
            weight = torch.randn(spec.out_features, spec.in_features, generator=g) / spec.in_features**0.5
            bias = 0.1 * torch.randn(spec.out_features, generator=g) if family.bias else None
            return kernels.pack_linear(weight, bias, spec)

        def norm(size: int = family.hidden) -> NormSpec:
            made = make_norm(family.norm, size, g)
            assert made is not None
            return made

        longest = max(context for context, _ in lengths)
        angles = 6 * torch.rand(longest, family.head_dim // 2, generator=g)
        return [
            LayerSpec(
                input_norm=norm(),
                qkv=linear(0, 3, i),
                q_norm=norm(family.head_dim) if family.head_norms else None,
                k_norm=norm(family.head_dim) if family.head_norms else None,
                rope=(angles.cos(), angles.sin()) if family.rope else None,
                num_heads=family.heads[0],
                scale=family.head_dim**-0.5,
                window=family.window if i % 2 else 0,
                out=linear(3, 1, i),
                post_attention_norm=norm() if family.post_norms else None,
                mlp_norm=norm(),
                up=linear(4, per_layer - 5, i),
                activation=family.activation,
                down=linear(per_layer - 1, 1, i),
                post_mlp_norm=norm() if family.post_norms else None,
            )
            for i in range(_LAYERS)
        ]

    def adapter(builder: ArenaBuilder, index: int, g: torch.Generator) -> AdapterRows:
        low: dict[int, LowRankRows] = {}
        vectors: dict[int, ElementwiseRows] = {}
        for layer in range(_LAYERS):
            for j, (n, out) in enumerate(sites):
                slot, rank = per_layer * layer + j, (4, 16, 3)[(index + j) % 3]
                if (index + slot) % 7 == 0:
                    continue  # not every adapter has every slot
                a, scale_a = builder.add_rank_rows(torch.randn(rank, n, generator=g))
                b, scale_b = builder.add_rank_rows(torch.randn(rank, out, generator=g))
                low[slot] = LowRankRows(a, b, np.float32(0.2 / n**0.5) * scale_a * scale_b)
                if (index + slot) % 5 == 0:
                    vectors[slot] = ElementwiseRows(g=builder.add(1 + 0.1 * torch.randn(out, generator=g)))
        return AdapterRows(low, vectors, stored)

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        kv = PagedKV(layout, [context for context, _ in lengths])
        kv.fill_randomly(g)
        builder = ArenaBuilder(stored, start=kv.arena.numel())
        made = [adapter(builder, i, g) for i in range(1, len(lengths))]
        whole = builder.build()
        whole[: kv.arena.numel()] = kv.arena
        kernels.bind_arena(whole, layout)
        native = [None, *(kernels.prepare_adapter(rows) for rows in made)]
        step = kv.step(lengths)
        starts = step.row_start.tolist()
        segments = [Segment(starts[i], starts[i + 1], rows) for i, rows in enumerate(native)]
        step = kernels.prepare_step(replace(step, segments=segments))
        layers = kernels.pack_layers(specs(kernels, g))
        x = torch.randn(rows, family.hidden, generator=g)
        before = whole.clone()
        guarded = Guarded((rows, family.hidden))

        def call() -> tuple[Tensor, ...]:
            whole.copy_(before)
            guarded.tensor.copy_(x)
            y = kernels.layers(guarded.tensor, step, layers)
            assert y.data_ptr() == guarded.tensor.data_ptr()
            return (y,)

        return Run(call, guarded.guards)

    weights = float(_LAYERS * sum(n * out for n, out in sites))
    return Case(
        op="layers",
        name=name,
        tolerance={"float32": 2e-5, "bfloat16": 4e-2, "int8": 8e-2}[dtype],
        flops=2.0 * rows * weights,
        nbytes=BYTES_PER_WEIGHT[dtype] * weights + 8.0 * rows * family.hidden,
        prepare=prepare,
    )


def layers_test_cases() -> list[Case]:
    """A step of prompts, chunks and decoding rows; one of decoding rows alone."""
    mixed, decode = [(9, 9), (40, 17), (33, 1), (50, 1)], [(17, 1), (5, 1), (64, 1), (1, 1), (31, 1)]
    return [
        layers_case(family, lengths, dtype)
        for family in FAMILIES
        for lengths in (mixed, decode)
        for dtype in ("float32", "bfloat16", "int8")
    ]
