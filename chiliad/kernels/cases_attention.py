"""The rest of the case table: attention, rope_kv, embed and sample. See `cases.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from chiliad.kernels.base import Kernels, KVLayout, SampleBatch, Segment, Step, Tensor
from chiliad.kernels.cases import Case, Guarded, Run, make_norm, seed_of

Lengths = Sequence[tuple[int, int]]  # per sequence: context, rows of it that are in the step


@dataclass(slots=True)
class PagedKV:
    """KV pages of several sequences, scattered over an arena whose other bytes are NaN."""

    layout: KVLayout
    contexts: Sequence[int]
    arena: Tensor = field(init=False)
    tables: list[np.ndarray] = field(init=False)  # per sequence: int32 [num_blocks, num_layers]

    def __post_init__(self) -> None:
        kv = self.layout
        blocks = [-(-context // kv.block_tokens) for context in self.contexts]
        num_pages = sum(blocks) * kv.num_layers + 2
        whole = torch.full((num_pages * kv.page_bytes + 64,), 0xFF, dtype=torch.uint8)
        self.arena = whole[-whole.data_ptr() % 64 :][: num_pages * kv.page_bytes]
        pages = np.random.default_rng(num_pages).permutation(num_pages)[: num_pages - 2].astype(np.int32)
        ends = np.cumsum([count * kv.num_layers for count in blocks])[:-1]
        self.tables = [part.reshape(-1, kv.num_layers) for part in np.split(pages, ends)]

    def views(self, page: int) -> tuple[Tensor, Tensor]:
        """K [heads, head_dim / p, block, p] and V [heads, block / p, head_dim, p] of one page."""
        kv = self.layout
        numel = kv.num_kv_heads * kv.head_dim * kv.block_tokens
        start = page * kv.page_bytes
        flat = self.arena[start : start + 2 * numel * kv.dtype.itemsize].view(kv.dtype)
        k = flat[:numel].view(kv.num_kv_heads, kv.head_dim // kv.pair, kv.block_tokens, kv.pair)
        v = flat[numel:].view(kv.num_kv_heads, kv.block_tokens // kv.pair, kv.head_dim, kv.pair)
        return k, v

    def fill(self, sequence: int, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k and v, [context, heads, head_dim]; the rest of the last block is zero."""
        kv = self.layout
        block = kv.block_tokens
        missing = -len(k) % block
        k, v = (torch.cat([x, x.new_zeros(missing, *x.shape[1:])]).to(kv.dtype) for x in (k, v))
        for i, page in enumerate(self.tables[sequence][:, layer]):
            to_k, to_v = self.views(int(page))
            tokens = slice(i * block, (i + 1) * block)
            to_k.copy_(k[tokens].view(block, kv.num_kv_heads, -1, kv.pair).permute(1, 2, 0, 3))
            to_v.copy_(v[tokens].view(-1, kv.pair, kv.num_kv_heads, kv.head_dim).permute(2, 0, 3, 1))

    def fill_randomly(self, g: torch.Generator) -> None:
        kv = self.layout
        for sequence, context in enumerate(self.contexts):
            for layer in range(kv.num_layers):
                k, v = torch.randn(2, context, kv.num_kv_heads, kv.head_dim, generator=g)
                self.fill(sequence, layer, k, v)

    def step(self, lengths: Lengths) -> Step:
        """A step of the last `rows` tokens of each sequence's first `context` ones."""
        starts = np.cumsum([0, *(rows for _, rows in lengths)]).astype(np.int32)
        positions = [np.arange(context - rows, context) for context, rows in lengths]
        total = int(starts[-1])
        return Step(
            num_tokens=total,
            positions=np.concatenate([np.empty(0, int), *positions]).astype(np.int32),
            row_start=starts,
            context=np.array([context for context, _ in lengths], np.int32),
            page_tables=self.tables[: len(lengths)],
            segments=[Segment(0, total, None)],
        )


def kv_layout(
    num_layers: int, num_kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype, spare: int = 64
) -> KVLayout:
    """A layout whose pages end in `spare` bytes that hold no KV."""
    nbytes = 2 * num_kv_heads * head_dim * block_tokens * dtype.itemsize
    return KVLayout(num_layers, num_kv_heads, head_dim, block_tokens, dtype, nbytes + spare)


def attention_case(
    name: str,
    lengths: Lengths,
    heads: tuple[int, int],
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    window: int = 0,
    num_layers: int = 2,
) -> Case:
    """Rows of prefill and decode over pages; each call takes the next layer."""
    num_heads, num_kv_heads = heads
    layout = kv_layout(num_layers, num_kv_heads, head_dim, block_tokens, dtype)
    seen = sum(
        min(position + 1, window or position + 1)
        for context, rows in lengths
        for position in range(context - rows, context)
    )
    rows = sum(count for _, count in lengths)
    kv_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
    read = sum(min(context, window + count if window else context) for context, count in lengths)

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        kv = PagedKV(layout, [context for context, _ in lengths])
        kv.fill_randomly(g)
        kernels.bind_arena(kv.arena, layout)
        step = kernels.prepare_step(kv.step(lengths))
        qkv = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=g)
        layers = itertools.cycle(range(num_layers))

        def call() -> tuple[Tensor, ...]:
            if num_layers > 2:  # a benchmark
                return (kernels.attention(qkv, step, next(layers), num_heads, head_dim**-0.5, window),)
            return tuple(
                kernels.attention(qkv, step, layer, num_heads, head_dim**-0.5, window)
                for layer in range(num_layers)
            )

        return Run(call)

    short = str(dtype).removeprefix("torch.")
    sliding = f"-window{window}" if window else ""
    return Case(
        op="attention",
        name=f"{name}-{short}-{num_heads}/{num_kv_heads}x{head_dim}-block{block_tokens}{sliding}",
        # bfloat16: with AMX tiles q and the softmax weights are rounded to bfloat16 as well
        tolerance=2e-5 if dtype == torch.float32 else 3e-2,
        flops=4.0 * num_heads * head_dim * seen,
        nbytes=float(kv_bytes * read + 4 * rows * (2 * num_heads) * head_dim),
        prepare=prepare,
        gemm=rows > 2 * len(lengths),
    )


def rope_case(
    name: str,
    lengths: Lengths,
    heads: tuple[int, int],
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    rotary: int | None = None,
    norm: str | None = None,
) -> Case:
    """Head norms, rotation (rotary None: head_dim, 0: none) and the write of k and v."""
    num_heads, num_kv_heads = heads
    rotary = head_dim if rotary is None else rotary
    layout = kv_layout(2, num_kv_heads, head_dim, block_tokens, dtype)
    rows = sum(count for _, count in lengths)
    width = (num_heads + 2 * num_kv_heads) * head_dim

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        kv = PagedKV(layout, [context for context, _ in lengths])
        for i, (context, count) in enumerate(lengths):  # what earlier steps wrote
            if context > count:
                k, v = torch.randn(2, context, num_kv_heads, head_dim, generator=g)
                k[context - count :], v[context - count :] = 0, 0
                kv.fill(i, 1, k, v)
        kernels.bind_arena(kv.arena, layout)
        step = kernels.prepare_step(kv.step(lengths))
        qkv = torch.randn(rows, width, generator=g)
        longest = max(context for context, _ in lengths)
        angles = torch.rand(longest, max(rotary // 2, 1), generator=g) * 6
        rope = (angles.cos(), angles.sin()) if rotary else None
        q_norm, k_norm = make_norm(norm, head_dim, g), make_norm(norm, head_dim, g)
        guarded = Guarded((rows, width))
        pages = np.concatenate([table[:, 1] for table in kv.tables])

        def call() -> tuple[Tensor, ...]:
            guarded.tensor.copy_(qkv)
            kernels.rope_kv(guarded.tensor, step, 1, num_heads, rope, q_norm, k_norm)
            written = [torch.cat([x.flatten(1) for x in kv.views(int(page))], dim=1) for page in pages]
            return guarded.tensor, torch.stack(written).float()

        return Run(call, guarded.guards)

    short = str(dtype).removeprefix("torch.")
    return Case(
        op="rope_kv",
        name=f"{name}-{short}-{num_heads}/{num_kv_heads}x{head_dim}-rotary{rotary}-{norm}",
        # bfloat16: a last bit of difference before rounding may round to the neighbour
        tolerance=4e-6 if dtype == torch.float32 else 3e-2,
        flops=6.0 * rows * (num_heads + num_kv_heads) * rotary,
        nbytes=float(rows * (8 * width + 2 * num_kv_heads * head_dim * dtype.itemsize)),
        prepare=prepare,
    )


def embed_case(rows: int, vocab: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> Case:
    short = str(dtype).removeprefix("torch.")
    name = f"{rows}x{vocab}x{hidden}-{short}-scale{scale}"

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        table = kernels.pack_embedding(torch.randn(vocab, hidden, generator=g), dtype)
        ids = torch.randint(0, vocab, (rows,), generator=g)
        return Run(lambda: (kernels.embed(table, ids, scale),))

    nbytes = float(rows * hidden * (dtype.itemsize + 4))
    return Case("embed", name, 1e-7, float(rows * hidden), nbytes, prepare)


_NEUTRAL: tuple[tuple[str, type[np.generic], float], ...] = (
    ("temperature", np.float32, 1.0),
    ("top_p", np.float32, 1.0),
    ("top_k", np.int32, 0),
    ("min_p", np.float32, 0.0),
    ("presence", np.float32, 0.0),
    ("frequency", np.float32, 0.0),
    ("repetition", np.float32, 1.0),
    ("uniform", np.float64, 0.5),
    ("logprobs", np.int32, -1),
)


def sample_batch(rows: int, g: torch.Generator | None = None, **fields: Any) -> SampleBatch:
    """Neutral rows, with draws of their own if `g` is given; `fields` (numbers or one per row) differ."""
    if g is not None:
        fields.setdefault("uniform", torch.rand(rows, generator=g, dtype=torch.float64).numpy())
    arrays = {
        name: np.broadcast_to(np.asarray(fields.pop(name, value), dtype), rows).copy()
        for name, dtype, value in _NEUTRAL
    }
    ragged = {
        name: fields.pop(name, [None] * rows) for name in ("prompt_tokens", "output_tokens", "bias", "banned")
    }
    assert not fields, f"unknown fields {fields}"
    return SampleBatch(**arrays, **ragged)  # type: ignore[arg-type]


def sample_case(name: str, rows: int, vocab: int, spread: float = 4.0, **fields: Any) -> Case:
    """Logits with a standard deviation of `spread`: 4 and above resemble a language model's."""

    def prepare(kernels: Kernels) -> Run:
        g = seed_of(name)
        logits = spread * torch.randn(rows, vocab, generator=g)
        batch = sample_batch(rows, g, **fields)

        def call() -> tuple[Tensor, ...]:
            sampled = kernels.sample(logits, batch)
            # logits must come back as they were
            results = [_bits(sampled.tokens), torch.from_numpy(sampled.logprob), logits]
            if batch.logprobs.max() > 0:
                results += [
                    _bits(np.stack(sampled.top_ids)),
                    torch.from_numpy(np.stack(sampled.top_logprobs)),
                ]
            return tuple(results)

        return Run(call)

    # the tolerance is for logprobs: the reference sums a large vocabulary in float32
    return Case("sample", f"{name}-{rows}x{vocab}", 3e-5, 0.0, 4.0 * rows * vocab, prepare)


def _bits(ids: np.ndarray) -> Tensor:
    """Token ids bit by bit, so that under any tolerance only equal ids are equal."""
    return torch.from_numpy((ids[..., None] >> np.arange(20)) & 1).float()


def _attention_tests() -> Iterator[Case]:
    mixed = ((1, 1), (40, 40), (100, 1), (77, 30), (16, 1), (129, 2))
    for dtype in (torch.float32, torch.bfloat16):
        for group in (1, 3, 4, 8):
            yield attention_case(f"group{group}", mixed, (2 * group, 2), 64, 16, dtype)
        for head_dim in (8, 20, 80, 96, 128, 256):
            yield attention_case("head_dim", mixed, (4, 2), head_dim, 32, dtype)
        for block in (16, 32, 48, 64, 128, 160, 272):
            edges = ((block, 1), (block + 1, 1), (block - 1, 3), (2 * block, block), (300, 200))
            yield attention_case("edges", edges, (3, 1), 32, block, dtype)
        for window in (1, 5, 16, 100, 600):
            far = ((1, 1), (30, 30), (700, 1), (650, 64), (600, 600))
            yield attention_case("window", far, (4, 2), 64, 32, dtype, window)
        yield attention_case("long", ((4096, 1), (4096, 3), (2049, 1)), (6, 2), 64, 16, dtype)
        yield attention_case("alone", ((3000, 1),), (8, 8), 64, 32, dtype)
        yield attention_case("prefill", ((1024, 1024),), (3, 1), 64, 64, dtype)
        yield attention_case("many_heads", ((200, 1), (90, 1)), (40, 40), 128, 16, dtype)


def _rope_tests() -> Iterator[Case]:
    mixed = ((1, 1), (32, 32), (33, 1), (50, 20), (16, 16), (96, 96), (47, 1))
    for dtype in (torch.float32, torch.bfloat16):
        for norm in (None, "rms", "layer"):
            yield rope_case("mixed", mixed, (6, 2), 64, 32, dtype, norm=norm)
        for head_dim, rotary in ((8, 8), (20, 20), (80, 32), (96, 50), (128, 0), (256, 256)):
            yield rope_case("rotary", mixed, (4, 4), head_dim, 16, dtype, rotary, "rms")


def _sample_tests() -> Iterator[Case]:
    g = seed_of("sample tests")

    def ids(rows: int, vocab: int, count: int) -> list[np.ndarray | None]:
        made = torch.randint(0, vocab, (rows, count), generator=g, dtype=torch.int32)
        return [None if i % 5 == 4 else made[i].numpy() for i in range(rows)]

    for rows, vocab in ((9, 7), (20, 128), (20, 1000), (6, 49152), (2, 262144)):
        k = min(vocab, 5)
        yield sample_case("greedy", rows, vocab, temperature=0.0)
        yield sample_case("greedy-logprobs", rows, vocab, temperature=0.0, logprobs=k)
        yield sample_case("plain", rows, vocab, logprobs=0)
        yield sample_case("flat", rows, vocab, spread=0.01)
        yield sample_case("top_p", rows, vocab, temperature=0.7, top_p=0.9)
        yield sample_case("flat-top_p", rows, vocab, spread=0.5, top_p=0.95)
        yield sample_case("top_k", rows, vocab, top_k=5)
        yield sample_case("top_k-most", rows, vocab, top_k=vocab - 1, top_p=0.99)
        yield sample_case("top_k-all", rows, vocab, top_k=vocab)
        yield sample_case("min_p", rows, vocab, min_p=0.05)
        yield sample_case("all", rows, vocab, temperature=1.3, top_k=40, top_p=0.8, min_p=0.02, logprobs=k)
        yield sample_case("min_p-top_p", rows, vocab, temperature=2.0, top_p=0.9, min_p=0.01)
        yield sample_case(
            "penalties", rows, vocab, temperature=0.0, repetition=1.3, presence=0.5, frequency=0.25,
            prompt_tokens=ids(rows, vocab, 20), output_tokens=ids(rows, vocab, 30), logprobs=k,
        )  # fmt: skip
        yield sample_case(
            "bias", rows, vocab, temperature=0.8, top_p=0.95, presence=1.0, output_tokens=ids(rows, vocab, 4),
            bias=[(np.array([0, 3], np.int32), np.array([9.0, -100.0], np.float32))] * rows,
            banned=[np.array([1, 2], np.int32)] * rows,
        )  # fmt: skip


def attention_test_cases() -> list[Case]:
    embeds = [
        embed_case(rows, 50, hidden, dtype, scale)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, hidden, scale in ((1, 7, 1.0), (33, 576, 24.0))
    ]
    return [*_attention_tests(), *_rope_tests(), *embeds, *_sample_tests()]


def attention_bench_cases() -> list[Case]:
    """SmolLM2-135M: decode over enough layers that no cache holds them, prefill, and sampling."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        smol = ((9, 3), 64, 16, dtype)
        for count, context, layers in ((8, 4096, 24), (32, 128, 30), (1, 4096, 30)):
            name = f"decode-{count}x{context}"
            cases.append(attention_case(name, ((context, 1),) * count, *smol, num_layers=layers))
        cases.append(attention_case("prefill-8x1024", ((1024, 1024),) * 8, *smol, num_layers=3))
        cases.append(rope_case("decode-32", ((128, 1),) * 32, *smol))
        cases.append(rope_case("prefill-512", ((512, 512),), *smol))
        cases.append(embed_case(32, 49152, 576, dtype))
    for name, fields in (
        ("greedy", {"temperature": 0.0}),
        ("plain", {}),
        ("top_p", {"top_p": 0.95}),
        ("top_k", {"top_k": 50, "top_p": 0.95}),
        ("greedy-logprobs", {"temperature": 0.0, "logprobs": 5}),
    ):
        cases.append(sample_case(name, 32, 49152, **fields))
    return cases
