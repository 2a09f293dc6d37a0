"""chiliad, for `run.py`. It also measures the machine's ceilings, with the same threads."""

from __future__ import annotations

from typing import Any

from worker import Names, Prompts, serve

from chiliad import LLM, SamplingParams, __version__
from chiliad.config import KernelConfig
from chiliad.kernels.cpu import CpuKernels


class Chiliad:
    def __init__(self, options: dict[str, Any]) -> None:
        self.llm = LLM(
            options["model"],
            adapters=options.get("adapters"),
            memory=options["memory"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            kernel=KernelConfig(threads=options["threads"]),
        )
        kernels = self.llm.kernels
        self.about = {"chiliad": __version__, "dtype": options["dtype"], "kernels": kernels.reason}

    def run(self, prompts: Prompts, adapters: Names, max_tokens: int) -> tuple[list[list[int]], float | None]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, adapters)
        return [output.choices[0].token_ids for output in outputs], None

    def ceilings(self) -> dict[str, float]:
        """Bytes and flops per second; needs the C++ kernels."""
        kernels = self.llm.kernels
        assert isinstance(kernels, CpuKernels), "ceilings need the C++ kernels: `make build`"
        return {"read": kernels.read_bandwidth(), "multiply": kernels.multiply_rate("bfloat16")}


serve(Chiliad)
