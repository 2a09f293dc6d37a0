"""Does it matter how many adapters there are? Throughput with 1 to 2,000, and what 100,000 names cost.

python benchmarks/flat_in_adapters/run.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    ROOT,
    Drive,
    Report,
    adapter_bytes,
    arguments,
    drive,
    load,
    load_model,
    median,
    resident_bytes,
    say,
    scratch,
    write_adapters,
)

RANK = 8
BATCH = 32  # requests of a wave, which run together from begin to end
PROMPT, OUTPUT = 16, 32  # tokens

Case = tuple[int, int]  # adapters in use, distinct ones in a wave


def wave(driver: Drive, adapters: list[Any], distinct: int, rng: random.Random) -> float:
    """Generated tokens per second of one batch over `distinct` adapters, drawn from all."""
    chosen = rng.sample(adapters, distinct)
    began = time.perf_counter()
    for i in range(BATCH):
        driver.submit(chosen[i % distinct], PROMPT, OUTPUT)
    driver.finish()
    seconds = time.perf_counter() - began
    driver.timings.clear()
    return BATCH * OUTPUT / seconds


def waves(driver: Drive, adapters: list[Any], cases: list[Case], rounds: int) -> dict[Case, list[float]]:
    """Rates by case; every round runs every case once, in an order of its own."""
    rng = random.Random(0)
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    for case in cases:
        wave(driver, adapters[: case[0]], case[1], rng)
    for _ in range(rounds):
        for case in rng.sample(cases, len(cases)):
            rates[case].append(wave(driver, adapters[: case[0]], case[1], rng))
    return rates


def summary(rates: dict[Case, list[float]]) -> list[dict[str, Any]]:
    """Medians, and their ratio to the fewest adapters with equally mixed batches."""
    fewest: dict[int, float] = {}
    lines = []
    for (used, distinct), values in sorted(rates.items(), key=lambda item: (item[0][1], item[0][0])):
        rate = median(values)
        line = {
            "adapters": used,
            "distinct_per_batch": distinct,
            "tokens_per_second": rate,
            "ratio_to_fewest": rate / fewest.setdefault(distinct, rate),
            "runs": values,
        }
        say(
            f"{used:6d} adapters, {distinct:2d} per batch: {rate:7.1f} tokens/s, {line['ratio_to_fewest']:.3f}"
        )
        lines.append(line)
    return lines


def throughput(args: argparse.Namespace, report: Report, root: Path) -> str:
    sizes = [n for n in (1, 10, 100, 1000, 2000) if n <= args.adapters]
    cases = [(n, d) for d in (1, 8, 32) for n in sizes if n >= d and not (d == 1 and 1 < n < sizes[-1])]
    most, fewest = sizes[-1], sizes[1]
    with drive(args, args.memory) as driver:
        adapters = driver.add(root, most, RANK, linked=True)
        each = driver.engine.store.pages_needed(adapters[0])
        say(f"all resident: {most} adapters of {each} pages, {driver.engine.pool.num_pages} pages")
        driver.touch(adapters)
        report.result["resident"] = {
            "memory": args.memory,
            "adapter_bytes": each * driver.engine.layout.page_bytes,
            "cases": summary(waves(driver, adapters, cases, args.rounds)),
            "evictions": driver.engine.metrics.adapter_evictions["memory"],
        }
        driver.check_empty()
        about = driver.about
    ratio = next(
        line["ratio_to_fewest"]
        for line in report.result["resident"]["cases"]
        if (line["adapters"], line["distinct_per_batch"]) == (most, 8)
    )
    report.target(f"throughput at {most} adapters / at {fewest}, equal mix, all resident", ratio, 0.95, ">=")
    with drive(args, lambda model: int(1.05 * args.room * adapter_bytes(model, RANK))) as driver:
        driver.engine.registry.scan(root)
        again = [driver.engine.registry.resolve(version.name) for version in adapters]
        say(f"room for about {args.room}: {driver.engine.pool.num_pages} pages")
        cases = [(n, 8) for n in (fewest, most)]
        report.result["evicting"] = {
            "room_for_adapters": driver.engine.pool.num_pages // each,
            "cases": summary(waves(driver, again, cases, args.rounds)),
            "loads": driver.engine.metrics.adapter_loads["ok"],
            "mean_load_seconds": driver.engine.metrics.adapter_load_seconds.mean,
        }
        driver.check_empty()
    return about


# -- a hundred thousand names ------------------------------------------------------------------


@contextmanager
def server(args: argparse.Namespace, folder: Path, home: Path) -> Iterator[dict[str, Any]]:
    """`chiliad serve` -> when it was ready, what it occupies, and where it listens."""
    command = [sys.executable, "-m", "chiliad.cli", "serve", args.model, "--adapters", str(folder), "--port", "0",
               "--memory", "1GB", "--dtype", args.dtype, "--threads", str(args.threads)]  # fmt: skip
    environment = os.environ | {"CHILIAD_HOME": str(home), "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if match := re.search(r"listening (http://\S+)/v1", line):
                url = match[1]
                break
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.005)
        seconds, resident = time.perf_counter() - began, 0
        while (now := resident_bytes(process.pid)) > resident:  # until the pool's memory is all there
            resident = now
            time.sleep(1)
        yield {"seconds": seconds, "resident": resident, "url": url}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def names(args: argparse.Namespace, report: Report, root: Path) -> None:
    base = load_model(args.model, load(threads=args.threads), args.dtype).info
    many, none = root / "many", root / "none"
    none.mkdir()
    say(f"writing {args.names} adapter folders")
    write_adapters(many, base, args.names, 1, targets=("q_proj",), linked=True)
    figures: dict[str, Any] = {"count": args.names}
    with server(args, many, root / "home") as first:
        figures["first_start_seconds"] = first["seconds"]
    runs: dict[str, list[dict[str, Any]]] = {"none": [], "many": []}
    pages: list[float] = []
    for _ in range(args.starts):
        with server(args, none, root / "home") as start:
            runs["none"].append(start)
        with server(args, many, root / "home") as start:
            runs["many"].append(start)
            for i in range(10):
                before = time.perf_counter()
                after = f"&after=a{i * args.names // 10:06d}" if i else ""
                with urllib.request.urlopen(f"{start['url']}/v1/models?limit=100{after}") as answer:
                    cards = json.load(answer)["data"]
                pages.append(time.perf_counter() - before)
                assert len(cards) >= min(100, args.names // 10 - 1), len(cards)
    for what in ("seconds", "resident"):
        for which, starts in runs.items():
            figures[f"{which}_{what}"] = median([start[what] for start in starts])
    figures["resident_bytes_each"] = (figures["many_resident"] - figures["none_resident"]) / args.names
    figures["page_seconds"] = median(pages)
    figures["page_seconds_max"] = max(pages)
    report.result["names"] = figures
    report.target(f"start with {args.names} adapters registered, seconds", figures["many_seconds"], 5.0)
    report.target("resident bytes for each registered adapter", figures["resident_bytes_each"], 1024)
    report.target("/v1/models page of 100, seconds", figures["page_seconds"], 0.05)


def main() -> None:
    args = arguments(
        __doc__,
        quick={"adapters": 100, "memory": "1GB", "room": 40, "rounds": 1, "names": 2000, "starts": 1},
        adapters=2000,
        memory="6GB",
        room=300,
        rounds=8,
        names=100_000,
        starts=3,
        parts="throughput,names",
    )
    report = Report("Does it matter how many adapters there are?", args)
    about = ""
    with scratch(args) as root:
        if "throughput" in args.parts:
            about = throughput(args, report, root / "adapters")
        if "names" in args.parts:
            names(args, report, root)
    report.write(about)


if __name__ == "__main__":
    main()
