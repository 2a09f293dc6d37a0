"""`chiliad info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chiliad import __version__
from chiliad.cli.options import engine_options, json_option, load_llm
from chiliad.cli.show import busy, print_json, size
from chiliad.config import ENVIRONMENT, environment, home


@click.command()
@click.argument("model", required=False)
@engine_options
@json_option
def info(model: str | None, output: str, **options: Any) -> None:
    """What this machine offers; with MODEL, how its memory would be used."""
    facts = _machine(options)
    if model:
        facts |= _plan(model, options)
    if output == "json":
        print_json(facts)
        return
    for section, values in facts.items():
        click.secho(section, bold=True)
        width = max(map(len, values))
        for key, value in values.items():
            click.echo(f"  {key:<{width}}  {value}")


def _machine(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    import os
    import platform

    with busy("looking at the machine"):
        import torch

        from chiliad.kernels import load

        kernels = load(options["kernels"], options["isa"], options["threads"])
    cpu, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags" and not flags:
                known = (
                    "avx2",
                    "fma",
                    "f16c",
                    "avx512f",
                    "avx512_vnni",
                    "avx_vnni",
                    "avx512_bf16",
                    "amx_bf16",
                )
                present = set(value.split())
                flags = " ".join(flag for flag in known if flag in present)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "chiliad": {
            "version": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "home": str(home().parent),
        },
        "machine": {
            "cpu": cpu,
            "instructions": flags or "unknown",
            "usable cores": usable,
            "memory": size(memory),
        },
        "kernels": {"implementation": kernels.name, "reason": kernels.reason},
        "environment": {name: _shown(name) for name in ENVIRONMENT},
    }


def _shown(name: str) -> str:
    value = environment(name)
    return "(set)" if value and name == "CHILIAD_API_KEY" else value or "(not set)"


def _plan(model: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    llm = load_llm(model, options)
    from chiliad.engine.runner import workspace

    base, pool, layout = llm.model, llm.engine.pool, llm.engine.layout
    blocks = pool.num_pages // layout.num_layers
    return {
        "model": {
            "name": base.name,
            "family": base.info.family,
            "aliases": ", ".join(base.info.aliases) or "none",
            "fingerprint": base.info.fingerprint,
            "adaptable projections": len(base.info.sites),
            "longest sequence": llm.engine.max_model_len,
        },
        "memory plan": {
            "total": size(options["memory"]),
            "weights": f"{size(base.nbytes)} in {options['dtype']}",
            "to compute a step": size(workspace(base.arch, llm.engine.config.scheduler)),
            "pool": f"{pool.num_pages} pages of {size(layout.page_bytes)}",
            "KV alone would be": f"{blocks * layout.block_tokens} tokens",
        },
    }
