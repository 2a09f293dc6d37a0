"""GET /metrics: vLLM's names where vLLM has one, our own for adapters. No label names an adapter.

(`vllm:lora_requests_info` does by contract: gateways route by it. It is one series, cut at 64
names.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from chiliad.observe import EngineStats, Histogram, RequestMetrics

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_NAMES = 64


class Exporter:
    """Renders one look at the engine together with the front end's own counts."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)

    def render(self, stats: EngineStats, requests: RequestMetrics) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Once(self._families(stats, requests)))
        return generate_latest(registry) + generate_latest(self._process)

    def _families(self, stats: EngineStats, requests: RequestMetrics) -> Iterator[Metric]:
        engine = stats.metrics
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences in the queue", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the pool held by sequences", stats.kv_usage)
        yield self._counter(
            "vllm:prompt_tokens", "Prompt tokens of answered requests", requests.prompt_tokens
        )
        yield self._counter("vllm:generation_tokens", "Tokens generated", engine.generation_tokens)
        yield self._counters(
            "vllm:request_success",
            "Choices that ended, by reason",
            "finished_reason",
            {reason: n for reason, n in requests.finished.items() if reason != "error"},
        )
        yield self._counter("vllm:num_preemptions", "Sequences sent back to the queue", engine.preemptions)
        yield self._counter("preemptions_swapped", "Those that kept their KV cache in swap", engine.swaps)
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up", engine.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found", engine.prefix_hits)
        yield self._histogram(
            "vllm:time_to_first_token_seconds", "Time to first token", requests.first_token_seconds
        )
        yield self._histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens", requests.token_seconds
        )
        yield self._histogram(
            "vllm:e2e_request_latency_seconds", "Time from request to last token", requests.request_seconds
        )
        yield self._histogram("vllm:request_queue_time_seconds", "Time in the queue", requests.queue_seconds)
        yield self._histogram(
            "vllm:request_prefill_time_seconds", "Time in prefill", requests.prefill_seconds
        )
        yield self._histogram("vllm:request_decode_time_seconds", "Time in decode", requests.decode_seconds)
        yield self._histogram("vllm:iteration_tokens_total", "Tokens of one step", engine.step_tokens)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters at work (value: unix time)",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running = ",".join(stats.running_adapters[:MAX_NAMES])
        waiting = ",".join(stats.waiting_adapters[:MAX_NAMES])
        info.add_metric((str(stats.adapters_registered), running, waiting), time.time())
        yield info

        yield self._counter("request_errors", "Requests that ended with an error", requests.finished["error"])
        yield self._counter("engine_steps", "Steps of the engine", engine.steps)
        yield self._histogram("engine_step_seconds", "Time of one step", engine.step_seconds)
        yield self._gauges("pool_pages", "Pages of the memory pool by owner", "owner", self._pages(stats))
        yield self._gauge("pool_page_bytes", "Size of a page", stats.page_bytes)
        yield self._gauge("adapters_registered", "Adapters known by name", stats.adapters_registered)
        yield self._gauges(
            "adapters_resident", "Adapters in memory", "tier", {"ram": stats.adapters_resident}
        )
        yield self._gauge("adapters_loading", "Adapters being loaded now", stats.adapters_loading)
        loads = CounterMetricFamily(
            "adapter_loads", "Adapter loads", labels=(*self._labels, "tier", "result")
        )
        for result, count in engine.adapter_loads.items():
            loads.add_metric((*self._labels.values(), "ram", result), count)
        yield loads
        yield self._histogram(
            "adapter_load_seconds", "Time to load an adapter", engine.adapter_load_seconds, tier="ram"
        )
        yield self._counters(
            "adapter_evictions", "Adapters dropped from memory", "reason", engine.adapter_evictions
        )
        yield self._counter("adapter_cache_hits", "Starts whose adapter was resident", engine.adapter_hits)
        yield self._counter("adapter_cache_misses", "Starts whose adapter was not", engine.adapter_misses)
        yield self._histogram(
            "batch_distinct_adapters", "Different adapters in one step", engine.batch_distinct_adapters
        )

    @staticmethod
    def _pages(stats: EngineStats) -> dict[str, float]:
        used = {owner: float(pages) for owner, pages in stats.pages.items() if owner != "free"}
        return used | {"free": stats.pages_total - sum(used.values())}

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=(*self._labels, label))
        for key, value in values.items():
            family.add_metric((*self._labels.values(), key), value)
        return family

    def _counters(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*self._labels, label))
        for key, value in values.items():
            family.add_metric((*self._labels.values(), key), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram, **labels: str) -> Metric:
        family = HistogramMetricFamily(name, text, labels=(*self._labels, *labels))
        counts, buckets, total = list(histogram.counts), [], 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric((*self._labels.values(), *labels.values()), buckets, histogram.sum)
        return family


class _Once(Collector):
    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families

    def describe(self) -> list[Metric]:
        return []
