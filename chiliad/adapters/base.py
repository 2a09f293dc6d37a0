"""The contract of an adapter format, and the runtime forms that every format lowers to.

A format reads its own files and *lowers* itself. Kernels, pool and scheduler know only the
lowered forms:

    LowRank      y += scale * B (A x)           any rank, rank rows unpadded
    Elementwise  y  = g * (W (d * x) + bias) + c

so `y = g * (W (d * x) + bias) + scale * B A x + c` is the whole of what a projection may become.
(SoftPrompt, extra rows before the prompt, joins when the first format needs it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from chiliad.core import BaseInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One entry of a safetensors header: what is known before any tensor byte is read."""

    dtype: str  # "F32", "F16", "BF16", ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter will need in memory, from its config and header alone.

    A format may add to it what `lower` needs to know.

    `low_rank[slot]` is the rank at that slot; `vectors[slot]` names the elementwise vectors
    ("d", "g", "c") present there. Slots index `BaseInfo.sites`.
    """

    method: str  # "lora", "ia3", ...
    low_rank: dict[int, int]
    vectors: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return max(self.low_rank.values(), default=0)


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += scale * b^T (a x). float32, float16 or bfloat16, maybe views of a file's contents."""

    a: torch.Tensor  # [r, in_features]
    b: torch.Tensor  # [r, out_features]: row j is column j of PEFT's lora_B
    scale: float = 1.0  # scale * b is finite in float32


@dataclass(frozen=True, slots=True)
class Elementwise:
    """y = g * (W (d * x) + bias) + c; None is the identity."""

    d: torch.Tensor | None = None  # [in_features]
    g: torch.Tensor | None = None  # [out_features]
    c: torch.Tensor | None = None  # [out_features]


@dataclass(frozen=True, slots=True)
class Lowered:
    low_rank: dict[int, LowRank]
    elementwise: dict[int, Elementwise] = field(default_factory=dict)


class AdapterFormat(Protocol):
    """One adapter method in PEFT's folder format. Registered in `peft.FORMATS` by `peft_type`."""

    peft_type: ClassVar[str]  # the value of adapter_config.json's "peft_type"

    def check(self, config: Mapping[str, object]) -> None:
        """Refuse what no base could honour. Raises InvalidAdapter, naming the field."""

    def plan(
        self, config: Mapping[str, object], header: Mapping[str, TensorHeader], base: BaseInfo
    ) -> AdapterPlan:
        """Check config and header against the base without reading tensors.

        Raises InvalidAdapter (broken, unsafe or unsupported, naming the field or tensor) or
        AdapterMismatch (sound, but of another base).
        """

    def lower(self, plan: AdapterPlan, tensors: Mapping[str, torch.Tensor], largest: float) -> Lowered:
        """Turn tensors into the runtime forms, which may be views of them.

        plan: what `plan` made of their config and header. largest: no number in them has a larger
        magnitude. Raises InvalidAdapter for what is too large to compute with.
        """
