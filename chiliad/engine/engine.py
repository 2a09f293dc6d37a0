"""The loop: `plan = scheduler.plan(); out = runner.run(plan); scheduler.advance(plan, out.tokens)`.

`Engine` owns model, pool, adapters and scheduler. One thread calls `step` (a caller's own, as
`LLM` does, or the one that `stream.AsyncEngine` starts); every other thread speaks to it through
`submit`, `cancel` and `call`, which run between two steps.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from chiliad.adapters.registry import Registry
from chiliad.adapters.store import AdapterStore
from chiliad.config import EngineConfig
from chiliad.core import (
    AdapterVersion,
    Event,
    Failed,
    Finished,
    Request,
    StepOutput,
    StepPlan,
    TokenLogprob,
    Usage,
    Work,
)
from chiliad.engine.output import Choice
from chiliad.engine.runner import Runner, workspace
from chiliad.engine.sampling import SequenceSampler
from chiliad.engine.scheduler import Scheduler, Sequence
from chiliad.errors import (
    AdapterError,
    ChiliadError,
    ContextLengthExceeded,
    InvalidAdapter,
    InvalidConfig,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from chiliad.memory.arena import Arena, TouchAhead
from chiliad.memory.kv import kv_layout
from chiliad.memory.pool import PagePool
from chiliad.memory.swap import SwapSpace
from chiliad.observe import EngineMetrics, EngineStats

if TYPE_CHECKING:
    from chiliad.kernels.base import Kernels
    from chiliad.models.weights import Model

T = TypeVar("T")
log = logging.getLogger(__name__)

_REMOVED = 4096  # removed adapters that are remembered
_MIN_PAGES_PER_LAYER = 8  # a pool below this cannot serve one short prompt


@dataclass(slots=True)
class _Live:
    """A request between submit and its terminal event."""

    request: Request
    choices: dict[int, Choice] = field(default_factory=dict)  # by choice index
    sequences: list[Sequence] = field(default_factory=list)
    open: int = 0
    completion_tokens: int = 0
    cached_tokens: list[int] = field(default_factory=list)  # of each choice that ran
    scheduled: float | None = None  # first time one of its sequences ran


class Engine:
    """One base model and its adapters. `sink` receives the events of each step, in order."""

    def __init__(
        self,
        model: Model,
        kernels: Kernels,
        registry: Registry,
        config: EngineConfig,
        sink: Callable[[list[Event]], None],
    ) -> None:
        import torch

        self.model, self.kernels, self.registry, self.config = model, kernels, registry, config
        self.base, self.tokenizer = model.info, model.tokenizer
        self.metrics = EngineMetrics()
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        adapter_dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else dtype
        arch = model.arch
        self.max_model_len = min(config.max_model_len or arch.max_positions, arch.max_positions)
        self.layout = kv_layout(
            num_layers=arch.layers,
            num_kv_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            dtype=dtype,
            row_bytes=[
                n * adapter_dtype.itemsize for s in model.info.sites for n in (s.in_features, s.out_features)
            ],
        )
        step_bytes = workspace(arch, config.scheduler)
        num_pages = (config.memory - model.nbytes - step_bytes) // self.layout.page_bytes
        if num_pages < (least := _MIN_PAGES_PER_LAYER * arch.layers):
            need = model.nbytes + step_bytes + least * self.layout.page_bytes
            raise InvalidConfig(
                f"memory of {config.memory / 1e6:.0f} MB is too little: {model.name} in {config.dtype} needs "
                f"{model.nbytes / 1e6:.0f} MB for weights and {step_bytes / 1e6:.0f} MB to compute a step; "
                f"give at least {math.ceil(need / 1e6)}MB",
                param="memory",
            )
        self.pool = PagePool(num_pages, config.adapter_share)
        self.arena = Arena(num_pages, self.layout.page_bytes)
        kernels.bind_arena(self.arena.buffer, self.layout)
        self._wake = threading.Event()
        self.store = AdapterStore(
            self.pool,
            self.arena,
            kernels,
            model.info,
            adapter_dtype,
            on_ready=self._wake.set,
            metrics=self.metrics,
        )
        pages = self.arena.buffer.view(num_pages, self.layout.page_bytes).numpy()
        self._swap = SwapSpace(pages, arch.layers, config.swap) if config.swap else None
        self.scheduler = Scheduler(
            config.scheduler,
            pool=self.pool,
            residency=self.store,
            num_layers=arch.layers,
            block_tokens=self.layout.block_tokens,
            max_model_len=self.max_model_len,
            metrics=self.metrics,
            swap=self._swap,
        )
        self._runner = Runner(model, kernels, self.store.rows)
        self._sink = sink
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._live: dict[str, _Live] = {}
        self._samplers: dict[int, SequenceSampler] = {}  # by id(sequence)
        self._events: list[Event] = []
        # digests removed lately, though requests that resolved them before may still come
        self._removed: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._touching: TouchAhead | None = None
        self._ended: ChiliadError | None = None  # once the loop has ended: what to tell who comes late

    # -- from any thread -----------------------------------------------------------------

    def touch_ahead(self) -> threading.Event:
        """Have all memory of the pool ready before it is used; the event says when it is.

        For those who serve: it takes memory that a short life never needs.
        """
        self._touching = TouchAhead(
            self.arena.nbytes,
            lambda: sum(self.pool.peaks().values()) * self.layout.page_bytes,
            lambda: self.store.busy,
            self.kernels.touch_arena,
        )
        self._touching.start()
        return self._touching.ended

    def submit(self, request: Request) -> None:
        """Check a request and queue it. Raises ChiliadError at once when it can never run."""
        self.check(request)
        self._post(lambda: self._admit(request))

    def cancel(self, request_id: str) -> None:
        """End a request; it gets "abort" chunks and its Finished event. Unknown ids are ignored."""
        self._post(lambda: self._cancel(request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ended is not None:
                    raise self._ended
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future

    def check(self, request: Request) -> None:
        """Validate against the model; raises InvalidRequest or ContextLengthExceeded.

        After the engine's end it raises what that was.
        """
        if self._ended is not None:
            raise self._ended
        params, vocab = request.params, self.model.arch.vocab
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", param="prompt")
        if not all(0 <= token < vocab for token in request.prompt):
            raise InvalidRequest(f"prompt has token ids outside [0, {vocab})", param="prompt")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab:
                    raise InvalidRequest(f"{name}: token id {token} is outside [0, {vocab})", param=name)
        if len(request.prompt) + params.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                f"this model's context holds {self.max_model_len} tokens, but the prompt has "
                f"{len(request.prompt)} and max_tokens asks for {params.max_tokens}: shorten one of them",
                param="messages" if params.max_tokens <= self.max_model_len // 2 else "max_tokens",
            )

    def add_adapter(self, folder: Path, name: str, replace: bool = False) -> AdapterVersion:
        """Check every byte of an adapter folder and register it. Requests may name it at once.

        Raises InvalidAdapter, AdapterMismatch, AdapterTooLarge or AdapterExists; then nothing
        has changed.
        """
        self.store.check(folder)
        version = self.registry.add(folder, name, replace=replace)

        def welcome() -> None:
            self._removed.pop(version.digest, None)

        self._post(welcome)
        return version

    def pin_adapter(self, version: AdapterVersion) -> bool:
        """Keep an adapter in memory from now on (engine thread). False while it still loads.

        Raises OutOfMemory when there is no room to load or to pin it, AdapterError when its
        files are bad.
        """
        if version.digest in self._removed:
            raise ModelNotFound(f"adapter {version} was removed", param="name")
        state = self.store.state(version)
        if state == "failed":
            raise self.store.error(version) or AdapterError(f"adapter {version} did not load")
        if state == "resident":
            self.store.pin(version)
        elif state == "absent":
            self.store.load(version)
        return state == "resident"

    def remove_adapter(self, name: str) -> Future[int]:
        """Forget a name. Running requests finish; the result is the bytes freed now or by then."""
        versions = [v for v in self.registry.remove(name) if not self.registry.knows(v.digest)]

        def forget() -> int:
            self._removed.update(dict.fromkeys(version.digest for version in versions))
            while len(self._removed) > _REMOVED:
                self._removed.popitem(last=False)
            return self.store.remove(versions)

        return self.call(forget)

    # -- the loop ------------------------------------------------------------------------

    def wait(self, timeout: float) -> None:
        """Sleep until something may be there to do, at most `timeout` seconds."""
        self._wake.wait(timeout)

    def step(self) -> bool:
        """One iteration. False when there was nothing to compute."""
        self._wake.clear()
        self._take_inbox()
        self.store.poll()
        plan = self.scheduler.plan()
        for request, error in self.scheduler.take_failures():
            self._fail(request.id, error)
        self.store.busy = bool(plan.work)
        if plan.work:
            self._compute(plan)
        if self._events:
            events, self._events = self._events, []
            self._sink(events)
        return bool(plan.work)

    @property
    def idle(self) -> bool:
        return not (self._live or self._inbox)

    def _compute(self, plan: StepPlan) -> None:
        began = time.perf_counter()
        try:
            out = self._runner.run(plan, self._samplers)
        except Exception as error:
            self._compute_apart(plan, error)
            return
        self.scheduler.advance(plan, out.tokens)
        self._publish(plan, out)
        metrics, seconds = self.metrics, time.perf_counter() - began
        metrics.steps += 1
        metrics.generation_tokens += len(out.tokens)
        metrics.prompt_tokens += plan.num_tokens - sum(work.sample and work.count == 1 for work in plan.work)
        metrics.step_seconds.observe(seconds)
        metrics.step_tokens.observe(plan.num_tokens)
        metrics.batch_distinct_adapters.observe(
            len({work.sequence.adapter_key for work in plan.work if work.sequence.adapter_key})
        )

    def _compute_apart(self, plan: StepPlan, error: Exception) -> None:
        """A step failed. Who is alone in it is at fault; of several, each tries again without the others."""
        requests: dict[str, list[Work]] = {}
        for work in plan.work:
            requests.setdefault(work.sequence.request.id, []).append(work)
        if len(requests) == 1:
            self._fail(next(iter(requests)), error)
            return
        log.warning("a step of %d requests failed (%r): each is tried alone", len(requests), error)
        for alone in requests.values():
            self._compute(StepPlan(alone, sum(work.count for work in alone)))

    def _publish(self, plan: StepPlan, out: StepOutput) -> None:
        for index, scored in out.prompt_logprobs.items():
            work = plan.work[index]
            choice = self._live[work.sequence.request.id].choices[work.sequence.index]
            if choice.prompt_logprobs is not None:
                # a preempted sequence computes its prompt again: replace, do not repeat
                choice.prompt_logprobs[work.start + 1 :] = scored
        sampled = (work.sequence for work in plan.work if work.sample)
        for sequence, token, logprob in zip(sampled, out.tokens, out.logprobs, strict=True):
            live = self._live.get(sequence.request.id)
            if live is None:
                continue  # another choice of it has just failed
            try:
                self._push(live, sequence, token, logprob)
            except Exception as error:  # one request's text must not end the others
                self._fail(sequence.request.id, error)

    def _push(self, live: _Live, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        if token < 0:
            raise _no_token(live.request)
        choice = live.choices[sequence.index]
        chunk = choice.push(token, logprob)
        if chunk is None:
            return
        self._events.append(chunk)
        if chunk.finish_reason is not None:
            self.scheduler.end(sequence)
            self._close(live, sequence, choice)

    def _close(self, live: _Live, sequence: Sequence, choice: Choice) -> None:
        """Count a finished choice; after the last one, the request ends."""
        del self._samplers[id(sequence)]
        live.open -= 1
        live.completion_tokens += choice.num_tokens
        if sequence.first_scheduled is not None:
            # what later choices find is the work of the first
            live.cached_tokens.append(sequence.num_cached)
        if live.open == 0:
            request = live.request
            first = min((s.first_scheduled for s in live.sequences if s.first_scheduled), default=None)
            queued = 0.0 if first is None else max(0.0, first - request.arrival)
            usage = Usage(len(request.prompt), live.completion_tokens, min(live.cached_tokens, default=0))
            self._events.append(Finished(request.id, usage, queued))
            del self._live[request.id]
            self._let_go(request)

    def _post(self, function: Callable[[], None]) -> None:
        self._inbox.append(function)
        self._wake.set()
        if self._ended is not None:  # the loop looks no more
            self._take_inbox()

    def _take_inbox(self) -> None:
        while True:
            try:
                function = self._inbox.popleft()
            except IndexError:
                return
            function()

    def _admit(self, request: Request) -> None:
        if self._ended is not None:
            self._sink([Failed(request.id, self._ended)])
            return
        if request.id in self._live:
            error = InvalidRequest(f"request id {request.id!r} is already running", param="id")
            self._events.append(Failed(request.id, error))
            return
        live = self._live[request.id] = _Live(request)
        try:
            live.sequences = self.scheduler.add(request)
            live.open = len(live.sequences)
            for sequence in live.sequences:
                stream = self.tokenizer.stream(request.params.skip_special_tokens, request.prompt)
                live.choices[sequence.index] = Choice(
                    request, sequence.index, stream, self.tokenizer.eos_ids, request.params.max_tokens
                )
                self._samplers[id(sequence)] = SequenceSampler(
                    request.params, sequence.index, self.tokenizer.eos_ids
                )
        except Exception as error:  # whatever is odd about it, the engine goes on
            self._fail(request.id, error)

    def _let_go(self, request: Request) -> None:
        """A request ends: it may have brought back an adapter that was removed meanwhile."""
        for use in request.adapters:
            if use.adapter.digest in self._removed:
                self.store.remove([use.adapter])

    def _cancel(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is None or self._ended is not None:
            return
        for sequence in self.scheduler.cancel(request_id):
            choice = live.choices[sequence.index]
            if choice.finish_reason is None:
                self._events.append(choice.abort())
                self._close(live, sequence, choice)

    def _fail(self, request_id: str, error: Exception) -> None:
        """End a request with an error. The details of a bug of ours are for the log, not for clients."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        if not isinstance(error, ChiliadError) or error.status == 500:
            log.error("request %s failed", request_id, exc_info=error)
        if not isinstance(error, ChiliadError):
            error = ChiliadError(f"internal error ({type(error).__name__}): the server's log has the details")
        self.scheduler.cancel(request_id)
        for sequence in live.sequences:
            self._samplers.pop(id(sequence), None)
        self._let_go(live.request)
        self._events.append(Failed(request_id, error))

    def close(self, error: ChiliadError | None = None) -> None:
        """End what still runs, and whatever comes later, with `error`; stop loading adapters.

        Whoever waits hears of it first: after a failure the books may be too broken to be cleared.
        """
        self._ended = error or Unavailable("the engine has stopped", retry_after=5.0)
        live, self._live = self._live, {}
        events, self._events = self._events, []
        self._sink(events + [Failed(request_id, self._ended) for request_id in live])
        self._take_inbox()
        self._samplers.clear()
        for request_id in live:
            self.scheduler.cancel(request_id)
        self.store.close()
        if self._touching is not None:
            self._touching.stop()

    def stats(self, registered: int | None = None) -> EngineStats:
        """A look between two steps (call it on the engine thread, through `call`).

        registered: the registry's count, if the caller took it elsewhere (it takes a scan).
        """
        running = collections.Counter(
            use.adapter.name for s in self.scheduler.running for use in s.request.adapters
        )
        waiting = collections.Counter(
            use.adapter.name for s in self.scheduler.waiting for use in s.request.adapters
        )
        resident, loading = self.store.counts()
        pages = self.pool.usage()
        if self.scheduler.prefix is not None:
            pages["prefix"] = self.scheduler.prefix.evictable_pages()  # nobody's: room for the next one
            pages["kv"] -= pages["prefix"]
        pages["pinned"] = self.store.pinned_pages
        pages["adapter"] -= self.store.pinned_pages
        queued = [s.queued for s in self.scheduler.waiting]
        keys = {s.adapter_key for s in self.scheduler.running} - {()}
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_total=self.pool.num_pages,
            pages=pages,
            page_bytes=self.layout.page_bytes,
            adapters_registered=self.registry.count() if registered is None else registered,
            adapters_resident=resident,
            adapters_loading=loading,
            adapters_pinned=self.store.count_pinned(),
            adapter_pages_idle=self.store.evictable_pages(),
            swap_pages=(0, 0) if self._swap is None else (self._swap.used_pages, self._swap.num_pages),
            distinct_adapters=len(keys),
            oldest_wait=time.monotonic() - min(queued) if queued else 0.0,
            running_adapters=tuple(name for name, _ in running.most_common(64)),
            waiting_adapters=tuple(name for name, _ in waiting.most_common(64)),
            metrics=self.metrics,
        )


def _no_token(request: Request) -> ChiliadError:
    """Why a row has no token to choose: its logits are not finite, or everything is banned."""
    if request.adapters:
        names = " + ".join(str(use.adapter) for use in request.adapters)
        return InvalidAdapter(
            f"adapter {names} makes the model's numbers overflow (logits are NaN or infinite): its weights, or "
            "the scale they are used with, are too large for this base; train it again with a lower "
            "learning rate or use a smaller scale",
            param="model",
        )
    return ChiliadError(
        "no token can be chosen: the model's logits are NaN or infinite, or every token is banned; try "
        "--dtype float32, and check the weights"
    )
