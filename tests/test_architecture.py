"""The house keeps its shape: imports only go down, and the documented names exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "chiliad"

RANKS = {
    "__init__": 7, "errors": 0, "config": 0, "core": 0, "observe": 0,
    "kernels": 1, "memory": 2, "adapters": 3, "models": 3, "engine": 4, "train": 4,
    "cluster": 5, "serve": 6, "cli": 7, "bench": 7, "testing": 7, "demo": 7, "__main__": 7,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """First room of every chiliad import in a file, those inside functions included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "chiliad":
                names = [f"chiliad.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("chiliad.")}
    return {room for room in rooms if room in RANKS}  # the rest are names such as __version__


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in RANKS, f"{room} has no rank: add it to RANKS and to docs/architecture.md"
    for other in imports_of(path) - {room}:
        assert RANKS[other] <= RANKS[room], f"{path.name} (rank {RANKS[room]}) imports {other} above it"
        siblings = {frozenset({"adapters", "models"}), frozenset({"engine", "train"})}
        assert frozenset({room, other}) not in siblings, f"{room} and {other} must not import each other"


TORCH_FREE = (
    "errors", "config", "core", "observe", "memory.pool", "memory.prefix", "adapters.registry",
    "engine.policy", "engine.scheduler", "cli",
)  # fmt: skip


@pytest.mark.parametrize("module", TORCH_FREE)
def test_runs_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import chiliad.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_architecture_names_exist() -> None:
    """Every `file.py` and every dotted `module.name` in docs/architecture.md is real."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in PACKAGE.rglob("*.py")}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(path == name or path.endswith("/" + name) for path in sources), f"no such file: {name}"
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", text):
        if name in ("py", "cpp", "md", "json"):
            continue
        holders = [s for path, s in sources.items() if Path(path).stem == module or f"class {module}" in s]
        assert any(re.search(rf"\b(def|class) {name}\b|\b{name}\b\s*[:=]", s) for s in holders), (
            f"docs/architecture.md names {module}.{name}, which does not exist"
        )
