"""Folders written by strangers: what is sound is read exactly, what is not is refused by its fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bad_adapters import Bad, make_bad_adapters
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.adapters import peft
from chiliad.errors import AdapterError, AdapterTooLarge, InvalidAdapter
from chiliad.testing import SMOLLM2, base_info, write_random_adapter

BASE = base_info({**SMOLLM2, "num_hidden_layers": 2}, "smol")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bad]:
    return {bad.name: bad for bad in make_bad_adapters(tmp_path_factory.mktemp("bad"), BASE)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bad_name" in metafunc.fixturenames:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            names = [bad.name for bad in make_bad_adapters(folder, BASE)]
        metafunc.parametrize("bad_name", names)


def test_bad_adapter_is_refused(bad_name: str, corpus: dict[str, Bad]) -> None:
    bad = corpus[bad_name]
    with pytest.raises(bad.error) as caught:
        peft.read(bad.folder, BASE)
    assert type(caught.value) is bad.error
    assert bad.message in caught.value.message
    assert 400 <= caught.value.status < 500
    assert len(caught.value.message) < 600  # quotes of hostile text are cut
    caught.value.message.encode("ascii")  # and cannot break a terminal or a JSON encoder
    if bad.early:
        with pytest.raises(bad.error):
            peft.plan(peft.read_header(bad.folder), BASE)
    else:
        peft.plan(peft.read_header(bad.folder), BASE)


def test_the_corpus_is_large(corpus: dict[str, Bad]) -> None:
    assert len(corpus) >= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_equal_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    write_random_adapter(tmp_path, BASE, 3, "all-linear", dtype=str(dtype).removeprefix("torch."))
    with peft.PeftFolder(tmp_path) as files:
        tensors, largest, _ = files.tensors()
    expected = safetensors.torch.load_file(tmp_path / peft.TENSOR_FILE)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor)
    assert largest == max(float(tensor.abs().max()) for tensor in expected.values())


def test_one_recipe_is_checked_once_and_every_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_random_adapter(tmp_path / f"a{i}", BASE, 3, seed=i) for i in range(3)]
    other = write_random_adapter(tmp_path / "other", BASE, 4, seed=9)
    alone = [peft.read(folder, BASE) for folder in (*folders, other)]
    recipes = peft.Recipes(BASE)
    planned: list[object] = []
    monkeypatch.setattr(peft, "plan", lambda *a, plan=peft.plan: planned.append(a) or plan(*a))
    for folder, (expected, content) in zip((*folders, other), alone, strict=True):
        lowered, hashed = recipes.read(folder)
        assert hashed == content
        assert lowered.low_rank.keys() == expected.low_rank.keys()
        for slot, pair in expected.low_rank.items():
            assert torch.equal(lowered.low_rank[slot].a, pair.a)
            assert torch.equal(lowered.low_rank[slot].b, pair.b)
    assert len(planned) == 2
    # a file with the recipe of others is still looked at
    file = folders[0] / peft.TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-4] + torch.tensor([float("nan")]).numpy().tobytes())
    with pytest.raises(InvalidAdapter, match="NaN"):
        recipes.read(folders[0])


def test_mixed_dtypes_at_odd_offsets(tmp_path: Path) -> None:
    """The format promises no alignment: a float32 tensor may follow three bfloat16 numbers."""
    write_random_adapter(tmp_path, BASE, 1)
    half, full = torch.tensor([1.0, 2, 3]).to(torch.bfloat16), torch.tensor([4.0, 5])
    header = {
        "a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [6, 14]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    data = half.view(torch.uint8).numpy().tobytes() + full.view(torch.uint8).numpy().tobytes()
    (tmp_path / peft.TENSOR_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with peft.PeftFolder(tmp_path) as files:
        tensors, largest, _ = files.tensors()
    assert largest == 5
    assert torch.equal(tensors["a"], half)
    assert torch.equal(tensors["b"], full[:, None])


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    write_random_adapter(tmp_path, BASE, 2)
    for name in ("README.md", "adapter_model.bin", "training_args.bin", "tokenizer.json"):
        (tmp_path / name).write_text("not looked at")
    peft.read(tmp_path, BASE)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    folder = write_random_adapter(tmp_path / "a", BASE, 2, seed=1)
    first = peft.read_header(folder)
    assert peft.read_header(folder) == first
    assert peft.stamp(folder) == first.stamp

    # the same recipe elsewhere, even at the same time, is another adapter
    twin = write_random_adapter(tmp_path / "b", BASE, 2, seed=2)
    facts = os.stat(folder / peft.TENSOR_FILE)
    os.utime(twin / peft.TENSOR_FILE, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert peft.read_header(twin).digest != first.digest

    write_random_adapter(folder, BASE, 2, seed=3)
    after = peft.read_header(folder)
    assert after.digest != first.digest
    assert after.stamp != first.stamp
    with pytest.raises(AdapterError, match="changed after") as caught:
        peft.read(folder, BASE, first.digest)
    assert caught.value.code == "adapter_changed"
    peft.read(folder, BASE, after.digest)

    config = json.loads((folder / peft.CONFIG_FILE).read_text())
    (folder / peft.CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 5}))
    assert peft.read_header(folder).digest != after.digest


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_random_adapter(tmp_path, BASE, 2)
    with peft.PeftFolder(tmp_path) as files:
        os.truncate(tmp_path / peft.TENSOR_FILE, 4000)
        with pytest.raises(InvalidAdapter, match="changed while it was read"):
            files.tensors()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="no adapter folder"):
        peft.read_header(tmp_path / "nowhere")
    assert peft.stamp(tmp_path / "nowhere") == ""


def test_limits_are_settings(tmp_path: Path) -> None:
    write_random_adapter(tmp_path, BASE, 8)
    with pytest.raises(AdapterTooLarge, match="rank 8; 4 is the limit"):
        peft.read(tmp_path, BASE, limits=peft.Limits(rank=4))
    with pytest.raises(AdapterTooLarge, match="bytes of tensors"):
        peft.read_header(tmp_path, peft.Limits(tensor_bytes=1000))
    with pytest.raises(InvalidAdapter, match="limit"):
        peft.read_header(tmp_path, peft.Limits(config_bytes=10))


def test_files_are_closed(tmp_path: Path, corpus: dict[str, Bad]) -> None:
    write_random_adapter(tmp_path, BASE, 2)
    before = len(os.listdir("/proc/self/fd"))
    for folder in [tmp_path, *(bad.folder for bad in corpus.values())]:
        with suppress(AdapterError):
            peft.read(folder, BASE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    write_random_adapter(tmp_path, BASE, 2)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from chiliad.adapters import peft\n"
        f"print(peft.read_header({str(tmp_path)!r}).config['r'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n", done.stderr


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_never_surprise(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes at all give an adapter or one of our errors, and nothing else."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write_random_adapter(folder, BASE, 1, ("q_proj",), dtype="float32")
        (folder / "tensors").write_bytes((folder / peft.TENSOR_FILE).read_bytes())
        (folder / "config").write_bytes((folder / peft.CONFIG_FILE).read_bytes())
    for source, target in (("tensors", peft.TENSOR_FILE), ("config", peft.CONFIG_FILE)):
        raw = bytearray((folder / source).read_bytes())
        end = min(len(raw), 400)  # the structure lies at the front
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, end - 1))
            raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        (folder / target).write_bytes(raw)
    with suppress(AdapterError):  # whose status is 4xx
        peft.read(folder, BASE)


def test_a_repeated_key_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    """Linear in the header: a search per key would take an hour."""
    write_random_adapter(tmp_path, BASE, 1)
    header = ("{" + "".join(f'"a{i}":0,' for i in range(300_000)) + '"z":0,"z":0}').encode()
    (tmp_path / peft.TENSOR_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InvalidAdapter, match="'z' twice"):
        peft.read_header(tmp_path)


def test_json_values_of_any_kind(tmp_path: Path) -> None:
    """Every field with every kind of value: an answer, never a crash."""
    write_random_adapter(tmp_path, BASE, 2)
    header = peft.read_header(tmp_path)
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        2.5,
        10**30,
        "",
        "x",
        "(",
        [],
        [None],
        [[]],
        {},
        {"": None},
        {"(": 1},
    ]
    from chiliad.adapters.lora import _HONOURED, _INERT, _REFUSED

    for field in _HONOURED | _INERT | _REFUSED.keys() | {"brand_new"}:
        for value in values:
            changed = peft.Header(header.config | {field: value}, header.tensors, "", 0, "")
            with suppress(AdapterError):
                peft.plan(changed, BASE)
