"""Costs are found again in steps made from known ones; plans agree with the engine they are about."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from chiliad.adapters.registry import Registry
from chiliad.bench import plan as planning
from chiliad.bench.calibrate import _fit_loads, as_text, calibrate
from chiliad.bench.cost import CostModel, StepCost, contents, fit, guess
from chiliad.bench.workload import synthetic
from chiliad.cli import cli
from chiliad.config import DType, EngineConfig, KernelConfig
from chiliad.core import AdapterUse, AdapterVersion, Request, SamplingParams, StepPlan, Work
from chiliad.engine.engine import Engine
from chiliad.errors import InvalidConfig
from chiliad.kernels import load
from chiliad.models import load_model
from chiliad.testing import tiny_config, tiny_model, write_random_adapter

COSTS = StepCost(5e-3, 2e-4, 1e-4, 2e-10, 1e-12, 3e-7, 2e-9)


def records(count: int, noise: float = 0.0) -> list[tuple[StepCost, float]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        rows, tokens, adapters = rng.integers(0, 64), rng.integers(0, 512), rng.integers(0, 2e7)
        things = StepCost(
            1.0, rows, tokens, adapters, adapters * int(rows + tokens) // 4, rows * rng.integers(1, 500),
            tokens * rng.integers(1, 300),
        )  # fmt: skip
        made.append((things, COSTS.seconds(things) * (1 + noise * rng.standard_normal())))
    return made


def test_fit_finds_the_costs() -> None:
    found, error = fit(records(400))
    np.testing.assert_allclose(msgspec.structs.astuple(found), msgspec.structs.astuple(COSTS), rtol=0.02)
    assert error["median_relative"] < 0.01


def test_fit_bears_noise_and_disturbed_steps() -> None:
    made = records(400, noise=0.05)
    for i in range(0, 400, 20):
        made[i] = (made[i][0], made[i][1] * 10)
    found, error = fit(made)
    assert error["median_relative"] < 0.08
    assert error["disturbed"] == pytest.approx(0.05, abs=0.01)
    assert abs(error["total_relative"]) < 0.5
    for things, seconds in records(50):
        assert found.seconds(things) == pytest.approx(seconds, rel=0.1)


def test_costs_are_never_negative() -> None:
    found, _ = fit([(things, max(1e-4, 0.02 - 1e-5 * things.prefill_tokens)) for things, _ in records(200)])
    assert min(msgspec.structs.astuple(found)) >= 0
    with pytest.raises(InvalidConfig, match="too few"):
        fit(records(10))


def test_contents_of_a_step() -> None:
    one, two = (AdapterVersion(name, 1, name, "", 5) for name in "ab")

    def work(start: int, count: int, *versions: AdapterVersion) -> Work:
        uses = tuple(AdapterUse(version) for version in versions)
        request = Request("r", (1,), SamplingParams(), uses)
        return Work(SimpleNamespace(request=request, adapter_key=request.adapter_key), start, count, True)

    step = StepPlan([work(9, 1, one), work(4, 3, one), work(0, 2, two), work(7, 1), work(2, 1, one, two)], 8)
    size = {"a": 10, "b": 100}
    assert contents(step, lambda version: size[version.name]) == StepCost(
        step=1,
        decode_rows=3,
        prefill_tokens=5,
        adapter_bytes=10 + 100 + 110,
        adapter_work=4 * 10 + 2 * 100 + 110,
        context_read=10 + 8 + 3,
        prefill_context=(5 + 6 + 7) + (1 + 2),
    )


def test_fit_of_loads() -> None:
    sizes = np.array([1e6, 2e6, 4e6, 8e6])
    base, bandwidth = _fit_loads(np.stack([sizes, 0.01 + sizes / 5e8], axis=1))
    assert (base, bandwidth) == (pytest.approx(0.01), pytest.approx(5e8))
    assert _fit_loads(np.empty((0, 2)))[1] > 0
    assert _fit_loads(np.array([[1e6, 0.02], [1e6, 0.02]])) == (0.02, 1e12)


def test_cost_files(tmp_path: Path) -> None:
    cost = CostModel(COSTS, 0.1, 1e8, model="tiny", records=7, error={"median_relative": 0.1})
    cost.save(tmp_path / "a" / "cost.json")
    assert CostModel.read(tmp_path / "a" / "cost.json") == cost
    assert cost.load(10**8) == pytest.approx(1.1)
    for text in ("", "{}", '{"step": {"step": 0}}', '{"step": {"step": -1}}', '{"step": {"stepp": 1}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidConfig):
            CostModel.read(tmp_path / "bad.json")


# -- plans -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    tiny_model(folder)
    return folder


@pytest.mark.parametrize("dtype", get_args(DType))
def test_geometry_is_the_engines(tiny: Path, tmp_path: Path, dtype: DType) -> None:
    kernels = load(threads=1)
    model = load_model(str(tiny), kernels, dtype)
    config = EngineConfig(memory=80_000_000, dtype=dtype, kernel=KernelConfig(threads=1))
    registry = Registry(":memory:", model.info)
    engine = Engine(model, kernels, registry, config, lambda events: None)
    try:
        base = planning.Base.read(str(tiny), dtype)
        assert base.weights_bytes == pytest.approx(model.nbytes, rel=0.05)
        for targets in (("q_proj", "v_proj"), "all-linear"):
            named = targets if isinstance(targets, str) else ",".join(targets)
            made = planning.geometry(base, config, [3, 24], named, model.nbytes)
            assert made.num_pages == engine.pool.num_pages
            assert made.page_bytes == engine.layout.page_bytes
            assert (made.num_layers, made.block_tokens) == (
                engine.layout.num_layers,
                engine.layout.block_tokens,
            )
            assert made.max_model_len == engine.max_model_len
            for size, rank in zip(made.adapters, (3, 24), strict=True):
                folder = write_random_adapter(tmp_path / f"{named}-{rank}", model.info, rank, targets)
                version = registry.add(folder, f"rank-{rank}", replace=True)
                assert engine.store.pages_needed(version) == size.pages
                assert version.nbytes == pytest.approx(size.nbytes, rel=0.5)
                assert version.nbytes > size.nbytes  # the header
    finally:
        engine.close()
        registry.close()


def test_calibrate_and_plan(tiny: Path, tmp_path: Path) -> None:
    config = EngineConfig(memory=120_000_000, dtype="float32", kernel=KernelConfig(threads=1))
    cost = calibrate(str(tiny), config, seconds=1.5, num_adapters=4)
    assert cost.records > 40
    assert cost.step.step > 0
    assert cost.load_bandwidth > 0
    assert "held-out" in as_text(cost)
    base = planning.Base.read(str(tiny), "float32")
    trace = synthetic(rate=2, duration=10, adapters=1000, popularity="zipf:1", prompt=(4, 60), output=(2, 20))
    answer = planning.plan(base, config, trace, cost, ranks=[8])
    assert answer["cost"]["fitted"]
    assert answer["prediction"]["completed"] == 20
    assert answer["sizes"]["weights_bytes"] == cost.weights_bytes
    json.dumps(answer)


def test_answers(tiny: Path) -> None:
    """A load that a machine can bear, one beyond its arithmetic, one beyond its disk."""
    base = planning.Base.read(str(tiny), "bfloat16")
    config = EngineConfig(memory=69_000_000)

    def ask(step: float, load: float, **more: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "rate": 5,
            "duration": 60,
            "adapters": 5000,
            "prompt": (20, 90),
            "output": (10, 30),
        }
        cost = CostModel(StepCost(step=step, decode_rows=step / 50), load_seconds=load)
        return planning.plan(base, config, synthetic(**settings | more), cost, ranks=[64])

    good = ask(0.005, 0.01)
    assert (good["fits"], good["bottleneck"]) == (True, "none")
    assert "will it fit?  yes" in planning.as_text(good)
    slow = ask(0.5, 0.01, rate=20)
    assert (slow["fits"], slow["bottleneck"]) == (False, "compute")
    disk = ask(0.005, 2.0)
    assert (disk["fits"], disk["bottleneck"]) == (False, "adapter loads")
    assert "adapter loads gives out first" in planning.as_text(disk)
    sizes = good["sizes"]
    assert sizes["adapters_that_fit"] == int(sizes["pool_pages"] / sizes["adapter_pages"])
    assert sizes["pool_pages"] * sizes["page_bytes"] <= 69_000_000


def test_command(tiny: Path, tmp_path: Path) -> None:
    only_config = tmp_path / "elsewhere" / "config.json"
    only_config.parent.mkdir()
    only_config.write_text(json.dumps(tiny_config()))
    CostModel(COSTS).save(tmp_path / "cost.json")
    args = [
        "--adapters-count",
        "50",
        "--rate",
        "3",
        "--duration",
        "5",
        "--popularity",
        "zipf:1",
        "--rank",
        "8,16",
    ]
    args += [
        "--memory",
        "80MB",
        "--input-len",
        "4:20",
        "--output-len",
        "4:9",
        "--cost",
        str(tmp_path / "cost.json"),
    ]
    answers = []
    for model in (str(tiny), str(only_config), str(only_config.parent)):
        done = CliRunner().invoke(cli, ["plan", model, *args, "-o", "json"])
        assert done.exit_code == 0, done.output
        answers.append(json.loads(done.stdout))
    assert answers[0]["sizes"] == answers[1]["sizes"] == answers[2]["sizes"]
    assert answers[0]["fits"]
    done = CliRunner().invoke(cli, ["plan", str(tiny), *args])
    assert "will it fit?  yes" in done.stdout
    done = CliRunner().invoke(cli, ["plan", str(tiny), *args, "--replicas", "3"])
    assert "on 3 replicas" in done.stdout
    elsewhere = [*args[:-2], "--bandwidth", "2000", "--tflops", "300"]
    done = CliRunner().invoke(cli, ["plan", str(tiny), *elsewhere])
    assert "guessed costs of a machine of the speed given" in done.stdout
    for wrong in (
        ["--memory", "1MB"],
        ["--targets", "nothing"],
        ["--rank", "0"],
        ["--rank", "x"],
        ["--tflops", "300"],
    ):
        done = CliRunner().invoke(cli, ["plan", str(tiny), *args, *wrong])
        assert isinstance(done.exception, InvalidConfig), wrong


def test_a_guess_is_a_cost_model() -> None:
    cost = guess(
        weights_bytes=14 * 10**9,
        parameters=7 * 10**9,
        token_bytes=500_000,
        hidden=4096,
        layers=32,
        itemsize=2,
        bandwidth=2e12,
        flops=3e14,
    )
    decode = cost.step.seconds(StepCost(step=1, decode_rows=1, context_read=500))
    assert 0.008 < decode < 0.02  # 14 GB at 70 % of 2 TB/s
    assert cost.records == 0
