"""The engine as a whole, on a tiny random model in float32.

The claim under test is row independence: what a request gets does not depend on who shares its
batch, how its prompt was cut, whether it was preempted, or what happens to other adapters.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import ADAPTERS, MakeLLM

from chiliad import LLM, SamplingParams
from chiliad.config import KernelConfig, SchedulerConfig
from chiliad.core import (
    AdapterUse,
    AdapterVersion,
    BaseInfo,
    Chunk,
    Event,
    Failed,
    Finished,
    Request,
    StepOutput,
    StepPlan,
)
from chiliad.engine.runner import workspace
from chiliad.engine.stream import AsyncEngine
from chiliad.errors import (
    AdapterError,
    ContextLengthExceeded,
    InvalidAdapter,
    InvalidConfig,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from chiliad.kernels.base import AdapterRows
from chiliad.testing import write_random_adapter

PATIENCE = 200.0  # seconds, for a machine that does other things too
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def solo(llm: LLM, prompt: list[int], adapter: str | None, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params, adapter)[0].choices[0].token_ids


def test_mixed_batch_equals_solo(make_llm: MakeLLM) -> None:
    names = [None, *ADAPTERS, None, "r8-qv", "r64-all"]
    texts = prompts(len(names))
    mixed = make_llm(scheduler=SchedulerConfig(max_step_tokens=48)).generate(texts, GREEDY, names)
    alone = make_llm()
    for prompt, name, output in zip(texts, names, mixed, strict=True):
        assert output.choices[0].token_ids == solo(alone, prompt, name), name


def test_mixed_batch_equals_solo_with_int8_rows(make_llm: MakeLLM) -> None:
    names = [None, *ADAPTERS, "r8-qv"]
    texts = prompts(len(names))
    llm = make_llm(adapter_dtype="int8")
    mixed = llm.generate(texts, GREEDY, names)
    for prompt, name, output in zip(texts, names, mixed, strict=True):
        assert output.choices[0].token_ids == solo(llm, prompt, name), name
    usual = make_llm()
    nbytes = [
        each.engine.store.pages_needed(each.registry.resolve("r64-all")) * each.engine.layout.page_bytes
        for each in (llm, usual)
    ]
    assert nbytes[0] < 0.3 * nbytes[1]  # of float32
    assert llm.engine.store.status(llm.registry.resolve("r64-all"))["bytes"] == nbytes[0]


def test_an_adapter_dtype_that_is_none_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(InvalidConfig, match="adapter_dtype is one of float32, bfloat16, int8, not 'int4'"):
        make_llm(adapter_dtype="int4")


def test_adapters_change_the_answer(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = prompts(1)[0]
    answers = {tuple(solo(llm, prompt, name)) for name in [None, *ADAPTERS]}
    assert len(answers) > len(ADAPTERS) // 2


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunks_do_not_matter(make_llm: MakeLLM, budget: int) -> None:
    texts = prompts(6, seed=1)
    names = [None, "r16-all", "r16-all", "r1-qv", None, "rslora"]
    whole = make_llm().generate(texts, GREEDY, names)
    cut = make_llm(scheduler=SchedulerConfig(max_step_tokens=budget)).generate(texts, GREEDY, names)
    assert [o.choices[0].token_ids for o in cut] == [o.choices[0].token_ids for o in whole]


class Driver:
    """Random arrivals, cancellations and adapter changes around an engine, one step at a time."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.events: list[Event] = []
        llm.engine._sink = self.events.extend
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, object] = {}

    def submit(self, name: str, prompt: list[int], adapter: str | None, params: SamplingParams) -> None:
        uses = (AdapterUse(self.llm.registry.resolve(adapter)),) if adapter else ()
        self.tokens[name] = []
        self.llm.engine.submit(Request(name, tuple(prompt), params, uses))

    def step(self) -> None:
        if not self.llm.engine.step():
            self.llm.engine.wait(0.01)
        for event in self.events:
            assert event.request_id not in self.ended, "an event after the terminal one"
            if isinstance(event, Chunk):
                self.tokens[event.request_id].extend(event.token_ids)
            elif isinstance(event, Finished | Failed):
                self.ended[event.request_id] = event
        self.events.clear()

    def until(self, done: Callable[[], bool]) -> None:
        """Step until something has happened; adapters load in their own time."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, "it does not happen"
            self.step()


@pytest.mark.parametrize("swap", ["0", "20MB"])
def test_neighbours_do_not_matter(make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo, swap: str) -> None:
    """64 requests with random arrival, chunked prefill, preemption, and adapters that come and go."""
    folder = tmp_path / "adapters"
    for seed, (name, how) in enumerate(ADAPTERS.items()):
        write_random_adapter(folder / name, tiny_base, seed=seed, **how)
    rng = random.Random(7)
    names = [rng.choice([None, *ADAPTERS]) for _ in range(64)]
    texts = prompts(64, seed=8, longest=90)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    probe = make_llm()
    expected = [solo(probe, p, n, params) for p, n in zip(texts, names, strict=True)]
    layout, store = probe.engine.layout, probe.engine.store
    largest = max(store.pages_needed(probe.registry.resolve(name)) for name in ADAPTERS)
    blocks_for_three = 3 * layout.num_layers * -(-150 // layout.block_tokens)
    pages = largest + blocks_for_three
    scheduler = SchedulerConfig(max_step_tokens=40, max_sequences=24)
    aside = probe.model.nbytes + workspace(probe.model.arch, scheduler)
    tight = aside + pages * layout.page_bytes
    llm = make_llm(adapters=folder, memory=tight, swap=swap, scheduler=scheduler)
    driver = Driver(llm)
    waiting = list(range(64))
    replaced, changed = 0, False
    deadline = time.monotonic() + PATIENCE
    for turn in itertools.count():
        assert time.monotonic() < deadline
        llm.engine.scheduler._expected = 0.0  # a forecast too hopeful, so that pages run out
        if waiting and rng.random() < 0.3:
            i = waiting.pop(0)
            driver.submit(f"r{i}", texts[i], names[i], params)
        if turn % 40 == 20:  # strangers: a new version of a name that nobody else uses, a cancelled request
            extra = folder / f"extra-{turn}"
            write_random_adapter(extra, tiny_base, rank=1 + turn % 17, targets="all-linear", seed=turn)
            llm.engine.add_adapter(extra, "changing", replace=True)
            driver.submit(f"x{turn}", [5, 6, 7], "changing", GREEDY)
            if turn % 80 == 20:
                llm.engine.cancel(f"x{turn}")
            else:
                llm.engine.remove_adapter("changing")
            replaced += 1
        driver.step()
        if not waiting and not changed:  # names that requests are using at this moment
            changed = True
            busy = {names[i] for i in range(64) if f"r{i}" not in driver.ended and names[i]}
            assert len(busy) >= 4
            for i, name in enumerate(sorted(busy)):
                if i % 2:
                    llm.engine.remove_adapter(name)
                else:
                    llm.engine.add_adapter(folder / "extra-20", name, replace=True)
        if not waiting and llm.engine.idle:
            break
    assert llm.engine.idle
    assert llm.engine.metrics.preemptions > 0, "the pool was not tight enough to test preemption"
    assert bool(llm.engine.metrics.swaps) == (swap != "0")
    assert replaced > 2
    assert driver.ended.keys() == driver.tokens.keys(), "a request without a terminal event"
    for i in range(64):
        assert isinstance(driver.ended[f"r{i}"], Finished)
        assert driver.tokens[f"r{i}"] == expected[i], (i, names[i])
    usage = llm.engine.pool.usage()
    assert llm.engine.pool.free_pages + llm.engine.pool.evictable_pages == llm.engine.pool.num_pages, usage


def test_running_requests_keep_their_version(make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_random_adapter(old, tiny_base, rank=8, seed=1, std=0.6)
    write_random_adapter(new, tiny_base, rank=5, seed=2, std=0.6)
    llm = make_llm(adapters=None)
    prompt = prompts(1, seed=4)[0]
    llm.engine.add_adapter(old, "a")
    before = solo(llm, prompt, "a")
    driver = Driver(llm)
    driver.submit("running", prompt, "a", GREEDY)
    driver.until(lambda: bool(driver.tokens["running"]))
    llm.engine.add_adapter(new, "a", replace=True)
    driver.submit("late", prompt, "a", GREEDY)
    driver.until(lambda: llm.engine.idle)
    assert driver.tokens["running"] == before
    assert driver.tokens["late"] != before
    freed = llm.engine.remove_adapter("a")
    llm.engine.step()
    assert freed.result(timeout=PATIENCE) > 0
    with pytest.raises(ModelNotFound):
        llm.generate(prompt, GREEDY, "a")


def test_files_replaced_on_disk_are_not_served_under_the_old_name(
    make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo
) -> None:
    folder = tmp_path / "a"
    write_random_adapter(folder, tiny_base, rank=8, seed=1)
    llm = make_llm(adapters=None)
    llm.engine.add_adapter(folder, "a")
    shutil.rmtree(folder)
    write_random_adapter(folder, tiny_base, rank=8, seed=2)
    with pytest.raises(AdapterError, match="changed after they were registered"):
        _ = llm.generate([5, 6], GREEDY, "a")[0].text
    assert solo(llm, [5, 6], None)  # the engine is unharmed


def test_seeded_sampling_repeats_and_differs_by_choice(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(
        temperature=1.0, seed=11, n=3, max_tokens=12, ignore_eos=True, top_p=0.9, top_k=40
    )
    first, again = (llm.generate([9, 8, 7], params, "r8-qv")[0] for _ in range(2))
    assert [c.token_ids for c in first.choices] == [c.token_ids for c in again.choices]
    assert len({tuple(c.token_ids) for c in first.choices}) == 3
    crowd = llm.generate([[9, 8, 7], *prompts(5)], [params, *[GREEDY] * 5], ["r8-qv", *[None] * 5])
    assert [c.token_ids for c in crowd[0].choices] == [c.token_ids for c in first.choices]
    assert first.usage.prompt_tokens == 3
    assert first.usage.completion_tokens == 36


def test_logprobs_are_those_of_the_model(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = prompts(1, seed=5)[0]
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=4, ignore_eos=True)
    choice = llm.generate(prompt, params)[0].choices[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs) == 5
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == pytest.approx(entry.top[0][1])
        assert len(entry.top) == 4
    # The same tokens scored as a prompt give the same logprobs.
    scored = llm.generate([*prompt, *choice.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    assert scored.prompt_logprobs is not None
    tail = [entry.logprob for entry in scored.prompt_logprobs[len(prompt) :] if entry]
    assert tail == pytest.approx([e.logprob for e in choice.logprobs], abs=1e-4)
    assert scored.prompt_logprobs[0] is None


def test_bias_bans_and_min_tokens(make_llm: MakeLLM) -> None:
    llm = make_llm()
    forced = SamplingParams(temperature=0, max_tokens=4, logit_bias={77: 100.0}, ignore_eos=True)
    assert solo(llm, [5, 6], None, forced) == [77] * 4
    eos = next(iter(llm.tokenizer.eos_ids))
    wants_eos = {"temperature": 0, "max_tokens": 9, "logit_bias": {eos: 100.0}}
    assert solo(llm, [5, 6], None, SamplingParams(**wants_eos)) == [eos]  # type: ignore[arg-type]
    held = llm.generate([5, 6], SamplingParams(**wants_eos, min_tokens=4))[0].choices[0]  # type: ignore[arg-type]
    assert len(held.token_ids) == 5
    assert held.finish_reason == "stop"


def test_refusals(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with pytest.raises(ModelNotFound, match="nobody"):
        llm.generate("hi", GREEDY, "nobody")
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(InvalidRequest, match="outside"):
        llm.generate([10**6], GREEDY)
    with pytest.raises(ContextLengthExceeded, match="max_tokens"):
        llm.generate([5], SamplingParams(max_tokens=10**6))
    with pytest.raises(InvalidConfig, match="too little"):
        make_llm(memory="1MB")
    assert solo(llm, [5], None)


def test_cancel_frees_everything(make_llm: MakeLLM) -> None:
    llm = make_llm()
    driver = Driver(llm)
    long = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
    for i, name in enumerate([None, "r8-qv", "r64-all"]):
        driver.submit(f"c{i}", [5, 6, 7 + i], name, long)
    driver.until(lambda: all(driver.tokens[f"c{i}"] for i in range(3)))
    for i in range(3):
        llm.engine.cancel(f"c{i}")
    driver.step()
    assert {f"c{i}" for i in range(3)} == set(driver.ended)
    pool = llm.engine.pool
    assert pool.free_pages + pool.evictable_pages == pool.num_pages


def test_a_failing_step_spares_later_ones(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    runner = llm.engine._runner
    original = runner.run

    def explode(*_: object) -> None:
        monkeypatch.setattr(runner, "run", original)
        raise FloatingPointError("boom")

    monkeypatch.setattr(runner, "run", explode)
    assert "internal error" in str(llm.generate([5, 6], GREEDY)[0].error)
    assert solo(llm, [5, 6], None)


def test_who_makes_a_step_fail_fails_alone(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get what they would have got, sampled tokens included."""
    llm = make_llm()
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True, n=2)
    names = [None, "r8-qv", None]
    texts = prompts(3, seed=3)
    expected = [llm.generate(p, params, n)[0].choices for p, n in zip(texts, names, strict=True)]
    run = llm.engine._runner.run

    def sometimes(plan: StepPlan, samplers: object) -> StepOutput:
        out = run(plan, samplers)  # type: ignore[arg-type]
        if any(w.sequence.request.id == "bad" and w.sequence.num_output == 4 for w in plan.work):
            raise ValueError("boom")  # when everybody has drawn
        return out

    monkeypatch.setattr(llm.engine._runner, "run", sometimes)
    driver = Driver(llm)
    for i, (prompt, name) in enumerate(zip(texts, names, strict=True)):
        driver.submit(f"good{i}", prompt, name, replace(params, n=1))
    driver.submit("bad", [5, 6], None, params)
    driver.until(lambda: llm.engine.idle)
    failed = driver.ended["bad"]
    assert isinstance(failed, Failed)
    assert "ValueError" in str(failed.error)
    assert "boom" not in str(failed.error)
    for i, choices in enumerate(expected):
        assert driver.tokens[f"good{i}"] == choices[0].token_ids


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_an_adapter_that_overflows_fails_its_requests_only(
    make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo, kernels: str
) -> None:
    """Finite values, each of them, that make NaN of everything; memory they were in serves others."""
    huge = write_random_adapter(tmp_path / "huge", tiny_base, rank=8, targets="all-linear", std=3e37)
    llm = make_llm(kernel=KernelConfig(kernels))
    llm.engine.add_adapter(huge, "huge")
    texts = prompts(4, seed=9)
    names = [None, "r8-qv", "r64-all", None]
    alone = [solo(llm, prompt, name) for prompt, name in zip(texts, names, strict=True)]
    driver = Driver(llm)
    for i, (prompt, name) in enumerate(zip(texts, names, strict=True)):
        driver.submit(f"good{i}", prompt, name, GREEDY)
        driver.submit(f"huge{i}", prompt, "huge", replace(GREEDY, temperature=float(i % 2), n=1 + i // 2))
    driver.until(lambda: llm.engine.idle)
    for i in range(4):
        failed = driver.ended[f"huge{i}"]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, InvalidAdapter)
        assert "huge@1" in str(failed.error)
        assert isinstance(driver.ended[f"good{i}"], Finished)
        assert driver.tokens[f"good{i}"] == alone[i]
    driver.submit("later", texts[0], None, GREEDY)
    driver.until(lambda: llm.engine.idle)
    assert driver.tokens["later"] == alone[0]


def test_a_list_of_prompts_loses_nothing_to_one_that_fails(
    make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo
) -> None:
    huge = write_random_adapter(tmp_path / "huge", tiny_base, rank=8, targets="all-linear", std=3e37)
    llm = make_llm()
    llm.engine.add_adapter(huge, "huge")
    texts = prompts(3, seed=9)
    alone = [solo(llm, texts[0], "r8-qv"), solo(llm, texts[2], None)]
    first, failed, last = llm.generate(texts, GREEDY, ["r8-qv", "huge", None])
    assert [first.choices[0].token_ids, last.choices[0].token_ids] == alone
    assert first.error is None
    assert first.text
    assert isinstance(failed.error, InvalidAdapter)
    with pytest.raises(InvalidAdapter, match="huge@1"):
        _ = failed.text


def test_an_odd_failure_of_a_load_is_its_requests_alone(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    prepare = llm.engine.kernels.prepare_adapter

    def refuse(rows: AdapterRows) -> AdapterRows:
        if any(len(row.a) == 3 for row in rows.low_rank.values()):
            raise TypeError("boom")
        return prepare(rows)

    monkeypatch.setattr(llm.engine.kernels, "prepare_adapter", refuse)
    driver = Driver(llm)
    driver.submit("bad", [5, 6], "r3-qv", GREEDY)
    driver.submit("good", [5, 6], "r8-qv", GREEDY)
    driver.until(lambda: llm.engine.idle)
    assert isinstance(driver.ended["bad"], Failed)
    assert isinstance(driver.ended["good"], Finished)


def test_prompts_are_scored_in_bounded_memory(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    vocab = llm.model.arch.vocab
    prompt = prompts(1, seed=6, longest=60)[0] * 4
    params = SamplingParams(max_tokens=1, prompt_logprobs=2)
    whole = llm.generate(prompt, params)[0].prompt_logprobs
    logits, rows = llm.model.decoder.logits, []

    def spy(states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return logits(states)

    monkeypatch.setattr(llm.model.decoder, "logits", spy)
    monkeypatch.setattr("chiliad.engine.runner._SCORED", 7 * 4 * vocab)
    assert llm.generate(prompt, params)[0].prompt_logprobs == whole
    assert max(rows) == 7
    assert sum(rows) == len(prompt)


def test_what_a_step_takes_is_kept_out_of_the_pool(make_llm: MakeLLM) -> None:
    """More tokens in a step, or more logits, leave fewer pages."""
    few = make_llm(scheduler=SchedulerConfig(max_step_tokens=64, max_sequences=8))
    many = make_llm(scheduler=SchedulerConfig(max_step_tokens=4096, max_sequences=1024))
    arch, page = few.model.arch, few.engine.layout.page_bytes
    logits = 4 * arch.vocab * (1024 - 8)
    least = logits + 4 * (4096 - 64) * (arch.hidden + 2 * arch.ffn)
    assert (few.engine.pool.num_pages - many.engine.pool.num_pages) * page >= least


def test_a_long_list_of_prompts_is_no_overload(make_llm: MakeLLM) -> None:
    llm = make_llm(scheduler=SchedulerConfig(max_waiting=2, max_sequences=2))
    params = SamplingParams(max_tokens=1, n=2)
    assert len(llm.generate(prompts(9), params)) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("max_tokens", 0), ("min_tokens", -1), ("temperature", -0.1), ("temperature", float("nan")),
        ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 2.0),
        ("presence_penalty", 3.0), ("frequency_penalty", float("nan")), ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-320), ("logit_bias", {5: float("inf")}), ("logit_bias", {5: float("nan")}),
        ("logprobs", -1), ("prompt_logprobs", -1),
    ],
)  # fmt: skip
def test_sampling_parameters_out_of_range(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_more_logprobs_than_tokens_exist(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(max_tokens=1, logprobs=10**6, prompt_logprobs=10**6)
    output = llm.generate([5, 6, 7], params)[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[1] is not None
    assert output.choices[0].logprobs is not None
    for entry in (output.prompt_logprobs[1], output.choices[0].logprobs[0]):
        assert len(entry.top) == llm.model.arch.vocab


def test_an_interrupted_call_leaves_nothing_behind(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    expected = solo(llm, [5, 6], None)
    step, steps = llm.engine.step, iter(range(100))

    def interrupted() -> bool:
        if next(steps) == 4:  # Ctrl-C
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6], [7, 8]], GREEDY, [None, "r8-qv"])
    assert llm.engine.idle
    monkeypatch.undo()
    assert solo(llm, [5, 6], None) == expected


def test_a_stream_may_stay_open_during_other_calls(make_llm: MakeLLM) -> None:
    llm = make_llm()
    whole = llm.generate([5, 6], GREEDY)[0].text
    stream = llm.stream([5, 6], GREEDY)
    text = next(stream)
    assert solo(llm, [7, 8], "r8-qv")
    assert text + "".join(stream) == whole
    left = llm.stream([5, 6], GREEDY)
    next(left)
    left.close()
    assert llm.engine.idle


def test_after_its_end_an_engine_refuses(make_llm: MakeLLM) -> None:
    llm = make_llm()
    llm.close()
    with pytest.raises(Unavailable, match="stopped"):
        llm.generate([5, 6], GREEDY)
    with pytest.raises(Unavailable, match="stopped"):
        llm.engine.call(lambda: 1).result(timeout=PATIENCE)


async def test_every_request_hears_of_a_dead_engine(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that run, those in the inbox, and those that come between the crash and its notice."""
    engine = make_llm().engine
    run = engine._runner.run

    def slowly(*arguments: Any) -> StepOutput:
        time.sleep(0.02)  # what runs must not end before the crash
        return run(*arguments)

    monkeypatch.setattr(engine._runner, "run", slowly)
    door = AsyncEngine(lambda sink: setattr(engine, "_sink", sink) or engine)  # type: ignore[func-returns-value]
    await door.start()
    running = door.generate(Request("running", (5, 6), replace(GREEDY, max_tokens=450)))
    await anext(running)
    posted: asyncio.Queue[Event] = asyncio.Queue()
    door._queues["posted"] = posted  # as `generate` does before it submits
    called: list[Future[int]] = []

    def crash() -> None:
        engine.submit(Request("posted", (5, 6), GREEDY))
        called.append(engine.call(lambda: 1))
        raise SystemError("boom")

    engine._post(crash)
    *_, last = [event async for event in running]
    for event in (last, await asyncio.wait_for(posted.get(), PATIENCE)):
        assert isinstance(event, Failed)
        assert "boom" in str(event.error)
    called.append(engine.call(lambda: 1))  # too late
    for future in called:
        with pytest.raises(Unavailable, match="boom"):
            future.result(timeout=PATIENCE)
    with pytest.raises(Unavailable, match="boom"):
        await anext(door.generate(Request("late", (5, 6), GREEDY)))
    await door.stop()


def test_a_failing_choice_spares_its_neighbours(make_llm: MakeLLM) -> None:
    llm = make_llm()
    expected = solo(llm, [5, 6], None)
    driver = Driver(llm)
    driver.submit("bad", [5, 6], None, GREEDY)
    driver.submit("good", [5, 6], None, GREEDY)
    driver.step()

    def explode(*_: object) -> None:
        raise FloatingPointError("boom")

    llm.engine._live["bad"].choices[0].push = explode  # type: ignore[method-assign, assignment]
    driver.until(lambda: llm.engine.idle)
    assert isinstance(driver.ended["bad"], Failed)
    assert isinstance(driver.ended["good"], Finished)
    assert driver.tokens["good"] == expected


def test_a_removed_adapter_leaves_the_pool_whoever_still_asks_for_it(
    make_llm: MakeLLM, tmp_path: Path, tiny_base: BaseInfo
) -> None:
    """Requests that resolved it before run to their end, load it again if need be, and that is all."""
    llm = make_llm(adapters=None)
    engine = llm.engine
    driver = Driver(llm)
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = tuple(prompts(1)[0])

    def ask(name: str, version: AdapterVersion) -> str:
        driver.tokens[name] = []
        engine.submit(Request(name, prompt, short, (AdapterUse(version),)))
        driver.until(lambda: name in driver.ended)
        assert len(driver.tokens[name]) == 2
        return engine.store.state(version)

    folder = write_random_adapter(tmp_path / "one", tiny_base, 4, seed=1)
    one, twin = engine.add_adapter(folder, "one"), engine.add_adapter(folder, "twin")  # they share their rows
    engine.remove_adapter("one")
    assert ask("kept", twin) == "resident"
    engine.remove_adapter("twin")
    engine.step()
    assert engine.store.state(twin) == "absent"
    for late in ("late", "later"):
        assert ask(late, one) == "absent"
    assert engine.pool.usage()["adapter"] == 0
    with pytest.raises(ModelNotFound):
        engine.pin_adapter(one)
    assert ask("welcome", engine.add_adapter(folder, "again")) == "resident"
