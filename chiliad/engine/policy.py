"""Who goes next. A policy orders the waiting queue, may give requests up, and names victims.

The scheduler asks for candidates in order of preference and skips those whose adapter is still
on its way; it lets at most a fixed number of later ones overtake a candidate that lacks pages.
So a policy needs no care for memory, only for its own bound on waiting, which its docstring states.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator
from math import ceil, exp
from typing import TYPE_CHECKING

from chiliad.errors import InvalidConfig

if TYPE_CHECKING:
    from chiliad.engine.scheduler import Sequence

#: (adjusted arrival in seconds, order): sequences rank by it, and the greatest is preempted first
Rank = tuple[float, int]

PRIORITY_SECONDS = 30.0  # the head start that one level of priority is worth
MAX_PRIORITY = 10  # beyond it, levels are worth nothing more
_WINDOW = 1024  # waiting requests that are looked through for adapters that already run
_SKIPS = 16  # blocked requests of one client that are tried before the next client's turn
_CLIENTS = 256  # clients tried in one plan


class FirstCome:
    """First come, first served, with priorities as head starts.

    A level of priority is worth 30 seconds of waiting, at most ten levels count either way.
    Bound: nobody is overtaken by a request of equal priority that came later, nor by any that
    came 30 s times the difference in levels later.
    """

    name = "fcfs"
    metered = False  # whether `produced` wants to be called
    slots = 256  # sequences that may run at once; the scheduler says how many

    def __init__(self) -> None:
        self._queue: list[tuple[Rank, Sequence]] = []  # sorted
        self._resumed: list[tuple[Rank, Sequence]] = []  # preempted sequences, sorted; always first

    def __len__(self) -> int:
        return len(self._queue) + len(self._resumed)

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, preempted ones first, then by rank."""
        for _, sequence in self._resumed + self._queue:
            yield sequence

    def rank(self, sequence: Sequence) -> Rank:
        """A sequence's lifelong place; among running ones the greatest is preempted first."""
        level = max(-MAX_PRIORITY, min(MAX_PRIORITY, sequence.request.priority))
        return (sequence.queued + level * PRIORITY_SECONDS, sequence.order)

    def push(self, sequence: Sequence, now: float) -> None:
        """A sequence arrives, or comes back after preemption (then `first_scheduled` is set)."""
        queue = self._queue if sequence.first_scheduled is None else self._resumed
        insort(queue, (sequence.rank, sequence))

    def remove(self, sequence: Sequence) -> None:
        """A waiting sequence leaves: admitted, cancelled or failed."""
        for queue in (self._resumed, self._queue):
            at = bisect_left(queue, (sequence.rank,))
            if at < len(queue) and queue[at][1] is sequence:
                del queue[at]
                return
        raise AssertionError("the sequence is not waiting")

    def candidates(self, now: float, running: Collection[object]) -> Iterator[Sequence]:
        """Waiting sequences, best first. Some may leave the queue while this is iterated.

        running: the adapter keys of the batch, the base's included.
        """
        resumed, waiting = self._resumed.copy(), self._queue.copy()
        for _, sequence in resumed:
            yield sequence
        for _, sequence in waiting:
            yield sequence

    def expired(self, now: float) -> list[Sequence]:
        """Waiting sequences that should fail now rather than be served too late."""
        return []

    def retry_after(self, now: float) -> float:
        """Seconds after which a refused client may try again: the queue's present delay."""
        oldest = min((sequence.queued for _, sequence in self._queue[:1]), default=now)
        return min(max(now - oldest, 1.0), 60.0)

    def admitted(self, sequence: Sequence, now: float) -> None:
        """A sequence starts to run for the first time."""

    def produced(self, sequence: Sequence, now: float) -> None:
        """A running sequence got one more token (only if `metered`)."""

    def joined(self, sequence: Sequence) -> None:
        """A sequence begins to run, for the first time or again."""

    def left(self, sequence: Sequence) -> None:
        """A sequence runs no longer."""

    def entitled(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence may run now if there is room."""
        return True

    def yields(self, sequence: Sequence) -> bool:
        """Whether a running sequence's prompt is computed after those of newcomers."""
        return False

    def victim(self, sequence: Sequence, running: list[Sequence]) -> Sequence | None:
        """Who of the running gives its place to a waiting sequence. Never the first of them."""
        return None


class Clustered(FirstCome):
    """Prefer adapters that already run (S-LoRA's adapter clustering, arXiv 2311.03285 section 4).

    Once the batch has `distinct` adapters, waiting requests that use one of them, or none, go
    first; what room is left is filled first come, first served. Bound: a request that has waited
    `patience` seconds goes before all that have not, in order of arrival (priorities count as in
    FirstCome).
    """

    name = "cluster"

    def __init__(self, distinct: int = 8, patience: float = 4.0) -> None:
        super().__init__()
        if distinct < 1:
            raise InvalidConfig(f"adapter clustering needs at least 1 distinct adapter, not {distinct}")
        self.distinct = distinct
        self.patience = patience

    def candidates(self, now: float, running: Collection[object]) -> Iterator[Sequence]:
        if len(running) - (() in running) < self.distinct:
            yield from super().candidates(now, running)
            return
        for _, sequence in self._resumed.copy():
            yield sequence
        late = bisect_left(self._queue, ((now - self.patience, -1),))
        waiting = self._queue[: late + _WINDOW]
        keys = {(), *running}
        for _, sequence in waiting[:late]:
            yield sequence
        for wanted in (True, False):
            for _, sequence in waiting[late:]:
                if (sequence.adapter_key in keys) is wanted:
                    yield sequence


class EarlyAbort(FirstCome):
    """Give up requests that cannot get their first token in time (S-LoRA's early abort).

    objective: seconds to the first token. A request whose age plus the usual time from start to
    first token reaches it fails at once. While requests arrive faster than they are started the
    newest is served first, otherwise the oldest: under overload the old ones are lost anyway,
    and serving them would make the new ones late as well. Bound: nobody waits longer than the
    objective. Priorities do not count.
    """

    name = "abort"
    metered = True

    def __init__(self, objective: float = 6.0) -> None:
        super().__init__()
        if objective <= 0:
            raise InvalidConfig(f"early abort needs an objective above 0 seconds, not {objective}")
        self.objective = objective
        self._arrived = 0.0  # exponentially decayed counts, so that their ratio is one of rates
        self._started = 0.0
        self._decayed = 0.0  # time of the last decay
        self._prefill = 0.0  # EMA of seconds from start to first token

    @property
    def overloaded(self) -> bool:
        return self._arrived >= self._started

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.queued, sequence.order)

    def push(self, sequence: Sequence, now: float) -> None:
        if sequence.first_scheduled is None:
            self._decay(now)
            self._arrived += 1
        super().push(sequence, now)

    def admitted(self, sequence: Sequence, now: float) -> None:
        self._decay(now)
        self._started += 1

    def produced(self, sequence: Sequence, now: float) -> None:
        if len(sequence.tokens) == sequence.num_prompt + 1 and sequence.first_scheduled is not None:
            self._prefill += 0.3 * (now - sequence.first_scheduled - self._prefill)

    def candidates(self, now: float, running: Collection[object]) -> Iterator[Sequence]:
        self._decay(now)
        resumed, waiting = self._resumed.copy(), self._queue.copy()
        for _, sequence in resumed:
            yield sequence
        for _, sequence in reversed(waiting) if self.overloaded else waiting:
            yield sequence

    def expired(self, now: float) -> list[Sequence]:
        limit = now + min(self._prefill, self.objective / 2) - self.objective
        gone: list[Sequence] = []
        for (queued, _), sequence in self._queue:
            if queued > limit:
                break
            gone.append(sequence)
        return gone

    def retry_after(self, now: float) -> float:
        return max(1.0, self.objective)

    def _decay(self, now: float) -> None:
        if now > self._decayed:
            factor = exp((self._decayed - now) / self.objective)
            self._arrived *= factor
            self._started *= factor
            self._decayed = now


class FairShare(FirstCome):
    """Virtual token counters (VTC, arXiv 2401.00588): the client served least goes next.

    Clients are tenants, or adapters with `by="adapter"`. A prompt token costs 1, an output token
    2, an adapter fetched the room it takes in tokens; costs are divided by the client's weight.
    A client that comes back after a pause starts at the least counter among those waiting, so
    that idleness saves up nothing. Within a client, first come, first served.

    Counters make service fair over time, but one who floods would still fill the batch, and whoever
    comes then waits for a place in it, computes beside all its rows, and behind its long prompts. So
    a client that floods (more than twice its share of the slots is here, running or waiting) is held
    to that share, unless it was served less than all others; up to its share one that does not
    flood takes places of sequences beyond a share (of one who was alone before), and any client one
    such place if it runs nothing; and prompts of clients that had more are computed after those of
    newcomers. Slots stay empty for it: the price of low latency.

    Bound: while two clients both wait and may run, their counters never drift apart by more than
    what the batch can hold, so everyone who waits is reached.
    """

    name = "vtc"
    metered = True
    input_price = 1.0
    output_price = 2.0

    def __init__(self, by: str = "tenant", weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if by not in ("tenant", "adapter"):
            raise InvalidConfig(f"vtc counts by tenant or by adapter, not by {by!r}")
        self._by_adapter = by == "adapter"
        self._weights = weights or {}
        if any(weight <= 0 for weight in self._weights.values()):
            raise InvalidConfig("vtc weights must be above 0")
        self.counters: dict[str, float] = {}
        self._queues: dict[str, list[tuple[Rank, Sequence]]] = {}  # never empty ones
        # One (counter, tie, client) for each client in `_queues`, and some that left; counters may be
        # outdated (too low) until the entry comes to the top. Of equals who came last goes first: a
        # newcomer, lifted to the counter of one who has long been there.
        self._heap: list[tuple[float, int, str]] = []
        self._listed: set[str] = set()  # clients in the heap
        self._last = ""  # the client that left the queue last
        self._running: Counter[str] = Counter()  # sequences by client; no zeros
        self._present: Counter[str] = Counter()  # the same of all that run or wait
        self._poorest: str | None = None  # see `_is_poorest`; None: look again

    def client(self, sequence: Sequence) -> str:
        if not self._by_adapter:
            return sequence.request.tenant
        return "+".join(use.adapter.name for use in sequence.request.adapters)

    def push(self, sequence: Sequence, now: float) -> None:
        super().push(sequence, now)
        client = self.client(sequence)
        self._present[client] += 1
        if sequence.first_scheduled is not None:
            return
        queue = self._queues.get(client)
        if queue is None:
            least = self._least()
            counter = max(self.counters.get(client, 0.0), self._floor if least is None else least)
            self.counters[client] = counter
            queue = self._queues[client] = []
            if client not in self._listed:
                self._listed.add(client)
                heapq.heappush(self._heap, (counter, -sequence.order, client))
            if len(self.counters) > 2 * len(self._present) + 1024:
                self._forget(counter)
        insort(queue, (sequence.rank, sequence))

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        client = self.client(sequence)
        _decrement(self._present, client)
        if sequence.first_scheduled is not None:
            return
        queue = self._queues[client]
        del queue[bisect_left(queue, (sequence.rank,))]
        if not queue:
            del self._queues[client]
            self._last = client

    def candidates(self, now: float, running: Collection[object]) -> Iterator[Sequence]:
        self._poorest = None
        for _, sequence in self._resumed.copy():
            yield sequence
        passed: dict[str, int] = {}  # by client: sequences that the scheduler skipped
        done: list[tuple[float, int, str]] = []
        try:
            while len(done) < _CLIENTS and self._least() is not None:
                client = self._heap[0][2]
                queue = self._queues[client]
                at = passed.get(client, 0)
                if at >= min(len(queue), _SKIPS):
                    done.append(heapq.heappop(self._heap))
                    continue
                sequence = queue[at][1]
                yield sequence
                if sequence.first_scheduled is None:
                    passed[client] = at + 1
        finally:
            for entry in done:
                heapq.heappush(self._heap, entry)

    def admitted(self, sequence: Sequence, now: float) -> None:
        self._charge(sequence, self.input_price * (sequence.num_prompt + sequence.fetched))
        self._poorest = None

    def produced(self, sequence: Sequence, now: float) -> None:
        self._charge(sequence, self.output_price)

    def _is_poorest(self, client: str) -> bool:
        """Whether a client was served less than all others present (when the plan began, or since the
        last admission)."""
        if self._poorest is None:
            least = heapq.nsmallest(2, ((self.counters[each], each) for each in self._present))
            tied = len(least) == 2 and least[0][0] == least[1][0]
            self._poorest = least[0][1] if least and not tied else ""
        return client == self._poorest and client in self._present

    def joined(self, sequence: Sequence) -> None:
        client = self.client(sequence)
        self._running[client] += 1
        self._present[client] += 1

    def left(self, sequence: Sequence) -> None:
        client = self.client(sequence)
        _decrement(self._running, client)
        _decrement(self._present, client)

    def share(self, client: str) -> int:
        """How many sequences a client may run beside the other clients that are there now."""
        weigh = self._weights.get
        total = sum(weigh(each, 1.0) for each in self._present) if self._weights else len(self._present)
        return max(1, ceil(self.slots * weigh(client, 1.0) / max(1.0, total)))

    def entitled(self, sequence: Sequence) -> bool:
        client = self.client(sequence)
        return self._running[client] < self.share(client) or self._modest(client) or self._is_poorest(client)

    def _modest(self, client: str) -> bool:
        """Whether all that a client has here, running or waiting, is not much: it does not flood."""
        return self._present[client] <= 2 * self.share(client)

    def yields(self, sequence: Sequence) -> bool:
        least, client = self._least(), self.client(sequence)
        return least is not None and self._heap[0][2] != client and self.counters[client] >= least

    def victim(self, sequence: Sequence, running: list[Sequence]) -> Sequence | None:
        client = self.client(sequence)
        held = self._running[client]
        if held and not (held < self.share(client) and self._modest(client)):
            return None
        excess = {
            other: count - self.share(other)
            for other, count in self._running.items()
            if not self._is_poorest(other)
        }
        most = max(excess, key=excess.__getitem__, default="")
        if not excess or excess[most] <= 0:
            return None
        return next((s for s in reversed(running[1:]) if self.client(s) == most), None)

    def _charge(self, sequence: Sequence, cost: float) -> None:
        client = self.client(sequence)
        counter = self.counters.get(client, self._floor)
        self.counters[client] = counter + cost / self._weights.get(client, 1.0)

    @property
    def _floor(self) -> float:
        """Where a client starts while nobody waits."""
        return self.counters.get(self._last, 0.0)

    def _least(self) -> float | None:
        """The least counter among waiting clients, whose entry is then the top of the heap."""
        while self._heap:
            counter, tie, client = self._heap[0]
            if client not in self._queues:
                heapq.heappop(self._heap)
                self._listed.remove(client)
            elif counter < self.counters[client]:
                heapq.heapreplace(self._heap, (self.counters[client], tie, client))
            else:
                return counter
        return None

    def _forget(self, counter: float) -> None:
        """Drop counters of absent clients that a return would lift to `counter` anyway."""
        self.counters = {
            client: value
            for client, value in self.counters.items()
            if client in self._present or value > counter or client == self._last
        }


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def make_policy(spec: str) -> FirstCome:
    """ "fcfs", "cluster:8" (distinct adapters), "abort:6" (seconds), "vtc", "vtc:adapter" -> policy."""
    name, _, argument = spec.partition(":")
    try:
        if name == "fcfs" and not argument:
            return FirstCome()
        if name == "cluster":
            return Clustered(int(argument)) if argument else Clustered()
        if name == "abort":
            return EarlyAbort(float(argument)) if argument else EarlyAbort()
        if name == "vtc":
            return FairShare(argument) if argument else FairShare()
    except ValueError as error:
        raise InvalidConfig(f"policy {spec!r}: {error}", param="policy") from error
    raise InvalidConfig(
        f"unknown policy {spec!r}: use fcfs, cluster:DISTINCT, abort:SECONDS, vtc or vtc:adapter",
        param="policy",
    )
