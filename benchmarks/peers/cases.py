"""What is measured, by whom, and what chiliad must reach."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Run:
    """Which process answers a case. A slow one gets a smaller job of the same composition."""

    system: str  # as shown
    process: str  # key in `processes`
    prompt: int | None = None  # tokens instead of the case's
    output: int | None = None


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    prompt: int  # tokens in, per row
    output: int  # tokens out, per row
    runs: tuple[Run, ...]
    adapters: str | None = None  # prefix of the adapter folders
    distinct: int = 0

    @property
    def prefill(self) -> bool:
        """Judged by prompt tokens and flops instead of generated tokens and bytes."""
        return self.output == 1

    def names(self) -> list[str | None]:
        if self.adapters is None:
            return [None] * self.rows
        return [f"{self.adapters}-{i % self.distinct:02}" for i in range(self.rows)]


CHILIAD = Run("chiliad", "chiliad")
TRANSFORMERS = Run("transformers", "peft")
LLAMA = Run("llama.cpp Q4_1", "llama")

CASES = (
    Case("stream1", 1, 64, 128, (
        CHILIAD, Run("chiliad int8", "chiliad-int8"), Run("chiliad int4", "chiliad-int4"),
        Run("vLLM", "vllm"), TRANSFORMERS, LLAMA,
    )),
    Case("base32", 32, 64, 64, (CHILIAD, Run("vLLM", "vllm"), TRANSFORMERS, replace(LLAMA, output=17))),
    Case("one_adapter", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r16", output=17), Run("PEFT", "peft"),
    ), "rank16", 1),
    Case("lora32", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r16", output=17), Run("PEFT", "peft", output=9),
    ), "rank16", 32),
    Case("mixed32", 32, 64, 64, (
        CHILIAD, Run("vLLM", "vllm-r64", 16, 5), Run("PEFT", "peft", output=5),
    ), "mixed", 32),
    Case("prefill_base", 8, 1024, 1, (CHILIAD, Run("vLLM", "vllm"), TRANSFORMERS, replace(LLAMA, prompt=256))),
    Case("prefill_lora8", 8, 1024, 1, (
        CHILIAD, Run("vLLM", "vllm-r16", prompt=256), Run("PEFT", "peft"),
    ), "rank16", 8),
)  # fmt: skip
QUICK = ("stream1", "base32", "lora32")


@dataclass(frozen=True)
class Target:
    """What chiliad must reach beside a system, the floor, or itself in another case."""

    case: str
    over: str  # a system of the case, "floor", or the name of another case
    at_least: float
    system: str = "chiliad"


TARGETS = (
    Target("base32", "vLLM", 4), Target("base32", "floor", 0.55),
    Target("lora32", "vLLM", 25), Target("lora32", "PEFT", 30), Target("lora32", "floor", 0.5),
    Target("mixed32", "floor", 0.45), Target("one_adapter", "base32", 0.9),
    Target("prefill_base", "vLLM", 2), Target("prefill_lora8", "vLLM", 15), Target("prefill_base", "floor", 0.4),
    Target("stream1", "floor", 0.6), Target("stream1", "vLLM", 4),
    Target("stream1", "chiliad", 1.6, "chiliad int8"), Target("stream1", "chiliad", 2.2, "chiliad int4"),
    Target("stream1", "llama.cpp Q4_1", 1, "chiliad int4"),
)  # fmt: skip
