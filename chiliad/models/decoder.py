"""One decoder for every family: what differs between them is data (`Arch`)."""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from chiliad.core import Site
from chiliad.kernels.base import Kernels, LayerSpec, Step
from chiliad.models.arch import Arch
from chiliad.models.layers import Blueprint, Linear, Norm, Parts, Table, rope_table

Tensor = torch.Tensor


class Decoder:
    """A causal language model over the op table of `kernels`.

    The KV cache is not here: bind an arena to `kernels` whose layout has this model's layers,
    key-value heads and head size before the first `forward`.
    """

    prefix: ClassVar[str] = "model."

    def __init__(self, arch: Arch, kernels: Kernels, parts: Parts, max_positions: int) -> None:
        self.arch = arch
        self.max_positions = max_positions
        self.sites: tuple[Site, ...] = tuple(self.blueprint(arch).sites)
        self._kernels = kernels
        self._parts = parts
        self._embed = parts.tables["embed"]
        self._final_norm = parts.norms["final"]
        self._head = parts.linears["head"]
        kinds = {rope for rope in arch.ropes if rope is not None}
        tables = {rope: rope_table(rope, arch.head_dim, max_positions) for rope in kinds}
        self._layers = kernels.pack_layers(
            [
                LayerSpec(
                    input_norm=parts.norms[f"{i}.input"],
                    qkv=parts.linears[f"{i}.qkv"],
                    q_norm=parts.norms.get(f"{i}.q"),
                    k_norm=parts.norms.get(f"{i}.k"),
                    rope=None if (rope := arch.ropes[i]) is None else tables[rope],
                    num_heads=arch.heads,
                    scale=arch.attention_scale,
                    window=arch.windows[i],
                    out=parts.linears[f"{i}.out"],
                    post_attention_norm=parts.norms.get(f"{i}.post_attention"),
                    mlp_norm=parts.norms[f"{i}.mlp"],
                    up=parts.linears[f"{i}.up"],
                    activation=arch.activation,
                    down=parts.linears[f"{i}.down"],
                    post_mlp_norm=parts.norms.get(f"{i}.post_mlp"),
                )
                for i in range(arch.layers)
            ]
        )
        self.nbytes = parts.nbytes + sum(t.nbytes for pair in tables.values() for t in pair)

    @classmethod
    def blueprint(cls, arch: Arch) -> Blueprint:
        """The tensors and sites of a model of this architecture."""
        rotary = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
        plan = Blueprint(cls.prefix, (rotary,))
        h, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

        def norm(role: str, module: str, size: int = arch.hidden) -> None:
            plan.norms[role] = Norm(module, size, arch.norm, arch.norm_eps, arch.norm_offset)

        plan.tables["embed"] = Table("model.embed_tokens", arch.vocab, arch.hidden, arch.embed_scale)
        for i in range(arch.layers):
            path = f"model.layers.{i}"
            attention, mlp = f"{path}.self_attn", f"{path}.mlp"
            norm(f"{i}.input", f"{path}.input_layernorm")
            qkv = tuple(f"{attention}.{part}_proj" for part in "qkv")
            plan.linear(f"{i}.qkv", i, qkv, (h, kv, kv), arch.hidden, arch.qkv_bias)
            if arch.head_norms:
                norm(f"{i}.q", f"{attention}.q_norm", arch.head_dim)
                norm(f"{i}.k", f"{attention}.k_norm", arch.head_dim)
            plan.linear(f"{i}.out", i, (f"{attention}.o_proj",), (arch.hidden,), h, arch.out_bias)
            if arch.post_norms:
                norm(f"{i}.post_attention", f"{path}.post_attention_layernorm")
                norm(f"{i}.mlp", f"{path}.pre_feedforward_layernorm")
                norm(f"{i}.post_mlp", f"{path}.post_feedforward_layernorm")
            else:
                norm(f"{i}.mlp", f"{path}.post_attention_layernorm")
            gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
            plan.linear(f"{i}.up", i, gate_up, (arch.ffn, arch.ffn), arch.hidden, arch.mlp_bias)
            plan.linear(f"{i}.down", i, (f"{mlp}.down_proj",), (arch.hidden,), arch.ffn, arch.mlp_bias)
        norm("final", "model.norm")
        cls._head_of(plan, arch, "model.embed_tokens")
        return plan

    @staticmethod
    def _head_of(plan: Blueprint, arch: Arch, embedding: str) -> None:
        """lm_head: a projection of its own, or the embedding's weight a second time."""
        module = embedding if arch.tied else "lm_head"
        plan.linears["head"] = Linear((module,), (arch.vocab,), (-1,), arch.hidden, head=True)
        if arch.tied:
            plan.tied = ("lm_head.weight", f"{embedding}.weight")

    def embed(self, token_ids: Tensor, step: Step) -> Tensor:
        """token_ids int64 [T] -> float32 [T, hidden]: what enters the first layer."""
        return self._kernels.embed(self._embed.table, token_ids, self._embed.scale)

    def forward(self, token_ids: Tensor, step: Step) -> Tensor:
        """One step: writes K and V of its tokens, returns their last hidden states.

        token_ids: int64 [T]; `step` as `kernels.prepare_step` returned it. Returns float32
        [T, hidden], of which `logits` takes the rows that are wanted.
        """
        return self._kernels.layers(self.embed(token_ids, step), step, self._layers)

    def logits(self, states: Tensor) -> Tensor:
        """Rows of what `forward` returned, float32 [R, hidden] -> float32 [R, vocab]."""
        return self._kernels.project(states, self._head, None, norm=self._final_norm)
