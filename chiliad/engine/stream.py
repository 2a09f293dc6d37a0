"""The async door: an engine on its own thread, events as async iterators.

Kernels release the GIL, so one process serves HTTP and computes. `generate`, `call` and the two
adapter verbs are all that the HTTP edge uses; a process boundary could replace this file.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from chiliad.core import AdapterVersion, Event, Failed, Finished, Request
from chiliad.engine.engine import Engine
from chiliad.errors import ChiliadError, Unavailable
from chiliad.observe import EngineStats

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOAD_SECONDS = 60.0  # that pinning waits for an adapter to load


class AsyncEngine:
    """Runs an Engine on a thread of its own, for use from one event loop."""

    def __init__(self, make: Callable[[Callable[[list[Event]], None]], Engine]) -> None:
        """make(sink) builds the engine; its events then arrive here."""
        self.engine = make(self._deliver)
        self.base, self.tokenizer = self.engine.base, self.engine.tokenizer
        self.registry, self.max_model_len = self.engine.registry, self.engine.max_model_len
        self.settings = self.engine.config.scheduler
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._draining = False
        self.error = ""  # why the engine thread died, if it did

    # -- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="chiliad-engine", daemon=True)
        self._thread.start()
        self.engine.touch_ahead()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; wait for the running ones, at most `timeout` seconds."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._queues and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End the thread; requests that still run end with Failed(Unavailable)."""
        self._draining = True
        self._stop.set()
        self.engine.call(lambda: None)  # wakes the loop
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        engine, error = self.engine, None
        try:
            while not self._stop.is_set():
                if not engine.step():
                    engine.wait(0.2)
        except BaseException as died:
            self.error = f"{type(died).__name__}: {died}"
            log.exception("the engine thread died")
            error = Unavailable(f"the engine has failed ({self.error}); restart the server")
        engine.close(error)

    # -- requests ------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """Submit and yield events until the terminal one. Closing the iterator cancels.

        Raises ChiliadError before the first event when the request is refused at once.
        """
        self._refuse_when_down()
        if request.id in self._queues:
            raise ChiliadError(f"request id {request.id!r} is already running")
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[request.id] = queue
        ended = False
        try:
            self.engine.submit(request)
            while not ended:
                event = await queue.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        finally:
            if not ended:
                self.engine.cancel(request.id)
            self._queues.pop(request.id, None)

    def _deliver(self, events: list[Event]) -> None:
        """Engine thread -> event loop, one hand-over per step."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is not None:  # otherwise the client has gone
                queue.put_nowait(event)

    def _refuse_when_down(self) -> None:
        if self.error:
            raise Unavailable(f"the engine has failed ({self.error}); restart the server")
        if self._draining:
            raise Unavailable("the server is shutting down; send the request elsewhere", retry_after=5.0)

    # -- adapters ------------------------------------------------------------------------

    async def add_adapter(self, folder: Path, name: str, replace: bool = False) -> AdapterVersion:
        """Check and register an adapter folder; decoding neighbours do not wait for it."""
        return await asyncio.to_thread(self.engine.add_adapter, folder, name, replace)

    async def remove_adapter(self, name: str) -> int:
        """Forget an adapter; returns the bytes freed (at the last running request's end, if any)."""
        future = await asyncio.to_thread(self.engine.remove_adapter, name)
        return await asyncio.wrap_future(future)

    async def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Load an adapter if need be and keep it in memory, or stop to keep it.

        Raises OutOfMemory when there is no room, AdapterError when its files are bad.
        """
        version = self.registry.resolve(name)
        if not pinned:
            await self.call(lambda: self.engine.store.pin(version, False))
            return
        deadline = time.monotonic() + _LOAD_SECONDS
        while not await self.call(lambda: self.engine.pin_adapter(version)):
            if time.monotonic() > deadline:
                raise Unavailable(f"adapter {version} is still loading: try again later", retry_after=5.0)
            await asyncio.sleep(0.005)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine thread between two steps."""
        self._refuse_if_dead()
        return await asyncio.wrap_future(self.engine.call(function))

    async def stats(self) -> EngineStats:
        registered = await asyncio.to_thread(self.registry.count)
        return await self.call(lambda: self.engine.stats(registered))

    async def adapter_status(self, name: str) -> dict[str, object]:
        """State, tier, bytes, last use, load time and hits of one adapter."""
        version = self.registry.resolve(name)
        return await self.call(lambda: self.engine.store.status(version))

    def _refuse_if_dead(self) -> None:
        if self.error or self._stop.is_set():
            raise Unavailable("the engine is not running; restart the server")
