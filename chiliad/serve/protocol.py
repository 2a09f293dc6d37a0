"""Request bodies of the OpenAI API, with vLLM's extras -> `core.Request`.

The rule for fields: a bad value is refused and named; a field we know but do not do is refused
by name unless it asks for what happens anyway; a field nobody has heard of is ignored. `null`
means that the field is absent, as in OpenAI's own clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
import orjson
from msgspec import Meta

from chiliad.core import AdapterUse, AdapterVersion, BaseInfo, Request, SamplingParams
from chiliad.errors import InvalidRequest, UnsupportedField

log = logging.getLogger("chiliad.serve")

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_ADAPTERS = 8  # composed in one request
MAX_LOGIT_BIAS = 1024
INT64 = 2**63 - 1

S = TypeVar("S", bound=msgspec.Struct)


class Tokens(Protocol):
    """What translation asks of `models.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...
    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: Any = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str: ...


# -- bodies ----------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = True  # OpenAI's padding against traffic analysis: accepted, not done


class AdapterChoice(msgspec.Struct):
    id: str
    scale: Annotated[float, Meta(ge=-1000, le=1000)] = 1.0


class GenerationBody(msgspec.Struct, kw_only=True):
    """What both completion endpoints share."""

    model: str = ""
    adapter: str | AdapterChoice | list[AdapterChoice] | None = None
    adapter_id: str | None = None
    adapters: list[AdapterChoice] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=INT64)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=INT64)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=2)] = 1.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=-INT64, le=INT64)] | None = None
    n: Annotated[int, Meta(ge=1)] = 1
    stop: str | list[str] = []
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    return_token_ids: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, Meta(max_length=256)] = ""
    prefix_cache: bool = True  # ours: false neither reads nor fills the prefix cache


class Part(msgspec.Struct):
    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str | None = None


class Message(msgspec.Struct):
    role: Annotated[str, Meta(extra_json_schema={"enum": ["system", "developer", "user", "assistant"]})]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=INT64)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    add_special_tokens: bool = True


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: `prompt` or `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    model: str = ""
    tokens: list[int]


class LoadAdapterBody(msgspec.Struct, kw_only=True):
    """POST /v1/load_lora_adapter, as in vLLM."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_path: Annotated[str, Meta(min_length=1)]
    load_inplace: bool = False


class UnloadAdapterBody(msgspec.Struct, kw_only=True):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: Annotated[str, Meta(min_length=1)]


class AddAdapterBody(msgspec.Struct, kw_only=True):
    """POST /v1/adapters with a JSON body: add a folder that lies in an --adapters folder."""

    name: Annotated[str, Meta(min_length=1)]
    folder: str | None = None  # name of the sub-folder; default: `name`
    replace: bool = False


#: Fields we know and do not do, with the values that ask for nothing. Of both endpoints:
_REFUSED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "early_stopping": (False,),
    "extra_args": ({},),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_REFUSED_CHAT = _REFUSED | {
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_COMPLETION = _REFUSED | {"best_of": (1,), "suffix": ("",)}

#: Fields that carry no instruction: labels for the caller's own bookkeeping, and cache hints.
_LABELS = {"metadata", "user", "safety_identifier", "prompt_cache_key", "request_id"}


def parse_json(raw: bytes) -> dict[str, Any]:
    """JSON bytes -> an object without its null fields."""
    try:
        body = orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def convert(body: Mapping[str, Any], kind: type[S], refused: Mapping[str, tuple[object, ...]] = {}) -> S:
    """A JSON object -> `kind`. Raises InvalidRequest or UnsupportedField, naming the field."""
    fields = kind.__struct_fields__
    for key in body.keys() - set(fields) - _LABELS:
        if key not in refused:
            log.debug("ignoring unknown field %r", key)
        elif body[key] not in refused[key]:
            raise UnsupportedField(f"{key} is not supported by this server: leave it out", param=key)
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.removesuffix("`").lstrip(".")
        if not param and "field `" in message:  # "Object missing required field `messages`"
            param = message.split("`")[1]
        raise InvalidRequest(f"{param}: {message}" if param else message, param=param or None) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def parse_chat(raw: bytes) -> ChatBody:
    return convert(parse_json(raw), ChatBody, _REFUSED_CHAT)


def parse_completion(raw: bytes) -> CompletionBody:
    return convert(parse_json(raw), CompletionBody, _REFUSED_COMPLETION)


# -- who answers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Names:
    """Resolves `model=`: the base (or an alias), an adapter, or `base:adapter`."""

    served: str  # the name the base is served under
    base: BaseInfo
    find: Callable[[str], AdapterVersion]  # Registry.resolve: raises ModelNotFound

    def is_base(self, name: str) -> bool:
        return name in ("", self.served, self.base.name) or name in self.base.aliases

    def resolve(self, name: str) -> AdapterVersion | None:
        """None is the plain base. Raises ModelNotFound. A name is looked up, never a path."""
        if self.is_base(name):
            return None
        for base in (self.served, self.base.name, *self.base.aliases):
            if name.startswith(f"{base}:"):
                return self.find(name[len(base) + 1 :])
        return self.find(name)

    def uses(self, body: GenerationBody, header: str = "") -> tuple[AdapterUse, ...]:
        """The adapters of a request: `model`, or one of our extensions when `model` is the base."""
        named = self.resolve(body.model)
        asked: list[tuple[str, list[AdapterChoice]]] = []
        if body.adapters is not None:
            asked.append(("adapters", body.adapters))
        if body.adapter is not None:
            asked.append(("adapter", _choices(body.adapter)))
        if body.adapter_id:
            asked.append(("adapter_id", [AdapterChoice(body.adapter_id)]))
        if header:
            asked.append(("X-Adapter", [AdapterChoice(header)]))
        if not asked:
            return () if named is None else (AdapterUse(named),)
        if len(asked) > 1 or named is not None:
            fields = [name for name, _ in asked] if named is None else ["model", asked[0][0]]
            raise InvalidRequest(f"{' and '.join(fields)} both name an adapter: use one", param=asked[0][0])
        param, choices = asked[0]
        if len(choices) > MAX_ADAPTERS:
            raise InvalidRequest(f"at most {MAX_ADAPTERS} adapters in one request", param=param)
        return tuple(AdapterUse(self.find(choice.id), choice.scale) for choice in choices)


def _choices(adapter: str | AdapterChoice | list[AdapterChoice]) -> list[AdapterChoice]:
    if isinstance(adapter, str):
        return [AdapterChoice(adapter)]
    return [adapter] if isinstance(adapter, AdapterChoice) else adapter


# -- what is asked -----------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """One HTTP request: a `core.Request` per prompt, and how the answer must look."""

    id: str
    kind: Literal["chat", "completion"]
    model: str  # as the client wrote it
    created: int
    requests: list[Request]
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token and the k most likely
    return_token_ids: bool = False
    echo: list[str] = field(default_factory=list)  # prompt texts to repeat; empty: no echo
    discard_output: bool = False  # echo with max_tokens=0: only the prompt is wanted

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.requests[0].params.n


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a request brings beside its body."""

    id: str  # unique, becomes the completion id
    created: int
    adapters: tuple[AdapterUse, ...]
    tenant: str = ""  # who asks, when there is more than one key
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    max_model_len: int
    max_choices: int


def chat_job(body: ChatBody, envelope: Envelope, tokens: Tokens, limits: Limits) -> Job:
    """Translate a chat request. CPU-bound (template, tokenizer)."""
    if body.max_tokens == 0:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    text = render_chat(body, tokens)
    prompt = tokens.encode(text, add_special=body.add_special_tokens)
    room = max(1, limits.max_model_len - len(prompt))  # the engine judges prompts that are too long
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(body, room if asked is None else asked, logprobs, tokens)
    return _job(body, "chat", envelope, [prompt], params, limits)


def completion_job(body: CompletionBody, envelope: Envelope, tokens: Tokens, limits: Limits) -> Job:
    """Translate a completion request with one prompt or many. CPU-bound (tokenizer)."""
    prompts = _prompts(body, tokens, limits)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens must be at least 1 (0 only with echo: true)", param="max_tokens")
    params = _params(body, max(1, max_tokens), body.logprobs, tokens)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=body.logprobs)
    job = _job(body, "completion", envelope, [ids for ids, _ in prompts], params, limits)
    job.discard_output = max_tokens == 0
    if body.echo:
        job.echo = [tokens.decode(ids, skip_special=False) if text is None else text for ids, text in prompts]
    return job


def render_chat(body: ChatBody | TokenizeBody, tokens: Tokens) -> str:
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages or ())]
    for key in body.chat_template_kwargs.keys() & _TEMPLATE_RESERVED:
        raise InvalidRequest(f"chat_template_kwargs may not set {key}", param="chat_template_kwargs")
    return tokens.chat(
        messages, add_generation_prompt=body.add_generation_prompt, **body.chat_template_kwargs
    )


_TEMPLATE_RESERVED = {"self", "name", "messages", "tools", "documents", "add_generation_prompt"}


def _message(message: Message, at: str) -> dict[str, Any]:
    """One message as chat templates see it."""
    if message.role not in ("system", "developer", "user", "assistant"):
        raise UnsupportedField(
            f"{at}.role: {message.role!r} is not supported: use system, user or assistant",
            param=f"{at}.role",
        )
    if message.tool_calls or message.function_call:
        raise UnsupportedField(f"{at}: tool calls are not supported by this server", param=at)
    content: str | list[dict[str, str]]
    if message.content is None:
        raise InvalidRequest(f"{at}.content is missing", param=f"{at}.content")
    if isinstance(message.content, str):
        content = message.content
    else:
        content = []
        for j, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                where = f"{at}.content[{j}]"
                raise UnsupportedField(f"{where}: {part.type!r} is not supported, only text", param=where)
            content.append({"type": "text", "text": part.text})
    rendered: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content,
    }
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _prompts(body: CompletionBody, tokens: Tokens, limits: Limits) -> list[tuple[list[int], str | None]]:
    """(token ids, text or None) of every prompt."""
    prompt = body.prompt
    items: list[Any] = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not items:
        raise InvalidRequest("prompt is empty", param="prompt")
    if len(items) * body.n > limits.max_choices:
        raise InvalidRequest(f"at most {limits.max_choices} choices (prompts x n) in one request", param="n")
    result: list[tuple[list[int], str | None]] = []
    for i, item in enumerate(items):
        at = "prompt" if len(items) == 1 else f"prompt[{i}]"
        if isinstance(item, str):
            result.append((tokens.encode(item, add_special=body.add_special_tokens), item))
        elif _is_ids(item):
            result.append((check_ids(item, tokens, at), None))
        else:
            raise InvalidRequest(f"{at}: write a string or a list of token ids", param="prompt")
    return result


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def check_ids(ids: Iterable[int], tokens: Tokens, at: str) -> list[int]:
    ids = list(ids)
    for token in ids:
        if not 0 <= token < tokens.vocab_size:
            raise InvalidRequest(f"{at}: token id {token} is outside [0, {tokens.vocab_size})", param=at)
    return ids


def _params(body: GenerationBody, max_tokens: int, logprobs: int | None, tokens: Tokens) -> SamplingParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stop) > MAX_STOPS or not all(stop):
        raise InvalidRequest(f"stop: at most {MAX_STOPS} strings, none of them empty", param="stop")
    if body.min_tokens > max_tokens:
        raise InvalidRequest("min_tokens is larger than max_tokens", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),  # vLLM writes "off" as -1
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, tokens),
        seed=body.seed,
        n=body.n,
        stop=tuple(stop),
        stop_token_ids=tuple(check_ids(body.stop_token_ids, tokens, "stop_token_ids")),
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def _logit_bias(bias: dict[str, float], tokens: Tokens) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
    try:
        ids = {int(key): value for key, value in bias.items()}
    except ValueError:
        raise InvalidRequest("logit_bias: keys are token ids", param="logit_bias") from None
    check_ids(ids, tokens, "logit_bias")
    return ids


def _job(
    body: GenerationBody,
    kind: Literal["chat", "completion"],
    envelope: Envelope,
    prompts: list[list[int]],
    params: SamplingParams,
    limits: Limits,
) -> Job:
    if not all(prompts):
        raise InvalidRequest("the prompt has no tokens", param="messages" if kind == "chat" else "prompt")
    if len(prompts) * params.n > limits.max_choices:
        raise InvalidRequest(f"n: at most {limits.max_choices} choices in one request", param="n")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    options = body.stream_options or StreamOptions()
    # Keys of several tenants never share cached prefixes: timing would tell one's prompts to another.
    salt = f"{envelope.tenant}/{body.cache_salt}" if envelope.tenant else body.cache_salt
    requests = [
        Request(
            id=envelope.id if len(prompts) == 1 else f"{envelope.id}-{i}",
            prompt=tuple(prompt),
            params=params,
            adapters=envelope.adapters,
            arrival=envelope.arrival,
            priority=body.priority,
            tenant=envelope.tenant,
            cache_salt=salt,
            # cached tokens would have no logprobs
            prefix_cache=body.prefix_cache and params.prompt_logprobs is None,
        )
        for i, prompt in enumerate(prompts)
    ]
    return Job(
        id=envelope.id,
        kind=kind,
        model=body.model,
        created=envelope.created,
        requests=requests,
        stream=body.stream,
        include_usage=options.include_usage or options.continuous_usage_stats,
        continuous_usage=options.continuous_usage_stats,
        logprobs=params.logprobs,
        return_token_ids=body.return_token_ids,
    )
