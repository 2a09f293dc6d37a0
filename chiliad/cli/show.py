"""What verbs print: data on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


def print_json(data: Any) -> None:
    import orjson

    click.echo(orjson.dumps(data, option=orjson.OPT_INDENT_2))


def note(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Say on stderr what takes long: a spinner on a terminal, a line elsewhere."""
    if not sys.stderr.isatty():
        note(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def table(columns: list[str], rows: list[list[str]]) -> None:
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


def size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def complain(error: Exception) -> None:
    click.secho(f"error: {error}", fg="red", err=True)
