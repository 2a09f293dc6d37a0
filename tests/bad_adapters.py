"""A corpus of adapters that must be refused, each with the error it deserves.

`make_bad_adapters(folder, base)` writes one sub-folder per kind; the tests of the adapter room
read them, and the tests of the server send them.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from chiliad.core import BaseInfo
from chiliad.errors import AdapterError, AdapterMismatch, AdapterTooLarge, InvalidAdapter
from chiliad.testing import write_random_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Bad:
    name: str
    folder: Path
    error: type[AdapterError]
    message: str  # a part of what the error says
    early: bool  # config and header give it away; otherwise only the tensors do


_KINDS: list[tuple[str, type[AdapterError], str, bool, Callable[[Path, BaseInfo], None]]] = []


def kind(
    error: type[AdapterError], message: str, early: bool = True
) -> Callable[[Callable[[Path, BaseInfo], None]], Callable[[Path, BaseInfo], None]]:
    """Register a function that spoils the good adapter in a folder (q_proj, rank 4)."""

    def register(spoil: Callable[[Path, BaseInfo], None]) -> Callable[[Path, BaseInfo], None]:
        name = spoil.__name__.strip("_").replace("_", "-")
        _KINDS.append((name, error, message, early, spoil))
        return spoil

    return register


def make_bad_adapters(folder: str | Path, base: BaseInfo) -> list[Bad]:
    """Write the corpus below `folder`: adapters that look like `base`'s, and are not sound."""
    corpus = []
    named = any("/" in name for name in (base.name, *base.aliases))
    for name, error, message, early, spoil in _KINDS:
        if spoil is _other_base and not named:
            continue  # a base without a public name cannot tell
        path = Path(folder) / name
        write_random_adapter(path, base, 4, (_target(base),), dtype="float32")
        spoil(path, base)
        corpus.append(Bad(name, path, error, message, early))
    return corpus


# -- tools -------------------------------------------------------------------------------


def _target(base: BaseInfo) -> str:
    return base.sites[0].name.rsplit(".", 1)[-1]


def _first(base: BaseInfo) -> str:
    return f"base_model.model.{base.sites[0].name}"


def _configure(path: Path, **fields: object) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | fields))


def _tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS)


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = (path / TENSORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def _edit_first(path: Path, **fields: object) -> None:
    """Change the header entry of the tensor that lies first."""
    header, data = _split(path)
    name = next(n for n, e in header.items() if n != "__metadata__" and e["data_offsets"][0] == 0)
    header[name] |= fields
    _join(path, header, data)


# -- files -------------------------------------------------------------------------------


@kind(InvalidAdapter, "no adapter_config.json")
def _empty_folder(path: Path, base: BaseInfo) -> None:
    for file in path.iterdir():
        file.unlink()


@kind(InvalidAdapter, "no adapter_config.json")
def _no_config(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).unlink()


@kind(InvalidAdapter, "no adapter_model.safetensors")
def _no_tensor_file(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).unlink()


@kind(InvalidAdapter, "a pickle, which is never loaded")
def _pickle_only(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


@kind(InvalidAdapter, "not a safetensors file")
def _pickle_in_disguise(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).write_bytes(struct.pack("<Q", 64) + pickle.dumps([0] * 200))


@kind(InvalidAdapter, "symbolic link")
def _link_out_of_the_folder(path: Path, base: BaseInfo) -> None:
    outside = path.parent / "outside.bin"
    os.replace(path / TENSORS, outside)
    (path / TENSORS).symlink_to(outside)


@kind(InvalidAdapter, "symbolic link")
def _config_links_to_a_secret(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).unlink()
    (path / CONFIG).symlink_to("/etc/passwd")


@kind(InvalidAdapter, "not a regular file")
def _named_pipe(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).unlink()
    os.mkfifo(path / TENSORS)


@kind(InvalidAdapter, "not a regular file")
def _folder_as_file(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).unlink()
    (path / TENSORS).mkdir()


# -- the safetensors container -----------------------------------------------------------


@kind(InvalidAdapter, "truncated")
def _empty_file(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).write_bytes(b"")


@kind(InvalidAdapter, "truncated")
def _truncated_in_the_header(path: Path, base: BaseInfo) -> None:
    os.truncate(path / TENSORS, 100)


@kind(InvalidAdapter, "truncated")
def _truncated_in_the_data(path: Path, base: BaseInfo) -> None:
    os.truncate(path / TENSORS, (path / TENSORS).stat().st_size - 100)


@kind(InvalidAdapter, "limit")
def _header_bomb(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


@kind(InvalidAdapter, "safetensors file")
def _wrong_magic(path: Path, base: BaseInfo) -> None:
    (path / TENSORS).write_bytes(b"GGUF" + bytes(1000))


@kind(InvalidAdapter, "not valid JSON")
def _header_is_not_json(path: Path, base: BaseInfo) -> None:
    _join(path, b'{"a": ', b"")


@kind(InvalidAdapter, "twice")
def _duplicate_tensor(path: Path, base: BaseInfo) -> None:
    header, data = _split(path)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    _join(path, text.encode(), data)


@kind(InvalidAdapter, "nested too deeply")
def _header_of_many_brackets(path: Path, base: BaseInfo) -> None:
    _join(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


@kind(InvalidAdapter, "bytes after its last tensor")
def _bytes_after_the_end(path: Path, base: BaseInfo) -> None:
    with (path / TENSORS).open("ab") as file:
        file.write(b"payload")


@kind(InvalidAdapter, "overlaps")
def _overlapping_tensors(path: Path, base: BaseInfo) -> None:
    header, data = _split(path)
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    header[second] = header[first] | {}
    _join(path, header, data)


@kind(InvalidAdapter, "hole")
def _hole_between_tensors(path: Path, base: BaseInfo) -> None:
    header, data = _split(path)
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] > 0:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    _join(path, header, data + bytes(8))


@kind(InvalidAdapter, "lies at bytes")
def _offsets_past_the_end(path: Path, base: BaseInfo) -> None:
    _edit_first(path, data_offsets=[0, 1 << 40])


@kind(InvalidAdapter, "bad data_offsets")
def _negative_offsets(path: Path, base: BaseInfo) -> None:
    _edit_first(path, data_offsets=[-4, 0])


@kind(InvalidAdapter, "bad shape")
def _astronomic_shape(path: Path, base: BaseInfo) -> None:
    _edit_first(path, shape=[1 << 62, 1 << 62])


@kind(InvalidAdapter, "needs")
def _shape_and_bytes_disagree(path: Path, base: BaseInfo) -> None:
    _edit_first(path, shape=[3, 5])


@kind(InvalidAdapter, "dtype 'I64'")
def _integer_tensor(path: Path, base: BaseInfo) -> None:
    _edit_first(path, dtype="I64")


@kind(InvalidAdapter, "dtype 'F8_E4M3'")
def _eight_bit_tensor(path: Path, base: BaseInfo) -> None:
    _edit_first(path, dtype="F8_E4M3")


@kind(InvalidAdapter, "not a tensor name")
def _path_like_tensor_name(path: Path, base: BaseInfo) -> None:
    _tensors(path, lambda t: t.__setitem__("../../../etc/cron.d/x", np.zeros((2, 2), np.float32)))


# -- the config --------------------------------------------------------------------------


@kind(InvalidAdapter, "not valid JSON")
def _config_is_not_json(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).write_text("r: 8\nlora_alpha: 16\n")


@kind(InvalidAdapter, "not valid JSON")
def _config_is_not_utf8(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).write_bytes(b'{"peft_type": "\xff\xfe"}')


@kind(InvalidAdapter, "must hold a JSON object")
def _config_is_a_list(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).write_text('["LORA", 8]')


@kind(InvalidAdapter, "'r' twice")
def _duplicate_config_key(path: Path, base: BaseInfo) -> None:
    text = (path / CONFIG).read_text()
    (path / CONFIG).write_text('{"r": 64, ' + text.lstrip()[1:])


@kind(InvalidAdapter, "NaN")
def _nan_in_the_config(path: Path, base: BaseInfo) -> None:
    _configure(path, lora_alpha=float("nan"))


@kind(InvalidAdapter, "limit")
def _huge_config(path: Path, base: BaseInfo) -> None:
    _configure(path, revision="x" * (2 << 20))


@kind(InvalidAdapter, "nested too deeply")
def _deep_config(path: Path, base: BaseInfo) -> None:
    (path / CONFIG).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)


@kind(InvalidAdapter, "peft_type")
def _unknown_method(path: Path, base: BaseInfo) -> None:
    _configure(path, peft_type="LOHA")


@kind(InvalidAdapter, "peft_type")
def _no_method(path: Path, base: BaseInfo) -> None:
    _configure(path, peft_type=None)


@kind(InvalidAdapter, "flux_capacitor")
def _unknown_field(path: Path, base: BaseInfo) -> None:
    _configure(path, flux_capacitor=1.21)


@kind(InvalidAdapter, "use_dora")
def _dora(path: Path, base: BaseInfo) -> None:
    _configure(path, use_dora=True)


@kind(InvalidAdapter, "init_lora_weights")
def _unconverted_pissa(path: Path, base: BaseInfo) -> None:
    _configure(path, init_lora_weights="pissa_niter_16")


@kind(InvalidAdapter, "modules_to_save")
def _trained_head(path: Path, base: BaseInfo) -> None:
    _configure(path, modules_to_save=["lm_head"])


@kind(InvalidAdapter, "bias")
def _trained_biases(path: Path, base: BaseInfo) -> None:
    _configure(path, bias="all")


@kind(InvalidAdapter, "task_type")
def _classifier(path: Path, base: BaseInfo) -> None:
    _configure(path, task_type="SEQ_CLS")


@kind(InvalidAdapter, "not a regular expression")
def _broken_pattern(path: Path, base: BaseInfo) -> None:
    _configure(path, target_modules="(q_proj")


@kind(InvalidAdapter, "PEFT would ignore")
def _pattern_that_never_ends(path: Path, base: BaseInfo) -> None:
    """Python's own matcher would take longer than the universe has; a walk finds no match."""
    _configure(path, target_modules=r"((([\w.]*)*)*)*([\w.]+)+!")


@kind(InvalidAdapter, "rank_pattern")
def _rank_pattern_of_text(path: Path, base: BaseInfo) -> None:
    _configure(path, rank_pattern={_target(base): "sixteen"})


# -- tensors against the config and the base ---------------------------------------------


@kind(InvalidAdapter, "no tensors")
def _no_tensors(path: Path, base: BaseInfo) -> None:
    save_file({}, path / TENSORS)


@kind(InvalidAdapter, "has rank 4, the config")
def _wrong_rank(path: Path, base: BaseInfo) -> None:
    _configure(path, r=8)


@kind(InvalidAdapter, "has rank 4, the config")
def _gigantic_rank_in_the_config(path: Path, base: BaseInfo) -> None:
    _configure(path, r=2_000_000_000)


@kind(AdapterTooLarge, "rank 100000")
def _gigantic_rank(path: Path, base: BaseInfo) -> None:
    """Honest about its size, which is sparse on disk."""
    _configure(path, r=100_000, target_modules=[base.sites[0].name])
    header: dict[str, Any] = {}
    end = 0
    site = base.sites[0]
    for part, shape in (("A", [100_000, site.in_features]), ("B", [site.out_features, 100_000])):
        begin, end = end, end + 2 * shape[0] * shape[1]
        name = f"{_first(base)}.lora_{part}.weight"
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    _join(path, header, b"")
    os.truncate(path / TENSORS, (path / TENSORS).stat().st_size + end)


@kind(InvalidAdapter, "lora_A but no lora_B")
def _missing_b(path: Path, base: BaseInfo) -> None:
    _tensors(path, lambda t: t.pop(f"{_first(base)}.lora_B.weight"))


@kind(InvalidAdapter, "lora_B but no lora_A")
def _missing_a(path: Path, base: BaseInfo) -> None:
    _tensors(path, lambda t: t.pop(f"{_first(base)}.lora_A.weight"))


@kind(InvalidAdapter, "but there are no tensors for it")
def _missing_module(path: Path, base: BaseInfo) -> None:
    _configure(path, target_modules=[_target(base), base.sites[1].name])


@kind(InvalidAdapter, "not part of a plain LoRA adapter")
def _unknown_tensor(path: Path, base: BaseInfo) -> None:
    name = f"{_first(base)}.lora_magnitude_vector"
    _tensors(path, lambda t: t.__setitem__(name, np.ones(4, np.float32)))


@kind(InvalidAdapter, "PEFT would ignore")
def _tensor_outside_the_targets(path: Path, base: BaseInfo) -> None:
    _configure(path, exclude_modules=[base.sites[0].name])


@kind(InvalidAdapter, "do not multiply")
def _a_and_b_disagree(path: Path, base: BaseInfo) -> None:
    name = f"{_first(base)}.lora_B.weight"
    _tensors(path, lambda t: t.update({name: np.ones((base.sites[0].out_features, 3), np.float32)}))


@kind(InvalidAdapter, "do not multiply")
def _three_dimensions(path: Path, base: BaseInfo) -> None:
    name = f"{_first(base)}.lora_A.weight"
    _tensors(path, lambda t: t.update({name: t[name][None]}))


@kind(AdapterMismatch, "another model")
def _wrong_width(path: Path, base: BaseInfo) -> None:
    name = f"{_first(base)}.lora_A.weight"
    _tensors(path, lambda t: t.update({name: np.ones((4, base.sites[0].in_features + 8), np.float32)}))


@kind(AdapterMismatch, "another model")
def _other_modules(path: Path, base: BaseInfo) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.replace("base_model.model.", "base_model.model.gpt_neox.")] = tensors.pop(name)

    _tensors(path, rename)


@kind(AdapterMismatch, "another model")
def _more_layers_than_the_base(path: Path, base: BaseInfo) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        for part in ("lora_A", "lora_B"):
            first = f"{_first(base)}.{part}.weight"
            tensors[first.replace(".0.", ".99.")] = tensors[first].copy()

    _tensors(path, add)


@kind(AdapterMismatch, "was trained on acme/other-7b")
def _other_base(path: Path, base: BaseInfo) -> None:
    _configure(path, base_model_name_or_path="acme/other-7b")


@kind(InvalidAdapter, "NaN or Inf", early=False)
def _nan(path: Path, base: BaseInfo) -> None:
    _tensors(path, lambda t: t[f"{_first(base)}.lora_A.weight"].__setitem__((1, 2), np.nan))


@kind(InvalidAdapter, "NaN or Inf", early=False)
def _infinity(path: Path, base: BaseInfo) -> None:
    _tensors(path, lambda t: t[f"{_first(base)}.lora_B.weight"].__setitem__((0, 0), -np.inf))


@kind(InvalidAdapter, "too large", early=False)
def _overflow(path: Path, base: BaseInfo) -> None:
    """Finite tensors whose product with the scale is not."""
    _tensors(path, lambda t: t[f"{_first(base)}.lora_B.weight"].__setitem__((0, 0), 3e38))
    _configure(path, lora_alpha=1e6)
