"""What does HTTP cost? 32 streaming clients of a server beside the same requests offline.

python benchmarks/http/run.py
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, arguments, drive, median, say, scratch, served, write_adapters

from chiliad.bench.client import Target, request

CLIENTS, PROMPT, OUTPUT, RANK = 32, 64, 64, 16


async def ask(target: Target, model: str, prompt: list[int]) -> int:
    """One streamed completion -> tokens that came."""
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    tokens = 0
    async with request(target, "POST", "/v1/completions", json.dumps(body).encode()) as response:
        assert response.status == 200, await response.read()
        async for line in response.lines():
            if line.startswith(b"data: {"):
                usage = json.loads(line[6:]).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    assert tokens == OUTPUT, tokens
    return tokens


async def closed_loop(target: Target, jobs: list[tuple[str, list[int]]]) -> float:
    """Generated tokens per second of CLIENTS clients, each asking again at once."""
    left = iter(jobs)

    async def client() -> int:
        return sum([await ask(target, *job) for job in left])

    began = time.perf_counter()
    tokens = sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))
    return tokens / (time.perf_counter() - began)


def main() -> None:
    args = arguments(__doc__, quick={"rounds": 1, "requests": 32}, rounds=5, requests=128)
    report = Report("What does HTTP cost?", args)
    with scratch(args) as root, drive(args, "3GB") as driver:
        names = write_adapters(root / "adapters", driver.engine.base, CLIENTS, RANK, linked=True)
        driver.engine.registry.scan(root / "adapters")
        versions = [driver.engine.registry.resolve(name) for name in names]
        driver.touch(versions)
        base = driver.engine.base.name
        with served(args, root / "adapters", "--memory", "3GB") as target:
            for kind in ("base", "adapters"):
                picks: list[int | None] = [
                    i % CLIENTS if kind == "adapters" else None for i in range(args.requests)
                ]

                def online(picks: list[int | None] = picks) -> float:
                    jobs = [(base if i is None else names[i], list(driver.prompt(PROMPT))) for i in picks]
                    return asyncio.run(closed_loop(target, jobs))

                def send(i: int, picks: list[int | None] = picks) -> str:
                    pick = picks[i]
                    return driver.submit(None if pick is None else versions[pick], PROMPT, OUTPUT)

                def offline(send: Callable[[int], str] = send) -> float:
                    began = time.perf_counter()
                    driver.closed(CLIENTS, args.requests, send)
                    return args.requests * OUTPUT / (time.perf_counter() - began)

                online(), offline()  # adapters become resident
                rates: dict[str, list[float]] = {"offline": [], "http": []}
                for i in range(args.rounds):
                    for name, call in (("offline", offline), ("http", online))[:: 1 if i % 2 else -1]:
                        rates[name].append(call())
                medians = {name: median(values) for name, values in rates.items()}
                say(f"{kind}: offline {medians['offline']:.0f} tokens/s, through HTTP {medians['http']:.0f}")
                report.result[kind] = {"tokens_per_second": medians, "runs": rates}
                report.target(
                    f"{kind}: through HTTP / offline", medians["http"] / medians["offline"], 0.85, ">="
                )
        about = driver.about
    report.write(about)


if __name__ == "__main__":
    main()
