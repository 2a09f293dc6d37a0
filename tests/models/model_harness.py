"""Run a decoder by hand: an arena of our own, pages in shuffled order, any split into steps."""

from __future__ import annotations

import numpy as np
import torch

from chiliad.kernels.base import Kernels, KVLayout, Segment, Step
from chiliad.models import Decoder

BLOCK = 16  # tokens per page


class Harness:
    """Feeds token sequences to a decoder in chunks and collects the logits of every position."""

    def __init__(self, decoder: Decoder, kernels: Kernels, pages: int = 256) -> None:
        arch = decoder.arch
        page_bytes = 2 * arch.kv_heads * arch.head_dim * BLOCK * 4
        page_bytes = -(-page_bytes // 64) * 64
        layout = KVLayout(arch.layers, arch.kv_heads, arch.head_dim, BLOCK, torch.float32, page_bytes)
        # garbage in the arena: a page must not depend on what was there before
        self.arena = torch.full((pages * page_bytes,), 0x7F, dtype=torch.uint8)
        kernels.bind_arena(self.arena, layout)
        self.decoder, self.kernels, self.layers = decoder, kernels, arch.layers
        self.free = list(np.random.default_rng(0).permutation(pages))
        self.tables: dict[int, list[np.ndarray]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, work: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Run [(sequence, tokens), ...] as one step; logits [len(tokens), vocab] of each."""
        tokens, positions, row_start, context, tables = [], [], [0], [], []
        for sequence, new in work:
            done = self.lengths.get(sequence, 0)
            length = done + len(new)
            blocks = self.tables.setdefault(sequence, [])
            while len(blocks) * BLOCK < length:
                blocks.append(np.array([self.free.pop() for _ in range(self.layers)], np.int32))
            self.lengths[sequence] = length
            tokens += new
            positions += range(done, length)
            row_start.append(len(tokens))
            context.append(length)
            tables.append(np.stack(blocks))
        step = Step(
            num_tokens=len(tokens),
            positions=np.array(positions, np.int32),
            row_start=np.array(row_start, np.int32),
            context=np.array(context, np.int32),
            page_tables=tables,
            segments=[Segment(0, len(tokens), None)],
        )
        step = self.kernels.prepare_step(step)
        with torch.inference_mode():
            logits = self.decoder.logits(self.decoder.forward(torch.tensor(tokens), step))
        return list(logits.split([len(new) for _, new in work]))
