"""The numbers of a report, against ones worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiliad.bench.report import Outcome, as_text, fairness, gaps, jain, plot, report
from chiliad.bench.workload import Item


def answered(
    sent: float, times: list[float], tenant: str = "", adapter: int = 0, prompt: int = 10
) -> Outcome:
    item = Item(at=sent, prompt=prompt, output=len(times), adapter=adapter, tenant=tenant)
    return Outcome(item, sent, times[-1], times, [1] * len(times), len(times), prompt, 200)


def refused(sent: float, ended: float, tenant: str = "") -> Outcome:
    return Outcome(
        Item(at=sent, prompt=1, output=1, tenant=tenant), sent, ended, status=503, error="unavailable"
    )


def test_report() -> None:
    outcomes = [
        answered(0, [1, 1.5, 2.5]),
        answered(1, [4, 5]),
        answered(2, [10, 11]),
        refused(3, 7),
    ]
    result = report(outcomes, slo=6)
    assert result["duration"] == 11
    assert (result["num_prompts"], result["completed"], result["failed"], result["aborted"]) == (4, 3, 1, 1)
    assert result["errors"] == {"503 unavailable": 1}
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 7)
    assert result["output_throughput"] == pytest.approx(7 / 11)
    assert result["request_throughput"] == pytest.approx(3 / 11)
    assert result["request_goodput"] == pytest.approx(2 / 11)
    assert result["mean_ttft_ms"] == pytest.approx(4000)
    assert result["median_ttft_ms"] == pytest.approx(3000)
    assert result["slo_attainment"] == 0.5
    assert result["satisfaction"] == pytest.approx((1 - 1 / 36 + 1 - 9 / 36) / 4)
    assert result["mean_tpot_ms"] == pytest.approx((750 + 1000 + 1000) / 3)
    assert result["max_itl_ms"] == pytest.approx(1000)
    assert result["mean_e2el_ms"] == pytest.approx((2.5 + 4 + 9) / 3 * 1000)
    assert result["max_concurrent_requests"] == 3  # at 2 s; the first ends at 2.5, the fourth comes at 3
    assert "tenants" not in result
    assert "2 of 4" not in as_text(result)
    assert "3 of 4" in as_text(result)


def test_tokens_that_come_together_share_the_gap() -> None:
    outcome = answered(0, [1, 2, 5])
    outcome.counts = [1, 1, 3]
    assert gaps([outcome]) == [1, 1, 1, 1]


def test_empty_runs_have_a_report() -> None:
    assert report([])["completed"] == 0
    result = report([refused(0, 0)])
    assert result["slo_attainment"] == 0
    as_text(result)


def test_jain() -> None:
    assert jain([1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 1
    assert jain([]) == 1


def test_fairness_compares_those_who_wait() -> None:
    def run(small_starts: float) -> list[Outcome]:
        """One tenant takes everything for 60 s; the other waits until `small_starts`."""
        big = [answered(0, [0.1 + i * 0.1 for i in range(599)], "big")]
        small = [answered(0, [small_starts + 0.1 * i for i in range(10)], "small")]
        return big + small

    starved = fairness(run(59), "tenant")
    assert starved["jain_index"] == pytest.approx(0.5, abs=0.03)
    assert starved["contended_windows"] >= 5
    assert starved["max_service_gap"] == pytest.approx(2 * 100 + 10, abs=5)
    served = fairness(run(0.1), "tenant")
    assert (served["jain_index"], served["contended_windows"]) == (1, 0)  # it had no queue
    assert fairness(run(59), "adapter")["clients"] == 1


def test_tenants_one_by_one() -> None:
    result = report([answered(0, [1], "a"), answered(0, [9], "b"), refused(0, 1, "b")])
    assert result["tenants"]["a"]["slo_attainment"] == 1
    assert result["tenants"]["b"] == {
        "requests": 2,
        "failed": 1,
        "service": 12.0,
        "slo_attainment": 0,
        "mean_ttft_ms": 9000,
        "median_ttft_ms": 9000,
        "p99_ttft_ms": 9000,
    }


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    outcomes = [answered(i, [i + 1, i + 2], adapter=i % 3) for i in range(20)] + [refused(3, 4)]
    plot(outcomes, report(outcomes), tmp_path / f"run.{suffix}", "a run")
    assert (tmp_path / f"run.{suffix}").stat().st_size > 5000
