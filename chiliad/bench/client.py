"""HTTP/1.1 for a benchmark: one connection per request, answers as lines while they arrive.

On asyncio streams rather than a client library: the core depends on none (httpx is for tests),
and what lies between the socket and the clock should be little and known.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from chiliad.errors import InvalidConfig

_LIMIT = 2**20  # bytes of a header or chunk size line, and of what is buffered


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""  # path before /v1
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(url: str, allow_remote: bool = False) -> Target:
        """Raises InvalidConfig when the URL is not http(s), or not of this machine."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidConfig(f"cannot read {url!r}: write http://127.0.0.1:8000", param="url")
        if not allow_remote and not _loopback(parts.hostname):
            raise InvalidConfig(
                f"{parts.hostname} is another machine: give --allow-remote if it is yours to load",
                param="url",
            )
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return Target(parts.hostname, parts.port or (443 if tls else 80), tls, prefix)


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Response:
    """Status and headers are there; the body still comes."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        reader = self._reader
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
        elif "content-length" in self.headers:
            yield await reader.readexactly(int(self.headers["content-length"]))
        else:
            while piece := await reader.read(2**16):
                yield piece

    async def lines(self) -> AsyncIterator[bytes]:
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line
        if rest:
            yield rest

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


@asynccontextmanager
async def request(
    target: Target, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> AsyncIterator[Response]:
    """Send one request. Raises OSError, EOFError, ValueError or IndexError when the answer is cut or odd."""
    reader, writer = await asyncio.open_connection(
        target.host, target.port, ssl=True if target.tls else None, limit=_LIMIT
    )
    try:
        host = f"[{target.host}]" if ":" in target.host else target.host
        fields = {
            "host": f"{host}:{target.port}",
            "connection": "close",
            "content-length": str(len(body)),
            "content-type": "application/json",
            **target.headers,
            **(headers or {}),
        }
        head = f"{method} {target.prefix}{path} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(head.encode("latin-1") + b"\r\n" + body)
        await writer.drain()
        status_line = await reader.readline()
        if not status_line:
            raise EOFError("the server closed the connection without an answer")
        status = int(status_line.split()[1])
        received: dict[str, str] = {}
        while (line := (await reader.readline()).strip()) and len(received) < 256:
            name, _, value = line.decode("latin-1").partition(":")
            received[name.strip().lower()] = value.strip()
        yield Response(status, received, reader)
    finally:
        writer.close()
