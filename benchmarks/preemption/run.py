"""A sequence has to make room for others: is its KV cache better copied away, or computed again?

    python benchmarks/preemption/run.py

First what either costs: blocks of the real cache are copied to swap and back, prompts of the same
lengths are computed. Then four ways to serve the same requests on one small pool, in turns: with and
without swap, with and without the prefix cache (which keeps a preempted sequence's full blocks as
long as nobody needs their pages). Most answers end early and a few are long, so that admission by
forecast is too hopeful now and then.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Drive, Report, arguments, drive, kv_bytes, median, say

from chiliad.memory.pool import Owner

PROMPT, SHORT, LONG = (32, 256), 16, 512  # tokens; one answer in five is long


def copy_cost(driver: Drive, tokens: int, times: int) -> dict[str, float]:
    """Seconds to copy that many tokens' blocks out and back, and to compute as many of a prompt."""
    engine = driver.engine
    swap, layout = engine.scheduler._swap, engine.layout
    assert swap is not None
    blocks = -(-tokens // layout.block_tokens)
    out, back, compute = [], [], []
    for _ in range(times + 1):  # the first time touches fresh memory
        pages = engine.pool.alloc(blocks * layout.num_layers, Owner.KV)
        table = pages.reshape(blocks, layout.num_layers)
        began = time.perf_counter()
        places = swap.save(table)
        saved = time.perf_counter()
        swap.restore(places, table)
        back.append(time.perf_counter() - saved)
        out.append(saved - began)
        swap.free(places)
        engine.pool.free(pages)
        compute.append(driver.one(None, tokens, 1).first)
    return {
        "bytes": blocks * layout.num_layers * layout.page_bytes,
        "fresh_out": out[0],
        "out": median(out[1:]),
        "back": median(back[1:]),
        "compute": median(compute[1:]),
        "compute_over_swap": median(compute[1:]) / (median(out[1:]) + median(back[1:])),
    }


def serve(driver: Drive, count: int, clients: int, prefix_cache: bool) -> dict[str, float]:
    """The requests once, `clients` at a time."""
    rng = random.Random(5)
    driver.rng.seed(5)
    sizes = [(rng.randint(*PROMPT), LONG if rng.random() < 0.2 else SHORT) for _ in range(count)]
    metrics = driver.engine.metrics
    before = (metrics.preemptions, metrics.swaps, metrics.prompt_tokens)

    def send(i: int) -> str:
        prompt, output = sizes[i]
        return driver.submit(None, prompt, output, allowed=LONG, prefix_cache=prefix_cache)

    began = time.perf_counter()
    timings = driver.closed(clients, count, send)
    seconds = time.perf_counter() - began
    errors = [timing.error for timing in timings if timing.error is not None]
    if errors:
        raise errors[0]
    assert [len(timing.times) for timing in timings] == [output for _, output in sizes]
    driver.check_empty()
    gaps = np.concatenate([np.diff(timing.times) for timing in timings])
    return {
        "output_tokens_per_second": sum(output for _, output in sizes) / seconds,
        "preemptions": metrics.preemptions - before[0],
        "kept_in_swap": metrics.swaps - before[1],
        "computed_again": metrics.prompt_tokens - before[2] - sum(prompt for prompt, _ in sizes),
        "p99_itl_ms": 1e3 * float(np.quantile(gaps, 0.99)),
        "max_itl_ms": 1e3 * float(gaps.max()),
    }


def main() -> None:
    quick: dict[str, Any] = {"requests": 14, "clients": 12, "rounds": 0, "pool_tokens": 1536}
    args = arguments(__doc__, quick=quick, requests=120, clients=48, rounds=3, pool_tokens=6144)
    report = Report("Preemption by swap, or by computing again?", args)
    with ExitStack() as stack:

        def engine(swap: int) -> Drive:
            return stack.enter_context(
                drive(args, lambda model: kv_bytes(model, args.pool_tokens), swap=swap)
            )

        drivers = {"recompute": engine(0), "swap": engine(2 * 10**9)}
        token = kv_bytes(drivers["swap"].engine.model, 1)
        report.result["kv_bytes_per_token"] = token
        times = 2 if args.quick else 7
        for tokens in (64, 256, 1024):
            cost = report.result[f"{tokens} tokens"] = copy_cost(drivers["swap"], tokens, times)
            rates = [cost["bytes"] / 1e9 / cost[way] for way in ("fresh_out", "out", "back")]
            say(
                f"{tokens} tokens: out {rates[0]:.2f} GB/s at first, then {rates[1]:.1f}, back "
                f"{rates[2]:.1f}; computing takes {cost['compute_over_swap']:.1f} times as long"
            )
        runs: dict[str, list[dict[str, float]]] = {}
        for number in range(args.rounds + 1):
            for prefix_cache in (False, True):
                for name, driver in drivers.items():
                    key = f"{name}, prefix cache {'on' if prefix_cache else 'off'}"
                    figures = serve(driver, args.requests, args.clients, prefix_cache)
                    if number or args.quick:  # the first round warms up
                        runs.setdefault(key, []).append(figures)
                        say(f"{key}: {figures}")
        about = drivers["swap"].about
    for key, each in runs.items():
        report.result[key] = {name: median([figures[name] for figures in each]) for name in each[0]}
    for cache in ("off", "on"):
        ways = [report.result[f"{way}, prefix cache {cache}"] for way in ("swap", "recompute")]
        gain = ways[0]["output_tokens_per_second"] / ways[1]["output_tokens_per_second"]
        report.target(f"swap over recompute, prefix cache {cache}", gain, 0.97, ">=")
    report.write(about)


if __name__ == "__main__":
    main()
