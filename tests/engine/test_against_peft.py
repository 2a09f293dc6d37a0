"""One mixed batch on the real model answers as PEFT does with each adapter alone.

A small edition of benchmarks/peft_equality, which runs 100 prompts of 64 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peft_equality"))

import compare


@pytest.mark.timeout(900)  # three models in up to float64
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own deprecations
def test_mixed_batch_equals_peft() -> None:
    report = compare.compare(count=13, tokens=8, truth="float64")
    found = report["chiliad"]
    assert found["tokens"] == 13 * 8
    assert found["same_best_token"] == found["tokens"], report["adapters"]
    assert found["max_dlogit"] <= 1e-4, report["adapters"]
