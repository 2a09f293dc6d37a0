"""Counters and histograms as plain values. Who measures writes them, `serve.metrics` exports them.

Each object has one writing thread; readers may be any thread and may lag one observation.
Nothing is ever labelled by adapter: ten thousand adapters are ten thousand series. What one
adapter did is asked of the store (`adapter_status`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

#: Bucket bounds of vLLM's latency histograms, so that existing dashboards read ours.
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
                   240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
                       10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
                 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
POWERS_OF_TWO = tuple(float(2**i) for i in range(16))  # 1 .. 32768


class Histogram:
    """Counts of values by upper bound; the last bucket has none."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        count = self.count
        return self.sum / count if count else 0.0

    def quantile(self, q: float) -> float:
        """Estimate of the q-quantile, linear inside a bucket; the last bound if it lies beyond."""
        counts = list(self.counts)
        rank, low = q * sum(counts), 0.0
        for bound, count in zip(self.bounds, counts, strict=False):
            if count and rank <= count:
                return low + (bound - low) * rank / count
            rank, low = rank - count, bound
        return low if any(counts) else 0.0


@dataclass(slots=True)
class EngineMetrics:
    """What the engine thread counts (the store counts its own part on the same thread)."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt tokens computed; a preempted sequence computes some twice
    generation_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0  # preemptions that kept their KV in swap
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    adapter_hits: int = 0  # a sequence started and its adapter was resident
    adapter_misses: int = 0
    adapter_loads: dict[str, int] = field(default_factory=lambda: {"ok": 0, "error": 0})  # by result
    adapter_evictions: dict[str, int] = field(  # by reason
        default_factory=lambda: {"memory": 0, "removed": 0}
    )
    step_seconds: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(POWERS_OF_TWO))
    batch_distinct_adapters: Histogram = field(default_factory=lambda: Histogram(POWERS_OF_TWO))
    adapter_load_seconds: Histogram = field(default_factory=lambda: Histogram(LOAD_SECONDS))


@dataclass(slots=True)
class RequestMetrics:
    """What the front end counts: latencies as a client meets them."""

    finished: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )  # choices by finish reason; "error" counts requests
    prompt_tokens: int = 0
    generation_tokens: int = 0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    token_seconds: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))  # between tokens
    request_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prefill_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    decode_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine between two steps."""

    running: int  # sequences in the batch
    waiting: int  # sequences in the queue
    pages_total: int
    pages: dict[str, int]  # pages by use: "free", "kv", "prefix" (idle), "adapter", "pinned"
    page_bytes: int
    adapters_registered: int
    adapters_resident: int
    adapters_loading: int
    adapters_pinned: int
    adapter_pages_idle: int  # of pages["adapter"]: room for whoever needs it
    swap_pages: tuple[int, int]  # used and in all, beyond the pool
    distinct_adapters: int  # in the batch now
    oldest_wait: float  # seconds that the first of the queue has waited; 0 if nobody does
    running_adapters: tuple[str, ...]  # names, busiest first; may be cut short
    waiting_adapters: tuple[str, ...]
    metrics: EngineMetrics
    error: str = ""  # set when the engine thread has died

    @property
    def kv_usage(self) -> float:
        """Share of the pool that sequences hold now, 0 to 1."""
        return self.pages.get("kv", 0) / self.pages_total if self.pages_total else 0.0
