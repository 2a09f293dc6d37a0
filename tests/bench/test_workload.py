"""Traces: their statistics, their bounds, and that a seed says everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.bench.workload import Trace, azure, expected_shares, pick, servegen, synthetic
from chiliad.errors import InvalidConfig


@pytest.mark.parametrize("cv", [0.25, 1.0, 4.0, 8.0])
def test_gaps_are_gamma(cv: float) -> None:
    trace = synthetic(rate=10, duration=4000, adapters=1, cv=cv)
    assert len(trace) == 40_000
    assert trace.duration == pytest.approx(4000)
    assert trace.facts()["cv"] == pytest.approx(cv, rel=0.08)
    if cv == 1:  # exponential: P(gap > mean) = 1 / e
        gaps = np.diff([0, *(item.at for item in trace.items)])
        assert (gaps > 0.1).mean() == pytest.approx(np.exp(-1), abs=0.01)


@pytest.mark.parametrize(
    "spec", ["uniform", "zipf:1", "zipf:1.5", "power:1", "power:0.1", "power:2", "skewed"]
)
def test_shares_are_as_expected(spec: str) -> None:
    picks = pick(spec, 50, 200_000, np.random.default_rng(1))
    found = np.bincount(picks, minlength=50) / 200_000
    np.testing.assert_allclose(found, expected_shares(spec, 50), atol=0.005)


def test_shares_by_hand() -> None:
    assert expected_shares("zipf:1", 3) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert expected_shares("power:0.5", 4) == pytest.approx(
        [0.5, 0.5 * (2**0.5 - 1), 0.1589, 0.134], abs=1e-3
    )
    assert expected_shares("skewed", 2) == pytest.approx([0.6, 0.4])
    assert pick("distinct", 3, 7, np.random.default_rng(0)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(pick("identical", 3, 7, np.random.default_rng(0)).tolist()) == {0}
    assert set(pick("uniform", 0, 7, np.random.default_rng(0)).tolist()) == {-1}


@pytest.mark.parametrize("spec", ["", "zipf", "zipf:x", "power:0", "power:", "uniform:3", "nonsense"])
def test_bad_popularity(spec: str) -> None:
    with pytest.raises(InvalidConfig, match="popularity"):
        pick(spec, 5, 5, np.random.default_rng(0))


@settings(max_examples=50, deadline=None)
@given(
    spec=st.sampled_from(
        ["identical", "distinct", "uniform", "skewed", "zipf:0", "zipf:3", "power:0.01", "power:9"]
    ),
    adapters=st.integers(1, 1000),
    prompt=st.tuples(st.integers(1, 50), st.integers(0, 50)),
    prefix=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_bounds(spec: str, adapters: int, prompt: tuple[int, int], prefix: int, seed: int) -> None:
    low, high = prompt[0], prompt[0] + prompt[1]
    trace = synthetic(
        rate=5, duration=10, adapters=adapters, popularity=spec, prompt=(low, high), prefix=prefix, seed=seed
    )
    times = [item.at for item in trace.items]
    assert times == sorted(times)
    for item in trace.items:
        assert 0 <= item.adapter < adapters
        assert low + prefix <= item.prompt <= high + prefix
        assert 8 <= item.output <= 512


def test_streams_are_independent() -> None:
    one = synthetic(rate=5, duration=20, adapters=10, seed=3)
    assert one == synthetic(rate=5, duration=20, adapters=10, seed=3)
    other = synthetic(rate=5, duration=20, adapters=99, popularity="zipf:2", seed=3)
    assert [i.at for i in one.items] == [i.at for i in other.items]
    assert [i.prompt for i in one.items] == [i.prompt for i in other.items]
    assert [i.at for i in one.items] != [i.at for i in synthetic(rate=5, duration=20, adapters=10).items]


def test_prompts_share_their_beginning_within_an_adapter() -> None:
    trace = synthetic(rate=5, duration=20, adapters=2, prefix=32, prompt=(4, 9))
    by_adapter: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    whole = set()
    for i, item in enumerate(trace.items):
        tokens = trace.tokens(i, 500)
        assert len(tokens) == item.prompt
        assert all(10 <= token < 500 for token in tokens)
        by_adapter[item.adapter].add(tokens[:32])
        whole.add(tokens)
    assert len(by_adapter[0]) == len(by_adapter[1]) == 1
    assert by_adapter[0] != by_adapter[1]
    assert len(whole) == len(trace)


def test_tenants_by_weight() -> None:
    trace = synthetic(rate=100, duration=100, adapters=3, tenants=(10, 1, 1))
    counts = np.unique([item.tenant for item in trace.items], return_counts=True)[1]
    np.testing.assert_allclose(counts / len(trace), [10 / 12, 1 / 12, 1 / 12], atol=0.015)
    with pytest.raises(InvalidConfig, match="weights"):
        synthetic(rate=1, duration=1, adapters=1, tenants=(0,))


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = synthetic(rate=5, duration=20, adapters=10, prefix=3, tenants=(1, 2))
    trace.save(path)
    assert Trace.load(path) == trace
    assert Trace.load(path).tokens(4, 99) == trace.tokens(4, 99)
    lines = path.read_text().splitlines()
    assert len(lines) == len(trace) + 1
    for broken in ({"at": -1, "prompt": 1, "output": 1}, {"at": 0.1, "prompt": 0, "output": 1}, {"at": 0.1}):
        path.write_text("\n".join([lines[0], json.dumps(broken)]))
        with pytest.raises(InvalidConfig, match="line 2"):
            Trace.load(path)
    path.write_text("\n".join([lines[0], lines[5], lines[2]]))
    with pytest.raises(InvalidConfig, match="line 3"):
        Trace.load(path)
    with pytest.raises(InvalidConfig):
        Trace.load(tmp_path / "absent.jsonl")


def test_scaled() -> None:
    trace = synthetic(rate=5, duration=100, adapters=10, prompt=(100, 900), output=(1, 50), prefix=64)
    small = trace.scaled(rate=2, lengths=0.1, max_prompt=80, max_output=4, count=300)
    assert len(small) == 300
    assert small.rate == pytest.approx(2)
    assert max(item.prompt for item in small.items) == 80
    assert all(1 <= item.output <= 4 and item.prefix < item.prompt for item in small.items)
    before = np.diff([item.at for item in trace.items[:300]])
    np.testing.assert_allclose(
        np.diff([i.at for i in small.items]) / before, small.duration / trace.items[299].at, rtol=1e-2
    )
    with pytest.raises(InvalidConfig):
        trace.scaled(rate=0)


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:46.6805900,10,0\n"
        "2023-11-16 18:16:50.6805900,7,3\n"
    )
    trace = azure(path, adapters=5)
    assert [(i.prompt, i.output) for i in trace.items] == [(374, 44), (396, 109), (7, 3)]
    assert [i.at for i in trace.items] == pytest.approx([0, 4.314579, 64.0], abs=1e-5)
    assert len(azure(path, adapters=5, start=4)) == 2
    for text in ("", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n"):
        path.write_text(text)
        with pytest.raises(InvalidConfig):
            azure(path, adapters=5)


def _clients(folder: Path, rows: list[list[str]]) -> None:
    for i, client in enumerate(rows):
        lines = [f"{600 * j},{row}" for j, row in enumerate(client)]
        (folder / f"chunk-{i}-trace.csv").write_text("\n".join(lines) + "\n")


def test_servegen_follows_each_clients_rates(tmp_path: Path) -> None:
    steady = ["40,1,Gamma,1.0,9"] * 4
    late = ["0,0,,0,0", "0,0,,0,0", "120,4,Weibull,0.5,9", "0,0,,0,0"]
    _clients(tmp_path, [steady, late])
    trace = servegen(
        tmp_path, rate=35, duration=400, window=100, adapters=5, popularity="uniform", start=0, seed=2
    )
    # mean rates 40 and 30 of 70 in all: scaled by a half
    counts = {t: sum(i.tenant == t for i in trace.items) for t in ("client-00", "client-01")}
    assert counts["client-00"] == pytest.approx(20 * 400, rel=0.05)
    assert counts["client-01"] == pytest.approx(60 * 100, rel=0.1)
    late_times = np.array([i.at for i in trace.items if i.tenant == "client-01"])
    assert late_times.min() >= 200
    assert late_times.max() <= 300
    gaps = np.diff(late_times)
    assert gaps.std() / gaps.mean() == pytest.approx(5**0.5, rel=0.15)  # Weibull of shape 1/2
    owners = {(i.tenant, i.adapter) for i in trace.items}
    assert owners == {
        ("client-00", 0),
        ("client-00", 2),
        ("client-00", 4),
        ("client-01", 1),
        ("client-01", 3),
    }
    assert trace == servegen(
        tmp_path, rate=35, duration=400, window=100, adapters=5, popularity="uniform", start=0, seed=2
    )


def test_servegen_refuses_bad_folders(tmp_path: Path) -> None:
    settings = {"rate": 1.0, "duration": 60.0, "adapters": 1, "start": 0.0}
    with pytest.raises(InvalidConfig, match="no chunk"):
        servegen(tmp_path, **settings)  # type: ignore[arg-type]
    for rows in (["0,0,,0,0"], ["x,1,Gamma,1,1"], ["1,1,Cauchy,1,1"], []):
        _clients(tmp_path, [rows])
        with pytest.raises(InvalidConfig):
            servegen(tmp_path, **settings)  # type: ignore[arg-type]


def test_servegen_with_few_adapters_or_none(tmp_path: Path) -> None:
    _clients(tmp_path, [["4,1,Gamma,1,9"]] * 3)
    trace = servegen(tmp_path, rate=20, duration=60, adapters=2, start=0)
    assert {item.adapter for item in trace.items} <= {0, 1}
    assert {i.adapter for i in servegen(tmp_path, rate=20, duration=60, adapters=0, start=0).items} == {-1}
