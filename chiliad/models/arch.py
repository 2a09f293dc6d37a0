"""What a decoder is made of, as data. Torch-free.

`Arch.from_config` reads a Hugging Face config.json (or a GGUF header told in its words). Every
field is read, known to be harmless, or refused by name: a model is never served with a part of
its definition ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from chiliad.errors import InvalidModel

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu_mul", "gelu_tanh_mul", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer; see `layers.rope_table` for the formulas."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0  # llama3, yarn: context length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    magnitude: float = 1.0  # yarn: cos and sin are multiplied by this


@dataclass(frozen=True, slots=True)
class Arch:
    """Architecture facts. Families differ in values of these fields, not in code paths."""

    family: str  # config.json's model_type
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Activation
    attention_scale: float
    tied: bool  # lm_head shares the embedding's weight
    windows: tuple[int, ...]  # per layer; 0 sees everything, w sees the last w tokens
    ropes: tuple[Rope | None, ...]  # per layer; None where positions are learned
    qkv_bias: bool = False
    out_bias: bool = False  # attention output projection
    mlp_bias: bool = False
    head_norms: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # norms after attention and MLP, before their residual sums
    norm_offset: float = 0.0  # checkpoints store norm weights minus this
    embed_scale: float = 1.0  # rounded at load to the checkpoint's dtype, as in training
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @staticmethod
    def from_config(config: Mapping[str, object]) -> Arch:
        """Read a config.json. Raises InvalidModel naming the field that is missing or unsupported."""
        family = config.get("model_type")
        read = _FAMILIES.get(family) if isinstance(family, str) else None
        if read is None:
            raise InvalidModel(
                f"model_type {family!r} is not supported; chiliad serves {', '.join(sorted(_FAMILIES))}",
                param="model_type",
            )
        fields = _Fields(config)
        arch = read(fields)
        fields.finish()
        return arch


class _Fields:
    """config.json with a memory: which fields were read, so that the rest can be refused."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self._read: set[str] = set()

    def get(self, name: str, default: object = None) -> object:
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidModel(f"config: {name} must be a positive integer, got {value!r}", param=name)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidModel(f"config: {name} must be a number, got {value!r}", param=name)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InvalidModel(f"config: {name} must be true or false, got {value!r}", param=name)
        return value

    def only(self, name: str, *accepted: object) -> None:
        """Refuse any value of `name` but these (and null or absence)."""
        value = self.get(name)
        if value is not None and value not in accepted:
            raise InvalidModel(f"config: {name}={value!r} is not supported", param=name)

    def choice(self, name: str, table: Mapping[str, Activation]) -> Activation:
        """A name that must be in the table; left out, it is the table's first."""
        value = self.get(name, next(iter(table)))
        if not isinstance(value, str) or value not in table:
            raise InvalidModel(
                f"config: {name}={value!r} is not supported; chiliad knows {', '.join(table)}", param=name
            )
        return table[value]

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token ids: null, one, or a list."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        known = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
        if len(known) < len(ids):
            raise InvalidModel(f"config: {name} must be token ids, got {value!r}", param=name)
        return known

    def token(self, name: str) -> int | None:
        return next(iter(self.tokens(name)), None)

    def finish(self) -> None:
        """Refuse fields that no one has read, unless they say nothing or do not change the model."""
        unknown = [
            name
            for name, value in self._values.items()
            if name not in self._read | _HARMLESS
            and not name.startswith("_")
            and value not in (None, False, [], {})
        ]
        if unknown:
            shown = ", ".join(f"{name}={str(self._values[name])[:40]}" for name in unknown[:8])
            raise InvalidModel(
                f"config: unsupported fields {shown}; they may change what the model computes",
                param=unknown[0],
            )


#: Fields that do not change what a decoder computes: bookkeeping, training, generation defaults.
_HARMLESS = frozenset(
    """architectures attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout id2label initializer_range is_decoder is_llama_config label2id length_penalty
    max_length min_length model_type n_ctx name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type remove_invalid_values reorder_and_upcast_attn
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache""".split()  # noqa: SIM905
)


def _mapping(fields: _Fields, name: str) -> dict[str, object]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise InvalidModel(f"config: {name} must be an object, got {value!r}", param=name)
    return value


def _rope(parameters: Mapping[str, object], theta: float, max_positions: int) -> Rope:
    """One rope_parameters (or the older rope_scaling) object; `theta` unless it names its own."""
    fields = _Fields(parameters)
    kind = fields.get("rope_type", fields.get("type", "default"))
    fields.get("type")
    theta = fields.number("rope_theta", theta)
    fields.only("partial_rotary_factor", 1.0)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", fields.number("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta,
            "llama3",
            fields.number("factor"),
            fields.integer("original_max_position_embeddings", max_positions),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    elif kind == "yarn":
        factor = fields.number("factor")
        rope = Rope(
            theta,
            "yarn",
            factor,
            fields.integer("original_max_position_embeddings", max_positions),
            beta_fast=fields.number("beta_fast", 32),
            beta_slow=fields.number("beta_slow", 1),
            truncate=fields.flag("truncate", True),
            magnitude=fields.number("attention_factor", _yarn_magnitude(fields, factor)),
        )
    else:
        raise InvalidModel(
            f"config: rope type {kind!r} is not supported; chiliad knows default, linear, llama3 and yarn",
            param="rope_type",
        )
    fields.finish()
    return rope


def _yarn_magnitude(fields: _Fields, factor: float) -> float:
    """YaRN's factor on cos and sin (arXiv:2309.00071, 3.4), with DeepSeek's two-sided variant."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = fields.number("mscale", 0), fields.number("mscale_all_dim", 0)
    return magnitude(above) / magnitude(below) if above and below else magnitude(1.0)


def _shared_rope(fields: _Fields, layers: int) -> tuple[Rope, ...]:
    """One rope for all layers. Newer configs say rope_parameters, older rope_theta and rope_scaling."""
    theta, longest = fields.number("rope_theta", 10_000.0), fields.integer("max_position_embeddings")
    fields.only("partial_rotary_factor", 1.0)
    fields.only("rope_interleaved", False)
    older, newer = _mapping(fields, "rope_scaling"), _mapping(fields, "rope_parameters")
    return (_rope(older or newer, theta, longest),) * layers


def _layer_windows(fields: _Fields, layers: int, default: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows from layer_types; `default(i)` says whether layer i slides where the config does not."""
    full, sliding = "full_attention", "sliding_attention"
    types = fields.get("layer_types", [sliding if default(i) else full for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or not {full, sliding}.issuperset(types):
        raise InvalidModel(
            f"config: layer_types must be {layers} times {full} or {sliding}, got {types!r}",
            param="layer_types",
        )
    if sliding not in types:
        fields.get("sliding_window")
        return (0,) * layers
    window = fields.integer("sliding_window")
    return tuple(window if kind == sliding else 0 for kind in types)


_GATED: dict[str, Activation] = {
    "silu": "silu_mul",
    "swish": "silu_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
}
_PLAIN: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _trunk(
    fields: _Fields,
    *,
    windows: tuple[int, ...],
    ropes: tuple[Rope, ...],
    activation: str = "hidden_act",  # the field that names it
    head_dim: int | None = None,
    tied: bool = False,
) -> Arch:
    """What the families share: RMSNorm, rotary positions, grouped-query attention, gated MLP."""
    hidden, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", head_dim or hidden // heads)
    if heads % kv_heads:
        raise InvalidModel(
            f"config: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}",
            param="num_key_value_heads",
        )
    if head_dim % 2:
        raise InvalidModel(f"config: head_dim={head_dim} must be even to rotate", param="head_dim")
    return Arch(
        family=str(fields.get("model_type")),
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.integer("intermediate_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice(activation, _GATED),
        attention_scale=head_dim**-0.5,
        tied=fields.flag("tie_word_embeddings", tied),
        windows=windows,
        ropes=ropes,
        bos_id=fields.token("bos_token_id"),
        eos_ids=fields.tokens("eos_token_id"),
    )


def _llama(fields: _Fields) -> Arch:
    layers = fields.integer("num_hidden_layers")
    bias = fields.flag("attention_bias", False)
    arch = _trunk(fields, windows=(0,) * layers, ropes=_shared_rope(fields, layers))
    return replace(arch, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: _Fields) -> Arch:
    layers = fields.integer("num_hidden_layers")
    # left out, it is the first Mistral's 4096; null means none
    none = fields.has("sliding_window") and fields.get("sliding_window") is None
    window = 0 if none else fields.integer("sliding_window", 4096)
    return _trunk(fields, windows=(window,) * layers, ropes=_shared_rope(fields, layers))


def _qwen2(fields: _Fields) -> Arch:
    return replace(_qwen(fields), qkv_bias=True)


def _qwen3(fields: _Fields) -> Arch:
    bias = fields.flag("attention_bias", False)
    return replace(_qwen(fields, head_dim=128), qkv_bias=bias, out_bias=bias, head_norms=True)


def _qwen(fields: _Fields, head_dim: int | None = None) -> Arch:
    layers, first = fields.integer("num_hidden_layers"), fields.integer("max_window_layers", 28)
    slides = fields.flag("use_sliding_window", False)
    windows = _layer_windows(fields, layers, lambda i: slides and i >= first)
    if any(windows) and not slides:
        raise InvalidModel("config: layer_types slide but use_sliding_window is false", param="layer_types")
    return _trunk(fields, windows=windows, ropes=_shared_rope(fields, layers), head_dim=head_dim)


def _gemma3(fields: _Fields) -> Arch:
    layers, longest = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        fields.only(field, False)
    every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    windows = _layer_windows(fields, layers, lambda i: (i + 1) % every != 0)
    # Newer configs name the ropes by layer type; older ones scale only that of the full layers.
    older = {"full_attention": _mapping(fields, "rope_scaling")}
    named = _Fields(_mapping(fields, "rope_parameters") or older)
    theta, local_theta = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    full = _rope(_mapping(named, "full_attention"), theta, longest)
    sliding = _rope(_mapping(named, "sliding_attention"), local_theta, longest)
    named.finish()
    arch = _trunk(
        fields,
        windows=windows,
        ropes=tuple(sliding if window else full for window in windows),
        activation="hidden_activation",
        head_dim=256,
        tied=True,
    )
    bias = fields.flag("attention_bias", False)
    return replace(
        arch,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        qkv_bias=bias,
        out_bias=bias,
        head_norms=True,
        post_norms=True,
        norm_offset=1.0,
        embed_scale=arch.hidden**0.5,
    )


def _gpt2(fields: _Fields) -> Arch:
    hidden, heads, layers = fields.integer("n_embd"), fields.integer("n_head"), fields.integer("n_layer")
    if hidden % heads:
        raise InvalidModel(f"config: n_embd={hidden} is not a multiple of n_head={heads}", param="n_head")
    for field in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        fields.only(field, False)
    scaled = fields.flag("scale_attn_weights", True)
    return Arch(
        family="gpt2",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.integer("n_inner", 4 * hidden),
        max_positions=fields.integer("n_positions"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _PLAIN),
        attention_scale=(hidden // heads) ** -0.5 if scaled else 1.0,
        tied=fields.flag("tie_word_embeddings", True),
        windows=(0,) * layers,
        ropes=(None,) * layers,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_id=fields.token("bos_token_id"),
        eos_ids=fields.tokens("eos_token_id"),
    )


_FAMILIES: dict[str, Callable[[_Fields], Arch]] = {
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
