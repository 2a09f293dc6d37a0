"""Every family against transformers in float32: prefill, chunked prefill, cached decode, mixed steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from model_harness import Harness

from chiliad.errors import InvalidConfig
from chiliad.kernels import Kernels, load
from chiliad.models import load_decoder, open_source

TOLERANCE = 1e-4
LENGTH = 45  # crosses two page boundaries

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CASES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-tied-llama3": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-linear": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
    ),
    "llama-biases-wide-heads": transformers.LlamaConfig(
        **SMALL | {"num_key_value_heads": 6},
        attention_bias=True,
        mlp_bias=True,
        head_dim=10,
        rms_norm_eps=1e-3,
    ),
    "llama-yarn": transformers.LlamaConfig(
        **SMALL | {"head_dim": 16},
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral-window": transformers.MistralConfig(**SMALL, sliding_window=11),
    "mistral-no-window": transformers.MistralConfig(
        **SMALL, sliding_window=None, hidden_act="gelu_pytorch_tanh"
    ),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-upper-windows": transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=13, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=14, tie_word_embeddings=True),
    "qwen3-biases": transformers.Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=10,
        sliding_window=9,
        sliding_window_pattern=3,
        query_pre_attn_scalar=17,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt2": transformers.GPT2Config(vocab_size=101, n_positions=64, n_embd=24, n_layer=3, n_head=4),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=101,
        n_positions=64,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=50,
        activation_function="gelu",
        tie_word_embeddings=False,
        scale_attn_weights=False,
    ),
}


def save(config: transformers.PretrainedConfig, folder: Path, **kwargs: object) -> torch.nn.Module:
    """A random model of this config, written to `folder`; every parameter is far from its initial value."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
            assert parameter.abs().max() > 0, name
    model.save_pretrained(folder, **kwargs)
    return model


def kernels_or_skip(which: str) -> Kernels:
    try:
        return load(which, threads=1)
    except InvalidConfig as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, which: str, tmp_path: Path) -> None:
    model = save(CASES[case], tmp_path)
    kernels = kernels_or_skip(which)
    decoder, _ = load_decoder(open_source(str(tmp_path)), kernels, "float32")
    vocab = CASES[case].vocab_size
    prompts = torch.randint(0, vocab, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(prompts).logits
    assert expected.std() > 0.1  # the comparison below is not about zeros
    harness = Harness(decoder, kernels)
    a, b, c = prompts.tolist()

    whole = harness.step([(0, a)])[0]  # one prefill
    chunks = [harness.step([(1, b[i:j])])[0] for i, j in ((0, 7), (7, 16), (16, 33), (33, LENGTH))]
    decode = [harness.step([(2, c[:13])])[0]]
    for i in range(13, LENGTH):  # one token at a time, beside the prefill of another sequence
        other = [(3, a[(i - 13) * 2 : (i - 12) * 2])] if i < 33 else []
        decode.append(harness.step([(2, [c[i]]), *other])[0])

    for got, want in zip((whole, torch.cat(chunks), torch.cat(decode)), expected, strict=True):
        assert (got - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2"])
def test_logits_do_not_depend_on_the_split_or_the_neighbours(case: str, tmp_path: Path) -> None:
    """The contract of kernels/base.py in float32, bit for bit, through a whole model."""
    save(CASES[case], tmp_path)
    kernels = kernels_or_skip("cpu")
    decoder, _ = load_decoder(open_source(str(tmp_path)), kernels, "float32")
    a, b = torch.randint(0, 101, (2, LENGTH), generator=torch.Generator().manual_seed(2)).tolist()
    harness = Harness(decoder, kernels)
    alone = harness.step([(0, a)])[0]
    beside = harness.step([(1, b), (2, a)])[1]
    chunks = [harness.step([(3, a[i : i + 9]), (4, b[i : i + 5])])[0] for i in range(0, LENGTH, 9)]
    decode = [harness.step([(5, [token])])[0] for token in a]
    assert torch.equal(beside, alone)
    assert torch.equal(torch.cat(chunks), alone)
    assert torch.equal(torch.cat(decode), alone)
