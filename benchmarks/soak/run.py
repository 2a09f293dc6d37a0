"""Does it hold? A server under random load, changes, disconnects and nonsense, and what is left afterwards.

    python benchmarks/soak/run.py --minutes 60

Everything goes over HTTP to a server process of its own. The run fails (exit code 1) on an answer
that is not one of those meant for the case, a stream without exactly one end, a line of error in
the server's log, pages that stay taken, or memory and open files that grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    ROOT,
    Report,
    arguments,
    load,
    load_model,
    median,
    open_handles,
    resident_bytes,
    say,
    scratch,
    write_random_adapter,
)

from chiliad.bench.client import Target, request

RANKS = (1, 2, 4, 8, 16, 32)
TARGETS: tuple[Any, ...] = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), "all-linear")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = (OSError, EOFError, ValueError, IndexError)

#: What a request that is right in itself may be told, because others were there at the same time.
COLLISIONS = {
    (404, "model_not_found"),  # removed a moment ago
    (404, "adapter_not_found"),
    (409, "adapter_exists"),
    (400, "adapter_exists"),  # vLLM's verb says it so
    (400, "adapter_changed"),  # its files were replaced under its name
    (400, "invalid_adapter"),  # they were being replaced
    (429, "overloaded"),
    (503, "out_of_memory"),
    (503, "unavailable"),
}


class Unexpected(Exception):
    """An answer that nobody meant to give."""


@dataclass
class Soak:
    """What all actors share."""

    target: Target
    folders: Path
    base: Any
    model: str
    rng: random.Random
    vocab: int
    until: float
    names: list[str] = field(default_factory=list)  # probably registered
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    serials: Iterator[int] = field(default_factory=itertools.count)

    def hidden(self) -> str:
        """A folder name that no scan looks at and nobody else uses."""
        return f".{next(self.serials)}"  # in one step, whatever thread asks

    async def send(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        async with request(self.target, method, path, raw, headers) as response:
            return response.status, await response.read()

    def judge(self, what: str, status: int, body: bytes, fine: set[int]) -> None:
        """Count an answer; raise Unexpected if it is neither fine nor a collision."""
        if status in fine:
            self.counts[f"{what}: {status}"] += 1
            return
        try:
            code = json.loads(body)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = "?"
        self.counts[f"{what}: {status} {code}"] += 1
        if (status, code) not in COLLISIONS:
            raise Unexpected(f"{what}: {status} {body[:300]!r}")


# -- asking ------------------------------------------------------------------------------------


def question(soak: Soak) -> tuple[str, dict[str, Any]]:
    """A request that is right in itself."""
    rng = soak.rng
    body: dict[str, Any] = {"model": soak.model, "max_tokens": rng.randint(1, 40)}
    if soak.names and rng.random() < 0.85:
        body["model"] = rng.choice(soak.names)
    if soak.names and rng.random() < 0.1:
        body["model"] = soak.model
        body["adapters"] = [
            {"id": rng.choice(soak.names), "scale": rng.choice([0.5, 1, -1])}
            for _ in range(rng.randint(1, 3))
        ]
    extras: dict[str, Any] = {
        "temperature": rng.choice([0, 0.7, 1.5]),
        "seed": rng.randint(0, 9),
        "top_p": 0.9,
        "n": rng.randint(1, 3),
        "priority": rng.randint(-3, 3),
        "cache_salt": rng.choice(["a", "b"]),
        "prefix_cache": rng.random() < 0.7,
        "stop": rng.choice([["the"], "a", ["\n", "!!"]]),
        "ignore_eos": True,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": -5},
    }
    body |= {key: extras[key] for key in rng.sample(sorted(extras), rng.randint(0, 4))}
    if rng.random() < 0.5:
        body["stream"] = True
        if rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    shared = "You answer in one short sentence. " * rng.choice([0, 1, 6])
    if rng.random() < 0.5:
        text = " ".join(
            rng.choice(["why", "who", "card", "blue", "7", "é"]) for _ in range(rng.randint(1, 60))
        )
        body["messages"] = [{"role": "system", "content": shared}, {"role": "user", "content": text}]
        if rng.random() < 0.1:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "/v1/chat/completions", body
    body["prompt"] = [rng.randrange(soak.vocab) for _ in range(rng.randint(1, 200))]
    if rng.random() < 0.1:
        body["logprobs"] = 2
        body["echo"] = rng.random() < 0.5
    return "/v1/completions", body


def check_stream(lines: list[bytes], body: dict[str, Any]) -> str:
    """Every choice ends once and the stream ends once -> "" or the code of an error within."""
    data = [line[6:] for line in lines if line.startswith(b"data: ")]
    if not data or data[-1] != b"[DONE]" or data.count(b"[DONE]") != 1:
        raise Unexpected(f"a stream ended with {data[-1:]!r}, {data.count(b'[DONE]')} times done: {body}")
    ended: Counter[int] = Counter()
    usages = 0
    for item in map(json.loads, data[:-1]):
        if "error" in item:
            if item is not None and json.loads(data[-2]) != item:
                raise Unexpected(f"something follows an error: {data[-3:]!r}")
            return str(item["error"]["code"])
        usages += item.get("usage") is not None
        for choice in item["choices"]:
            if ended[choice["index"]]:
                raise Unexpected(f"choice {choice['index']} goes on after its end: {item}")
            ended[choice["index"]] += choice["finish_reason"] is not None
    if sorted(ended.elements()) != list(range(body.get("n", 1))):
        raise Unexpected(f"choices ended {dict(ended)}: {body}")
    if usages != bool(body.get("stream_options")):
        raise Unexpected(f"{usages} usages: {body}")
    return ""


async def ask(soak: Soak) -> None:
    """One request: read to its end, or left in the middle."""
    path, body = question(soak)
    leave = soak.rng.random()
    raw = json.dumps(body).encode()
    lines: list[bytes] = []
    async with request(soak.target, "POST", path, raw) as response:
        if leave < 0.05:
            soak.counts["left at once"] += 1
            return
        if response.status != 200 or not body.get("stream"):
            answer = await response.read()
            soak.judge("answer", response.status, answer, {200})
            if response.status == 200:
                reasons = [choice["finish_reason"] for choice in json.loads(answer)["choices"]]
                if len(reasons) != body.get("n", 1) or not set(reasons) <= {"stop", "length"}:
                    raise Unexpected(f"finish reasons {reasons}: {body}")
            return
        patience = soak.rng.randint(1, 30) if leave < 0.25 else 10**9
        async for line in response.lines():
            lines.append(line)
            if len(lines) > patience:
                soak.counts["left a stream"] += 1
                return
    code = check_stream(lines, body)
    soak.counts[f"stream: {code or 'whole'}"] += 1
    if code and not any(code == known for _, known in COLLISIONS):
        raise Unexpected(f"a stream broke with {code}: {lines[-4:]!r}")


async def hang_up(soak: Soak) -> None:
    """Send a request that is right, and go before anything comes back."""
    path, body = question(soak)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
    whole = head + raw
    _, writer = await asyncio.open_connection(soak.target.host, soak.target.port)
    writer.write(whole[: soak.rng.randint(1, len(whole))] if soak.rng.random() < 0.5 else whole)
    await writer.drain()
    await asyncio.sleep(soak.rng.choice([0, 0.01, 0.1]))
    writer.close()
    soak.counts["hung up"] += 1


# -- changing ----------------------------------------------------------------------------------


def fresh(soak: Soak, name: str) -> Path:
    """A random adapter's folder below --adapters (new, or in the place of an old one)."""
    rank, targets = soak.rng.choice(RANKS), soak.rng.choice(TARGETS)
    folder, written = soak.folders / name, soak.folders / soak.hidden()
    write_random_adapter(written, soak.base, rank, targets, seed=soak.rng.getrandbits(31))
    folder.mkdir(exist_ok=True)
    for file in written.iterdir():  # somebody else may be writing the same adapter
        file.replace(folder / file.name)
    written.rmdir()
    return folder


async def change(soak: Soak) -> None:
    """Add, replace, upload, pin, unpin or remove something."""
    rng = soak.rng
    verb = rng.choice(
        ["add", "add", "upload", "upload", "replace", "inplace", "remove", "remove", "pin", "unpin"]
    )
    name = rng.choice(soak.names) if soak.names and verb not in ("add", "upload") else f"x{rng.randrange(60)}"
    if verb in ("add", "replace"):
        await asyncio.to_thread(fresh, soak, name)
        body: Any = {"name": name, "replace": verb == "replace"}
        status, answer = await soak.send("POST", "/v1/adapters", body)
        soak.judge(verb, status, answer, {201})
    elif verb == "inplace":
        folder = await asyncio.to_thread(fresh, soak, name)
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        status, answer = await soak.send("POST", "/v1/load_lora_adapter", body)
        soak.judge(verb, status, answer, {200})
    elif verb == "upload":
        folder = await asyncio.to_thread(fresh, soak, soak.hidden())
        parts = {"config": (folder / CONFIG).read_bytes(), "model": (folder / TENSORS).read_bytes()}
        shutil.rmtree(folder)
        status, answer = await upload(soak, name, parts, replace=rng.random() < 0.5)
        soak.judge(verb, status, answer, {201})
    elif verb == "remove":
        if rng.random() < 0.5:
            status, answer = await soak.send("DELETE", f"/v1/adapters/{name}")
        else:
            status, answer = await soak.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        soak.judge(verb, status, answer, {200})
    else:
        method = "PUT" if verb == "pin" else "DELETE"
        status, answer = await soak.send(method, f"/v1/adapters/{name}/pin")
        soak.judge(verb, status, answer, {200})
    if status == 404 or verb == "remove":
        with contextlib.suppress(ValueError):
            soak.names.remove(name)
    elif status < 300 and name not in soak.names:
        soak.names.append(name)


async def upload(soak: Soak, name: str, parts: dict[str, bytes], replace: bool) -> tuple[int, bytes]:
    edge = "soak-boundary"
    body = b""
    for key, value in {"name": name.encode(), "replace": str(replace).lower().encode(), **parts}.items():
        extra = f'; filename="{key}"' if key in parts else ""
        body += f'--{edge}\r\ncontent-disposition: form-data; name="{key}"{extra}\r\n\r\n'.encode()
        body += value + b"\r\n"
    body += f"--{edge}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={edge}"}
    return await soak.send("POST", "/v1/adapters", body, headers)


# -- nonsense ----------------------------------------------------------------------------------


async def nonsense(soak: Soak) -> None:
    """A request that must be refused, and is."""
    rng = soak.rng
    chat = {"model": soak.model, "messages": [{"role": "user", "content": "x"}]}
    cases: list[tuple[str, str, Any]] = [
        ("POST", "/v1/chat/completions", b"{" * rng.randint(1, 5000)),
        ("POST", "/v1/chat/completions", b"\xff\xfe\x00"),
        ("POST", "/v1/chat/completions", chat | {"temperature": 9}),
        ("POST", "/v1/chat/completions", chat | {"messages": []}),
        ("POST", "/v1/chat/completions", chat | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("POST", "/v1/chat/completions", chat | {"model": f"ghost-{rng.random()}"}),
        ("POST", "/v1/chat/completions", chat | {"max_tokens": 10**9}),
        ("POST", "/v1/chat/completions", chat | {"n": 100_000}),
        ("POST", "/v1/completions", {"model": soak.model, "prompt": [soak.vocab + 5]}),
        ("POST", "/v1/completions", {"model": soak.model, "prompt": [1] * 100_000}),
        ("POST", "/v1/completions", {"model": soak.model, "prompt": {"a": 1}}),
        ("POST", "/v1/completions", {"model": "../../etc/passwd", "prompt": "x"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "/etc"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "x"}),
        ("POST", "/v1/adapters", {"name": "no-such-folder"}),
        ("GET", "/v1/adapters/nobody", None),
        ("DELETE", "/v1/adapters/nobody", None),
        ("PUT", "/v1/adapters/nobody/pin", None),
        ("GET", "/v1/models?limit=-1", None),
        ("PATCH", "/v1/models", None),
        ("GET", f"/{rng.random()}", None),
    ]
    pick = rng.randrange(len(cases) + 3)
    if pick < len(cases):
        method, path, body = cases[pick]
        status, answer = await soak.send(method, path, body)
    elif pick == len(cases):  # an upload of garbage
        parts = {"config": b'{"peft_type": "LORA"}', "model": rng.randbytes(rng.randint(0, 5000))}
        status, answer = await upload(soak, f"bad{rng.randrange(9)}", parts, replace=False)
    elif pick == len(cases) + 1:  # an adapter with NaN in it
        folder = await asyncio.to_thread(fresh, soak, soak.hidden())
        tensors = bytearray((folder / TENSORS).read_bytes())
        tensors[-2:] = b"\xc0\x7f"
        parts = {"config": (folder / CONFIG).read_bytes(), "model": bytes(tensors)}
        shutil.rmtree(folder)
        status, answer = await upload(soak, f"bad{rng.randrange(9)}", parts, replace=False)
    else:  # not HTTP at all
        reader, writer = await asyncio.open_connection(soak.target.host, soak.target.port)
        writer.write(rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n")
        await writer.drain()
        with contextlib.suppress(*BROKEN, TimeoutError):
            async with asyncio.timeout(1):
                await reader.read(1000)
        writer.close()
        soak.counts["nonsense: not HTTP"] += 1
        return
    soak.counts[f"nonsense: {status}"] += 1
    if not 400 <= status < 500:
        raise Unexpected(f"nonsense {pick} was answered with {status}: {answer[:300]!r}")
    json.loads(answer)["error"]["message"]


# -- the run -----------------------------------------------------------------------------------


async def actor(soak: Soak, act: Callable[[Soak], Coroutine[Any, Any, None]], pause: float) -> None:
    while time.monotonic() < soak.until:
        try:
            async with asyncio.timeout(300):
                await act(soak)
        except Unexpected as fault:
            soak.faults.append(str(fault))
        except TimeoutError:
            soak.faults.append(f"{act.__name__}: no answer within 300 s")
        except BROKEN as error:
            soak.faults.append(f"{act.__name__}: {error!r}")
        await asyncio.sleep(soak.rng.random() * pause)


async def pool(soak: Soak) -> dict[str, Any]:
    status, body = await soak.send("GET", "/v1/pool")
    if status != 200:
        raise Unexpected(f"/v1/pool: {status}")
    found: dict[str, Any] = json.loads(body)
    if sum(found["pages"].values()) != found["pages_total"] or min(found["pages"].values()) < 0:
        raise Unexpected(f"pages do not add up: {found['pages']}")
    return found


async def watch(soak: Soak, pid: int) -> None:
    while time.monotonic() < soak.until:
        try:
            found = await pool(soak)
            await soak.send("GET", "/metrics")
            soak.samples.append(
                {
                    "resident": resident_bytes(pid),
                    "open_files": open_handles(pid),
                    "running": found["batch"]["running"],
                    "waiting": found["queue"]["waiting"],
                    "adapters": found["adapters"]["registered"],
                    "free": found["pages"]["free"] / found["pages_total"],
                }
            )
        except (Unexpected, *BROKEN) as error:
            soak.faults.append(f"watch: {error!r}")
        await asyncio.sleep(2)


async def empty(soak: Soak) -> dict[str, Any]:
    """After everybody has left: wait until nothing runs, remove every adapter, look at the pool."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = await pool(soak)
        if not found["batch"]["running"] and not found["queue"]["waiting"]:
            break
        await asyncio.sleep(0.1)
    while True:
        _, body = await soak.send("GET", "/v1/adapters?limit=1000")
        cards = json.loads(body)["data"]
        if not cards:
            break
        for card in cards:
            await soak.send("DELETE", f"/v1/adapters/{card['id']}")
    return await pool(soak)


async def run(soak: Soak, args: argparse.Namespace, pid: int) -> dict[str, Any]:
    await asyncio.gather(
        watch(soak, pid),
        *(actor(soak, ask, 0.05) for _ in range(args.askers)),
        *(actor(soak, hang_up, 0.5) for _ in range(2)),
        *(actor(soak, change, 0.2) for _ in range(3)),
        *(actor(soak, nonsense, 0.02) for _ in range(3)),
    )
    return await empty(soak)


@contextmanager
def server(
    args: argparse.Namespace, folders: Path, home: Path
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    log = home / "server.log"
    command = [sys.executable, "-m", "chiliad.cli", "serve", args.model, "--name", "base", "--adapters", str(folders),
               "--port", "0", "--memory", args.memory, "--dtype", args.dtype, "--threads", str(args.threads),
               "--policy", args.policy, "--max-waiting", str(args.max_waiting)]  # fmt: skip
    environment = os.environ | {"CHILIAD_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (match := re.search(r"listening http://127.0.0.1:(\d+)/v1", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()}")
            time.sleep(0.05)
        time.sleep(1)
        yield process, int(match[1])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def main() -> None:
    args = arguments(
        __doc__,
        quick={"minutes": 0.3, "askers": 8},
        minutes=60.0,
        askers=24,
        memory="550MB",
        policy="fcfs",
        max_waiting=32,
        seed=0,
        log=Path(),
    )
    args.log = None if args.log == Path() else args.log
    report = Report("Does it hold?", args)
    base = load_model(args.model, load(threads=1), args.dtype)
    with scratch(args) as root:
        (root / "adapters").mkdir()
        with server(args, root / "adapters", root) as (process, port):
            soak = Soak(
                Target("127.0.0.1", port), root / "adapters", base.info, "base", random.Random(args.seed),
                base.arch.vocab, time.monotonic() + 60 * args.minutes,
            )  # fmt: skip
            del base
            left = asyncio.run(run(soak, args, process.pid))
            handles = open_handles(process.pid)
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=120)
        log = (root / "server.log").read_text()
    samples = soak.samples
    third = max(1, len(samples) // 3)
    begun, ended = samples[third : 2 * third], samples[-third:]
    grown = {
        key: median([s[key] for s in ended]) - median([s[key] for s in begun])
        for key in ("resident", "open_files")
    }
    if args.log is not None:
        args.log.write_text(log)
    bad_lines = re.findall(r"^.*(?:Traceback| [EC] ).*$", log, re.MULTILINE)
    report.result = {
        "answers": dict(sorted(soak.counts.items())),
        "requests": soak.counts.total(),
        "faults": soak.faults[:20],
        "log": bad_lines[:20],
        "left": left["pages"],
        "adapter_loads": left["adapters"]["loads"],
        "adapter_evictions": left["adapters"]["evictions"],
        "preemptions": left["batch"]["preemptions"],
        "mean_distinct_adapters": left["batch"]["mean_distinct_adapters"],
        "samples": samples[:: max(1, len(samples) // 40)],
    }
    minutes = max(1e-9, args.minutes / 3)
    for key, count in sorted(soak.counts.items()):
        say(f"{count:8d} {key}")
    for fault in [*soak.faults[:5], *bad_lines[:5]]:
        say(f"  {fault}")
    report.target("answers that nobody meant", len(soak.faults), 0)
    report.target("lines of error in the log", len(bad_lines), 0)
    taken = left["pages_total"] - left["pages"]["free"] - left["pages"]["prefix"]
    report.target("pages left", taken, 0)
    report.target("sequences left", left["batch"]["running"] + left["queue"]["waiting"], 0)
    report.target("growth of resident memory, MB per minute", grown["resident"] / 1e6 / minutes, 1.0)
    report.target("growth of open files", grown["open_files"], 20)
    report.target("open files at the end", handles, 60)
    report.target("exit status", status, 0)
    report.write()
    if not all(target["met"] for target in report.targets.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
