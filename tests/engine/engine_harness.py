"""What the engine tests share: the adapters they mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chiliad import LLM

MakeLLM = Callable[..., LLM]

#: name -> how to write it: ranks, subsets and every scale rule that PEFT LoRA has
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1-qv": {"rank": 1},
    "r3-qv": {"rank": 3},
    "r8-qv": {"rank": 8},
    "r16-all": {"rank": 16, "targets": "all-linear"},
    "r64-all": {"rank": 64, "targets": "all-linear"},
    "r8-mlp": {"rank": 8, "targets": ("gate_proj", "up_proj", "down_proj")},
    "r4-o": {"rank": 4, "targets": ("o_proj",)},
    "rank-pattern": {"rank": 4, "config_overrides": {"rank_pattern": {"v_proj": 9}}},
    "alpha-pattern": {"rank": 4, "config_overrides": {"alpha_pattern": {"q_proj": 2.5}}},
    "rslora": {"rank": 16, "config_overrides": {"use_rslora": True, "lora_alpha": 4}},
    "layer-one": {"rank": 8, "config_overrides": {"layers_to_transform": [1]}},
    "strong-v": {"rank": 2, "targets": ("v_proj",), "std": 0.6},
}
