"""chiliad beside vLLM, PEFT, transformers and llama.cpp: same prompts, lengths, adapters, machine, run.

    python benchmarks/peers/run.py --vllm-python VLLM/bin/python --llama-python LLAMA/bin/python

See README.md in this folder for the environments, the cases and what the numbers mean. Every
system loads once in a process of its own; then they take turns, one computing while the others
are stopped (SIGSTOP). Rounds are outermost, so that a slow minute of the machine hits every case
and system alike; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CASES, QUICK, TARGETS, Case, Run
from floors import Model, floor
from plot import draw
from systems import HERE, ROOT, Worker, commands

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXED_RANKS = (8, 16, 32, 64)


def prepare(work: Path) -> None:
    """The model folder and the random adapters, the same for all systems; kept for the next run."""
    from export import export

    from chiliad.testing import SMOLLM2, base_info, write_random_adapter

    if not (work / "model" / "model.safetensors").exists():
        export(work / "model")
    base = base_info(SMOLLM2)
    for i in range(32):
        for name, rank, targets in (
            (f"rank16-{i:02}", 16, ATTENTION),
            (f"mixed-{i:02}", MIXED_RANKS[i % len(MIXED_RANKS)], "all-linear"),
        ):
            if not (work / "adapters" / name).exists():
                write_random_adapter(work / "adapters" / name, base, rank, targets, seed=i)  # type: ignore[arg-type]


# -- measuring ----------------------------------------------------------------------------


def prompts(case: Case, length: int, round_: int) -> list[list[int]]:
    """Random token ids: the same for every system, new ones every round, so that no cache helps."""
    rng = random.Random(f"{case.name} {round_}")
    return [[rng.randrange(100, 49000) for _ in range(length)] for _ in range(case.rows)]


def full_seconds(case: Case, run: Run, answer: dict[str, Any]) -> float:
    """Time of the full job. A smaller one is scaled: prefill by its tokens, decoding by its steps.

    A step of the smaller job has the same rows and adapters and a shorter context, so the
    estimate flatters its system, if anything.
    """
    prompt, output = run.prompt or case.prompt, run.output or case.output
    seconds: float = answer["seconds"]
    if (prompt, output) == (case.prompt, case.output):
        return seconds
    first: float = answer["first"] if output > 1 else seconds
    step = (seconds - first) / (output - 1) if output > 1 else 0.0
    return first * case.prompt / prompt + step * (case.output - 1)


def measure(
    cases: list[Case], workers: dict[str, Worker], rounds: int
) -> tuple[dict[str, dict[str, list[dict[str, Any]]]], list[dict[str, float]], dict[str, dict[str, float]]]:
    """Answers by case and system, ceilings by round, and the share of first tokens equal to chiliad's."""
    agreement: dict[str, dict[str, float]] = {}
    for case in cases:  # warm up: adapters loaded, code compiled; one short job, the same for all
        length = min(run.prompt or case.prompt for run in case.runs)
        firsts: dict[str, list[int]] = {}
        for run in case.runs:
            job = {"prompts": prompts(case, length, 0), "adapters": case.names(), "max_tokens": 2}
            began = time.perf_counter()
            firsts[run.system] = [row[0] for row in workers[run.process].ask(job)["tokens"]]
            print(
                f"warm-up {case.name:13} {run.system:15} {time.perf_counter() - began:7.1f} s",
                file=sys.stderr,
            )
        ours = firsts.get("chiliad", [])
        agreement[case.name] = {
            system: round(sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours), 3)
            for system, theirs in firsts.items() if ours and system != "chiliad"
        }  # fmt: skip
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {
        c.name: {r.system: [] for r in c.runs} for c in cases
    }
    ceilings = []
    for round_ in range(1, rounds + 1):
        if "chiliad" in workers:
            ceilings.append(workers["chiliad"].ask({"ceilings": True}))
        for case in cases:
            for run in case.runs if round_ % 2 else case.runs[::-1]:
                job = {
                    "prompts": prompts(case, run.prompt or case.prompt, round_),
                    "adapters": case.names(),
                    "max_tokens": run.output or case.output,
                }
                answer = workers[run.process].ask(job)
                del answer["tokens"]
                answer["full_seconds"] = full_seconds(case, run, answer)
                answers[case.name][run.system].append(answer)
                rate = case.rows * (case.prompt if case.prefill else case.output) / answer["full_seconds"]
                took = answer["seconds"]
                print(
                    f"round {round_} {case.name:13} {run.system:15} {rate:9.1f} tok/s {took:7.1f} s",
                    file=sys.stderr,
                )
    return answers, ceilings, agreement


# -- what it means ------------------------------------------------------------------------


def summarize(
    case: Case, answers: dict[str, list[dict[str, Any]]], lowest: dict[str, float] | None
) -> dict[str, Any]:
    count = case.rows * (case.prompt if case.prefill else case.output)
    median = {s: statistics.median(a["full_seconds"] for a in each) for s, each in answers.items()}
    summary: dict[str, Any] = {
        "rows": case.rows,
        "prompt": case.prompt,
        "output": case.output,
        "adapters": sorted({name for name in case.names() if name}),
        "unit": ("prompt" if case.prefill else "generated") + " tokens per second",
        "rate": {s: round(count / t, 1) for s, t in median.items()},
        "seconds": {s: [round(a["full_seconds"], 4) for a in each] for s, each in answers.items()},
        "first_token": {
            s: round(statistics.median(a["first"] for a in each), 4) for s, each in answers.items() if each[0]["first"]
        },
        "scaled": {
            run.system: {
                "measured": {"prompt": run.prompt or case.prompt, "output": run.output or case.output},
                "seconds": [round(a["seconds"], 4) for a in answers[run.system]],
            }
            for run in case.runs if run.prompt or run.output
        },
    }  # fmt: skip
    if "chiliad" in median:
        summary["chiliad_over"] = {
            s: round(t / median["chiliad"], 2) for s, t in median.items() if not s.startswith("chiliad")
        }
    if lowest is not None:
        summary["floor"] = lowest | {"rate": round(count / lowest["seconds"], 1)}
        for share, seconds in (("of_floor", lowest["seconds"]), ("of_roofline", lowest["roofline_seconds"])):
            summary[share] = {
                s: round(seconds / t, 3)
                for s, t in median.items()
                if not s.endswith(("int8", "int4", "Q4_1"))
            }
    return summary


def judge(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that this run can judge."""
    verdicts = []
    for target in TARGETS:
        rates = cases.get(target.case, {}).get("rate", {})
        if target.over == "floor":
            value = cases.get(target.case, {}).get("of_floor", {}).get(target.system)
        else:
            other = rates.get(target.over) or cases.get(target.over, {}).get("rate", {}).get(target.system)
            value = round(rates[target.system] / other, 3) if other and target.system in rates else None
        if value is not None:
            verdicts.append({
                "case": target.case, "system": target.system, "over": target.over,
                "value": value, "at_least": target.at_least, "met": value >= target.at_least,
            })  # fmt: skip
    return verdicts


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in info if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    shown = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "flags": [flag for flag in shown if flag in cpu.get("flags", "").split()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.strip(),
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, case in result["cases"].items():
        lines.append(f"{name}: {case['rows']} x {case['prompt']}/{case['output']}, {case['unit']}")
        for system, rate in case["rate"].items():
            over = case.get("chiliad_over", {}).get(system)
            share, roofline = (case.get(key, {}).get(system) for key in ("of_floor", "of_roofline"))
            lines.append(
                f"  {system:16}{rate:10.1f}"
                + (f"{share:8.1%} of the floor, {roofline:6.1%} of the roofline" if share else " " * 44)
                + (f"   chiliad {over:.2f}x" if over else "")
                + ("   (scaled)" if system in case["scaled"] else "")
            )
    for t in result["targets"]:
        verdict = "met   " if t["met"] else "missed"
        lines.append(
            f"{verdict} {t['case']}: {t['system']} / {t['over']} = {t['value']:.3g} (at least {t['at_least']})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    env = os.environ.get
    parser.add_argument("--vllm-python", default=env("VLLM_PYTHON"), help="python of vLLM's environment")
    parser.add_argument("--llama-python", default=env("LLAMA_PYTHON"), help="python with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"one round of {', '.join(QUICK)}")
    parser.add_argument(
        "--full", action="store_true", help="no smaller jobs for slow systems (half an hour more)"
    )
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--systems", nargs="+", help="only these, as in the output")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-mode", choices=("inline", "processes"), default="inline")
    parser.add_argument(
        "--vllm-batched-tokens", type=int, help="max_num_batched_tokens instead of its default"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="model, adapters, logs")
    parser.add_argument("--out", type=Path, default=HERE / "result.json", help="and a .png beside it")
    args = parser.parse_args()

    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    work = args.work.resolve()
    prepare(work)
    known = commands(args, work)
    wanted = args.cases or (QUICK if args.quick else [case.name for case in CASES])
    cases = []
    for case in CASES:
        runs = [r for r in case.runs if r.process in known and (not args.systems or r.system in args.systems)]
        if args.full:
            runs = [replace(run, prompt=None, output=None) for run in runs]
        if case.name in wanted and runs:
            cases.append(replace(case, runs=tuple(runs)))
    rounds = 1 if args.quick else args.rounds
    workers: dict[str, Worker] = {}
    load = [os.getloadavg()[0]]
    try:
        for key in dict.fromkeys(run.process for case in cases for run in case.runs):
            workers[key] = Worker.start(key, known[key], work / f"{key}.log")
            print(f"{key}: ready after {workers[key].ready['load_seconds']} s", file=sys.stderr)
        loaded = time.perf_counter() - began
        answers, measured, agreement = measure(cases, workers, rounds)
        load.append(os.getloadavg()[0])
    finally:
        for worker in workers.values():
            worker.stop()

    ceilings = {
        key: statistics.median(each[key] for each in measured) for key in ("read", "multiply") if measured
    }
    model = Model.read(work / "model")
    result: dict[str, Any] = {
        "command": "python benchmarks/peers/run.py " + " ".join(shown_arguments()),
        "machine": machine() | {"threads": args.threads, "load_average": [round(x, 2) for x in load]},
        "rounds": rounds,
        "minutes": {"loading": round(loaded / 60, 1), "all": round((time.perf_counter() - began) / 60, 1)},
        "systems": {
            key: worker.ready | {"peak_rss_mb": worker.rss_mb} for key, worker in workers.items()
        },
        "ceilings": {
            "read_gb_s": round(ceilings["read"] / 1e9, 2),
            "bfloat16_gflop_s": round(ceilings["multiply"] / 1e9, 1),
            "by_round": [{key: round(value / 1e9, 2) for key, value in each.items()} for each in measured],
        } if measured else None,
        "cases": {
            case.name: summarize(
                case, answers[case.name],
                floor(case, model, work, ceilings["read"], ceilings["multiply"]) if measured else None,
            ) | {"first_token_as_chiliad": agreement[case.name]}
            for case in cases
        },
    }  # fmt: skip
    result["targets"] = judge(result["cases"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out.with_suffix(".png"))
    print(table(result))


def shown_arguments() -> list[str]:
    """The command line without this machine's paths."""
    return [("PATH" if os.sep in argument else argument) for argument in sys.argv[1:]]


if __name__ == "__main__":
    main()
