"""The op table's contract: what every kernel implementation must offer, and nothing else.

Conventions. Activations are float32 tensors [T, features], one row per token of the step;
rows of one sequence are adjacent, and sequences that use the same adapter are adjacent, so
that a `Segment` is a plain range of rows. Weights are whatever `pack_linear` made of them.
An implementation may refuse to start (`KernelError` with the reason); it never differs from
`reference.py` by more than the tolerance that stands beside each case in `cases.py`.

Row independence. A row's result must not depend on which rows share its step: every output
element is reduced in an order that depends only on its own shape and positions. In float32
this holds bit for bit, for any split of a prompt into chunks.

KV layout. One page holds `block_tokens` tokens of one layer: K then V. With p = 2 for
bfloat16 and 1 for float32,
    K  [num_kv_heads, head_dim / p, block_tokens, p]      V  [num_kv_heads, block_tokens / p, head_dim, p]
so that dot products over head_dim (K) and over tokens (V) read whole vectors of neighbours
(the "VNNI" pairing of AVX512-BF16 and AMX). The first write into a page zeroes it, so that
reads of a whole block never meet another tenant's bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of the KV cache inside the arena."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int  # tokens per page, a multiple of 16
    dtype: torch.dtype  # float32 or bfloat16
    page_bytes: int  # >= 2 * num_kv_heads * head_dim * block_tokens * itemsize

    @property
    def pair(self) -> int:
        return 4 // self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Where one adapter's rank rows for one slot lie in the arena.

    Row j adds `scale[j] * (A_j . x) * B_j` to y. A_j has in_features elements, B_j has
    out_features elements (a column of PEFT's lora_B), each contiguous in the arena. Whole
    numbers of int8 rows stand for themselves: `scale[j]` is the product of both rows' scales.
    """

    a: np.ndarray  # int64 [r], byte offsets into the arena
    b: np.ndarray  # int64 [r], byte offsets into the arena
    scale: np.ndarray  # float32 [r]


@dataclass(frozen=True, slots=True)
class ElementwiseRows:
    """y = g * (W (d * x) + bias) + c. Byte offsets of the vectors, or None for the identity."""

    d: int | None = None  # [in_features]
    g: int | None = None  # [out_features]
    c: int | None = None  # [out_features]


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter (or a composition of several) as the kernels see it: slot -> rows.

    `dtype` is the storage type of every rank row: float32, bfloat16 or int8. Elementwise
    vectors, which are few, are bfloat16 beside int8 rows, else of the same type.
    """

    low_rank: dict[int, LowRankRows]
    elementwise: dict[int, ElementwiseRows]
    dtype: torch.dtype
    native: object = None  # handle of the implementation that prepared it

    @property
    def vector_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of the step use `adapter` (None: the plain base)."""

    start: int
    stop: int
    adapter: AdapterRows | None


@dataclass(slots=True)
class Step:
    """Everything about one step that every layer shares. Built once per step by the runner.

    Sequence i owns rows [row_start[i], row_start[i + 1]); they are its tokens at positions
    context[i] - count .. context[i] - 1, where count is its number of rows.
    """

    num_tokens: int
    positions: np.ndarray  # int32 [T]
    row_start: np.ndarray  # int32 [S + 1]
    context: np.ndarray  # int32 [S], tokens in the KV cache including this step's
    page_tables: list[np.ndarray]  # per sequence: int32 [num_blocks, num_layers], page ids
    segments: list[Segment]  # cover [0, T) in order
    native: object = field(default=None)  # handle of the implementation that prepared it


@dataclass(frozen=True, slots=True, eq=False)  # one is itself: kernels remember what they checked
class NormSpec:
    """RMSNorm or LayerNorm with its weights: float32 [features]."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    eps: float
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a packed linear is, whatever its bytes look like.

    One packed linear may hold several projections that share their input (q, k, v; gate, up):
    `slots[i]` is the adapter slot of columns [sum(sizes[:i]), sum(sizes[:i + 1])), or -1 where
    no adapter can apply (lm_head).
    """

    in_features: int
    sizes: tuple[int, ...]
    slots: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", "int8", "int4"

    @property
    def out_features(self) -> int:
        return sum(self.sizes)


GROUP = 32  # inputs that share a scale
_CHUNK = 4096  # groups at a time, so that they stay in cache


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in few bits: scale * level + minimum, with a scale for every 32 inputs.

    This is what Q4_0, Q4_1 and Q8_0 blocks of GGUF files hold, and what `quantize` makes of others.
    """

    levels: Tensor  # [out, in]: int8 -127..127 (int8), uint8 0..15 (int4)
    scale: Tensor  # float16 [out, ceil(in / 32)]
    minimum: Tensor | None = None  # the same; int4 only

    @property
    def dtype(self) -> str:
        return "int8" if self.minimum is None else "int4"

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def dequantize(self) -> Tensor:
        """float32 [out, in]: the product is exact, the sum rounded."""
        out, width = self.shape
        levels = F.pad(self.levels, (0, -width % GROUP)) if width % GROUP else self.levels
        grouped = levels.reshape(-1, GROUP).numpy()
        scale = self.scale.float().view(-1, 1).numpy()
        minimum = None if self.minimum is None else self.minimum.float().view(-1, 1).numpy()
        y = np.empty(grouped.shape, np.float32)
        with np.errstate(all="ignore"):  # a file's scales may be infinite or NaN
            for start in range(0, len(y), _CHUNK):
                part = slice(start, start + _CHUNK)
                np.multiply(grouped[part], scale[part], out=y[part])
                if minimum is not None:
                    y[part] += minimum[part]
        return torch.from_numpy(y).view(out, -1)[:, :width]

    def sample(self, step: int) -> Tensor:
        """Every step-th element of `dequantize().flatten()`."""
        width = self.shape[1]
        index = torch.arange(0, self.levels.numel(), step)
        group = index // width * self.scale.shape[1] + index % width // GROUP
        y = self.levels.flatten()[index] * self.scale.float().flatten()[group]
        return y if self.minimum is None else y + self.minimum.float().flatten()[group]

    @staticmethod
    def cat(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Stacked along out; all of one dtype."""
        minima = [w.minimum for w in weights if w.minimum is not None]
        return QuantizedWeight(
            torch.cat([w.levels for w in weights]),
            torch.cat([w.scale for w in weights]),
            torch.cat(minima) if minima else None,
        )


class PackedLinear(Protocol):
    @property
    def spec(self) -> LinearSpec:
        """What was packed."""

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""


Activation = Literal["silu_mul", "gelu_tanh_mul", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpec:
    """One layer of a decoder. Optional parts are None where a family has none."""

    input_norm: NormSpec
    qkv: PackedLinear
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    rope: tuple[Tensor, Tensor] | None  # cos and sin, as `rope_kv` takes them
    num_heads: int
    scale: float  # of attention scores
    window: int  # of attention; 0: none
    out: PackedLinear
    post_attention_norm: NormSpec | None
    mlp_norm: NormSpec
    up: PackedLinear  # gate and up, where gated
    activation: Activation
    down: PackedLinear
    post_mlp_norm: NormSpec | None


@dataclass(slots=True)
class SampleBatch:
    """Sampling inputs of the R rows that need a token; see `core.SamplingParams`."""

    temperature: np.ndarray  # float32 [R], 0 = greedy
    top_p: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int32 [R], 0 = off
    min_p: np.ndarray  # float32 [R]
    presence: np.ndarray  # float32 [R]
    frequency: np.ndarray  # float32 [R]
    repetition: np.ndarray  # float32 [R]
    uniform: np.ndarray  # float64 [R], one draw in [0, 1) per row
    # ragged, per row: None when the row needs none of it
    prompt_tokens: Sequence[np.ndarray | None]  # int32 ids seen in the prompt (repetition)
    output_tokens: Sequence[np.ndarray | None]  # int32 ids generated so far (all penalties)
    bias: Sequence[tuple[np.ndarray, np.ndarray] | None]  # (int32 ids, float32 added)
    banned: Sequence[np.ndarray | None]  # int32 ids set to -inf (min_tokens)
    logprobs: np.ndarray  # int32 [R], -1 = none, k = chosen token plus the k best


@dataclass(slots=True)
class Sampled:
    tokens: np.ndarray  # int32 [R]; -1 where the largest adjusted logit is no finite number
    logprob: np.ndarray  # float32 [R], of the chosen token under the raw model distribution
    top_ids: list[np.ndarray]  # per row int32 [k], most likely first
    top_logprobs: list[np.ndarray]  # per row float32 [k]


class Kernels(Protocol):
    """One implementation of every op. `name` and `reason` are what `chiliad info` prints."""

    name: str
    reason: str

    def pack_linear(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, spec: LinearSpec
    ) -> PackedLinear:
        """weight: [out, in] float32 or bfloat16 (projections stacked along out); bias: float32 [out].

        A quantised weight of the spec's dtype is packed as it is, exactly; a plain one is rounded
        first (`quantize`) if the spec's dtype is int8 or int4.
        """

    def pack_embedding(self, weight: Tensor, dtype: torch.dtype) -> object:
        """weight: [vocab, hidden]. The result is passed back to `embed`."""

    def bind_arena(self, arena: Tensor, layout: KVLayout) -> None:
        """Give the implementation the arena (uint8 [num_bytes], 64-byte aligned) and its geometry."""

    def touch_arena(self, begin: int, end: int) -> None:
        """Have the system give the arena's bytes [begin, end) their memory now, on idle processors.

        Blocks until then. What the bytes hold stays, and others may use them meanwhile. An
        implementation that cannot do it does nothing.
        """

    def write_rows(
        self, matrices: Sequence[tuple[Tensor, float]], offsets: np.ndarray, dtype: torch.dtype
    ) -> np.ndarray:
        """Put an adapter's rank rows where they belong; on any thread, beside the engine's.

        matrices: each [rows, features], finite float32, float16 or bfloat16 of any strides, with a
        factor; offsets: int64, a byte offset into the arena for each row of each matrix in turn.
        Returns float32, for each row what its stored numbers are to be multiplied by: 1, or with
        int8 a 127th of the row's largest magnitude.
        """

    def prepare_adapter(self, rows: AdapterRows) -> AdapterRows:
        """Return rows with `native` filled in (called once when an adapter becomes resident)."""

    def prepare_step(self, step: Step) -> Step:
        """Check a step's shapes and fill in `native` (called once per step)."""

    def embed(self, table: object, token_ids: Tensor, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T] -> float32 [T, hidden]."""

    def norm(self, x: Tensor, spec: NormSpec, residual: Tensor | None = None) -> Tensor:
        """norm(x), or residual + norm(x). float32 [T, features]."""

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
        """y = residual + act(Linear(norm(x)) with adapters). x float32 [T, in].

        With "silu_mul" / "gelu_tanh_mul" the linear is (gate, up) and the result is
        act(gate) * up, [T, out / 2]. Adapters apply to each projection before the activation.
        `step` None means no adapters (lm_head). `residual` is updated in place and returned.
        """

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
        """Normalise heads (Qwen3, Gemma 3), rotate q and k in place, write k and v to the pool.

        qkv: float32 [T, (num_heads + 2 * num_kv_heads) * head_dim]. rope: cos and sin, float32
        [max_position, rotary_dim / 2], halves convention (x1, x2 = first, second half).
        """

    def attention(
        self, qkv: Tensor, step: Step, layer: int, num_heads: int, scale: float, window: int = 0
    ) -> Tensor:
        """Causal attention of the step's rows over their paged context.

        Reads q from qkv. window > 0: position p sees positions > p - window. Returns float32
        [T, num_heads * head_dim].
        """

    def pack_layers(self, layers: Sequence[LayerSpec]) -> object:
        """Check a decoder's layers once. The result is passed back to `layers`."""

    def layers(self, x: Tensor, step: Step, layers: object) -> Tensor:
        """One step through all of a decoder's layers; writes K and V of its tokens.

        x: float32 [T, hidden], what enters layer 0; it is updated in place and returned. The same as
        `project`, `rope_kv`, `attention` and `norm` in the order of `reference.py`, in one call.
        """

    def sample(self, logits: Tensor, batch: SampleBatch) -> Sampled:
        """One token per row of logits, float32 [R, vocab]; see reference.py for the exact rule."""
