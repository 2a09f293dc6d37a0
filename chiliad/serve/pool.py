"""GET /v1/pool: who has the memory, who waits for it, and how mixed the batches are."""

from __future__ import annotations

from typing import Any

from chiliad.config import SchedulerConfig
from chiliad.observe import EngineStats


def pool_map(stats: EngineStats, settings: SchedulerConfig) -> dict[str, Any]:
    """One look at the engine as JSON. The pages of `pages` sum to `pages_total`."""
    engine, steps = stats.metrics, stats.metrics.batch_distinct_adapters
    return {
        "object": "pool",
        "pages_total": stats.pages_total,
        "page_bytes": stats.page_bytes,
        "pages": {use: stats.pages.get(use, 0) for use in ("free", "kv", "prefix", "adapter", "pinned")},
        "swap_pages": dict(zip(("used", "total"), stats.swap_pages, strict=True)),
        "adapters": {
            "registered": stats.adapters_registered,
            "resident": stats.adapters_resident,
            "loading": stats.adapters_loading,
            "pinned": stats.adapters_pinned,
            "idle_pages": stats.adapter_pages_idle,
            "loads": sum(engine.adapter_loads.values()),
            "failed_loads": engine.adapter_loads["error"],
            "evictions": engine.adapter_evictions["memory"],
            "hits": engine.adapter_hits,
            "misses": engine.adapter_misses,
        },
        "queue": {
            "policy": settings.policy,
            "waiting": stats.waiting,
            "max_waiting": settings.max_waiting,
            "oldest_seconds": stats.oldest_wait,
            "adapters": list(stats.waiting_adapters),
        },
        "batch": {
            "running": stats.running,
            "max_sequences": settings.max_sequences,
            "distinct_adapters": stats.distinct_adapters,
            "mean_distinct_adapters": steps.mean,
            "adapters": list(stats.running_adapters),
            "preemptions": engine.preemptions,
            "preemptions_swapped": engine.swaps,
        },
        "prefix_cache": {"queries": engine.prefix_queries, "hits": engine.prefix_hits},
    }
