"""What do coming and going adapters cost? Registering 2,000, and 10,000 lives of one under load.

    python benchmarks/registration/run.py

A life: files appear, are checked and registered, perhaps answer a request, and are removed. Eight
neighbours decode all the while. Afterwards every page must be back and memory as it was.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Engine,
    EngineConfig,
    KernelConfig,
    Registry,
    Report,
    Request,
    arguments,
    load,
    load_model,
    median,
    open_handles,
    parse_bytes,
    resident_bytes,
    say,
    scratch,
    write_adapters,
)

from chiliad.core import AdapterUse, Finished, SamplingParams
from chiliad.engine.stream import AsyncEngine

RANK = 4
AT_ONCE = 16  # lives that overlap


def registering(args: Any, base: Any, root: Path, report: Report) -> None:
    names = write_adapters(root / "many", base, args.adapters, RANK, linked=True)
    first, again = [], []
    for i in range(args.rounds):
        path = root / f"registry{i}.sqlite"
        for seconds in (first, again):
            began = time.perf_counter()
            registry = Registry(path, base)
            found = registry.scan(root / "many")
            seconds.append(time.perf_counter() - began)
            assert len(found.added) + found.unchanged == len(names), found
            registry.close()
    report.result["scan"] = {
        "adapters": len(names),
        "first_seconds": median(first),
        "unchanged_seconds": median(again),
    }
    say(f"{len(names)} adapters: {median(first):.2f} s at first, {median(again):.2f} s when known")
    report.target(f"register {len(names)} adapters, seconds", median(first), 2.0)


class Lives:
    """Adapters that come and go while neighbours decode."""

    def __init__(self, engine: AsyncEngine, folders: list[Path], used: int) -> None:
        self._engine, self._folders, self._used = engine, folders, used
        self.samples: list[tuple[int, int, int]] = []  # lives so far, resident bytes, open files
        self.done = self.answers = self.neighbour_tokens = 0
        self.seconds: dict[str, list[float]] = {"add": [], "remove": []}

    async def ask(self, name: str, request_id: str, tokens: int) -> int:
        version = None if not name else self._engine.registry.resolve(name)
        request = Request(
            id=request_id,
            prompt=(5, 6, 7, 8),
            params=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            adapters=() if version is None else (AdapterUse(version),),
            arrival=time.monotonic(),
        )
        ended = 0
        async for event in self._engine.generate(request):
            if isinstance(event, Finished):
                ended = event.usage.completion_tokens
        return ended

    async def neighbour(self, number: int) -> None:
        for i in range(10**9):
            self.neighbour_tokens += await self.ask("", f"neighbour-{number}-{i}", 200)

    async def life(self, number: int) -> None:
        engine, folder, name = self._engine, self._folders[number % AT_ONCE], f"life-{number}"
        os.utime(
            folder / "adapter_model.safetensors", ns=(number, 10**18 + number)
        )  # new content, as it were
        began = time.perf_counter()
        await engine.add_adapter(folder, name)
        self.seconds["add"].append(time.perf_counter() - began)
        if number % self._used == 0:
            assert await self.ask(name, name, 2) == 2
            self.answers += 1
        began = time.perf_counter()
        await engine.remove_adapter(name)
        self.seconds["remove"].append(time.perf_counter() - began)
        self.done += 1

    async def run(self, count: int) -> None:
        neighbours = [asyncio.ensure_future(self.neighbour(i)) for i in range(8)]

        async def worker(first: int) -> None:
            for number in range(first, count, AT_ONCE):
                await self.life(number)

        async def watch() -> None:
            while True:
                self.samples.append((self.done, resident_bytes(), open_handles()))
                await asyncio.sleep(0.25)

        watcher = asyncio.ensure_future(watch())
        await asyncio.gather(*(worker(i) for i in range(AT_ONCE)))
        for task in (watcher, *neighbours):
            task.cancel()
        await asyncio.gather(watcher, *neighbours, return_exceptions=True)
        async with asyncio.timeout(60):
            while not self._engine.engine.idle:
                await asyncio.sleep(0.01)


def cycles(args: Any, model: Any, kernels: Any, root: Path, report: Report) -> None:
    write_adapters(root / "lives", model.info, AT_ONCE, RANK, linked=False)
    registry = Registry(root / "lives.sqlite", model.info)
    config = EngineConfig(
        memory=parse_bytes("1GB"), dtype=args.dtype, kernel=KernelConfig(threads=args.threads)
    )
    engine = AsyncEngine(lambda sink: Engine(model, kernels, registry, config, sink))
    lives = Lives(engine, sorted((root / "lives").iterdir()), args.used)

    async def run() -> None:
        await engine.start()
        try:
            await lives.run(max(AT_ONCE, args.cycles // 10))  # caches fill, threads start
            lives.samples.clear()
            lives.done = lives.answers = 0
            await lives.run(args.cycles)
            await engine.call(inspect)
        finally:
            await engine.stop()

    def inspect() -> None:
        inner = engine.engine
        assert inner.scheduler.prefix is not None
        inner.scheduler.prefix.clear()
        inner.scheduler.check()
        report.result["pages_left"] = inner.pool.num_pages - inner.pool.free_pages

    began = time.perf_counter()
    asyncio.run(run())
    seconds = time.perf_counter() - began
    registered = registry.count()
    registry.close()
    samples = lives.samples
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples[:1], samples[-fifth:]
    growth = median([s[1] for s in late]) - median([s[1] for s in early])
    report.result["lives"] = {
        "count": lives.done,
        "that_answered": lives.answers,
        "per_second": lives.done / seconds,
        "add_seconds": median(lives.seconds["add"]),
        "remove_seconds": median(lives.seconds["remove"]),
        "neighbour_tokens": lives.neighbour_tokens,
        "resident_bytes": [s[1] for s in samples[:: max(1, len(samples) // 20)]],
        "open_files": [s[2] for s in samples[:: max(1, len(samples) // 20)]],
    }
    between = max(1, late[0][0] - early[0][0])
    say(f"{lives.done} lives in {seconds:.0f} s, memory grew by {growth / 1e6:.1f} MB")
    report.target("pages left after every adapter was removed", report.result["pages_left"], 0)
    report.target("names left", registered, 0)
    report.target("growth of resident memory, bytes per life", growth / between, 200)
    report.target("growth of open files", median([s[2] for s in late]) - median([s[2] for s in early]), 4)


def main() -> None:
    args = arguments(
        __doc__,
        quick={"adapters": 100, "rounds": 1, "cycles": 200},
        adapters=2000,
        rounds=3,
        cycles=10_000,
        used=4,
    )
    report = Report("What do coming and going adapters cost?", args)
    kernels = load(threads=args.threads)
    model = load_model(args.model, kernels, args.dtype)
    with scratch(args) as root:
        registering(args, model.info, root, report)
        cycles(args, model, kernels, root, report)
    report.write(f"{kernels.name}: {kernels.reason}")


if __name__ == "__main__":
    main()
