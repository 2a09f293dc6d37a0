"""An engine behind the real door that says what it is told to: for tests of the HTTP edge alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from chiliad.adapters.registry import Registry
from chiliad.config import SchedulerConfig
from chiliad.core import (
    AdapterVersion,
    BaseInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Request,
    TokenLogprob,
    Usage,
)
from chiliad.engine.output import Choice
from chiliad.errors import ContextLengthExceeded, OutOfMemory, Unavailable
from chiliad.models.tokenizer import Tokenizer
from chiliad.observe import EngineMetrics, EngineStats

#: Opens a client: `async with connect(api_keys=...) as client`.
Connect = Callable[..., Any]


def says(request: Request) -> str:
    """The default script: who answers."""
    names = "+".join(f"{use.adapter.name}*{use.scale:g}" for use in request.adapters)
    return f"Hello from {names or 'base'}."


class FakeEngine:
    """Implements the door of `engine.stream.AsyncEngine`. `script` gives a request's answer."""

    def __init__(self, base: BaseInfo, tokenizer: Tokenizer, max_model_len: int = 512) -> None:
        self.base, self.tokenizer, self.max_model_len = base, tokenizer, max_model_len
        self.registry = Registry(":memory:", base)
        self.error = ""
        self.script: Callable[[Request], str | Exception] = says
        self.pause = asyncio.Event()  # cleared: answers wait before their third token
        self.pause.set()
        self.break_at: int | None = None  # token at which every answer fails
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.cancelled: list[str] = []
        self.pinned: set[str] = set()
        self.settings = SchedulerConfig()
        self._stopping = asyncio.Event()

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self._stopping.set()
        self.pause.set()

    async def drain(self, timeout: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        while self.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        if len(request.prompt) + request.params.max_tokens > self.max_model_len:
            raise ContextLengthExceeded("too long for the context", param="messages")
        self.requests.append(request)
        self.live.add(request.id)
        ended = False
        try:
            total = 0
            for index in range(request.params.n):
                async for chunk in self._choice(request, index):
                    if isinstance(chunk, Failed):
                        ended = True
                        yield chunk
                        return
                    total += len(chunk.token_ids)
                    yield chunk
            ended = True
            yield Finished(request.id, Usage(len(request.prompt), total, 0), 0.25)
        finally:
            self.live.discard(request.id)
            if not ended:
                self.cancelled.append(request.id)

    async def _choice(self, request: Request, index: int) -> AsyncIterator[Chunk | Failed]:
        answer = self.script(request)
        if isinstance(answer, Exception):
            yield Failed(request.id, answer)
            return
        stream = self.tokenizer.stream(request.params.skip_special_tokens)
        choice = Choice(request, index, stream, self.tokenizer.eos_ids, request.params.max_tokens)
        if choice.prompt_logprobs is not None:
            choice.prompt_logprobs += [self._logprob(t) for t in request.prompt[1:]]
        ids = [*self.tokenizer.encode(answer, add_special=False), *self.tokenizer.eos_ids]
        for position, token in enumerate(ids):
            if position == 2:
                await self.pause.wait()
                if self._stopping.is_set():
                    yield Failed(request.id, Unavailable("the engine has stopped", retry_after=5.0))
                    return
            await asyncio.sleep(0)
            if position == self.break_at:
                yield Failed(request.id, OutOfMemory("the pool is full"))
                return
            chunk = choice.push(token, self._logprob(token) if request.params.logprobs is not None else None)
            if chunk is not None:
                yield chunk
                if chunk.finish_reason is not None:
                    return

    @staticmethod
    def _logprob(token: int) -> TokenLogprob:
        other = token + 1
        return TokenLogprob(token, -0.5, ((token, -0.5), (other, float("-inf"))))

    async def add_adapter(self, folder: Path, name: str, replace: bool = False) -> AdapterVersion:
        return await asyncio.to_thread(self.registry.add, folder, name, replace=replace)

    async def remove_adapter(self, name: str) -> int:
        return sum(version.nbytes for version in self.registry.remove(name))

    async def adapter_status(self, name: str) -> dict[str, object]:
        return {"state": "resident", "tier": "pool", "bytes": self.registry.resolve(name).nbytes, "hits": 1}

    async def pin_adapter(self, name: str, pinned: bool = True) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(str(self.registry.resolve(name)))

    async def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.live),
            waiting=0,
            pages_total=100,
            pages={"kv": 25, "adapter": 10},
            page_bytes=4096,
            adapters_registered=self.registry.count(),
            adapters_resident=1,
            adapters_loading=0,
            adapters_pinned=len(self.pinned),
            adapter_pages_idle=4,
            swap_pages=(0, 0),
            distinct_adapters=2,
            oldest_wait=0.0,
            running_adapters=("a", "b"),
            waiting_adapters=(),
            metrics=EngineMetrics(steps=3, generation_tokens=7),
        )
