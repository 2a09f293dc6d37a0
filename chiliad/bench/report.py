"""What became of a trace: one outcome per request, and the numbers that sum them up.

The benchmark client and the simulator both produce outcomes, so both are read the same way.
Keys are those of `vllm bench serve` where it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chiliad.bench.workload import Item
from chiliad.errors import InvalidConfig

PROMPT_PRICE, OUTPUT_PRICE = 1.0, 2.0  # of a token, as in VTC (arXiv 2401.00588)
_WINDOW = 10.0  # seconds over which service is compared
_LISTED = 100  # tenants shown one by one


@dataclass(slots=True)
class Outcome:
    """One request as its client met it. Times are seconds since the run began."""

    item: Item
    sent: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)  # when output came
    counts: list[int] = field(default_factory=list)  # tokens that came then
    output_tokens: int = 0
    prompt_tokens: int = 0
    status: int = 0  # HTTP status; 0: none came
    error: str = ""  # empty: it was answered to its end

    @property
    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] - self.sent if self.times else None


def report(outcomes: Sequence[Outcome], slo: float = 6.0) -> dict[str, Any]:
    """Throughput, latencies, attainment and fairness.

    slo: seconds to the first token. Attainment and satisfaction (S-LoRA: 1 - (t / slo)**2) are
    means over all requests, those that failed counting 0.
    """
    done = [o for o in outcomes if not o.error]
    firsts = [o.first for o in done if o.first is not None]
    begin = min((o.sent for o in outcomes), default=0.0)
    seconds = max((o.ended for o in outcomes), default=0.0) - begin
    prompts, outputs = sum(o.prompt_tokens for o in done), sum(o.output_tokens for o in done)
    met = [o.first <= slo for o in done if o.first is not None]
    total = max(1, len(outcomes))
    per_second = 1 / seconds if seconds > 0 else 0.0
    result: dict[str, Any] = {
        "duration": seconds,
        "num_prompts": len(outcomes),
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "aborted": sum(o.status in (429, 503) for o in outcomes),  # refused or given up on purpose
        "errors": dict(Counter(f"{o.status} {o.error}" for o in outcomes if o.error).most_common(20)),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(done) * per_second,
        "request_goodput": sum(met) * per_second,
        "output_throughput": outputs * per_second,
        "total_token_throughput": (prompts + outputs) * per_second,
        "max_concurrent_requests": _most_at_once(outcomes),
        "slo_seconds": slo,
        "slo_attainment": sum(met) / total,
        "satisfaction": sum(max(0.0, 1 - (t / slo) ** 2) for t in firsts) / total,
    }
    result |= _spread("ttft", firsts)
    tpots = [
        (o.times[-1] - o.times[0]) / (o.output_tokens - 1) for o in done if o.times and o.output_tokens > 1
    ]
    result |= _spread("tpot", tpots)
    result |= _spread("itl", gaps(done))
    result |= _spread("e2el", [o.ended - o.sent for o in done])
    result |= _spread("client_lag", [o.sent - o.item.at for o in outcomes])
    result["fairness"] = {who: fairness(outcomes, who) for who in ("adapter", "tenant")}
    tenants = sorted({o.item.tenant for o in outcomes})
    if 1 < len(tenants) <= _LISTED:
        result["tenants"] = {t: _client([o for o in outcomes if o.item.tenant == t], slo) for t in tenants}
    return result


def gaps(outcomes: Iterable[Outcome]) -> list[float]:
    """Seconds between tokens. k tokens that come at once share the gap before them."""
    found: list[float] = []
    for outcome in outcomes:
        before = None
        for at, count in zip(outcome.times, outcome.counts, strict=True):
            if before is not None and count:
                found.extend([(at - before) / count] * count)
            before = at
    return found


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds, in vLLM's key names."""
    values = np.array(seconds if len(seconds) else [0.0]) * 1e3
    p90, p95, p99 = np.percentile(values, (90, 95, 99)).tolist()
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p90_{name}_ms": p90,
        f"p95_{name}_ms": p95,
        f"p99_{name}_ms": p99,
        f"max_{name}_ms": float(values.max()),
    }


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = sorted([(o.sent, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def _client(outcomes: Sequence[Outcome], slo: float) -> dict[str, float]:
    firsts = [o.first for o in outcomes if not o.error and o.first is not None]
    return {
        "requests": len(outcomes),
        "failed": sum(bool(o.error) for o in outcomes),
        "service": sum(
            PROMPT_PRICE * o.prompt_tokens + OUTPUT_PRICE * o.output_tokens for o in outcomes if o.times
        ),
        "slo_attainment": sum(t <= slo for t in firsts) / max(1, len(outcomes)),
    } | {k: v for k, v in _spread("ttft", firsts).items() if k[:4] in ("mean", "medi", "p99_")}


def jain(values: Sequence[float] | np.ndarray) -> float:
    """Jain's index: 1 when all are equal, 1 / n when one has everything."""
    x = np.asarray(values, float)
    squares = float((x * x).sum())
    return float(x.sum()) ** 2 / (len(x) * squares) if squares else 1.0


def fairness(
    outcomes: Sequence[Outcome], by: Literal["adapter", "tenant"], window: float | None = None
) -> dict[str, float]:
    """How evenly clients were served while they had to compete.

    Service is counted as VTC does (a prompt token 1, at the first output; an output token 2) in
    windows of ten seconds, or a sixth of a short run. In a window those compete who waited for a
    first token during at least half of it, together with whoever got more than the worst off
    of them: a client without a queue is content, whatever its share. Jain's index and the service gap
    (greatest minus least, in tokens) are taken among these; windows without competition do not
    count.
    """
    names: list[Any] = sorted({getattr(o.item, by) for o in outcomes})
    number = {name: i for i, name in enumerate(names)}
    end = max((o.ended for o in outcomes), default=0.0)
    window = min(_WINDOW, end / 6) if window is None else window
    columns = int(end / window) + 1 if window else 1
    service, waited = np.zeros((2, len(names), columns))
    waits: dict[int, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        row = number[getattr(outcome.item, by)]
        waits.setdefault(row, []).append((outcome.sent, outcome.times[0] if outcome.times else outcome.ended))
        if not outcome.times or not window:
            continue
        at = (np.array(outcome.times) / window).astype(int)
        np.add.at(service[row], at, OUTPUT_PRICE * np.array(outcome.counts))
        service[row, at[0]] += PROMPT_PRICE * outcome.prompt_tokens
    for row, spans in waits.items():
        reached = 0.0
        for begin, stop in sorted(spans):
            _spread_over(waited[row], max(begin, reached), stop, window)
            reached = max(reached, stop)
    indices, differences = [], []
    for column in range(columns):
        waiting = waited[:, column] >= window / 2
        if not waiting.any() or not window:
            continue
        got = service[:, column]
        competing = got[waiting | (got > got[waiting].min())]
        if len(competing) > 1:
            indices.append(jain(competing))
            differences.append(float(competing.max() - competing.min()))
    return {
        "clients": len(names),
        "jain_index": float(np.mean(indices)) if indices else 1.0,
        "min_jain_index": min(indices, default=1.0),
        "mean_service_gap": float(np.mean(differences)) if differences else 0.0,
        "max_service_gap": max(differences, default=0.0),
        "contended_windows": len(indices),
        "window_seconds": window,
    }


def _spread_over(row: np.ndarray, begin: float, stop: float, window: float) -> None:
    """Add the time from `begin` to `stop` to the windows it lies in."""
    while begin < stop and window:
        column = int(begin / window)
        until = min(stop, (column + 1) * window)
        if until <= begin:  # rounding
            break
        row[column] += until - begin
        begin = until


# -- for people --------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{'requests':<26}{result['completed']:>10} of {result['num_prompts']}, "
        f"{result['aborted']} refused or aborted, at most {result['max_concurrent_requests']} at once",
        f"{'time':<26}{result['duration']:10.2f} s",
        f"{'request throughput':<26}{result['request_throughput']:10.3f} /s",
        f"{'output throughput':<26}{result['output_throughput']:10.1f} tokens/s",
        f"{'total throughput':<26}{result['total_token_throughput']:10.1f} tokens/s",
        f"{'first token in ' + format(result['slo_seconds'], 'g') + ' s':<26}"
        f"{result['slo_attainment']:10.1%}    satisfaction {result['satisfaction']:.3f}",
        "",
        f"{'ms':<26}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, key in (
        ("time to first token", "ttft"),
        ("between tokens", "itl"),
        ("per token after the first", "tpot"),
        ("whole request", "e2el"),
    ):
        values = (result[f"{what}_{key}_ms"] for what in ("mean", "median", "p90", "p99", "max"))
        lines.append(f"{name:<26}" + "".join(f"{value:10.1f}" for value in values))
    lines.append("")
    for who, fair in result["fairness"].items():
        if fair["clients"] > 1:
            lines.append(
                f"{'fairness by ' + who:<26}{fair['jain_index']:10.3f} Jain, service gap "
                f"{fair['mean_service_gap']:.0f} tokens, {fair['contended_windows']} contended windows"
            )
    for message, count in result["errors"].items():
        lines.append(f"{'error':<26}{count:>10} x {message}")
    if result["p99_client_lag_ms"] > 50:
        lines.append(
            f"warning: requests left up to {result['max_client_lag_ms']:.0f} ms late: the client is slow"
        )
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], result: dict[str, Any], path: Path, title: str = "") -> None:
    """Four views of a run as PNG or SVG (by the suffix). Needs matplotlib (extra `bench`)."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InvalidConfig("plots need matplotlib: pip install 'chiliad[bench]'", param="plot") from None
    done = [o for o in outcomes if not o.error and o.times]
    slo, end = result["slo_seconds"], max((o.ended for o in outcomes), default=1.0)
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    (cdf, latency), (load, shares) = figure.subplots(2, 2)
    figure.suptitle(title)

    for label, seconds in (
        ("first token", [o.first or 0.0 for o in done]),
        ("whole request", [o.ended - o.sent for o in done]),
    ):
        values = np.sort(seconds)
        cdf.plot(values, np.arange(1, len(values) + 1) / max(1, len(outcomes)), label=label)
    cdf.axvline(slo, color="grey", linestyle=":", label="objective")
    cdf.set(xlabel="seconds", ylabel="share of requests", xscale="log", ylim=(0, 1.02))

    latency.plot([o.sent for o in done], [o.first for o in done], ".", markersize=3, label="answered")
    failed = [o for o in outcomes if o.error]
    if failed:
        waits = [o.ended - o.sent for o in failed]
        latency.plot([o.sent for o in failed], waits, "x", markersize=4, label="refused or failed")
    if any((o.first or 0.0) > slo / 3 for o in done):
        latency.axhline(slo, color="grey", linestyle=":")
    latency.set(xlabel="sent (s)", ylabel="time to first token (s)")

    edges = np.linspace(0, end, 61)
    times = [t for o in outcomes for t in o.times]
    counts = [n for o in outcomes for n in o.counts]
    tokens = np.histogram(times, edges, weights=counts)[0] / (edges[1] - edges[0])
    load.stairs(tokens, edges)
    load.set(xlabel="seconds", ylabel="output tokens/s", ylim=(0, None))
    flight = load.twinx()
    flight.plot(edges, [sum(o.sent <= t < o.ended for o in outcomes) for t in edges], color="C1")
    flight.set(ylabel="requests in flight", ylim=(0, None))
    flight.yaxis.label.set_color("C1")

    tenants = len({o.item.tenant for o in outcomes}) > 1
    totals: Counter[Any] = Counter()
    for o in outcomes:
        totals[o.item.tenant if tenants else o.item.adapter] += o.output_tokens
    shares.plot(np.arange(1, len(totals) + 1), sorted(totals.values(), reverse=True), ".-", markersize=3)
    shares.set(xlabel=f"{'tenant' if tenants else 'adapter'}, busiest first", ylabel="output tokens")
    for axes in (cdf, latency):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
