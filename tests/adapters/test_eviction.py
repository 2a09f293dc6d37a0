"""Who is evicted, told on a virtual clock without bytes: the choice, and what it costs to choose."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chiliad.adapters import residency
from chiliad.adapters.residency import Done, Entry, Residents
from chiliad.core import AdapterVersion
from chiliad.kernels.base import AdapterRows
from chiliad.memory.pool import PagePool
from chiliad.testing import FakeClock


class Weightless(Residents):
    """Adapters that are there at once. `sizes` and `seconds` by name: pages, and time to load."""

    def __init__(self, pages: int) -> None:
        self.clock = FakeClock(1000.0)
        super().__init__(PagePool(pages), 64, clock=self.clock)
        self.sizes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.scored = 0

    def _count_pages(self, version: AdapterVersion) -> int:
        return self.sizes[version.name]

    def _begin(self, entry: Entry, version: AdapterVersion, pages: np.ndarray) -> None:
        self._done.append(Done(entry, None, "", self.seconds[version.name], None))

    def _accept(self, done: Done) -> AdapterRows | None:
        return None

    def _forget(self, digest: str) -> None: ...

    def add(self, name: str, size: int = 1, seconds: float = 0.01) -> AdapterVersion:
        version = AdapterVersion(name, 1, name, "", 1)
        self.sizes[name], self.seconds[name] = size, seconds
        self.load(version)
        self.poll()
        return version

    def use(self, version: AdapterVersion) -> None:
        self.retain(version)
        self.release(version)

    def worths(self) -> dict[str, float]:
        """The exact rule, now."""
        return {entry.version.name: self._worth(entry, self.clock()) for entry in self._idle}

    def evicted(self) -> str:
        """Evict; who was it?"""
        before = set(self.worths())
        assert self.evict() > 0
        (gone,) = before - set(self.worths())
        return gone


adapters = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.001, 1.0), st.floats(0.0, 200.0)), min_size=2, max_size=12
)


@given(adapters, st.lists(st.integers(0, 11), max_size=20), st.floats(0.1, 50.0))
def test_a_fresh_ranking_follows_the_rule(
    made: list[tuple[int, float, float]], uses: list[int], pause: float
) -> None:
    residents = Weightless(1000)
    versions = []
    for i, (size, seconds, age) in enumerate(made):
        versions.append(residents.add(f"a{i}", size, seconds))
        residents.clock.advance(age)
    for i in uses:
        residents.use(versions[i % len(versions)])
        residents.clock.advance(0.5)
    while residents.worths():
        residents.clock.advance(pause)
        worths = residents.worths()
        assert residents.coldest() == min(worths.values())
        assert worths[residents.evicted()] == min(worths.values())


@given(adapters, st.lists(st.integers(0, 11), max_size=6))
def test_a_young_ranking_never_takes_what_was_just_used(
    made: list[tuple[int, float, float]], uses: list[int]
) -> None:
    residents = Weightless(1000)
    versions = []
    for i, (size, seconds, age) in enumerate(made):
        versions.append(residents.add(f"a{i}", size, seconds))
        residents.clock.advance(age + 0.1)
    ranked = residents.worths()
    residents.coldest()
    residents.clock.advance(0.01)
    used = {f"a{i % len(versions)}" for i in uses}
    for i in uses:
        residents.use(versions[i % len(versions)])
    late = residents.add("late", 5, 0.001)
    residents.use(late)
    spared = {*used, "late"}
    order = [residents.evicted() for _ in range(len(made) - len(used))]
    assert not set(order) & spared
    assert [ranked[name] for name in order] == sorted(ranked[name] for name in order)
    while residents.evict():  # and when the ranking has run out, everybody's turn comes
        pass
    assert residents.evictable_pages() == 0


def test_ranking_costs_little_however_many_there_are() -> None:
    """With 2,000 idle adapters, a page that is needed now and then costs no look at all of them."""
    residents = Weightless(2000)
    for i in range(2000):
        residents.use(residents.add(f"a{i}"))
    residents.clock.advance(1)
    scored = 0
    exact = residency.Residents._worth

    def counted(entry: Entry, now: float) -> float:
        nonlocal scored
        scored += 1
        residents.clock.advance(1e-6)  # what scoring one takes
        return exact(entry, now)

    residents._worth = counted  # type: ignore[method-assign]
    for i in range(2000, 3000):
        residents.clock.advance(1e-3)  # a thousand loads a second
        residents.use(residents.add(f"a{i}"))
    assert scored <= 12 * 2000  # one ranking each tenth of a second
