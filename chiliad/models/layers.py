"""The parts of a decoder: which checkpoint tensors each part needs, and how it is packed.

A `Blueprint` says, before any weight is read, every tensor a model must have, its shape, and
which `core.Site` (adapter slot) each projection is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from chiliad.core import Site
from chiliad.kernels.base import Kernels, LinearSpec, NormSpec, PackedLinear, QuantizedWeight
from chiliad.models.arch import Rope

Tensor = torch.Tensor
Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, Tensor | QuantizedWeight]


def plain(weight: Tensor | QuantizedWeight) -> Tensor:
    """A weight's values: float32 if it is quantised, else as it is."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@dataclass(frozen=True, slots=True)
class Linear:
    """Projections that share their input, packed as one: (q, k, v), (gate, up) or a single one."""

    modules: tuple[str, ...]  # Hugging Face module paths
    sizes: tuple[int, ...]  # out features of each
    slots: tuple[int, ...]  # adapter slot of each, -1 for none
    in_features: int
    bias: bool = False
    transposed: bool = False  # Conv1D: stored [in, out]
    head: bool = False  # lm_head, which has a dtype of its own

    def shapes(self) -> Shapes:
        shapes: Shapes = {}
        for module, size in zip(self.modules, self.sizes, strict=True):
            shape = (self.in_features, size) if self.transposed else (size, self.in_features)
            shapes[f"{module}.weight"] = shape
            if self.bias:
                shapes[f"{module}.bias"] = (size,)
        return shapes

    def build(self, tensors: Weights, kernels: Kernels, dtype: str) -> PackedLinear:
        bias = torch.cat([plain(tensors[f"{m}.bias"]).float() for m in self.modules]) if self.bias else None
        spec = LinearSpec(self.in_features, self.sizes, self.slots, dtype)
        stored = [tensors[f"{module}.weight"] for module in self.modules]
        quantized = [w for w in stored if isinstance(w, QuantizedWeight) and w.dtype == dtype]
        if len(quantized) == len(stored):
            return kernels.pack_linear(QuantizedWeight.cat(quantized), bias, spec)
        weights = [plain(w).T if self.transposed else plain(w) for w in stored]
        weight = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        return kernels.pack_linear(weight, bias, spec)


@dataclass(frozen=True, slots=True)
class Norm:
    module: str
    size: int
    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0  # added to the stored weight

    def shapes(self) -> Shapes:
        names = ("weight", "bias") if self.kind == "layer" else ("weight",)
        return {f"{self.module}.{name}": (self.size,) for name in names}

    def build(self, tensors: Weights) -> NormSpec:
        # float() copies nothing when the checkpoint is float32 already: never keep its file mapped
        weight = plain(tensors[f"{self.module}.weight"]).float().clone() + self.offset
        bias = plain(tensors[f"{self.module}.bias"]).float().clone() if self.kind == "layer" else None
        return NormSpec(self.kind, weight, self.eps, bias)


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding: rows looked up by token id or position."""

    module: str
    rows: int
    width: int
    scale: float = 1.0

    def shapes(self) -> Shapes:
        return {f"{self.module}.weight": (self.rows, self.width)}

    def build(self, tensors: Weights, kernels: Kernels, dtype: torch.dtype) -> PackedTable:
        weight = plain(tensors[f"{self.module}.weight"])
        # Models are trained with the scale in the weight's dtype (Gemma: sqrt(h) in bfloat16)
        scale = float(torch.tensor(self.scale).to(weight.dtype))
        # a copy even where the dtype is right: the file must not stay mapped behind the table
        table = kernels.pack_embedding(weight.to(dtype, copy=True), dtype)
        return PackedTable(table, scale, weight.numel() * dtype.itemsize)


@dataclass(frozen=True, slots=True)
class PackedTable:
    table: object  # what `Kernels.embed` takes
    scale: float
    nbytes: int


@dataclass(slots=True)
class Blueprint:
    """Every part of a model by role ("3.qkv", "final_norm", "embed"), and its adapter sites."""

    prefix: str  # module prefix that checkpoints of the bare trunk leave out, e.g. "model."
    harmless: tuple[re.Pattern[str], ...] = ()  # extra tensors that checkpoints may carry
    tied: tuple[str, str] | None = None  # (lm_head, embedding): may both be there, if equal
    linears: dict[str, Linear] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    def linear(
        self,
        role: str,
        layer: int,
        modules: tuple[str, ...],
        sizes: tuple[int, ...],
        in_features: int,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        """Add projections that adapters may change: each becomes a site with the next slot."""
        slots = tuple(range(len(self.sites), len(self.sites) + len(modules)))
        for module, size in zip(modules, sizes, strict=True):
            self.sites.append(Site(module, layer, in_features, size, transposed))
        self.linears[role] = Linear(modules, sizes, slots, in_features, bias, transposed)

    def shapes(self) -> Shapes:
        """Every tensor the model needs."""
        return {name: shape for part in self.parts().values() for name, shape in part.shapes().items()}

    def parts(self) -> dict[str, Linear | Norm | Table]:
        """All parts by role; roles are unique across kinds."""
        return {**self.linears, **self.norms, **self.tables}

    def canonical(self, name: str, needed: Shapes) -> str:
        """A tensor's full name: checkpoints of the bare trunk leave out its prefix."""
        return self.prefix + name if name not in needed and self.prefix + name in needed else name

    def is_harmless(self, name: str) -> bool:
        """Whether an extra tensor is a buffer that some checkpoints carry and no one needs."""
        return any(pattern.fullmatch(name) for pattern in self.harmless)


@dataclass(slots=True)
class Parts:
    """A blueprint, built: what a decoder runs on."""

    linears: dict[str, PackedLinear] = field(default_factory=dict)
    norms: dict[str, NormSpec] = field(default_factory=dict)
    tables: dict[str, PackedTable] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        linears = sum(linear.nbytes for linear in self.linears.values())
        norms = sum(norm.weight.nbytes for norm in self.norms.values())
        return linears + norms + sum(table.nbytes for table in self.tables.values())


def rope_table(rope: Rope, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head_dim / 2], in float32 throughout as in training."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * _frequencies(rope, head_dim)
    return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    frequency = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        turns = rope.original_positions * frequency / (2 * math.pi)  # in the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequency / rope.factor + keep * frequency
    if rope.kind == "yarn":
        # The same idea over the index of the frequency: kept below `low`, stretched above `high`.
        def index(turns: float) -> float:
            """Which frequency makes this many turns in the original context."""
            wave = rope.original_positions / (turns * 2 * math.pi)
            return head_dim * math.log(wave) / (2 * math.log(rope.theta))

        low, high = index(rope.beta_fast), index(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        indices = torch.arange(head_dim // 2, dtype=torch.float32)
        stretch = ((indices - low) / (high - low or 0.001)).clamp(0, 1)
        return stretch * frequency / rope.factor + (1 - stretch) * frequency
    return frequency
