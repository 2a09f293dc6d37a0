"""What a decoder is made of, as data. Torch-free.

`Arch.from_config` reads a Hugging Face config.json (or a GGUF header told in its words). Every
field is read, known to be harmless, or refused by name: a model is never served with a part of
its definition ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from chiliad.errors import InvalidModel

RopeKind = Literal["default", "linear", "llama3", "yarn"]


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
    activation: Literal["silu_mul", "gelu_tanh_mul", "gelu_tanh", "gelu"]
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

    def choice(self, name: str, table: Mapping[str, str], default: str) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in table:
            raise InvalidModel(
                f"config: {name}={value!r} is not supported; use {', '.join(table)}", param=name
            )
        return table[value]

    def finish(self) -> None:
        """Refuse fields that no one has read, unless they say nothing or do not change the model."""
        unknown = [
            f"{name}={value!r}"
            for name, value in self._values.items()
            if name not in self._read
            and name not in _HARMLESS
            and not name.startswith("_")
            and value not in (None, False, [], {})
        ]
        if unknown:
            raise InvalidModel(
                f"config: unsupported fields {', '.join(unknown)}; they may change what the model computes",
                param=unknown[0].split("=")[0],
            )


#: Fields that do not change what a decoder computes: bookkeeping, training, generation defaults.
_HARMLESS = frozenset(
    """architectures auto_map attention_dropout bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout dtype embd_pdrop eos_token_id attn_pdrop finetuning_task hidden_dropout
    id2label initializer_range is_decoder is_llama_config label2id max_window_layers model_type
    n_ctx name_or_path pad_token_id pretraining_tp problem_type resid_pdrop return_dict
    reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_cache bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens temperature tf_legacy_loss top_k top_p typical_p
    use_bfloat16 encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id decoder_start_token_id""".split()  # noqa: SIM905
)


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _rope(parameters: Mapping[str, object], theta: float, max_positions: int) -> Rope:
    """One rope_parameters (or the older rope_scaling) entry."""
    fields = _Fields(parameters)
    kind = fields.get("rope_type", fields.get("type", "default"))
    fields.get("type")
    theta = fields.number("rope_theta", theta)
    fields.only("partial_rotary_factor", 1, 1.0)
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
    else:
        raise InvalidModel(
            f"config: rope type {kind!r} is not supported; chiliad knows default, linear, llama3",
            param="rope_scaling",
        )
    fields.finish()
    return rope


def _mapping(fields: _Fields, name: str) -> dict[str, object]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise InvalidModel(f"config: {name} must be an object, got {value!r}", param=name)
    return value


def _one_rope(fields: _Fields, max_positions: int, default_theta: float = 10_000.0) -> Rope:
    """The rope of models whose layers share one."""
    theta = fields.number("rope_theta", default_theta)
    fields.only("partial_rotary_factor", 1, 1.0)
    fields.only("rope_interleaved", False)
    parameters = _mapping(fields, "rope_scaling") or _mapping(fields, "rope_parameters")
    fields.get("rope_parameters")
    return _rope(parameters, theta, max_positions)


def _window_types(fields: _Fields, layers: int, default: list[str]) -> list[str]:
    types = fields.get("layer_types", default)
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise InvalidModel(
            f"config: layer_types must be {layers} times one of {', '.join(known)}, got {types!r}",
            param="layer_types",
        )
    return types


_GATED = {"silu": "silu_mul", "swish": "silu_mul", "gelu_pytorch_tanh": "gelu_tanh_mul"}


def _llama_like(
    fields: _Fields,
    *,
    head_dim: int | None = None,
    rope: Callable[[_Fields, int, int], tuple[Rope, ...]] | None = None,
    windows: tuple[int, ...] | None = None,
    activation: str | None = None,
    attention_scale: float | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    post_norms: bool = False,
    norm_offset: float = 0.0,
    scale_embedding: bool = False,
    tied: bool = False,
) -> Arch:
    """The common trunk: RMSNorm, rotary positions, grouped-query attention, gated MLP."""
    hidden, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", head_dim or hidden // heads)
    if heads % kv_heads:
        raise InvalidModel(
            f"config: {heads} attention heads do not divide among {kv_heads} key-value heads",
            param="num_key_value_heads",
        )
    if head_dim % 2:
        raise InvalidModel(f"config: head_dim={head_dim} must be even to rotate", param="head_dim")
    max_positions = fields.integer("max_position_embeddings")
    return Arch(
        family=str(fields.get("model_type")),
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.integer("intermediate_size"),
        max_positions=max_positions,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=activation or fields.choice("hidden_act", _GATED, "silu"),  # type: ignore[arg-type]
        attention_scale=head_dim**-0.5 if attention_scale is None else attention_scale,
        tied=fields.flag("tie_word_embeddings", tied),
        windows=windows or (0,) * layers,
        ropes=rope(fields, layers, max_positions) if rope else (_one_rope(fields, max_positions),) * layers,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        head_norms=head_norms,
        post_norms=post_norms,
        norm_offset=norm_offset,
        embed_scale=hidden**0.5 if scale_embedding else 1.0,
        bos_id=next(iter(_ids(fields.get("bos_token_id"))), None),
        eos_ids=_ids(fields.get("eos_token_id")),
    )


def _llama(fields: _Fields) -> Arch:
    bias = fields.flag("attention_bias", False)
    return _llama_like(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


_FAMILIES: dict[str, Callable[[_Fields], Arch]] = {"llama": _llama}
