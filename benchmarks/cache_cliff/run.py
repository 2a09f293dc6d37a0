"""What happens when more adapters are in use than fit the pool? Time to first token by that ratio.

    python benchmarks/cache_cliff/run.py

Two loads: requests that arrive at random (an open loop), and a crowd that never lets up (a closed
loop). Each request picks one of the active adapters, all equally likely: the worst for any cache.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Drive,
    Model,
    Report,
    Timing,
    adapter_bytes,
    arguments,
    drive,
    kv_bytes,
    median,
    quantile,
    say,
    scratch,
)

RANK = 16
PROMPT, OUTPUT = 64, 16  # tokens
RATIOS = (0.5, 1.0, 1.5, 2.0, 4.0)  # active adapters / adapters that fit


def measure(driver: Drive, active: list[Any], args: Any, seed: int) -> dict[str, Any]:
    """Both loads on these adapters, from a pool that has met them all."""
    metrics, rng = driver.engine.metrics, random.Random(seed)
    driver.touch(active, at_once=32)

    def send(_: int) -> str:
        return driver.submit(rng.choice(active), PROMPT, OUTPUT)

    results: dict[str, Any] = {}
    for name in ("arriving", "crowded"):
        hits, misses = metrics.adapter_hits, metrics.adapter_misses
        timings: list[Timing]
        if name == "arriving":
            timings = driver.poisson(args.rate, args.requests, send, seed)
        else:
            timings = driver.closed(args.clients, args.requests, send)
        begun = metrics.adapter_hits - hits + metrics.adapter_misses - misses
        results[name] = {
            "first_token": [timing.first for timing in timings],
            "seconds": max(t.ended for t in timings) - min(t.submitted for t in timings),
            "hit_rate": (metrics.adapter_hits - hits) / begun,
        }
    return results


def main() -> None:
    args = arguments(
        __doc__,
        quick={"fit": 8, "requests": 8, "rounds": 1},
        fit=32,
        rate=4.0,
        clients=16,
        requests=32,
        rounds=2,
    )
    report = Report("What happens when more adapters are in use than fit the pool?", args)
    with scratch(args) as root:

        def room(model: Model) -> int:
            tokens = args.clients * (PROMPT + OUTPUT + 32)
            return int(1.05 * args.fit * adapter_bytes(model, RANK)) + kv_bytes(model, tokens)

        with drive(args, room) as driver:
            engine = driver.engine
            adapters = driver.add(root / "adapters", round(1.1 * max(RATIOS) * args.fit), RANK, linked=False)
            each = engine.store.pages_needed(adapters[0])
            blocks = args.clients * -(-(PROMPT + OUTPUT) // engine.layout.block_tokens)
            fit = (engine.pool.num_pages - blocks * engine.layout.num_layers) // each
            report.result |= {
                "pool_pages": engine.pool.num_pages,
                "adapter_pages": each,
                "adapter_bytes": each * engine.layout.page_bytes,
                "fit": fit,
            }
            counts = {ratio: max(1, min(len(adapters), round(ratio * fit))) for ratio in RATIOS}
            runs: dict[float, list[dict[str, Any]]] = {ratio: [] for ratio in RATIOS}
            measure(driver, adapters[: counts[1.0]], args, 99)  # not counted
            for i in range(args.rounds):
                for ratio in random.Random(i).sample(RATIOS, len(RATIOS)):
                    runs[ratio].append(measure(driver, adapters[: counts[ratio]], args, i))
            driver.check_empty()
            metrics, about = engine.metrics, driver.about
            report.result["loads"] = metrics.adapter_loads["ok"]
            report.result["load_seconds"] = metrics.adapter_load_seconds.mean
            report.result["preemptions"] = metrics.preemptions
    for name in ("arriving", "crowded"):
        lines = []
        for ratio in RATIOS:
            firsts = [x for run in runs[ratio] for x in run[name]["first_token"]]
            seconds = sum(run[name]["seconds"] for run in runs[ratio])
            line = {
                "active_to_fit": ratio,
                "active": counts[ratio],
                "hit_rate": sum(run[name]["hit_rate"] for run in runs[ratio]) / args.rounds,
                "median_first_token": median(firsts),
                "p90_first_token": quantile(firsts, 0.9),
                "requests_per_second": len(firsts) / seconds,
            }
            say(
                f"{name} {ratio:3.1f}x: hits {line['hit_rate']:.2f}, first token {1e3 * median(firsts):6.1f} ms, "
                f"p90 {1e3 * line['p90_first_token']:6.1f} ms, {line['requests_per_second']:5.2f} requests/s"
            )
            lines.append(line)
        report.result[name] = lines
        at = {line["active_to_fit"]: line["median_first_token"] for line in lines}
        report.target(f"{name}: median first token at 2x / at 1x", at[2.0] / at[1.0], 3.0)
    report.write(about)


if __name__ == "__main__":
    main()
