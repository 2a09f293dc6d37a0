"""Stand-ins for the large and the slow, for tests, demos and people who try things out.

`tiny_model` writes a random model folder of any supported family, `write_random_adapter` a PEFT
LoRA folder for any base, both in milliseconds and without transformers or PEFT; `base_info`
describes a base from its config alone; `FakeClock` is a clock that moves when told.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from chiliad.core import BaseInfo, Site
from chiliad.errors import InvalidConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"]
StoredDType = Literal["float32", "float16", "bfloat16"]

#: The shape of SmolLM2-135M(-Instruct), as its config.json has it.
SMOLLM2: dict[str, object] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. system user assistant",
    "A thousand adapters share one base model and one batch; each of them answers in its own way.",
    "name[Blue Spice], eatType[coffee shop], area[city centre], familyFriendly[yes], price range: cheap",
    "What is the weather like today? Where is my new card? I would like to change my PIN, please.",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000 naïve café größer 你好，世界 здравствуй, мир 🙂",
)


class FakeClock:
    """A clock for tests: call it for the time in seconds, `advance` it by hand."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self.now += seconds
        return self.now


# -- models ------------------------------------------------------------------------------


def base_info(config: Mapping[str, object], name: str = "base") -> BaseInfo:
    """What adapters must know of the base with this Hugging Face config (a dict, see `SMOLLM2`).

    Written from the families' module names alone, so that adapters can be tested without a model.
    """
    sites = tuple(
        Site(path, layer, inputs, outputs, transposed=config["model_type"] == "gpt2")
        for path, layer, outputs, inputs in _projections(config)
    )
    alias = config.get("_name_or_path")
    aliases = (alias,) if isinstance(alias, str) else ()
    return BaseInfo(name, "0" * 64, str(config["model_type"]), sites, aliases)


def tiny_config(family: Family = "llama", **overrides: object) -> dict[str, object]:
    """config.json of `tiny_model`: two layers, 64 wide, four heads over two KV heads."""
    vocab = _tokenizer().get_vocab_size()
    config: dict[str, object]
    if family == "gpt2":
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": vocab,
            "n_positions": 512,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
    else:
        architecture = {
            "llama": "LlamaForCausalLM",
            "mistral": "MistralForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
            "gemma3_text": "Gemma3ForCausalLM",
        }[family]
        gemma = family == "gemma3_text"
        config = {
            "model_type": family,
            "architectures": [architecture],
            "vocab_size": vocab,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6 if gemma else 1e-5,
            "rope_theta": 10000.0,
            "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
            "tie_word_embeddings": gemma,
        }
        if gemma:
            config |= {
                "query_pre_attn_scalar": 16,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_local_base_freq": 10000.0,
                "rope_theta": 1000000.0,
            }
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32"}
    return config | overrides


def tiny_model(
    folder: str | Path, family: Family = "llama", seed: int = 0, **overrides: object
) -> dict[str, object]:
    """Write a random model of `family` as a Hugging Face folder; returns its config.

    The folder holds config.json, generation_config.json, model.safetensors (float32), a byte-level
    tokenizer.json with ChatML specials, and tokenizer_config.json with a chat template. `overrides`
    replace fields of `tiny_config` (sizes, `tie_word_embeddings`, ...). Weights are scaled so that
    greedy tokens depend on the prompt and survive a change of summation order.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in _parameters(config):
        if name.endswith("bias"):
            tensors[name] = 0.1 * rng.standard_normal(shape, dtype=np.float32)
        elif len(shape) == 1:  # norms; Gemma's multiply by 1 + weight
            centre = np.float32(0.0 if family == "gemma3_text" else 1.0)
            tensors[name] = centre + 0.1 * rng.standard_normal(shape, dtype=np.float32)
        elif "embed" in name or "wte" in name or "wpe" in name:
            # small where the head is tied to it (GPT-2, Gemma), lest every token predicts itself
            scale = {"gpt2": 0.2, "gemma3_text": 0.04}.get(family, 1.0)
            tensors[name] = np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)
        else:
            inputs = shape[0] if family == "gpt2" else shape[1]
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(1.5 / math.sqrt(inputs))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config.get("max_position_embeddings", config.get("n_positions")),
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    return config


def _number(config: Mapping[str, object], key: str) -> int:
    value = config[key]
    assert isinstance(value, int), key
    return value


def _projections(config: Mapping[str, object]) -> Iterator[tuple[str, int, int, int]]:
    """(module path, layer, out_features, in_features) of every adaptable projection, in slot order."""
    if config["model_type"] == "gpt2":
        wide = _number(config, "n_embd")
        inner = config.get("n_inner") or 4 * wide
        assert isinstance(inner, int)
        for layer in range(_number(config, "n_layer")):
            block = f"transformer.h.{layer}"
            yield f"{block}.attn.c_attn", layer, 3 * wide, wide
            yield f"{block}.attn.c_proj", layer, wide, wide
            yield f"{block}.mlp.c_fc", layer, inner, wide
            yield f"{block}.mlp.c_proj", layer, wide, inner
        return
    wide, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    q = _number(config, "num_attention_heads") * _number(config, "head_dim")
    kv = _number(config, "num_key_value_heads") * _number(config, "head_dim")
    for layer in range(_number(config, "num_hidden_layers")):
        block = f"model.layers.{layer}"
        yield f"{block}.self_attn.q_proj", layer, q, wide
        yield f"{block}.self_attn.k_proj", layer, kv, wide
        yield f"{block}.self_attn.v_proj", layer, kv, wide
        yield f"{block}.self_attn.o_proj", layer, wide, q
        yield f"{block}.mlp.gate_proj", layer, inner, wide
        yield f"{block}.mlp.up_proj", layer, inner, wide
        yield f"{block}.mlp.down_proj", layer, wide, inner


def _parameters(config: Mapping[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of the checkpoint."""
    family, vocab = config["model_type"], _number(config, "vocab_size")
    if family == "gpt2":
        wide = _number(config, "n_embd")
        yield "transformer.wte.weight", (vocab, wide)
        yield "transformer.wpe.weight", (_number(config, "n_positions"), wide)
        for name, _, outputs, inputs in _projections(config):
            yield f"{name}.weight", (inputs, outputs)  # Conv1D keeps its weight transposed
            yield f"{name}.bias", (outputs,)
        norms = [f"transformer.h.{i}.ln_{j}" for i in range(_number(config, "n_layer")) for j in (1, 2)]
        for name in [*norms, "transformer.ln_f"]:
            yield f"{name}.weight", (wide,)
            yield f"{name}.bias", (wide,)
        return
    wide, head = _number(config, "hidden_size"), _number(config, "head_dim")
    yield "model.embed_tokens.weight", (vocab, wide)
    for name, _, outputs, inputs in _projections(config):
        yield f"{name}.weight", (outputs, inputs)
        if family == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
            yield f"{name}.bias", (outputs,)
    for layer in range(_number(config, "num_hidden_layers")):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (wide,)
        yield f"{block}.post_attention_layernorm.weight", (wide,)
        if family == "gemma3_text":
            yield f"{block}.pre_feedforward_layernorm.weight", (wide,)
            yield f"{block}.post_feedforward_layernorm.weight", (wide,)
        if family in ("qwen3", "gemma3_text"):
            yield f"{block}.self_attn.q_norm.weight", (head,)
            yield f"{block}.self_attn.k_norm.weight", (head,)
    yield "model.norm.weight", (wide,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, wide)


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens at most, learned from `_CORPUS`; the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


# -- adapters ----------------------------------------------------------------------------


def write_random_adapter(
    folder: str | Path,
    base: BaseInfo,
    rank: int,
    targets: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj"),
    seed: int = 0,
    dtype: StoredDType = "bfloat16",
    std: float = 0.2,
    config_overrides: Mapping[str, object] | None = None,
) -> Path:
    """Write a PEFT LoRA folder with random weights; returns the folder.

    std: standard deviation of the adapter's change of a projection's output for an input of unit
    variance, whatever the rank. config_overrides: fields of adapter_config.json, written as they
    are; `rank_pattern` and `layers_to_transform` also shape the tensors. Overriding the scale
    (`lora_alpha`, `use_rslora`, ...; 2 by default) changes the strength.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    overrides = dict(config_overrides or {})
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.aliases[0] if base.aliases else base.name,
        "r": rank,
        "lora_alpha": 2 * rank,  # a scale of 2
        "lora_dropout": 0.0,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "fan_in_fan_out": base.family == "gpt2",
        "inference_mode": True,
        **overrides,
    }
    patterns = overrides.get("rank_pattern") or {}
    layers = overrides.get("layers_to_transform")
    assert isinstance(patterns, dict)
    chosen = {layers} if isinstance(layers, int) else set(layers) if isinstance(layers, list) else None
    shapes: list[tuple[str, tuple[int, int], float]] = []  # key, shape, standard deviation
    for site in base.sites:
        if targets != "all-linear" and not any(
            site.name == target or site.name.endswith(f".{target}") for target in targets
        ):
            continue
        if chosen is not None and site.layer not in chosen:
            continue
        r = next((n for key, n in patterns.items() if re.match(rf"(.*\.)?({key})$", site.name)), rank)
        prefix = f"base_model.model.{site.name}"
        shapes.append((f"{prefix}.lora_A.weight", (r, site.in_features), 1 / math.sqrt(site.in_features)))
        shapes.append((f"{prefix}.lora_B.weight", (site.out_features, r), std / (2 * math.sqrt(r))))
    if not shapes:
        known = sorted({site.name.rpartition(".")[2] for site in base.sites})
        raise InvalidConfig(
            f"targets {targets} name no projection of {base.name}, which has {', '.join(known)}"
        )
    _write_random_tensors(folder / "adapter_model.safetensors", shapes, seed, dtype)
    _write_json(folder / "adapter_config.json", config)
    return folder


def _write_random_tensors(
    path: Path, shapes: list[tuple[str, tuple[int, int], float]], seed: int, dtype: StoredDType
) -> None:
    """Stream a safetensors file of uniform random numbers, one small buffer at a time."""
    code, size = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape, _ in shapes:
        begin, end = end, end + math.prod(shape) * size
        header[key] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape, deviation in shapes:
            values = rng.random(math.prod(shape), dtype=np.float32)
            values -= np.float32(0.5)
            values *= np.float32(deviation * math.sqrt(12))  # uniform on [-w/2, w/2] has variance w^2/12
            if dtype == "bfloat16":  # keep the upper half of a float32: rounds towards zero
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
            else:
                file.write(values.astype("<f2" if dtype == "float16" else "<f4").tobytes())
    os.replace(partial, path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
