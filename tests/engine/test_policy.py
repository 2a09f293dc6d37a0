"""Policies: their order, their bounds on waiting, and what they are for, on a virtual clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import World, request

from chiliad.core import Request
from chiliad.engine.policy import (
    PRIORITY_SECONDS,
    Clustered,
    EarlyAbort,
    FairShare,
    FirstCome,
    make_policy,
)
from chiliad.engine.scheduler import Sequence
from chiliad.errors import InvalidConfig, Unavailable

Arrivals = list[tuple[float, Request]]
NEVER = float("inf")


class Run:
    """A trace played against one policy. A step takes 10 ms plus 0.2 ms per token."""

    def __init__(
        self,
        policy: FirstCome,
        arrivals: Arrivals,
        *,
        until: float = NEVER,
        load_seconds: float = 0.0,
        **options: object,
    ) -> None:
        options = {"num_pages": 2000, "max_sequences": 16, "max_step_tokens": 128} | options
        self.world = world = World(
            policy=policy,
            max_waiting=100_000,
            verify=False,
            instant_loads=not load_seconds,
            **options,  # type: ignore[arg-type]
        )
        self.sequences: dict[str, Sequence] = {}
        start = world.clock.now
        todo = sorted(arrivals, key=lambda arrival: arrival[0])[::-1]
        ready: dict[str, float] = {}
        while (todo or world.scheduler.running or len(world.scheduler.waiting)) and (
            world.clock.now - start < until
        ):
            while todo and start + todo[-1][0] <= world.clock.now:
                _, item = todo.pop()
                (self.sequences[item.id],) = world.add(item)
            for name in [n for n, state in world.store.states.items() if state == "loading"]:
                if ready.setdefault(name, world.clock.now + load_seconds) <= world.clock.now:
                    world.store.finish(name)
                    del ready[name]
            if not world.step(0.01, 0.0002) and todo and not len(world.scheduler.waiting):
                world.clock.now = max(world.clock.now, start + todo[-1][0])
            assert world.steps < 100_000

    def ttft(self, select: Callable[[Request], bool] = lambda item: True) -> list[float]:
        """Seconds to the first token of each request; infinite if there was none."""
        return [
            NEVER if s.first_token is None else s.first_token - s.queued
            for s in self.sequences.values()
            if select(s.request)
        ]

    def attainment(self, objective: float) -> float:
        return fmean(seconds <= objective for seconds in self.ttft())


def arrivals(rate: float, cv: float, seconds: float, make: Callable[[], Request], seed: int = 0) -> Arrivals:
    """Gamma-distributed gaps, S-LoRA's synthetic trace."""
    rng = random.Random(seed)
    shape = 1 / cv**2
    result: Arrivals = []
    now = 0.0
    while (now := now + rng.gammavariate(shape, 1 / (rate * shape))) < seconds:
        result.append((now, make()))
    return result


def order_of(policy: FirstCome, world: World, running: Iterable[object] = ()) -> list[str]:
    return [s.request.id for s in policy.candidates(world.clock.now, list(running))]


# -- order -----------------------------------------------------------------------------------


def test_first_come_first_served_with_priorities_as_head_starts() -> None:
    policy = FirstCome()
    world = World(policy=policy)
    world.add(request(id="patient", priority=1))
    world.add(request(id="plain"))
    world.add(request(id="urgent", priority=-1))
    assert order_of(policy, world) == ["urgent", "plain", "patient"]
    world.clock.now += PRIORITY_SECONDS + 1
    world.add(request(id="plain later"))
    assert order_of(policy, world) == ["urgent", "plain", "patient", "plain later"]


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(-(10**9), 10**9) | st.integers(-2, 2)), max_size=30))
def test_nobody_is_passed_by_those_who_come_too_late(steps: list[tuple[float, int]]) -> None:
    policy = FirstCome()
    world = World(policy=policy)
    for gap, priority in steps:
        world.clock.now += gap
        world.add(request(2, 1, priority=priority))
    seen: list[Sequence] = []
    for sequence in policy.candidates(world.clock.now, []):
        for before in seen:
            levels = max(0, min(10, max(-10, sequence.request.priority)) - max(-10, before.request.priority))
            assert before.queued <= sequence.queued + levels * PRIORITY_SECONDS + 1e-6
        seen.append(sequence)
    assert len(seen) == len(steps)


def test_clustering_prefers_running_adapters_then_fills_in_order() -> None:
    policy = Clustered(distinct=2, patience=10.0)
    world = World(policy=policy, adapters={"a": 1, "b": 1, "c": 1})
    for name in ("c", "a", (), "b", "a"):
        world.add(request(id=f"{name}{world.clock.now}", adapter=name))
        world.clock.now += 1
    key = {name: request(adapter=name).adapter_key for name in "abc"}
    assert order_of(policy, world, [key["a"]]) == ["c100.0", "a101.0", "()102.0", "b103.0", "a104.0"]
    assert order_of(policy, world, [key["a"], key["b"]]) == [
        "a101.0",
        "()102.0",
        "b103.0",
        "a104.0",
        "c100.0",
    ]
    world.clock.now = 110.5
    assert order_of(policy, world, [key["a"], key["b"]])[0] == "c100.0"


def test_fair_share_serves_the_client_served_least() -> None:
    policy = FairShare()
    world = World(policy=policy, max_sequences=1, num_pages=400)
    for i in range(3):
        world.add(request(10, 10, tenant="busy", id=f"busy{i}"))
    world.step()
    for i in range(3):
        world.add(request(10, 10, tenant="calm", id=f"calm{i}"))
    world.run()
    assert [s.request.id for s in world.started] == ["busy0", "calm0", "busy1", "calm1", "busy2", "calm2"]


def test_idleness_saves_up_nothing() -> None:
    policy = FairShare()
    world = World(policy=policy, max_sequences=1, num_pages=400)
    world.add(request(4, 1, tenant="sleeper"))
    world.run()
    for i in range(4):
        world.add(request(10, 10, tenant="worker", id=f"worker{i}"))
    for _ in range(25):
        world.step()
    for i in range(4):
        world.add(request(10, 10, tenant="sleeper", id=f"sleeper{i}"))
    world.run()
    names = [s.request.id for s in world.started[1:]]
    after = names[names.index("sleeper0") :]
    assert after[:4] != ["sleeper0", "sleeper1", "sleeper2", "sleeper3"]


def test_weights_and_prices() -> None:
    policy = FairShare(weights={"gold": 2.0})
    world = World(policy=policy, adapters={"a": 6})
    world.add(request(8, 3, tenant="gold"))
    world.add(request(8, 3, "a", tenant="plain"))
    world.run()
    # 8 prompt tokens, 3 output tokens at 2; the adapter's 6 pages hold 12 tokens of 2 layers.
    assert policy.counters == {"gold": (8 + 2 * 3) / 2, "plain": 8 + 2 * 3 + 6 / 2 * 4}


def test_fair_share_forgets_clients_that_a_return_would_lift_anyway() -> None:
    policy = FairShare()
    world = World(policy=policy, max_waiting=10)
    for i in range(3000):
        world.add(request(2, 1, tenant=f"t{i}"))
        world.step()
    assert len(policy.counters) < 1500


@pytest.mark.parametrize("brought", [1, 2, 5])
def test_a_newcomer_takes_the_place_of_one_who_filled_the_batch(brought: int) -> None:
    world = World(policy=FairShare(), max_sequences=4, num_pages=400)
    for _ in range(8):
        world.add(request(8, 60, tenant="busy"))
    world.step()
    assert len(world.scheduler.running) == 4
    newcomers = [world.add(request(8, 4, tenant="calm"))[0] for _ in range(brought)]
    world.step()
    assert [s.first_token is not None for s in newcomers] == [i < 1 for i in range(brought)]
    (gone,) = (s for s in world.scheduler.waiting if s.preemptions)
    assert gone.order > max(s.order for s in world.scheduler.running if s.request.tenant == "busy")
    world.run()
    assert brought > 1 or world.scheduler.metrics.preemptions == 1
    assert all(len(sequences) == 1 for sequences in world.done.values())


def test_a_burst_of_one_who_is_modest_need_not_wait_for_its_own() -> None:
    """Three clients, two slots for each; one of them has three requests at once and places are free."""
    world = World(policy=FairShare(), max_sequences=6, num_pages=400)
    for tenant, count in (("flood", 40), ("quiet", 1), ("calm", 3)):
        for _ in range(count):
            world.add(request(8, 30, tenant=tenant))
    for _ in range(3):
        world.step()
    tenants = [s.request.tenant for s in world.scheduler.running]
    assert tenants.count("calm") == 3
    assert tenants.count("flood") <= 2


def test_one_who_is_alone_has_the_whole_batch() -> None:
    world = World(policy=FairShare(), max_sequences=8, num_pages=400)
    for _ in range(8):
        world.add(request(2, 10, tenant="busy"))
    world.step()
    assert len(world.scheduler.running) == 8


def test_weights_are_shares_of_the_batch() -> None:
    world = World(policy=FairShare(weights={"gold": 3.0}), max_sequences=8, num_pages=400)
    for tenant in ("gold", "plain"):
        for _ in range(20):
            world.add(request(8, 10, tenant=tenant))
    policy = world.scheduler.policy
    assert isinstance(policy, FairShare)
    assert (policy.share("gold"), policy.share("plain")) == (6, 2)


def test_long_prompts_do_not_delay_those_who_had_less() -> None:
    """Eight prompts of 200 tokens at 32 a step would take fifty steps."""
    world = World(policy=FairShare(), max_sequences=8, num_pages=2000, max_step_tokens=32)
    for _ in range(8):
        world.add(request(200, 4, tenant="busy"))
    world.step()
    world.step()
    (newcomer,) = world.add(request(8, 4, tenant="calm"))
    world.step()
    assert newcomer.first_token is not None
    world.run()
    assert all(len(sequences) == 1 for sequences in world.done.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_only_what_exceeds_a_share_is_displaced(seed: int) -> None:
    """Plenty of memory: whoever was preempted had more than its share, and keeps at least it."""
    rng = random.Random(seed)
    policy = FairShare()
    world = World(policy=policy, max_sequences=6, num_pages=2000, max_waiting=1000)
    for _ in range(60):
        for tenant, chance in (("a", 0.1), ("b", 0.1), ("flood", 0.9)):
            if rng.random() < chance:
                world.add(request(rng.randint(1, 40), rng.randint(1, 20), tenant=tenant))
        before = {s: s.preemptions for s in world.scheduler.running}
        world.step()
        displaced = [s for s, count in before.items() if s.preemptions > count]
        for sequence in displaced:
            assert sequence is not next(iter(before))
            alive = [s for s in before if s.request.tenant == sequence.request.tenant and s not in displaced]
            assert len(alive) >= 2  # the least share of six slots among three
    world.run()
    assert not policy._running
    assert not policy._present
    assert all(len(sequences) == 1 for sequences in world.done.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_fair_share_counters_stay_together_while_clients_wait(seed: int) -> None:
    """The VTC bound: counters of clients with waiting requests drift by at most what the batch holds."""
    rng = random.Random(seed)  # hundreds of draws: one seed is much quicker than as many strategies
    policy = FairShare()
    world = World(policy=policy, max_sequences=3, num_pages=400, max_waiting=1000)
    tenants = ["a", "b", "c"]
    most = 3 * (12 + 2 * 10) + 12  # the batch's prompts and outputs, and one more prompt
    for _ in range(40):
        for tenant in tenants:
            for _ in range(rng.randint(0, 2)):
                world.add(request(rng.randint(1, 12), rng.randint(1, 10), tenant=tenant))
        world.step()
        waiting = {s.request.tenant for s in world.scheduler.waiting}
        counters = [policy.counters[tenant] for tenant in waiting]
        assert not counters or max(counters) - min(counters) <= most
    world.run()


def test_specs_and_their_mistakes() -> None:
    assert make_policy("fcfs").name == "fcfs"
    clustered = make_policy("cluster:3")
    assert isinstance(clustered, Clustered)
    assert clustered.distinct == 3
    abort = make_policy("abort:2.5")
    assert isinstance(abort, EarlyAbort)
    assert abort.objective == 2.5
    assert isinstance(make_policy("vtc:adapter"), FairShare)
    for bad in ("", "lifo", "cluster:x", "cluster:0", "abort:-1", "vtc:colour", "fcfs:1"):
        with pytest.raises(InvalidConfig):
            make_policy(bad)
    with pytest.raises(InvalidConfig):
        FairShare(weights={"a": 0.0})


# -- what they are for -----------------------------------------------------------------------


def demand() -> Request:
    """About 0.17 s of the batch's time: 6 requests a second are what the machine can take."""
    return request(64, 20)


def capacity() -> float:
    """Requests per second that the simulated machine serves when it never idles."""
    run = Run(FirstCome(), [(0.0, demand()) for _ in range(300)])
    return 300 / (run.world.clock.now - 100.0)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_early_abort_keeps_the_objective_where_first_come_loses_it(cv: float) -> None:
    trace = lambda: arrivals(1.5 * capacity(), cv, 40.0, demand)  # noqa: E731
    fcfs = Run(FirstCome(), trace(), until=120.0)
    abort = Run(EarlyAbort(2.0), trace(), until=120.0)
    assert fcfs.attainment(2.0) < 0.3
    assert abort.attainment(2.0) > 0.55
    assert all(isinstance(error, Unavailable) for error in abort.world.failed.values())
    assert all(error.retry_after for error in abort.world.failed.values())  # type: ignore[attr-defined]
    served = [s for s in abort.sequences.values() if s.first_token is not None]
    assert all(len(abort.world.done[s.request.id]) == 1 for s in served)


def test_early_abort_changes_nothing_below_capacity() -> None:
    trace = lambda: arrivals(0.5 * capacity(), 1.0, 20.0, demand)  # noqa: E731
    assert Run(EarlyAbort(2.0), trace()).attainment(2.0) == 1.0


def test_nobody_waits_longer_than_the_objective() -> None:
    run = Run(EarlyAbort(1.0), arrivals(3 * capacity(), 1.0, 10.0, demand))
    late = [s for s in run.sequences.values() if s.first_scheduled and s.first_scheduled - s.queued > 1.0]
    assert not late


def test_fair_share_protects_the_others_from_one_that_floods() -> None:
    rate = capacity()

    def trace(flood: bool) -> Arrivals:
        result = [
            arrival
            for i in range(4)
            for arrival in arrivals(0.15 * rate, 1.0, 20.0, lambda i=i: request(64, 20, tenant=f"t{i}"), i)
        ]
        if flood:
            result += arrivals(1.5 * rate, 1.0, 20.0, lambda: request(64, 20, tenant="flood"), 9)
        return result

    calm = lambda item: item.tenant != "flood"  # noqa: E731
    alone = fmean(Run(FirstCome(), trace(False)).ttft())
    fcfs = fmean(Run(FirstCome(), trace(True)).ttft(calm))
    fair = fmean(Run(FairShare(), trace(True)).ttft(calm))
    assert fcfs > 20 * alone
    assert fair < 2 * alone


def test_fair_share_gives_backlogged_clients_equal_service() -> None:
    """Three clients with different request shapes, all backlogged: equal cost served."""
    shapes = {"long prompts": (200, 5), "long answers": (10, 60), "small": (16, 16)}
    trace = [(0.0, request(*shape, tenant=name)) for name, shape in shapes.items() for _ in range(1500)]
    run = Run(FairShare(), trace, until=20.0)
    cost: Counter[str] = Counter()
    for s in run.sequences.values():
        if s.first_scheduled is not None:
            cost[s.request.tenant] += s.num_prompt + 2 * s.num_output
    jain = sum(cost.values()) ** 2 / (len(cost) * sum(x * x for x in cost.values()))
    assert len(cost) == 3
    assert jain > 0.99


def test_clustering_loads_fewer_adapters_in_bursts() -> None:
    """A pool that holds a sixth of the adapters in use, popularity by Zipf, bursts (cv 4)."""
    rng = random.Random(3)
    names = [f"a{i}" for i in range(24)]
    weights = [1 / (i + 1) for i in range(24)]
    trace = arrivals(80.0, 4.0, 10.0, lambda: request(16, 12, rng.choices(names, weights)[0]), seed=5)
    runs = {}
    for policy in (FirstCome(), Clustered(4, patience=5.0)):
        run = runs[policy.name] = Run(
            policy, trace, adapters=dict.fromkeys(names, 40), num_pages=400, load_seconds=0.02
        )
        assert not run.world.failed
    fcfs, cluster = runs["fcfs"], runs["cluster"]
    assert len(cluster.world.store.loads) < 0.8 * len(fcfs.world.store.loads)
    assert fmean(cluster.ttft()) < 0.8 * fmean(fcfs.ttft())
    assert cluster.world.clock.now < fcfs.world.clock.now


# -- bounds on waiting -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["fcfs", "cluster:1", "abort:2", "vtc", "vtc:adapter"])
def test_no_policy_starves_anyone(spec: str) -> None:
    """A flood that never ends and is always preferred; one that is not still gets an answer."""
    world = World(
        policy=make_policy(spec), num_pages=60, max_sequences=2, max_waiting=10_000, verify=False,
        adapters={"hot": 4, "cold": 30},
    )  # fmt: skip
    for _ in range(4):
        world.add(request(8, 4, "hot", tenant="flood", priority=-1))
    world.step()
    (victim,) = world.add(request(40, 4, "cold", tenant="victim", priority=1))
    for _ in range(20_000):
        if victim.first_token is not None or victim.request.id in world.failed:
            break
        if len(world.scheduler.waiting) < 20:
            world.add(request(8, 4, "hot", tenant="flood", priority=-1))
        world.step(0.02)
    waited = world.clock.now - victim.queued
    if spec == "abort:2":
        assert waited < 2.5
    else:
        assert victim.first_token is not None
        assert waited < {"cluster:1": 80.0}.get(spec, 2 * PRIORITY_SECONDS + 10)
