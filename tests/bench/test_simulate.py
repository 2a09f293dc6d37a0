"""The simulator: nothing is lost, time is right where it can be worked out, and policies do on
virtual time what they are for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.bench.cost import CostModel, StepCost
from chiliad.bench.replicas import replica_of, simulate_replicas, split
from chiliad.bench.simulate import AdapterSize, Geometry, Simulated, simulate
from chiliad.bench.workload import Head, Item, Trace, expected_shares, synthetic
from chiliad.config import SchedulerConfig

SMALL = Geometry(2000, 4096, 4, 16, 1024, (AdapterSize(40, 100_000),))  # 8000 tokens, or 50 adapters
COST = CostModel(
    StepCost(step=0.01, decode_rows=5e-4, prefill_tokens=2e-4), load_seconds=0.05, load_bandwidth=1e7
)


def of(items: list[Item], adapters: int = 10) -> Trace:
    return Trace(Head("by hand", 0, adapters), tuple(items))


SLOW = CostModel(
    StepCost(step=0.05, decode_rows=25e-4, prefill_tokens=1e-3), load_seconds=0.05, load_bandwidth=1e7
)


def run(trace: Trace, policy: str = "fcfs", cost: CostModel = COST, **options: Any) -> dict[str, Any]:
    return simulate(trace, SMALL, cost, SchedulerConfig(policy=policy), **options).report(trace)


def test_time_of_one_request() -> None:
    cost = CostModel(
        StepCost(step=1.0, decode_rows=0.1, prefill_tokens=0.01, adapter_bytes=1e-6, context_read=1e-3),
        load_seconds=2.0,
        load_bandwidth=1e5,
        request_seconds=0.5,
    )
    trace = of([Item(at=1.0, prompt=20, output=3, adapter=4)])
    done = simulate(trace, SMALL, cost)
    adapter = 40 * 4096 * 1e-6
    first = 1.0 + 0.5 + (2.0 + 1.0) + (1.0 + 0.2 + adapter)
    second = first + 1.0 + 0.1 + adapter + 0.021
    third = second + 1.0 + 0.1 + adapter + 0.022
    assert done.outcomes[0].times == pytest.approx([first, second, third])
    assert done.outcomes[0].ended == pytest.approx(third)
    assert done.outcomes[0].first == pytest.approx(first - 1.0)
    assert done.busy_seconds == pytest.approx(third - 4.5)
    assert (done.metrics.adapter_misses, done.metrics.steps) == (1, 3)


def test_loads_queue_for_loaders() -> None:
    trace = of([Item(at=0.0, prompt=20, output=1, adapter=i) for i in range(6)])
    cost = CostModel(StepCost(step=1e-6), load_seconds=1.0, load_bandwidth=1e12, loaders=2)
    times = sorted(o.times[0] for o in simulate(trace, SMALL, cost).outcomes)
    assert times == pytest.approx([1, 1, 2, 2, 3, 3], abs=1e-3)


def check(done: Simulated, trace: Trace) -> None:
    """Every request has one end; what was answered is whole and in order."""
    assert [outcome.item for outcome in done.outcomes] == list(trace.items)
    for outcome in done.outcomes:
        assert outcome.times == sorted(outcome.times)
        assert outcome.ended >= outcome.sent
        if not outcome.error:
            assert outcome.status == 200
            assert len(outcome.times) == outcome.output_tokens == outcome.item.output
            assert outcome.times[0] > outcome.sent
        else:
            assert outcome.status in (400, 429, 503)


@settings(max_examples=30, deadline=None)
@given(
    policy=st.sampled_from(["fcfs", "cluster:2", "abort:2", "vtc", "vtc:adapter"]),
    rate=st.sampled_from([1.0, 10.0, 40.0]),
    cv=st.sampled_from([0.5, 1.0, 6.0]),
    adapters=st.sampled_from([0, 1, 7, 200]),
    pages=st.sampled_from([160, 400, 4000]),
    share=st.sampled_from([None, 0.5]),
    prefix=st.sampled_from([0, 40]),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost(
    policy: str,
    rate: float,
    cv: float,
    adapters: int,
    pages: int,
    share: float | None,
    prefix: int,
    warm: bool,
    seed: int,
) -> None:
    trace = synthetic(
        rate=rate, duration=4, adapters=adapters, cv=cv, popularity="zipf:1", prompt=(1, 100), output=(1, 60),
        prefix=prefix, tenants=(3, 1), seed=seed,
    )  # fmt: skip
    geometry = Geometry(pages, 4096, 4, 16, 512, (AdapterSize(20, 10**5), AdapterSize(60, 3 * 10**5)))
    rates = expected_shares("zipf:1", adapters) * rate if warm and adapters else None
    config = SchedulerConfig(policy=policy, max_sequences=16, max_step_tokens=64)
    done = simulate(trace, geometry, COST, config, adapter_share=share, warm=rates)
    check(done, trace)
    if policy[:5] != "abort":
        assert sum(not o.error for o in done.outcomes) == len(trace)


def test_the_same_again() -> None:
    trace = synthetic(rate=20, duration=20, adapters=60, popularity="zipf:1", prompt=(8, 90), output=(4, 60))
    assert run(trace) == run(trace)


def test_refused_requests_are_outcomes() -> None:
    items = [Item(at=0.0, prompt=2000, output=1), Item(at=0.0, prompt=5, output=5)]
    done = simulate(of(items), SMALL, COST)
    assert [(o.status, o.error) for o in done.outcomes] == [(400, "context_length_exceeded"), (200, "")]
    many = of([Item(at=0.0, prompt=50, output=50) for _ in range(40)])
    done = simulate(many, SMALL, COST, SchedulerConfig(max_sequences=4, max_waiting=10))
    assert sum(o.status == 429 for o in done.outcomes) == 30


def test_time_is_bounded() -> None:
    trace = synthetic(rate=50, duration=20, adapters=5, prompt=(50, 90), output=(50, 90))
    done = simulate(trace, SMALL, COST, max_seconds=5)
    assert len(done.outcomes) == len(trace)
    assert {o.error for o in done.outcomes} == {"", "unfinished"}


def overload(**more: Any) -> Trace:
    """More than `SLOW` can bear."""
    settings: dict[str, Any] = {
        "rate": 6,
        "duration": 90,
        "adapters": 40,
        "prompt": (20, 120),
        "output": (10, 80),
    }
    return synthetic(**settings | more)


@pytest.mark.parametrize("cv", [1, 8])
def test_early_abort_keeps_the_objective_where_first_come_loses_it(cv: float) -> None:
    trace = overload(cv=cv)
    late, kept = run(trace, cost=SLOW), run(trace, "abort:6", SLOW)
    assert late["aborted"] == 0
    assert kept["aborted"] > 0
    assert kept["slo_attainment"] > late["slo_attainment"] + 0.05
    assert kept["satisfaction"] > late["satisfaction"]


def test_fair_shares_protect_the_others_from_one_tenant() -> None:
    trace = overload(rate=8, tenants=(20, 1, 1))
    plain, fair = run(trace, cost=SLOW), run(trace, "vtc", SLOW)
    for tenant in ("tenant-01", "tenant-02"):
        before, after = (r["tenants"][tenant]["mean_ttft_ms"] for r in (plain, fair))
        assert after < before / 4
    assert fair["fairness"]["tenant"]["jain_index"] > plain["fairness"]["tenant"]["jain_index"]


def test_clustering_mixes_fewer_adapters_in_bursts() -> None:
    trace = overload(cv=4, adapters=400, rate=3.5)  # waits of about its patience
    plain, clustered = run(trace, cost=SLOW), run(trace, "cluster:8", SLOW)
    assert clustered["server"]["mean_distinct_adapters"] < plain["server"]["mean_distinct_adapters"]
    assert clustered["mean_ttft_ms"] < plain["mean_ttft_ms"]
    assert clustered["completed"] == plain["completed"] == len(trace)


def test_a_shared_prefix_is_computed_once() -> None:
    trace = of([Item(at=2.0 * i, prompt=520, output=2, adapter=0, prefix=512) for i in range(5)])
    firsts = [o.first or 0 for o in simulate(trace, SMALL, COST).outcomes]
    assert max(firsts[1:]) < firsts[0] / 4
    without = [o.first or 0 for o in simulate(trace, SMALL, COST, prefix_cache=False).outcomes]
    assert min(without[1:]) > max(firsts[1:]) * 3


def test_a_warm_server_has_the_popular_adapters() -> None:
    rates = expected_shares("zipf:1", 500)
    trace = synthetic(rate=4, duration=50, adapters=500, popularity="zipf:1", prompt=(8, 30), output=(4, 9))
    cold, warm = run(trace), run(trace, warm=4 * rates)
    assert warm["server"]["adapter_hit_rate"] > cold["server"]["adapter_hit_rate"] + 0.1
    few = synthetic(rate=4, duration=50, adapters=20, prompt=(8, 30), output=(4, 9))
    assert run(few, warm=np.full(20, 0.2))["server"]["adapter_hit_rate"] == 1
    # the pool holds 45 of them: about their share of requests hits, if adapters stay where they are
    assert warm["server"]["adapter_hit_rate"] == pytest.approx(rates[:45].sum(), abs=0.15)


def test_a_split_pool_wastes_what_one_side_does_not_use() -> None:
    """Few adapters and long contexts: a half kept for adapters is missed."""
    trace = overload(adapters=4, prompt=(300, 700), output=(100, 200), rate=0.5)
    shared, split = run(trace, cost=SLOW), run(trace, cost=SLOW, adapter_share=0.5)
    assert shared["mean_ttft_ms"] <= split["mean_ttft_ms"]
    assert shared["server"]["peak_pages"]["kv"] > split["server"]["peak_pages"]["kv"]


def test_a_hundred_thousand_adapters() -> None:
    trace = synthetic(
        rate=20, duration=10, adapters=100_000, popularity="zipf:1", prompt=(8, 30), output=(4, 9)
    )
    result = run(trace, warm=20 * expected_shares("zipf:1", 100_000))
    assert result["completed"] == len(trace)
    assert 0.2 < result["server"]["adapter_hit_rate"] < 0.6


# -- replicas ----------------------------------------------------------------------------


def test_an_adapter_has_one_home_and_homes_are_even() -> None:
    homes = [replica_of(adapter, 100) for adapter in range(100_000)]
    counts = np.bincount(homes, minlength=100)
    assert counts.min() > 900
    assert counts.max() < 1100
    trace = synthetic(rate=50, duration=20, adapters=40, seed=3)
    parts = split(trace, 7, "adapter")
    assert sorted(index for part in parts for index in part) == list(range(len(trace)))
    for replica, part in enumerate(parts):
        assert {replica_of(trace.items[i].adapter, 7) for i in part} <= {replica}
    in_turn = split(trace, 7, "turn")
    assert max(map(len, in_turn)) - min(map(len, in_turn)) <= 1


def test_replicas_answer_as_if_each_were_alone() -> None:
    trace = synthetic(rate=40, duration=20, adapters=60, prompt=(8, 64), output=(4, 16), seed=5)
    done = simulate_replicas(trace, SMALL, COST, SchedulerConfig(), replicas=4, route="turn")
    assert [o.item for o in done.outcomes] == list(trace.items)
    for replica in range(4):
        mine = Trace(trace.head, trace.items[replica::4])
        alone = simulate(mine, SMALL, COST, SchedulerConfig())
        assert [o.times for o in alone.outcomes] == [o.times for o in done.outcomes[replica::4]]
    assert done.metrics.generation_tokens == sum(item.output for item in trace.items)
    assert done.metrics.adapter_hits + done.metrics.adapter_misses == len(trace)
    assert done.metrics.batch_distinct_adapters.count == done.metrics.steps


def test_homes_for_adapters_spare_loads() -> None:
    """60 adapters, of which a pool holds 50: with homes, each replica holds all of its own."""
    trace = synthetic(rate=40, duration=30, adapters=60, prompt=(8, 64), output=(4, 16), seed=5)
    loads = {}
    for route in ("adapter", "turn"):
        done = simulate_replicas(trace, SMALL, COST, SchedulerConfig(), replicas=4, route=route)
        loads[route] = done.metrics.adapter_loads["ok"]
    assert loads["adapter"] == len({item.adapter for item in trace.items})
    assert loads["turn"] > 3 * loads["adapter"]


@pytest.mark.parametrize("module", ["workload", "report", "client", "serve", "cost", "simulate", "replicas"])
def test_runs_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import chiliad.bench.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
