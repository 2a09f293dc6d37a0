"""The command line on a tiny model: data on stdout, notes on stderr, no traceback for a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chiliad import __version__, cli

SMALL = ["--memory", "100MB", "--dtype", "float32", "--threads", "1"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILIAD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHILIAD_API_KEY", raising=False)


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *args: object) -> int:
        """Run `chiliad ARGS`; returns the exit code."""
        self._monkeypatch.setattr(sys, "argv", ["chiliad", *map(str, args)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.err
        return int(str(code or 0))

    @property
    def data(self) -> object:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


def test_version_imports_nothing_heavy() -> None:
    code = (
        "import sys; from chiliad import cli; sys.argv = ['chiliad', '--version']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'rich', 'uvicorn', 'starlette', 'tokenizers', 'msgspec', 'orjson'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout


def test_registry_verbs_need_no_torch(adapters: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from chiliad import cli\n"
        "for args in (['adapters', 'add', sys.argv[1]], ['adapters', 'ls'], ['adapters', 'show', 'red'],\n"
        "             ['adapters', 'rm', 'red']):\n"
        "    sys.argv[1:] = args\n"
        "    cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapters / "red")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("red@1\nred\t1\tlora")


@pytest.mark.parametrize(
    "verb",
    [(), ("serve",), ("chat",), ("generate",), ("adapters",), ("adapters", "ls"), ("adapters", "check"),
     ("info",), ("bench",), ("bench", "offline"), ("demo",)],
)  # fmt: skip
def test_help(run: Run, verb: tuple[str, ...]) -> None:
    assert run(*verb, "--help") == 0
    assert run.out.startswith("Usage: chiliad")
    if verb == ("serve",):
        assert "CHILIAD_API_KEY" in run.out
        assert "[default: 127.0.0.1]" in run.out


def test_generate(run: Run, model_folder: Path, adapters: Path) -> None:
    assert run("generate", model_folder, "one", "two", "--max-tokens", 5, "-o", "json", *SMALL) == 0
    base = run.data
    assert isinstance(base, list)
    assert [(item["prompt"], item["completion_tokens"] <= 5) for item in base] == [
        ("one", True),
        ("two", True),
    ]
    assert "loading" in run.err
    named = ("--adapter", "red", "--adapters", adapters)
    for chosen in (named, ("--adapter", adapters / "red")):
        assert run("generate", model_folder, "one", "--max-tokens", 5, "-o", "json", *chosen, *SMALL) == 0
        assert run.data[0]["adapter"] == "red"  # type: ignore[index]
    assert run("generate", model_folder, "one", "--max-tokens", 5, "--raw", *SMALL) == 0
    assert run.out.startswith("one")


def test_chat(run: Run, model_folder: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "/adapter red", "/adapter nobody", "hello", "/clear", "/what", "/base", "bye"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        print(f"{prompt}{line}")
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert (
        run("chat", model_folder, "--adapters", adapters, "--max-tokens", 4, "--system", "Be brief", *SMALL)
        == 0
    )
    assert "base> hello" in run.out
    assert "red> hello" in run.out
    assert "base> bye" in run.out
    assert "nobody" in run.err


def test_info(run: Run, model_folder: Path) -> None:
    assert run("info", model_folder, "-o", "json", *SMALL) == 0
    data = run.data
    assert isinstance(data, dict)
    assert data["kernels"]["implementation"] in ("cpu", "reference")
    assert data["model"]["family"] == "llama"
    assert "pages" in data["memory plan"]["pool"]
    assert run("info") == 0
    assert "usable cores" in run.out


def test_adapters(run: Run, adapters: Path) -> None:
    assert run("adapters", "add", adapters / "red", "--name", "sql") == 0
    assert run.out == "sql@1\n"
    assert run("adapters", "add", adapters / "blue", "--name", "sql") == 2
    assert "taken" in run.err
    assert run("adapters", "add", adapters / "blue", "--name", "sql", "--replace") == 0
    assert run("adapters", "show", "sql", "-o", "json") == 0
    assert run.data["versions"] == [1, 2]  # type: ignore[index]
    assert run("adapters", "ls", "-o", "json") == 0
    assert [item["name"] for item in run.data] == ["sql"]  # type: ignore[attr-defined]
    assert run("adapters", "rm", "sql") == 0
    assert run("adapters", "rm", "sql") == 2
    assert run("adapters", "ls", "--adapters", adapters) == 0
    assert [line.split("\t")[0] for line in run.out.splitlines()] == ["blue", "red"]
    assert run("adapters", "ls") == 0
    assert run.out == ""


def test_adapters_check(run: Run, adapters: Path, model_folder: Path) -> None:
    assert run("adapters", "check", adapters / "red", adapters / "blue") == 0
    assert run.out.count("ok") == 2
    config = json.loads((adapters / "red" / "adapter_config.json").read_text())
    (adapters / "dora").mkdir()
    (adapters / "dora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    shutil.copy(adapters / "red" / "adapter_model.safetensors", adapters / "dora")
    assert run("adapters", "check", adapters / "dora") == 2
    assert "use_dora" in run.out
    assert run("adapters", "add", adapters / "dora") == 2
    assert "use_dora" in run.err
    (adapters / "blue" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert (
        run("adapters", "check", adapters / "red", adapters / "blue", "--model", model_folder, "-o", "json")
        == 2
    )
    data = run.data
    assert isinstance(data, list)
    assert [item["ok"] for item in data] == [True, False]
    assert "rank up to 4" in data[0]["message"]


def test_bench_offline(run: Run, model_folder: Path) -> None:
    args = ("--requests", 6, "--concurrency", 3, "--input-len", 8, "--output-len", 5, "--num-adapters", 3)
    assert run("bench", "offline", model_folder, *args, "--popularity", "zipf", "-o", "json", *SMALL) == 0
    data = run.data
    assert isinstance(data, dict)
    assert data["output_tokens"] == 30
    assert data["first_token"]["p50"] > 0
    assert run("bench", "offline", model_folder, *args, *SMALL) == 0
    assert "output throughput" in run.out
    assert run("bench", "offline", model_folder, *args, "--input-len", 5000, *SMALL) == 2


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "/nowhere/model", "hi"),
        ("serve", "pypi:nothing-of-that-name"),
        ("info", "/nowhere/model.gguf"),
        ("generate", "{model}", "hi", "--adapter", "nobody", *SMALL),
        ("generate", "{model}", "hi", "--memory", "1MB"),
        ("bench", "offline", "{model}", "--num-adapters", "1", "--targets", "nothing", *SMALL),
        ("generate", "{model}", "hi", "--max-model-len", "1000000", *SMALL),
        ("nonsense",),
        ("serve",),
    ],
)
def test_mistakes_are_one_line(run: Run, model_folder: Path, args: tuple[str, ...]) -> None:
    assert run(*(arg.replace("{model}", str(model_folder)) for arg in args)) == 2
    assert "rror: " in run.err
