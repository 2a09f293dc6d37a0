"""The nouns that rooms pass to each other. Plain data: no torch, no numpy, no I/O.

A request walks as `Request` -> one `Sequence` per choice (owned by the scheduler) ->
`StepPlan` -> `StepOutput` -> `Event`s. Exactly one terminal event (`Finished` or `Failed`)
ends every accepted request.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from chiliad.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Site:
    """One linear projection of the base model that an adapter may change.

    A site's index in the model's site list is its *slot*: the address that adapters, pool
    and kernels share. `name` is the Hugging Face module path, which is what PEFT keys use.
    """

    name: str  # "model.layers.0.self_attn.q_proj"
    layer: int
    in_features: int
    out_features: int
    transposed: bool = False  # Conv1D (GPT-2): PEFT writes fan_in_fan_out=true


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What an adapter must know of its base: identity and the sites it may address."""

    name: str  # served name, e.g. "SmolLM2-135M-Instruct"
    fingerprint: str  # blake2b over architecture facts and weights, hex
    family: str  # "llama", "qwen2", ...
    sites: tuple[Site, ...]
    aliases: tuple[str, ...] = ()  # other values of base_model_name_or_path that mean this base


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable adapter: a name's version points at content, content never changes."""

    name: str
    version: int
    digest: str  # hex: the identity that KV keys use; `adapters.peft.PeftFolder` says of what
    path: str  # folder with adapter_config.json and adapter_model.safetensors
    nbytes: int  # size of the tensor file on disk
    ranks: tuple[int, ...] = field(default=(), compare=False, repr=False)  # by slot; () if not known

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter with the scale that one request gives it."""

    adapter: AdapterVersion
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Field names and defaults follow the OpenAI API and vLLM.

    Raises InvalidRequest, naming the field, when a value is out of its range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: chosen token plus the k most likely
    prompt_logprobs: int | None = None  # the same for prompt tokens (echo)

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and value < inf):  # NaN is in no range
                limits = f"at least {least}" if most == inf else f"between {least} and {most}"
                raise InvalidRequest(f"{name} must be {limits}, not {value}", param=name)
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0", param="top_p")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequest(
                    f"logit_bias of token {token} must be between -100 and 100, not {bias}",
                    param="logit_bias",
                )


#: Fields of SamplingParams with their least and greatest values.
_RANGES: tuple[tuple[str, float, float], ...] = (
    *(("n", 1, inf), ("max_tokens", 1, inf), ("min_tokens", 0, inf)),
    *(("temperature", 0, inf), ("top_p", 0, 1), ("top_k", 0, inf), ("min_p", 0, 1)),
    *(("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("repetition_penalty", 0.01, 100)),
    *(("logprobs", 0, inf), ("prompt_logprobs", 0, inf)),
)


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    prompt: tuple[int, ...]  # token ids, never empty
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()  # empty: the plain base; several: composed
    arrival: float = 0.0  # seconds, engine clock
    priority: int = 0  # lower runs first
    tenant: str = ""
    cache_salt: str = ""  # isolates the prefix cache
    prefix_cache: bool = True

    @property
    def adapter_key(self) -> tuple[tuple[str, float], ...]:
        """Identity of the effective adapter: rows with equal keys share rank rows."""
        return tuple((use.adapter.digest, use.scale) for use in self.adapters)


class SequenceState(enum.Enum):
    WAITING = "waiting"  # in the queue; owns no pages
    RUNNING = "running"  # owns KV pages and holds its adapters
    FINISHED = "finished"  # owns nothing; terminal


@dataclass(slots=True)
class Work:
    """What one sequence does in one step: compute tokens [start, start + count)."""

    sequence: Any  # engine.scheduler.Sequence
    start: int  # first position computed in this step
    count: int  # number of tokens computed in this step (1 when decoding)
    sample: bool  # the last of them yields the next token


@dataclass(slots=True)
class StepPlan:
    """One step: rows grouped so that sequences of equal `adapter_key` are adjacent."""

    work: list[Work]
    num_tokens: int


@dataclass(slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(slots=True)
class StepOutput:
    """Sampled tokens, one per `Work` with `sample=True`, in plan order."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # by work index


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output of one choice. `text` is whole characters only, stop strings held back."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # first chunk only
    finish_reason: FinishReason | None = None  # set on the last chunk of this choice
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: every choice has ended."""

    request_id: str
    usage: Usage
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the request ended by an error (cancelled requests end with Finished, "abort")."""

    request_id: str
    error: Exception


Event = Chunk | Finished | Failed
