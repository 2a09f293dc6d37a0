"""One server process: uvicorn, and how it ends.

SIGTERM (or Ctrl-C) drains: readiness says 503, running requests get `drain_timeout` seconds,
then the process exits with status 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from types import FrameType

import uvicorn

from chiliad.config import ServerConfig
from chiliad.errors import InvalidConfig
from chiliad.serve.app import create_app
from chiliad.serve.service import Engine, Service

log = logging.getLogger("chiliad.serve")

_CLOSING = 5  # seconds that connections get to close after the drain


class Server(uvicorn.Server):
    """uvicorn with a drain before the shutdown."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.service = Service(engine, config)
        super().__init__(
            uvicorn.Config(
                create_app(self.service),
                host=config.host,
                port=config.port,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CLOSING,
                h11_max_incomplete_event_size=2**16,
            )
        )
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs inside a signal handler: only hands over to the event loop."""
        self._signals += 1
        if self._signals > 1:
            log.warning("second signal: aborting")
            self.force_exit = self.should_exit = True
            signal.signal(sig, signal.SIG_DFL)  # a third one kills
        elif self._loop is None:
            self.should_exit = True  # still starting
        else:
            self._loop.call_soon_threadsafe(self.begin_drain)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def begin_drain(self) -> None:
        """Refuse new work, let the rest finish, then shut down. Call it on the event loop."""
        if self._drain is None:
            self.service.draining = True
            self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        service = self.service
        timeout = service.config.drain_timeout
        if service.in_flight:
            log.info("draining: %d requests get %g s; signal again to abort", service.in_flight, timeout)
        try:
            await service.engine.drain(timeout)
            await service.engine.stop()  # whatever still runs ends with an error
        finally:
            self.should_exit = True


def bind(config: ServerConfig) -> socket.socket:
    """Take the port before the model is loaded: a port in use should not cost a minute."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as error:
        sock.close()
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        option = "--port" if taken else "--host"
        raise InvalidConfig(
            f"cannot listen on {config.host} port {config.port} ({error.strerror}): choose another with {option}",
            param=option.removeprefix("--"),
        ) from None
    sock.set_inheritable(True)
    return sock


def serve(engine: Engine, config: ServerConfig, sock: socket.socket) -> bool:
    """Answer requests until a signal comes. True after a drain, False when it was cut short."""
    server = Server(engine, config)
    server.run(sockets=[sock])
    return not server.force_exit
