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
from chiliad.testing import SMOLLM2, base_info, tiny_config

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


def test_smollm2_is_135_million() -> None:
    config = dict(SMOLLM2) | {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    shapes = Decoder.blueprint(Arch.from_config(config)).shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == 134_515_008
