from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_fake import Connect, FakeEngine

from chiliad.config import ServerConfig
from chiliad.models.tokenizer import Tokenizer
from chiliad.serve.app import create_app
from chiliad.serve.service import Service
from chiliad.testing import base_info, tiny_config, tiny_model, write_random_adapter

sys.path.insert(0, str(Path(__file__).parent.parent))  # bad_adapters


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(folder, _name_or_path="org/tiny", max_position_embeddings=4096)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_folder)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with the adapters red and blue."""
    base = base_info(tiny_config(), "tiny")
    for seed, name in enumerate(("red", "blue")):
        write_random_adapter(tmp_path / "adapters" / name, base, rank=4, seed=seed)
    return tmp_path / "adapters"


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(base_info(tiny_config(_name_or_path="org/tiny"), "tiny"), tokenizer)


@pytest.fixture
def connect(engine: FakeEngine, adapters: Path, tmp_path: Path) -> Connect:
    """async with connect(api_keys=...) as client: an HTTP client of an app over the fake engine."""

    @asynccontextmanager
    async def open_client(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        headers, strict = settings.pop("headers", {}), settings.pop("strict", True)
        config = ServerConfig(
            **{"adapter_dirs": (adapters,), "uploads": tmp_path / "uploads", "model_name": "tiny"} | settings
        )
        service = Service(engine, config)
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=strict)
        base_url = "http://127.0.0.1:8000"
        async with httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers) as client:
            client.service = service  # type: ignore[attr-defined]
            yield client
        assert not engine.live, "a request is still in the engine"

    return open_client
