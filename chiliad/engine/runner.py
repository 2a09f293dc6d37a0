"""One step: StepPlan -> arrays -> model -> logits -> tokens. The only file here that computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiliad.core import AdapterUse, StepOutput, StepPlan, TokenLogprob
from chiliad.engine.sampling import SequenceSampler, logprobs_of, sample_batch
from chiliad.kernels.base import AdapterRows, Kernels, Segment, Step

if TYPE_CHECKING:
    from chiliad.models.weights import Model

#: (uses) -> the rank rows of a resident adapter, or of several composed
RowsOf = Callable[[tuple[AdapterUse, ...]], AdapterRows]


class Runner:
    """Runs plans on one model. Holds no request state."""

    def __init__(self, model: Model, kernels: Kernels, rows_of: RowsOf) -> None:
        self._decoder, self._kernels, self._rows_of = model.decoder, kernels, rows_of

    def run(self, plan: StepPlan, samplers: Mapping[int, SequenceSampler]) -> StepOutput:
        """Compute the plan's tokens and sample. `samplers` maps id(sequence) to its sampler."""
        ids, step = self._step(plan)
        rows: list[int] = []  # rows of the step whose logits are needed, in plan order
        sampled_at: list[int] = []  # index into `rows` of each row that is sampled
        scored: list[tuple[int, int, int]] = []  # (work index, first, stop) into `rows`
        for i, work in enumerate(plan.work):
            first = int(step.row_start[i])
            sequence = work.sequence
            wanted = sequence.request.params.prompt_logprobs
            if wanted is not None and work.start < sequence.num_prompt - 1:
                stop = min(work.start + work.count, sequence.num_prompt - 1)
                scored.append((i, len(rows), len(rows) + stop - work.start))
                rows.extend(range(first, first + stop - work.start))
            if work.sample:
                sampled_at.append(len(rows))
                rows.append(first + work.count - 1)
        with torch.inference_mode():
            logits = self._decoder.forward(ids, step, torch.tensor(rows, dtype=torch.int64))
            prompt_logprobs = {i: self._score(plan, i, logits[a:b]) for i, a, b in scored}
            if not sampled_at:
                return StepOutput([], [], prompt_logprobs)
            if scored:
                logits = logits[sampled_at]
            sequences = [work.sequence for work in plan.work if work.sample]
            batch = sample_batch([(samplers[id(s)], s) for s in sequences])
            sampled = self._kernels.sample(logits, batch)
        logprobs = [
            logprobs_of(sampled, row, sequence.request.params.logprobs)
            for row, sequence in enumerate(sequences)
        ]
        return StepOutput(sampled.tokens.tolist(), logprobs, prompt_logprobs)

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

    def _score(self, plan: StepPlan, index: int, logits: torch.Tensor) -> list[TokenLogprob]:
        """Logprobs of prompt tokens [start + 1, ...] of one work item."""
        work = plan.work[index]
        sequence = work.sequence
        logprobs = torch.log_softmax(logits, dim=-1)
        targets = sequence.tokens[work.start + 1 : work.start + 1 + len(logits)]
        k = min(sequence.request.params.prompt_logprobs or 0, logits.shape[-1])
        best = torch.topk(logprobs, k, dim=-1) if k else None
        scored = []
        for row, token in enumerate(targets):
            top = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True) if best else ()
            scored.append(TokenLogprob(token, float(logprobs[row, token]), tuple(top)))
        return scored
