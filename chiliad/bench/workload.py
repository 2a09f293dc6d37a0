"""Request traces as plain data: who asks for which adapter, when, and how many tokens.

A trace is made once from a seed, may be saved as JSON lines, and is then replayed against a
server (`serve.py`) or the simulator (`simulate.py`). Arrival times, adapters and lengths come
from separate random streams: changing how popular adapters are moves no arrival.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil, floor, gamma
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chiliad.errors import InvalidConfig

Rng = np.random.Generator
Range = tuple[int, int]  # tokens, both ends included

_ARRIVALS, _ADAPTERS, _LENGTHS, _TENANTS = range(4)  # random streams of one seed
_WINDOW = 600.0  # seconds of one row of a ServeGen client
_FIRST_ID = 10  # prompts avoid the lowest token ids, which are often special


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a trace."""

    at: float  # seconds since the trace began
    prompt: int  # tokens
    output: int  # tokens, exactly
    adapter: int = -1  # -1: the base model
    tenant: str = ""
    prefix: int = 0  # first tokens of the prompt, the same for every request of this adapter


class Head(msgspec.Struct, frozen=True):
    """First line of a saved trace: what made it."""

    trace: str
    seed: int
    adapters: int  # how many there are; not all need be asked for
    parameters: dict[str, Any] = {}


class Trace(msgspec.Struct, frozen=True):
    head: Head
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def duration(self) -> float:
        """Seconds until the last arrival."""
        return self.items[-1].at if self.items else 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.items) / self.duration if self.duration else 0.0

    def facts(self) -> dict[str, float]:
        """What the trace turned out to be."""
        gaps = np.diff([0.0, *(item.at for item in self.items)])
        mean = float(gaps.mean()) if len(gaps) else 0.0
        used = [item.adapter for item in self.items if item.adapter >= 0]
        counts = np.unique(used, return_counts=True)[1]
        return {
            "requests": len(self.items),
            "seconds": self.duration,
            "rate": self.rate,
            "cv": float(gaps.std()) / mean if mean else 0.0,
            "adapters_used": len(counts),
            "share_of_busiest_adapter": float(counts.max() / counts.sum()) if len(counts) else 0.0,
            "tenants": len({item.tenant for item in self.items}),
            "prompt_tokens": sum(item.prompt for item in self.items),
            "output_tokens": sum(item.output for item in self.items),
        }

    def scaled(
        self,
        *,
        rate: float | None = None,
        lengths: float = 1.0,
        max_prompt: int | None = None,
        max_output: int | None = None,
        count: int | None = None,
    ) -> Trace:
        """Fit a trace to a machine: requests per second, tokens, how many requests.

        The first `count` requests are taken; time is stretched evenly to reach `rate`; every
        length is multiplied by `lengths` and cut at the maxima.
        """
        if lengths <= 0 or (rate is not None and rate <= 0):
            raise InvalidConfig("a trace is scaled by factors above 0")
        items = self.items if count is None else self.items[:count]
        last = items[-1].at if items else 0.0
        stretch = 1.0 if rate is None or not last else len(items) / rate / last

        def length(tokens: int, most: int | None) -> int:
            tokens = max(1, round(tokens * lengths))
            return tokens if most is None else min(tokens, most)

        def fit(item: Item) -> Item:
            prompt = length(item.prompt, max_prompt)
            return msgspec.structs.replace(
                item,
                at=round(item.at * stretch, 6),
                prompt=prompt,
                output=length(item.output, max_output),
                prefix=min(item.prefix, prompt - 1),
            )

        return Trace(self.head, tuple(fit(item) for item in items))

    def tokens(self, index: int, vocab: int) -> tuple[int, ...]:
        """The prompt of request `index`: random token ids below `vocab`, always the same."""
        item = self.items[index]
        rng = np.random.default_rng([self.head.seed, 10, index])
        ids = rng.integers(_FIRST_ID, vocab, item.prompt - item.prefix).tolist()
        if item.prefix:
            shared = np.random.default_rng([self.head.seed, 11, item.adapter + 1])
            ids = shared.integers(_FIRST_ID, vocab, item.prefix).tolist() + ids
        return tuple(ids)

    def save(self, path: Path) -> None:
        """Write JSON lines: the head, then one request each."""
        with path.open("wb") as file:
            for line in (self.head, *self.items):
                file.write(msgspec.json.encode(line) + b"\n")

    @staticmethod
    def load(path: Path) -> Trace:
        """Read what `save` wrote. Raises InvalidConfig naming the line that is wrong."""
        decoder = msgspec.json.Decoder(Item)
        items: list[Item] = []
        number = 1
        try:
            with path.open("rb") as file:
                head = msgspec.json.decode(file.readline(), type=Head)
                for number, line in enumerate(file, 2):  # noqa: B007 (it is in the message)
                    item = decoder.decode(line)
                    late = bool(items) and item.at < items[-1].at
                    lengths = item.prompt > 0 and item.output > 0 and 0 <= item.prefix < item.prompt
                    if late or item.at < 0 or not lengths or not -1 <= item.adapter < head.adapters:
                        raise ValueError("out of order, or a number out of range")
                    items.append(item)
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise InvalidConfig(f"{path}, line {number}: {error}", param="trace") from error
        return Trace(head, tuple(items))


# -- adapters ----------------------------------------------------------------------------


def pick(spec: str, adapters: int, count: int, rng: Rng) -> np.ndarray:
    """Which of `adapters` each of `count` requests asks for -> int64 [count].

    "identical", "distinct" (all in turn), "uniform" and "skewed" are Punica's classes (arXiv
    2310.18547): its skew gives each adapter 1.5 times the requests of the next. "power:ALPHA" is
    S-LoRA's floor(n * U**(1 / ALPHA)), uniform at 1 and skewed below. "zipf:S": the i-th adapter
    is asked for in proportion to i ** -S. Adapter 0 is the most popular.
    """
    name, _, argument = spec.partition(":")
    try:
        if adapters <= 0:
            return np.full(count, -1)
        if name == "identical" and not argument:
            return np.zeros(count, np.int64)
        if name == "distinct" and not argument:
            return np.arange(count) % adapters
        if name == "uniform" and not argument:
            return rng.integers(0, adapters, count)
        if name == "power" and float(argument) > 0:
            return np.floor(adapters * rng.random(count) ** (1 / float(argument))).astype(np.int64)
        if name == "zipf" and float(argument) >= 0:
            return _weighted((np.arange(adapters) + 1.0) ** -float(argument), count, rng)
        if name == "skewed" and not argument:
            return _weighted(1.5 ** -np.arange(min(adapters, 100)), count, rng)  # the rest: 1e-18
    except ValueError:
        pass
    raise InvalidConfig(
        f"popularity {spec!r}: use identical, distinct, uniform, skewed, zipf:S or power:ALPHA",
        param="popularity",
    )


def _weighted(weights: np.ndarray, count: int, rng: Rng) -> np.ndarray:
    edges = np.cumsum(weights)
    drawn: np.ndarray = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    return drawn.clip(max=len(weights) - 1)


def expected_shares(spec: str, adapters: int) -> np.ndarray:
    """The share of requests that each adapter gets in the long run, float64 [adapters]."""
    name, _, argument = spec.partition(":")
    pick(spec, adapters, 0, np.random.default_rng(0))  # refuses a bad spec
    ranks = np.arange(adapters, dtype=np.float64)
    weights: np.ndarray
    if name == "identical":
        weights = (ranks == 0).astype(np.float64)
    elif name == "power":
        weights = np.diff((np.arange(adapters + 1) / adapters) ** float(argument))
    elif name == "zipf":
        weights = (ranks + 1) ** -float(argument)
    elif name == "skewed":
        weights = 1.5**-ranks
    else:
        weights = np.ones(adapters)
    shares: np.ndarray = weights / weights.sum()
    return shares


# -- traces ------------------------------------------------------------------------------


def synthetic(
    *,
    rate: float,
    duration: float,
    adapters: int,
    cv: float = 1.0,
    popularity: str = "uniform",
    prompt: Range = (8, 512),
    output: Range = (8, 512),
    prefix: int = 0,
    tenants: Sequence[float] = (),
    seed: int = 0,
) -> Trace:
    """S-LoRA's synthetic trace (arXiv 2311.03285, section 7): gamma arrivals, uniform lengths.

    Gaps between arrivals have shape 1 / cv**2, so cv = 1 is a Poisson process. There are
    rate * duration requests, and the gaps are scaled to end at `duration`: the offered load is
    then what was asked for, even where a few long gaps decide the sum (cv = 8).

    prefix: tokens before every prompt that all requests of an adapter share. tenants: weights,
    by which each request is given to one of as many tenants.
    """
    if not (rate > 0 and duration > 0 and cv > 0):
        raise InvalidConfig("rate, duration and cv of a trace must be above 0")
    count = max(1, round(rate * duration))
    gaps = _stream(seed, _ARRIVALS).gamma(cv**-2, cv**2 / rate, count)
    times = np.cumsum(gaps)
    times *= duration / times[-1]
    picks = pick(popularity, adapters, count, _stream(seed, _ADAPTERS))
    names = [""] * count
    if tenants:
        if min(tenants) < 0 or sum(tenants) <= 0:
            raise InvalidConfig("weights of tenants must not be negative, nor all 0", param="tenants")
        shares = _weighted(np.array(tenants, float), count, _stream(seed, _TENANTS))
        names = [f"tenant-{i:02d}" for i in shares.tolist()]
    items = _items(times, picks, _lengths(prompt, output, count, seed), names, prefix)
    parameters = {"rate": rate, "duration": duration, "cv": cv, "popularity": popularity}
    return Trace(Head("synthetic", seed, adapters, parameters), items)


def azure(
    path: Path, *, adapters: int, popularity: str = "zipf:1", start: float = 0.0, seed: int = 0
) -> Trace:
    """The Azure LLM inference trace of 2023 (a CSV of time, prompt and output tokens).

    start: seconds into the trace at which this one begins. The trace names no adapters; they
    are drawn by `popularity`. Raises InvalidConfig when the file is not such a CSV.
    """
    rows: list[tuple[float, int, int]] = []
    number = 1
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):  # noqa: B007 (it is in the message)
                when = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC).timestamp()
                rows.append((when, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(f"{path}, line {number}: not an Azure trace: {error!r}", param="data") from error
    rows.sort()
    first = rows[0][0] + start if rows else 0.0
    rows = [row for row in rows if row[0] >= first and row[1] > 0 and row[2] > 0]
    if not rows:
        raise InvalidConfig(f"{path} has no requests from second {start:g} on", param="data")
    picks = pick(popularity, adapters, len(rows), _stream(seed, _ADAPTERS))
    items = _items([row[0] - first for row in rows], picks, [row[1:] for row in rows], [""] * len(rows))
    parameters = {"file": path.name, "popularity": popularity, "start": start}
    return Trace(Head("azure", seed, adapters, parameters), items)


def servegen(
    folder: Path,
    *,
    rate: float,
    duration: float,
    adapters: int,
    popularity: str = "zipf:1",
    start: float = 12 * 3600.0,
    window: float = _WINDOW,
    prompt: Range = (8, 512),
    output: Range = (8, 512),
    seed: int = 0,
) -> Trace:
    """ServeGen's clients as tenants (alibaba/ServeGen, chunk-*-trace.csv), each with its own law.

    Every client has a rate and a law of gaps (gamma or Weibull) for each ten minutes; the rates
    of all are scaled by one factor to `rate` requests per second in the mean, and a row lasts
    `window` seconds here, so that a short run can meet several. Adapter i belongs to client
    i mod the number of clients (with fewer adapters than clients, clients share); a client
    chooses among its own by `popularity`. Lengths are uniform: the trace has none.
    """
    clients = [_client(path, start, ceil(duration / window)) for path in _chunks(folder)]
    total = sum(float(rates.mean()) for rates, _ in clients)
    if not total:
        raise InvalidConfig(f"no client of {folder} is active {start:g} s into its trace", param="data")
    picker = _stream(seed, _ADAPTERS)
    arrivals: list[tuple[float, int, str]] = []
    for number, (rates, laws) in enumerate(clients):
        times = _renewals(rates * rate / total, laws, window, duration, seed, number)
        own = range(number, adapters, len(clients)) or range(number % max(1, adapters), adapters)
        choices = pick(popularity, len(own), len(times), picker).tolist()
        for at, choice in zip(times, choices, strict=True):
            arrivals.append((at, own[choice] if choice >= 0 else -1, f"client-{number:02d}"))
    arrivals.sort()
    lengths = _lengths(prompt, output, len(arrivals), seed)
    items = tuple(
        Item(at=round(at, 6), prompt=tokens[0], output=tokens[1], adapter=adapter, tenant=tenant)
        for (at, adapter, tenant), tokens in zip(arrivals, lengths, strict=True)
    )
    parameters = {"rate": rate, "duration": duration, "popularity": popularity, "start": start}
    return Trace(Head("servegen", seed, adapters, parameters | {"window": window}), items)


Law = tuple[str, float]  # name, shape; gaps are scaled to a mean of 1


def _chunks(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("chunk-*-trace.csv"), key=lambda p: int(p.name.split("-")[1]))
    if not paths:
        raise InvalidConfig(f"{folder} has no chunk-*-trace.csv", param="data")
    return paths


def _client(path: Path, start: float, windows: int) -> tuple[np.ndarray, list[Law]]:
    """Rates (requests per second, float64 [windows]) and laws of one client from `start` on."""
    first, rows = floor(start / _WINDOW), []
    number = 0
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if first < number <= first + windows:
                    law = (row[3] or "Gamma", float(row[4]) or 1.0)
                    if law[0] not in ("Gamma", "Weibull"):
                        raise ValueError(f"unknown law {law[0]!r}")
                    rows.append((float(row[1]), law))
    except (OSError, ValueError, IndexError) as error:
        raise InvalidConfig(f"{path}, line {number}: {error}", param="data") from error
    if len(rows) < windows:
        raise InvalidConfig(f"{path} ends before second {start + windows * _WINDOW:g}", param="data")
    return np.array([rate for rate, _ in rows]), [law for _, law in rows]


def _renewals(
    rates: np.ndarray, laws: Sequence[Law], window: float, duration: float, seed: int, client: int
) -> list[float]:
    """Arrival times of one client.

    Gaps with a mean of 1 are laid along the expected number of arrivals, and its inverse gives
    the times: a gap that spans a change of rate is stretched for each part as it should be.
    """
    rng = np.random.default_rng([seed, _ARRIVALS, client])
    expected = np.concatenate([[0.0], np.cumsum(rates * window)])
    edges = np.arange(len(rates) + 1) * window
    times: list[float] = []
    position = rng.random() * _gap(laws[0], rng)
    while position < expected[-1]:
        at = float(np.interp(position, expected, edges))
        if at >= duration:
            break
        times.append(at)
        position += _gap(laws[min(int(at / window), len(laws) - 1)], rng)
    return times


def _gap(law: Law, rng: Rng) -> float:
    name, shape = law
    if name == "Gamma":
        return float(rng.gamma(shape, 1 / shape))
    return float(rng.weibull(shape)) / gamma(1 + 1 / shape)


def _stream(seed: int, stream: int) -> Rng:
    return np.random.default_rng([seed, stream])


def _lengths(prompt: Range, output: Range, count: int, seed: int) -> list[tuple[int, int]]:
    rng = _stream(seed, _LENGTHS)
    for name, (low, high) in (("prompt", prompt), ("output", output)):
        if not 1 <= low <= high:
            raise InvalidConfig(f"{name} lengths {low}:{high}: write LOW:HIGH with 1 <= LOW <= HIGH")
    pairs = zip(
        rng.integers(prompt[0], prompt[1] + 1, count).tolist(),
        rng.integers(output[0], output[1] + 1, count).tolist(),
        strict=True,
    )
    return list(pairs)


def _items(
    times: Sequence[float] | np.ndarray,
    picks: np.ndarray,
    lengths: Sequence[tuple[int, int]],
    tenants: Sequence[str],
    prefix: int = 0,
) -> tuple[Item, ...]:
    rows = zip(times, picks.tolist(), lengths, tenants, strict=True)
    return tuple(
        Item(round(float(at), 6), prefix + prompt, output, adapter, tenant, prefix)
        for at, adapter, (prompt, output), tenant in rows
    )
