"""The client: against the real server on a tiny model, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from chiliad.adapters.registry import Registry
from chiliad.bench.client import Target
from chiliad.bench.serve import Client, replay, run
from chiliad.bench.workload import Trace, synthetic
from chiliad.cli import cli
from chiliad.config import EngineConfig, KernelConfig, ServerConfig
from chiliad.engine.engine import Engine
from chiliad.engine.stream import AsyncEngine
from chiliad.errors import InvalidConfig
from chiliad.kernels import load
from chiliad.models import load_model
from chiliad.serve.server import Server, bind
from chiliad.testing import tiny_model, write_random_adapter

KEYS = ("sk-one", "sk-two")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with six adapters that knows two tenants."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_model(folder / "tiny")
    kernels = load(threads=1)
    model = load_model(str(folder / "tiny"), kernels, "float32")
    registry = Registry(":memory:", model.info)
    for i in range(6):
        write_random_adapter(folder / "adapters" / f"lora-{i}", model.info, 4, seed=i)
    registry.scan(folder / "adapters")
    settings = EngineConfig(memory=100_000_000, dtype="float32", kernel=KernelConfig(threads=1))
    engine = AsyncEngine(lambda sink: Engine(model, kernels, registry, settings, sink))
    config = ServerConfig(port=0, api_keys=KEYS, drain_timeout=5)
    sock = bind(config)
    server = Server(engine, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server._loop is not None
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server._loop.call_soon_threadsafe(server.begin_drain)
    thread.join(120)
    assert not thread.is_alive()
    registry.close()


def trace(**overrides: object) -> Trace:
    settings: dict[str, object] = {
        "rate": 40,
        "duration": 1,
        "adapters": 6,
        "prompt": (4, 30),
        "output": (1, 12),
    }
    return synthetic(**settings | overrides)  # type: ignore[arg-type]


def test_real_server(url: str) -> None:
    work = trace(tenants=(2, 1), prefix=32)
    outcomes, result = run(Client(Target.parse(url), keys=KEYS, vocab=300), work)
    assert result["completed"] == len(work) == 40
    assert result["total_output_tokens"] == work.facts()["output_tokens"]  # ignore_eos
    assert result["total_input_tokens"] == work.facts()["prompt_tokens"]
    for outcome in outcomes:
        assert sum(outcome.counts) == outcome.item.output
        assert outcome.sent <= outcome.times[0] <= outcome.times[-1] <= outcome.ended
        assert outcome.times == sorted(outcome.times)
    server = result["server"]
    assert server["counters"]["vllm:generation_tokens_total"] == result["total_output_tokens"]
    used = work.facts()["adapters_used"]
    assert server["counters"]["adapter_loads_total{result=ok,tier=ram}"] in (used, used - 1)  # the probe's
    assert 0 < server["adapter_hit_rate"] <= 1
    assert set(result["tenants"]) == {"tenant-00", "tenant-01"}
    json.dumps(result)


def test_without_extensions(url: str) -> None:
    client = Client(Target.parse(url), keys=KEYS, extensions=False, vocab=300)
    outcomes, result = run(client, trace(duration=0.3))
    assert result["completed"] == 12
    assert all(0 < o.output_tokens <= o.item.output for o in outcomes)


def test_command(url: str, tmp_path: Path) -> None:
    args = [
        "bench",
        "serve",
        url,
        "--rate",
        "30",
        "--duration",
        "0.5",
        "--num-adapters",
        "3",
        "--input-len",
        "4:9",
    ]
    args += [
        "--output-len",
        "3",
        "--vocab",
        "300",
        "--api-key",
        "sk-one",
        "--save-trace",
        str(tmp_path / "t.jsonl"),
    ]
    args += ["--result", str(tmp_path / "r.json"), "-o", "json"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["completed"] == 15
    assert result["total_output_tokens"] == 45
    assert len(Trace.load(tmp_path / "t.jsonl")) == 15


def test_mistakes_show_before_the_clock_starts(url: str) -> None:
    with pytest.raises(InvalidConfig, match="has 6"):
        run(Client(Target.parse(url), keys=KEYS), trace(adapters=7, popularity="distinct"))
    with pytest.raises(InvalidConfig, match="model_not_found"):
        run(Client(Target.parse(url), adapters="nobody-{}", keys=KEYS), trace())
    with pytest.raises(InvalidConfig, match="401"):
        run(Client(Target.parse(url)), trace())
    with pytest.raises(InvalidConfig, match="no server"):
        run(Client(Target.parse("127.0.0.1:9")), trace())


def test_only_this_machine() -> None:
    for text in ("http://127.0.0.1:8000/v1", "localhost:8000", "http://[::1]:8000", "127.1.2.3"):
        assert not Target.parse(text).tls
    assert Target.parse("http://127.0.0.1:8000/v1").prefix == ""
    for text in ("http://example.org", "10.0.0.1:8000", "http://localhost.example.org"):
        with pytest.raises(InvalidConfig, match="--allow-remote"):
            Target.parse(text)
    assert Target.parse("https://example.org/proxy/v1", allow_remote=True).prefix == "/proxy"
    for text in ("ftp://localhost", "http://", "unix:/tmp/x"):
        with pytest.raises(InvalidConfig):
            Target.parse(text)


# -- servers that misbehave --------------------------------------------------------------

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[Client]:
    """A server whose answer to each request `handler` writes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await handler(head.split(b" ")[1] + await reader.readexactly(length), writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Client(Target.parse(f"127.0.0.1:{port}"), "base", "a{}")
    finally:
        server.close()


def stream(*events: str) -> bytes:
    body = "".join(f"{'' if event[0] == ':' else 'data: '}{event}\n\n" for event in events)
    return f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{body}".encode()


TOKEN = '{"choices":[{"text":"a"}]}'


async def test_errors_are_counted_not_raised() -> None:
    count = 0

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        if not request.startswith(b"/v1/completions"):
            return  # /metrics: closed without an answer
        count += 1
        answers = {
            1: stream(TOKEN, "[DONE]"),  # the probe
            2: b'HTTP/1.1 503 Busy\r\ncontent-length: 41\r\n\r\n{"error":{"code":"unavailable","a":"bc"}}',
            3: b"HTTP/1.1 429 Slow down\r\n\r\nnot json",
            4: stream(TOKEN),  # breaks off
            5: stream(TOKEN, '{"error":{"message":"boom"}}', "[DONE]"),
            6: b"",
            7: b"nonsense\r\n\r\n",
            8: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            9: stream("{not json"),
        }
        writer.write(answers.get(count, stream(TOKEN, TOKEN, "[DONE]")))

    async with answering(handler) as client:
        outcomes, result = await replay(client, trace(duration=0.3))
    assert (result["num_prompts"], result["completed"], result["aborted"]) == (12, 4, 2)
    assert sum(result["errors"].values()) == 8
    assert {"503 unavailable", "429 not json", "200 the stream broke off", "200 boom"} <= set(
        result["errors"]
    )
    assert all(o.output_tokens == 2 for o in outcomes if not o.error)
    assert "server" not in result


async def test_chunks_split_anywhere() -> None:
    body = stream(
        TOKEN, ": ping", TOKEN, '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}', "[DONE]"
    )
    head, _, payload = body.partition(b"\r\n\r\n")

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/v1/completions" not in request:
            return
        writer.write(
            head.replace(b"content-type", b"Transfer-Encoding: chunked\r\ncontent-type") + b"\r\n\r\n"
        )
        for i in range(0, len(payload), 7):
            piece = payload[i : i + 7]
            writer.write(f"{len(piece):x};x=y\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with answering(handler) as client:
        outcomes, result = await replay(client, trace(duration=0.1))
    assert result["completed"] == 4
    assert all((o.prompt_tokens, o.output_tokens, len(o.times)) == (3, 5, 2) for o in outcomes)


async def test_ends_in_time() -> None:
    first = True

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        if b"/v1/completions" in request:
            writer.write(stream(TOKEN, *(["[DONE]"] if first else [])))
            await writer.drain()
            if not first:
                await asyncio.sleep(3600)
            first = False

    async with answering(handler) as client:
        limited = Client(client.target, "base", "a{}", max_seconds=0.5)
        async with asyncio.timeout(120):
            _, result = await replay(limited, trace(duration=2))
    assert result["completed"] == 0
    # the last ones may not even have heard the 200
    assert all(error.endswith("unfinished") for error in result["errors"])
    assert sum(result["errors"].values()) == result["num_prompts"]
    assert result["num_prompts"] < 80
