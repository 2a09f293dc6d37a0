"""The engine as the endpoints see it: run a job, measure it, know what is in flight, drain."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from chiliad import __version__
from chiliad.adapters.registry import Registry
from chiliad.config import SchedulerConfig, ServerConfig
from chiliad.core import AdapterVersion, BaseInfo, Chunk, Event, Failed, Finished, Request
from chiliad.errors import AdapterExists, Unavailable
from chiliad.observe import EngineStats, RequestMetrics
from chiliad.serve.protocol import Job, Limits, Names, Tokens
from chiliad.serve.wire import TokenNames

log = logging.getLogger("chiliad.serve")


class Tokenizer(Tokens, TokenNames, Protocol):
    """`models.tokenizer.Tokenizer`, as far as the edge uses it."""


class Engine(Protocol):
    """The door: `engine.stream.AsyncEngine`."""

    @property
    def base(self) -> BaseInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def settings(self) -> SchedulerConfig: ...
    @property
    def error(self) -> str: ...
    def generate(self, request: Request) -> AsyncIterator[Event]: ...
    async def add_adapter(self, folder: Path, name: str, replace: bool = False) -> AdapterVersion: ...
    async def remove_adapter(self, name: str) -> int: ...
    async def adapter_status(self, name: str) -> dict[str, object]: ...
    async def pin_adapter(self, name: str, pinned: bool = True) -> None: ...
    async def stats(self) -> EngineStats: ...
    async def start(self) -> None: ...
    async def drain(self, timeout: float) -> None: ...
    async def stop(self) -> None: ...


class Service:
    """What all endpoints of one server share."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        self.model_name = config.model_name or engine.base.name
        self.names = Names(self.model_name, engine.base, engine.registry.resolve)
        self.limits = Limits(engine.max_model_len, config.max_choices)
        self.metrics = RequestMetrics()
        self.started = int(time.time())
        self.fingerprint = f"chiliad-{__version__}-{engine.base.fingerprint[:8]}"
        self.draining = False
        self.in_flight = 0  # engine requests
        self._reading: Counter[str] = Counter()  # adapter folders of requests in flight
        self._doomed: set[str] = set()  # uploaded folders to delete once nobody reads them

    def check_ready(self) -> None:
        """Raises Unavailable while the server drains or when the engine has died."""
        if self.draining:
            raise Unavailable("the server is shutting down: use another replica", retry_after=5)
        if self.engine.error:
            raise Unavailable(f"the engine has failed ({self.engine.error}); restart the server")

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Chunk | Finished], None]:
        """(prompt number, event) of all prompts of a job as they come. Closing it cancels them."""
        if self.draining:
            raise Unavailable("the server is shutting down: use another replica", retry_after=5)
        if len(job.requests) == 1:
            async with aclosing(self._measured(job.requests[0])) as events:
                async for event in events:
                    yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Chunk | Finished | Exception]] = asyncio.Queue()

        async def pump(number: int, request: Request) -> None:
            try:
                async with aclosing(self._measured(request)) as events:
                    async for event in events:
                        queue.put_nowait((number, event))
            except Exception as error:
                queue.put_nowait((number, error))

        tasks = [asyncio.ensure_future(pump(i, request)) for i, request in enumerate(job.requests)]
        try:
            remaining = len(tasks)
            while remaining:
                number, news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                remaining -= isinstance(news, Finished)
                yield number, news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _measured(self, request: Request) -> AsyncGenerator[Chunk | Finished, None]:
        """The engine's events of one request, with a failure raised and latencies noted."""
        metrics, clock = self.metrics, time.perf_counter
        begin = clock()
        first = 0.0
        latest = [0.0] * request.params.n
        open_choices = request.params.n
        self.in_flight += 1
        self._hold(request)
        try:
            async for event in (events := self.engine.generate(request)):
                if isinstance(event, Chunk):
                    now, count = clock(), len(event.token_ids)
                    before, latest[event.index] = latest[event.index], now
                    if before and count:
                        metrics.token_seconds.observe((now - before) / count, count)
                    elif not first:
                        first = now
                        metrics.first_token_seconds.observe(now - begin)
                    if event.finish_reason is not None:
                        open_choices -= 1
                        metrics.finished[event.finish_reason] += 1
                elif isinstance(event, Finished):
                    now = clock()
                    queued = event.queue_seconds
                    metrics.prompt_tokens += event.usage.prompt_tokens
                    metrics.generation_tokens += event.usage.completion_tokens
                    metrics.request_seconds.observe(now - begin)
                    metrics.queue_seconds.observe(queued)
                    if first:
                        metrics.prefill_seconds.observe(max(0.0, first - begin - queued))
                        metrics.decode_seconds.observe(now - first)
                elif isinstance(event, Failed):
                    raise event.error
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            metrics.finished["abort"] += open_choices  # the client went away
            raise
        except Exception:
            metrics.finished["error"] += 1
            raise
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            self.in_flight -= 1
            self._release(request)

    async def report(self, interval: float = 10.0) -> None:
        """Log what the engine does, every `interval` seconds in which it does something."""
        before, since = 0, time.perf_counter()
        while True:
            await asyncio.sleep(interval)
            stats = await self.engine.stats()
            tokens, now = stats.metrics.generation_tokens, time.perf_counter()
            if tokens != before:
                used = 100 * (1 - stats.pages.get("free", 0) / stats.pages_total)
                log.info(
                    "%d running, %d waiting, %.0f tokens/s, pool %.0f %% used, %d adapters resident",
                    stats.running,
                    stats.waiting,
                    (tokens - before) / (now - since),
                    used,
                    stats.adapters_resident,
                )
            before, since = tokens, now

    # -- files of uploaded adapters ------------------------------------------------------------

    def _hold(self, request: Request) -> None:
        for use in request.adapters:
            self._reading[use.adapter.path] += 1

    def _release(self, request: Request) -> None:
        for use in request.adapters:
            path = use.adapter.path
            self._reading[path] -= 1
            if not self._reading[path]:
                del self._reading[path]
                if path in self._doomed:
                    self._doomed.discard(path)
                    shutil.rmtree(path, ignore_errors=True)

    def _forget_files(self, adapter: AdapterVersion) -> None:
        """Delete an uploaded adapter's folder when the requests that use it have ended.

        Folders that the operator gave with --adapters are never touched.
        """
        uploads = self.config.uploads
        if uploads is None or Path(adapter.path).parent != uploads.resolve():
            return
        if self._reading[adapter.path]:
            self._doomed.add(adapter.path)
        else:
            shutil.rmtree(adapter.path, ignore_errors=True)

    # -- adapters ------------------------------------------------------------------------------

    async def add_adapter(self, folder: Path, name: str, replace: bool) -> AdapterVersion:
        """Publish a folder under a name; running requests finish on the version they began with."""
        if name == self.model_name:
            raise AdapterExists(f"{name} is the name of the base model: choose another", param="name")
        version = await self.engine.add_adapter(folder, name, replace)
        log.info("added adapter %s", version)
        return version

    async def remove_adapter(self, name: str) -> int:
        """Forget a name. Returns the bytes of memory that this frees. Raises ModelNotFound."""
        versions = self.engine.registry.versions(name)
        freed = await self.engine.remove_adapter(name)
        for version in versions:
            self._forget_files(version)
        log.info("removed adapter %s, %d bytes", name, freed)
        return freed
