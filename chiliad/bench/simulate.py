"""The server without the arithmetic: real scheduler, policies, pool, prefix cache and residency
on a virtual clock, with a cost model in place of the kernels.

What is simulated is only time: how long a step takes (`cost.CostModel`) and how long a loader is
busy. Every decision is made by the code that serves. Torch-free.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from chiliad.adapters.residency import Done, Entry, Residents
from chiliad.bench.cost import CostModel, contents
from chiliad.bench.report import Outcome, report
from chiliad.bench.workload import Trace
from chiliad.config import SchedulerConfig
from chiliad.core import AdapterUse, AdapterVersion, Request, SamplingParams, StepPlan
from chiliad.engine.scheduler import Scheduler, Sequence
from chiliad.errors import ChiliadError
from chiliad.memory.pool import Owner, PagePool
from chiliad.observe import EngineMetrics

_IDLE_SECONDS = 0.2  # the engine looks around this often when nothing happens
_MAX_IDLE = 100_000  # such looks in a row, before a simulation is called stuck
_VOCAB = 50_000


@dataclass(frozen=True, slots=True)
class AdapterSize:
    pages: int
    nbytes: int  # of its file


@dataclass(frozen=True, slots=True)
class Geometry:
    """Memory of one server. Adapter i has the size `adapters[i % len(adapters)]`."""

    num_pages: int
    page_bytes: int
    num_layers: int
    block_tokens: int
    max_model_len: int
    adapters: tuple[AdapterSize, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit if there were no adapters."""
        return self.num_pages // self.num_layers * self.block_tokens


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class VirtualStore(Residents):
    """Residency whose loaders only let time pass."""

    def __init__(
        self, pool: PagePool, geometry: Geometry, cost: CostModel, metrics: EngineMetrics, clock: Clock
    ) -> None:
        super().__init__(pool, geometry.page_bytes, metrics=metrics, clock=clock)
        self._sizes, self._cost = geometry.adapters, cost
        self._free_at = [0.0] * cost.loaders  # heap: when each loader is done with what it has
        self._pending: list[tuple[float, int, Done]] = []  # heap by time of completion
        self._order = count()

    def _count_pages(self, version: AdapterVersion) -> int:
        return self._sizes[int(version.digest) % len(self._sizes)].pages

    def _begin(self, entry: Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        seconds = self._cost.load(version.nbytes)
        done = max(self._clock(), self._free_at[0]) + seconds
        heapq.heapreplace(self._free_at, done)
        heapq.heappush(self._pending, (done, next(self._order), Done(entry, None, "", seconds, None)))

    def _accept(self, done: Done) -> None:
        return None

    def _forget(self, digest: str) -> None: ...

    def arrive(self) -> float | None:
        """Apply the loads that have ended by now; returns when the next one will."""
        while self._pending and self._pending[0][0] <= self._clock():
            self._done.append(heapq.heappop(self._pending)[2])
        self.poll()
        return self._pending[0][0] if self._pending else None

    def fill(self, rates: np.ndarray, version: Callable[[int], AdapterVersion]) -> None:
        """Start as if the server had run for long: adapters in memory, the most wanted first.

        rates: uses per second by adapter. Fills the pool to nine tenths.
        """
        now = self._clock()
        room = self._pool.num_pages // 10
        for index in np.argsort(-rates, kind="stable").tolist():
            rate, adapter = float(rates[index]), version(index)
            pages = self.pages_needed(adapter)
            if (
                rate <= 0
                or self._pool.available(Owner.ADAPTER) < pages
                or self._pool.free_pages - pages < room
            ):
                return
            entry = self._entries[adapter.digest] = Entry(adapter, state="resident")
            entry.pages = self._pool.alloc(pages, Owner.ADAPTER)
            entry.load_seconds = self._cost.load(adapter.nbytes)
            entry.last_used, entry.popularity = now - min(1 / rate, 1000.0), 100.0 * rate
            self._set_idle(entry)


@dataclass(slots=True)
class Simulated:
    """What became of a trace."""

    outcomes: list[Outcome]
    metrics: EngineMetrics
    busy_seconds: float
    seconds: float
    peak_pages: dict[str, int]

    def report(self, trace: Trace, slo: float = 6.0) -> dict[str, Any]:
        """The report of `bench serve`, with the counters of the simulated server."""
        metrics = self.metrics
        starts = metrics.adapter_hits + metrics.adapter_misses
        result: dict[str, Any] = {"trace": trace.head.trace, "workload": trace.facts()}
        result |= report(self.outcomes, slo)
        result["server"] = {
            "adapter_hit_rate": metrics.adapter_hits / starts if starts else None,
            "prefix_hit_rate": metrics.prefix_hits / metrics.prefix_queries
            if metrics.prefix_queries
            else None,
            "mean_distinct_adapters": metrics.batch_distinct_adapters.mean,
            "utilisation": self.busy_seconds / self.seconds if self.seconds else 0.0,
            "steps": metrics.steps,
            "preemptions": metrics.preemptions,
            "adapter_loads": metrics.adapter_loads["ok"],
            "adapter_evictions": metrics.adapter_evictions["memory"],
            "peak_pages": self.peak_pages,
        }
        return result


def simulate(
    trace: Trace,
    geometry: Geometry,
    cost: CostModel,
    config: SchedulerConfig | None = None,
    *,
    adapter_share: float | None = None,
    prefix_cache: bool = True,
    warm: np.ndarray | None = None,
    max_seconds: float = 86_400.0,
) -> Simulated:
    """Serve a trace on virtual time.

    warm: uses per second by adapter (float64 [adapters]) of a server that has run for long, see
    `VirtualStore.fill`; None: it starts cold. max_seconds: virtual; what is not answered by then has
    failed.
    """
    return _Server(trace, geometry, cost, config or SchedulerConfig(), adapter_share, prefix_cache).run(
        warm, max_seconds
    )


class _Server:
    """`engine.Engine` as far as time and tokens go."""

    def __init__(
        self,
        trace: Trace,
        geometry: Geometry,
        cost: CostModel,
        config: SchedulerConfig,
        adapter_share: float | None,
        prefix_cache: bool,
    ) -> None:
        self.clock, self.metrics = Clock(), EngineMetrics()
        self.pool = PagePool(geometry.num_pages, adapter_share)
        self.store = VirtualStore(self.pool, geometry, cost, self.metrics, self.clock)
        self.scheduler = Scheduler(
            config,
            pool=self.pool,
            residency=self.store,
            num_layers=geometry.num_layers,
            block_tokens=geometry.block_tokens,
            max_model_len=geometry.max_model_len,
            metrics=self.metrics,
            prefix_cache=prefix_cache,
            clock=self.clock,
        )
        self._trace, self._geometry, self._cost = trace, geometry, cost
        self._versions: dict[int, AdapterVersion] = {}
        self._outcomes: list[Outcome] = []
        self._open = 0
        self._busy = 0.0

    def run(self, warm: np.ndarray | None, max_seconds: float) -> Simulated:
        clock, items = self.clock, self._trace.items
        if warm is not None:
            self.store.fill(warm, self._version)
        loaded: float | None = None
        idle = 0
        while (len(self._outcomes) < len(items) or self._open) and clock.now < max_seconds:
            while len(self._outcomes) < len(items) and self._due(len(self._outcomes)) <= clock.now:
                self._submit(len(self._outcomes))
            loaded = self.store.arrive()
            plan = self.scheduler.plan()
            for request, error in self.scheduler.take_failures():
                self._fail(int(request.id), error)
            if plan.work:
                self._compute(plan)
                idle = 0
                continue
            ahead = [] if loaded is None else [loaded]
            if len(self._outcomes) < len(items):
                ahead.append(self._due(len(self._outcomes)))
            if self._open:
                ahead.append(clock.now + _IDLE_SECONDS)
            idle += 1
            if idle > _MAX_IDLE:
                raise ChiliadError("the simulation is stuck: requests wait and nothing happens")
            if ahead:
                clock.now = max(clock.now, min(ahead))
        self._close()
        return Simulated(self._outcomes, self.metrics, self._busy, clock.now, self.pool.peaks())

    def _due(self, index: int) -> float:
        return self._trace.items[index].at + self._cost.request_seconds

    def _submit(self, index: int) -> None:
        item = self._trace.items[index]
        outcome = Outcome(item, item.at, prompt_tokens=item.prompt, error="unfinished")
        self._outcomes.append(outcome)
        request = Request(
            id=str(index),
            prompt=self._trace.tokens(index, _VOCAB),
            params=SamplingParams(max_tokens=item.output, ignore_eos=True, temperature=0.0),
            adapters=(AdapterUse(self._version(item.adapter)),) if item.adapter >= 0 else (),
            arrival=self.clock.now,
            tenant=item.tenant,
        )
        self._open += 1
        try:
            self.scheduler.add(request)
        except ChiliadError as error:
            self._fail(index, error)

    def _compute(self, plan: StepPlan) -> None:
        page_bytes, metrics = self._geometry.page_bytes, self.metrics
        things = contents(plan, lambda version: self.store.pages_needed(version) * page_bytes)
        seconds = self._cost.step.seconds(things)
        self.clock.now += seconds
        self._busy += seconds
        sampled = [work.sequence for work in plan.work if work.sample]
        self.scheduler.advance(plan, [0] * len(sampled))
        metrics.steps += 1
        metrics.generation_tokens += len(sampled)
        metrics.prompt_tokens += int(things.prefill_tokens)
        metrics.step_seconds.observe(seconds)
        metrics.batch_distinct_adapters.observe(
            len({work.sequence.adapter_key for work in plan.work if work.sequence.adapter_key})
        )
        for sequence in sampled:
            self._push(sequence)

    def _push(self, sequence: Sequence) -> None:
        outcome = self._outcomes[int(sequence.request.id)]
        outcome.times.append(self.clock.now)
        outcome.counts.append(1)
        if sequence.num_output >= sequence.request.params.max_tokens:
            self.scheduler.end(sequence)
            outcome.output_tokens = sequence.num_output
            outcome.ended, outcome.status, outcome.error = self.clock.now, 200, ""
            self._open -= 1

    def _fail(self, index: int, error: Exception) -> None:
        outcome = self._outcomes[index]
        outcome.ended = self.clock.now
        outcome.status = getattr(error, "status", 500)
        outcome.error = getattr(error, "code", "internal_error")
        self._open -= 1

    def _close(self) -> None:
        """Time is over: count what was not answered, and state the laws."""
        self.scheduler.check()
        for index in range(len(self._outcomes), len(self._trace.items)):
            item = self._trace.items[index]
            self._outcomes.append(Outcome(item, item.at, error="unfinished"))
        for outcome in self._outcomes:
            if outcome.error == "unfinished":
                outcome.ended = max(outcome.sent, self.clock.now)

    def _version(self, index: int) -> AdapterVersion:
        version = self._versions.get(index)
        if version is None:
            size = self._geometry.adapters[index % len(self._geometry.adapters)]
            version = AdapterVersion(f"adapter-{index}", 1, str(index), "", size.nbytes)
            self._versions[index] = version
        return version
