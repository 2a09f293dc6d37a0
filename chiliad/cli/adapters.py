"""`chiliad adapters`: the registry, without torch but for `check`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chiliad.cli.options import folders_option, json_option
from chiliad.cli.show import busy, note, print_json, size, table
from chiliad.config import home
from chiliad.errors import ChiliadError

if TYPE_CHECKING:
    from chiliad.adapters.registry import Entry, Registry


@click.group()
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
@folders_option
@click.option("-q", "--query", default="", help="Only names that contain this.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, help="At most this many.")
@click.option("--refused", is_flag=True, help="List the folders that could not be registered, and why.")
@json_option
def adapters_ls(folders: tuple[Path, ...], query: str, limit: int, refused: bool, output: str) -> None:
    """List adapters; with --adapters DIR, those of a server of DIR (scanned now)."""
    with _registry(folders) as registry:
        if refused:
            bad = registry.rejected()
            if output == "json":
                import msgspec

                print_json(msgspec.to_builtins(bad))
            else:
                table(["NAME", "REASON"], [[item.name, item.message] for item in bad])
            return
        for folder in folders:
            registry.scan(folder)
        entries = registry.page(limit, query=query)
        if output == "json":
            print_json([_entry_json(entry) for entry in entries])
            return
        table(
            ["NAME", "VERSION", "METHOD", "RANK", "SIZE", "BASE", "FOLDER"],
            [
                [
                    entry.adapter.name,
                    str(entry.adapter.version),
                    entry.method,
                    str(entry.max_rank or "-"),
                    size(entry.adapter.nbytes),
                    entry.base_name or "-",
                    entry.adapter.path,
                ]
                for entry in entries
            ],
        )
        if registry.count() > len(entries) and not query:
            note(f"{registry.count() - len(entries)} more: --limit")


@adapters.command("add")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Name of the adapter; the folder's by default.")
@click.option("--replace", is_flag=True, help="Make it the next version of a taken name.")
@folders_option
def adapters_add(folder: Path, name: str | None, replace: bool, folders: tuple[Path, ...]) -> None:
    """Register a PEFT folder. The files stay where they are."""
    with _registry(folders) as registry:
        version = registry.add(folder, name or folder.resolve().name, replace=replace)
    click.echo(version)


@adapters.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@folders_option
def adapters_rm(names: tuple[str, ...], folders: tuple[Path, ...]) -> None:
    """Forget adapters. The files stay where they are."""
    with _registry(folders) as registry:
        for name in names:
            for version in registry.remove(name):
                click.echo(version)


@adapters.command("show")
@click.argument("name")
@folders_option
@json_option
def adapters_show(name: str, folders: tuple[Path, ...], output: str) -> None:
    """Everything the registry knows about one adapter."""
    with _registry(folders) as registry:
        entry = registry.entry(name)
        facts = _entry_json(entry) | {
            "versions": [version.version for version in registry.versions(entry.adapter.name)],
            "aliases": sorted(registry.aliases(entry.adapter.name)),
        }
    if output == "json":
        print_json(facts)
        return
    for key, value in facts.items():
        click.echo(f"{key:<10} {value}")


@adapters.command("check")
@click.argument("paths", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="Also check that they fit this base model.")
@json_option
def adapters_check(paths: tuple[Path, ...], model: str | None, output: str) -> None:
    """Read every byte of adapter folders as a server would, and say what is wrong.

    Exit code 2 if any of them would be refused.
    """
    with busy(f"loading {model}" if model else "loading torch"):
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
                peft.adapter_format(header.config).check(header.config)
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
        print_json(results)
    else:
        for result in results:
            mark = click.style("ok", fg="green") if result["ok"] else click.style("refused", fg="red")
            click.echo(f"{mark}  {result['folder']}: {result['message']}")
    if not all(result["ok"] for result in results):
        raise SystemExit(2)
