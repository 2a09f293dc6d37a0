"""How far is the simulator from the server? Both get the same traces, below and beyond capacity.

    python benchmarks/simulator/run.py --threads 1

Costs are measured (`chiliad bench calibrate`) before every run of the server and fitted to all of
them together, so that a machine whose speed drifts does so for both. Each trace meets a freshly
started server with a pool for about sixty adapters of the two hundred it asks for, and again the
simulator with the same pool, cold as well. The client runs on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, arguments, base_info, client, say, scratch, served, write_adapters

from chiliad.bench import plan as planning
from chiliad.bench.calibrate import calibrate
from chiliad.bench.cost import CostModel
from chiliad.bench.report import plot
from chiliad.bench.serve import run
from chiliad.bench.simulate import simulate
from chiliad.bench.workload import Trace, synthetic
from chiliad.config import EngineConfig, KernelConfig, SchedulerConfig

ADAPTERS, RANK, MEMORY = 200, 16, 650_000_000
LOADS = (0.4, 0.8, 1.5)  # of the capacity that the simulator finds
FIGURES = (
    "request_throughput",
    "output_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "slo_attainment",
)


def trace_of(rate: float, seconds: float, seed: int) -> Trace:
    return synthetic(
        rate=rate,
        duration=seconds,
        adapters=ADAPTERS,
        popularity="zipf:1",
        prompt=(8, 128),
        output=(8, 64),
        seed=seed,
    )


def main() -> None:
    quick = {"calibration": 5.0, "seconds": 8.0}
    args = arguments(__doc__, quick=quick, policy="fcfs", calibration=25.0, seconds=60.0)
    config = EngineConfig(
        memory=MEMORY,
        dtype=args.dtype,
        max_model_len=1024,
        kernel=KernelConfig(threads=args.threads),
        scheduler=SchedulerConfig(policy=args.policy),
    )
    report = Report("How far is the simulator from the server?", args)
    base = planning.Base.read(args.model, args.dtype)
    measured: list[tuple[str, Trace, list[Any], dict[str, Any]]] = []
    costs: list[CostModel] = []

    def cost(seed: int) -> CostModel:
        say(f"measuring steps for {args.calibration:g} s")
        costs.append(calibrate(args.model, config, args.calibration, seed=seed))
        return costs[-1]

    with scratch(args) as folder:
        write_adapters(folder / "adapters", base_info(args.model, args.dtype), ADAPTERS, RANK, linked=True)
        first = cost(0)
        house = planning.geometry(base, config, [RANK], "q_proj,k_proj,v_proj,o_proj", first.weights_bytes)
        flood = trace_of(100.0, 4.0, 0)
        capacity = simulate(flood, house, first, config.scheduler).report(flood)["request_throughput"]
        say(f"capacity: {capacity:.2f} requests/s by the first costs")
        for number, load in enumerate(LOADS):
            trace = trace_of(load * capacity, args.seconds, number + 1)
            options = ("--memory", str(MEMORY), "--policy", args.policy, "--max-model-len", "1024")
            with served(args, folder / "adapters", *options) as target:
                outcomes, result = run(client(args, target, max_seconds=20 * args.seconds), trace)
            say(f"load {load}: {result['request_throughput']:.2f}/s, TTFT {result['median_ttft_ms']:.0f} ms")
            measured.append((f"load {load}", trace, outcomes, result))
            cost(number + 1)
    model = average(costs)
    fits = [cost.error | {"records": cost.records} for cost in costs]
    report.result["cost"] = {"step": msgspec.structs.asdict(model.step), "fits": fits}
    here = Path(__file__).resolve().parent
    for name, trace, outcomes, real in measured:
        done = simulate(trace, house, model, config.scheduler)
        guessed = done.report(trace)
        rows = {key: compare(real[key], guessed[key]) for key in FIGURES}
        hit = compare(real["server"]["adapter_hit_rate"], guessed["server"]["adapter_hit_rate"])
        report.result[name] = {"requests": len(trace), "rate": trace.rate, **rows, "adapter_hit_rate": hit}
        for key in ("output_throughput", "median_ttft_ms", "mean_itl_ms"):
            say(f"{name:<9} {key:<18} {rows[key]}")
        if not args.quick:
            slug = name.replace(" ", "-")
            plot(outcomes, real, here / f"{slug}-server.svg", f"{name}: server")
            plot(done.outcomes, guessed, here / f"{slug}-simulator.svg", f"{name}: simulator")
    off = [
        abs(row["relative"]) for name, *_ in measured for row in [report.result[name]["output_throughput"]]
    ]
    report.target("throughput: greatest error", max(off), 0.15)
    report.write(costs[0].machine)


def compare(real: float, guessed: float) -> dict[str, float]:
    return {"server": real, "simulator": guessed, "relative": guessed / real - 1 if real else 0.0}


def average(costs: list[CostModel]) -> CostModel:
    """Means of all costs: each calibration saw a part of the time."""
    steps = [msgspec.structs.asdict(cost.step) for cost in costs]
    step = {key: sum(each[key] for each in steps) / len(steps) for key in steps[0]}
    return msgspec.structs.replace(
        costs[0],
        step=type(costs[0].step)(**step),
        load_seconds=sum(c.load_seconds for c in costs) / len(costs),
        load_bandwidth=len(costs) / sum(1 / c.load_bandwidth for c in costs),
    )


if __name__ == "__main__":
    main()
