"""The life of an adapter's bytes, with the real pool, the real arena and the reference kernels."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bad_adapters import make_bad_adapters

from chiliad import kernels as kernel_room
from chiliad.adapters import peft
from chiliad.adapters.base import LowRank
from chiliad.adapters.registry import Registry
from chiliad.adapters.store import AdapterStore
from chiliad.core import AdapterUse, AdapterVersion
from chiliad.errors import AdapterError, AdapterTooLarge, InvalidAdapter, OutOfMemory
from chiliad.kernels.base import KVLayout, LinearSpec, Segment, Step
from chiliad.kernels.reference import int8_rows
from chiliad.memory.arena import Arena
from chiliad.memory.pool import Owner, PagePool
from chiliad.testing import FakeClock, base_info, tiny_config, write_random_adapter

BASE = base_info(tiny_config("llama"), "tiny")
PAGE = 4096  # holds one row of 1,024 float32 at most; the widest here has 128


class House:
    """Pool, arena, kernels, store and registry of one test."""

    def __init__(
        self,
        root: Path,
        pages: int = 200,
        dtype: torch.dtype = torch.float32,
        kernels: str = "reference",
        **options: Any,
    ) -> None:
        self.root = root
        self.clock = FakeClock(100.0)
        self.pool = PagePool(pages)
        self.arena = Arena(pages, PAGE)
        self.kernels = kernel_room.load(kernels)
        self.kernels.bind_arena(self.arena.buffer, KVLayout(2, 2, 16, 16, torch.float32, PAGE))
        self.ready = threading.Event()
        self.store = AdapterStore(
            self.pool, self.arena, self.kernels, BASE, dtype,
            on_ready=self.ready.set, clock=self.clock, **options,
        )  # fmt: skip
        self.registry = Registry(base=BASE)

    def adapter(self, name: str, rank: int = 4, **options: Any) -> AdapterVersion:
        write_random_adapter(self.root / name, BASE, rank, **options)
        return self.registry.add(self.root / name, name, replace=True)

    def settle(self, *versions: AdapterVersion) -> None:
        """Wait until nothing loads any more."""
        deadline = time.monotonic() + 120
        while any(self.store.state(v) == "loading" for v in versions) or self.store.counts()[1]:
            assert time.monotonic() < deadline, "a load never ended"
            self.ready.wait(0.05)
            self.ready.clear()
            self.store.poll()
        self.check()

    def load(self, *versions: AdapterVersion) -> None:
        for version in versions:
            self.store.load(version)
        self.settle(*versions)
        for version in versions:
            assert self.store.state(version) == "resident", self.store.error(version)

    def check(self) -> None:
        self.pool.check({Owner.ADAPTER: self.store.held()})

    def delta(self, *uses: AdapterUse) -> torch.Tensor:
        """What the kernels add to each q_proj of layer 0 for the unit inputs: [in, out]."""
        site = BASE.sites[0]
        spec = LinearSpec(site.in_features, (site.out_features,), (0,), "float32")
        linear = self.kernels.pack_linear(torch.zeros(site.out_features, site.in_features), None, spec)
        x = torch.eye(site.in_features)
        count = np.array([0, len(x)], np.int32)
        step = Step(
            len(x),
            np.zeros(len(x), np.int32),
            count,
            count[1:],
            [],
            [Segment(0, len(x), self.store.rows(uses))],
        )
        return self.kernels.project(x, linear, self.kernels.prepare_step(step))


@pytest.fixture
def house(tmp_path: Path) -> Any:
    house = House(tmp_path)
    yield house
    house.store.close()
    house.pool.check({Owner.ADAPTER: []})
    assert house.pool.free_pages == house.pool.num_pages


def pair_of(pair: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.a, pair.b.float() * pair.scale


def expected(version: AdapterVersion, slot: int = 0) -> torch.Tensor:
    lowered, _ = peft.read(version.path, BASE)
    pair = lowered.low_rank[slot]
    return pair.a.float().T @ pair.b.float() * pair.scale


def test_load_use_evict_reload(house: House) -> None:
    version = house.adapter("tone", 7, targets="all-linear")
    store = house.store
    assert store.state(version) == "absent"
    assert store.error(version) is None
    needed = store.pages_needed(version)
    store.load(version)
    assert store.state(version) == "loading"
    assert house.pool.usage()["adapter"] == needed  # reserved at once
    house.settle(version)
    assert store.state(version) == "resident"
    assert house.pool.usage()["adapter"] == needed
    torch.testing.assert_close(house.delta(AdapterUse(version)), expected(version), rtol=1e-6, atol=1e-6)

    assert store.evictable_pages() == needed
    assert store.evict() == needed
    assert (store.state(version), store.evictable_pages(), house.pool.usage()["adapter"]) == ("absent", 0, 0)
    with pytest.raises(AdapterError, match="not resident"):
        store.rows((AdapterUse(version),))
    house.load(version)
    torch.testing.assert_close(house.delta(AdapterUse(version)), expected(version), rtol=1e-6, atol=1e-6)
    assert store.status(version)["loads"] == 2


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("saved", ["float32", "float16", "bfloat16"])
def test_every_row_is_where_it_should_be(
    kernels: str, dtype: torch.dtype, saved: Any, tmp_path: Path
) -> None:
    house = House(tmp_path, dtype=dtype, kernels=kernels)
    # pages in no order: rows must be found by their offsets
    taken = [house.pool.alloc(1, Owner.KV) for _ in range(40)]
    for pages in taken[::3]:
        house.pool.free(pages)
    overrides = {"rank_pattern": {"down_proj": 70, "layers.1.self_attn.q_proj": 1}, "use_rslora": True}
    version = house.adapter("mixed", 5, targets="all-linear", dtype=saved, config_overrides=overrides)
    house.load(version)
    lowered, _ = peft.read(version.path, BASE)
    rows = house.store.rows((AdapterUse(version),))
    assert rows.dtype == dtype
    assert rows.low_rank.keys() == lowered.low_rank.keys() == set(range(len(BASE.sites)))
    owned = set(house.store.held()[0].tolist())
    for slot, pair in lowered.low_rank.items():
        places = rows.low_rank[slot]
        # int8: the largest value of a row becomes 127, the others the nearest whole number
        units = [
            t.float().abs().amax(1) / 127 if dtype == torch.int8 else torch.ones(len(t))
            for t in pair_of(pair)
        ]
        torch.testing.assert_close(torch.from_numpy(places.scale), units[0] * units[1], rtol=1e-6, atol=0)
        for offsets, tensor, unit in zip((places.a, places.b), pair_of(pair), units, strict=True):
            assert len(offsets) == len(tensor)
            nbytes = tensor.shape[1] * dtype.itemsize
            for offset, row, one in zip(offsets.tolist(), tensor, unit, strict=True):
                assert offset % 64 == 0
                assert offset // PAGE == (offset + nbytes - 1) // PAGE
                assert offset // PAGE in owned
                stored = house.arena.view(offset, (tensor.shape[1],), dtype)
                if dtype == torch.int8:
                    assert (stored.float() - row.float() / one).abs().max() <= 0.5 + 1e-4
                    assert stored.abs().max() == 127
                else:
                    assert torch.equal(stored, row.to(dtype))
    house.store.close()


def test_int8_rows_take_half_the_pages_of_bfloat16_and_compose(tmp_path: Path) -> None:
    narrow = House(tmp_path / "int8", dtype=torch.int8)
    wide = House(tmp_path / "bfloat16", dtype=torch.bfloat16)
    for house in (narrow, wide):
        house.load(house.adapter("one", 64, seed=1), house.adapter("two", 32, seed=2))
    pages, usual = narrow.pool.usage()["adapter"], wide.pool.usage()["adapter"]
    assert pages <= usual / 2 + 2
    one, two = (narrow.registry.resolve(name) for name in ("one", "two"))
    assert narrow.store.status(one)["bytes"] == narrow.store.pages_needed(one) * PAGE
    want = 0.5 * expected(one) - 2.0 * expected(two)
    error = narrow.delta(AdapterUse(one, 0.5), AdapterUse(two, -2.0)) - want
    assert error.abs().max() < 0.02 * want.abs().max()
    for house in (narrow, wide):
        house.store.close()


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    stored, scale = int8_rows(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert stored.tolist() == [[0, 0], [-127, 64]]  # 63.5 to even
    assert scale.isfinite().all()


def test_one_load_however_many_ask(house: House) -> None:
    version = house.adapter("tone")
    twin = house.registry.add(house.root / "tone", "the-same-folder")
    assert twin.digest == version.digest
    for _ in range(5):
        house.store.load(version)
        house.store.load(twin)
    house.settle(version)
    house.store.load(version)
    assert house.store.counts() == (1, 0)
    assert house.store.status(twin)["loads"] == 1
    assert house.store.rows((AdapterUse(twin),)) is house.store.rows((AdapterUse(version),))


def test_composition_adds_up_without_copies(house: House) -> None:
    one, two = house.adapter("one", 3, seed=1), house.adapter("two", 6, targets=("q_proj", "up_proj"), seed=2)
    house.load(one, two)
    used = house.pool.usage()["adapter"]
    uses = (AdapterUse(one, 0.5), AdapterUse(two, -2.0))
    want = 0.5 * expected(one) - 2.0 * expected(two)
    torch.testing.assert_close(house.delta(*uses), want, rtol=1e-5, atol=1e-5)
    scaled = house.delta(AdapterUse(one, 3.0))
    torch.testing.assert_close(scaled, 3.0 * expected(one), rtol=1e-5, atol=1e-5)
    twice = house.delta(AdapterUse(one), AdapterUse(one))
    torch.testing.assert_close(twice, 2.0 * expected(one), rtol=1e-5, atol=1e-5)
    assert house.pool.usage()["adapter"] == used
    rows = house.store.rows(uses)
    assert set(rows.low_rank) == {
        slot for slot, s in enumerate(BASE.sites) if s.name.endswith(("q_proj", "v_proj", "up_proj"))
    }
    assert house.store.rows(uses) is rows  # kept ready

    house.store.evict()
    house.store.evict()
    with pytest.raises(AdapterError, match="not resident"):
        house.store.rows(uses)  # and forgotten with the pages
    house.load(one, two)
    torch.testing.assert_close(house.delta(*uses), want, rtol=1e-5, atol=1e-5)


def test_the_cache_of_compositions_is_bounded(house: House) -> None:
    version = house.adapter("one", 1)
    house.load(version)
    for i in range(1500):
        house.store.rows((AdapterUse(version, 1.0 + i / 1000),))
    assert len(house.store._composed) <= 1024


def test_in_use_is_not_evicted(house: House) -> None:
    one, two = house.adapter("one"), house.adapter("two")
    house.load(one, two)
    house.store.retain(one)
    house.store.retain(one)
    assert house.store.evictable_pages() == house.store.pages_needed(two)
    house.store.release(one)
    assert house.store.evictable_pages() == house.store.pages_needed(two)
    with pytest.raises(OutOfMemory):
        house.pool.alloc(house.pool.num_pages - 1, Owner.KV)
    assert house.store.state(two) == "resident"  # a hopeless request evicts nothing
    house.pool.free(house.pool.alloc(house.pool.num_pages - house.store.pages_needed(one), Owner.KV))
    assert (house.store.state(one), house.store.state(two)) == ("resident", "absent")
    house.store.release(one)
    house.pool.free(house.pool.alloc(house.pool.num_pages, Owner.KV))
    assert house.store.state(one) == "absent"
    with pytest.raises(AssertionError):
        house.store.release(one)


def test_pins(house: House) -> None:
    version = house.adapter("one")
    with pytest.raises(AdapterError):
        house.store.pin(version)
    house.load(version)
    house.store.pin(version)
    assert (house.store.evictable_pages(), house.store.coldest(), house.store.evict()) == (0, None, 0)
    assert (house.store.pinned_pages, house.store.count_pinned()) == (house.store.pages_needed(version), 1)
    house.store.pin(version, False)
    house.store.pin(version, False)
    assert house.store.pinned_pages == 0
    assert house.store.evict() > 0
    house.store.pin(version, False)  # it is gone, so it is not pinned
    house.load(version)
    house.store.pin(version)
    house.store.remove([version])
    assert (house.store.pinned_pages, house.store.count_pinned()) == (0, 0)


def test_pins_leave_half_of_the_pool(house: House) -> None:
    big, small = house.adapter("big", 60, targets="all-linear"), house.adapter("small")
    assert house.pool.num_pages // 2 < house.store.pages_needed(big)
    house.load(big, small)
    with pytest.raises(OutOfMemory, match="unpin"):
        house.store.pin(big)
    house.store.pin(small)
    assert house.store.evictable_pages() == house.store.pages_needed(big)


def test_a_removed_adapter_in_use_cannot_be_pinned(house: House) -> None:
    version = house.adapter("one")
    house.load(version)
    house.store.retain(version)
    house.store.remove([version])
    with pytest.raises(AdapterError):
        house.store.pin(version)
    house.store.release(version)
    assert house.store.pinned_pages == 0


def test_eviction_prefers_cold_large_unpopular_and_cheap(house: House) -> None:
    store, clock = house.store, house.clock
    versions = {name: house.adapter(name, 4) for name in ("old", "new", "popular", "dear")}
    house.load(*versions.values())
    entries = {name: store._entries[v.digest] for name, v in versions.items()}
    for name, entry in entries.items():
        entry.load_seconds = 0.8 if name == "dear" else 0.01
    for _ in range(10):
        store.retain(versions["popular"])
        store.release(versions["popular"])
    clock.advance(50)
    store.retain(versions["new"])
    store.release(versions["new"])
    clock.advance(5)
    order = []
    while store.coldest() is not None:
        before = {name: store.state(v) for name, v in versions.items()}
        store.evict()
        order += [name for name, v in versions.items() if store.state(v) != before[name]]
    assert order == ["old", "popular", "new", "dear"]


def test_larger_goes_before_smaller(house: House) -> None:
    small, large = house.adapter("small", 1), house.adapter("large", 32)
    house.load(small, large)
    for entry in house.store._entries.values():
        entry.load_seconds = 0.01
    house.clock.advance(5)
    house.store.evict()
    assert (house.store.state(small), house.store.state(large)) == ("resident", "absent")


def test_worth_falls_with_time(house: House) -> None:
    version = house.adapter("one")
    house.load(version)
    house.store._entries[version.digest].load_seconds = 0.02
    worths = []
    for _ in range(5):
        worths.append(house.store.coldest())
        house.clock.advance(3)
    assert worths == sorted(worths, reverse=True)
    assert min(worths) > 0
    # the scale that all caches share: seconds saved per page and second
    assert house.store.coldest() == pytest.approx(0.02 / house.store.pages_needed(version) / 15, rel=1e-3)


def test_no_room_now(house: House) -> None:
    version = house.adapter("one", 16)
    held = house.pool.alloc(house.pool.num_pages - 3, Owner.KV)
    with pytest.raises(OutOfMemory):
        house.store.load(version)
    assert house.store.state(version) == "absent"
    house.check()
    house.pool.free(held)
    house.load(version)


def test_loading_makes_room_by_evicting(tmp_path: Path) -> None:
    house = House(tmp_path, pages=12)
    versions = [house.adapter(f"a{i}", 16, seed=i) for i in range(6)]
    assert 12 / 3 < house.store.pages_needed(versions[0]) <= 12
    for version in versions * 2:
        house.load(version)
        torch.testing.assert_close(house.delta(AdapterUse(version)), expected(version), rtol=1e-5, atol=1e-5)
        house.clock.advance(1)
    assert house.store._metrics.adapter_loads == {"ok": 12, "error": 0}
    assert house.store._metrics.adapter_evictions["memory"] >= 10
    house.store.close()


def test_never_fits(tmp_path: Path) -> None:
    house = House(tmp_path, pages=4)
    version = house.adapter("giant", 64, targets="all-linear")
    for call in (lambda: house.store.load(version), lambda: house.store.check(version.path)):
        with pytest.raises(AdapterTooLarge, match="more --memory"):
            call()
    assert house.pool.free_pages == 4
    house.store.close()


def test_removed_while_idle(house: House) -> None:
    version = house.adapter("one")
    house.load(version)
    size = house.store.pages_needed(version) * PAGE
    assert house.store.remove([version]) == size
    assert (house.store.state(version), house.pool.free_pages) == ("absent", house.pool.num_pages)
    assert house.store.remove([version]) == 0
    assert house.store._metrics.adapter_evictions == {"memory": 0, "removed": 1}
    house.load(version)  # the same files may come back


def test_removed_under_use(house: House) -> None:
    version = house.adapter("one")
    house.load(version)
    before = house.delta(AdapterUse(version))
    house.store.retain(version)
    house.store.retain(version)
    assert house.store.remove(house.registry.remove("one")) == house.store.pages_needed(version) * PAGE
    assert torch.equal(house.delta(AdapterUse(version)), before)  # running requests see nothing
    assert house.store.evictable_pages() == 0
    house.store.release(version)
    assert torch.equal(house.delta(AdapterUse(version)), before)
    house.store.release(version)
    assert house.pool.free_pages == house.pool.num_pages
    assert house.store.state(version) == "absent"
    house.check()


def test_removed_while_loading(house: House) -> None:
    version = house.adapter("one", 32, targets="all-linear")
    house.store.load(version)
    assert house.store.remove([version]) > 0
    house.settle(version)
    assert (house.store.state(version), house.pool.free_pages) == ("absent", house.pool.num_pages)


def test_replaced_under_use(house: House) -> None:
    """In place, which is the worst case: both versions live side by side, each with its own bytes."""
    first = house.adapter("one", 4, seed=1)
    house.load(first)
    house.store.retain(first)
    before = house.delta(AdapterUse(first))
    second = house.adapter("one", 6, seed=2)
    assert second.version == 2
    house.load(second)
    assert torch.equal(house.delta(AdapterUse(first)), before)
    torch.testing.assert_close(house.delta(AdapterUse(second)), expected(second), rtol=1e-5, atol=1e-5)
    house.store.release(first)
    house.store.remove([first])
    house.store.load(first)  # its files are gone
    house.settle(first)
    assert house.store.state(first) == "failed"
    assert getattr(house.store.error(first), "code", "") == "adapter_changed"


def test_failures_back_off(house: House) -> None:
    version = house.adapter("one")
    store, clock = house.store, house.clock
    good = (house.root / "one" / peft.TENSOR_FILE).read_bytes()
    facts = os.stat(house.root / "one" / peft.TENSOR_FILE)
    os.unlink(house.root / "one" / peft.TENSOR_FILE)
    for wait in (1.0, 2.0, 4.0, 8.0):
        assert store.state(version) == "absent"
        store.load(version)
        house.settle(version)
        assert store.state(version) == "failed"
        assert "no adapter_model.safetensors" in str(store.error(version))
        assert house.pool.free_pages == house.pool.num_pages
        clock.advance(wait - 0.01)
        assert store.state(version) == "failed"
        store.load(version)  # nothing happens yet
        assert store.counts() == (0, 0)
        clock.advance(0.02)
    (house.root / "one" / peft.TENSOR_FILE).write_bytes(good)
    os.utime(house.root / "one" / peft.TENSOR_FILE, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    house.load(version)
    assert store.error(version) is None
    assert store._metrics.adapter_loads == {"ok": 1, "error": 4}


def test_equal_size_and_time_do_not_fool_a_reload(house: House) -> None:
    """The digest was made without reading tensors; what was read first decides."""
    version = house.adapter("one")
    house.load(version)
    house.store.evict()
    file = house.root / "one" / peft.TENSOR_FILE
    facts, raw = os.stat(file), bytearray(file.read_bytes())
    raw[-2] ^= 1
    with file.open("r+b") as opened:
        opened.write(raw)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert peft.read_header(file.parent).digest == version.digest
    house.store.load(version)
    house.settle(version)
    assert house.store.state(version) == "failed"
    assert getattr(house.store.error(version), "code", "") == "adapter_changed"


def test_bad_adapters_fail_and_cost_nothing(house: House) -> None:
    good = house.adapter("good")
    house.load(good)
    before = house.delta(AdapterUse(good))
    for bad in make_bad_adapters(house.root / "bad", BASE):
        with pytest.raises(bad.error):
            house.store.check(bad.folder)
        if not bad.early:
            version = house.registry.add(bad.folder, bad.name)
            house.store.load(version)
            house.settle(version)
            assert house.store.state(version) == "failed"
            assert bad.message in str(house.store.error(version))
    assert house.pool.usage()["adapter"] == house.store.pages_needed(good)
    assert torch.equal(house.delta(AdapterUse(good)), before)


def test_kernels_may_refuse(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiliad.errors import KernelError

    def refuse(rows: object) -> None:
        raise KernelError("not today")

    version = house.adapter("one")
    monkeypatch.setattr(house.kernels, "prepare_adapter", refuse)
    house.store.load(version)
    house.settle(version)
    assert house.store.state(version) == "failed"
    assert house.pool.free_pages == house.pool.num_pages


def test_registered_without_a_base(house: House) -> None:
    folder = write_random_adapter(house.root / "x", BASE, 3)
    version = Registry().add(folder, "x")
    assert version.ranks == ()
    assert house.store.pages_needed(version) == house.store.pages_needed(house.registry.add(folder, "x"))
    house.load(version)
    dora = write_random_adapter(house.root / "y", BASE, 3, config_overrides={"use_dora": True})
    with pytest.raises(InvalidAdapter, match="use_dora"):
        house.store.pages_needed(Registry().add(dora, "y"))


def test_loaders_rest_while_the_engine_computes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, a loader takes a tenth of a core; a crowd of loads takes what it needs."""
    from chiliad.adapters import store as module

    big, *more = (house.adapter(f"a{i}", 16, targets="all-linear", seed=i) for i in range(6))
    rests: list[float] = []
    seconds = iter(range(10**6))
    clock = SimpleNamespace(sleep=rests.append, thread_time=lambda: float(next(seconds)))
    monkeypatch.setattr(module, "time", clock)
    house.load(big)
    assert not rests
    house.store.busy = True
    house.store.remove([big])
    house.load(big)
    assert len(rests) > 2
    assert set(rests) == {9.0}  # for each second of work
    rests.clear()
    read, all_asked = house.store._recipes.read, threading.Event()

    def read_then(*arguments: Any) -> Any:
        all_asked.wait()  # a crowd, however fast the loaders are
        return read(*arguments)

    monkeypatch.setattr(house.store._recipes, "read", read_then)
    for version in more:
        house.store.load(version)
    all_asked.set()
    house.settle(*more)
    assert min(rests) < 9.0


def test_registered_adapters_are_sized_without_their_files(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine thread reads no file: the registry has kept the ranks."""
    added = house.adapter("one", 7, targets="all-linear")
    resolved = house.registry.resolve("one")
    house.registry.scan(house.root)
    with monkeypatch.context() as patch:
        patch.setattr(peft, "PeftFolder", None)
        pages = {house.store.pages_needed(v) for v in (added, resolved, house.registry.versions("one")[0])}
        fresh = AdapterStore(PagePool(9), house.arena, house.kernels, BASE, torch.float32)
        pages |= {fresh.pages_needed(resolved), fresh.pages_needed(house.registry.page()[0].adapter)}
        fresh.close()
    house.load(added)
    assert pages == {len(house.store.held()[0])}


def test_check_reports_the_plan(house: House) -> None:
    plan = house.store.check(write_random_adapter(house.root / "x", BASE, 3))
    assert (plan.method, plan.max_rank) == ("lora", 3)
    assert house.pool.free_pages == house.pool.num_pages


def test_status_is_json(house: House) -> None:
    version = house.adapter("one")
    assert house.store.status(version)["state"] == "absent"
    house.load(version)
    house.store.retain(version)
    house.clock.advance(2)
    status = house.store.status(version)
    json.dumps(status)
    assert (status["state"], status["tier"], status["users"], status["hits"]) == ("resident", "pool", 1, 1)
    assert status["bytes"] == house.store.pages_needed(version) * PAGE
    assert status["idle_seconds"] == pytest.approx(2)
    house.store.release(version)


def test_close_with_loads_under_way(tmp_path: Path) -> None:
    house = House(tmp_path)
    for i in range(8):
        house.store.load(house.adapter(f"a{i}", 8))
    house.store.close()
    house.pool.check({Owner.ADAPTER: []})
    assert house.pool.free_pages == house.pool.num_pages


def test_history_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiliad.adapters.residency._REMEMBERED", 20)
    for i in range(60):
        version = house.adapter(f"a{i}", 1)
        house.load(version)
        house.store.evict()
    assert len(house.store._entries) <= 22
    assert len(house.store._pages_needed) <= 20
