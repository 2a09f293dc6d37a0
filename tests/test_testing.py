"""The stand-ins must be what they claim: models that transformers loads, adapters that PEFT applies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from chiliad.testing import (
    SMOLLM2,
    FakeClock,
    Family,
    base_info,
    tiny_config,
    tiny_model,
    write_random_adapter,
)

FAMILIES = get_args(Family)


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_tiny_family(family: Family, tmp_path: Path) -> None:
    config = tiny_model(tmp_path, family, seed=1)
    model, info = load(tmp_path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    modules = dict(model.named_modules())
    sites = base_info(config).sites
    for site in sites:
        shape = (site.out_features, site.in_features)
        assert tuple(modules[site.name].weight.shape) == (shape[::-1] if site.transposed else shape)
    assert len(sites) == (8 if family == "gpt2" else 14)


def test_the_tiny_tokenizer_is_lossless_and_speaks_chat(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Größe 你好 🙂\n\ttab  two"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) == tiny_config()["vocab_size"]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    info = base_info(tiny_config())
    for name in ("a", "b"):
        tiny_model(tmp_path / name, seed=3)
        write_random_adapter(tmp_path / name, info, 3, seed=4)
    for file in ("model.safetensors", "tokenizer.json", "config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("targets", "overrides"),
    [
        (("q_proj", "v_proj"), {}),
        ("all-linear", {"rank_pattern": {"o_proj": 5, "layers.1.mlp.up_proj": 1}}),
        (("q_proj", "down_proj"), {"layers_to_transform": [1], "use_rslora": True}),
    ],
)
def test_peft_loads_random_adapters(dtype: Any, targets: Any, overrides: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    config = tiny_model(tmp_path / "base")
    write_random_adapter(
        tmp_path / "adapter", base_info(config), 3, targets, dtype=dtype, config_overrides=overrides
    )
    model, _ = load(tmp_path / "base")
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        plain = model(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")  # warns (an error here) on a misfit
        assert (adapted(input_ids=tokens).logits - plain).abs().mean() > 0.02


def test_an_adapter_of_smollm2_has_the_declared_size_and_strength(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    info = base_info(SMOLLM2)
    write_random_adapter(tmp_path, info, 16, std=0.3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 30 * 16 * (576 + 576 + 576 + 192)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{info.sites[0].name}.lora_{ab}.weight"].float() for ab in "AB")
    x = torch.randn(1000, 576, generator=torch.Generator().manual_seed(0))
    change = config["lora_alpha"] / config["r"] * (x @ a.T @ b.T)
    assert change.std().item() == pytest.approx(0.3, rel=0.1)


def test_targets_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no projection"):
        write_random_adapter(tmp_path, base_info(SMOLLM2), 4, ("c_attn",))


def test_fake_clock() -> None:
    clock = FakeClock(10.0)
    assert clock() == 10.0
    assert clock.advance(2.5) == clock() == 12.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)
