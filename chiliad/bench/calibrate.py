"""Measure steps and loads of the real engine on random work, and fit a cost model to them."""

from __future__ import annotations

import platform
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chiliad.adapters.registry import Registry
from chiliad.bench.cost import CostModel, StepCost, contents, fit
from chiliad.config import EngineConfig
from chiliad.core import AdapterUse, AdapterVersion, Event, Failed, Request, SamplingParams, StepPlan
from chiliad.engine.engine import Engine
from chiliad.kernels import load
from chiliad.models import load_model

_CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
_RANKS = (8, 16, 32, 64)
_EPISODE = 30.0  # seconds after which a batch is given up


class _Recorder(Engine):
    """An engine that writes down what was in each step and how long it took, Python included."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.records: list[tuple[StepCost, float]] = []
        self._things: StepCost | None = None
        self._own = 0.0  # seconds that the recording itself took

    def step(self) -> bool:
        self._things, began = None, time.perf_counter()
        busy = super().step()
        if self._things is not None:
            self.records.append((self._things, time.perf_counter() - began - self._own))
        return busy

    def _compute(self, plan: StepPlan) -> None:
        began, page_bytes = time.perf_counter(), self.layout.page_bytes
        self._things = contents(plan, lambda version: self.store.pages_needed(version) * page_bytes)
        self._own = time.perf_counter() - began
        super()._compute(plan)


def calibrate(
    model: str, config: EngineConfig, seconds: float = 60.0, num_adapters: int = 32, seed: int = 0
) -> CostModel:
    """Run random batches of many sizes for about `seconds`, then fit.

    Batches differ in sequences, lengths, and in how many adapters of which ranks they mix; half
    of their requests come while the others decode, so that steps of all kinds occur. Adapters are
    loaded from files just written: from the page cache, not from a cold disk.
    """
    kernels = load(config.kernel.kernels, config.kernel.isa, config.kernel.threads)
    base = load_model(model, kernels, config.dtype, config.max_model_len)
    registry = Registry(":memory:", base.info)
    events: list[Event] = []
    engine = _Recorder(base, kernels, registry, config, events.extend)
    with ExitStack() as stack:
        stack.callback(registry.close)
        stack.callback(engine.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chiliad-calibrate-")))
        versions = _write_adapters(registry, folder, num_adapters)
        rng = random.Random(seed)
        _batch(engine, rng, versions, events)  # first touch of pages, lazy imports
        engine.records.clear()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            _batch(engine, rng, versions, events)
        step, error = fit(engine.records)
        loads = [engine.store.status(version) for version in versions]
        times = [(v.nbytes, s["load_seconds"]) for v, s in zip(versions, loads, strict=True) if s["loads"]]
    load_seconds, load_bandwidth = _fit_loads(np.array(times, np.float64).reshape(-1, 2))
    return CostModel(
        step=step,
        load_seconds=load_seconds,
        load_bandwidth=load_bandwidth,
        request_seconds=2e-3,  # a connection, a body and a hand-over; small beside a step
        weights_bytes=base.nbytes,
        model=base.name,
        dtype=config.dtype,
        machine=f"{platform.machine()}, {kernels.name}: {kernels.reason}",
        records=len(engine.records),
        error={key: round(value, 4) for key, value in error.items()},
    )


def _write_adapters(registry: Registry, folder: Path, count: int) -> list[AdapterVersion]:
    from chiliad.testing import write_random_adapter

    assert registry.base is not None
    for i in range(count):
        name = f"random-{i:03d}"
        write_random_adapter(folder / name, registry.base, _RANKS[i % len(_RANKS)], "all-linear", seed=i)
        registry.add(folder / name, name)
    return [entry.adapter for entry in registry.page(limit=count)]


def _batch(
    engine: _Recorder, rng: random.Random, versions: list[AdapterVersion], events: list[Event]
) -> None:
    """One batch of requests from start to end."""
    room = engine.max_model_len
    most = max(2, min(rng.choice((32, 128, 512)), room // 2))
    pool = rng.choice(([], versions[:1], rng.sample(versions, max(1, len(versions) // 4)), versions))
    vocab = engine.tokenizer.vocab_size
    requests = []
    for i in range(rng.choice(_CONCURRENCY)):
        version = rng.choice(pool) if pool else None
        requests.append(
            Request(
                id=f"{len(engine.records)}-{i}",
                prompt=tuple(rng.randrange(vocab) for _ in range(rng.randint(1, most))),
                params=SamplingParams(
                    max_tokens=rng.randint(2, min(48, room - most)), temperature=0.0, ignore_eos=True
                ),
                adapters=() if version is None else (AdapterUse(version),),
                arrival=time.monotonic(),
            )
        )
    deadline = time.perf_counter() + _EPISODE
    for request in requests[: (len(requests) + 1) // 2]:
        engine.submit(request)
    late = requests[(len(requests) + 1) // 2 :]
    while (late or not engine.idle) and time.perf_counter() < deadline:
        if late and rng.random() < 0.3:
            engine.submit(late.pop())
        if not engine.step():
            engine.wait(0.01)
    for request in requests:
        engine.cancel(request.id)
    engine.step()
    failed = next((event for event in events if isinstance(event, Failed)), None)
    events.clear()
    if failed is not None:
        raise failed.error


def _fit_loads(loads: np.ndarray) -> tuple[float, float]:
    """(seconds whatever the size, bytes per second) from rows of (bytes, seconds)."""
    if not len(loads):
        return 5e-3, 1e9
    nbytes, seconds = loads.T
    spread = ((nbytes - nbytes.mean()) ** 2).sum()
    slope = ((nbytes - nbytes.mean()) * (seconds - seconds.mean())).sum() / spread if spread else 0.0
    if slope <= 0:
        return float(np.median(seconds)), 1e12
    base = float(np.median(seconds - slope * nbytes))
    if base < 0:
        return 0.0, float(1 / np.median(seconds / nbytes))
    return base, float(1 / slope)


def as_text(cost: CostModel) -> str:
    step = msgspec.structs.asdict(cost.step)
    units = {
        "step": ("a step", 1e3, "ms"),
        "decode_rows": ("a decoding sequence", 1e6, "us"),
        "prefill_tokens": ("a prompt token", 1e6, "us"),
        "adapter_bytes": ("a megabyte of adapters", 1e12, "us"),
        "adapter_work": ("a megabyte times a token", 1e12, "us"),
        "context_read": ("a thousand tokens of context", 1e9, "us"),
        "prefill_context": ("a million pairs of prompt", 1e12, "us"),
    }
    lines = [f"{cost.model} {cost.dtype}, {cost.machine}", f"fitted to {cost.records} steps", ""]
    for key, (name, factor, unit) in units.items():
        lines.append(f"{name:<30}{step[key] * factor:12.3f} {unit}")
    bandwidth = f"{cost.load_bandwidth / 1e6:.0f} MB/s"
    lines.append(f"{'loading an adapter':<30}{cost.load_seconds * 1e3:12.3f} ms + its file at {bandwidth}")
    lines.append("")
    lines.append(
        f"error on held-out steps: median {cost.error.get('median_relative', 0):.1%}, "
        f"p90 {cost.error.get('p90_relative', 0):.1%}, in total {cost.error.get('total_relative', 0):+.1%}; "
        f"{cost.error.get('disturbed', 0):.1%} of the steps were disturbed"
    )
    return "\n".join(lines)
