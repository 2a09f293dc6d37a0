"""config.json: every field is read, known to be harmless, or refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from chiliad.errors import InvalidModel
from chiliad.models import Arch
from chiliad.models.layers import rope_table
from chiliad.models.weights import _DECODERS, Decoder
from chiliad.testing import base_info, tiny_config

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_projections_adapters_know(family: str) -> None:
    config = tiny_config(family)  # type: ignore[arg-type]
    decoder = _DECODERS.get(family, Decoder)
    assert tuple(decoder.blueprint(Arch.from_config(config)).sites) == base_info(config).sites


def test_gpt2_has_one_attention_site() -> None:
    sites = base_info(tiny_config("gpt2")).sites[:4]
    assert [s.name.removeprefix("transformer.h.0.") for s in sites] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
    assert sites[0].out_features == 3 * sites[0].in_features
    assert all(s.transposed for s in sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_transformers_configs_are_read(family: str) -> None:
    """Every field that transformers writes with default values is accepted."""
    config = tiny_config(family)  # type: ignore[arg-type]
    full = transformers.AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    assert Arch.from_config(full.to_dict()) == Arch.from_config(config)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "num_local_experts", 8),
        ("llama", "quantization_config", {"quant_method": "awq"}),
        ("llama", "logit_scale", 0.5),
        ("llama", "sliding_window", 4096),
        ("llama", "hidden_act", "gelu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_interleaved", True),
        ("llama", "num_key_value_heads", 3),
        ("llama", "head_dim", 15),
        ("llama", "hidden_size", None),
        ("llama", "hidden_size", "64"),
        ("llama", "num_hidden_layers", 0),
        ("llama", "rms_norm_eps", "tiny"),
        ("llama", "attention_bias", 1),
        ("llama", "eos_token_id", "</s>"),
        ("llama", "rope_scaling", [2.0]),
        ("llama", "model_type", "mixtral"),
        ("llama", "model_type", None),
        ("mistral", "attention_bias", True),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
        ("qwen3", "mlp_bias", True),
        ("gemma3_text", "final_logit_softcapping", 30.0),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma3_text", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "n_head", 5),
    ],
)
def test_unsupported_values_are_refused_by_name(family: str, field: str, value: object) -> None:
    config = tiny_config(family) | {field: value}  # type: ignore[arg-type]
    with pytest.raises(InvalidModel, match=field if field != "rope_parameters" else "rope_type"):
        Arch.from_config(config)


def test_windows_need_use_sliding_window() -> None:
    config = tiny_config("qwen2", sliding_window=32, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(InvalidModel, match="layer_types slide but use_sliding_window is false"):
        Arch.from_config(config)
    assert Arch.from_config(config | {"use_sliding_window": True}).windows == (0, 32)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
    ],
)
def test_rope_scaling_refused_by_name(scaling: dict[str, object], named: str) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        with pytest.raises(InvalidModel, match=named):
            Arch.from_config(tiny_config() | {field: scaling})


def test_harmless_fields_change_nothing() -> None:
    plain = Arch.from_config(tiny_config())
    more = {"torch_dtype": "bfloat16", "_attn_implementation": "sdpa", "use_cache": True, "use_mrope": False}
    assert Arch.from_config(tiny_config() | more) == plain


def test_older_and_newer_rope_fields_agree() -> None:
    newer = {k: v for k, v in tiny_config().items() if k != "rope_theta"}
    scaling = {"rope_type": "linear", "factor": 4.0}
    a = Arch.from_config(tiny_config() | {"rope_theta": 5e5, "rope_scaling": scaling})
    b = Arch.from_config(newer | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert a == b

    gemma = tiny_config("gemma3_text")
    a = Arch.from_config(gemma | {"rope_scaling": scaling})
    b = Arch.from_config(
        {k: v for k, v in gemma.items() if k not in ("rope_theta", "rope_local_base_freq")}
        | {
            "rope_parameters": {
                "full_attention": scaling | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        }
    )
    assert a == b
    assert a.ropes[0] != a.ropes[1]


def test_gemma_pattern() -> None:
    config = tiny_config("gemma3_text", num_hidden_layers=7)
    del config["layer_types"]
    assert Arch.from_config(config).windows == (32, 32, 32, 32, 32, 0, 32)
    assert Arch.from_config(config | {"sliding_window_pattern": 2}).windows == (32, 0, 32, 0, 32, 0, 32)


def test_mistral_window_defaults() -> None:
    config = tiny_config("mistral")
    config.pop("sliding_window", None)
    assert Arch.from_config(config).windows == (4096, 4096)
    assert Arch.from_config(config | {"sliding_window": None}).windows == (0, 0)


def test_eos_ids() -> None:
    assert Arch.from_config(tiny_config(eos_token_id=[2, 5])).eos_ids == (2, 5)
    assert Arch.from_config(tiny_config(eos_token_id=None)).eos_ids == ()


SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-full": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_tables_equal_transformers(name: str) -> None:
    """At the sizes of real models, to the end of their context."""
    positions = 16384
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500_000.0, **SCALINGS[name]},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    expected = rotary(torch.zeros(1), torch.arange(positions)[None])
    rope = Arch.from_config(config.to_dict()).ropes[0]
    assert rope is not None
    for got, want in zip(rope_table(rope, 128, positions), expected, strict=True):
        # one unit in the last place of a frequency, times the position
        assert (got - want[0, :, :64]).abs().max() < positions * 2**-23 * 2


# Fields as published on the hub, with the parameter counts their authors state.
PUBLISHED: dict[str, tuple[int, dict[str, object]]] = {
    "SmolLM2-135M-Instruct": (
        134_515_008,
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 576, "initializer_range": 0.0416, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
            "vocab_size": 49152, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "TinyLlama-1.1B": (
        1_100_048_384,
        {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "hidden_act": "silu",
            "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_scaling": None, "vocab_size": 32000,
            "tie_word_embeddings": False, "torch_dtype": "float32",
        },
    ),
    "Llama-3.2-1B-Instruct": (
        1_235_814_400,
        {
            "model_type": "llama", "attention_bias": False, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "Qwen2.5-0.5B-Instruct": (
        494_032_768,
        {
            "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
            "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
            "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "gemma-3-1b-it": (
        999_885_952,
        {
            "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
            "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
            "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "gpt2": (
        124_439_808,
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
            "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_count_right(name: str) -> None:
    parameters, config = PUBLISHED[name]
    arch = Arch.from_config(config)
    shapes = _DECODERS.get(arch.family, Decoder).blueprint(arch).shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_default_layer_types_equal_transformers() -> None:
    options = {
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    }
    for family in ("qwen2", "qwen3"):
        types = transformers.AutoConfig.for_model(family, **options).layer_types
        windows = Arch.from_config(tiny_config(family, **options)).windows  # type: ignore[arg-type]
        assert windows == tuple(8 if kind == "sliding_attention" else 0 for kind in types)
