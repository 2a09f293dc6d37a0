"""Do others notice when adapters load? Time between tokens of 16 neighbours, and a cold adapter's first token.

    python benchmarks/invisible_loads/run.py

Windows without loads and windows in which cold adapters load back to back take turns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Drive,
    Report,
    arguments,
    drive,
    forget_cached,
    median,
    quantile,
    read_seconds,
    say,
    scratch,
)

RANK = 16
PROMPT, OUTPUT = 32, 400  # of a neighbour
COLD_PROMPT = 64


class Neighbours:
    """Requests that decode without end: each that ends is followed by the next."""

    def __init__(self, driver: Drive, adapters: list[Any]) -> None:
        self._driver, self._adapters = driver, adapters
        self._running: dict[str, Any] = {}

    def step(self) -> bool:
        """One step of the engine; whether everybody decoded in it, and nobody's prompt was computed."""
        driver = self._driver
        for adapter in self._adapters:
            if adapter not in self._running.values():
                self._running[driver.submit(adapter, PROMPT, OUTPUT)] = adapter
        begun = all(driver.timings[request].times for request in self._running)
        for request in driver.step():
            del self._running[request]
            del driver.timings[request]
        return begun

    def stop(self) -> None:
        for request in self._running:
            self._driver.engine.cancel(request)
        self._driver.finish()
        self._running.clear()
        self._driver.timings.clear()


def window(driver: Drive, neighbours: Neighbours, cold: list[Any], steps: int) -> tuple[list[float], float]:
    """Seconds of each decoding step, and of the whole.

    With `cold`, the next adapter is asked for as soon as the one before is there, and steps go on
    until all are.
    """
    store = driver.engine.store
    queue, gaps = list(reversed(cold)), []
    while not neighbours.step():
        pass
    began = last = time.perf_counter()
    while queue or len(gaps) < steps:
        if queue and store.state(queue[-1]) == "resident":
            queue.pop()
        if queue:
            store.load(queue[-1])
        decoded = neighbours.step()
        now = time.perf_counter()
        if decoded:
            gaps.append(now - last)
        last = now
    return gaps, last - began


def first_tokens(driver: Drive, adapters: list[Any], report: Report) -> None:
    """A disk-cold adapter against the same one warm, plus a plain read of its files."""
    store = driver.engine.store
    cold, cached, warm, reads = [], [], [], []
    driver.one(adapters[0], COLD_PROMPT)
    for adapter in adapters[1:]:
        folder = Path(adapter.path)
        for seconds in (cold, cached):
            store.remove([adapter])
            if seconds is cold:
                forget_cached(folder)
                reads.append(read_seconds(folder))
                forget_cached(folder)
            seconds.append(driver.one(adapter, COLD_PROMPT).first)
        warm.append(driver.one(adapter, COLD_PROMPT).first)
    ratio = [c / (w + r) for c, w, r in zip(cold, warm, reads, strict=True)]
    report.result["first_token"] = {
        "adapter_bytes": adapters[0].nbytes,
        "disk_cold": median(cold),
        "in_page_cache": median(cached),
        "warm": median(warm),
        "plain_read": median(reads),
        "cold_over_warm_plus_read": median(ratio),
    }
    say(
        f"first token: warm {1e3 * median(warm):.1f} ms, from the page cache {1e3 * median(cached):.1f} ms, from the "
        f"disk {1e3 * median(cold):.1f} ms (a plain read takes {1e3 * median(reads):.1f} ms)"
    )
    report.target("first token disk-cold / (warm + plain read)", median(ratio), 1.5)


def main() -> None:
    args = arguments(
        __doc__, quick={"loads": 8, "rounds": 1, "steps": 12}, loads=200, neighbours=16, rounds=3, steps=430
    )
    report = Report("Do others notice when adapters load?", args)
    with scratch(args) as root, drive(args, "2.5GB") as driver:
        store = driver.engine.store
        adapters = driver.add(root / "adapters", args.neighbours + args.loads, RANK, linked=False)
        mine, cold = adapters[: args.neighbours], adapters[args.neighbours :]
        first_tokens(driver, cold[: 4 if args.quick else 24], report)
        store.remove(cold)
        driver.touch(mine)
        neighbours = Neighbours(driver, mine)
        gaps: dict[str, list[float]] = {"quiet": [], "loading": []}
        spent, loaded = 0.0, 0
        window(driver, neighbours, [], 10)
        per_round = max(1, args.loads // args.rounds)
        for i in range(args.rounds):
            batch = cold[i * per_round : (i + 1) * per_round]
            for adapter in batch:
                forget_cached(Path(adapter.path))
            gaps["quiet"] += window(driver, neighbours, [], args.steps)[0]
            more, seconds = window(driver, neighbours, batch, 1)
            gaps["loading"] += more
            spent, loaded = spent + seconds, loaded + len(batch)
            store.remove(batch)
        neighbours.stop()
        driver.check_empty()
        about = driver.about
    figures: dict[str, Any] = {"loads": loaded, "loads_per_second": loaded / spent}
    for name, values in gaps.items():
        figures[name] = {
            "steps": len(values),
            "median": median(values),
            "p99": quantile(values, 0.99),
            "max": max(values),
        }
        say(f"{name:8s} {len(values)} steps: " + ", ".join(
            f"{key} {1e3 * figures[name][key]:.1f} ms" for key in ("median", "p99", "max")))  # fmt: skip
    figures["p99_ratio"] = figures["loading"]["p99"] / figures["quiet"]["p99"]
    figures["median_ratio"] = figures["loading"]["median"] / figures["quiet"]["median"]
    figures["largest_gap_in_steps"] = figures["loading"]["max"] / figures["quiet"]["median"]
    report.result["between_tokens"] = figures
    report.target("p99 between tokens with loads / without", figures["p99_ratio"], 1.2)
    report.target("largest gap with loads, in median steps", figures["largest_gap_in_steps"], 2.0)
    report.write(about)


if __name__ == "__main__":
    main()
