"""sample and embed beyond the case table: the distribution itself, edges, random batches, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.errors import KernelError
from chiliad.kernels.base import Kernels
from chiliad.kernels.cases import seed_of
from chiliad.kernels.cases_attention import sample_batch
from chiliad.kernels.reference import ReferenceKernels

_core = pytest.importorskip("chiliad.kernels._core", reason="the C++ core is not installed")
from chiliad.kernels.cpu import CpuKernels  # noqa: E402

ISAS = _core.isas()
KERNELS = {isa: CpuKernels(isa=isa, threads=2) for isa in ISAS}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return KERNELS[request.param]


def test_greedy_takes_the_first_of_equals(kernels: CpuKernels) -> None:
    """Ties go to the lowest id: what torch.argmax does."""
    logits = torch.zeros(4, 1000)
    logits[1, [999, 300, 700]] = 5.0
    logits[2, 999] = 1e-30
    logits[3, :] = -INF
    logits[3, 640] = -3e38
    tokens = kernels.sample(logits, sample_batch(4, temperature=0.0)).tokens
    assert tokens.tolist() == logits.argmax(-1).tolist() == [0, 300, 999, 640]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logprobs", [-1, 0, 3])
def test_rows_without_a_distribution_have_no_token(
    kernels: CpuKernels, temperature: float, logprobs: int
) -> None:
    """All banned, infinite or NaN, wherever it is; the rows beside them are as always."""
    logits = torch.zeros(9, 300)
    logits[0] = -INF
    logits[1, 7] = INF
    logits[2, 9] = NAN
    logits[3] = NAN
    logits[4, 299] = NAN
    logits[5, [40, 299]] = torch.tensor([INF, NAN])
    logits[6, :] = -3e38
    everything = np.arange(300, dtype=np.int32)
    batch = sample_batch(
        9, temperature=temperature, top_p=0.9, uniform=0.99, logprobs=[logprobs] * 9,
        banned=[None] * 8 + [everything],
    )  # fmt: skip
    for implementation in (kernels, ReferenceKernels()):
        sampled = implementation.sample(logits, batch)
        assert (sampled.tokens >= 0).tolist() == [False] * 6 + [True, True, False]
        if logprobs >= 0:
            assert np.isfinite(sampled.logprob).tolist() == (sampled.tokens >= 0).tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_ends_of_the_draw(kernels: CpuKernels, uniform: float) -> None:
    """A draw of 0 takes the most likely token, the largest draw one that is possible at all."""
    logits = torch.full((1, 5000), -INF)
    logits[0, [77, 4000, 12]] = torch.tensor([2.0, 2.0, 1.0])
    token = int(kernels.sample(logits, sample_batch(1, uniform=uniform)).tokens[0])
    assert token == {0.0: 77, 0.5: 4000}.get(uniform, 12)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str
)
def test_draws_follow_the_distribution(fields: dict[str, float]) -> None:
    """20,000 evenly spaced draws give every token its share, to the rounding of one draw."""
    kernels, rows = KERNELS[ISAS[-1]], 20000
    row = torch.randn(50, generator=seed_of("distribution")) * 2
    p = torch.softmax(row.double() / fields.get("temperature", 1.0), -1)
    order = p.argsort(descending=True)
    if "top_k" in fields:
        p[order[3:]] = 0
    if "top_p" in fields:
        kept = int((p[order].cumsum(0) < 0.7).sum()) + 1
        p[order[kept:]] = 0
    if "min_p" in fields:
        p[p < 0.3 * p.max()] = 0
    p /= p.sum()
    uniform = (np.arange(rows) + 0.5) / rows
    sampled = kernels.sample(row.repeat(rows, 1), sample_batch(rows, uniform=uniform, **fields))
    counts = np.bincount(sampled.tokens, minlength=50)
    assert np.abs(counts - p.numpy() * rows).max() <= 1.5


def test_logprobs_are_exact_to_float32(kernels: CpuKernels) -> None:
    logits = 6 * torch.randn(3, 200_000, generator=seed_of("logprobs"))
    want = torch.log_softmax(logits.double(), -1)
    sampled = kernels.sample(logits, sample_batch(3, temperature=0.0, logprobs=[20, 0, -1]))
    assert [len(ids) for ids in sampled.top_ids] == [20, 0, 0]
    best = want[0].topk(20)
    assert sampled.top_ids[0].tolist() == best.indices.tolist()
    assert np.abs(sampled.top_logprobs[0] - best.values.numpy()).max() < 2e-6
    assert abs(sampled.logprob[1] - float(want[1, sampled.tokens[1]])) < 2e-6
    assert sampled.logprob[2] == 0


def test_penalties_bias_and_bans_by_hand(kernels: CpuKernels) -> None:
    """Every rule in its order on a row small enough to check with a pencil."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 3.0, 0.0]])
    before = logits.clone()

    def top(**fields: object) -> list[float]:
        """The adjusted logits, read off by banning the best again and again."""
        found: dict[int, float] = {}
        banned: list[int] = []
        for _ in range(6):
            ids = np.array(banned, np.int32)
            batch = sample_batch(1, temperature=0.0, banned=[ids], **fields)
            token = int(kernels.sample(logits, batch).tokens[0])
            banned.append(token)
            found[token] = len(found)
        assert torch.equal(logits, before)
        return [found[i] for i in range(6)]

    def ranks(values: list[float]) -> list[int]:
        order = sorted(range(6), key=lambda i: (-values[i], i))
        return [order.index(i) for i in range(6)]

    output, prompt = [np.array([0, 0, 4], np.int32)], [np.array([1, 1, 2], np.int32)]
    assert top() == ranks([2, -2, 1, 0.5, 3, 0])
    assert top(presence=1.6, output_tokens=output) == ranks([0.4, -2, 1, 0.5, 1.4, 0])
    assert top(frequency=0.9, output_tokens=output) == ranks([0.2, -2, 1, 0.5, 2.1, 0])
    assert top(repetition=3.5, output_tokens=output, prompt_tokens=prompt) == ranks(
        [2 / 3.5, -7, 1 / 3.5, 0.5, 3 / 3.5, 0]
    )
    assert top(repetition=4.0, frequency=0.5, output_tokens=output) == ranks([-0.5, -2, 1, 0.5, 0.25, 0])
    bias = [(np.array([1, 4], np.int32), np.array([4.5, -2.75], np.float32))]
    assert top(bias=bias) == ranks([2, 2.5, 1, 0.5, 0.25, 0])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_batches_match_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    rows, vocab = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 50, 129, 3000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, generator=g) * draw(st.sampled_from([0.0, 0.1, 3.0, 20.0]))
    if draw(st.booleans()):
        logits = logits.round()  # many equal logits

    def ids() -> list[np.ndarray | None]:
        return [
            torch.randint(0, vocab, (draw(st.integers(0, 9)),), generator=g, dtype=torch.int32).numpy()
            if draw(st.booleans())
            else None
            for _ in range(rows)
        ]

    bias_ids = np.unique(torch.randint(0, vocab, (3,), generator=g, dtype=torch.int32).numpy())
    batch = sample_batch(
        rows,
        g,
        temperature=[draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])) for _ in range(rows)],
        top_p=[draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])) for _ in range(rows)],
        top_k=[draw(st.sampled_from([0, 1, 2, 40, vocab, 10**6])) for _ in range(rows)],
        min_p=[draw(st.sampled_from([0.0, 0.1, 1.0])) for _ in range(rows)],
        presence=[draw(st.sampled_from([0.0, 1.5])) for _ in range(rows)],
        frequency=[draw(st.sampled_from([0.0, -0.5])) for _ in range(rows)],
        repetition=[draw(st.sampled_from([1.0, 1.2])) for _ in range(rows)],
        logprobs=[draw(st.sampled_from([-1, 0, 3])) for _ in range(rows)],
        prompt_tokens=ids(),
        output_tokens=ids(),
        bias=[(bias_ids, np.full(len(bias_ids), 1.5, np.float32)), *[None] * (rows - 1)],
        banned=ids() if vocab > 40 else [None] * rows,
    )
    before = logits.clone()
    got = KERNELS[draw(st.sampled_from(ISAS))].sample(logits, batch)
    assert torch.equal(logits, before)
    want = ReferenceKernels().sample(logits, batch)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert np.allclose(got.logprob, want.logprob, atol=2e-5)
    for ids_got, ids_want, top, top_want in zip(
        got.top_ids, want.top_ids, got.top_logprobs, want.top_logprobs, strict=True
    ):
        assert len(ids_got) == len(ids_want)
        assert np.allclose(top, top_want, atol=2e-5)


def test_refusals() -> None:
    kernels = KERNELS[ISAS[-1]]
    logits = torch.zeros(2, 10)
    for fields in (
        {"banned": [np.array([10], np.int32), None]},
        {"prompt_tokens": [None, np.array([-1], np.int32)], "repetition": 2.0},
        {"output_tokens": [np.array([3, 4, 11], np.int32), None]},
        {"bias": [None, (np.array([12], np.int32), np.array([1.0], np.float32))]},
    ):
        with pytest.raises(KernelError, match="outside the vocabulary"):
            kernels.sample(logits, sample_batch(2, **fields))
    with pytest.raises(KernelError, match="one entry per row"):
        kernels.sample(logits, sample_batch(3))
    with pytest.raises(KernelError, match="one entry per row"):
        kernels.sample(logits, sample_batch(2, banned=[None]))
    pair = (np.array([1, 2], np.int32), np.array([1.0], np.float32))
    with pytest.raises(KernelError, match="as many values as ids"):
        kernels.sample(logits, sample_batch(2, bias=[pair, None]))
    with pytest.raises(KernelError, match="float32"):
        kernels.sample(logits.double(), sample_batch(2))
    with pytest.raises(KernelError, match="int32"):
        kernels.sample(logits, sample_batch(2, banned=[np.array([1.5]), None]))
    with pytest.raises(KernelError, match="bad sample batch"):
        kernels.sample(logits, sample_batch(2, bias=[1, None]))


def test_no_rows() -> None:
    sampled = KERNELS[ISAS[-1]].sample(torch.empty(0, 10), sample_batch(0))
    assert len(sampled.tokens) == len(sampled.top_ids) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embed_refuses_what_is_not_in_the_table(dtype: torch.dtype) -> None:
    kernels: Kernels = KERNELS[ISAS[-1]]
    table = kernels.pack_embedding(torch.randn(10, 6), dtype)
    assert kernels.embed(table, torch.empty(0, dtype=torch.int64)).shape == (0, 6)
    for bad in (10, -1):
        with pytest.raises(KernelError, match="outside the vocabulary"):
            kernels.embed(table, torch.tensor([0, bad]))
    with pytest.raises(KernelError, match="int64"):
        kernels.embed(table, torch.tensor([0.0]))
    assert math.isclose(float(kernels.embed(table, torch.tensor([3]), 2.0)[0, 0]), 2 * float(table[3, 0]))  # type: ignore[index]
