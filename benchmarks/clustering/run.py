"""Does it help to prefer requests whose adapter already runs?

    python benchmarks/clustering/run.py --threads 1

A real server over HTTP whose pool has room for about sixty of two hundred adapters, near its
capacity: first come first served against S-LoRA's clustering at most d distinct adapters, evenly and
in bursts. The two take turns, with a trace of its own in each round: near capacity a machine that
is a tenth slower for a minute doubles the waits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Report,
    arguments,
    base_info,
    capacity,
    client,
    plot_waits,
    say,
    scratch,
    served,
    write_adapters,
)

from chiliad.bench.report import Outcome
from chiliad.bench.serve import run
from chiliad.bench.workload import Trace, synthetic

ADAPTERS, RANK, MEMORY = 200, 16, "650MB"
KEPT = (
    "completed",
    "request_throughput",
    "output_throughput",
    "slo_attainment",
    "satisfaction",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "max_ttft_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
)


def trace_of(rate: float, seconds: float, cv: float, seed: int = 2) -> Trace:
    return synthetic(
        rate=rate,
        duration=seconds,
        adapters=ADAPTERS,
        cv=cv,
        popularity="zipf:1",
        prompt=(8, 128),
        output=(8, 64),
        seed=seed,
    )


def main() -> None:
    args = arguments(
        __doc__,
        quick={"seconds": 6.0, "slo": 1.0, "rounds": 1},
        seconds=60.0, slo=4.0, distinct=8, load=1.0, rounds=3,
    )  # fmt: skip
    report = Report("Does adapter clustering help?", args)
    curves: dict[str, list[Outcome]] = {}
    with scratch(args) as folder:
        write_adapters(folder / "adapters", base_info(args.model, args.dtype), ADAPTERS, RANK, linked=True)
        with served(args, folder / "adapters", "--memory", MEMORY) as target:
            asker = client(args, target)
            capacity(asker, trace_of(30.0, 2.0, 1.0))
            rate = capacity(asker, trace_of(20.0, 2.0 if args.quick else 30.0, 1.0))
        report.result["capacity"] = rate
        say(f"capacity: {rate:.2f} requests/s")
        policies = ("fcfs", f"cluster:{args.distinct}")
        rounds: dict[str, list[dict[str, float]]] = {}
        for i in range(args.rounds):
            for cv in (1.0, 4.0):
                trace = trace_of(args.load * rate, args.seconds, cv, seed=2 + i)
                for policy in policies if i % 2 == 0 else policies[::-1]:
                    name = f"{policy}, cv {cv:g}"
                    with served(args, folder / "adapters", "--memory", MEMORY, "--policy", policy) as target:
                        asker = client(args, target, max_seconds=6 * args.seconds)
                        capacity(asker, trace_of(30.0, 2.0, 1.0))  # a warm pool
                        outcomes, result = run(asker, trace, args.slo)
                    curves.setdefault(name, []).extend(outcomes)
                    counters = result["server"]["counters"]
                    found = {key: result[key] for key in KEPT} | {
                        "requests": len(trace),
                        "mean_distinct_adapters": result["server"]["mean_distinct_adapters"],
                        "adapter_hit_rate": result["server"]["adapter_hit_rate"],
                        "adapter_loads": sum(v for k, v in counters.items() if k.startswith("adapter_loads")),
                    }
                    rounds.setdefault(name, []).append(found)
                    say(f"{name}: {found}")
    for name, found_ones in rounds.items():
        report.result[name] = {key: fmean(one[key] for one in found_ones) for key in found_ones[0]}
    gains = {}
    for cv in (1, 4):
        plain, clustered = (report.result[f"{policy}, cv {cv}"] for policy in policies)
        gains[cv] = plain["mean_ttft_ms"] / clustered["mean_ttft_ms"]
        report.result[f"gain, cv {cv}"] = {
            "throughput": clustered["request_throughput"] / plain["request_throughput"],
            "mean_ttft": gains[cv],
            "median_ttft": plain["median_ttft_ms"] / clustered["median_ttft_ms"],
            "mean_ttft_by_round": [
                one["mean_ttft_ms"] / other["mean_ttft_ms"]
                for one, other in zip(*(rounds[f"{policy}, cv {cv}"] for policy in policies), strict=True)
            ],
            "loads_saved": 1 - clustered["adapter_loads"] / max(1.0, plain["adapter_loads"]),
        }
    report.target("mean TTFT, fcfs over clustered, cv 4", gains[4], 1.0, ">=")
    report.target("mean TTFT, fcfs over clustered, cv 1", gains[1], 0.95, ">=")
    if not args.quick:
        plot_waits(Path(__file__).with_name("result.svg"), curves, ("cv 1", "cv 4"), args.slo)
    report.write()


if __name__ == "__main__":
    main()
