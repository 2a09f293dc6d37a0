"""Micro-benchmarks of the kernels: achieved rates beside the ceilings measured in the same run.

`python -m chiliad.bench.kernels cases` times every case of the table; `... step` times all linear
layers of one decode step of SmolLM2-135M (its shapes, 30 distinct layers, so that weights come
from memory), against the floor: the bytes that must be read, over the measured read bandwidth.
Times are the best of several runs, which is what a noisy shared machine allows to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from chiliad.kernels.base import (
    AdapterRows,
    KVLayout,
    LinearSpec,
    LowRankRows,
    NormSpec,
    PackedLinear,
    Segment,
    Step,
)
from chiliad.kernels.cases import ArenaBuilder, bench_cases, segment_sizes, simple_step
from chiliad.kernels.cpu import CpuKernels
from chiliad.memory.arena import Arena

HIDDEN, FEED_FORWARD, VOCAB, LAYERS = 576, 1536, 49152, 30
KV_WIDTH = 192


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    name: str
    seconds: float
    gbytes_per_second: float
    gflops_per_second: float
    of_read_ceiling: float
    of_flop_ceiling: float


def best_of(call: Callable[[], object], repeats: int, budget: float = 1.0) -> float:
    """Best wall time of a call, in seconds, over `repeats` runs or `budget` seconds of them."""
    call()
    best, start = float("inf"), time.perf_counter()
    for _ in range(repeats):
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - start > budget:
            break
    return best


class LinearLayers:
    """The linear layers of SmolLM2-135M with random weights, and adapters on q, k, v, o."""

    def __init__(
        self, kernels: CpuKernels, dtype: str, adapters: int = 0, rank: int = 16, adapter_dtype: str = ""
    ) -> None:
        self.kernels = kernels
        self.nbytes = 0
        g = torch.Generator().manual_seed(0)

        def pack(in_features: int, sizes: tuple[int, ...], slots: tuple[int, ...]) -> PackedLinear:
            weight = torch.randn(sum(sizes), in_features, generator=g) / in_features**0.5
            linear = kernels.pack_linear(weight, None, LinearSpec(in_features, sizes, slots, dtype))
            self.nbytes += linear.nbytes
            return linear

        self.layers = [
            (
                pack(HIDDEN, (HIDDEN, KV_WIDTH, KV_WIDTH), (7 * i, 7 * i + 1, 7 * i + 2)),
                pack(HIDDEN, (HIDDEN,), (7 * i + 3,)),
                pack(HIDDEN, (FEED_FORWARD, FEED_FORWARD), (7 * i + 4, 7 * i + 5)),
                pack(FEED_FORWARD, (HIDDEN,), (7 * i + 6,)),
            )
            for i in range(LAYERS)
        ]
        self.head = pack(HIDDEN, (VOCAB,), (-1,))
        self.norm = NormSpec("rms", torch.ones(HIDDEN), 1e-5)
        usual = "float32" if dtype == "float32" else "bfloat16"
        stored: torch.dtype = getattr(torch, adapter_dtype or usual)
        builder = ArenaBuilder(stored)
        outs = (HIDDEN, KV_WIDTH, KV_WIDTH, HIDDEN)
        made = []
        for _ in range(adapters):
            low = {}
            for layer in range(LAYERS):
                for j, out in enumerate(outs):
                    a, scale_a = builder.add_rank_rows(torch.randn(rank, HIDDEN, generator=g))
                    b, scale_b = builder.add_rank_rows(torch.randn(rank, out, generator=g))
                    low[7 * layer + j] = LowRankRows(a, b, np.float32(0.05) * scale_a * scale_b)
            made.append(AdapterRows(low, {}, stored))
        self.adapter_nbytes = LAYERS * rank * sum(HIDDEN + out for out in outs) * stored.itemsize
        arena = Arena(-(-builder.nbytes // (1 << 20)) + 1, 1 << 20).buffer  # huge pages, as when serving
        builder.write(arena)
        kernels.bind_arena(arena, KVLayout(1, 1, 16, 16, torch.float32, 2048))
        self.adapters = [kernels.prepare_adapter(adapter) for adapter in made]

    def step(self, sizes: list[tuple[int, int]]) -> tuple[Step, int]:
        """A step of segments (adapter id or -1, rows), and the bytes of adapters it must read."""
        segments, start, used = [], 0, set()
        for index, rows in sizes:
            segments.append(Segment(start, start + rows, self.adapters[index] if index >= 0 else None))
            used.add(index)
            start += rows
        return self.kernels.prepare_step(simple_step(start, segments)), self.adapter_nbytes * len(used - {-1})

    def run(self, x: torch.Tensor, step: Step, head: bool = True) -> None:
        """All linears of one forward; attention is left out (q stands for its output)."""
        project, norm = self.kernels.project, self.norm
        hidden = x.clone()
        attention = hidden.clone()
        for qkv, o, gate_up, down in self.layers:
            project(hidden, qkv, step, norm=norm)
            project(attention, o, step, residual=hidden)
            act = project(hidden, gate_up, step, norm=norm, activation="silu_mul")
            project(act, down, step, residual=hidden)
        if head:
            project(hidden, self.head, None, norm=norm)


def bench_step(args: argparse.Namespace) -> list[dict[str, object]]:
    kernels = CpuKernels(isa=args.isa, threads=args.threads)
    layers = LinearLayers(kernels, args.dtype, args.adapters, args.rank, args.adapter_dtype)
    results: list[dict[str, object]] = []
    for rows in args.rows:
        sizes = {"none": [(-1, rows)]}
        if args.adapters:
            sizes["identical"] = [(0, rows)]
            distinct = segment_sizes("distinct", rows)
            if 1 < len(distinct) <= args.adapters:
                sizes["distinct"] = distinct
        x = torch.randn(rows, HIDDEN)
        for traffic, segments in sizes.items():
            step, adapter_bytes = layers.step(segments)
            head = rows <= 64

            def call(x: torch.Tensor = x, step: Step = step, head: bool = head) -> None:
                layers.run(x, step, head)

            bandwidth = kernels.read_bandwidth(1 << 29, 1)
            seconds = best_of(call, args.repeats, budget=args.budget)
            bandwidth = max(bandwidth, kernels.read_bandwidth(1 << 29, 1))
            nbytes = layers.nbytes - (0 if head else layers.head.nbytes) + adapter_bytes
            flops = 2.0 * rows * LAYERS * (HIDDEN * (HIDDEN + 2 * KV_WIDTH + HIDDEN + 3 * FEED_FORWARD))
            peak = kernels.multiply_rate(args.dtype)
            result = {
                "isa": kernels.isa, "threads": kernels.threads, "dtype": args.dtype, "rows": rows,
                "traffic": traffic, "ms": seconds * 1e3, "floor_ms": nbytes / bandwidth * 1e3,
                "of_floor": nbytes / bandwidth / seconds, "read_gb_s": bandwidth / 1e9,
                "gflop_s": flops / seconds / 1e9, "peak_gflop_s": peak / 1e9,
            }  # fmt: skip
            results.append(result)
            print(
                f"{kernels.isa:8} {args.dtype:8} rows {rows:4} {traffic:10} {seconds * 1e3:8.2f} ms   floor "
                f"{nbytes / bandwidth * 1e3:7.2f} ms ({nbytes / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s)  "
                f"{nbytes / bandwidth / seconds:5.0%} of the floor   {flops / seconds / 1e9:6.0f} GFLOP/s "
                f"({flops / seconds / peak:.0%} of the peak)"
            )
    return results


def bench_table(args: argparse.Namespace) -> list[dict[str, object]]:
    kernels = CpuKernels(isa=args.isa, threads=args.threads)
    bandwidth = kernels.read_bandwidth()
    peaks = {dtype: kernels.multiply_rate(dtype) for dtype in ("float32", "bfloat16")}
    print(f"{kernels.reason}; reads {bandwidth / 1e9:.1f} GB/s, " + ", ".join(
        f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items()))  # fmt: skip
    results: list[dict[str, object]] = []
    for case in bench_cases():
        if args.match not in str(case):
            continue
        seconds = best_of(case.prepare(kernels).call, args.repeats, args.budget)
        peak = peaks["float32" if "float32" in case.name else "bfloat16"]
        row = Row(
            str(case), seconds, case.nbytes / seconds / 1e9, case.flops / seconds / 1e9,
            case.nbytes / seconds / bandwidth, case.flops / seconds / peak,
        )  # fmt: skip
        results.append(asdict(row))
        print(
            f"{row.name:64} {seconds * 1e6:9.1f} us "
            f"{row.gbytes_per_second:7.1f} GB/s ({row.of_read_ceiling:4.0%}) "
            f"{row.gflops_per_second:8.1f} GFLOP/s ({row.of_flop_ceiling:4.0%})"
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="step", choices=("cases", "step"))
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-dtype", default="", help="float32, bfloat16 or int8")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args(arguments)
    results = bench_step(args) if args.what == "step" else bench_table(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
