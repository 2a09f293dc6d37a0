"""Keys, origins, disconnects, silence: what surrounds an endpoint."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serve_fake import Connect, FakeEngine
from test_endpoints import HI, error

from chiliad.config import ServerConfig
from chiliad.errors import InvalidConfig, Unauthorized
from chiliad.serve.http import EventStream
from chiliad.serve.service import Service

PROTECTED = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/tokenize"),
    ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("DELETE", "/v1/models/x"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("GET", "/v1/adapters/x"), ("POST", "/detokenize"),
    ("DELETE", "/v1/adapters/x"),
    ("PUT", "/v1/adapters/x/pin"), ("DELETE", "/v1/adapters/x/pin"), ("GET", "/v1/pool"),
    ("GET", "/v1/adapters/x/stats"), ("GET", "/metrics"), ("GET", "/openapi.json"),
    ("GET", "/nothing"), ("GET", "/health/"), ("GET", "//health"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_every_route_needs_the_key(connect: Connect, method: str, path: str) -> None:
    async with connect(api_keys=("sk-right",)) as client:
        response = await client.request(method, path)
        assert error(response, 401)["code"] == Unauthorized.code
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        for key in ("sk-wrong", "", "sk-right2", "sk-righ"):
            error(await client.request(method, path, headers={"authorization": f"Bearer {key}"}), 401)


async def test_keys(connect: Connect, engine: FakeEngine) -> None:
    async with connect(api_keys=("one", "two")) as client:
        for path in ("/health", "/ping", "/version"):
            assert (await client.get(path)).status_code == 200
        for headers in (
            {"authorization": "Bearer one"},
            {"authorization": "bearer  two"},
            {"x-api-key": "two"},
        ):
            assert (
                await client.post("/v1/chat/completions", json={"messages": HI}, headers=headers)
            ).status_code == 200
    first, second, third = engine.requests
    assert first.tenant != second.tenant == third.tenant
    assert first.cache_salt != second.cache_salt  # tenants do not share cached prefixes


def test_open_only_on_loopback() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        ServerConfig(host=host)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(InvalidConfig, match="--api-key"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, api_keys=("k",)).host == host
    with pytest.raises(InvalidConfig, match="empty"):
        ServerConfig(api_keys=("",))


async def test_foreign_pages_are_refused_without_a_key(connect: Connect) -> None:
    async with connect() as client:
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"host": "rebound.example:8000"},
            {"host": ""},
            {"origin": "http://[", "host": "localhost"},
        ):
            error(await client.get("/v1/models", headers=headers), 403)
        for headers in (
            {"origin": "http://localhost:3000"},
            {"host": "127.0.0.2:8000"},
            {"host": "localhost:8000"},
            {"host": "[::1]:8000"},
        ):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
    async with connect(api_keys=("k",), headers={"authorization": "Bearer k"}) as client:
        assert (await client.get("/v1/models", headers={"host": "public.example"})).status_code == 200


async def test_request_id(connect: Connect) -> None:
    async with connect() as client:
        assert (await client.get("/health", headers={"x-request-id": "abc-1"})).headers[
            "x-request-id"
        ] == "abc-1"
        made = (await client.get("/health", headers={"x-request-id": "a b\x7f"})).headers["x-request-id"]
        assert made != "a b\x7f"


class Client:
    """An ASGI client that goes away when told."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.leave = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def test_silent_streams_send_comments() -> None:
    client, news = Client(), asyncio.Event()

    async def events() -> Any:
        await news.wait()  # a request that waits in the queue
        yield b"data: [DONE]\n\n"

    stream = EventStream(events(), {}, keep_alive=0.01)
    running = asyncio.ensure_future(stream({"type": "http"}, client.receive, client.send))
    while len(client.sent) < 4:
        await asyncio.sleep(0.001)
    news.set()
    await running
    start, *bodies = client.sent
    assert start["type"] == "http.response.start"
    data = [message["body"] for message in bodies if message["body"]]
    assert set(data[:-1]) == {b": ping\n\n"}
    assert data[-1] == b"data: [DONE]\n\n"


async def test_disconnect_closes_the_events() -> None:
    closed = []

    async def events() -> Any:
        try:
            yield b"one"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    client = Client()
    stream = EventStream(events(), {}, keep_alive=60)
    running = asyncio.ensure_future(stream({"type": "http"}, client.receive, client.send))
    while len(client.sent) < 2:
        await asyncio.sleep(0.001)
    assert not closed
    client.leave.set()
    await running
    assert closed == [True]
    assert [m["type"] for m in client.sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
async def test_cancelled_requests_leave_the_engine(
    connect: Connect, engine: FakeEngine, stream: bool, prompt: object
) -> None:
    engine.pause.clear()
    async with connect() as client:
        service: Service = client.service
        body = {"prompt": prompt, "stream": stream, "n": 2}
        running = asyncio.ensure_future(client.post("/v1/completions", json=body))
        while len(engine.live) < (len(prompt) if isinstance(prompt, list) else 1):
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not engine.live
        assert service.in_flight == 0
        assert service.metrics.finished["abort"] == 2 * len(engine.cancelled) > 0


async def test_activity_is_logged(
    connect: Connect, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chiliad")
    async with connect() as client:
        report = asyncio.ensure_future(client.service.report(interval=0.01))
        while not caplog.messages:
            await asyncio.sleep(0.01)
        report.cancel()
    assert "tokens/s" in caplog.messages[0]
    assert len(caplog.messages) == 1  # nothing happened since


async def test_half_a_body_is_no_error(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """A client that goes away while it sends: nobody is told, and nothing is logged."""
    async with connect() as client:
        app = client._transport.app
        for path, kind in (("/v1/completions", b"application/json"),
                           ("/v1/adapters", b"multipart/form-data; boundary=x")):  # fmt: skip
            messages = [
                {"type": "http.request", "body": b"--x", "more_body": True},
                {"type": "http.disconnect"},
            ]
            sent = []

            async def receive(messages: list[dict[str, object]] = messages) -> dict[str, object]:
                return messages.pop(0)

            async def send(message: dict[str, object], sent: list[object] = sent) -> None:
                sent.append(message.get("status"))

            scope = {
                "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
                "headers": [(b"content-type", kind), (b"host", b"localhost")], "http_version": "1.1",
            }  # fmt: skip
            await app(scope, receive, send)
            assert sent[0] == 499
    assert not caplog.records
