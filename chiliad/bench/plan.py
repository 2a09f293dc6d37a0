"""Will these adapters at this rate fit? Sizes by arithmetic, the rest by simulation.

Reads a model's config, never its weights: a folder with a config.json alone (or the file) will do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from chiliad.bench.cost import CostModel, guess
from chiliad.bench.replicas import Route, simulate_replicas
from chiliad.bench.simulate import AdapterSize, Geometry
from chiliad.bench.workload import Trace, expected_shares
from chiliad.config import DType, EngineConfig
from chiliad.core import Site
from chiliad.engine.runner import workspace
from chiliad.errors import InvalidConfig
from chiliad.kernels import load
from chiliad.kernels.cases import BYTES_PER_WEIGHT
from chiliad.memory.arena import pack_rows
from chiliad.memory.kv import kv_layout
from chiliad.models import Arch, open_source
from chiliad.models.layers import Linear, Norm
from chiliad.models.weights import blueprint, head_dtype, table_dtype

_FITS = 0.99  # attainment from which the answer is yes


@dataclass(frozen=True, slots=True)
class Base:
    """What planning needs to know of a base model."""

    name: str
    arch: Arch
    sites: tuple[Site, ...]
    weights_bytes: int
    parameters: int  # of the matrices that every token passes

    @staticmethod
    def read(ref: str, dtype: DType) -> Base:
        """ref: as for `load_model`, or a config.json. Raises InvalidModel."""
        name, config = _config(ref)
        arch = Arch.from_config(config)
        plan = blueprint(arch)
        nbytes = parameters = 0.0
        for part in plan.parts().values():
            if isinstance(part, Linear):
                count, kind = part.in_features * sum(part.sizes), head_dtype(dtype) if part.head else dtype
                nbytes += count * BYTES_PER_WEIGHT[kind]
                parameters += count
            elif isinstance(part, Norm):
                nbytes += 4 * part.size
            else:
                nbytes += part.rows * part.width * table_dtype(dtype).itemsize
        ropes = len({rope for rope in arch.ropes if rope is not None})
        nbytes += ropes * arch.max_positions * arch.head_dim * 4
        return Base(name, arch, tuple(plan.sites), int(nbytes), int(parameters))


def _config(ref: str) -> tuple[str, Mapping[str, object]]:
    path = Path(ref).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json":
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"cannot read {file}: {error}", param="model") from error
        if not isinstance(config, dict):
            raise InvalidConfig(f"{file} must hold a JSON object", param="model")
        return file.resolve().parent.name, config
    source = open_source(ref)
    return source.name, source.config


def geometry(
    base: Base, config: EngineConfig, ranks: Sequence[int], targets: str, weights_bytes: int = 0
) -> Geometry:
    """The pool that the engine would have, and the pages of adapters of these ranks.

    targets: projections by the end of their names, with commas between, or "all-linear".
    weights_bytes: where it was measured. Raises InvalidConfig when nothing would fit.
    """
    arch, dtype = base.arch, table_dtype(config.dtype)
    rows = getattr(torch, config.adapter_dtype) if config.adapter_dtype else dtype
    layout = kv_layout(
        num_layers=arch.layers,
        num_kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        dtype=dtype,
        row_bytes=[n * rows.itemsize for site in base.sites for n in (site.in_features, site.out_features)],
    )
    weights = weights_bytes or base.weights_bytes
    num_pages = (config.memory - weights - workspace(arch, config.scheduler)) // layout.page_bytes
    if num_pages < arch.layers:
        raise InvalidConfig(
            f"memory of {_mb(config.memory)} leaves no pool beside {_mb(weights)} of weights: give more "
            "--memory or a smaller --dtype",
            param="memory",
        )
    wanted = _targets(base.sites, targets)
    limit = min(config.max_model_len or arch.max_positions, arch.max_positions)
    sizes = tuple(_size_of(wanted, rank, rows, layout.page_bytes) for rank in ranks)
    return Geometry(num_pages, layout.page_bytes, arch.layers, layout.block_tokens, limit, sizes)


def _targets(sites: Sequence[Site], targets: str) -> list[Site]:
    if targets == "all-linear":
        return list(sites)
    names = [part.strip() for part in targets.split(",") if part.strip()]
    found = [site for site in sites if any(site.name == n or site.name.endswith(f".{n}") for n in names)]
    if not found:
        known = sorted({site.name.rsplit(".", 1)[-1] for site in sites})
        raise InvalidConfig(
            f"no projection is called {targets}; there are {', '.join(known)}", param="targets"
        )
    return found


def _size_of(sites: Sequence[Site], rank: int, dtype: torch.dtype, page_bytes: int) -> AdapterSize:
    runs = [(rank, n * dtype.itemsize) for site in sites for n in (site.in_features, site.out_features)]
    weights = sum(rank * (site.in_features + site.out_features) for site in sites)
    return AdapterSize(pack_rows(runs, page_bytes).num_pages, 2 * weights)


def machine_guess(
    base: Base, config: EngineConfig, bandwidth: float | None = None, flops: float | None = None
) -> CostModel:
    """A cost model from memory bandwidth (bytes a second) and peak arithmetic (operations a second).

    What is not given is measured on this machine.
    """
    machine = "a machine of the speed given" if bandwidth or flops else ""
    if not bandwidth or not flops:
        kernels = load(config.kernel.kernels, config.kernel.isa, config.kernel.threads)
        here = 1e10, 1e11  # a small CPU's; the C++ kernels can measure theirs
        if hasattr(kernels, "read_bandwidth") and hasattr(kernels, "multiply_rate"):
            dtype = "float32" if config.dtype == "float32" else "bfloat16"
            here = kernels.read_bandwidth(), kernels.multiply_rate(dtype)
        bandwidth, flops = bandwidth or here[0], flops or here[1]
    arch, itemsize = base.arch, table_dtype(config.dtype).itemsize
    costs = guess(
        weights_bytes=base.weights_bytes,
        parameters=base.parameters,
        token_bytes=2 * arch.layers * arch.kv_heads * arch.head_dim * itemsize,
        hidden=arch.hidden,
        layers=arch.layers,
        itemsize=itemsize,
        bandwidth=bandwidth,
        flops=flops,
    )
    return msgspec.structs.replace(costs, machine=machine)


def plan(
    base: Base,
    config: EngineConfig,
    trace: Trace,
    cost: CostModel,
    *,
    ranks: Sequence[int] = (16,),
    targets: str = "q_proj,k_proj,v_proj,o_proj",
    slo: float = 6.0,
    cold: bool = False,
    replicas: int = 1,
    route: Route = "adapter",
) -> dict[str, Any]:
    """Sizes, and what the simulator says of this load. cold: nothing is in memory at first.

    replicas and route: of servers that share it, see `replicas.py`.
    """
    known = cost.weights_bytes if cost.model == base.name and cost.dtype == config.dtype else 0
    house = geometry(base, config, ranks, targets, known)
    head = trace.head
    rates: np.ndarray = np.zeros(0)
    popularity = head.parameters.get("popularity")
    if head.adapters and popularity is not None and head.trace != "servegen":  # its clients differ
        rates = expected_shares(popularity, head.adapters) * trace.rate
    run = simulate_replicas(
        trace,
        house,
        cost,
        config.scheduler,
        replicas=replicas,
        route=route,
        adapter_share=config.adapter_share,
        warm=None if cold else rates,
    )
    result = run.report(trace, slo)
    server = result["server"]
    pages = float(np.mean([size.pages for size in house.adapters]))
    minute = float((1 - np.exp(-rates * 60)).sum())
    sizes = {
        "weights_bytes": known or base.weights_bytes,
        "pool_bytes": house.num_pages * house.page_bytes,
        "pool_pages": house.num_pages,
        "page_bytes": house.page_bytes,
        "kv_tokens_without_adapters": house.kv_tokens,
        "kv_bytes_per_token": house.page_bytes * house.num_layers / house.block_tokens,
        "adapter_file_bytes": float(np.mean([size.nbytes for size in house.adapters])),
        "adapter_pages": pages,
        "adapter_pool_bytes": pages * house.page_bytes,
        "adapter_as_kv_tokens": pages / house.num_layers * house.block_tokens,
        "adapters_that_fit": int(house.num_pages / pages),
        "adapters": head.adapters,
        "adapters_used_within_a_minute": minute,  # by all replicas together
        "disk_bytes": head.adapters * float(np.mean([size.nbytes for size in house.adapters])),
    }
    return {
        "model": base.name,
        "replicas": replicas,
        "fits": result["slo_attainment"] >= _FITS,
        "sizes": sizes,
        "prediction": result,
        "bottleneck": _bottleneck(result, server),
        "cost": {"fitted": cost.records > 0, "machine": cost.machine, "error": cost.error},
    }


def _bottleneck(result: dict[str, Any], server: dict[str, Any]) -> str:
    """One word on what gives out first."""
    if result["slo_attainment"] >= _FITS:
        return "none"
    if server["utilisation"] > 0.95:
        return "compute"
    hits = server["adapter_hit_rate"]
    return "adapter loads" if hits is not None and hits < 0.9 else "memory"


def as_text(answer: dict[str, Any]) -> str:
    sizes, result = answer["sizes"], answer["prediction"]
    server = result["server"]

    def row(name: str, value: str, note: str = "") -> str:
        return f"{name:<26}{value:>14}  {note}".rstrip()

    hit = server["adapter_hit_rate"]
    verdict = "yes" if answer["fits"] else f"no: {answer['bottleneck']} gives out first"
    lines = [
        f"{answer['model']}: will it fit?  {verdict}",
        *([f"on {answer['replicas']} replicas, each of them:"] if answer["replicas"] > 1 else []),
        "",
        row("weights", _mb(sizes["weights_bytes"])),
        row("pool", _mb(sizes["pool_bytes"]), f"{sizes['pool_pages']} pages of {sizes['page_bytes']} bytes"),
        row(
            "KV cache alone",
            f"{sizes['kv_tokens_without_adapters']} tokens",
            f"{sizes['kv_bytes_per_token']:.0f} bytes each",
        ),
        row(
            "one adapter",
            _mb(sizes["adapter_pool_bytes"]),
            f"{sizes['adapter_pages']:.0f} pages, the room of {sizes['adapter_as_kv_tokens']:.0f} KV tokens; "
            f"file {_mb(sizes['adapter_file_bytes'])}",
        ),
        row("adapters that fit", str(sizes["adapters_that_fit"]), "with no KV cache at all"),
        row("adapters", str(sizes["adapters"]), f"{_mb(sizes['disk_bytes'])} on disk"),
    ]
    if sizes["adapters"]:
        minute = sizes["adapters_used_within_a_minute"]
        lines.append(row("used within a minute", f"{minute:.0f}", _mb(minute * sizes["adapter_pool_bytes"])))
    lines += [
        "",
        row("adapter hit rate", "-" if hit is None else f"{hit:.1%}", f"{server['adapter_loads']} loads"),
        row(
            "time to first token", f"{result['median_ttft_ms']:.0f} ms", f"p99 {result['p99_ttft_ms']:.0f} ms"
        ),
        row("between tokens", f"{result['median_itl_ms']:.1f} ms", f"p99 {result['p99_itl_ms']:.1f} ms"),
        row(f"first token in {result['slo_seconds']:g} s", f"{result['slo_attainment']:.1%}"),
        row(
            "output throughput",
            f"{result['output_throughput']:.1f}/s",
            f"of {result['workload']['rate']:.2f} requests/s",
        ),
        row(
            "busy",
            f"{server['utilisation']:.0%}",
            f"{server['mean_distinct_adapters']:.1f} adapters per step, {server['preemptions']} preemptions",
        ),
        "",
    ]
    error = answer["cost"]["error"].get("median_relative", 0.0)
    lines.append(
        f"simulated from costs fitted to {answer['cost']['machine']} (median error of a step {error:.0%})"
        if answer["cost"]["fitted"]
        else f"simulated from guessed costs of {answer['cost']['machine'] or 'this machine'}"
        + ("" if answer["cost"]["machine"] else ": `chiliad bench calibrate` measures them")
    )
    return "\n".join(lines)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"
