"""Queue limits, policies, priorities, pins and the prefix cache through HTTP, with the real engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chiliad.adapters.registry import Registry
from chiliad.config import EngineConfig, SchedulerConfig, ServerConfig
from chiliad.engine.engine import Engine
from chiliad.engine.stream import AsyncEngine
from chiliad.kernels import load
from chiliad.memory.pool import Owner
from chiliad.models import load_model
from chiliad.serve.app import create_app
from chiliad.serve.service import Service

PROMPT = list(range(5, 105))  # a hundred tokens: six full blocks of 16


class Server:
    """An HTTP client of an app over a real engine."""

    def __init__(self, client: httpx.AsyncClient, engine: Engine) -> None:
        self.client, self.engine = client, engine

    async def occupy(self) -> asyncio.Task[httpx.Response]:
        """A request that runs until it is cancelled: on any machine longer than any test."""
        run = self.engine._runner.run

        def slow(*arguments: Any) -> Any:
            time.sleep(0.01)
            return run(*arguments)

        self.engine._runner.run = slow  # type: ignore[method-assign]
        occupant = asyncio.ensure_future(self.complete(max_tokens=3900))
        await self.until("batch", "running", 1)
        return occupant

    async def leave(self, occupant: asyncio.Task[httpx.Response]) -> None:
        """What `occupy` began, ends."""
        del self.engine._runner.run
        occupant.cancel()
        await asyncio.gather(occupant, return_exceptions=True)

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
        return await self.client.post("/v1/completions", json=body)

    async def cached(self, **fields: Any) -> int:
        """Tokens of the prompt that the server says it found."""
        answer = (await self.complete(**fields)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def pool(self) -> dict[str, Any]:
        answer: dict[str, Any] = (await self.client.get("/v1/pool")).json()
        assert sum(answer["pages"].values()) == answer["pages_total"]
        return answer

    async def until(self, part: str, field: str, value: int) -> None:
        """Wait until the pool map says so."""
        async with asyncio.timeout(120):
            while (await self.pool())[part][field] != value:
                await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(
    model_folder: Path,
    adapters: Path,
    memory: int = 100_000_000,
    keys: tuple[str, ...] = (),
    **scheduler: Any,
) -> AsyncIterator[Server]:
    kernels = load(threads=1)
    model = load_model(str(model_folder), kernels, "float32")
    registry = Registry(":memory:", model.info)
    registry.scan(adapters)
    settings = EngineConfig(memory=memory, dtype="float32", scheduler=SchedulerConfig(**scheduler))
    engine = AsyncEngine(lambda sink: Engine(model, kernels, registry, settings, sink))
    transport = httpx.ASGITransport(create_app(Service(engine, ServerConfig(api_keys=keys))))
    headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:8000", headers=headers, timeout=60
    ) as client:
        await engine.start()
        try:
            yield Server(client, engine.engine)
        finally:
            await engine.stop()
            registry.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_answers_429(model_folder: Path, adapters: Path, stream: bool) -> None:
    async with serving(model_folder, adapters, max_sequences=1, max_waiting=2) as server:
        occupant = await server.occupy()
        waiting = [asyncio.ensure_future(server.complete(max_tokens=1)) for _ in range(2)]
        await server.until("queue", "waiting", 2)
        refused = await server.complete(max_tokens=1, stream=stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await server.pool())["queue"] == {
            "policy": "fcfs", "waiting": 2, "max_waiting": 2, "adapters": [],
            "oldest_seconds": pytest.approx(60, abs=60),
        }  # fmt: skip
        await server.leave(occupant)
        assert {r.status_code for r in await asyncio.gather(*waiting)} == {200}
        assert (await server.complete()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_early_abort_answers_503(model_folder: Path, adapters: Path, stream: bool) -> None:
    async with serving(model_folder, adapters, max_sequences=1, policy="abort:0.1") as server:
        occupant = await server.occupy()
        refused = await server.complete(max_tokens=1, stream=stream)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await server.pool())["batch"]["running"] == 1
        await server.leave(occupant)
        await server.until("batch", "running", 0)


async def test_lower_priority_numbers_go_first(model_folder: Path, adapters: Path) -> None:
    async with serving(model_folder, adapters, max_sequences=1) as server:
        order: list[int] = []

        async def ask(priority: int) -> None:
            assert (await server.complete(priority=priority)).status_code == 200
            order.append(priority)

        occupant = await server.occupy()
        others = []
        for i, priority in enumerate((3, 0, -2, 1)):
            others.append(asyncio.ensure_future(ask(priority)))
            await server.until("queue", "waiting", i + 1)
        await server.leave(occupant)
        await asyncio.gather(*others)
        assert order == [-2, 0, 1, 3]


@pytest.mark.parametrize("policy", ["cluster:1", "vtc", "vtc:adapter"])
async def test_policies_serve_everybody(model_folder: Path, adapters: Path, policy: str) -> None:
    async with serving(model_folder, adapters, max_sequences=2, policy=policy) as server:
        names = ["red", "blue", "tiny"] * 4
        answers = await asyncio.gather(*(server.complete(model=name) for name in names))
        assert {a.status_code for a in answers} == {200}
        texts = [a.json()["choices"][0]["text"] for a in answers]
        assert texts == texts[:3] * 4  # each says what it says, whoever runs beside it
        pool = await server.pool()
        assert pool["queue"]["policy"] == policy
        assert pool["batch"]["mean_distinct_adapters"] > 0
        assert (pool["adapters"]["loads"], pool["adapters"]["resident"]) == (2, 2)


async def test_cached_tokens(model_folder: Path, adapters: Path) -> None:
    async with serving(model_folder, adapters, keys=("one", "two")) as server:
        size = server.engine.layout.block_tokens
        full = (len(PROMPT) - 1) // size * size
        assert full > 0
        assert await server.cached(n=3) == 0  # the others found what the first had just computed
        assert await server.cached() == full
        assert await server.cached(n=2) == full
        assert await server.cached(prompt=[PROMPT, PROMPT]) == 2 * full
        assert await server.cached(prompt=[*PROMPT[:size], *range(300, 320)]) == size
        for stranger in ({"model": "red"}, {"cache_salt": "mine"}):
            assert await server.cached(**stranger) == 0
            assert await server.cached(**stranger) == full
        assert await server.cached(model="tiny", adapters=[{"id": "red", "scale": 0.5}]) == 0
        server.client.headers["authorization"] = "Bearer two"
        assert await server.cached() == 0
        assert (await server.pool())["pages"]["prefix"] > 0


async def test_prefix_cache_opt_out(model_folder: Path, adapters: Path) -> None:
    async with serving(model_folder, adapters) as server:
        for _ in range(2):
            assert await server.cached(prefix_cache=False) == 0
        assert (await server.pool())["pages"]["prefix"] == 0  # and it filled nothing
        assert await server.cached() == 0
        assert await server.cached() > 0
        assert await server.cached(prefix_cache=False) == 0
        wrong = await server.complete(prefix_cache="no")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prefix_cache")


async def test_pins(model_folder: Path, adapters: Path) -> None:
    async with serving(model_folder, adapters) as server:
        client = server.client

        async def status(name: str) -> dict[str, Any]:
            answer: dict[str, Any] = (await client.get(f"/v1/adapters/{name}")).json()["status"]
            return answer

        assert ((await status("red"))["state"], (await status("red"))["tier"]) == ("absent", "disk")
        answer = (await client.put("/v1/adapters/red/pin")).json()  # loads it
        assert (answer["state"], answer["tier"], answer["pinned"]) == ("resident", "pool", True)
        assert (answer["loads"], answer["hits"], answer["users"]) == (1, 0, 0)
        assert answer["bytes"] == answer["pages"] * server.engine.layout.page_bytes > 0
        assert answer["load_seconds"] > 0
        await server.complete(model="red")
        await server.complete(model="blue")
        assert ((await status("red"))["hits"], (await status("red"))["loads"]) == (1, 1)
        pool = await server.pool()
        assert pool["pages"]["pinned"] == answer["pages"]
        assert pool["adapters"]["idle_pages"] == pool["pages"]["adapter"] == (await status("blue"))["pages"]

        def press() -> None:
            """Ask for every page that can be had."""
            everything = server.engine.pool
            everything.free(everything.alloc(everything.available(Owner.KV), Owner.KV))

        server.engine.call(press).result(timeout=30)
        assert ((await status("red"))["state"], (await status("blue"))["state"]) == ("resident", "absent")
        assert (await client.delete("/v1/adapters/red/pin")).json()["pinned"] is False
        assert (await client.delete("/v1/adapters/blue/pin")).status_code == 200  # it was not: fine
        server.engine.call(press).result(timeout=30)
        assert (await status("red"))["state"] == "absent"
        await client.put("/v1/adapters/red/pin")
        await client.delete("/v1/adapters/red")
        assert (await server.pool())["pages"]["pinned"] == 0
        assert (await client.put("/v1/adapters/red/pin")).status_code == 404
