"""A tiny random model with a dozen adapters, and engines on it, for every test of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import ADAPTERS, MakeLLM

from chiliad import LLM
from chiliad.config import SchedulerConfig
from chiliad.core import BaseInfo
from chiliad.testing import base_info, tiny_config, tiny_model, write_random_adapter


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(folder, "llama", seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_base() -> BaseInfo:
    return base_info(tiny_config("llama"), name="tiny")


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: BaseInfo) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, how) in enumerate(ADAPTERS.items()):
        write_random_adapter(folder / name, tiny_base, seed=seed, **how)
    return folder


@pytest.fixture
def make_llm(model_folder: Path, adapter_folder: Path) -> Iterator[MakeLLM]:
    """LLMs in float32; after the test each must be empty again, to the page."""
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        settings = {"memory": "200MB", "dtype": "float32", "adapters": adapter_folder} | options
        settings.setdefault("scheduler", SchedulerConfig())
        llm = LLM(str(model_folder), **settings)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        engine = llm.engine
        assert engine.idle
        engine.pool.check()
        assert not engine.scheduler.running
        llm.close()
        engine.pool.check()
