"""`chiliad bench` and `chiliad plan`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chiliad.cli.options import (
    engine_config,
    engine_options,
    folders_option,
    json_option,
    model_argument,
    policy_options,
    stack,
)
from chiliad.cli.show import busy, note, print_json
from chiliad.errors import InvalidConfig

if TYPE_CHECKING:
    from chiliad.bench.replicas import Route
    from chiliad.bench.workload import Trace


@click.group()
def bench() -> None:
    """Measurements on this machine."""


@bench.command("offline")
@model_argument
@folders_option
@engine_options
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
@json_option
def bench_offline(model: str, folders: tuple[Path, ...], output: str, **options: Any) -> None:
    """Throughput and latency of the Python engine under a closed loop."""
    from chiliad.bench import offline

    names = {
        "requests", "concurrency", "input_len", "output_len", "num_adapters", "rank", "targets", "popularity",
        "alpha", "seed", "cold",
    }  # fmt: skip
    workload = offline.Workload(**{key: options[key] for key in names})
    with ExitStack() as stack:
        with busy(f"loading {model}"):
            run = stack.enter_context(offline.prepared(model, engine_config(options), workload, folders))
        with busy(f"running {workload.requests} requests, {workload.concurrency} at a time"):
            result = run()
    if output == "json":
        print_json(result.as_json())
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


_workload_options = stack(
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
@json_option
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
    with busy(f"sending {len(trace)} requests in {trace.duration:.0f} s"):
        outcomes, facts = serve.run(client, trace, options["slo"])
    if result is not None:
        import orjson

        result.write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))
    if picture is not None:
        report.plot(outcomes, facts, picture, f"{facts['model_id']}, {trace.head.trace}, {trace.rate:.2f}/s")
    if output == "json":
        print_json(facts)
    else:
        click.echo(report.as_text(facts))


@bench.command("calibrate")
@model_argument
@engine_options
@click.option("--seconds", type=click.FloatRange(min=1), default=60.0, help="How long to measure.")
@click.option("--cost", type=click.Path(path_type=Path), help="Write the cost model here.")
@json_option
def bench_calibrate(model: str, seconds: float, cost: Path | None, output: str, **options: Any) -> None:
    """Measure what steps and loads take here, for `chiliad plan`."""
    from chiliad.bench import calibrate
    from chiliad.bench.cost import default_path

    with busy(f"measuring {model} for {seconds:g} s"):
        measured = calibrate.calibrate(model, engine_config(options), seconds)
    path = cost or default_path(measured.model, measured.dtype)
    measured.save(path)
    if output == "json":
        import msgspec

        print_json(msgspec.to_builtins(measured))
    else:
        click.echo(calibrate.as_text(measured))
    note(f"written to {path}")


@click.command("plan")
@model_argument
@_workload_options
@engine_options
@policy_options
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
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Servers that share the load.")
@click.option(
    "--route",
    type=click.Choice(["adapter", "turn"]),
    default="adapter",
    help="To replicas: all of an adapter to one, or one request after the other.",
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    help="GB/s of memory, of a machine to imagine.",
)
@click.option(
    "--tflops", type=click.FloatRange(min=0, min_open=True), help="Its peak arithmetic, 1e12 operations/s."
)
@json_option
def plan_(
    model: str,
    rank: str,
    targets: str,
    cost: Path | None,
    cold: bool,
    replicas: int,
    route: Route,
    bandwidth: float | None,
    tflops: float | None,
    max_sequences: int,
    max_step_tokens: int,
    policy: str,
    output: str,
    **options: Any,
) -> None:
    """Will these adapters at this rate fit? Sizes, hit rate and latencies from a simulation.

    MODEL may also be a config.json, or a folder that holds only that.
    """
    with busy("reading the config"):
        from chiliad.bench import plan
        from chiliad.bench.cost import CostModel, default_path

    try:
        ranks = [int(part) for part in rank.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1:
        raise InvalidConfig("--rank: write ranks with commas between, e.g. 8,16,64")
    settings = engine_config(
        options, max_sequences=max_sequences, max_step_tokens=max_step_tokens, policy=policy
    )
    base = plan.Base.read(model, settings.dtype)
    if cost is not None and (bandwidth or tflops):
        raise InvalidConfig("give --cost, or --bandwidth and --tflops: both say what things cost")
    path = cost or default_path(base.name, settings.dtype)
    if bandwidth or tflops or not path.exists():
        costs = plan.machine_guess(base, settings, bandwidth and bandwidth * 1e9, tflops and tflops * 1e12)
    else:
        costs = CostModel.read(path)
    trace = _trace(options)
    with busy(f"simulating {len(trace)} requests"):
        answer = plan.plan(
            base,
            settings,
            trace,
            costs,
            ranks=ranks,
            targets=targets,
            slo=options["slo"],
            cold=cold,
            replicas=replicas,
            route=route,
        )
    if output == "json":
        print_json(answer)
    else:
        click.echo(plan.as_text(answer))


@bench.command("kernels", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench_kernels(args: tuple[str, ...]) -> None:
    """Kernels against the ceilings of this machine (cases | step; --help says more)."""
    from chiliad.bench import kernels

    raise SystemExit(kernels.main(list(args) or ["step"]))
