"""Thousands of random histories of the store: nothing leaks, nobody in use is disturbed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiliad.adapters import peft
from chiliad.adapters.registry import Registry
from chiliad.adapters.store import AdapterStore
from chiliad.core import AdapterUse, AdapterVersion
from chiliad.errors import AdapterError, AdapterTooLarge, OutOfMemory
from chiliad.kernels.base import KVLayout
from chiliad.kernels.reference import ReferenceKernels
from chiliad.memory.arena import Arena
from chiliad.memory.pool import Owner, PagePool
from chiliad.testing import FakeClock, base_info, tiny_config, write_random_adapter

BASE = base_info(tiny_config("llama"), "tiny")
PAGES, PAGE = 40, 1024
RANKS = (2, 5, 16, 60)  # the last never fits
WHICH = st.integers(0, len(RANKS) - 1)


class LaterExecutor:
    """Loader threads that run when the test says, so that histories can be replayed."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self.jobs.append(lambda: function(*arguments))

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        self.jobs.clear()


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="chiliad-store-"))
        self.clock, self.pool, self.arena = FakeClock(), PagePool(PAGES), Arena(PAGES, PAGE)
        kernels = ReferenceKernels()
        kernels.bind_arena(self.arena.buffer, KVLayout(2, 2, 16, 16, torch.float32, PAGE))
        self.store = AdapterStore(self.pool, self.arena, kernels, BASE, torch.float32, clock=self.clock)
        self.store._loaders.shutdown()
        self.loaders = LaterExecutor()
        self.store._loaders = self.loaders  # type: ignore[assignment]
        self.registry = Registry(base=BASE)
        self.versions: list[AdapterVersion] = []
        self.truth: dict[str, torch.Tensor] = {}  # digest: A of slot 0
        self.old: list[AdapterVersion] = []  # replaced on disk
        self.seed = 0
        for i in range(len(RANKS)):
            self.versions.append(self.write(i))
        self.users: list[AdapterVersion] = []  # one entry per retain
        self.kv: list[np.ndarray] = []

    def write(self, i: int) -> AdapterVersion:
        self.seed += 1
        folder = write_random_adapter(self.root / f"a{i}", BASE, RANKS[i], seed=self.seed, dtype="float32")
        # two writes may fall into one tick of the file system's clock
        os.utime(folder / peft.TENSOR_FILE, ns=(self.seed * 10**9, self.seed * 10**9))
        version = self.registry.add(folder, f"a{i}", replace=True)
        self.truth[version.digest] = peft.read(folder, BASE)[0].low_rank[0].a
        return version

    def teardown(self) -> None:
        self.store.close()
        for pages in self.kv:
            self.pool.free(pages)
        self.pool.check({Owner.ADAPTER: [], Owner.KV: []})
        assert self.pool.free_pages == PAGES
        shutil.rmtree(self.root)

    # -- what may happen -----------------------------------------------------------------

    @rule(i=WHICH)
    def load(self, i: int) -> None:
        version, free = self.versions[i], self.pool.free_pages
        before = self.store.state(version)
        try:
            self.store.load(version)
        except AdapterTooLarge:
            assert RANKS[i] == 60
        except OutOfMemory:
            assert self.store.pages_needed(version) > free + self.store.evictable_pages()
        else:
            assert self.store.state(version) == ("loading" if before == "absent" else before)

    @precondition(lambda self: self.loaders.jobs)
    @rule(data=st.data())
    def loader_finishes(self, data: st.DataObject) -> None:
        self.loaders.jobs.pop(data.draw(st.integers(0, len(self.loaders.jobs) - 1)))()

    @rule()
    def poll(self) -> None:
        self.store.poll()

    @rule(i=WHICH)
    def retain(self, i: int) -> None:
        version = self.versions[i]
        if self.store.state(version) == "resident":
            self.store.retain(version)
            self.users.append(version)
        else:
            try:
                self.store.retain(version)
            except AdapterError:
                return
            raise AssertionError("retained what is not resident")

    @rule(i=WHICH)
    def begin_to_use(self, i: int) -> None:
        """What a request does, in one go, so that histories get somewhere."""
        self.load(i)
        while self.loaders.jobs:
            self.loaders.jobs.pop()()
        self.store.poll()
        self.retain(i)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.store.release(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @rule(i=WHICH)
    def remove(self, i: int) -> None:
        version, free = self.versions[i], self.pool.free_pages
        in_use = version.digest in {user.digest for user in self.users}
        loading = self.store.state(version) == "loading"
        freed = self.store.remove([version])
        if not in_use and not loading:
            assert (self.pool.free_pages - free) * PAGE == freed

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def remove_in_use(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.users))
        assert self.store.remove([version]) == self.store.pages_needed(version) * PAGE

    @rule()
    def everybody_leaves(self) -> None:
        while self.users:
            self.store.release(self.users.pop())

    @rule(i=WHICH)
    def replace_on_disk(self, i: int) -> None:
        self.old.append(self.versions[i])
        self.versions[i] = self.write(i)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def load_what_was_replaced(self, data: st.DataObject) -> None:
        """Its files are gone: it may still be resident, but never comes back as something else."""
        version = data.draw(st.sampled_from(self.old))
        if self.store.state(version) == "absent":
            with suppress(OutOfMemory, AdapterTooLarge):
                self.store.load(version)
            while self.loaders.jobs:
                self.loaders.jobs.pop()()
            self.store.poll()
            assert self.store.state(version) in ("absent", "failed")

    @rule(i=WHICH)
    def delete_on_disk(self, i: int) -> None:
        """The name still resolves, and fails when it is loaded."""
        (self.root / f"a{i}" / peft.TENSOR_FILE).unlink(missing_ok=True)

    @rule(i=WHICH, pinned=st.booleans())
    def pin(self, i: int, pinned: bool) -> None:
        if self.store.state(self.versions[i]) == "resident":
            with suppress(OutOfMemory, AdapterError):  # half of the pool is pinned; it is being removed
                self.store.pin(self.versions[i], pinned)

    @rule(n=st.integers(1, PAGES))
    def take_pages_for_kv(self, n: int) -> None:
        room = self.pool.free_pages + self.store.evictable_pages()
        try:
            self.kv.append(self.pool.alloc(n, Owner.KV))
            assert n <= room
        except OutOfMemory:
            assert n > room

    @precondition(lambda self: self.kv)
    @rule(data=st.data())
    def give_pages_back(self, data: st.DataObject) -> None:
        self.pool.free(self.kv.pop(data.draw(st.integers(0, len(self.kv) - 1))))

    @rule(seconds=st.sampled_from([0.1, 3.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.users)
    @rule(scale=st.sampled_from([1.0, 0.5]), data=st.data())
    def use(self, scale: float, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.users), min_size=1, max_size=3))
        rows = self.store.rows(tuple(AdapterUse(version, scale) for version in chosen)).low_rank[0]
        stored = torch.stack(
            [self.arena.view(o, (BASE.sites[0].in_features,), torch.float32) for o in rows.a.tolist()]
        )
        assert torch.equal(stored, torch.cat([self.truth[version.digest] for version in chosen]))
        assert (rows.scale == scale).all()

    # -- what must hold ------------------------------------------------------------------

    @invariant()
    def pages_add_up(self) -> None:
        self.pool.check({Owner.ADAPTER: self.store.held(), Owner.KV: self.kv})
        idle = [entry for entry in self.store._entries.values() if entry.idle]
        assert not any(entry.doomed for entry in idle)
        assert self.store.evictable_pages() == sum(entry.num_pages for entry in idle)
        pinned = [entry.num_pages for entry in self.store._entries.values() if entry.pinned]
        assert self.store.pinned_pages == sum(pinned) <= PAGES // 2
        assert (self.store.coldest() is None) == (not idle)
        for key in self.store._composed:
            assert all(self.store._entries[digest].state == "resident" for digest, _ in key)

    @invariant()
    def who_is_in_use_is_resident_and_unchanged(self) -> None:
        for version in {user.digest: user for user in self.users}.values():
            assert self.store.state(version) == "resident"
            assert self.store.status(version)["users"] == sum(u.digest == version.digest for u in self.users)
            first = int(self.store.rows((AdapterUse(version),)).low_rank[0].a[0])
            row = self.arena.view(first, (BASE.sites[0].in_features,), torch.float32)
            assert torch.equal(row, self.truth[version.digest][0])


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
