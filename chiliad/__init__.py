"""chiliad: train, store and serve thousands of adapters on one base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from chiliad.core import SamplingParams
    from chiliad.engine.llm import LLM


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `chiliad --version` stays quick."""
    if name == "LLM":
        from chiliad.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from chiliad.core import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'chiliad' has no attribute {name!r}")
