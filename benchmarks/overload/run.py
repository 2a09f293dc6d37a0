"""More requests than the machine can take: who still gets an answer in time?

    python benchmarks/overload/run.py --threads 1

A real server over HTTP, 32 adapters, and 1.5 times the requests it can serve, evenly and in bursts:
first come first served against early abort. Then one tenant that sends ten times as much as each of
ten others: what the others' first tokens take without it, beside it under first come first served,
and beside it under VTC. The client runs on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Report,
    arguments,
    base_info,
    capacity,
    client,
    plot_waits,
    quantile,
    say,
    scratch,
    served,
    write_adapters,
)

from chiliad.bench.report import Outcome
from chiliad.bench.serve import run
from chiliad.bench.workload import Trace, synthetic

ADAPTERS, RANK = 32, 16
OTHERS, FLOOD = 10, "tenant-00"  # the flood sends ten times as much as each of the others
KEYS = tuple(f"key-{i:02d}" for i in range(OTHERS + 1))
SHORTER = ("--max-sequences", "24", "--max-step-tokens", "256")  # steps are what a newcomer waits for
KEPT = (
    "num_prompts",
    "completed",
    "aborted",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "slo_seconds",
    "slo_attainment",
    "satisfaction",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "p99_client_lag_ms",
    "errors",
)


def trace_of(rate: float, seconds: float, cv: float = 1.0, tenants: tuple[float, ...] = ()) -> Trace:
    return synthetic(
        rate=rate,
        duration=seconds,
        adapters=ADAPTERS,
        cv=cv,
        prompt=(8, 128),
        output=(8, 64),
        tenants=tenants,
        seed=1,
    )


def firsts(outcomes: list[Outcome]) -> dict[str, float]:
    """Milliseconds to the first tokens of all but the flood, the whole wait of those without one."""
    others = [o for o in outcomes if o.item.tenant != FLOOD]
    waits = [1e3 * (o.ended - o.sent if o.first is None else o.first) for o in others]
    return {
        "requests": len(waits),
        "mean": sum(waits) / len(waits),
        "median": quantile(waits, 0.5),
        "p99": quantile(waits, 0.99),
    }


def main() -> None:
    args = arguments(__doc__, quick={"seconds": 6.0, "slo": 1.0}, seconds=50.0, slo=4.0)
    report = Report("Who gets an answer in time when there are too many?", args)
    curves: dict[str, list[Outcome]] = {}

    def serve(name: str, trace: Trace, policy: str, *options: str, keys: tuple[str, ...] = ()) -> Any:
        options += tuple(part for key in keys for part in ("--api-key", key))
        with served(args, folder / "adapters", "--memory", "2GB", "--policy", policy, *options) as target:
            warm = trace_of(1.0, 32.0)
            capacity(client(args, target, keys=keys[:1]), warm)  # first touches, all adapters loaded
            asker = client(args, target, keys=keys, max_seconds=6 * args.seconds)
            outcomes, result = run(asker, trace, args.slo)
        figures = report.result[name] = {key: result[key] for key in KEPT}
        figures["fairness"] = result["fairness"]["tenant"]
        curves[name] = outcomes
        say(
            f"{name}: {figures['slo_attainment']:.0%} in time, satisfaction {figures['satisfaction']:.2f}, "
            f"{figures['aborted']} aborted, {figures['request_throughput']:.2f}/s"
        )
        return figures

    with scratch(args) as folder:
        write_adapters(folder / "adapters", base_info(args.model, args.dtype), ADAPTERS, RANK, linked=True)
        rates = {}
        for options in ((), SHORTER):
            with served(args, folder / "adapters", "--memory", "2GB", *options) as target:
                asker = client(args, target)
                capacity(asker, trace_of(1.0, 32.0))
                # long enough that its end, when the batch empties, weighs little
                rates[options] = capacity(asker, trace_of(20.0, 2.0 if args.quick else 30.0))
        report.result["capacity"], report.result["capacity_of_shorter_steps"] = rates.values()
        say(f"capacity: {rates[()]:.2f} requests/s, {rates[SHORTER]:.2f} with shorter steps")

        for cv in (1, 8):
            trace = trace_of(1.5 * rates[()], args.seconds, cv)
            late = serve(f"fcfs, cv {cv}", trace, "fcfs")
            kept = serve(f"abort, cv {cv}", trace, f"abort:{args.slo}")
            report.target(f"early abort: in time, cv {cv}", kept["slo_attainment"], 0.7, ">=")
            report.target(f"first come: in time, cv {cv}", late["slo_attainment"], 0.3)

        # ten others send 60 % of what the server can take, the flood as much again
        tenants = (10.0, *(1.0,) * OTHERS)
        trace = trace_of(1.2 * rates[SHORTER], args.seconds, tenants=tenants)
        calm = Trace(trace.head, tuple(item for item in trace.items if item.tenant != FLOOD))
        for name, items, policy in (
            ("others alone", calm, "fcfs"),
            ("others and flood, fcfs", trace, "fcfs"),
            ("others and flood, vtc", trace, "vtc"),
        ):
            figures = serve(name, items, policy, *SHORTER, keys=KEYS)
            figures["others_ttft_ms"] = firsts(curves[name])
        alone, unfair, fair = (report.result[name]["others_ttft_ms"] for name in list(report.result)[-3:])
        for key in ("mean", "median", "p99"):
            say(
                f"others' {key} TTFT: {unfair[key] / alone[key]:.2f}x fcfs, {fair[key] / alone[key]:.2f}x vtc"
            )
        report.target("vtc: others' mean TTFT over alone", fair["mean"] / alone["mean"], 1.5)
        jain = report.result["others and flood, vtc"]["fairness"]["jain_index"]
        report.target("vtc: Jain index", jain, 0.95, ">=")
        if not args.quick:
            others = {
                name: [o for o in outcomes if o.item.tenant != FLOOD] for name, outcomes in curves.items()
            }
            plot_waits(Path(__file__).with_name("result.svg"), others, ("cv 1", "cv 8", "others"), args.slo)
    report.write()


if __name__ == "__main__":
    main()
