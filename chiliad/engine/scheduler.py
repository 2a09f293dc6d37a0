"""Which sequence computes how many tokens in the next step.

Iteration-level batching without phases: a step maps running sequences to numbers of tokens
within one budget. Sequences that decode take one token each, then prompts are computed in
chunks, then waiting sequences are admitted. Everything is decided in pages, the one currency of
KV cache and adapters. No torch, no I/O, and time only through `clock`: tests run it on a fake one.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice
from math import ceil
from operator import attrgetter
from typing import Literal, Protocol

import numpy as np

from chiliad.config import SchedulerConfig
from chiliad.core import AdapterVersion, Request, SequenceState, StepPlan, Work
from chiliad.engine.policy import FirstCome, Rank, make_policy
from chiliad.errors import (
    AdapterError,
    ContextLengthExceeded,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    Unavailable,
)
from chiliad.memory.kv import BlockTable
from chiliad.memory.pool import Owner, PagePool
from chiliad.memory.prefix import Block, PrefixCache
from chiliad.memory.swap import SwapSpace
from chiliad.observe import EngineMetrics

MAX_OVERTAKEN = 16  # later requests that may pass one that lacks pages, before it blocks the rest
_SCAN = 1024  # waiting sequences looked at in one plan
_AHEAD = 32  # waiting sequences, best first, whose adapters are fetched and kept
_SHORTAGES = 4  # failed admissions for want of pages, after which a plan admits nobody else

_RUNNING, _WAITING, _FINISHED = SequenceState.RUNNING, SequenceState.WAITING, SequenceState.FINISHED
_rank = attrgetter("rank")


class Residency(Protocol):
    """What the scheduler asks of the adapter store."""

    def state(self, version: AdapterVersion) -> Literal["absent", "loading", "resident", "failed"]: ...

    def load(self, version: AdapterVersion) -> None:
        """Reserve pages now and fetch in the background. Raises OutOfMemory when they do not fit now,
        another ChiliadError when they never will."""

    def retain(self, version: AdapterVersion) -> None:
        """One more user of a resident adapter; it is not evicted while it has any."""

    def release(self, version: AdapterVersion) -> None: ...

    def pages_needed(self, version: AdapterVersion) -> int: ...

    def error(self, version: AdapterVersion) -> Exception | None:
        """Why the adapter is in state "failed"."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request, from the queue to its end."""

    request: Request
    index: int  # choice index
    order: int  # of arrival, unique
    queued: float  # seconds, scheduler's clock
    adapter_key: tuple[tuple[str, float], ...]
    tokens: list[int]  # prompt, then output
    num_prompt: int
    table: BlockTable
    state: SequenceState = _WAITING
    rank: Rank = (0.0, 0)
    num_computed: int = 0  # tokens whose KV is in the table
    num_cached: int = 0  # prompt tokens that the prefix cache had when the sequence first ran
    capacity: int = 0  # tokens that the table has room for
    retained: int = 0  # how many of its adapters, in their order, count it as a user
    missed: bool = False  # whether it has had to wait for an adapter
    fetched: float = 0.0  # adapters loaded for it, as the number of tokens whose KV takes their room
    overtaken: int = 0  # sequences that passed it while it lacked pages
    preemptions: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    chain: list[bytes] = field(default_factory=list)  # prefix cache: seed, then a hash per full block
    blocks: list[Block] = field(default_factory=list)  # cached blocks in use, in chain order
    published: int = 0  # full blocks offered to the prefix cache, or taken from it
    swapped: list[int] = field(default_factory=list)  # places of its blocks in swap, while it waits
    num_swapped: int = 0  # tokens whose KV is there

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


class Scheduler:
    """Owns the sequences and their KV pages. One thread calls it:

        plan = scheduler.plan(); ...compute...; scheduler.advance(plan, tokens); scheduler.end(done)

    Progress: `running` is ordered by rank and pages are taken back from its end, so the first
    sequence is never preempted for another and always ends; at most MAX_OVERTAKEN later requests
    pass one that lacks pages; and a policy bounds waiting otherwise.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        pool: PagePool,
        residency: Residency,
        num_layers: int,
        block_tokens: int,
        max_model_len: int,
        metrics: EngineMetrics | None = None,
        policy: FirstCome | None = None,
        prefix_cache: bool = True,
        swap: SwapSpace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.policy = make_policy(config.policy) if policy is None else policy
        self.metrics = EngineMetrics() if metrics is None else metrics
        self.max_model_len = max_model_len
        self.prefix = PrefixCache(pool, block_tokens, clock) if prefix_cache else None
        self.running: list[Sequence] = []  # sorted by rank
        self._pool = pool
        self._swap = swap
        self._residency = residency
        self._num_layers = num_layers
        self._block_tokens = block_tokens
        self._max_sequences = min(config.max_sequences, config.max_step_tokens)
        self.policy.slots = self._max_sequences
        self._clock = clock
        self._order = count()
        self._requests: dict[str, list[Sequence]] = {}  # by request id: sequences that have not ended
        self._keys: Counter[tuple[tuple[str, float], ...]] = Counter()  # adapter keys of `running`
        self._ahead: dict[Sequence, None] = {}  # waiting sequences that retain their adapters
        self._loading: set[AdapterVersion] = set()  # fetched on our request, perhaps done by now
        self._failures: list[tuple[Request, Exception]] = []
        self._expected = 0.5  # share of max_tokens that sequences use, a moving average
        self._planned = 0.0
        self._token_seconds = 1e-3  # what computing a token of a prompt takes, a moving average

    @property
    def waiting(self) -> FirstCome:
        """The queue: has a length and iterates over sequences."""
        return self.policy

    # -- requests ------------------------------------------------------------------------

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request as `params.n` sequences.

        Raises ContextLengthExceeded when it can never fit the model or the pool, Overloaded when
        the queue is full, InvalidRequest when a request of this id is alive.
        """
        now = self._clock()
        prompt, params = request.prompt, request.params
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use: choose another", param="id")
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise ContextLengthExceeded(
                f"{len(prompt)} prompt tokens plus max_tokens={params.max_tokens} exceed the model's "
                f"{self.max_model_len} tokens: shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        if total > (limit := self.max_sequence_tokens):
            raise ContextLengthExceeded(
                f"{len(prompt)} prompt tokens plus max_tokens={params.max_tokens} can never fit the memory "
                f"pool, which holds {limit} tokens: lower max_tokens or start with more --memory",
                param="max_tokens",
            )
        if len(self.policy) + params.n > self.config.max_waiting:
            raise Overloaded(
                f"{len(self.policy)} sequences are waiting, the limit is {self.config.max_waiting}: "
                "try again later",
                retry_after=self.policy.retry_after(now),
            )
        key = request.adapter_key
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request=request,
                index=index,
                order=next(self._order),
                queued=now,
                adapter_key=key,
                tokens=list(prompt),
                num_prompt=len(prompt),
                table=BlockTable(self._num_layers),
            )
            if self.prefix is not None and request.prefix_cache:
                sequence.chain.append(self.prefix.seed(key, request.tenant, request.cache_salt))
            sequence.rank = self.policy.rank(sequence)
            self.policy.push(sequence, now)
            sequences.append(sequence)
        self._requests[request.id] = sequences.copy()
        return sequences

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, prompt and output, that model and pool can ever hold."""
        blocks = self._pool.limit(Owner.KV) // self._num_layers
        return min(self.max_model_len, blocks * self._block_tokens)

    def cancel(self, request_id: str) -> list[Sequence]:
        """Drop what is left of a request and free its memory now; returns the dropped sequences."""
        sequences = self._requests.pop(request_id, [])
        for sequence in sequences:
            self._leave(sequence)
        return sequences

    def end(self, sequence: Sequence) -> bool:
        """A sequence is complete: free its memory. True if it was the last of its request."""
        siblings = self._requests.get(sequence.request.id, [])
        if sequence not in siblings:
            return False  # it ended already
        used = sequence.num_output / max(1, sequence.request.params.max_tokens)
        self._expected += 0.05 * (min(used, 1.0) - self._expected)
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.id]
        self._leave(sequence)
        return not siblings

    def take_failures(self) -> list[tuple[Request, Exception]]:
        """Requests that `plan` had to give up, with the reason. Their memory is free already."""
        failures, self._failures = self._failures, []
        return failures

    # -- steps ---------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Choose the next step's work. Empty when nothing can run; then look at `take_failures`."""
        now = self._planned = self._clock()
        self._give_up(now)
        work: list[Work] = []
        prefills: list[Sequence] = []
        budget = self.config.max_step_tokens
        running = self.running
        i = 0
        while i < len(running):
            sequence = running[i]
            start = sequence.num_computed
            if len(sequence.tokens) - start > 1:
                prefills.append(sequence)
            elif start < sequence.capacity or self._grow(sequence):
                work.append(Work(sequence, start, 1, True))
                budget -= 1
            else:
                break  # it gave its own pages back, so it was the last
            i += 1
        later: list[Sequence] = []
        for sequence in prefills:
            if len(self.policy) and self.policy.yields(sequence):
                later.append(sequence)
            elif budget:
                budget -= self._chunk(sequence, budget, work)
        if len(self.policy):
            budget = self._admit_waiting(budget, work, now)
        for sequence in later:
            if budget and sequence.state is _RUNNING:
                budget -= self._chunk(sequence, budget, work)
        if len(self._keys) > 1:
            work = _grouped(work)
        return StepPlan(work, sum(item.count for item in work))

    def advance(self, plan: StepPlan, tokens: Iterable[int]) -> None:
        """Book a computed plan. tokens: one per work with `sample`, in plan order."""
        now = self._clock()
        sampled = iter(tokens)
        policy, prefix, size = self.policy, self.prefix, self._block_tokens
        metered = policy.metered
        for work in plan.work:
            sequence: Sequence = work.sequence
            token = next(sampled) if work.sample else None
            if sequence.state is not _RUNNING:
                continue
            sequence.num_computed = computed = work.start + work.count
            if token is not None:
                sequence.tokens.append(token)
                if sequence.first_token is None:
                    sequence.first_token = now
                if metered:
                    policy.produced(sequence, now)
            if sequence.chain and computed // size > sequence.published:
                self._publish(sequence)
        if plan.num_tokens >= 2 * size:
            seconds = (now - self._planned) / plan.num_tokens
            self._token_seconds += 0.1 * (seconds - self._token_seconds)
            if prefix is not None:
                prefix.rebuild_seconds = self._token_seconds * size

    def _give_up(self, now: float) -> None:
        for sequence in self.policy.expired(now):
            request = sequence.request
            started = (s.first_scheduled is not None for s in self._requests.get(request.id, [sequence]))
            if sequence.state is _WAITING and not any(started):
                self._fail(
                    request,
                    Unavailable(
                        "too busy to answer in time: try again later",
                        retry_after=self.policy.retry_after(now),
                    ),
                )

    # -- admission -----------------------------------------------------------------------

    def _admit_waiting(self, budget: int, work: list[Work], now: float) -> int:
        """Admit waiting sequences while there is room; fetch adapters for the first of the others.

        Returns what is left of the budget.
        """
        self._loading = {v for v in self._loading if self._residency.state(v) == "loading"}
        forecast = self._forecast()
        short: list[Sequence] = []  # lack pages, and may be overtaken
        blocked: set[object] = set()  # adapter keys known not to be resident
        kept: set[Sequence] = set()
        ahead = 0  # pages of adapters kept or on their way for those who wait
        room = True
        candidates = self.policy.candidates(now, self._keys)
        for position, sequence in enumerate(islice(candidates, _SCAN)):
            entitled = self.policy.entitled(sequence)
            if entitled and room:
                room = budget > 0 and (
                    len(self.running) < self._max_sequences
                    or self.policy.victim(sequence, self.running) is not None
                )
            if position >= _AHEAD and not room:
                break
            if sequence.adapter_key in blocked or sequence.state is not _WAITING:
                continue
            due = position < _AHEAD and (ahead == 0 or ahead < self._pool.num_pages // 4)
            due = due and len(self._loading) < _AHEAD
            state = self._fetch(sequence, due, forecast)
            if state == "resident":
                if room and entitled and not self._awaits_sibling(sequence):
                    while not (admitted := self._admit(sequence, forecast, now)):
                        victim = self.policy.victim(sequence, self.running)
                        if victim is None:
                            break
                        budget += self._displace(victim, work)
                        forecast = self._forecast()
                    if admitted:
                        budget -= self._chunk(sequence, budget, work)
                        for other in short:
                            other.overtaken += 1
                            room = room and other.overtaken < MAX_OVERTAKEN
                        continue
                    state = "short"
            elif state == "failed":
                continue
            else:
                blocked.add(sequence.adapter_key)
            if due and sequence.adapter_key:
                kept.add(sequence)
                ahead += self._pages_needed(sequence)
            if state == "short" and room and entitled:
                short.append(sequence)
                if sequence.overtaken >= MAX_OVERTAKEN:
                    break  # whatever becomes free is kept for it
                room = len(short) < _SHORTAGES
        for sequence in [s for s in self._ahead if s not in kept]:
            self._unkeep(sequence)
        if short and not self.running and not self._loading:
            budget -= self._last_resort(short[0], budget, work, now)
        return budget

    def _displace(self, victim: Sequence, work: list[Work]) -> int:
        """A running sequence gives its place to one that is entitled to it; returns the tokens not computed."""
        planned = next((item for item in work if item.sequence is victim), None)
        if planned is not None:
            work.remove(planned)
        self._preempt(victim)
        return 0 if planned is None else planned.count

    def _last_resort(self, sequence: Sequence, budget: int, work: list[Work], now: float) -> int:
        """Nothing runs and nothing is on its way, yet this one lacks pages: now or never."""
        for other in list(self._ahead):
            if other is not sequence:
                self._unkeep(other)
        state = self._fetch(sequence, True, forecast := self._forecast())
        if state == "resident" and self._admit(sequence, forecast, now):
            return self._chunk(sequence, budget, work)
        if state in ("resident", "short"):
            self._fail(
                sequence.request,
                OutOfMemory(
                    f"no memory for a request of {len(sequence.tokens)} tokens although nothing else runs: "
                    "unpin adapters or start with more --memory",
                    retry_after=1.0,
                ),
            )
        return 0

    def _fetch(
        self, sequence: Sequence, due: bool, forecast: _Forecast
    ) -> Literal["resident", "loading", "waiting", "short", "failed"]:
        """Where a waiting sequence's adapters are.

        If it is `due`, those that are resident stay so and absent ones are asked for.
        """
        if due and sequence.request.adapters:
            self._keep(sequence)
        result: Literal["resident", "loading", "waiting"] = "resident"
        for use in sequence.request.adapters:
            version = use.adapter
            state = self._residency.state(version)
            if state == "resident":
                continue
            sequence.missed = True
            try:
                if state == "failed":
                    raise self._residency.error(version) or AdapterError(f"adapter {version} did not load")
                if state == "absent":
                    if not due:
                        result = "waiting"
                        continue
                    pages = self._residency.pages_needed(version)
                    if self.running and not self._pool.split and not forecast.spares(pages):
                        return "short"
                    self._residency.load(version)
                    self._loading.add(version)
                    sequence.fetched += pages / self._num_layers * self._block_tokens
            except OutOfMemory:
                return "short"
            except Exception as error:  # this adapter cannot be had: its requests fail, nobody else's
                self._fail(sequence.request, error)
                return "failed"
            result = "loading"
        return result

    def _pages_needed(self, sequence: Sequence) -> int:
        return sum(self._residency.pages_needed(use.adapter) for use in sequence.request.adapters)

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Choices of one request share their prompt: the others start once the first has computed it."""
        if not sequence.chain or len(sequence.tokens) <= self._block_tokens:
            return False
        first = self._requests[sequence.request.id][0]
        return first is not sequence and first.state is _RUNNING and first.num_computed < first.num_prompt

    def _admit(self, sequence: Sequence, forecast: _Forecast, now: float) -> bool:
        """Give a waiting sequence pages for all its tokens and let it run; False if there is no room."""
        if len(self.running) >= self._max_sequences:
            return False
        size = self._block_tokens
        num_tokens = len(sequence.tokens)
        blocks: list[Block] = []
        if self.prefix is not None and sequence.chain and sequence.request.params.prompt_logprobs is None:
            # At least one token is left to compute: its logits are what the sequence is here for.
            self.prefix.extend(sequence.chain, sequence.tokens, num_tokens - 1)
            blocks = self.prefix.match(sequence.chain, (num_tokens - 1) // size)
        needed = -(-num_tokens // size) - len(blocks)
        pages: np.ndarray | None = None
        if not self.running or forecast.admits(num_tokens, self._left(sequence)):
            self._retain(sequence)  # first, lest its own adapter be evicted for its KV
            with contextlib.suppress(OutOfMemory):
                pages = self._pool.alloc(needed * self._num_layers, Owner.KV)
        if pages is None:
            self._drop_blocks(blocks)
            if sequence not in self._ahead:
                self._release(sequence)
            return False
        self.policy.remove(sequence)
        self._ahead.pop(sequence, None)
        for block in blocks:
            sequence.table.append(block.pages)
        sequence.table.append(pages)
        sequence.blocks = blocks
        sequence.published = len(blocks)
        sequence.num_computed = len(blocks) * size
        sequence.capacity = sequence.table.num_blocks * size
        if sequence.swapped:
            self._swap_in(sequence)
        sequence.state = _RUNNING
        insort(self.running, sequence, key=_rank)
        self.policy.joined(sequence)
        self._keys[sequence.adapter_key] += 1
        forecast.add(sequence, self._left(sequence))
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            sequence.num_cached = sequence.num_computed
            self.policy.admitted(sequence, now)
            self._count(sequence)
        return True

    def _count(self, sequence: Sequence) -> None:
        metrics = self.metrics
        if sequence.chain:
            metrics.prefix_queries += sequence.num_prompt
            metrics.prefix_hits += sequence.num_cached
        if sequence.adapter_key:
            metrics.adapter_misses += sequence.missed
            metrics.adapter_hits += not sequence.missed

    def _chunk(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Plan as much of a sequence's known tokens as the budget allows; returns how many."""
        left = len(sequence.tokens) - sequence.num_computed
        count = min(left, budget)
        work.append(Work(sequence, sequence.num_computed, count, count == left))
        return count

    # -- pages ---------------------------------------------------------------------------

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence its next block, at the cost of others if need be.

        False when it had to leave `running` itself: preempted, or failed because it is alone.
        """
        while True:
            try:
                pages = self._pool.alloc(self._num_layers, Owner.KV)
            except OutOfMemory as error:
                alone = len(self.running) == 1
                if self._unkeep_some(even_overtaken=alone):
                    continue
                victim = self.running[-1]
                if alone and not any(self._residency.state(v) == "loading" for v in self._loading):
                    self._fail(victim.request, error)
                else:
                    self._preempt(victim)
                    self._expected = min(1.0, self._expected + 0.1)  # the forecast was too hopeful
                if victim is sequence:
                    return False
            else:
                sequence.table.append(pages)
                sequence.capacity += self._block_tokens
                return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages. It keeps its tokens, and in swap their KV, if that is cheaper
        than to compute it again later."""
        if self._swap is not None:
            self._swap_out(sequence, self._swap)
        self._stop(sequence)
        sequence.state = _WAITING
        sequence.preemptions += 1
        self.metrics.preemptions += 1
        self.policy.push(sequence, self._planned)

    def _swap_out(self, sequence: Sequence, swap: SwapSpace) -> None:
        blocks = -(-sequence.num_computed // self._block_tokens)
        if 2 * blocks * swap.block_seconds < sequence.num_computed * self._token_seconds:
            sequence.swapped = swap.save(sequence.table.pages[:blocks])
        if sequence.swapped:
            sequence.num_swapped = sequence.num_computed
            self.metrics.swaps += 1

    def _swap_in(self, sequence: Sequence) -> None:
        """Fetch from swap what the prefix cache did not have."""
        assert self._swap is not None
        first, last = len(sequence.blocks), len(sequence.swapped)
        if first < last:
            self._swap.restore(sequence.swapped[first:], sequence.table.pages[first:last])
            sequence.num_computed = max(sequence.num_computed, sequence.num_swapped)
        self._drop_swapped(sequence)

    def _drop_swapped(self, sequence: Sequence) -> None:
        if self._swap is not None and sequence.swapped:
            self._swap.free(sequence.swapped)
            sequence.swapped, sequence.num_swapped = [], 0

    def _publish(self, sequence: Sequence) -> None:
        """Offer newly filled blocks to the prefix cache."""
        assert self.prefix is not None
        self.prefix.extend(sequence.chain, sequence.tokens, sequence.num_computed)
        full = sequence.num_computed // self._block_tokens
        for i in range(sequence.published, full):
            block = self.prefix.insert(sequence.chain[i + 1], sequence.table.pages[i])
            if block is not None:
                sequence.blocks.append(block)
        sequence.published = full

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch, and everything it holds from it."""
        running = self.running
        del running[bisect_left(running, sequence.rank, key=_rank)]
        self.policy.left(sequence)
        self._keys[sequence.adapter_key] -= 1
        if not self._keys[sequence.adapter_key]:
            del self._keys[sequence.adapter_key]
        self._pool.free(sequence.table.clear())
        if self.prefix is not None and sequence.blocks:
            self.prefix.release(sequence.blocks)
            sequence.blocks = []
        sequence.num_computed = sequence.capacity = sequence.published = 0
        self._release(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence's life ends, wherever it is."""
        if sequence.state is _RUNNING:
            self._stop(sequence)
        elif sequence.state is _WAITING:
            self.policy.remove(sequence)
            self._unkeep(sequence)
            self._drop_swapped(sequence)
        sequence.state = _FINISHED

    def _fail(self, request: Request, error: Exception) -> None:
        for sequence in self._requests.pop(request.id, []):
            self._leave(sequence)
        self._failures.append((request, error))

    def _drop_blocks(self, blocks: list[Block]) -> None:
        if self.prefix is not None and blocks:
            for block in blocks:
                self._pool.free(block.pages)
            self.prefix.release(blocks)

    # -- adapters ------------------------------------------------------------------------

    def _retain(self, sequence: Sequence) -> None:
        """Become a user of the adapters that are resident, up to the first that is not."""
        for use in sequence.request.adapters[sequence.retained :]:
            if self._residency.state(use.adapter) != "resident":
                break
            self._residency.retain(use.adapter)
            sequence.retained += 1

    def _release(self, sequence: Sequence) -> None:
        for use in sequence.request.adapters[: sequence.retained]:
            self._residency.release(use.adapter)
        sequence.retained = 0

    def _keep(self, sequence: Sequence) -> None:
        """Hold a waiting sequence's adapters, so that fetching others does not evict them again."""
        self._retain(sequence)
        self._ahead[sequence] = None

    def _unkeep(self, sequence: Sequence) -> None:
        if sequence in self._ahead:
            del self._ahead[sequence]
            self._release(sequence)

    def _unkeep_some(self, even_overtaken: bool) -> bool:
        """Let go of adapters kept for waiting sequences, but not of those that waited too long."""
        gone = [s for s in self._ahead if even_overtaken or s.overtaken < MAX_OVERTAKEN]
        for sequence in gone:
            self._unkeep(sequence)
        return bool(gone)

    # -- forecast ------------------------------------------------------------------------

    def _left(self, sequence: Sequence) -> int:
        """Output tokens that a sequence is expected to add."""
        return ceil(self._expected * max(0, sequence.request.params.max_tokens - sequence.num_output))

    def _forecast(self) -> _Forecast:
        forecast = _Forecast(self._pool, self._num_layers, self._block_tokens)
        for sequence in self.running:
            forecast.add(sequence, self._left(sequence))
        return forecast

    # -- laws ----------------------------------------------------------------------------

    def check(self) -> None:
        """State what must hold between steps; AssertionError names what does not."""
        held = [sequence.table.pages.reshape(-1) for sequence in self.running]
        if self.prefix is not None:
            held += self.prefix.held()
            self.prefix.check()
        self._pool.check({Owner.KV: held})
        ranks = [sequence.rank for sequence in self.running]
        assert ranks == sorted(ranks), "running is out of order"
        assert self._keys == Counter(s.adapter_key for s in self.running), "adapter keys drifted"
        for sequence in self.running:
            assert sequence.state is _RUNNING
            assert sequence.capacity == sequence.table.num_blocks * self._block_tokens
            assert sequence.num_computed <= min(sequence.capacity, len(sequence.tokens))
        for sequence in self.policy:
            assert sequence.state is _WAITING
            assert sequence.table.num_blocks == 0, "a waiting sequence holds pages"
            assert not sequence.retained or sequence in self._ahead
            assert sequence.num_swapped < len(sequence.tokens)
        if self._swap is not None:
            self._swap.check([place for sequence in self.policy for place in sequence.swapped])
            assert not any(s.swapped for s in self.running), "a running sequence has KV in swap"
        alive = sum(len(sequences) for sequences in self._requests.values())
        assert alive == len(self.running) + len(self.policy), "sequences were lost"


class _Forecast:
    """Will sequences find pages as they grow?

    If each goes on for its expected length and frees its pages then, the need peaks at one of
    the moments when a sequence ends. (LightLLM's estimate; S-LoRA uses it with the longest
    possible outputs. Expected lengths admit more, and preemption repairs the rare mistake.)
    """

    def __init__(self, pool: PagePool, num_layers: int, block_tokens: int) -> None:
        self._pool = pool
        self._num_layers = num_layers
        self._slack = block_tokens // 2  # what a last block leaves empty on average
        self._block_tokens = block_tokens
        self._items: list[tuple[int, int]] = []  # (tokens to come, tokens with slack), sorted
        self._held = 0  # tokens that the running sequences' pages have room for
        self._most = 0  # what they would hold if nobody ended

    def add(self, sequence: Sequence, left: int) -> None:
        tokens = len(sequence.tokens) + self._slack
        insort(self._items, (left, tokens))
        self._held += sequence.capacity
        self._most += left + tokens

    def admits(self, num_tokens: int, left: int) -> bool:
        """Whether a sequence of `num_tokens` that grows by `left` may join."""
        room = self._held + self._pool.available(Owner.KV) // self._num_layers * self._block_tokens
        tokens = num_tokens + self._slack
        if self._most + left + tokens <= room:
            return True
        items = self._items.copy()
        insort(items, (left, tokens))
        return _peak(items) <= room

    def spares(self, pages: int) -> bool:
        """Whether the pool can do without this many pages."""
        available = self._pool.available(Owner.KV) - pages
        room = self._held + available // self._num_layers * self._block_tokens
        return self._most <= room or _peak(self._items) <= room


def _peak(items: list[tuple[int, int]]) -> int:
    held = peak = 0
    for alive, (left, tokens) in enumerate(reversed(items), 1):
        held += tokens
        peak = max(peak, held + alive * left)
    return peak


def _grouped(work: list[Work]) -> list[Work]:
    """Equal adapter keys adjacent, otherwise in order."""
    groups: dict[object, list[Work]] = {}
    for item in work:
        groups.setdefault(item.sequence.adapter_key, []).append(item)
    return [item for group in groups.values() for item in group]
