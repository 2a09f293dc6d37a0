"""One step: StepPlan -> arrays -> model -> logits -> tokens. The only file here that computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiliad.config import SchedulerConfig
from chiliad.core import AdapterUse, StepOutput, StepPlan, TokenLogprob, Work
from chiliad.engine.sampling import SequenceSampler, logprobs_of, sample_batch
from chiliad.kernels.base import AdapterRows, Kernels, Segment, Step

if TYPE_CHECKING:
    from chiliad.models.arch import Arch
    from chiliad.models.weights import Model

_SCORED = 8 * 2**20  # bytes of prompt logits at a time

#: (uses) -> the rank rows of a resident adapter, or of several composed
RowsOf = Callable[[tuple[AdapterUse, ...]], AdapterRows]


def workspace(arch: Arch, config: SchedulerConfig) -> int:
    """Bytes that the largest step takes beside weights and pool, all of them float32."""
    heads = 2 * (arch.heads + arch.kv_heads) * arch.head_dim  # q, k, v, and what attention makes of them
    token = 4 * arch.hidden + heads + 3 * arch.ffn  # the MLP's, as the reference computes it
    rows = min(config.max_sequences, config.max_step_tokens)
    return 4 * (config.max_step_tokens * token + rows * arch.vocab) + 3 * max(_SCORED, 4 * arch.vocab)


class Runner:
    """Runs plans on one model. Holds no request state."""

    def __init__(self, model: Model, kernels: Kernels, rows_of: RowsOf) -> None:
        self._decoder, self._kernels, self._rows_of = model.decoder, kernels, rows_of

    def run(self, plan: StepPlan, samplers: Mapping[int, SequenceSampler]) -> StepOutput:
        """Compute the plan's tokens and sample. `samplers` maps id(sequence) to its sampler."""
        ids, step = self._step(plan)
        with torch.inference_mode():
            states = self._decoder.forward(ids, step)
            scored: dict[int, list[TokenLogprob]] = {}  # by work index
            rows: list[int] = []  # of the step, those that are sampled
            for i, work in enumerate(plan.work):
                first, sequence = int(step.row_start[i]), work.sequence
                wanted = sequence.request.params.prompt_logprobs
                count = min(work.count, sequence.num_prompt - 1 - work.start)
                if wanted is not None and count > 0:
                    scored[i] = self._score(work, states[first : first + count], wanted)
                if work.sample:
                    rows.append(first + work.count - 1)
            if not rows:
                return StepOutput([], [], scored)
            sequences = [work.sequence for work in plan.work if work.sample]
            batch = sample_batch([(samplers[id(s)], s) for s in sequences])
            if len(rows) < len(states):
                states = torch.from_numpy(states.numpy()[rows])  # torch would wake threads of its own
            sampled = self._kernels.sample(self._decoder.logits(states), batch)
        logprobs = [
            logprobs_of(sampled, row, sequence.request.params.logprobs)
            for row, sequence in enumerate(sequences)
        ]
        return StepOutput(sampled.tokens.tolist(), logprobs, scored)

    def _step(self, plan: StepPlan) -> tuple[torch.Tensor, Step]:
        ids: list[int] = []
        positions: list[int] = []
        row_start, context, tables = [0], [], []
        segments: list[Segment] = []
        key: object = ()  # adapter_key of the open segment; () is the base
        uses: tuple[AdapterUse, ...] = ()
        begin = 0
        for work in plan.work:
            sequence = work.sequence
            request = sequence.request
            if request.adapters is not uses and sequence.adapter_key != key:
                if len(ids) > begin:
                    segments.append(Segment(begin, len(ids), self._rows_of(uses) if uses else None))
                key, uses, begin = sequence.adapter_key, request.adapters, len(ids)
            if work.count == 1:
                ids.append(sequence.tokens[work.start])
                positions.append(work.start)
            else:
                ids.extend(sequence.tokens[work.start : work.start + work.count])
                positions.extend(range(work.start, work.start + work.count))
            row_start.append(len(ids))
            context.append(work.start + work.count)
            tables.append(sequence.table.pages)
        segments.append(Segment(begin, len(ids), self._rows_of(uses) if uses else None))
        step = Step(
            num_tokens=len(ids),
            positions=np.array(positions, np.int32),
            row_start=np.array(row_start, np.int32),
            context=np.array(context, np.int32),
            page_tables=tables,
            segments=segments,
        )
        return torch.tensor(ids, dtype=torch.int64), self._kernels.prepare_step(step)

    def _score(self, work: Work, states: torch.Tensor, wanted: int) -> list[TokenLogprob]:
        """Logprobs of prompt tokens [start + 1, ...] of one work item, few rows of logits at a time."""
        tokens, vocab = work.sequence.tokens, self._decoder.arch.vocab
        k, size = min(wanted, vocab), max(1, _SCORED // (4 * vocab))
        scored: list[TokenLogprob] = []
        for part in torch.split(states, size):
            logprobs = torch.log_softmax(self._decoder.logits(part), dim=-1)
            best = torch.topk(logprobs, k, dim=-1) if k else None
            for row in range(len(part)):
                token = tokens[work.start + 1 + len(scored)]
                top = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True) if best else ()
                scored.append(TokenLogprob(token, float(logprobs[row, token]), tuple(top)))
        return scored
