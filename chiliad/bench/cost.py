"""What a step and a load take, as a linear model of what is in them.

Fitted to measured steps (`calibrate.py`), or guessed from a machine's bandwidth and arithmetic.
A cost model is a small JSON file, so that one of another machine can be written or edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from chiliad.config import home
from chiliad.core import AdapterVersion, StepPlan
from chiliad.errors import InvalidConfig

_OUTLIER = 3.0  # a record this many times its prediction (or less) was disturbed: fitted without


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds per unit of each thing in a step. As counts, the things themselves."""

    step: float = 0.0  # whatever is in it: reading the weights
    decode_rows: float = 0.0  # sequences that compute one token
    prefill_tokens: float = 0.0  # tokens of prompt chunks
    adapter_bytes: float = 0.0  # of the distinct adapters in the step
    adapter_work: float = 0.0  # tokens times bytes of their adapter
    context_read: float = 0.0  # tokens in the KV cache of decoding sequences
    prefill_context: float = 0.0  # chunk tokens times the tokens they attend to

    def seconds(self, things: StepCost) -> float:
        return (
            self.step * things.step
            + self.decode_rows * things.decode_rows
            + self.prefill_tokens * things.prefill_tokens
            + self.adapter_bytes * things.adapter_bytes
            + self.adapter_work * things.adapter_work
            + self.context_read * things.context_read
            + self.prefill_context * things.prefill_context
        )


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine takes for one base model."""

    step: StepCost
    load_seconds: float = 0.0  # of an adapter, whatever its size
    load_bandwidth: float = 1e9  # bytes per second of its file
    loaders: int = 2  # loads that run at once
    request_seconds: float = 0.0  # from the socket to the queue
    weights_bytes: int = 0  # of the base in memory; 0: not known
    model: str = ""
    dtype: str = ""
    machine: str = ""
    records: int = 0  # steps it was fitted to; 0: it is a guess
    error: dict[str, float] = {}  # of the fit on steps that were held out

    def load(self, nbytes: int) -> float:
        """Seconds to load an adapter of this file size."""
        return self.load_seconds + nbytes / self.load_bandwidth

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @staticmethod
    def read(path: Path) -> CostModel:
        """Raises InvalidConfig when the file is not a cost model."""
        try:
            cost = msgspec.json.decode(path.read_bytes(), type=CostModel)
        except (OSError, msgspec.MsgspecError) as error:
            raise InvalidConfig(f"{path} is not a cost model: {error}", param="cost") from error
        if min(msgspec.structs.astuple(cost.step)) < 0 or cost.load_bandwidth <= 0 or cost.loaders < 1:
            raise InvalidConfig(f"{path}: costs may not be negative", param="cost")
        if cost.step.step <= 0:
            raise InvalidConfig(f"{path}: a step must take some time", param="cost")
        return cost


def default_path(model: str, dtype: str) -> Path:
    """Where `chiliad bench calibrate` leaves what it measured, and `chiliad plan` looks for it."""
    return home().parent / "cost" / f"{model}-{dtype}.json"


def contents(plan: StepPlan, nbytes: Callable[[AdapterVersion], int]) -> StepCost:
    """The things that are in a step. nbytes: of an adapter's rows in the pool."""
    decode = prefill = context = prefill_context = 0
    distinct: dict[object, int] = {}
    work_bytes = 0
    for work in plan.work:
        if work.count == 1:
            decode += 1
            context += work.start + 1
        else:
            prefill += work.count
            prefill_context += work.count * work.start + work.count * (work.count + 1) // 2
        request = work.sequence.request
        if request.adapters:
            key = work.sequence.adapter_key
            size = distinct.get(key)
            if size is None:
                size = distinct[key] = sum(nbytes(use.adapter) for use in request.adapters)
            work_bytes += work.count * size
    return StepCost(1.0, decode, prefill, sum(distinct.values()), work_bytes, context, prefill_context)


def fit(records: Sequence[tuple[StepCost, float]]) -> tuple[StepCost, dict[str, float]]:
    """Least squares of the relative error, with costs at least 0 -> costs, error on held-out steps.

    Every fourth record is held out. Steps that were disturbed (three times slower or faster
    than fitted) are left out of the fit, and counted.
    """
    if len(records) < 40:
        raise InvalidConfig(f"{len(records)} steps are too few to fit costs to: measure for longer")
    things = np.array([msgspec.structs.astuple(thing) for thing, _ in records], np.float64)
    seconds = np.array([each for _, each in records])
    held = np.arange(len(records)) % 4 == 3
    keep = ~held
    for _ in range(3):
        costs = _nonnegative(things[keep] / seconds[keep, None])
        ratio = seconds / np.maximum(things @ costs, 1e-12)
        keep = ~held & (ratio < _OUTLIER) & (ratio > 1 / _OUTLIER)
    off = np.abs(1 / ratio[held] - 1)
    error = {
        "median_relative": float(np.median(off)),
        "p90_relative": float(np.quantile(off, 0.9)),
        "total_relative": float((things[held] @ costs).sum() / seconds[held].sum() - 1),
        "disturbed": float(((ratio >= _OUTLIER) | (ratio <= 1 / _OUTLIER)).mean()),
    }
    return StepCost(*costs.tolist()), error


def _nonnegative(rows: np.ndarray) -> np.ndarray:
    """x >= 0 with rows @ x near 1, by coordinate descent on the normal equations."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    normal = (rows / scale).T @ (rows / scale)
    target = (rows / scale).sum(axis=0)
    x = np.zeros(rows.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for i in range(len(x)):
            if normal[i, i] > 0:
                x[i] = max(0.0, x[i] + (target[i] - normal[i] @ x) / normal[i, i])
        if np.abs(x - before).max() <= 1e-9 * np.abs(x).max():
            break
    unscaled: np.ndarray = x / scale
    return unscaled


def guess(
    *,
    weights_bytes: int,
    parameters: int,
    token_bytes: int,
    hidden: int,
    layers: int,
    itemsize: int,
    bandwidth: float,
    flops: float,
) -> CostModel:
    """A cost model from bytes and arithmetic alone.

    parameters: of the matrices every token passes. token_bytes: of one token's KV. itemsize: bytes
    of an adapter's weight. bandwidth: bytes per second read; flops: operations per second. Both are
    taken at 70 %, which well-made kernels reach.
    """
    bandwidth, flops = 0.7 * bandwidth, 0.7 * flops
    step = StepCost(
        step=weights_bytes / bandwidth + 5e-4,
        decode_rows=2 * parameters / flops + 2e-5,  # and Python's share
        prefill_tokens=2 * parameters / flops,
        adapter_bytes=1 / bandwidth,
        adapter_work=2 / itemsize / flops,
        context_read=token_bytes / bandwidth,
        prefill_context=4 * hidden * layers / flops,
    )
    return CostModel(step, load_seconds=5e-3, load_bandwidth=1e9, weights_bytes=weights_bytes)
