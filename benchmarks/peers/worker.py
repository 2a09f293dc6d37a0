"""The side of a worker: one system in its own process and Python environment; stdlib only.

The driver starts `run_<system>.py OPTIONS` (JSON) and talks JSON lines. The first line out says
what was loaded; then each line in is a job, each line out its answer. Loading is not timed with
the jobs. A job is {"prompts": [[id]], "adapters": [name or null], "max_tokens": n}: answer all
prompts in one batch, greedily, without stopping at EOS. {"ceilings": true} measures the machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]
Names = Sequence[str | None]


class System(Protocol):
    about: dict[str, Any]  # versions and settings

    def run(self, prompts: Prompts, adapters: Names, max_tokens: int) -> tuple[list[list[int]], float | None]:
        """Generated tokens, and the `perf_counter` when every row had its first one (None: unknown)."""


def serve(load: Callable[[dict[str, Any]], System]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: a worker never outlives the driver
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    options = json.loads(sys.argv[1])
    began = time.perf_counter()
    system = load(options)
    ready = {"about": system.about, "load_seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("ceilings"):
            print(json.dumps(system.ceilings()), file=answers)  # type: ignore[attr-defined]
            continue
        began = time.perf_counter()
        tokens, first = system.run(job["prompts"], job["adapters"], job["max_tokens"])
        seconds = time.perf_counter() - began
        wrong = [len(row) for row in tokens if len(row) != job["max_tokens"]]
        assert len(tokens) == len(job["prompts"])
        assert not wrong, f"asked {job['max_tokens']} tokens, got {wrong}"
        answer = {
            "seconds": seconds,
            "first": None if first is None else first - began,
            "tokens": tokens,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(answer), file=answers)
