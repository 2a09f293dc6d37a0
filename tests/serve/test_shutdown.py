"""How the server process ends: SIGTERM drains, a second signal aborts, a bad setting never starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

#: Outlives every test, however fast the machine.
LONG = {"prompt": "on and on", "max_tokens": 4000, "ignore_eos": True, "stream": True, "n": 64}
ALONE = ("--max-sequences", "1")  # then its choices run one after the other
PATIENCE = 120.0  # seconds, for a machine that does other things too


@contextmanager
def serving(model: Path, home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, url) of `chiliad serve`; killed at the end if need be."""
    command = [sys.executable, "-m", "chiliad.cli", "serve", str(model), "--port", "0", "--memory", "400MB",
               "--dtype", "float32", "--threads", "1", *options]  # fmt: skip
    environment = os.environ | {"CHILIAD_HOME": str(home)}
    environment.pop("CHILIAD_API_KEY", None)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"listening (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(lines))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{match[1]}/health", timeout=PATIENCE).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield process, match[1]
    finally:
        process.kill()
        process.communicate(timeout=30)


def lines_of(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_sigterm_finishes_what_runs(model_folder: Path, tmp_path: Path) -> None:
    with (
        serving(model_folder, tmp_path, "--drain-timeout", str(PATIENCE)) as (process, url),
        httpx.Client(timeout=PATIENCE) as client,
    ):
        body = LONG | {"max_tokens": 40, "n": 1}
        with client.stream("POST", f"{url}/v1/completions", json=LONG) as long:  # as long as we look
            assert long.status_code == 200
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                process.send_signal(signal.SIGTERM)
                while (refused := client.get(f"{url}/health")).status_code == 200:
                    time.sleep(0.01)
                assert refused.status_code == 503
                late = client.post(f"{url}/v1/completions", json=body)
                assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
                assert late.headers["retry-after"]
                chunks = lines_of(answer)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=PATIENCE) == 0


def test_drain_timeout_ends_streams_with_an_error(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path, "--drain-timeout", "0.2", *ALONE) as (process, url):
        with (
            httpx.Client(timeout=PATIENCE) as client,
            client.stream("POST", f"{url}/v1/completions", json=LONG) as answer,
        ):
            process.send_signal(signal.SIGTERM)
            assert lines_of(answer)[-1]["error"]["code"] == "unavailable"
        assert process.wait(timeout=PATIENCE) == 0


def test_second_signal_aborts(model_folder: Path, tmp_path: Path) -> None:
    with (
        serving(model_folder, tmp_path, *ALONE) as (process, url),
        httpx.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{url}/v1/completions", json=LONG),
    ):
        process.send_signal(signal.SIGINT)
        while client.get(f"{url}/health").status_code == 200:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "99999"], "99999"),
        (["--adapters", "/nowhere"], "nowhere"),
        (["--memory", "lots"], "lots"),
    ],
)
def test_bad_settings_do_not_start(
    model_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    command = [sys.executable, "-m", "chiliad.cli", "serve", str(model_folder), *options]
    environment = os.environ | {"CHILIAD_HOME": str(tmp_path)}
    environment.pop("CHILIAD_API_KEY", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
