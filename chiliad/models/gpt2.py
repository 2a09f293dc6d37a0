"""GPT-2: learned positions, LayerNorm, biases everywhere, one fused attention projection.

The layers run as in `Decoder`; only what enters them and the names of the weights differ.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from chiliad.kernels.base import Kernels, Step
from chiliad.models.arch import Arch
from chiliad.models.decoder import Decoder
from chiliad.models.layers import Blueprint, Norm, Parts, Table

Tensor = torch.Tensor


class GPT2Decoder(Decoder):
    prefix: ClassVar[str] = "transformer."

    def __init__(self, arch: Arch, kernels: Kernels, parts: Parts, max_positions: int) -> None:
        super().__init__(arch, kernels, parts, max_positions)
        self._positions = parts.tables["positions"]

    @classmethod
    def blueprint(cls, arch: Arch) -> Blueprint:
        # causal masks that older checkpoints store as buffers
        masks = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
        plan = Blueprint(cls.prefix, (masks,))
        hidden, bias = arch.hidden, True

        def norm(role: str, module: str) -> None:
            plan.norms[role] = Norm(module, hidden, arch.norm, arch.norm_eps)

        def linear(role: str, layer: int, module: str, rows: int, columns: int) -> None:
            plan.linear(role, layer, (module,), (columns,), rows, bias, transposed=True)

        plan.tables["embed"] = Table("transformer.wte", arch.vocab, hidden)
        plan.tables["positions"] = Table("transformer.wpe", arch.max_positions, hidden)
        for i in range(arch.layers):
            path = f"transformer.h.{i}"
            norm(f"{i}.input", f"{path}.ln_1")
            linear(f"{i}.qkv", i, f"{path}.attn.c_attn", hidden, 3 * hidden)
            linear(f"{i}.out", i, f"{path}.attn.c_proj", hidden, hidden)
            norm(f"{i}.mlp", f"{path}.ln_2")
            linear(f"{i}.up", i, f"{path}.mlp.c_fc", hidden, arch.ffn)
            linear(f"{i}.down", i, f"{path}.mlp.c_proj", arch.ffn, hidden)
        norm("final", "transformer.ln_f")
        cls._head_of(plan, arch, "transformer.wte")
        return plan

    def embed(self, token_ids: Tensor, step: Step) -> Tensor:
        positions = torch.from_numpy(step.positions).long()
        return super().embed(token_ids, step).add_(self._kernels.embed(self._positions.table, positions))
