"""Options that several verbs share, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chiliad.cli.show import busy, note
from chiliad.config import EngineConfig, KernelConfig, SchedulerConfig, parse_bytes
from chiliad.errors import InvalidConfig

if TYPE_CHECKING:
    from chiliad.adapters.registry import Registry
    from chiliad.engine.llm import LLM

F = TypeVar("F", bound=Callable[..., Any])


class Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except InvalidConfig as error:
            self.fail(error.message, param, context)


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_argument = click.argument("model", metavar="MODEL")
json_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the listing."
)
engine_options = stack(
    click.option("--memory", type=Bytes(), default="4GB", help="Memory for weights, KV cache and adapters."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "int8", "int4"]),
        default="bfloat16",
        help="Type of the base weights.",
    ),
    click.option(
        "--adapter-dtype",
        type=click.Choice(["float32", "bfloat16", "int8"]),
        help="Type of adapters in memory; by default bfloat16 (float32 beside a float32 base).",
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
folders_option = click.option(
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


policy_options = stack(
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
sampling_options = stack(
    click.option("--max-tokens", type=click.IntRange(min=1), default=256, help="Longest answer."),
    click.option(
        "--temperature", type=click.FloatRange(0, 2), default=0.0, help="0: always the likeliest token."
    ),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Nucleus."),
    click.option("--seed", type=int, help="Repeatable sampling."),
)


def engine_config(options: dict[str, Any], **scheduler: Any) -> EngineConfig:
    return EngineConfig(
        memory=options["memory"],
        dtype=options["dtype"],
        adapter_dtype=options["adapter_dtype"],
        max_model_len=options["max_model_len"],
        kernel=KernelConfig(options["kernels"], options["isa"], options["threads"]),
        scheduler=SchedulerConfig(**scheduler),
        adapter_share=options.get("adapter_share"),
        swap=options.get("swap", 0),
    )


def load_llm(model: str, options: dict[str, Any], folders: tuple[Path, ...] = ()) -> LLM:
    with busy(f"loading {model}"):
        from chiliad.engine.llm import LLM

        config = engine_config(options)
        llm = LLM(
            model,
            memory=config.memory,
            dtype=config.dtype,
            adapter_dtype=config.adapter_dtype,
            max_model_len=config.max_model_len,
            kernel=config.kernel,
        )
        for folder in folders:
            report_scan(llm.registry, folder)
    return llm


def report_scan(registry: Registry, folder: Path) -> None:
    report = registry.scan(folder)
    new = f", {len(report.added)} new" if report.added else ""
    total = len(report.added) + len(report.replaced) + report.unchanged
    note(f"adapters  {total} in {folder}{new}")
    for bad in report.rejected[:10]:
        note(f"  refused {bad.name}: {bad.message}")
    if len(report.rejected) > 10:
        note(f"  and {len(report.rejected) - 10} more: chiliad adapters ls --refused --adapters {folder}")
