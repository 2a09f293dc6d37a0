"""`chiliad generate` and `chiliad chat`: the engine in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chiliad.cli.options import (
    engine_options,
    folders_option,
    json_option,
    load_llm,
    model_argument,
    sampling_options,
)
from chiliad.cli.show import busy, complain, note, print_json
from chiliad.errors import ChiliadError, InvalidRequest

if TYPE_CHECKING:
    from chiliad.engine.llm import LLM


@click.command()
@model_argument
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--adapter", help="Adapter that answers: a name (with --adapters) or a folder.")
@folders_option
@engine_options
@sampling_options
@click.option(
    "--raw", is_flag=True, help="Continue the text itself instead of answering it as a chat message."
)
@json_option
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
    llm = load_llm(model, options, folders)
    name = _adapter_name(llm, adapter)
    with busy(f"answering {len(texts)} prompt{'s' if len(texts) > 1 else ''}"):
        if raw:
            outputs = llm.generate(texts, params, name)
        else:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], params, name)
    if output == "json":
        print_json(
            [
                {
                    "prompt": text,
                    "text": out.choices[0].text,
                    "adapter": name,
                    "finish_reason": out.choices[0].finish_reason,
                    "error": None if out.error is None else str(out.error),
                    "prompt_tokens": out.usage.prompt_tokens,
                    "completion_tokens": out.usage.completion_tokens,
                }
                for text, out in zip(texts, outputs, strict=True)
            ]
        )
    else:
        for text, out in zip(texts, outputs, strict=True):
            if len(texts) > 1:
                click.secho(f"> {text}", bold=True)
            if out.error is not None:
                complain(out.error)
            else:
                click.echo(f"{text if raw else ''}{out.text}")
    if any(out.error is not None for out in outputs):
        sys.exit(1)


def _adapter_name(llm: LLM, adapter: str | None) -> str | None:
    """The registered name of --adapter, which may also be a folder on this machine."""
    if adapter is None:
        return None
    folder = Path(adapter)
    if (folder / "adapter_config.json").is_file():
        return llm.engine.add_adapter(folder, folder.resolve().name, replace=True).name
    return llm.registry.resolve(adapter).name


@click.command()
@model_argument
@click.option("--adapter", help="Adapter that answers: a name (with --adapters) or a folder.")
@folders_option
@engine_options
@sampling_options
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
    llm = load_llm(model, options, folders)
    name = _adapter_name(llm, adapter)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    note("/adapter NAME  /base  /clear  ctrl-c: stop an answer  ctrl-d: leave")
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
                complain(error)
        elif verb == "/base":
            name = None
        elif verb == "/clear":
            messages = list(start)
        elif verb.startswith("/"):
            note("there are /adapter NAME, /base and /clear")
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
                complain(error)
                messages.pop()
                continue
            click.echo()
            messages.append({"role": "assistant", "content": answer})
