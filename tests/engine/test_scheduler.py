"""The scheduler's rules one by one, with a fake clock, store and model."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_world import World, expected_output, request

from chiliad.core import Request, SequenceState
from chiliad.engine.scheduler import MAX_OVERTAKEN
from chiliad.errors import (
    AdapterTooLarge,
    ContextLengthExceeded,
    InvalidAdapter,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
)
from chiliad.memory.pool import Owner


def outputs_are_right(world: World) -> None:
    for sequences in world.done.values():
        for sequence in sequences:
            assert sequence.tokens == expected_output(sequence.request, sequence.index, sequence)


def test_an_empty_scheduler_plans_nothing() -> None:
    world = World()
    assert world.step() == []


def test_prompts_are_computed_in_chunks_behind_decodes() -> None:
    world = World(num_pages=400, max_step_tokens=16)
    (short,) = world.add(request(4, 8))
    assert world.step() == [(short, 4)]
    (long,) = world.add(request(40, 3))
    assert world.step() == [(short, 1), (long, 15)]
    assert world.step() == [(short, 1), (long, 15)]
    assert world.step() == [(short, 1), (long, 10)]
    assert long.num_output == 1
    assert world.step() == [(short, 1), (long, 1)]
    world.run()
    outputs_are_right(world)
    world.assert_empty()


def test_only_the_last_chunk_samples() -> None:
    world = World(max_step_tokens=8)
    world.add(request(12, 2))
    plan = world.scheduler.plan()
    assert [(w.start, w.count, w.sample) for w in plan.work] == [(0, 8, False)]
    world.scheduler.advance(plan, [])
    plan = world.scheduler.plan()
    assert [(w.start, w.count, w.sample) for w in plan.work] == [(8, 4, True)]
    world.scheduler.advance(plan, [7])
    assert world.scheduler.running[0].tokens[-1] == 7


def test_equal_adapters_are_adjacent_whatever_the_order_of_arrival() -> None:
    world = World(num_pages=400, adapters={"a": 2, "b": 2}, max_sequences=16)
    for name in ("a", "b", (), "a", (), "b", "a"):
        world.add(request(3, 5, name))
    for _ in range(3):
        world.step()  # checks adjacency itself
    assert len(world.scheduler.running) == 7


def test_times_are_on_the_schedulers_clock() -> None:
    world = World()
    (sequence,) = world.add(request(4, 2))
    world.clock.now = 107.0
    world.step(seconds=0.5)
    assert (sequence.queued, sequence.first_scheduled, sequence.first_token) == (100.0, 107.0, 107.5)


def test_adapters_are_fetched_before_their_requests_run_and_others_pass() -> None:
    world = World(adapters={"slow": 4}, instant_loads=False)
    (waits,) = world.add(request(4, 2, "slow"))
    (base,) = world.add(request(4, 2))
    assert world.step() == [(base, 4)]
    assert world.store.loads == ["slow"]
    assert world.step() == [(base, 1)]
    world.store.finish()
    assert world.step() == [(waits, 4)]
    assert world.store.users["slow"] == 1
    world.run()
    assert world.store.users["slow"] == 0
    assert world.scheduler.metrics.adapter_misses == 1
    world.add(request(4, 2, "slow"))
    world.run()
    assert world.scheduler.metrics.adapter_hits == 1
    assert world.store.loads == ["slow"]


def test_one_load_however_many_wait() -> None:
    world = World(num_pages=200, adapters={"a": 4}, instant_loads=False)
    for _ in range(10):
        world.add(request(2, 1, "a"))
    world.step()
    world.step()
    assert world.store.loads == ["a"]


def test_prefetch_follows_the_queue_and_stops_at_a_quarter_of_the_pool() -> None:
    world = World(num_pages=100, adapters={f"a{i}": 10 for i in range(6)}, instant_loads=False)
    for i in range(6):
        world.add(request(2, 1, f"a{i}"))
    world.step()
    assert world.store.loads == ["a0", "a1", "a2"]
    world.run_loads()
    assert world.store.loads == [f"a{i}" for i in range(6)]


def test_an_adapter_fetched_for_a_waiting_request_is_not_evicted_for_the_next() -> None:
    world = World(num_pages=40, max_sequences=1, adapters={"a": 10, "b": 25, "c": 25}, instant_loads=False)
    world.add(request(4, 6))
    world.step()
    world.add(request(4, 2, "a"))
    world.step()
    world.store.finish()
    world.add(request(4, 2, "b"))  # fits beside neither a's pages nor the running one's
    for _ in range(2):
        world.step()
        world.store.finish()
    assert world.store.states["a"] == "resident"
    assert world.store.users["a"] == 1
    world.run_loads()
    assert world.failed == {}
    assert world.store.loads == ["a", "b"]


def test_a_broken_adapter_fails_its_requests_only() -> None:
    world = World(adapters={"bad": 4, "good": 4}, broken=frozenset({"bad"}))
    bad, good, base = request(4, 3, "bad", n=2), request(4, 3, "good"), request(4, 3)
    for item in (bad, good, base):
        world.add(item)
    world.run()
    assert list(world.failed) == [bad.id]
    assert isinstance(world.failed[bad.id], InvalidAdapter)
    assert [len(world.done[item.id]) for item in (bad, good, base)] == [0, 1, 1]
    world.assert_empty()


def test_an_adapter_that_can_never_fit_fails_with_the_stores_own_error() -> None:
    world = World(num_pages=20, adapters={"huge": 1000})
    item = request(4, 2, "huge")
    world.add(item)
    world.run()
    assert isinstance(world.failed[item.id], AdapterTooLarge)


def test_an_adapter_and_prompt_that_never_fit_together_fail_when_nothing_else_runs() -> None:
    world = World(num_pages=20, adapters={"big": 16, "small": 4})
    never, other = request(30, 2, "big"), request(4, 2, "small")
    world.add(never)
    world.add(other)
    world.run()
    assert isinstance(world.failed[never.id], OutOfMemory)
    assert len(world.done[other.id]) == 1
    world.assert_empty()


def test_composed_adapters_are_all_resident_before_the_request_runs() -> None:
    world = World(adapters={"a": 4, "b": 4}, instant_loads=False)
    (sequence,) = world.add(request(4, 2, ("a", "b")))
    world.step()
    world.store.finish("b")
    assert world.step() == []
    world.store.finish("a")
    assert world.step() == [(sequence, 4)]
    assert world.store.users == {"a": 1, "b": 1}
    world.run()
    world.assert_empty()


def test_growth_preempts_the_latest_and_it_gives_the_same_tokens() -> None:
    world = World(num_pages=24, max_sequences=4)
    items = [request(8, 16) for _ in range(4)]
    for item in items:
        world.add(item)
    world.scheduler._expected = 0.0  # hopeful: everything is admitted at once
    world.step()
    assert len(world.scheduler.running) == 4
    world.run()
    assert world.scheduler.metrics.preemptions > 0
    assert all(len(world.done[item.id]) == 1 for item in items)
    assert world.done[items[0].id][0].preemptions == 0
    outputs_are_right(world)
    world.assert_empty()


def crowded(**options: Any) -> tuple[World, list[Request]]:
    """Four sequences that all run and grow until two of them have to leave."""
    world = World(num_pages=24, max_sequences=4, **options)
    items = [request(8, 16) for _ in range(4)]
    for item in items:
        world.add(item)
    world.scheduler._expected = 0.0
    return world, items


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_swapped_sequences_go_on_where_they_were(prefix_cache: bool) -> None:
    world, items = crowded(swap_blocks=30, prefix_cache=prefix_cache)
    computed = 0
    while world.scheduler.running or len(world.scheduler.waiting):
        computed += sum(count for _, count in world.step())
    metrics = world.scheduler.metrics
    assert metrics.swaps == metrics.preemptions > 0
    assert computed == 4 * (8 + 16 - 1), "something was computed twice"
    assert all(len(world.done[item.id]) == 1 for item in items)
    outputs_are_right(world)
    world.assert_empty()


def test_what_swap_has_no_room_for_is_computed_again() -> None:
    world, _ = crowded(swap_blocks=1)
    world.run()
    assert world.scheduler.metrics.preemptions > 0
    assert world.scheduler.metrics.swaps == 0
    outputs_are_right(world)
    world.assert_empty()


def test_the_cheaper_of_swap_and_recompute_is_taken() -> None:
    for block_seconds, wanted in ((1.0, 0), (1e-6, 1)):
        world, _ = crowded(swap_blocks=30)
        assert world.swap is not None
        world.swap.block_seconds = block_seconds  # a token takes some milliseconds to compute
        while not world.scheduler.metrics.preemptions:
            world.step()
        assert world.scheduler.metrics.swaps == wanted
        world.run()
        outputs_are_right(world)
        world.assert_empty()


def test_a_cancelled_sequence_leaves_swap() -> None:
    world, items = crowded(swap_blocks=30)
    while not world.scheduler.metrics.swaps:
        world.step()
    assert world.swap is not None
    assert world.swap.used_blocks > 0
    for item in items:
        world.scheduler.cancel(item.id)
    assert world.swap.used_blocks == 0
    world.assert_empty()


def test_preempted_sequences_come_before_new_ones() -> None:
    world = World(num_pages=20, max_sequences=4)
    world.scheduler._expected = 0.0
    first, second = request(16, 20), request(16, 20)
    world.add(first)
    world.add(second)
    while not world.scheduler.metrics.preemptions:
        world.step()
    (late,) = world.add(request(4, 2))
    world.run()
    assert world.done[second.id][0].first_scheduled is not None
    assert world.done[second.id][0].preemptions >= 1
    assert late.first_scheduled is not None
    outputs_are_right(world)


def test_lower_priority_numbers_run_first_and_are_preempted_last() -> None:
    world = World(num_pages=20, max_sequences=1)
    low, high = request(4, 2, priority=1), request(4, 2, priority=-1)
    world.add(request(4, 4))
    world.step()
    world.add(low)
    world.add(high)
    world.run()
    assert [s.request.id for s in world.started][1:] == [high.id, low.id]


def test_cancelling_frees_everything_at_once() -> None:
    world = World(adapters={"a": 6}, instant_loads=True)
    running, waiting = request(9, 8, "a", n=2), request(8, 3)
    world.add(running)
    world.step()
    world.step()
    world.add(waiting)
    gone = world.scheduler.cancel(running.id)
    assert [s.index for s in gone] == [0, 1]
    assert all(s.state is SequenceState.FINISHED for s in gone)
    assert world.pool.usage()["kv"] == 0
    assert world.store.users["a"] == 0
    assert world.scheduler.cancel(waiting.id)
    assert world.scheduler.cancel(waiting.id) == []
    assert world.scheduler.cancel("nobody") == []
    assert world.step() == []
    world.assert_empty()


def test_cancelling_between_plan_and_advance_is_harmless() -> None:
    world = World()
    one, two = request(4, 3), request(4, 3)
    world.add(one)
    (kept,) = world.add(two)
    plan = world.scheduler.plan()
    world.scheduler.cancel(one.id)
    world.scheduler.advance(plan, [1, 2])
    assert kept.tokens[-1] == 2
    world.scheduler.check()


def test_end_says_which_was_the_last_of_a_request() -> None:
    world = World()
    first, second = world.add(request(4, 3, n=2))
    world.step()
    assert world.scheduler.end(first) is False
    assert world.scheduler.end(first) is False
    assert world.scheduler.end(second) is True
    world.assert_empty()


def test_requests_that_can_never_fit_are_refused() -> None:
    world = World(num_pages=20, max_model_len=100)
    with pytest.raises(ContextLengthExceeded, match="exceed the model's 100 tokens"):
        world.scheduler.add(request(90, 20))
    assert world.scheduler.max_sequence_tokens == 40
    with pytest.raises(ContextLengthExceeded, match="never fit the memory pool, which holds 40 tokens"):
        world.scheduler.add(request(30, 11))
    world.add(request(30, 10))
    world.run()
    world.assert_empty()


def test_an_id_in_use_is_refused() -> None:
    world = World()
    world.add(request(4, 2, id="same"))
    with pytest.raises(InvalidRequest, match="'same' is in use"):
        world.scheduler.add(request(4, 2, id="same"))
    world.run()
    world.add(request(4, 2, id="same"))
    world.run()


def test_a_full_queue_answers_overloaded() -> None:
    world = World(max_waiting=3)
    world.add(request(4, 2, n=2))
    world.clock.now += 5
    with pytest.raises(Overloaded) as caught:
        world.scheduler.add(request(4, 2, n=2))
    assert caught.value.retry_after == 5.0
    world.add(request(4, 2))
    world.run()


def test_a_large_request_is_overtaken_a_bounded_number_of_times() -> None:
    """Small requests keep coming; one that needs most of the pool still gets its turn."""
    world = World(num_pages=40, max_sequences=8, max_waiting=1000)
    for _ in range(6):
        world.add(request(4, 8))
    world.step()
    (large,) = world.add(request(70, 4))
    passed = 0
    for _ in range(300):
        if large.first_scheduled is not None:
            break
        world.add(request(4, 8))
        world.step()
        passed = sum(s.order > large.order for s in world.started)
    assert large.first_scheduled is not None
    assert 0 < passed <= MAX_OVERTAKEN
    world.run()
    outputs_are_right(world)


def test_a_large_adapter_is_overtaken_a_bounded_number_of_times() -> None:
    world = World(num_pages=40, adapters={"large": 30}, max_waiting=1000)
    for _ in range(6):
        world.add(request(4, 8))
    world.step()
    (large,) = world.add(request(4, 4, "large"))
    for _ in range(300):
        if large.first_scheduled is not None:
            break
        world.add(request(4, 8))
        world.step()
    assert large.first_scheduled is not None
    assert sum(s.order > large.order for s in world.started) <= 2 * MAX_OVERTAKEN
    world.run()


def test_idle_adapters_make_room_for_kv_and_back() -> None:
    """The unified pool: either tenant may fill it when the other is idle."""
    world = World(num_pages=40, adapters={f"a{i}": 10 for i in range(4)})
    for i in range(4):
        world.add(request(2, 1, f"a{i}"))
    world.run()
    resident = len(world.store.held)
    assert resident >= 3
    (sequence,) = world.add(request(70, 8))
    world.run()
    assert sequence.preemptions == 0
    assert len(world.store.held) <= 1
    assert world.pool.counters.evictions >= resident - 1
    world.assert_empty()


def test_choices_share_their_prompt_through_the_prefix_cache() -> None:
    world = World(num_pages=100, prefix_cache=True)
    item = request(18, 3, n=4)
    first, *others = world.add(item)
    assert world.step() == [(first, 18)]
    assert world.step() == [(first, 1), *((other, 2) for other in others)]
    assert [s.num_cached for s in (first, *others)] == [0, 16, 16, 16]
    assert world.pool.usage()["kv"] == 2 * (5 + 3)
    world.run()
    outputs_are_right(world)
    world.assert_empty()


def test_the_static_split_is_kept() -> None:
    world = World(num_pages=40, adapters={f"a{i}": 5 for i in range(6)}, adapter_share=0.25)
    for i in range(12):
        world.add(request(10, 6, f"a{i % 6}"))
    while world.scheduler.running or len(world.scheduler.waiting):
        world.step()
        usage = world.pool.usage()
        assert usage["adapter"] <= 10
        assert usage["kv"] <= 30
        assert world.steps < 2000
    assert not world.failed
    outputs_are_right(world)
    assert world.pool.limit(Owner.KV) == 30
