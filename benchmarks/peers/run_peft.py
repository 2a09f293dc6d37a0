"""transformers for the plain base, PEFT's mixed batch (`adapter_names`) for adapters, for `run.py`."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from worker import Names, Prompts, serve


def keep_freed_memory() -> None:
    """Stop glibc from giving freed activations back to the kernel: page faults cost up to 10x here."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class FirstToken(transformers.StoppingCriteria):
    """Notes when the first token was there; never stops."""

    at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peft:
    def __init__(self, options: dict[str, Any]) -> None:
        keep_freed_memory()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        self.base = self._base(options["model"])
        self.about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": self.base.config._attn_implementation,
            "dtype": "bfloat16",
        }
        self.mixed: Any = None
        if options.get("adapters"):
            began = time.perf_counter()
            # adapters stay in bfloat16, as the base
            how = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
            first, *rest = sorted(path for path in Path(options["adapters"]).iterdir())
            base = self._base(options["model"])
            self.mixed = peft.PeftModel.from_pretrained(base, first, adapter_name=first.name, **how)
            for path in rest:
                self.mixed.load_adapter(path, adapter_name=path.name, **how)
            self.mixed.eval()
            count = 1 + len(rest)
            self.about |= {
                "peft": peft.__version__,
                "adapter_load_seconds": round(time.perf_counter() - began, 1),
                "adapters": count,
            }

    @staticmethod
    def _base(folder: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model.generation_config.pad_token_id = 2
        return model

    def run(self, prompts: Prompts, adapters: Names, max_tokens: int) -> tuple[list[list[int]], float | None]:
        ids = torch.tensor(prompts)  # all of one length: no padding
        noted = FirstToken()
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "min_new_tokens": max_tokens,
            "max_new_tokens": max_tokens,
            "stopping_criteria": [noted],
        }
        names = set(adapters)
        with torch.inference_mode():
            if names == {None}:
                made = self.base.generate(**options)
            elif len(names) == 1:
                self.mixed.set_adapter(adapters[0], inference_mode=True)
                made = self.mixed.generate(**options)
            else:
                made = self.mixed.generate(**options, adapter_names=list(adapters))
        return made[:, ids.shape[1] :].tolist(), noted.at


serve(Peft)
