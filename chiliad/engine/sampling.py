"""Sampling parameters of many sequences -> the arrays that `kernels.sample` takes."""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np

from chiliad.core import SamplingParams, TokenLogprob
from chiliad.kernels.base import SampleBatch, Sampled


class Sampling(Protocol):
    """What sampling reads of a scheduler's sequence."""

    tokens: list[int]
    num_prompt: int


class SequenceSampler:
    """One sequence's sampling state: its parameters, its random stream, the tokens it may not take.

    Draws come one per token from a stream seeded by (seed, choice), so neither neighbours nor
    preemption nor the order of steps change them.
    """

    def __init__(self, params: SamplingParams, index: int, eos_ids: frozenset[int]) -> None:
        self.params = params
        self._random = random.Random(None if params.seed is None else f"{params.seed}/{index}")
        self._drawn = (-1, 0.0)  # of which token, what
        self.penalised = (
            params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
        )
        stops = eos_ids | frozenset(params.stop_token_ids)
        self._stops = np.array(sorted(stops), np.int32) if params.min_tokens and stops else None
        self.bias = None
        if params.logit_bias:
            ids, added = zip(*sorted(params.logit_bias.items()), strict=True)
            self.bias = (np.array(ids, np.int32), np.array(added, np.float32))

    def draw(self, num_output: int) -> float:
        """The draw for the next token; the same again if a failed step is computed once more."""
        if self.params.temperature and self._drawn[0] != num_output:
            self._drawn = (num_output, self._random.random())
        return self._drawn[1]

    def banned(self, num_output: int) -> np.ndarray | None:
        return self._stops if num_output < self.params.min_tokens else None


def sample_batch(rows: list[tuple[SequenceSampler, Sampling]]) -> SampleBatch:
    """Collect R rows. Greedy rows without penalties cost a few appended floats each."""
    p = [sampler.params for sampler, _ in rows]
    return SampleBatch(
        temperature=np.array([x.temperature for x in p], np.float32),
        top_p=np.array([x.top_p for x in p], np.float32),
        top_k=np.array([x.top_k for x in p], np.int32),
        min_p=np.array([x.min_p for x in p], np.float32),
        presence=np.array([x.presence_penalty for x in p], np.float32),
        frequency=np.array([x.frequency_penalty for x in p], np.float32),
        repetition=np.array([x.repetition_penalty for x in p], np.float32),
        uniform=np.array([sampler.draw(len(s.tokens) - s.num_prompt) for sampler, s in rows], np.float64),
        prompt_tokens=[
            np.array(s.tokens[: s.num_prompt], np.int32) if sampler.params.repetition_penalty != 1 else None
            for sampler, s in rows
        ],
        output_tokens=[
            np.array(s.tokens[s.num_prompt :], np.int32) if sampler.penalised else None for sampler, s in rows
        ],
        bias=[sampler.bias for sampler, _ in rows],
        banned=[sampler.banned(len(s.tokens) - s.num_prompt) for sampler, s in rows],
        logprobs=np.array([-1 if x.logprobs is None else x.logprobs for x in p], np.int32),
    )


def logprobs_of(sampled: Sampled, row: int, wanted: int | None) -> TokenLogprob | None:
    """The chosen token's logprob and the `wanted` most likely ones, or None if not asked for."""
    if wanted is None:
        return None
    top = zip(sampled.top_ids[row].tolist(), sampled.top_logprobs[row].tolist(), strict=True)
    return TokenLogprob(int(sampled.tokens[row]), float(sampled.logprob[row]), tuple(top))
