"""An open-loop client of the OpenAI API: requests leave when the trace says, whatever comes back.

Works with any server that streams /v1/completions (chiliad, vLLM, ...): adapters are chosen by
`model=`. With extensions, requests also say `ignore_eos` and `return_token_ids` (names of vLLM),
so that outputs have the trace's lengths and every token is seen; without, an event counts as a
token, and lengths are the server's last word (`usage`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from chiliad.bench.client import Response, Target, request
from chiliad.bench.report import Outcome, report
from chiliad.bench.workload import Item, Trace
from chiliad.errors import InvalidConfig

_BROKEN = (OSError, EOFError, ValueError, IndexError)  # what a bad connection or answer raises
_PAGE = 1000  # adapters asked for at once
_MAX_REQUESTS = 1_000_000

#: Counters of a chiliad server whose growth is reported, by their names in /metrics.
_COUNTERS = (
    "adapter_cache_hits_total",
    "adapter_cache_misses_total",
    "adapter_loads_total",
    "adapter_evictions_total",
    "adapter_load_seconds_sum",
    "adapter_load_seconds_count",
    "batch_distinct_adapters_sum",
    "batch_distinct_adapters_count",
    "engine_steps_total",
    "engine_step_seconds_sum",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
)


@dataclass(frozen=True, slots=True)
class Client:
    """How to talk to a server. `keys`: tenants take them in turn; a server tells tenants by key."""

    target: Target
    model: str = ""  # name of the base; empty: ask the server
    adapters: str = ""  # names of adapters, e.g. "adapter-{:04d}"; empty: ask the server
    keys: tuple[str, ...] = ()
    extensions: bool = True
    vocab: int = 1000  # prompts are random token ids below this
    max_seconds: float | None = None  # of the whole run; what is not answered by then has failed


def run(client: Client, trace: Trace, slo: float = 6.0) -> tuple[list[Outcome], dict[str, Any]]:
    """Replay a trace -> outcomes in its order, and the report. Raises InvalidConfig, OSError."""
    if not 0 < len(trace) <= _MAX_REQUESTS:
        raise InvalidConfig(f"a trace of {len(trace)} requests: give 1 to {_MAX_REQUESTS}")
    _allow_many_sockets()
    try:
        return asyncio.run(replay(client, trace, slo))
    except ConnectionError as error:
        target = client.target
        raise InvalidConfig(f"no server at {target.host} port {target.port}: {error.strerror}") from error


async def replay(client: Client, trace: Trace, slo: float = 6.0) -> tuple[list[Outcome], dict[str, Any]]:
    """`run` inside a running event loop."""
    replayer = await _Replayer.prepare(client, trace)
    before = await counters(client)
    outcomes = await replayer.run()
    after = await counters(client)
    result: dict[str, Any] = {"model_id": replayer.base, "trace": trace.head.trace, "workload": trace.facts()}
    result |= report(outcomes, slo)
    if after:
        result["server"] = growth(before, after)
    return outcomes, result


class _Replayer:
    def __init__(self, client: Client, trace: Trace, base: str, names: Sequence[str]) -> None:
        self.base = base
        self._client, self._trace, self._names = client, trace, names
        tenants = sorted({item.tenant for item in trace.items})
        keys = client.keys or ("",)
        self._headers = {
            tenant: {"authorization": f"Bearer {key}"} if (key := keys[i % len(keys)]) else {}
            for i, tenant in enumerate(tenants)
        }
        self._begin = 0.0

    @staticmethod
    async def prepare(client: Client, trace: Trace) -> _Replayer:
        """Find out names, and try one request: a mistake should show before the clock starts."""
        needed = max((item.adapter for item in trace.items), default=-1) + 1
        base, names = client.model, []
        if client.adapters:
            names = [client.adapters.format(i) for i in range(needed)]
        if not base or len(names) < needed:
            found, listed = await models(client, needed - len(names))
            base, names = base or found, names or listed
        if len(names) < needed:
            raise InvalidConfig(
                f"the trace asks for {needed} adapters and the server has {len(names)}: register more, or "
                "lower --num-adapters"
            )
        replayer = _Replayer(client, trace, base, names)
        last = max(range(len(trace)), key=lambda i: trace.items[i].adapter)
        chosen = trace.items[last]
        item = Item(at=0.0, prompt=4, output=2, adapter=chosen.adapter, tenant=chosen.tenant)
        probe = Outcome(item, 0.0)
        await replayer._ask(probe, replayer._body(item, tuple(range(10, 10 + item.prompt))))
        if probe.error:
            raise InvalidConfig(f"the server refuses a first request: {probe.status} {probe.error}")
        return replayer

    async def run(self) -> list[Outcome]:
        client, trace = self._client, self._trace
        deadline = None if client.max_seconds is None else time.perf_counter() + client.max_seconds
        self._begin = time.perf_counter()
        outcomes: list[Outcome] = []
        tasks: list[asyncio.Task[None]] = []
        for i, item in enumerate(trace.items):
            body = self._body(item, trace.tokens(i, client.vocab))
            if deadline is not None and self._begin + item.at > deadline:
                break
            wait = self._begin + item.at - time.perf_counter()
            await asyncio.sleep(max(0.0, wait))
            outcome = Outcome(item, self._now())
            outcomes.append(outcome)
            tasks.append(asyncio.create_task(self._ask(outcome, body)))
        left = None if deadline is None else max(0.0, deadline - time.perf_counter())
        _, late = await asyncio.wait(tasks, timeout=left)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def _body(self, item: Item, prompt: tuple[int, ...]) -> bytes:
        body: dict[str, Any] = {
            "model": self._names[item.adapter] if item.adapter >= 0 else self.base,
            "prompt": prompt,
            "max_tokens": item.output,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._client.extensions:
            body |= {"ignore_eos": True, "return_token_ids": True}
        return orjson.dumps(body)

    async def _ask(self, outcome: Outcome, body: bytes) -> None:
        """One request from its first byte to its last."""
        headers = self._headers.get(outcome.item.tenant, {})
        outcome.error = "unfinished"
        try:
            async with request(self._client.target, "POST", "/v1/completions", body, headers) as response:
                outcome.status = response.status
                outcome.error = await self._listen(outcome, response)
        except _BROKEN as error:
            outcome.error = f"connection: {type(error).__name__}"
        finally:
            outcome.ended = self._now()

    async def _listen(self, outcome: Outcome, response: Response) -> str:
        """Note when tokens come; returns what went wrong, or nothing."""
        if response.status != 200:
            return _error_code(await response.read())
        item, ended = outcome.item, False
        async for line in response.lines():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                break
            now, event = self._now(), orjson.loads(data)
            if "error" in event:
                return _error_code(data)
            if usage := event.get("usage"):
                outcome.prompt_tokens = usage.get("prompt_tokens", 0)
                outcome.output_tokens = usage.get("completion_tokens", 0)
            for choice in event.get("choices", ()):
                ids = choice.get("token_ids")
                count = len(ids) if ids is not None else int(bool(choice.get("text")))
                if count:
                    outcome.times.append(now)
                    outcome.counts.append(count)
        if not ended:
            return "the stream broke off"
        outcome.prompt_tokens = outcome.prompt_tokens or item.prompt
        outcome.output_tokens = outcome.output_tokens or sum(outcome.counts)
        return ""


def _error_code(data: bytes) -> str:
    """The code of OpenAI's error object, or the beginning of whatever came."""
    with contextlib.suppress(ValueError, AttributeError):
        error = orjson.loads(data).get("error")
        if isinstance(error, dict):
            return str(error.get("code") or error.get("message"))[:100]
    return data[:100].decode(errors="replace") or "no body"


async def _get(client: Client, path: str) -> tuple[int, bytes]:
    headers = {"authorization": f"Bearer {client.keys[0]}"} if client.keys else {}
    async with request(client.target, "GET", path, headers=headers) as response:
        return response.status, await response.read()


async def models(client: Client, wanted: int) -> tuple[str, list[str]]:
    """(name of the base, names of up to `wanted` adapters) as /v1/models lists them."""
    base, names, after = "", [], ""
    while True:
        status, body = await _get(client, f"/v1/models?limit={_PAGE}&after={quote(after)}")
        if status != 200:
            raise InvalidConfig(f"GET /v1/models: {status} {_error_code(body)}")
        page = orjson.loads(body)
        for card in page["data"]:
            if card.get("parent"):
                names.append(card["id"])
            else:
                base = base or card["id"]
        if len(names) >= wanted or not page.get("has_more"):
            return base, sorted(names)[: max(0, wanted)]
        after = page["last_id"]


async def counters(client: Client) -> dict[str, float]:
    """`_COUNTERS` of a chiliad server, labels other than the model's kept; {} from other servers."""
    try:
        status, body = await _get(client, "/metrics")
    except _BROKEN:
        return {}
    found: dict[str, float] = {}
    if status != 200 or b"adapter_cache_hits_total" not in body:
        return found
    for name, labels, value in re.findall(r"^([\w:]+)(?:\{(.*?)\})? (\S+)", body.decode(), re.MULTILINE):
        if name in _COUNTERS:
            kept = [f"{k}={v}" for k, v in re.findall(r'(\w+)="(.*?)"', labels) if k != "model_name"]
            found[name + ("{" + ",".join(kept) + "}" if kept else "")] = float(value)
    return found


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """What the server counted during a run: raw counters, and the rates they mean."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def share(part: str, whole: tuple[str, ...]) -> float | None:
        total = sum(grown.get(key, 0.0) for key in whole)
        return grown.get(part, 0.0) / total if total else None

    hits, misses = "adapter_cache_hits_total", "adapter_cache_misses_total"
    steps = grown.get("batch_distinct_adapters_count", 0.0)
    return {
        "adapter_hit_rate": share(hits, (hits, misses)),
        "prefix_hit_rate": share("vllm:prefix_cache_hits_total", ("vllm:prefix_cache_queries_total",)),
        "mean_distinct_adapters": grown.get("batch_distinct_adapters_sum", 0.0) / steps if steps else None,
        "counters": grown,
    }


def _allow_many_sockets() -> None:
    """An open loop under overload holds a connection per request."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
