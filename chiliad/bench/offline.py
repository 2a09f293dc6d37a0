"""The engine under a closed loop: `concurrency` requests in flight, each followed by the next.

Prompts are random token ids, so nothing is shared between them; answers have a fixed length.
Adapters, and what they cost to load, are warmed up first unless `cold` is asked for.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from chiliad.adapters.registry import Registry
from chiliad.config import EngineConfig
from chiliad.core import AdapterUse, AdapterVersion, Chunk, Event, Failed, Request, SamplingParams
from chiliad.engine.engine import Engine
from chiliad.errors import InvalidRequest
from chiliad.kernels import load
from chiliad.models import load_model

Popularity = Literal["round-robin", "uniform", "zipf", "one"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the engine."""

    requests: int = 64
    concurrency: int = 32
    input_len: int = 64  # tokens
    output_len: int = 64  # tokens
    num_adapters: int = 0  # random ones to make, beside those of --adapters; none at all: base only
    rank: int = 16
    targets: str = "q_proj,k_proj,v_proj,o_proj"
    popularity: Popularity = "round-robin"
    alpha: float = 1.0  # of zipf: the i-th adapter is asked for in proportion to i ** -alpha
    seed: int = 0
    cold: bool = False  # do not load the adapters before the clock starts

    def picks(self, count: int) -> list[int]:
        """Which of `count` adapters each request takes."""
        rng = random.Random(self.seed)
        if self.popularity == "one":
            return [0] * self.requests
        if self.popularity == "round-robin":
            return [i % count for i in range(self.requests)]
        alpha = self.alpha if self.popularity == "zipf" else 0.0
        weights = [(i + 1) ** -alpha for i in range(count)]
        return rng.choices(range(count), weights, k=self.requests)


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(seconds: list[float]) -> Spread:
        if not seconds:
            return Spread(0, 0, 0, 0, 0)
        values = sorted(seconds)

        def at(q: float) -> float:
            return 1e3 * values[min(len(values) - 1, int(q * len(values)))]

        return Spread(1e3 * sum(values) / len(values), at(0.5), at(0.9), at(0.99), 1e3 * values[-1])


@dataclass(frozen=True, slots=True)
class Result:
    model: str
    dtype: str
    memory: int
    kernels: str
    workload: Workload
    adapters: int  # distinct ones that were asked for
    seconds: float
    input_tokens: int
    output_tokens: int
    steps: int
    distinct_per_step: float  # mean number of different adapters in a step
    preemptions: int
    evictions: int
    first_token: Spread
    between_tokens: Spread
    request: Spread

    @property
    def output_rate(self) -> float:
        return self.output_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        rates = {
            "output_tokens_per_second": self.output_rate,
            "total_tokens_per_second": (self.input_tokens + self.output_tokens) / self.seconds,
            "requests_per_second": self.workload.requests / self.seconds,
        }
        return asdict(self) | rates

    def as_text(self) -> str:
        w = self.workload
        lines = [
            f"{self.model}, {self.dtype}, {self.kernels}",
            f"{w.requests} requests, {w.concurrency} at a time, {w.input_len} tokens in, {w.output_len} out, "
            + (f"{self.adapters} adapters ({w.popularity})" if self.adapters else "base only"),
            "",
            f"{'time':<24}{self.seconds:10.2f} s",
            f"{'output throughput':<24}{self.output_rate:10.1f} tokens/s",
            f"{'total throughput':<24}{self.as_json()['total_tokens_per_second']:10.1f} tokens/s",
            f"{'requests':<24}{w.requests / self.seconds:10.2f} /s",
            f"{'steps':<24}{self.steps:10d}   {self.distinct_per_step:.1f} adapters each, "
            f"{self.preemptions} preemptions, {self.evictions} evictions",
            "",
            f"{'ms':<24}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
        ]
        for name, s in (
            ("time to first token", self.first_token),
            ("between tokens", self.between_tokens),
            ("whole request", self.request),
        ):
            lines.append(f"{name:<24}{s.mean:10.1f}{s.p50:10.1f}{s.p90:10.1f}{s.p99:10.1f}{s.max:10.1f}")
        return "\n".join(lines)


@contextmanager
def prepared(
    model: str, config: EngineConfig, workload: Workload, folders: tuple[Path, ...] = ()
) -> Iterator[Callable[[], Result]]:
    """Load everything; the function it gives runs the workload once and measures it."""
    kernels = load(config.kernel.kernels, config.kernel.isa, config.kernel.threads)
    base = load_model(model, kernels, config.dtype, config.max_model_len)
    registry = Registry(":memory:", base.info)
    for folder in folders:
        registry.scan(folder)
    events: list[Event] = []
    engine = Engine(base, kernels, registry, config, events.extend)
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(registry.close)
        if workload.input_len + workload.output_len > engine.max_model_len:
            raise InvalidRequest(f"input and output do not fit {engine.max_model_len} tokens: shorten them")
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="chiliad-bench-"))
        _make_adapters(registry, Path(scratch), workload)
        versions = [entry.adapter for entry in registry.page(limit=100_000)]
        loop = _Loop(engine, events, workload, versions)
        if not workload.cold:
            loop.warm_up()
        yield lambda: loop.run(base.name, config, kernels.name)


def _make_adapters(registry: Registry, folder: Path, workload: Workload) -> None:
    from chiliad.testing import write_random_adapter

    assert registry.base is not None
    targets: Any = workload.targets
    if targets != "all-linear":
        targets = tuple(part.strip() for part in targets.split(","))
    for i in range(workload.num_adapters):
        name = f"random-{i:05d}"
        write_random_adapter(folder / name, registry.base, workload.rank, targets, seed=i)
        registry.add(folder / name, name)


class _Loop:
    def __init__(
        self, engine: Engine, events: list[Event], workload: Workload, versions: list[AdapterVersion]
    ) -> None:
        self._engine, self._events, self._workload = engine, events, workload
        self._versions = versions
        self._picks = workload.picks(len(versions)) if versions else [-1] * workload.requests
        self._rng = random.Random(workload.seed)
        self._ids = itertools.count()

    def _request(self, pick: int, input_len: int, output_len: int) -> Request:
        vocab = self._engine.tokenizer.vocab_size
        return Request(
            id=str(next(self._ids)),
            prompt=tuple(self._rng.randrange(vocab) for _ in range(input_len)),
            params=SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True),
            adapters=() if pick < 0 else (AdapterUse(self._versions[pick]),),
            arrival=time.monotonic(),
        )

    def warm_up(self) -> None:
        """Two tokens from the base and from every adapter that the workload asks for."""
        for pick in {-1, *self._picks}:
            self._engine.submit(self._request(pick, 4, 2))
        while not self._engine.idle:
            if not self._engine.step():
                self._engine.wait(0.05)
        self._raise_failures()

    def _raise_failures(self) -> None:
        for event in self._events:
            if isinstance(event, Failed):
                raise event.error
        self._events.clear()

    def run(self, model: str, config: EngineConfig, kernels: str) -> Result:
        engine, workload, clock = self._engine, self._workload, time.perf_counter
        metrics = engine.metrics
        before = (metrics.steps, metrics.preemptions, sum(metrics.adapter_evictions.values()))
        distinct = metrics.batch_distinct_adapters
        distinct_before = (distinct.sum, distinct.count)
        picks = iter(self._picks)
        submitted: dict[str, float] = {}
        latest: dict[str, float] = {}
        first: list[float] = []
        between: list[float] = []
        whole: list[float] = []
        output_tokens = 0

        def submit_next() -> None:
            pick = next(picks, None)
            if pick is not None:
                request = self._request(pick, workload.input_len, workload.output_len)
                submitted[request.id] = clock()
                engine.submit(request)

        began = clock()
        for _ in range(workload.concurrency):
            submit_next()
        while not engine.idle:
            if not engine.step():
                engine.wait(0.05)
            now = clock()
            for event in self._events:
                request_id = event.request_id
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Chunk):
                    count = len(event.token_ids)
                    output_tokens += count
                    if request_id not in latest:
                        first.append(now - submitted[request_id])
                    elif count:
                        between.extend([(now - latest[request_id]) / count] * count)
                    latest[request_id] = now
                else:
                    whole.append(now - submitted[request_id])
                    submit_next()
            self._events.clear()
        seconds = clock() - began
        steps = metrics.steps - before[0]
        counted = distinct.count - distinct_before[1]
        return Result(
            model=model,
            dtype=config.dtype,
            memory=config.memory,
            kernels=kernels,
            workload=workload,
            adapters=len({pick for pick in self._picks if pick >= 0}),
            seconds=seconds,
            input_tokens=workload.requests * workload.input_len,
            output_tokens=output_tokens,
            steps=steps,
            distinct_per_step=(distinct.sum - distinct_before[0]) / counted if counted else 0.0,
            preemptions=metrics.preemptions - before[1],
            evictions=sum(metrics.adapter_evictions.values()) - before[2],
            first_token=Spread.of(first),
            between_tokens=Spread.of(between),
            request=Spread.of(whole),
        )
