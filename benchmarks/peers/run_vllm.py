"""vLLM's CPU build, for `run.py`; needs only vLLM's own environment.

The driver sets what vLLM's documentation asks for: tcmalloc and libiomp preloaded, threads bound.
On a machine of few cores the engine runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0):
its worker processes would reserve a core for the scheduler, which waits in a busy loop.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from worker import Names, Prompts, serve

SHOWN = (
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND",
    "OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_TPAUSE",
)  # fmt: skip


class VLLM:
    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import vllm
        from vllm.lora.request import LoRARequest

        self.vllm = vllm
        engine: dict[str, Any] = {
            "model": options["model"],
            "dtype": "bfloat16",
            "max_model_len": options["max_model_len"],
            "kv_cache_memory_bytes": 2**30,
            "enable_prefix_caching": False,  # every prompt is new
            "disable_log_stats": True,
            "seed": 0,
        } | options["engine"]
        self.llm = vllm.LLM(**engine)
        self.loras = {
            path.name: LoRARequest(path.name, i + 1, str(path))
            for i, path in enumerate(sorted(Path(options["adapters"]).iterdir()))
        }
        self.count = itertools.count()
        self.about = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "engine": options["engine"],
            "environment": {name: os.environ[name] for name in SHOWN if name in os.environ},
            "preloaded": [Path(part).name for part in os.environ.get("LD_PRELOAD", "").split(":")],
        }

    def run(self, prompts: Prompts, adapters: Names, max_tokens: int) -> tuple[list[list[int]], float | None]:
        # the loop of LLM.generate, written out to see when the first tokens come
        params = self.vllm.SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        engine = self.llm.llm_engine
        rows: dict[str, int] = {}
        for i, (prompt, name) in enumerate(zip(prompts, adapters, strict=True)):
            request = f"r{next(self.count)}"
            rows[request] = i
            lora = None if name is None else self.loras[name]
            engine.add_request(request, {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        tokens: list[list[int]] = [[] for _ in prompts]
        started: set[str] = set()
        first = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                started.add(output.request_id)
                if output.finished:
                    tokens[rows[output.request_id]] = list(output.outputs[0].token_ids)
            if first is None and len(started) == len(rows):
                first = time.perf_counter()
        return tokens, first


if __name__ == "__main__":  # vLLM may start processes that import this file
    serve(VLLM)
