"""LoRA: y += scale * B (A x), as PEFT's `LoraConfig` defines it (Hu et al., arXiv 2106.09685).

Every field of adapter_config.json is honoured, known to be of no consequence when serving, or
refused by its name. The tensors present say what the adapter is; the config must agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chiliad.adapters.base import AdapterPlan, Lowered, LowRank, TensorHeader
from chiliad.adapters.patterns import first_matches, fullmatches, listed
from chiliad.core import BaseInfo
from chiliad.errors import AdapterMismatch, InvalidAdapter

if TYPE_CHECKING:
    import torch

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

#: Fields without a say in what a trained adapter computes.
_INERT = {
    *("peft_type", "peft_version", "inference_mode", "revision", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    # recipes of an initialisation: init_lora_weights says whether one was used
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # PEFT corrects it to the kind of layer it meets; A and B look alike either way
    "fan_in_fan_out",
}

#: Fields that `_Config` reads.
_HONOURED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "task_type"),
    *("auto_mapping", "bias", "base_model_name_or_path"),
}

_MERGE = "merge it into the base with PEFT's merge_and_unload and serve that as a model"

#: Fields that change what the adapter computes in a way not served yet, with what to do.
_REFUSED = {
    "lora_bias": "trained bias vectors are not served: train without lora_bias, or " + _MERGE,
    "use_dora": "train without DoRA, or " + _MERGE,
    "modules_to_save": "whole trained modules are not served per request: train without it, or " + _MERGE,
    "trainable_token_indices": "trained embedding rows are not served: train without it, or " + _MERGE,
    "target_parameters": "adapters on bare parameters (experts) are not served: use target_modules",
    "layer_replication": "the adapter belongs to a deeper model made of repeated layers: serve that model",
    "alora_invocation_tokens": "activated LoRA starts in mid-sequence, which is not served: train plain LoRA",
    "arrow_config": "routing among adapters is not served: load the adapters one by one",
    "use_qalora": "pooled inputs are not served: train plain LoRA",
    "use_bdlora": "block-diagonal factors are not served: export plain LoRA",
    "kasa_config": "KaSA truncates the base's weights: " + _MERGE,
    "monteclora_config": "Monte Carlo sampling is not served: export plain LoRA",
    "velora_config": "VeLoRA stores tensors of its own: save the adapter with velora_config=null",
    "megatron_config": "Megatron layers are not served: export with plain PEFT",
}

#: Initialisations that leave the base's weights alone.
_INIT_HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
#: Values with which a field switches its feature off.
_OFF: tuple[object, ...] = (None, False, [], {}, "")

#: Adapters are often trained on a quantised or repackaged copy of the same weights.
_REPACKAGED = re.compile(
    r"([-_.](unsloth|bnb|gptq|awq|gguf|ggml|hf|mlx|fp8|nf4|quantized|dynamic|(int)?[48]-?bits?|int[48]|"
    r"w\d+a\d+|q\d\w*))+$"
)

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB]\.weight)")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")  # PEFT: the first numbered segment

#: Modules of every base that are not sites; a config that targets them must not pass unnoticed.
_NOT_SITES = ("lm_head", "model.embed_tokens", "transformer.wte", "transformer.wpe")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of one site, with names of their tensors."""

    slot: int
    rank: int
    scale: float
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class _Plan(AdapterPlan):
    pairs: tuple[_Pair, ...] = ()


class LoraFormat:
    """Implements `adapters.base.AdapterFormat`."""

    peft_type: ClassVar[str] = "LORA"

    def check(self, config: Mapping[str, object]) -> None:
        _Config(config)

    def plan(
        self, config: Mapping[str, object], header: Mapping[str, TensorHeader], base: BaseInfo
    ) -> AdapterPlan:
        pairs = _pairs(config, {name: entry.shape for name, entry in header.items()}, base)
        return _Plan("lora", {pair.slot: pair.rank for pair in pairs}, pairs=tuple(pairs))

    def lower(self, plan: AdapterPlan, tensors: Mapping[str, torch.Tensor], largest: float) -> Lowered:
        assert isinstance(plan, _Plan)
        low_rank = {}
        for pair in plan.pairs:
            a, b = tensors[pair.a], tensors[pair.b]
            if abs(pair.scale) * largest > _FLOAT32_MAX and _overflows(b, pair.scale):
                raise InvalidAdapter(
                    f"tensor {pair.b} times its scale {pair.scale:g} is too large to compute with"
                )
            low_rank[pair.slot] = LowRank(a, b.t(), pair.scale)
        return Lowered(low_rank)


def _overflows(tensor: torch.Tensor, scale: float) -> bool:
    return not bool((tensor.float() * scale).isfinite().all())


class _Config:
    """The honoured fields, typed. Raises InvalidAdapter on any field that cannot be honoured."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._raw = config
        for name, value in config.items():
            if name in _REFUSED and value not in _OFF:
                raise _refusal(name, value, _REFUSED[name])
            if name not in _HONOURED | _INERT | _REFUSED.keys() and value not in _OFF:
                raise _refusal(name, value, "this field is unknown; remove it if inference does not need it")
        self.rank = self._positive("r", config.get("r", 8))
        self.alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        self.rslora = self._flag("use_rslora")
        self.ranks = {k: self._positive(f"rank_pattern[{k[:80]!a}]", v) for k, v in self._map("rank_pattern")}
        self.alphas = {
            k: self._number(f"alpha_pattern[{k[:80]!a}]", v) for k, v in self._map("alpha_pattern")
        }
        self.targets = self._modules("target_modules")
        self.excluded = self._modules("exclude_modules")
        self.layers = self._layers()
        self.layer_names = self._layer_names()
        if not self.targets:
            raise _refusal("target_modules", config.get("target_modules"), "name the modules that it adapts")
        if isinstance(self.targets, str) and (self.layers or self.layer_names):
            raise _refusal("layers_to_transform", self.layers, "PEFT wants target_modules as a list then")
        if self.layer_names and not self.layers:
            raise _refusal("layers_pattern", self.layer_names, "it needs layers_to_transform")
        init = config.get("init_lora_weights", True)
        if init not in _INIT_HARMLESS or type(init) is int:
            raise _refusal(
                "init_lora_weights",
                init,
                "training changed the base's weights too: convert to plain LoRA with PEFT's "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
            )
        if config.get("bias", "none") not in ("none", None):
            raise _refusal("bias", config["bias"], "trained biases are not served: train with bias='none'")
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise _refusal("task_type", config["task_type"], "only CAUSAL_LM adapters are served")
        mapping = config.get("auto_mapping")
        if mapping:  # PEFT notes the model's class there when task_type was not given
            model = mapping.get("base_model_class") if isinstance(mapping, dict) else None
            if not isinstance(model, str) or not re.search(r"CausalLM|LMHead|ConditionalGeneration", model):
                raise _refusal("auto_mapping", mapping, "only adapters of causal language models are served")

    def targeted(self, names: tuple[str, ...]) -> set[str]:
        """The modules among `names` that PEFT would adapt."""
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                found = {name for name in names if name not in _NOT_SITES}
            else:
                found = set(fullmatches(self.targets, names))
        else:
            found = {name for name in listed(self.targets, names) if self._in_layers(name)}
        if isinstance(self.excluded, str):
            return found - fullmatches(self.excluded, names) if self.excluded else found
        return found - listed(self.excluded, names)

    def patterned(self, pattern: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
        """Per module the value of the first key that matches it, as PEFT's dictionary order has it."""
        return {name: pattern[key] for name, key in first_matches(tuple(pattern), names).items()}

    def _in_layers(self, name: str) -> bool:
        if not self.layers:
            return True
        if not self.layer_names:
            match = _LAYER.match(name)
        else:
            found = (re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", name) for p in self.layer_names)
            match = next((m for m in found if m is not None), None)
        return match is not None and int(match["index"]) in self.layers

    def _positive(self, field: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 1 << 31:
            raise _refusal(field, value, "it must be a positive integer")
        return value

    def _number(self, field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
            raise _refusal(field, value, "it must be a finite number")
        return value

    def _flag(self, field: str) -> bool:
        value = self._raw.get(field)
        if value is not None and not isinstance(value, bool):
            raise _refusal(field, value, "it must be true or false")
        return bool(value)

    def _map(self, field: str) -> list[tuple[str, object]]:
        value = self._raw.get(field)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise _refusal(field, value, "it must map module patterns to numbers")
        return list(value.items())

    def _modules(self, field: str) -> str | tuple[str, ...]:
        value = self._raw.get(field)
        if value is None:
            return ()
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise _refusal(field, value, "it must be a pattern or a list of module names")
        return tuple(value)

    def _layers(self) -> frozenset[int]:
        value = self._raw.get("layers_to_transform")
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(v) is int for v in listed):
            raise _refusal("layers_to_transform", value, "it must be a layer index or a list of them")
        return frozenset(listed)

    def _layer_names(self) -> tuple[str, ...]:
        value = self._raw.get("layers_pattern")
        listed = [] if value in (None, "") else value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) and re.fullmatch(r"[\w.]+", v) for v in listed):
            raise _refusal("layers_pattern", value, "it must be the plain name of the list of layers")
        return tuple(listed)


def _pairs(
    config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], base: BaseInfo
) -> list[_Pair]:
    """Match tensors with the config and the base. Raises InvalidAdapter or AdapterMismatch."""
    settings = _Config(config)
    _check_base(config.get("base_model_name_or_path"), base)
    names = tuple(site.name for site in base.sites)
    slots = {name: slot for slot, name in enumerate(names)}
    parts: dict[str, dict[str, str]] = {}
    for tensor in shapes:
        match = _KEY.fullmatch(tensor)
        if match is None:
            raise InvalidAdapter(f"tensor {tensor} is not part of a plain LoRA adapter{_hint(tensor)}")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise InvalidAdapter("the adapter has no tensors")
    strangers = [module for module in parts if module not in slots]
    if strangers:
        raise AdapterMismatch(
            f"the adapter changes {_some(strangers)}, not among the {len(names)} projections of {base.name} "
            "that can be adapted: it was trained on another model, or on embeddings or the output layer"
        )
    targeted = settings.targeted(names + _NOT_SITES)
    _check_targets(parts, targeted, base)
    ranks = settings.patterned(settings.ranks, names)
    alphas = settings.patterned(settings.alphas, names)
    pairs = []
    for module, part in parts.items():
        site = base.sites[slots[module]]
        a, b = part.get("lora_A.weight"), part.get("lora_B.weight")
        if a is None or b is None:
            have, lack = ("lora_A", "lora_B") if b is None else ("lora_B", "lora_A")
            raise InvalidAdapter(f"{module} has {have} but no {lack}: the file is incomplete")
        a_shape, b_shape = shapes[a], shapes[b]
        rank = int(ranks.get(module, settings.rank))
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
            raise InvalidAdapter(f"{module}: A {list(a_shape)} and B {list(b_shape)} do not multiply")
        if (a_shape[1], b_shape[0]) != (site.in_features, site.out_features):
            raise AdapterMismatch(
                f"{module}: the adapter maps {a_shape[1]} features to {b_shape[0]}, {base.name} maps "
                f"{site.in_features} to {site.out_features}: it was trained on another model"
            )
        if a_shape[0] != rank:
            raise InvalidAdapter(
                f"{module}: A has rank {a_shape[0]}, the config (r, rank_pattern) says {rank}"
            )
        alpha = alphas.get(module, settings.alpha)
        scale = alpha / math.sqrt(rank) if settings.rslora else alpha / rank
        pairs.append(_Pair(slots[module], rank, scale, a, b))
    return sorted(pairs, key=lambda pair: pair.slot)


def _check_targets(parts: Mapping[str, object], targeted: set[str], base: BaseInfo) -> None:
    """The config's target_modules and the modules that have tensors must be the same."""
    extra = [module for module in parts if module not in targeted]
    if extra:
        raise InvalidAdapter(
            f"there are tensors for {_some(extra)}, but the config (target_modules, exclude_modules, "
            "layers_to_transform) leaves it out: PEFT would ignore them"
        )
    missing = sorted(targeted - parts.keys())
    if missing:
        layer_of = {site.name: site.layer for site in base.sites}
        present = {layer_of[module] for module in parts}
        if all(module in layer_of and layer_of[module] not in present for module in missing):
            raise AdapterMismatch(
                f"the adapter has tensors for {len(present)} layers, but targets more of the layers of "
                f"{base.name}, such as {_some(missing)}: it was trained on another model"
            )
        raise InvalidAdapter(f"the config targets {_some(missing)}, but there are no tensors for it")


def _check_base(trained_on: object, base: BaseInfo) -> None:
    """Refuse an adapter that names another model.

    A name decides only when both sides are public `organisation/model` names: local paths say
    nothing. The organisation and suffixes of quantised copies are ignored, since mirrors and
    4-bit copies of the same model are what people train on.
    """
    if trained_on is None or trained_on == "":
        return
    if not isinstance(trained_on, str):
        raise _refusal("base_model_name_or_path", trained_on, "it must be a string")
    known = [name for name in (base.name, *base.aliases) if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    if not known or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", trained_on):
        return
    if _model(trained_on) not in {_model(name) for name in (base.name, *base.aliases)}:
        raise AdapterMismatch(
            f"the adapter was trained on {trained_on[:200]}, the base is {known[0]}: serve it on its own "
            "base (or correct base_model_name_or_path in adapter_config.json if they are the same)",
            param="base_model_name_or_path",
        )


def _model(name: str) -> str:
    """ "unsloth/SmolLM2-135M-Instruct-bnb-4bit" -> "smollm2-135m-instruct"."""
    return _REPACKAGED.sub("", name.rsplit("/", 1)[-1].lower())


def _hint(tensor: str) -> str:
    if "lora_magnitude" in tensor:
        return " (it is DoRA's)"
    if "lora_B.bias" in tensor:
        return " (it is a trained bias)"
    if re.search(r"lora_[AB]\.[^.]+\.(weight|bias)$", tensor):
        return ": save it with PEFT's save_pretrained, which leaves the adapter's name out"
    if "lora_embedding" in tensor:
        return ": embeddings are not adapted per request"
    if not tensor.startswith("base_model.model."):
        return ": PEFT's names begin with base_model.model."
    return ""


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"


def _refusal(field: str, value: object, advice: str) -> InvalidAdapter:
    return InvalidAdapter(f"adapter_config.json: {field}={ascii(value)[:80]}: {advice}", param=field)
