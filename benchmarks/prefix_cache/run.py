"""What is a shared system prompt worth? First token when the prefix cache has it and when it has not.

    python benchmarks/prefix_cache/run.py

Every adapter has a system prompt of its own. Hits and misses are told apart by the server's own
count of cached tokens, and the answers to equal prompts must be equal.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, arguments, drive, median, quantile, say, scratch

RANK = 16
USER = 16  # tokens of the user's message


def main() -> None:
    args = arguments(__doc__, quick={"adapters": 2, "hits": 2}, adapters=8, hits=6, system=512)
    report = Report("What is a shared system prompt worth?", args)
    with scratch(args) as root, drive(args, "1.5GB") as driver:
        adapters = driver.add(root / "adapters", args.adapters, RANK, linked=False)
        driver.touch(adapters)
        size = driver.engine.layout.block_tokens
        times: dict[str, list[float]] = {"miss": [], "hit": [], "off": []}
        system = driver.prompt(args.system)  # the same text for all: only the adapter keeps them apart
        for adapter in adapters:
            first = driver.one(adapter, (*system, *driver.prompt(USER)))
            assert first.cached_tokens == 0, "another adapter's cache was used"
            times["miss"].append(first.first)
            for _ in range(args.hits):
                prompt = (*system, *driver.prompt(USER))
                hit = driver.one(adapter, prompt)
                assert hit.cached_tokens == args.system // size * size, hit.cached_tokens
                times["hit"].append(hit.first)
                off = driver.submit(adapter, prompt, 1, prefix_cache=False)
                driver.finish()
                times["off"].append(driver.timings.pop(off).first)
        driver.check_empty()
        about = driver.about
    for name, values in times.items():
        report.result[name] = {
            "requests": len(values),
            "median_first_token": median(values),
            "p90_first_token": quantile(values, 0.9),
        }
        say(f"{name:5s} {1e3 * median(values):7.1f} ms")
    without = median(times["miss"] + times["off"])
    report.result |= {"system_tokens": args.system, "user_tokens": USER, "block_tokens": size}
    report.target("first token without the cache / with a hit", without / median(times["hit"]), 4.0, ">=")
    report.write(about)


if __name__ == "__main__":
    main()
