"""Scheduler, pool, store and prefix cache under random histories.

`World` computes a fake KV cache page by page and reads every context back, so a stale, foreign or
prematurely freed page fails the step that meets it; `World.step` checks plans and conservation.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_world import World, expected_output, request

from chiliad.core import Request
from chiliad.engine.policy import Clustered, EarlyAbort, FairShare, FirstCome
from chiliad.engine.scheduler import MAX_OVERTAKEN
from chiliad.errors import (
    AdapterTooLarge,
    ContextLengthExceeded,
    InvalidAdapter,
    OutOfMemory,
    Overloaded,
    Unavailable,
)

ADAPTERS = {"tiny": 1, "small": 3, "other": 4, "big": 12, "broken": 5, "huge": 10_000}
NAMES = st.sampled_from([(), (), *((name,) for name in ADAPTERS), ("small", "other"), ("tiny", "broken")])
POLICIES = [
    FirstCome,
    lambda: Clustered(1, 0.2),
    lambda: EarlyAbort(0.5),
    FairShare,
    lambda: FairShare("adapter"),
]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(12, 60),
        max_step_tokens=st.integers(3, 40),
        max_sequences=st.integers(1, 8),
        policy=st.sampled_from(POLICIES),
        prefix_cache=st.booleans(),
        swap_blocks=st.sampled_from([0, 3, 30]),
        share=st.sampled_from([None, None, None, 0.4]),
        hope=st.floats(0, 1),
    )
    def start(
        self,
        num_pages: int,
        max_step_tokens: int,
        max_sequences: int,
        policy: object,
        prefix_cache: bool,
        swap_blocks: int,
        share: float | None,
        hope: float,
    ) -> None:
        self.world = World(
            num_pages,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            max_waiting=20,
            max_model_len=100,
            policy=policy(),  # type: ignore[operator]
            prefix_cache=prefix_cache,
            swap_blocks=swap_blocks,
            adapters=ADAPTERS,
            broken=frozenset({"broken"}),
            adapter_share=share,
            instant_loads=False,
        )
        self.world.scheduler._expected = hope
        self.accepted: dict[str, Request] = {}
        self.cancelled: dict[str, int] = {}  # how many choices the cancellation dropped

    @rule(
        shared=st.integers(0, 3),
        tail=st.lists(st.integers(0, 1), max_size=14),
        max_tokens=st.integers(1, 20),
        adapter=NAMES,
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, -1, 2]),
        tenant=st.sampled_from(["", "t"]),
        opted_in=st.booleans(),
    )
    def submit(
        self,
        shared: int,
        tail: list[int],
        max_tokens: int,
        adapter: tuple[str, ...],
        n: int,
        priority: int,
        tenant: str,
        opted_in: bool,
    ) -> None:
        prompt = (*([7] * (4 * shared)), 1, *tail)  # few distinct beginnings: the cache is hit often
        item = request(
            prompt, max_tokens, adapter, n=n, priority=priority, tenant=tenant, prefix_cache=opted_in
        )
        try:
            self.world.add(item)
        except ContextLengthExceeded:
            assert len(prompt) + max_tokens > self.world.scheduler.max_sequence_tokens
        except Overloaded:
            assert len(self.world.scheduler.waiting) + n > 20
        else:
            self.accepted[item.id] = item

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.step(seconds=0.02)
            assert all(s.overtaken <= MAX_OVERTAKEN for s in self.world.scheduler.waiting)

    @rule(name=st.sampled_from([*ADAPTERS, None]))
    def loads_finish(self, name: str | None) -> None:
        self.world.store.finish(name)

    @precondition(lambda self: self.world.store.idle)
    @rule()
    def evict_an_idle_adapter(self) -> None:
        self.world.store.evict()

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.accepted)))
        gone = self.world.scheduler.cancel(id)
        assert not gone or id not in self.cancelled
        if gone:
            self.cancelled[id] = len(gone)
        self.world.scheduler.check()

    @rule()
    def time_passes(self) -> None:
        self.world.clock.now += 0.3

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.instant_loads = True
        world.run(max_steps=3000)
        for id, item in self.accepted.items():
            # Each choice ended exactly once: complete, or cancelled, or with its request's failure.
            done = world.done[id]
            assert len({s.index for s in done}) == len(done)
            if id in world.failed:
                assert id not in self.cancelled
                self._failure_is_justified(item, world.failed[id])
            else:
                assert len(done) + self.cancelled.get(id, 0) == item.params.n
            for sequence in done:
                assert sequence.tokens == expected_output(item, sequence.index, sequence)
        world.store.finish()
        world.assert_empty()

    def _failure_is_justified(self, item: Request, error: Exception) -> None:
        names = {use.adapter.name for use in item.adapters}
        if isinstance(error, Unavailable):
            assert isinstance(self.world.scheduler.policy, EarlyAbort)
            assert error.retry_after is not None
        elif isinstance(error, AdapterTooLarge):
            assert "huge" in names
        elif isinstance(error, InvalidAdapter):
            assert "broken" in names
        else:
            assert isinstance(error, OutOfMemory)
            pool, world = self.world.pool, self.world
            adapter = sum(ADAPTERS[name] for name in names)
            blocks = -(-(len(item.prompt) + item.params.max_tokens) // world.block_tokens)
            kv = blocks * world.num_layers
            limits = [adapter > 0.4 * pool.num_pages, kv > 0.6 * pool.num_pages]
            assert kv + adapter > pool.num_pages or (pool.split and any(limits))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
