"""What every endpoint needs of HTTP: keys, origins, capped bodies, errors, clients that go away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiliad.config import is_loopback
from chiliad.errors import ChiliadError, Forbidden, PayloadTooLarge, Unauthorized
from chiliad.serve.wire import PING, StreamWriter, error_body

log = logging.getLogger("chiliad.serve")

OPEN_PATHS = {"/health", "/ping", "/version"}
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

T = TypeVar("T")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def error_response(error: BaseException) -> Response:
    status = error.status if isinstance(error, ChiliadError) else 500
    headers = {}
    if isinstance(error, ChiliadError) and error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def on_gone(request: Request, error: Exception) -> Response:
    """The client left while it was sending: nobody reads this."""
    return Response(status_code=499)


async def on_http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    messages = {
        404: f"there is no {where}: see /openapi.json for what there is",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    body = {
        "message": messages.get(error.status_code, error.detail),
        "type": "invalid_request_error",
        "param": None,
        "code": {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error"),
    }
    return json_response({"error": body}, error.status_code, dict(error.headers or {}))


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as it is known to be longer than `limit`,
    ClientDisconnect when the client goes away."""
    too_large = PayloadTooLarge(f"the body is larger than {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


class Edge:
    """Outermost layer, plain ASGI: request id, key, origin. Every path is closed unless listed open.

    Without keys (loopback only) the danger is a web page that the user has open: a foreign
    Origin or Host header (DNS rebinding) is refused.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{time.time_ns():x}"
        state = scope.setdefault("state", {})
        state["tenant"] = ""

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                state["tenant"] = self._tenant(headers) if self._keys else self._local(headers)
        except ChiliadError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _tenant(self, headers: Headers) -> str:
        """Which key, as a short hash when there are several. Raises Unauthorized."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Compare with every key, always: time must not tell which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if not any(matches):
            raise Unauthorized("send a valid API key as `Authorization: Bearer KEY`")
        return digest.hex()[:12] if len(self._keys) > 1 else ""

    @staticmethod
    def _local(headers: Headers) -> str:
        origin = headers.get("origin")
        if not _is_local(f"//{headers.get('host', 'localhost')}") or (origin and not _is_local(origin)):
            raise Forbidden(
                "without an API key this server answers local programs and pages only: "
                "start it with --api-key to allow other origins"
            )
        return ""


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work`; when the client goes away first, cancel it and return None."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream:
    """Server-sent events. Headers wait for the first event, so that an early error is plain HTTP.

    Silence longer than `keep_alive` seconds (a queue, a loading adapter) is filled with comment
    lines, for the proxies in between.
    """

    HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], keep_alive: float
    ) -> None:
        self._events = events
        self._headers = [*self.HEADERS, *((k.encode(), v.encode()) for k, v in headers.items())]
        self._keep_alive = keep_alive
        self._started = False
        self._quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        pinger = asyncio.ensure_future(self._ping(send))
        try:
            async for data in self._events:
                if not self._started:
                    await self._start(send)
                self._quiet = False
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if not self._started:
                raise
            await send({"type": "http.response.body", "body": StreamWriter.error(error), "more_body": True})
        finally:
            pinger.cancel()
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})

    async def _ping(self, send: Send) -> None:
        while True:
            self._quiet = True
            await asyncio.sleep(self._keep_alive)
            if self._quiet:
                if not self._started:
                    await self._start(send)
                await send({"type": "http.response.body", "body": PING, "more_body": True})
