"""A clock, an adapter store and a model that tests of the scheduler drive by hand."""

from __future__ import annotations

from typing import Literal

import numpy as np

from chiliad.config import SchedulerConfig
from chiliad.core import AdapterUse, AdapterVersion, Request, SamplingParams
from chiliad.engine.policy import FirstCome
from chiliad.engine.scheduler import Scheduler, Sequence
from chiliad.errors import AdapterTooLarge, InvalidAdapter
from chiliad.memory.pool import Owner, PagePool
from chiliad.memory.swap import SwapSpace

State = Literal["absent", "loading", "resident", "failed"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Residency whose loads finish when the test says so. LRU over idle adapters."""

    def __init__(self, pool: PagePool, pages: dict[str, int], broken: frozenset[str] = frozenset()) -> None:
        self.pool, self.pages, self.broken = pool, pages, broken
        self.states: dict[str, State] = {}
        self.held: dict[str, np.ndarray] = {}
        self.users: dict[str, int] = {}
        self.idle: dict[str, None] = {}  # least recently used first
        self.loads: list[str] = []
        self.peak_loading = 0
        pool.register(self, Owner.ADAPTER)

    def state(self, version: AdapterVersion) -> State:
        return self.states.get(version.name, "absent")

    def pages_needed(self, version: AdapterVersion) -> int:
        return self.pages[version.name]

    def load(self, version: AdapterVersion) -> None:
        name = version.name
        assert self.state(version) == "absent"
        if self.pages[name] > self.pool.num_pages:
            raise AdapterTooLarge(f"{name} can never fit")
        self.held[name] = self.pool.alloc(self.pages[name], Owner.ADAPTER)
        self.states[name] = "loading"
        self.loads.append(name)

    def finish(self, name: str | None = None) -> None:
        """Loads end, well or badly; all of them, or one."""
        for each in [n for n, state in self.states.items() if state == "loading" and name in (None, n)]:
            if each in self.broken:
                self.pool.free(self.held.pop(each))
                self.states[each] = "failed"
            else:
                self.states[each] = "resident"
                self.users[each] = 0
                self.idle[each] = None

    def error(self, version: AdapterVersion) -> Exception:
        return InvalidAdapter(f"{version.name} is broken")

    def retain(self, version: AdapterVersion) -> None:
        assert self.states[version.name] == "resident"
        self.users[version.name] += 1
        self.idle.pop(version.name, None)

    def release(self, version: AdapterVersion) -> None:
        self.users[version.name] -= 1
        assert self.users[version.name] >= 0
        if not self.users[version.name]:
            self.idle[version.name] = None

    def evictable_pages(self) -> int:
        return sum(len(self.held[name]) for name in self.idle)

    def coldest(self) -> float | None:
        return 1.0 if self.idle else None

    def evict(self) -> int:
        name = next(iter(self.idle))
        del self.idle[name], self.states[name], self.users[name]
        return self.pool.free(self.held.pop(name))


def version(name: str) -> AdapterVersion:
    return AdapterVersion(name, 1, f"digest of {name}", f"/{name}", 1)


_ids = iter(range(10**9))


def request(
    prompt: int | tuple[int, ...] = 8,
    max_tokens: int = 4,
    adapter: str | tuple[str, ...] = (),
    *,
    n: int = 1,
    priority: int = 0,
    tenant: str = "",
    salt: str = "",
    prefix_cache: bool = True,
    id: str | None = None,
) -> Request:
    """An int prompt stands for that many tokens, different in each request."""
    number = next(_ids)
    if isinstance(prompt, int):
        prompt = tuple(number * 1000 + i for i in range(prompt))
    names = (adapter,) if isinstance(adapter, str) else adapter
    return Request(
        id=id or f"r{number}",
        prompt=prompt,
        params=SamplingParams(max_tokens=max_tokens, n=n),
        adapters=tuple(AdapterUse(version(name)) for name in names),
        priority=priority,
        tenant=tenant,
        cache_salt=salt,
        prefix_cache=prefix_cache,
    )


class World:
    """Scheduler, pool, store and a "model" whose next token is a function of all tokens before it.

    `kv` mirrors the cache: kv[page, offset] is what was written there, so that reading a wrong, stale
    or foreign page shows up as a wrong context. Swap copies it as it would copy bytes.
    """

    def __init__(
        self,
        num_pages: int = 64,
        *,
        num_layers: int = 2,
        block_tokens: int = 4,
        max_model_len: int = 256,
        max_step_tokens: int = 32,
        max_sequences: int = 8,
        max_waiting: int = 64,
        policy: FirstCome | None = None,
        prefix_cache: bool = False,
        swap_blocks: int = 0,
        adapters: dict[str, int] | None = None,
        broken: frozenset[str] = frozenset(),
        adapter_share: float | None = None,
        instant_loads: bool = True,
        verify: bool = True,
    ) -> None:
        self.verify = verify  # compute and read back the fake KV cache, and check all laws
        self.clock = Clock()
        self.pool = PagePool(num_pages, adapter_share)
        self.store = Store(self.pool, adapters or {}, broken)
        self.num_layers, self.block_tokens = num_layers, block_tokens
        self.kv = np.empty((num_pages, block_tokens), object)
        block_bytes = num_layers * self.kv[0].nbytes
        self.swap = (
            SwapSpace(self.kv, num_layers, swap_blocks * block_bytes, self.clock) if swap_blocks else None
        )
        self.scheduler = Scheduler(
            SchedulerConfig(max_step_tokens, max_sequences, max_waiting),
            pool=self.pool,
            residency=self.store,
            num_layers=num_layers,
            block_tokens=block_tokens,
            max_model_len=max_model_len,
            policy=policy,
            prefix_cache=prefix_cache,
            swap=self.swap,
            clock=self.clock,
        )
        self.instant_loads = instant_loads
        self.done: dict[str, list[Sequence]] = {}  # ended by length
        self.failed: dict[str, Exception] = {}
        self.started: list[Sequence] = []  # in order of first admission
        self.steps = 0

    def add(self, item: Request) -> list[Sequence]:
        self.done[item.id] = []
        return self.scheduler.add(item)

    def step(self, seconds: float = 0.01, per_token: float = 0.0) -> list[tuple[Sequence, int]]:
        """Plan, check the plan, compute, advance, end what is complete -> [(sequence, count)]."""
        scheduler = self.scheduler
        if self.instant_loads:
            self.store.finish()
        waiting = [s for s in scheduler.waiting if s.first_scheduled is None]
        plan = scheduler.plan()
        self.started += [s for s in waiting if s.first_scheduled is not None]
        for item, error in scheduler.take_failures():
            assert item.id not in self.failed
            self.failed[item.id] = error
        assert plan.num_tokens == sum(work.count for work in plan.work) <= scheduler.config.max_step_tokens
        assert len({id(work.sequence) for work in plan.work}) == len(plan.work)
        keys = [work.sequence.adapter_key for work in plan.work]
        assert len([k for i, k in enumerate(keys) if not i or keys[i - 1] != k]) == len(set(keys))
        tokens = []
        for work in plan.work:
            sequence: Sequence = work.sequence
            assert work.start == sequence.num_computed
            assert work.count > 0
            assert work.sample == (work.start + work.count == len(sequence.tokens))
            assert all(self.store.state(use.adapter) == "resident" for use in sequence.request.adapters)
            if self.verify:
                self._compute(sequence, work.start, work.count)
            if work.sample:
                tokens.append(next_token(sequence.tokens, sequence))
        self.clock.now += seconds + per_token * plan.num_tokens
        scheduler.advance(plan, tokens)
        for work in plan.work:
            if work.sequence.num_output >= work.sequence.request.params.max_tokens:
                scheduler.end(work.sequence)
                self.done[work.sequence.request.id].append(work.sequence)
        if self.verify:
            scheduler.check()
        self.steps += 1
        return [(work.sequence, work.count) for work in plan.work]

    def _compute(self, sequence: Sequence, start: int, count: int) -> None:
        """Write "KV" of the new positions, then read the whole context back."""
        identity = (sequence.adapter_key, sequence.request.tenant, sequence.request.cache_salt)
        size, pages = self.block_tokens, sequence.table.pages
        assert start + count <= len(pages) * size
        for position in range(start, start + count):
            for page in pages[position // size].tolist():
                self.kv[page, position % size] = (identity, position, sequence.tokens[position])
        for position in range(start + count):
            for page in pages[position // size].tolist():
                assert self.kv[page, position % size] == (identity, position, sequence.tokens[position])

    def run(self, max_steps: int = 2000, seconds: float = 0.01) -> None:
        """Until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                return
            self.step(seconds)
        raise AssertionError("no end in sight: livelock or starvation")

    def run_loads(self, max_steps: int = 500) -> None:
        """Until nothing is left, each load taking one step."""
        for _ in range(max_steps):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                return
            self.step()
            self.store.finish()
        raise AssertionError("no end in sight: livelock or starvation")

    def assert_empty(self) -> None:
        """After a drain, caches aside, nothing is held."""
        self.scheduler.check()
        if self.scheduler.prefix is not None:
            self.scheduler.prefix.clear()
        assert not any(self.store.users.values())
        while self.store.idle:
            self.store.evict()
        assert self.pool.free_pages == self.pool.num_pages
        assert self.swap is None or self.swap.used_blocks == 0


def next_token(tokens: list[int], sequence: Sequence) -> int:
    return hash((tuple(tokens[-3:]), len(tokens), sequence.adapter_key == (), sequence.index)) % 50_000


def expected_output(item: Request, index: int, sequence: Sequence) -> list[int]:
    tokens = list(item.prompt)
    while len(tokens) < len(item.prompt) + item.params.max_tokens:
        tokens.append(next_token(tokens, sequence))
    return tokens
