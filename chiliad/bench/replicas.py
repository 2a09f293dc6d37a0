"""Many servers that share a load: each is simulated by itself, for none waits for another."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from chiliad.bench.cost import CostModel
from chiliad.bench.simulate import Geometry, Simulated, simulate
from chiliad.bench.workload import Trace
from chiliad.config import SchedulerConfig
from chiliad.observe import EngineMetrics, Histogram

#: How a request finds its replica: all of an adapter at one of them, or one after the other.
Route = Literal["adapter", "turn"]

_GOLDEN = 0x9E3779B97F4A7C15  # Knuth's multiplicative hash: neighbours part


def replica_of(adapter: int, replicas: int) -> int:
    """Where an adapter is at home."""
    return ((adapter * _GOLDEN) % 2**64) * replicas >> 64


def split(trace: Trace, replicas: int, route: Route) -> list[list[int]]:
    """Which requests go where: a list of their indices in the trace for each replica."""
    parts: list[list[int]] = [[] for _ in range(replicas)]
    turn = 0
    for index, item in enumerate(trace.items):
        if route == "adapter" and item.adapter >= 0:
            parts[replica_of(item.adapter, replicas)].append(index)
        else:
            parts[turn % replicas].append(index)
            turn += 1
    return parts


def simulate_replicas(
    trace: Trace,
    geometry: Geometry,
    cost: CostModel,
    config: SchedulerConfig,
    *,
    replicas: int = 1,
    route: Route = "adapter",
    warm: np.ndarray | None = None,
    **options: Any,
) -> Simulated:
    """`simulate` on each of several equal servers; the outcomes are in the trace's order.

    Counters add up, `peak_pages` is that of the fullest replica, and the time is that of the last,
    for each of them.
    """
    if replicas == 1:
        return simulate(trace, geometry, cost, config, warm=warm, **options)
    outcomes: list[Any] = [None] * len(trace)
    runs: list[Simulated] = []
    for replica, indices in enumerate(split(trace, replicas, route)):
        mine = Trace(trace.head, tuple(trace.items[i] for i in indices))
        run = simulate(mine, geometry, cost, config, warm=_share(warm, replica, replicas, route), **options)
        for index, outcome in zip(indices, run.outcomes, strict=True):
            outcomes[index] = outcome
        runs.append(run)
    metrics = EngineMetrics()
    for run in runs:
        _add(metrics, run.metrics)
    return Simulated(
        outcomes,
        metrics,
        sum(run.busy_seconds for run in runs),
        replicas * max(run.seconds for run in runs),
        {owner: max(run.peak_pages[owner] for run in runs) for owner in runs[0].peak_pages},
    )


def _share(rates: np.ndarray | None, replica: int, replicas: int, route: Route) -> np.ndarray | None:
    """Uses per second by adapter, of one replica."""
    if rates is None or route == "turn":
        return None if rates is None else rates / replicas
    home = np.array([replica_of(adapter, replicas) for adapter in range(len(rates))], np.int64)
    return np.where(home == replica, rates, 0.0)


def _add(total: EngineMetrics, more: EngineMetrics) -> None:
    for field in dataclasses.fields(EngineMetrics):
        mine, other = getattr(total, field.name), getattr(more, field.name)
        if isinstance(mine, Histogram):
            mine.counts = [a + b for a, b in zip(mine.counts, other.counts, strict=True)]
            mine.sum += other.sum
        elif isinstance(mine, dict):
            for key, count in other.items():
                mine[key] = mine.get(key, 0) + count
        else:
            setattr(total, field.name, mine + other)
