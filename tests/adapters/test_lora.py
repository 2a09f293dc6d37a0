"""Lowered adapters equal what PEFT computes from the same folder; every field has its answer."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft as peft_library
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from chiliad.adapters import peft
from chiliad.adapters.base import TensorHeader
from chiliad.adapters.lora import _HONOURED, _INERT, _REFUSED, LoraFormat
from chiliad.core import BaseInfo
from chiliad.errors import AdapterMismatch, InvalidAdapter
from chiliad.testing import base_info, tiny_config, write_random_adapter

CONFIGS = {"llama": tiny_config("llama", num_hidden_layers=4), "gpt2": tiny_config("gpt2")}
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS["llama"]))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIGS["gpt2"]))
    return {"llama": llama.eval(), "gpt2": gpt2.eval()}


def save(model: Any, folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter with PEFT, every A and B random."""
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    adapted.save_pretrained(str(folder))


def merged_deltas(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge adds to every weight matrix [out, in], in float64."""
    original = copy.deepcopy(model).double()
    merged = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).double().merge_and_unload()
    after = dict(merged.named_modules())
    deltas = {}
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            deltas[name] = after[name].weight.detach() - module.weight.detach()
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            deltas[name] = (after[name].weight.detach() - module.weight.detach()).T
    return deltas


ROUND_TRIPS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "qv": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": QV}, torch.float32),
    "rank-1": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": QV}, torch.float32),
    "rank-above-width": ("llama", {"r": 100, "target_modules": ["k_proj"]}, torch.float32),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear"}, torch.float32),
    "rslora": ("llama", {"r": 9, "lora_alpha": 16, "use_rslora": True, "target_modules": QV}, torch.float32),
    "rank-pattern": (
        "llama",
        {
            "r": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {  # overlapping; in the sorted order in which PEFT saves it
                r"^model\.layers\.3\.self_attn\.v_proj": 1,
                r"layers.1.self_attn.q_proj": 3,
                r"layers\.(0|1)\..*": 5,
                "v_proj": 2,
            },
        },
        torch.float32,
    ),
    "alpha-pattern": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": QV,
            "alpha_pattern": {"v_proj": 32, r"layers.1.self_attn.\w_proj": 2},
            "rank_pattern": {r".*[12].*q_proj": 6},
        },
        torch.float32,
    ),
    "rslora-patterns": (
        "llama",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": QV,
            "alpha_pattern": {"v_proj": 5},
            "rank_pattern": {"v_proj": 7},
        },
        torch.float32,
    ),
    "layers": ("llama", {"r": 2, "target_modules": QV, "layers_to_transform": [0, 3]}, torch.float32),
    "one-layer": ("llama", {"r": 2, "target_modules": QV, "layers_to_transform": 2}, torch.float32),
    "layers-pattern": (
        "llama",
        {"r": 2, "target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
        torch.float32,
    ),
    "exclude": (
        "llama",
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["lm_head", "mlp.up_proj", "o_proj"]},
        torch.float32,
    ),
    "exclude-regex": (
        "llama",
        {"r": 2, "target_modules": QV, "exclude_modules": r".*\.[02]\..*q_proj"},
        torch.float32,
    ),
    "regex": (
        "llama",
        {"r": 2, "target_modules": r"model\.layers\.\d+\.(self_attn\.[qk]|mlp\.gate)_proj"},
        torch.float32,
    ),
    "full-names": (
        "llama",
        {"r": 2, "target_modules": ["model.layers.0.mlp.up_proj", "3.self_attn.o_proj"]},
        torch.float32,
    ),
    "negative-alpha": ("llama", {"r": 2, "lora_alpha": -4, "target_modules": QV}, torch.float32),
    "bf16": ("llama", {"r": 8, "lora_alpha": 10, "target_modules": QV}, torch.bfloat16),
    "fp16": ("llama", {"r": 8, "lora_alpha": 10, "target_modules": QV}, torch.float16),
    "no-task": ("llama", {"r": 2, "target_modules": QV, "task_type": None}, torch.float32),
    "gaussian": ("llama", {"r": 2, "target_modules": QV, "init_lora_weights": "gaussian"}, torch.float32),
    "orthogonal": ("llama", {"r": 2, "target_modules": QV, "init_lora_weights": "orthogonal"}, torch.float32),
    "mica": ("llama", {"r": 2, "target_modules": QV, "init_lora_weights": "mica"}, torch.float32),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, torch.float32),
    "gpt2-all": ("gpt2", {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": True}, torch.float32),
    "gpt2-attn-c_proj": (
        "gpt2",
        {"r": 3, "target_modules": ["attn.c_proj", "mlp.c_fc"], "fan_in_fan_out": True},
        torch.float32,
    ),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_lowered_equals_peft_merge(case: str, models: dict[str, Any], tmp_path: Path) -> None:
    family, options, dtype = ROUND_TRIPS[case]
    base = base_info(CONFIGS[family])
    save(models[family], tmp_path, LoraConfig(**{"task_type": "CAUSAL_LM", **options}), dtype)
    header = peft.read_header(tmp_path)
    planned = peft.plan(header, base)
    lowered, _ = peft.read(tmp_path, base, header.digest)
    assert {slot: len(pair.a) for slot, pair in lowered.low_rank.items()} == planned.low_rank

    slots = {site.name: slot for slot, site in enumerate(base.sites)}
    deltas = merged_deltas(models[family], tmp_path)
    assert any(float(delta.abs().max()) > 0 for delta in deltas.values())
    for name, delta in deltas.items():
        pair = lowered.low_rank.get(slots.get(name, -1))
        if pair is None:
            assert not delta.any(), f"PEFT changes {name}, we do not"
            continue
        ours = pair.scale * pair.b.double().T @ pair.a.double()
        error = float((ours - delta).norm() / delta.norm())
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.filterwarnings("ignore")
def test_gpt2_saved_without_fan_in_fan_out(models: dict[str, Any], tmp_path: Path) -> None:
    """PEFT corrects the field to the kind of layer: it has no say in what A and B mean."""
    base = base_info(CONFIGS["gpt2"])
    save(models["gpt2"], tmp_path, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    first, _ = peft.read(tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for value in (False, True):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": value}))
        again, _ = peft.read(tmp_path, base)
        assert again.low_rank.keys() == first.low_rank.keys()
        assert all(torch.equal(first.low_rank[s].b, again.low_rank[s].b) for s in first.low_rank)


def test_every_field_of_peft_has_an_answer() -> None:
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    known = _HONOURED | _INERT | _REFUSED.keys()
    assert fields <= known, f"PEFT {peft_library.__version__} has new fields"
    assert len(known) == len(_HONOURED) + len(_INERT) + len(_REFUSED)


# -- fields, one by one ------------------------------------------------------------------

BASE = base_info(CONFIGS["llama"], "tiny")


def plan_with(tmp_path: Path, **fields: object) -> object:
    write_random_adapter(tmp_path, BASE, 4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    return peft.plan(peft.read_header(tmp_path), BASE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 2}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"a": 1}),
        ("velora_config", {"num_groups": 4}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something-new"),
        ("init_lora_weights", 1),
        ("init_lora_weights", ["gaussian"]),
        ("task_type", "SEQ_CLS"),
        ("auto_mapping", {"base_model_class": "LlamaForSequenceClassification"}),
        ("nola_basis", 17),
        ("r", 0),
        ("r", -3),
        ("r", True),
        ("r", "8"),
        ("r", 8.0),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", 1e300),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", ["(a+)+"]),
        ("layers_pattern", "layers"),
    ],
)
def test_field_is_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=field.split("[")[0]) as caught:
        plan_with(tmp_path, **{field: value})
    assert "adapter_config.json" in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.3, "inference_mode": False, "revision": "abc", "peft_version": "0.99"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"corda_config": {"corda_method": "kpm"}, "init_lora_weights": True},  # a converted adapter
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "x",
                "unsloth_fixed": True,
            }
        },
        {"some_future_feature": False, "another": None, "third": [], "fourth": {}},
        {"modules_to_save": None, "layer_replication": [], "bias": "none", "task_type": None},
        {"rank_pattern": None, "alpha_pattern": None},
        {"target_modules": ["q_proj", "v_proj", "query_key_value"]},  # PEFT shrugs at the third
        {"target_modules": r"(?!.*mlp).*layers.\d+.*\b(q|v)_proj"},
    ],
)
def test_field_without_consequence_is_accepted(fields: dict[str, object], tmp_path: Path) -> None:
    assert plan_with(tmp_path, **fields) is not None


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        (None, True),
        ("", True),
        ("tiny", True),
        ("acme/Tiny-1B", True),
        ("mirror/tiny-1b", True),
        ("unsloth/tiny-1b-unsloth-bnb-4bit", True),
        ("someone/Tiny-1B-GPTQ-Int4", True),
        ("/home/me/models/other", True),
        ("./out/merged", True),
        ("out/run/merged", True),
        ("C:\\models\\other", True),
        ("acme/Tiny-1B-Instruct", False),
        ("meta-llama/Llama-3-8B", False),
    ],
)
def test_base_model_name(name: str | None, accepted: bool, tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, aliases=("acme/Tiny-1B",))
    write_random_adapter(tmp_path, base, 2, config_overrides={"base_model_name_or_path": name})
    header = peft.read_header(tmp_path)
    if accepted:
        peft.plan(header, base)
    else:
        with pytest.raises(AdapterMismatch, match="trained on"):
            peft.plan(header, base)
    peft.plan(header, BASE)  # a base without a public name cannot tell


# -- tensors against config and base -----------------------------------------------------


def shapes(modules: list[str], rank: int = 2, base: BaseInfo = BASE) -> dict[str, TensorHeader]:
    sites = {site.name: site for site in base.sites}
    header = {}
    for module in modules:
        site = sites[module]
        prefix = f"base_model.model.{module}"
        header[f"{prefix}.lora_A.weight"] = TensorHeader("F32", (rank, site.in_features))
        header[f"{prefix}.lora_B.weight"] = TensorHeader("F32", (site.out_features, rank))
    return header


Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
PLAIN: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def test_a_deeper_base_is_another_base() -> None:
    with pytest.raises(AdapterMismatch, match="tensors for 2 layers"):
        LoraFormat().plan(PLAIN, shapes(Q[:2]), BASE)


def test_a_gap_is_a_broken_file() -> None:
    header = shapes(Q)
    config = PLAIN | {"target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(InvalidAdapter, match=r"v_proj and 3 more, but there are no tensors"):
        LoraFormat().plan(config, header, BASE)


def test_output_layer_in_the_config_does_not_pass_unnoticed() -> None:
    with pytest.raises(InvalidAdapter, match="lm_head"):
        LoraFormat().plan(PLAIN | {"target_modules": ["q_proj", "lm_head"]}, shapes(Q), BASE)


def test_tensors_that_the_config_leaves_out() -> None:
    with pytest.raises(InvalidAdapter, match="PEFT would ignore"):
        LoraFormat().plan(PLAIN | {"layers_to_transform": [0, 1, 2]}, shapes(Q), BASE)


def test_key_with_the_adapter_name_left_in() -> None:
    header = {name.replace(".weight", ".default.weight"): entry for name, entry in shapes(Q).items()}
    with pytest.raises(InvalidAdapter, match="save_pretrained"):
        LoraFormat().plan(PLAIN, header, BASE)


@pytest.mark.parametrize(("large", "alpha", "refused"), [("B", 32, True), ("B", 2, False), ("A", 32, False)])
def test_a_scale_that_overflows_is_refused(large: str, alpha: int, refused: bool, tmp_path: Path) -> None:
    """Finite numbers, each of them; only B meets the scale, which is alpha / 2 here."""
    folder = write_random_adapter(tmp_path, BASE, 2, config_overrides={"lora_alpha": alpha})
    file = folder / peft.TENSOR_FILE
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if f"lora_{large}" in name)
    tensors[name][0, 0] = -1e38
    save_file(tensors, file)
    if refused:
        with pytest.raises(InvalidAdapter, match=f"{name} times its scale 16 is too large"):
            peft.read(folder, BASE)
    else:
        peft.read(folder, BASE)


def test_nothing_is_copied_or_rounded_when_lowering() -> None:
    """bf16 B times a scale that bf16 cannot hold: rounding once, at the storage, is the kernels'."""
    name = "base_model.model." + Q[0]
    site = BASE.sites[0]
    b = torch.randn(site.out_features, 3).to(torch.bfloat16)
    tensors = {f"{name}.lora_A.weight": torch.randn(3, site.in_features), f"{name}.lora_B.weight": b}
    config = PLAIN | {"r": 3, "lora_alpha": 1, "layers_to_transform": 0}
    header = {name: TensorHeader("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    pair = LoraFormat().lower(LoraFormat().plan(config, header, BASE), tensors, 9.0).low_rank[0]
    assert pair.b.data_ptr() == b.data_ptr()
    assert torch.equal(pair.b, b.T)
    assert pair.scale == 1 / 3
