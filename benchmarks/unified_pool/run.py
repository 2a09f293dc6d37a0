"""Is one pool for adapters and KV cache better than two? Unified against static splits, on three workloads.

    python benchmarks/unified_pool/run.py

The same requests, all there from the start, served by engines that differ in nothing but
`adapter_share`; the figure is the rate at which they are done. Engines take turns.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Drive, Model, Report, adapter_bytes, arguments, drive, median, say, scratch

RANK = 32
SPLITS = (0.1, 0.3, 0.5)  # share of the pool that adapters get
Item = tuple[int, int, int]  # adapter, prompt and output tokens


def adapter_heavy(count: int, adapters: int, rng: random.Random) -> list[Item]:
    """Short questions to many adapters, all equally likely."""
    return [(rng.randrange(adapters), rng.randint(8, 32), rng.randint(8, 24)) for _ in range(count)]


def kv_heavy(count: int, adapters: int, rng: random.Random) -> list[Item]:
    """Long contexts, few adapters."""
    return [
        (rng.randrange(min(2, adapters)), rng.randint(300, 500), rng.randint(48, 96)) for _ in range(count)
    ]


def alternating(count: int, adapters: int, rng: random.Random) -> list[Item]:
    """One after the other, twice."""
    few = max(1, count // 8)
    many = count // 2 - few
    return [
        item for _ in range(2) for item in kv_heavy(few, adapters, rng) + adapter_heavy(many, adapters, rng)
    ]


def serve(driver: Drive, adapters: list[Any], items: list[Item], clients: int) -> dict[str, Any]:
    """All items through a closed loop of `clients`, with what the pool held meanwhile."""
    engine = driver.engine
    before = engine.metrics.adapter_loads["ok"], engine.metrics.preemptions
    steps, waiting, kv, running = 0, list(reversed(items)), [], []
    began = time.perf_counter()
    in_flight = 0
    while waiting or not engine.idle:
        while waiting and in_flight < clients:
            adapter, prompt, output = waiting.pop()
            driver.submit(adapters[adapter], prompt, output)
            in_flight += 1
        for request in driver.step():
            error = driver.timings.pop(request).error
            if error is not None:
                raise error
            in_flight -= 1
        steps += 1
        kv.append(engine.pool.usage()["kv"])
        running.append(len(engine.scheduler.running))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens_per_second": sum(prompt + output for _, prompt, output in items) / seconds,
        "loads": engine.metrics.adapter_loads["ok"] - before[0],
        "preemptions": engine.metrics.preemptions - before[1],
        "largest_kv_share": max(kv) / engine.pool.num_pages,
        "mean_running": sum(running) / len(running),
    }


def main() -> None:
    args = arguments(
        __doc__,
        quick={"adapters": 16, "fit": 12, "requests": 12, "long": 4, "rounds": 1},
        adapters=64,
        fit=42,
        clients=48,
        requests=96,
        long=28,
        rounds=2,
    )
    report = Report("Is one pool for adapters and KV cache better than two?", args)
    counts = {adapter_heavy: args.requests, kv_heavy: args.long, alternating: args.requests}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with scratch(args) as root, ExitStack() as stack:
        drivers: dict[str, tuple[Drive, list[Any]]] = {}

        def room(model: Model) -> int:
            return int(args.fit * adapter_bytes(model, RANK))

        for share in (None, *SPLITS):
            driver = stack.enter_context(drive(args, room, adapter_share=share))
            if share is None:
                versions = driver.add(root / "adapters", args.adapters, RANK, linked=True)
            else:
                driver.engine.registry.scan(root / "adapters")
                versions = [driver.engine.registry.resolve(v.name) for v in versions]
            drivers["unified" if share is None else f"split {share:.0%}"] = driver, versions
        driver, versions = drivers["unified"]
        each = driver.engine.store.pages_needed(versions[0])
        report.result |= {
            "pool_pages": driver.engine.pool.num_pages,
            "adapters": args.adapters,
            "adapter_pages": each,
            "fit": driver.engine.pool.num_pages // each,
            "kv_tokens": driver.engine.pool.num_pages
            // driver.engine.layout.num_layers
            * driver.engine.layout.block_tokens,
        }
        for i in range(args.rounds):
            for make, count in counts.items():
                items = make(count, args.adapters, random.Random(i))
                for name in random.Random(i).sample(list(drivers), len(drivers)):
                    driver, versions = drivers[name]
                    found = serve(driver, versions, items, args.clients)
                    driver.check_empty()
                    runs.setdefault(make.__name__, {}).setdefault(name, []).append(found)
                    say(f"{make.__name__:14s} {name:10s} {found['tokens_per_second']:8.1f} tokens/s, "
                        f"{found['loads']} loads, {found['mean_running']:.1f} running")  # fmt: skip
        about = driver.about
    table: dict[str, Any] = {}
    for workload, by_engine in runs.items():
        table[workload] = {
            name: {key: median([run[key] for run in found]) for key in found[0]}
            for name, found in by_engine.items()
        }
    report.result["workloads"] = table
    rates = {w: {name: t["tokens_per_second"] for name, t in lines.items()} for w, lines in table.items()}
    over_all = dict.fromkeys(drivers, 1.0)
    for workload, by_engine in rates.items():
        best = max((rate, name) for name, rate in by_engine.items() if name != "unified")
        report.result["workloads"][workload]["best_split"] = best[1]
        report.target(
            f"{workload}: unified / best split ({best[1]})", by_engine["unified"] / best[0], 0.97, ">="
        )
        for name in drivers:
            over_all[name] *= by_engine[name] ** (1 / len(rates))
    report.result["geometric_mean"] = over_all
    best_rate = max(rate for name, rate in over_all.items() if name != "unified")
    report.target("all workloads: unified / best single split", over_all["unified"] / best_rate, 1.0, ">=")
    freed = table["kv_heavy"]["unified"]["largest_kv_share"]
    report.result["kv_share_when_adapters_idle"] = freed
    report.write(about)


if __name__ == "__main__":
    main()
