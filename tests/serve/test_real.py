"""The real server: engine, sockets and the `openai` package, on a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest

from chiliad.adapters.registry import Registry
from chiliad.config import EngineConfig, KernelConfig, ServerConfig
from chiliad.engine.engine import Engine
from chiliad.engine.stream import AsyncEngine
from chiliad.kernels import load
from chiliad.memory.pool import Owner
from chiliad.models import load_model
from chiliad.serve.server import Server, bind
from chiliad.testing import write_random_adapter

NUM_ADAPTERS = 64
RANKS = (1, 2, 3, 5, 8, 16)
KEY = "sk-test"
PATIENCE = 120.0  # seconds, for a machine that does other things too
T = TypeVar("T")


@dataclass
class Running:
    url: str
    engine: AsyncEngine
    server: Server
    loop: asyncio.AbstractEventLoop
    adapters: Path

    def on_engine(self, function: Callable[[], T]) -> T:
        """Run on the engine thread between two steps."""
        return self.engine.engine.call(function).result(timeout=PATIENCE)

    def wait_idle(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            stats = self.on_engine(self.engine.engine.stats)
            if not (stats.running or stats.waiting) and self.engine.engine.idle:
                return
            time.sleep(0.01)
        raise AssertionError("the engine does not become idle")


def check_pool(engine: Engine) -> None:
    """Conservation laws, and nobody but the prefix cache and the idle adapters holds a page."""
    prefix = engine.scheduler.prefix
    assert prefix is not None
    engine.pool.check({Owner.KV: prefix.held(), Owner.ADAPTER: engine.store.held()})
    prefix.clear()
    assert engine.pool.usage()["kv"] == 0


@pytest.fixture(scope="module")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    kernels = load(threads=1)
    model = load_model(str(model_folder), kernels, "float32")
    for i in range(NUM_ADAPTERS):
        write_random_adapter(
            folder / "adapters" / f"a{i:02d}", model.info, RANKS[i % len(RANKS)], seed=i, std=1.0
        )
    registry = Registry(folder / "registry.sqlite", model.info)
    registry.scan(folder / "adapters")
    (folder / "corpus").mkdir()
    (folder / "disk").mkdir()
    (folder / "uploads").symlink_to(folder / "disk")  # as on machines where /home is a link
    settings = EngineConfig(memory=200_000_000, dtype="float32", kernel=KernelConfig(threads=1))
    engine = AsyncEngine(lambda sink: Engine(model, kernels, registry, settings, sink))
    config = ServerConfig(
        port=0,
        api_keys=(KEY,),
        adapter_dirs=(folder / "adapters", folder / "corpus"),
        uploads=folder / "uploads",
        drain_timeout=60,
    )
    sock = bind(config)
    server = Server(engine, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    assert server._loop is not None
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    running = Running(url, engine, server, server._loop, folder / "adapters")
    yield running
    running.wait_idle()
    running.on_engine(lambda: check_pool(engine.engine))
    assert not engine.error
    server._loop.call_soon_threadsafe(server.begin_drain)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    registry.close()


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=PATIENCE) as client:
        yield client


def ask(client: openai.OpenAI, model: str = "tiny", **more: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}} | more
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Which way?"}], **settings
    )


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 5
    assert answer.choices[0].finish_reason == "length"
    assert text_of(answer) == text_of(ask(client))
    assert answer.model == "tiny"


def test_stream_equals_whole(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == text_of(ask(client))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_completions(client: openai.OpenAI) -> None:
    prompts = ["one two", "three", "one two"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [c.index for c in answer.choices] == list(range(6))
    texts = [c.text for c in answer.choices]
    assert texts[0] == texts[1] == texts[4]
    assert texts[2] != texts[0]


def test_echo_logprobs_agree_with_generation(client: openai.OpenAI) -> None:
    """A token's logprob is the same whether it was generated or given."""
    made = client.completions.create(
        model="a03", prompt="one two three", max_tokens=5, temperature=0, logprobs=2
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    ids = client.completions.create(
        model="a03", prompt="one two three", max_tokens=5, temperature=0,
        extra_body={"return_token_ids": True},
    ).choices[0].model_extra  # fmt: skip
    assert ids is not None
    prompt = [*ids["prompt_token_ids"], *ids["token_ids"]]
    echoed = client.completions.create(
        model="a03", prompt=prompt, max_tokens=0, echo=True, logprobs=2, temperature=0
    ).choices[0]
    assert echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == len(prompt)
    assert echoed.logprobs.tokens[-5:] == logprobs.tokens
    assert echoed.logprobs.token_logprobs[-5:] == pytest.approx(logprobs.token_logprobs, abs=1e-4)


def test_choices_and_seed(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = ask(client, n=3, seed=seed, temperature=1.5)
        return [c.message.content for c in answer.choices]

    first = texts(5)
    assert len(set(first)) == 3
    assert texts(5) == first
    assert texts(6) != first


def test_stop_split_across_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=60, logprobs=True)
    tokens = [item.token for item in answer.choices[0].logprobs.content]
    text = text_of(answer)
    for left, right in itertools.pairwise(tokens):
        stop = left[-1:] + right[:1]
        if stop.isascii() and stop.isprintable() and len(stop) == 2:
            expected = text[: text.index(stop)]
            break
    else:
        raise AssertionError("no two printable tokens meet")
    whole = ask(client, max_tokens=60, stop=[stop])
    assert (text_of(whole), whole.choices[0].finish_reason) == (expected, "stop")
    chunks = ask(client, max_tokens=60, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_logprobs(client: openai.OpenAI) -> None:
    content = ask(client, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert len(content) == 12
    for item in content:
        assert len(item.top_logprobs) == 5
        values = [top.logprob for top in item.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert item.logprob == pytest.approx(values[0])  # greedy takes the likeliest
        assert item.token == item.top_logprobs[0].token


def test_logit_bias(client: openai.OpenAI) -> None:
    answer = ask(client, logit_bias={"70": 100}, logprobs=True, max_tokens=4)
    assert len({item.token for item in answer.choices[0].logprobs.content}) == 1
    token = (
        ask(client, max_tokens=1, extra_body={"return_token_ids": True})
        .choices[0]
        .model_extra["token_ids"][0]
    )
    other = ask(
        client, max_tokens=1, logit_bias={str(token): -100}, extra_body={"return_token_ids": True}
    ).choices[0].model_extra["token_ids"][0]  # fmt: skip
    assert other != token


def test_errors_as_the_sdk_sees_them(client: openai.OpenAI, running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="nobody")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"
    wrong = openai.OpenAI(base_url=f"{running.url}/v1", api_key="sk-wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        ask(wrong)


def test_models(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[:3] == ["tiny", "a00", "a01"]
    assert len(ids) == 1 + NUM_ADAPTERS
    assert client.models.retrieve("a07").model_extra["parent"] == "tiny"


def test_64_streams_over_64_adapters(client: openai.OpenAI, running: Running) -> None:
    """Every stream says what its adapter says alone."""

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=PATIENCE) as many:

            async def one(name: str) -> str:
                stream = await many.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": "Which way?"}], temperature=0,
                    max_tokens=12, stream=True, extra_body={"ignore_eos": True},
                )  # fmt: skip
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(f"a{i:02d}") for i in range(NUM_ADAPTERS)))

    together = asyncio.run(everybody())
    assert len(set(together)) > NUM_ADAPTERS // 2  # the adapters do differ
    for i in range(0, NUM_ADAPTERS, 7):
        assert together[i] == text_of(ask(client, model=f"a{i:02d}"))


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_engine(running: Running, stream: bool) -> None:
    body = httpx.Request(
        "POST",
        f"{running.url}/v1/completions",
        headers={"authorization": f"Bearer {KEY}"},
        json={
            "prompt": "on",
            "max_tokens": 4000,  # it must still run when the client leaves, however fast the machine
            "ignore_eos": True,
            "stream": stream,
            "n": 32,
            "model": "a05",
        },
    )
    raw = b"POST /v1/completions HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % h for h in body.headers.raw)
    before = running.server.service.metrics.finished["abort"]
    with socket.create_connection((body.url.host, body.url.port or 0)) as connection:
        connection.sendall(raw + b"\r\n" + body.read())
        if stream:
            connection.recv(100)
        else:
            deadline = time.monotonic() + PATIENCE
            while not running.server.service.in_flight and time.monotonic() < deadline:
                time.sleep(0.002)
        assert running.server.service.in_flight == 1
    running.wait_idle()
    deadline = time.monotonic() + PATIENCE
    while running.server.service.in_flight and time.monotonic() < deadline:
        time.sleep(0.005)
    assert running.server.service.in_flight == 0
    assert running.server.service.metrics.finished["abort"] == before + 32


def test_load_use_replace_unload(client: openai.OpenAI, http: httpx.Client, running: Running) -> None:
    path = str(running.adapters / "a01")
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path}).status_code == 200
    assert text_of(ask(client, model="new")) == text_of(ask(client, model="a01"))
    body = {"lora_name": "new", "lora_path": str(running.adapters / "a02"), "load_inplace": True}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert text_of(ask(client, model="new")) == text_of(ask(client, model="a02"))
    assert text_of(ask(client, model="tiny:new@1")) == text_of(ask(client, model="a01"))
    status = http.get("/v1/adapters/new").json()["status"]
    assert status["state"] == "resident"
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        ask(client, model="new")


def test_upload_and_delete(
    client: openai.OpenAI, http: httpx.Client, running: Running, tmp_path: Path
) -> None:
    base = running.engine.base
    folder = write_random_adapter(tmp_path / "mine", base, 7, targets="all-linear", seed=99, std=1.0)
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    made = http.post("/v1/adapters", data={"name": "mine"}, files=files)
    assert made.status_code == 201, made.text
    assert text_of(ask(client, model="mine")) != text_of(ask(client))
    gone = http.delete("/v1/adapters/mine").json()
    assert gone["freed_bytes"] > 0
    uploads = running.server.service.config.uploads
    assert uploads is not None
    assert not list(uploads.iterdir())


def test_bad_adapters_are_refused_and_neighbours_go_on(running: Running, http: httpx.Client) -> None:
    """Every kind of bad adapter, by path and by upload, while 32 streams decode."""
    from bad_adapters import CONFIG, TENSORS, make_bad_adapters

    corpus = make_bad_adapters(running.adapters.parent / "corpus", running.engine.base)
    assert len(corpus) >= 30

    async def neighbours() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=PATIENCE) as many:

            async def one(i: int) -> str:
                answer = await many.completions.create(
                    model=f"a{i:02d}", prompt=f"Neighbour {i}", temperature=0, max_tokens=80, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                return "".join([chunk.choices[0].text async for chunk in answer])

            return await asyncio.gather(*(one(i) for i in range(32)))

    tried = threading.Event()

    async def until_tried() -> list[list[str]]:
        """Somebody decodes as long as bad adapters are tried, however fast the machine."""
        rounds = [await neighbours()]
        while not tried.is_set():
            rounds.append(await neighbours())
        return rounds

    undisturbed = asyncio.run(neighbours())
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(asyncio.run, until_tried())
        try:
            for bad in corpus:
                by_path = http.post(
                    "/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(bad.folder)}
                )
                assert 400 <= by_path.status_code < 500, (bad.name, by_path.text)
                assert bad.message in by_path.json()["error"]["message"], bad.name
                assert by_path.json()["error"]["code"] == bad.error.code
                files = {
                    part: (bad.folder / name).read_bytes()
                    for part, name in (("config", CONFIG), ("model", TENSORS))
                    if (bad.folder / name).is_file() and not (bad.folder / name).is_symlink()
                }
                by_upload = http.post("/v1/adapters", data={"name": "bad"}, files=files or {"none": b""})
                assert 400 <= by_upload.status_code < 500, (bad.name, by_upload.text)
                assert by_upload.json()["error"]["message"]
        finally:
            tried.set()
        assert all(round == undisturbed for round in disturbed.result(timeout=PATIENCE))
    assert http.get("/v1/adapters/bad").status_code == 404
    uploads = running.server.service.config.uploads
    assert uploads is not None
    assert not list(uploads.iterdir())


def test_composition(client: openai.OpenAI) -> None:
    def mixed(*parts: tuple[str, float]) -> str:
        body = {"adapters": [{"id": name, "scale": scale} for name, scale in parts], "ignore_eos": True}
        return text_of(ask(client, extra_body=body))

    assert mixed(("a01", 1.0)) == text_of(ask(client, model="a01"))
    assert mixed(("a01", 0.0)) == text_of(ask(client))
    assert mixed(("a01", 1.0), ("a02", 1.0)) not in {
        text_of(ask(client, model="a01")), text_of(ask(client, model="a02"))
    }  # fmt: skip


def test_metrics(client: openai.OpenAI, http: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    ask(client, model="a09")
    text = http.get("/metrics").text
    samples = {(s.name, s.labels.get("result", "")): s.value for f in text_string_to_metric_families(text)
               for s in f.samples}  # fmt: skip
    assert samples["adapters_registered", ""] >= NUM_ADAPTERS
    assert samples["adapters_resident", ""] >= 1
    assert samples["adapter_loads_total", "ok"] >= 1
    assert samples["vllm:generation_tokens_total", ""] >= 12
    assert samples["batch_distinct_adapters_count", ""] > 0
    assert len(text) < 200_000
    assert "a09" not in text.replace("running_lora_adapters", "")


def test_a_flood_of_unknown_names_is_harmless(http: httpx.Client) -> None:
    for i in range(200):
        body = {"model": f"ghost-{i}", "messages": [{"role": "user", "content": "x"}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 404
    with contextlib.suppress(httpx.HTTPError):
        http.get("/health")
