"""What does a decode step of 32 rows cost, and for what? Ranks, residents, Python, long contexts.

python benchmarks/decode_step/run.py
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Drive, Report, adapter_bytes, arguments, drive, kv_bytes, median, say, scratch

from chiliad.core import AdapterVersion
from chiliad.kernels import cpu

ROWS, PROMPT = 32, 64
MIXES = {  # rank -> rows with an adapter of their own
    "8": {8: 32},
    "8, 16, 32, 64": {8: 8, 16: 8, 32: 8, 64: 8},
    "31 of 8, one of 64": {8: 31, 64: 1},
}

Adapters = list[AdapterVersion | None]


def step_seconds(driver: Drive, rows: Adapters, prompt: int, steps: int) -> list[float]:
    """Times of the decode steps of one batch, a row for each adapter, all at `prompt` tokens and more."""
    for adapter in rows:
        driver.submit(adapter, prompt, steps)
    times: list[float] = []
    while not driver.engine.idle:
        before = driver.engine.metrics.prompt_tokens, driver.engine.metrics.generation_tokens
        began = time.perf_counter()
        driver.step()
        seconds = time.perf_counter() - began
        metrics = driver.engine.metrics
        decoded = metrics.generation_tokens - before[1]
        if decoded == len(rows) and metrics.prompt_tokens == before[0]:
            times.append(seconds)
    driver.timings.clear()
    return times[1:]  # the first decode step may finish a prompt


def interleaved(cases: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Median seconds of a step, by case and round; every round runs every case, in an order of its own."""
    for call in cases.values():
        call()
    medians: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in random.Random(i).sample(sorted(cases), len(cases)):
            medians[name].append(median(cases[name]()))
    return medians


@contextmanager
def stopwatch() -> Iterator[tuple[list[float], list[int], float]]:
    """Seconds inside the C++ core and calls of it, each in the one item of a list; and the seconds that
    the watch itself adds to the time outside for each call."""
    total, calls, core = [0.0], [0], cpu._core

    class Timed:
        def __getattr__(self, name: str) -> Any:
            thing = getattr(core, name)
            if isinstance(thing, type) or not callable(thing):
                return thing

            def call(*args: Any) -> Any:
                calls[0] += 1
                began = time.perf_counter()
                try:
                    return thing(*args)
                finally:
                    total[0] += time.perf_counter() - began

            setattr(self, name, call)
            return call

    cpu._core = timed = Timed()

    def spent(function: Callable[[], Any], times: int = 20_000) -> float:
        began = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - began) / times

    spent(lambda: timed.isas())
    total[0], calls[0] = 0.0, 0
    outside = spent(lambda: timed.isas()) - total[0] / calls[0]
    own = outside - spent(lambda: None)
    try:
        yield total, calls, own
    finally:
        cpu._core = core


def python_share(driver: Drive, rows: Adapters, steps: int) -> float:
    """The part of a decode step that is not inside the C++ core."""
    with stopwatch() as (core, calls, own):
        for adapter in rows:
            driver.submit(adapter, PROMPT, steps)
        shares: list[float] = []
        while not driver.engine.idle:
            before, called, began = core[0], calls[0], time.perf_counter()
            driver.engine.step()
            seconds = time.perf_counter() - began - own * (calls[0] - called)
            shares.append(1 - (core[0] - before) / seconds)
            driver.step(0)  # events are read, another step goes by
        driver.timings.clear()
    return median(shares[len(shares) // 4 :])


def main() -> None:
    args = arguments(
        __doc__, quick={"rounds": 1, "context": 512, "residents": 20}, rounds=11, context=4096, residents=200
    )
    report = Report("What does a decode step of 32 rows cost, and for what?", args)
    memory = lambda model: int(3e9)  # noqa: E731
    with scratch(args) as root, drive(args, memory) as driver:
        model, kernels = driver.engine.model, driver.engine.kernels
        read, multiply = kernels.read_bandwidth(), kernels.multiply_rate(args.dtype)
        ranks = sorted({rank for mix in MIXES.values() for rank in mix})
        made = {
            rank: driver.add(root / f"r{rank}", 32, rank, linked=True, prefix=f"r{rank}-") for rank in ranks
        }
        driver.touch([a for adapters in made.values() for a in adapters])

        def batch(rows: Adapters) -> Callable[[], list[float]]:
            return lambda: step_seconds(driver, rows, PROMPT, 24)

        base: Adapters = [None] * ROWS
        mixes: dict[str, Adapters] = {
            name: [a for rank, count in mix.items() for a in made[rank][:count]]
            for name, mix in MIXES.items()
        }
        cases = {"base": batch(base)} | {name: batch(rows) for name, rows in mixes.items()}
        by_round = interleaved(cases, args.rounds)
        seconds = {name: median(values) for name, values in by_round.items()}
        nbytes = {
            name: sum(adapter_bytes(model, rank) * count for rank, count in mix.items())
            for name, mix in MIXES.items()
        }
        beyond = {  # the machine changes its speed between rounds more than within them
            name: median(a - b for a, b in zip(by_round[name], by_round["base"], strict=True))
            for name in mixes
        }
        rate = sum(beyond.values()) / sum(nbytes.values())  # seconds per byte, over all mixes
        for name in mixes:
            ratio = beyond[name] / (rate * nbytes[name])
            report.target(f"ranks {name}: time beyond the base / its share by bytes", abs(ratio - 1), 0.15)
            say(
                f"  {1e3 * beyond[name]:.2f} ms beyond {1e3 * seconds['base']:.2f}; {nbytes[name] / 1e6:.0f} MB"
            )
        report.result["ranks"] = {
            "step_seconds": seconds,
            "rank_bytes": nbytes,
            "beyond_base_seconds": beyond,
            "bytes_per_second": 1 / rate,
            "read_bytes_per_second": read,
        }
        report.result["python_share"] = {
            "base": python_share(driver, base, 48), "32 adapters": python_share(driver, mixes["8"], 48)
        }  # fmt: skip
        for name, share in report.result["python_share"].items():
            report.target(f"outside the C++ core, of a step ({name})", share, 0.10)
        about = driver.about

        # decoding at a long context: weights and KV cache, once per step
        rows = 8  # their prompts take 64 steps, so the first has written as many tokens before all decode
        tokens = args.context + 64
        nbytes_read = model.nbytes - embedding_bytes(model) + rows * kv_bytes(model, tokens)
        runs = []  # the bandwidth of a shared machine changes by the minute: take it around each run
        for _ in range(max(1, args.rounds // 2)):
            before = kernels.read_bandwidth()
            long = median(step_seconds(driver, [None] * rows, args.context, 100))
            runs.append((long, (before + kernels.read_bandwidth()) / 2))
        ratio, long, bandwidth = sorted((s * rate / nbytes_read, s, rate) for s, rate in runs)[len(runs) // 2]
        report.result["long_context"] = {
            "rows": rows, "context": args.context, "step_seconds": long,
            "floor_seconds": nbytes_read / bandwidth, "kv_bytes": rows * kv_bytes(model, tokens),
            "read_bytes_per_second": bandwidth, "multiply_flops_per_second": multiply,
            "runs": [{"step_seconds": s, "read_bytes_per_second": rate} for s, rate in runs],
        }  # fmt: skip
        report.target(f"8 rows at {args.context} tokens: step / floor of its bytes", ratio, 1.5)
        driver.check_empty()

    # base rows, with and without adapters in the pool: two engines, in turn
    with scratch(args) as root, drive(args, memory) as empty, drive(args, memory) as full:
        full.touch(full.add(root / "residents", args.residents, 16, linked=True))
        by_round = interleaved(
            {
                "none resident": lambda: step_seconds(empty, base, PROMPT, 24),
                f"{args.residents} resident": lambda: step_seconds(full, base, PROMPT, 24),
            },
            args.rounds,
        )
        seconds = {name: median(values) for name, values in by_round.items()}
        with_them, without = seconds[f"{args.residents} resident"], seconds["none resident"]
        report.result["base_rows"] = seconds
        report.target("base rows beside resident adapters / without", with_them / without, 1.03)
    report.write(about)


def embedding_bytes(model: Any) -> int:
    """The embedding table, of which a step reads a few rows only."""
    return 2 * model.arch.vocab * model.arch.hidden


if __name__ == "__main__":
    main()
