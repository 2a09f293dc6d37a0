"""S-LoRA's workload on vLLM's CPU server and on chiliad's, over HTTP, in turns.

    python benchmarks/vllm_server/run.py --vllm-python .../bin/python

Both servers get the same adapters (rank 16 on q, k, v, o), the same model in bfloat16, all cores and
the same requests: gamma arrivals with cv 1, every adapter equally likely (S-LoRA's alpha = 1), and
uniform lengths, S-LoRA's 8 to 512 tokens scaled by `--lengths`. vLLM's max_loras is the number of
adapters, or the highest with which it starts. First 32 requests at once, until the last is answered;
then the trace, whose rate is a share of what chiliad can take, and whose requests have failed when
they have no answer after twice its time. One server runs at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))

from common import (
    Report,
    arguments,
    base_info,
    capacity,
    client,
    free_port,
    running,
    say,
    scratch,
    served,
    write_adapters,
)
from export import export
from systems import vllm_environment

from chiliad.bench.client import Target
from chiliad.bench.report import Outcome
from chiliad.bench.serve import Client, run
from chiliad.bench.workload import Trace, synthetic

RANK, MAX_MODEL_LEN = 16, 1152
KEPT = (
    "num_prompts",
    "completed",
    "failed",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "slo_attainment",
    "satisfaction",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "mean_e2el_ms",
)


@contextmanager
def vllm(args: Any, work: Path, names: list[str], max_loras: int) -> Iterator[Target]:
    """vLLM's OpenAI server, as its documentation wants it on CPUs.

    The model runs in the engine's own process. In the usual one of its own, both wait for each other
    in busy loops, and on two cores a token took up to a second.
    """
    port = free_port()
    command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(work / "model")]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]
    command += ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(max_loras)]
    command += ["--max-cpu-loras", str(max(max_loras, len(names)))]
    command += ["--lora-modules", *(f"{name}={work / 'adapters' / name}" for name in names)]
    environment = vllm_environment(args, work) | {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    with running(command, port, environment, work / "vllm.log", patience=600.0) as target:
        yield target


def trace_of(args: Any, adapters: int, rate: float, seconds: float) -> Trace:
    longest = round(512 * args.lengths)
    lengths = (8, longest)
    return synthetic(
        rate=rate,
        duration=seconds,
        adapters=adapters,
        popularity="power:1",
        prompt=lengths,
        output=lengths,
        seed=3,
    )


def main() -> None:
    quick = {"seconds": 5.0, "counts": "5", "lengths": 0.1, "together": 4}
    args = arguments(
        __doc__,
        quick=quick,
        vllm_python="",
        counts="5,32,100",
        seconds=30.0,
        load=0.8,
        lengths=0.25,
        slo=6.0,
        together=32,
    )
    args.vllm_mode = "inside"
    args.threads = args.threads or len(os.sched_getaffinity(0))
    report = Report("Beside vLLM's server on S-LoRA's workload", args)
    counts = [int(part) for part in args.counts.split(",")]
    with scratch(args) as work:
        export(work / "model")
        names = write_adapters(
            work / "adapters", base_info(args.model, args.dtype), max(counts), RANK, linked=True
        )

        def measure(system: str, asker: Client, trace: Trace) -> list[Outcome]:
            few = synthetic(rate=8, duration=2, adapters=len(names_used), prompt=(8, 16), output=(4, 8))
            capacity(replace(asker, max_seconds=None), few)  # compiled graphs, first touches
            together = trace_of(args, len(names_used), args.together / 2, 2.0)
            saturated = capacity(replace(asker, max_seconds=None), together)
            outcomes, result = run(asker, trace, args.slo)
            figures = {"saturated_throughput": saturated} | {key: result[key] for key in KEPT}
            report.result.setdefault(system, {})[len(names_used)] = figures
            say(
                f"{len(names_used)} adapters, {system}: {saturated:.2f}/s of {args.together} at once; "
                f"of the trace {figures['completed']}, {figures['request_throughput']:.2f}/s, TTFT "
                f"{figures['median_ttft_ms']:.0f} ms, {figures['slo_attainment']:.0%} within {args.slo:g} s"
            )
            return outcomes

        for number, count in enumerate(counts):
            names_used = names[:count]
            if number == 0:
                with served(args, work / "adapters", "--max-model-len", str(MAX_MODEL_LEN)) as target:
                    flood = trace_of(args, count, 20.0, 2.0 if args.quick else 8.0)
                    rate = max(capacity(client(args, target), flood) for _ in range(2))
                report.result["chiliad's capacity"] = rate
                say(f"chiliad's capacity: {rate:.2f} requests/s")
            trace = trace_of(args, count, args.load * rate, args.seconds)
            limit = 2 * args.seconds
            with served(args, work / "adapters", "--max-model-len", str(MAX_MODEL_LEN)) as target:
                measure("chiliad", client(args, target, max_seconds=limit), trace)
            max_loras = count
            while args.vllm_python:
                try:
                    with vllm(args, work, names_used, max_loras) as target:
                        measure("vllm", client(args, target, max_seconds=limit), trace)
                    report.result["vllm"][count]["max_loras"] = max_loras
                    break
                except RuntimeError as error:
                    say(str(error))
                    max_loras //= 2
                    if not max_loras:
                        raise
    for count, theirs in report.result.get("vllm", {}).items():
        ours = report.result["chiliad"][count]
        ratio = ours["saturated_throughput"] / theirs["saturated_throughput"]
        report.target(f"requests per second over vLLM's, {count} adapters", ratio, 1.0, ">=")
    if not args.quick:
        plot(report.result)
    report.write()


def plot(result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    systems = [name for name in ("chiliad", "vllm") if name in result]
    for axis, (key, label) in zip(
        axes,
        (
            ("saturated_throughput", "requests/s, 32 at once"),
            ("median_ttft_ms", "median ms to the first token"),
            ("slo_attainment", "share in time"),
        ),
        strict=True,
    ):
        for shift, name in enumerate(systems):
            values = [figures[key] for figures in result[name].values()]
            axis.bar([i + 0.4 * shift for i in range(len(values))], values, 0.38, label=name)
        axis.set_xticks([i + 0.2 for i in range(len(result["chiliad"]))], [str(n) for n in result["chiliad"]])
        axis.set(xlabel="adapters", ylabel=label)
    axes[0].legend(frameon=False)
    figure.savefig(Path(__file__).parent / "result.svg")


if __name__ == "__main__":
    main()
