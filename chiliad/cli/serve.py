"""`chiliad serve`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chiliad.cli.options import (
    Bytes,
    engine_config,
    engine_options,
    folders_option,
    model_argument,
    policy_options,
    report_scan,
)
from chiliad.cli.show import busy, note, size
from chiliad.config import EngineConfig, ServerConfig, home

if TYPE_CHECKING:
    from chiliad.engine.stream import AsyncEngine


@click.command()
@model_argument
@folders_option
@engine_options
@click.option("--host", default="127.0.0.1", help="Address to listen on. Other than loopback needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0: any free port.")
@click.option(
    "--api-key",
    multiple=True,
    envvar="CHILIAD_API_KEY",
    show_envvar=True,
    help="Key that clients must send. May be given several times; the variable is split at commas.",
)
@click.option("--name", help="Name the base model is served under; its own by default.")
@click.option("--uploads/--no-uploads", default=True, help="Whether clients may upload adapters.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    help="Seconds that running requests get after SIGTERM.",
)
@click.option(
    "--swap",
    type=Bytes(),
    default="0",
    help="Memory beyond --memory, where preempted requests keep their KV cache; 0: compute it again.",
)
@click.option("--max-sequences", type=click.IntRange(min=1), default=256, help="Sequences that run at once.")
@click.option("--max-step-tokens", type=click.IntRange(min=16), default=512, help="Token budget of one step.")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=4096,
    help="Requests that wait at most; the next ones get 429 with Retry-After.",
)
@policy_options
def serve(
    model: str,
    folders: tuple[Path, ...],
    host: str,
    port: int,
    api_key: tuple[str, ...],
    name: str | None,
    uploads: bool,
    drain_timeout: float,
    max_sequences: int,
    max_step_tokens: int,
    max_waiting: int,
    policy: str,
    **options: Any,
) -> None:
    """Answer the OpenAI API over HTTP."""
    keys = tuple(part.strip() for key in api_key for part in key.split(",") if part.strip())
    place = home(folders)
    config = ServerConfig(
        host=host,
        port=port,
        api_keys=keys,
        model_name=name or "",
        adapter_dirs=folders,
        uploads=place / "uploads" if uploads else None,
        drain_timeout=drain_timeout,
    )
    from chiliad.serve import server

    with server.bind(config) as sock:  # before the model is loaded: a taken port should not cost a minute
        with busy(f"loading {model}"):
            settings = engine_config(
                options,
                max_sequences=max_sequences,
                max_step_tokens=max_step_tokens,
                max_waiting=max_waiting,
                policy=policy,
            )
            engine = _async_engine(model, settings, place / "registry.sqlite", folders)
        _announce(engine, config, sock.getsockname()[1])
        # What is loaded now stays: full collections that walk it would stop everybody for 0.1 s.
        gc.collect()
        gc.freeze()
        try:
            drained = server.serve(engine, config, sock)
        finally:
            gc.unfreeze()
        if not drained:
            raise SystemExit(1)


def _async_engine(
    model: str, settings: EngineConfig, registry_file: Path, folders: tuple[Path, ...]
) -> AsyncEngine:
    from chiliad.adapters.registry import Registry
    from chiliad.engine.engine import Engine
    from chiliad.engine.stream import AsyncEngine
    from chiliad.kernels import load
    from chiliad.models import load_model

    kernels = load(settings.kernel.kernels, settings.kernel.isa, settings.kernel.threads)
    base = load_model(model, kernels, settings.dtype, settings.max_model_len)
    registry = Registry(registry_file, base.info)
    for folder in folders:
        report_scan(registry, folder)
    return AsyncEngine(lambda sink: Engine(base, kernels, registry, settings, sink))


def _announce(engine: AsyncEngine, config: ServerConfig, port: int) -> None:
    inner = engine.engine
    base, kernels, settings = inner.model, inner.kernels, inner.config
    note(
        f"model     {config.model_name or base.name}, {base.info.family}, "
        f"{size(base.nbytes)} in {settings.dtype}"
    )
    note(f"kernels   {kernels.name}: {kernels.reason}")
    note(
        f"memory    {size(settings.memory)}: {inner.pool.num_pages} pages of "
        f"{size(inner.layout.page_bytes)} for KV cache and adapters"
    )
    note(f"adapters  {engine.registry.count()} registered")
    host = f"[{config.host}]" if ":" in config.host else config.host
    note(f"listening http://{host}:{port}/v1{'' if config.api_keys else '  (no key: this machine only)'}")
