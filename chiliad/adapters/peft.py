"""PEFT folders, read with suspicion.

Exactly two files matter: `adapter_config.json` and `adapter_model.safetensors`. Whatever else
lies in the folder is left alone; pickles are never loaded. The files come from strangers, so
every length is checked before it is believed, symbolic links are not followed, and bytes are
read rather than mapped (a file truncated under a mapping kills the process).

safetensors, as checked here: a little-endian uint64 N, N bytes of JSON that begin with "{", then
the tensors' bytes back to back, in any order, without holes, up to the end of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiliad.adapters.base import AdapterFormat, AdapterPlan, Lowered, TensorHeader
from chiliad.adapters.lora import LoraFormat
from chiliad.core import BaseInfo
from chiliad.errors import AdapterError, AdapterTooLarge, InvalidAdapter

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

#: Adapter methods by `peft_type`.
FORMATS: dict[str, AdapterFormat] = {"LORA": LoraFormat()}

_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-.]{1,512}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a folder may ask of us before it is refused."""

    config_bytes: int = 1 << 20
    config_depth: int = 16
    header_bytes: int = 4 << 20  # a tensor takes about 130 bytes: room for 30,000
    tensor_bytes: int = 64 << 30
    rank: int = 4096  # per projection; the pool's size is the limit that bites first


#: (bytes) -> a uint8 tensor of that size, which the caller may use again later
Room = Callable[[int], "torch.Tensor"]

#: Tensors by name, each with the byte of the file's data part where it begins
Entries = Mapping[str, tuple[TensorHeader, int]]

_PIECE = 2**20  # bytes or numbers between two rests: about half a millisecond
_RECIPES = 128  # remembered: of one of a large model, half a megabyte


@dataclass(frozen=True, slots=True)
class Header:
    """All that is known of an adapter before its tensors are read.

    `digest` identifies the content, see `PeftFolder`. `stamp` is the cheap test for "nothing
    happened to the two files": their sizes, modification times and inodes.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    digest: str
    nbytes: int
    stamp: str


class PeftFolder:
    """An adapter's two files, held open: what was checked is what is read.

    `recipe` is a hash of config, safetensors header and file size: all that an adapter's plan
    depends on, and the same for thousands of adapters of one training script. `digest` adds the
    folder's path and the tensor file's modification time: the identity of the content. Tensors
    are not read for it, so thousands of folders register in a second; bytes that change in spite
    of equal size and time are caught by the store, which hashes what it reads.

    Raises InvalidAdapter when the files are missing or unsafe; `header` does when they are broken.
    """

    def __init__(self, folder: str | Path, limits: Limits | None = None) -> None:
        self.path = Path(folder).resolve()
        limits = limits or Limits()
        self._limits = limits
        self._file: int | None = None
        if not self.path.is_dir():
            raise InvalidAdapter(f"no adapter folder at {self.path}")
        config_file = self._open(CONFIG_FILE)
        try:
            config_stat = os.fstat(config_file)
            if config_stat.st_size > limits.config_bytes:
                raise InvalidAdapter(
                    f"{CONFIG_FILE} has {config_stat.st_size} bytes; {limits.config_bytes} is the limit"
                )
            self._config = os.read(config_file, limits.config_bytes + 1)
        finally:
            os.close(config_file)
        self._file = self._open(TENSOR_FILE)
        try:
            self._stat = os.fstat(self._file)
            self._header = self._read_header()
        except BaseException:
            self.close()
            raise
        self.recipe = _hash(self._config, self._header, str(self._stat.st_size).encode())
        modified = str(self._stat.st_mtime_ns).encode()
        self.digest = _hash(self.recipe.encode(), os.fsencode(self.path), modified)
        self.stamp = _stamp(config_stat, self._stat)
        self.nbytes = self._stat.st_size

    @cached_property
    def header(self) -> Header:
        """The two files' structure, checked but for the tensors. Raises InvalidAdapter."""
        config = _parse_json(self._config, CONFIG_FILE)
        if _deeper(config, self._limits.config_depth):
            raise InvalidAdapter(f"{CONFIG_FILE} is nested too deeply")
        tensors = {name: entry for name, (entry, _) in self.entries.items()}
        return Header(config, tensors, self.digest, self.nbytes, self.stamp)

    @cached_property
    def entries(self) -> Entries:
        """The tensors that the file says it has. Raises InvalidAdapter."""
        return _check_header(self._header, self.nbytes, self._limits)

    def __enter__(self) -> PeftFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def tensors(
        self,
        room: Room | None = None,
        rest: Callable[[], None] = lambda: None,
        entries: Entries | None = None,
    ) -> tuple[dict[str, torch.Tensor], float, str]:
        """Read every tensor: all by name, their largest magnitude, the sha256 of them in file order.

        The tensors share one buffer: `room(bytes)`, or one of their own. `rest` is called between
        bits of work. entries: of the same recipe, if the caller has them. Raises InvalidAdapter
        when the file changes meanwhile, or on NaN or Inf.
        """
        import torch

        assert self._file is not None
        entries = entries or self.entries
        start = 8 + len(self._header)
        size = self.nbytes - start
        data = torch.empty(size, dtype=torch.uint8) if room is None else room(size)
        view: memoryview = data.numpy().data
        content = hashlib.sha256()
        with io.FileIO(self._file, closefd=False) as file:
            file.seek(start)
            done = 0
            while done < size and (count := file.readinto(view[done : done + _PIECE])):
                content.update(view[done : done + count])
                done += count
                rest()
        after = os.fstat(self._file)
        if done < size or _stamp(after, after) != _stamp(self._stat, self._stat):
            raise InvalidAdapter(f"{self.path / TENSOR_FILE} changed while it was read: load it again")
        tensors = {}
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        whole = {kind: data[: size - size % _ITEMSIZE[kind]].view(dtype) for kind, dtype in types.items()}
        for name, (entry, begin) in entries.items():
            itemsize, numbers = _ITEMSIZE[entry.dtype], math.prod(entry.shape)
            if begin % itemsize:  # the format does not promise alignment
                raw = data[begin : begin + numbers * itemsize].clone()
                tensors[name] = raw.view(types[entry.dtype]).view(entry.shape)
            else:
                first = begin // itemsize
                tensors[name] = whole[entry.dtype][first : first + numbers].view(entry.shape)
        kinds = {entry.dtype for entry, _ in entries.values()}
        if len(kinds) == 1:  # one look at everything is far cheaper than hundreds
            largest = largest_magnitude(whole[kinds.pop()], rest)
            if math.isfinite(largest):
                return tensors, largest, content.hexdigest()
        largest = 0.0
        for name, tensor in tensors.items():
            magnitude = largest_magnitude(tensor, rest)
            if not math.isfinite(magnitude):
                raise InvalidAdapter(f"tensor {name} holds NaN or Inf: the training run diverged")
            largest = max(largest, magnitude)
        return tensors, largest, content.hexdigest()

    def _open(self, name: str) -> int:
        path = self.path / name
        # O_NONBLOCK: opening a named pipe must not wait for its writer
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            if path.is_symlink():
                raise InvalidAdapter(
                    f"{path} is a symbolic link, which is not followed: copy the folder with `cp -rL`"
                )
            file = os.open(path, flags | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise InvalidAdapter(f"cannot open {path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise InvalidAdapter(f"{path} is not a regular file")
        return file

    def _missing(self, name: str) -> InvalidAdapter:
        if name == TENSOR_FILE:
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in _PICKLES)
            if pickles:
                return InvalidAdapter(
                    f"{self.path} has only {pickles[0][:80]!a}, a pickle, which is never loaded: "
                    "convert it where you trust it, with PEFT's save_pretrained(..., safe_serialization=True)"
                )
        return InvalidAdapter(f"{self.path} has no {name}")

    def _read_header(self) -> bytes:
        assert self._file is not None
        prefix = os.pread(self._file, 8, 0)
        if len(prefix) < 8:
            raise InvalidAdapter(f"{TENSOR_FILE} is truncated: {len(prefix)} bytes")
        length = int.from_bytes(prefix, "little")
        if length > self._limits.header_bytes:
            raise InvalidAdapter(
                f"{TENSOR_FILE} claims a header of {length} bytes; {self._limits.header_bytes} is the limit "
                "(is it a safetensors file?)"
            )
        if 8 + length > self._stat.st_size:
            raise InvalidAdapter(
                f"{TENSOR_FILE} is truncated: a header of {length} bytes in a file of {self._stat.st_size}"
            )
        header = os.pread(self._file, length, 8)
        if len(header) != length:
            raise InvalidAdapter(f"{TENSOR_FILE} changed while it was read: load it again")
        return header


def read_header(folder: str | Path, limits: Limits | None = None) -> Header:
    """Config and tensor header of an adapter folder. Raises InvalidAdapter."""
    with PeftFolder(folder, limits) as files:
        return files.header


def stamp(folder: str | Path) -> str:
    """What `Header.stamp` would be, without opening anything; "" when a file is missing."""
    try:
        return _stamp(*(os.lstat(os.path.join(folder, name)) for name in (CONFIG_FILE, TENSOR_FILE)))
    except OSError:
        return ""


def plan(header: Header, base: BaseInfo, limits: Limits | None = None) -> AdapterPlan:
    """What the adapter needs in memory, having checked config and header against the base.

    Raises InvalidAdapter, AdapterMismatch or AdapterTooLarge.
    """
    limits = limits or Limits()
    planned = adapter_format(header.config).plan(header.config, header.tensors, base)
    if planned.max_rank > limits.rank:
        raise AdapterTooLarge(f"the adapter has rank {planned.max_rank}; {limits.rank} is the limit")
    return planned


class Recipes:
    """Plans of adapters, and where their tensors lie, by `PeftFolder.recipe`.

    Thousands of adapters come from few training scripts, and to check a config and hundreds of
    names takes longer than to read the tensors. Without a base, only the method is known. Any
    thread may ask: at worst a plan is made twice.
    """

    def __init__(self, base: BaseInfo | None, limits: Limits | None = None) -> None:
        self._base = base
        self._limits = limits or Limits()
        self._known: dict[str, tuple[AdapterPlan, Entries]] = {}

    def plan(self, files: PeftFolder) -> AdapterPlan:
        """As `peft.plan`."""
        return self._of(files)[0]

    def read(
        self,
        folder: str | Path,
        digest: str | None = None,
        room: Room | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> tuple[Lowered, str]:
        """Read, check and lower an adapter -> its runtime forms and the hash of its tensor bytes.

        With `digest`, the folder must still be what it was when it was registered. Raises
        AdapterError (code "adapter_changed") if not, and as `plan` does. With `room`, the forms
        may lie in the buffer it gives; `rest` is called between bits of work.
        """
        with PeftFolder(folder, self._limits) as files:
            if digest is not None and files.digest != digest:
                raise changed(folder)
            plan, entries = self._of(files)
            tensors, largest, content = files.tensors(room, rest, entries)
        return FORMATS[plan.method.upper()].lower(plan, tensors, largest), content

    def _of(self, files: PeftFolder) -> tuple[AdapterPlan, Entries]:
        known = self._known.get(files.recipe)
        if known is None:
            if self._base is not None:
                planned = plan(files.header, self._base, self._limits)
            else:
                method = adapter_format(files.header.config)
                method.check(files.header.config)
                planned = AdapterPlan(method.peft_type.lower(), {})
            if len(self._known) >= _RECIPES:
                self._known.clear()
            known = self._known[files.recipe] = planned, files.entries
        return known


def read(
    folder: str | Path, base: BaseInfo, digest: str | None = None, limits: Limits | None = None
) -> tuple[Lowered, str]:
    """`Recipes.read` of one folder."""
    return Recipes(base, limits).read(folder, digest)


def changed(folder: str | Path) -> AdapterError:
    """The error for files that are no longer what was registered."""
    return AdapterError(
        f"the files in {folder} changed after they were registered: add the adapter again with replace, "
        "or scan its folder, to serve the new content",
        code="adapter_changed",
    )


def adapter_format(config: Mapping[str, object]) -> AdapterFormat:
    """The method that a config names. Raises InvalidAdapter listing what is supported."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: peft_type {str(kind)[:80]!a} is not supported, but {', '.join(FORMATS)} is",
            param="peft_type",
        )
    return FORMATS[kind]


def _hash(*parts: bytes) -> str:
    """blake2b-256 of byte strings; no two different lists of them are written alike."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def largest_magnitude(tensor: torch.Tensor, rest: Callable[[], None] = lambda: None) -> float:
    """Of its numbers; NaN or infinite if one of them is. In numpy, piece by piece: torch would wake a
    thread on every core for it, and those are busy with other people's requests."""
    import numpy as np
    import torch

    flat = tensor.reshape(-1)
    if flat.dtype == torch.float32:
        values, top = flat.numpy(), np.float32(0)
        for i in range(0, len(values), _PIECE):
            piece = values[i : i + _PIECE]
            top = np.maximum(top, np.maximum(piece.max(), -piece.min()))  # NaN stays
            rest()
        return float(top)
    # without their signs, 16-bit numbers are ordered as integers are, and NaN lies above all
    bits, most = flat.view(torch.int16).numpy(), 0
    for i in range(0, len(bits), _PIECE):
        most = max(most, int((bits[i : i + _PIECE] & 0x7FFF).max()))
        rest()
    return torch.tensor([most], dtype=torch.int16).view(flat.dtype).item()


def _stamp(config: os.stat_result, tensors: os.stat_result) -> str:
    return "/".join(f"{s.st_size}:{s.st_mtime_ns}:{s.st_ino}" for s in (config, tensors))


def _parse_json(raw: bytes, file: str) -> dict[str, Any]:
    """A JSON object without duplicate keys or NaN, or InvalidAdapter."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InvalidAdapter(f"{file} has the key {twice[:80]!a} twice")
        return result

    def constant(name: str) -> Any:
        raise InvalidAdapter(f"{file} holds {name}, which is not JSON")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise InvalidAdapter(f"{file} is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, InvalidAdapter):
            raise
        raise InvalidAdapter(f"{file} is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{file} must hold a JSON object")
    return value


def _deeper(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper(item, depth - 1) for item in inner)


def _check_header(raw: bytes, file_size: int, limits: Limits) -> dict[str, tuple[TensorHeader, int]]:
    """Tensors of a safetensors file and where they begin in its data part, or InvalidAdapter."""
    if not raw.startswith(b"{"):
        raise InvalidAdapter(f"{TENSOR_FILE} is not a safetensors file")
    parsed = _parse_json(raw, f"the header of {TENSOR_FILE}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidAdapter(f"the header of {TENSOR_FILE}: __metadata__ must map strings to strings")
    size = file_size - 8 - len(raw)
    if size > limits.tensor_bytes:
        raise AdapterTooLarge(
            f"{TENSOR_FILE} has {size} bytes of tensors; {limits.tensor_bytes} is the limit"
        )
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, tuple[TensorHeader, int]] = {}
    keys = {"dtype", "shape", "data_offsets"}
    for name, entry in parsed.items():
        if not _TENSOR_NAME.fullmatch(name) or ".." in name:
            raise InvalidAdapter(f"{TENSOR_FILE}: {name[:80]!a} is not a tensor name")
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise InvalidAdapter(f"{TENSOR_FILE}: tensor {name} wants exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
            raise InvalidAdapter(
                f"{TENSOR_FILE}: tensor {name} has dtype {str(dtype)[:20]!a}; save it as F32, F16 or BF16"
            )
        if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
            raise InvalidAdapter(f"{TENSOR_FILE}: tensor {name} has a bad shape or bad data_offsets")
        begin, end = offsets
        if begin > end or end > size:
            raise InvalidAdapter(
                f"{TENSOR_FILE}: tensor {name} lies at bytes {begin}..{end} of {size}; is the file truncated?"
            )
        needed = math.prod(shape) * _ITEMSIZE[dtype]
        if end - begin != needed:
            raise InvalidAdapter(
                f"{TENSOR_FILE}: tensor {name} has {end - begin} bytes, but {dtype} {shape} needs {needed}"
            )
        ranges.append((begin, end, name))
        tensors[name] = (TensorHeader(dtype, tuple(shape)), begin)
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise InvalidAdapter(f"{TENSOR_FILE}: tensor {name} {kind}")
        expected = end
    if expected != size:
        raise InvalidAdapter(f"{TENSOR_FILE} has {size - expected} bytes after its last tensor")
    return tensors


def _naturals(value: object) -> bool:
    return (
        isinstance(value, list)
        and {int}.issuperset(map(type, value))
        and min(value, default=0) >= 0
        and max(value, default=0) < 1 << 48
    )
