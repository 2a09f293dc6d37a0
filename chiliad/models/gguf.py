"""GGUF files: a bounds-checked reader, dequantisation, and translation to Hugging Face names.

A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is a header of typed
key-value pairs, a table of tensors, and their bytes. Every count, length and offset in it is
checked against the size of the file before anything is allocated or read, so a broken or hostile
file ends in `InvalidModel`. Files are read with pread, not mapped: a file that shrinks while a
server runs is then an error too, not a SIGBUS.

Names, shapes and values come out in the conventions of Hugging Face checkpoints, undoing what
the GGUF converters changed:

    llama     rows of q and k interleaved for the adjacent-pair rope    -> rows in halves again
    gemma3    norm weights stored as 1 + w                              -> w
    gpt2      Conv1D weights stored as [out, in]                        -> [in, out]
    llama 3   rope scaling stored as a tensor of frequency factors      -> rope_scaling, checked
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from chiliad.errors import InvalidModel
from chiliad.kernels.base import QuantizedWeight

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")


# --- block formats ---------------------------------------------------------------------------
#
# A quantised row is a sequence of fixed-size blocks. Each function below decodes blocks
# [n, type_size] uint8 into out [n, block_size] float32, in the order of operations of ggml, so
# results are equal to it bit for bit.


def _halves(blocks: Array, start: int, count: int) -> Array:
    """float16 fields at byte `start` -> float32 [n, count]."""
    raw = np.ascontiguousarray(blocks[:, start : start + 2 * count])
    return raw.view(np.float16).astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """uint8 [..., k] -> uint8 [..., 2, k]: low nibbles, then high nibbles."""
    q = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=q[..., 0, :])
    np.right_shift(packed, 4, out=q[..., 1, :])
    return q


def _fifth_bits(packed: Array) -> Array:
    """uint8 [n, 4], bit i belongs to value i -> uint8 [n, 32] of 0 or 16."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    return np.left_shift(bits, 4, out=bits)


def _q4_0(blocks: Array, out: Array) -> None:
    q = _nibbles(blocks[:, 2:]).reshape(-1, 32)
    np.multiply(q.view(np.int8) - np.int8(8), _halves(blocks, 0, 1), out=out)


def _q4_1(blocks: Array, out: Array) -> None:
    dm = _halves(blocks, 0, 2)
    np.multiply(_nibbles(blocks[:, 4:]).reshape(-1, 32), dm[:, :1], out=out)
    out += dm[:, 1:]


def _q5_0(blocks: Array, out: Array) -> None:
    q = _nibbles(blocks[:, 6:]).reshape(-1, 32) | _fifth_bits(blocks[:, 2:6])
    np.multiply(q.view(np.int8) - np.int8(16), _halves(blocks, 0, 1), out=out)


def _q5_1(blocks: Array, out: Array) -> None:
    dm = _halves(blocks, 0, 2)
    q = _nibbles(blocks[:, 8:]).reshape(-1, 32) | _fifth_bits(blocks[:, 4:8])
    np.multiply(q, dm[:, :1], out=out)
    out += dm[:, 1:]


def _q8_0(blocks: Array, out: Array) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _halves(blocks, 0, 1), out=out)


def _scales_and_mins(packed: Array) -> tuple[Array, Array]:
    """The 12 bytes of a K-block that hold 8 scales and 8 minima of 6 bits -> two uint8 [n, 8].

    Bytes 0-3 hold scales 0-3 (low six bits), bytes 4-7 minima 0-3; their top two bits and the
    nibbles of bytes 8-11 hold scales and minima 4-7.
    """
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return scales, minima


def _affine_groups(blocks: Array, q: Array, out: Array) -> None:
    """out = (d * scale) * q - (dmin * min), eight groups of 32: the frame of Q4_K and Q5_K."""
    d = _halves(blocks, 0, 2)
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    grouped = out.reshape(-1, 8, 32)
    np.multiply(q, (d[:, :1] * scales)[:, :, None], out=grouped)
    grouped -= (d[:, 1:] * minima)[:, :, None]


def _q4_k(blocks: Array, out: Array) -> None:
    _affine_groups(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32), out)


def _q5_k(blocks: Array, out: Array) -> None:
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    q |= ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    _affine_groups(blocks, q, out)


def _q6_k(blocks: Array, out: Array) -> None:
    # Two halves of 128 values; the low nibbles of a half's 64 bytes are its first 64 values.
    q = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    q |= ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    signed = q.reshape(-1, 16, 16).view(np.int8) - np.int8(32)
    scales = _halves(blocks, 208, 1) * blocks[:, 192:208].view(np.int8)
    np.multiply(signed, scales[:, :, None], out=out.reshape(-1, 16, 16))


# Blocks of 32 values, taken apart: levels [n, 32], float16 scale [n, 1] and minimum [n, 1] or None, or
# nothing where `QuantizedWeight` cannot hold them exactly.
Parts = tuple[Array, Array, Array | None]


def _stored_halves(blocks: Array, start: int) -> Array:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)


def _split_q4_0(blocks: Array) -> Parts | None:
    scale = _stored_halves(blocks, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = scale * np.float16(-8)
    parts = _nibbles(blocks[:, 2:]).reshape(-1, 32), scale, minimum
    return parts if np.isfinite(minimum).all() else None


def _split_q4_1(blocks: Array) -> Parts:
    return _nibbles(blocks[:, 4:]).reshape(-1, 32), _stored_halves(blocks, 0), _stored_halves(blocks, 2)


def _split_q8_0(blocks: Array) -> Parts | None:
    levels = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    return None if (levels == -128).any() else (levels, _stored_halves(blocks, 0), None)


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml storage type: `type_size` bytes hold `block_size` values."""

    name: str
    block_size: int
    type_size: int
    decode: Callable[[Array, Array], None] | None = None  # None: a plain float type
    split: Callable[[Array], Parts | None] | None = None  # types that kernels pack as they are


TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    30: TensorType("BF16", 1, 2),
    2: TensorType("Q4_0", 32, 18, _q4_0, _split_q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1, _split_q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0, _split_q8_0),
    12: TensorType("Q4_K", 256, 144, _q4_k),
    13: TensorType("Q5_K", 256, 176, _q5_k),
    14: TensorType("Q6_K", 256, 210, _q6_k),
}

# Types we know of and do not decode, so that a refusal can name them.
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_CHUNK = 1 << 17  # values decoded at a time, so that temporaries stay in cache


def dequantize(data: Array, kind: TensorType) -> Array:
    """uint8 [..., bytes of a row] -> float32 [..., values of a row]."""
    shape = (*data.shape[:-1], data.shape[-1] // kind.type_size * kind.block_size)
    if kind.decode is None:
        if kind.name == "BF16":
            wide = data.view(np.uint16).astype(np.uint32)
            return np.left_shift(wide, 16, out=wide).view(np.float32)
        return data.view(np.float32 if kind.name == "F32" else np.float16).astype(np.float32, copy=False)
    blocks = data.reshape(-1, kind.type_size)
    out = np.empty((len(blocks), kind.block_size), np.float32)
    step = _CHUNK // kind.block_size
    with np.errstate(all="ignore"):  # a scale may be Inf or NaN; finding out is the loader's job
        for start in range(0, len(blocks), step):
            kind.decode(blocks[start : start + step], out[start : start + step])
    return out.reshape(shape)


# --- the container ---------------------------------------------------------------------------

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_MAX_DIMS = 4
_MAX_NAME = 65535  # bytes in a key


class _Header:
    """Sequential reads that never pass the end of the file."""

    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self.file = file
        self.size = size
        self.label = label
        self.position = 0

    def fail(self, problem: str) -> InvalidModel:
        return InvalidModel(f"{self.label}: {problem}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.fail(
                f"the file ends inside its header: {what} needs {count} bytes at offset {self.position}, "
                f"but only {self.size - self.position} remain. Fetch the file again"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail("the file shrank while it was read")
        self.position += count
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} has {length} bytes, more than the {limit} the format allows")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> object:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self.fail(f"{what} has the unknown value type {kind}")
        return scalar.unpack(self.take(scalar.size, what))[0]

    def array(self, what: str) -> list[object]:
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            self.need(8 * count, what)  # before the loop: each string has at least its length
            return [self.string(what) for _ in range(count)]
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise self.fail(f"{what} is an array of the unsupported value type {kind}")
        self.need(scalar.size * count, what)
        data = self.take(scalar.size * count, what)
        if kind == 7:
            return [byte != 0 for byte in data]
        return list(struct.unpack(f"<{count}{scalar.format[-1]}", data))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table. `shape` is in torch's order, the contiguous dimension last."""

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file
    nbytes: int


class GGUF:
    """An open GGUF file. `metadata` holds the key-value pairs, `infos` the tensor table by GGUF name.

    Raises InvalidModel for anything that is not a sound, little-endian, single-file GGUF of
    version 2 or 3. Tensor bytes are read when they are asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, object] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            with self.path.open("rb", buffering=1 << 20) as file:
                self.nbytes = os.fstat(file.fileno()).st_size
                self._parse(_Header(file, self.nbytes, self.path.name))
        except OSError as error:
            reason = error.strerror or str(error)
            raise InvalidModel(f"cannot read {self.path.name}: {reason.lower()}") from None

    def _parse(self, header: _Header) -> None:
        if header.take(4, "the magic") != _MAGIC:
            raise header.fail("not a GGUF file: it does not begin with the bytes GGUF")
        version = header.u32("the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (2, 3):
                raise header.fail("the file is big-endian; convert it to little-endian first")
            raise header.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        tensors, pairs = header.u64("the tensor count"), header.u64("the metadata count")
        header.need(13 * pairs + 24 * tensors, f"a table of {tensors} tensors and {pairs} metadata pairs")
        for _ in range(pairs):
            key = header.string("a metadata key", _MAX_NAME)
            if key in self.metadata:
                raise header.fail(f"the metadata key {key!r} appears twice")
            self.metadata[key] = header.value(header.u32(f"metadata {key!r}"), f"metadata {key!r}")
        if self._optional("split.count", int, 1) != 1:
            raise header.fail("one part of a split model; merge the parts into one file first")

        table = []
        for _ in range(tensors):
            name = header.string("a tensor name", _MAX_NAME)
            what = f"tensor {name!r}"
            dims = header.u32(what)
            if not 1 <= dims <= _MAX_DIMS:
                raise header.fail(f"{what} has {dims} dimensions; 1 to {_MAX_DIMS} are possible")
            shape = tuple(reversed(struct.unpack(f"<{dims}Q", header.take(8 * dims, what))))
            table.append((name, shape, header.u32(what), header.u64(what)))

        alignment = self._optional("general.alignment", int, 32)
        if alignment < 8 or alignment % 8:
            raise header.fail(f"general.alignment is {alignment}; it must be a multiple of 8")
        base = -(-header.position // alignment) * alignment
        for name, shape, kind_id, offset in table:
            self._add_tensor(header, name, shape, kind_id, base + offset, offset % alignment == 0)
        # Overlap would let a small file claim a huge model.
        end, previous = base, "the header"
        for info in sorted(self.infos.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise header.fail(f"tensor {info.name!r} overlaps {previous}")
            end, previous = info.offset + info.nbytes, f"tensor {info.name!r}"

    def _add_tensor(
        self, header: _Header, name: str, shape: tuple[int, ...], kind_id: int, offset: int, aligned: bool
    ) -> None:
        kind = TYPES.get(kind_id)
        if kind is None:
            known = _OTHER_TYPES.get(kind_id)
            named = f"the type {known}" if known else f"an unknown type ({kind_id})"
            ours = ", ".join(kind.name for kind in TYPES.values())
            raise header.fail(f"tensor {name!r} has {named}; chiliad reads {ours}")
        if name in self.infos:
            raise header.fail(f"tensor {name!r} appears twice")
        if min(shape) < 1 or shape[-1] % kind.block_size:
            raise header.fail(
                f"tensor {name!r} has shape {list(shape)}, which {kind.name} cannot hold "
                f"(rows are whole blocks of {kind.block_size})"
            )
        nbytes = math.prod(shape) // kind.block_size * kind.type_size
        if not aligned:
            raise header.fail(f"tensor {name!r} is not aligned")
        if offset + nbytes > header.size:
            raise header.fail(
                f"tensor {name!r} ends at byte {offset + nbytes}, but the file has {header.size}. "
                "The file is truncated; fetch it again"
            )
        self.infos[name] = TensorInfo(name, kind, shape, offset, nbytes)

    # --- metadata ---

    def _optional(self, key: str, kind: type[T], default: T) -> T:
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InvalidModel(f"{self.path.name}: metadata {key!r} should be of type {kind.__name__}")
        return value

    def _required(self, key: str, kind: type[T]) -> T:
        if key not in self.metadata:
            raise InvalidModel(f"{self.path.name}: metadata {key!r} is missing")
        return self._optional(key, kind, kind())

    @property
    def architecture(self) -> str:
        return self._required("general.architecture", str)

    # --- bytes ---

    def read(self, info: TensorInfo) -> Array:
        """The stored bytes of a tensor: uint8 [..., bytes of a row]."""
        data = np.empty(info.nbytes, np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                view, filled = data.data, 0
                while filled < info.nbytes:  # one read returns at most 2 GiB
                    count = file.readinto(view[filled:])
                    if not count:
                        raise InvalidModel(f"{self.path.name}: the file shrank since it was opened")
                    filled += count
        except OSError as error:
            reason = error.strerror or str(error)
            raise InvalidModel(f"cannot read {self.path.name}: {reason.lower()}") from None
        row = info.shape[-1] // info.kind.block_size * info.kind.type_size
        return data.reshape(*info.shape[:-1], row)

    # --- Hugging Face's view ---

    def arch_config(self) -> dict[str, object]:
        """The architecture in the vocabulary of a Hugging Face config.json."""
        return _arch_config(self)

    def hf_names(self) -> dict[str, TensorInfo]:
        """Hugging Face tensor name -> stored tensor. Raises InvalidModel on a tensor we do not know."""
        names = _NAMES.get(self.architecture)
        if names is None:
            raise _unsupported(self)
        result = {}
        for info in self.infos.values():
            if info.name in _CONFIG_TENSORS or info.name.endswith(".attn_rot_embd.weight"):
                continue  # said by arch_config
            block, stem, suffix = _split_name(info.name)
            if stem not in names or suffix not in ("weight", "bias"):
                raise InvalidModel(
                    f"{self.path.name}: tensor {info.name!r} is not part of a {self.architecture} model "
                    "that chiliad knows"
                )
            result[f"{names[stem].replace('{}', block)}.{suffix}"] = info
        return result

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of every weight, in file order.

        Tensors are float32, except those stored as F16 or BF16, which keep their type. Each is
        read and decoded when the iterator reaches it.
        """
        for name, info in self.hf_names().items():
            yield name, self.tensor(name, info)

    def tensor(self, name: str, info: TensorInfo | None = None) -> torch.Tensor:
        """One weight by its Hugging Face name."""
        info = info or self.hf_names()[name]
        data = self.raw(name, info)[1]
        value: torch.Tensor
        if info.kind.name == "BF16":
            value = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        elif info.kind.name == "F16":
            value = torch.from_numpy(data.view(np.float16))
        else:
            value = torch.from_numpy(dequantize(data, info.kind))
        if self.architecture == "gpt2" and _is_projection(info.name) and value.ndim == 2:
            return value.T.contiguous()
        if self.architecture == "gemma3" and info.name.endswith("norm.weight"):
            return value.float() - 1
        return value

    def quantized(self, name: str, info: TensorInfo | None = None) -> QuantizedWeight | None:
        """A matrix as it is stored, if kernels can pack that (Q4_0, Q4_1, Q8_0); else None."""
        info = info or self.hf_names()[name]
        turned = self.architecture == "gpt2" and _is_projection(info.name)
        if info.kind.split is None or len(info.shape) != 2 or turned:
            return None
        parts = info.kind.split(self.raw(name, info)[1].reshape(-1, info.kind.type_size))
        if parts is None:
            return None
        levels, scale, minimum = (None if p is None else torch.from_numpy(p) for p in parts)
        assert levels is not None
        assert scale is not None
        groups = (info.shape[0], -1)
        return QuantizedWeight(
            levels.view(info.shape), scale.view(groups), None if minimum is None else minimum.view(groups)
        )

    def raw(self, name: str, info: TensorInfo | None = None) -> tuple[TensorType, Array]:
        """The stored blocks of one weight by its Hugging Face name, for exact repacking.

        Returns the type and uint8 [..., bytes of a row]. Rows are in Hugging Face order (a row
        is a whole number of blocks, so undoing llama's interleaving is exact); gpt2's projections
        stay [out, in] and gemma3's norms stay 1 + w, because bytes cannot say otherwise.
        """
        info = info or self.hf_names()[name]
        data = self.read(info)
        if self.architecture == "llama" and info.name.startswith("blk."):
            stem = _split_name(info.name)[1]
            if stem in ("attn_q", "attn_k"):
                key = "head_count" if stem == "attn_q" else "head_count_kv"
                rows = data.reshape(info.shape[0], -1)
                heads = self._heads(key)
                if rows.shape[0] % (2 * heads):
                    raise InvalidModel(
                        f"{self.path.name}: tensor {info.name!r} has {rows.shape[0]} rows, "
                        f"which {heads} heads cannot share"
                    )
                pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
                data = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)
        return info.kind, data

    def _heads(self, key: str) -> int:
        prefix = f"{self.architecture}.attention."
        heads = self._required(prefix + "head_count", int)
        if key == "head_count_kv":
            heads = self._optional(prefix + key, int, heads)
        if heads < 1:
            raise InvalidModel(f"{self.path.name}: {prefix}{key} is {heads}")
        return heads


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF file. Raises InvalidModel; tensors are read later, on demand."""
    return GGUF(path)


# --- names -----------------------------------------------------------------------------------

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_QK_NORM = {
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "gemma3": _LLAMA
    | _QK_NORM
    | {
        "post_attention_norm": "model.layers.{}.post_attention_layernorm",
        "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
        "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "attn_norm": "transformer.h.{}.ln_1",
        "attn_qkv": "transformer.h.{}.attn.c_attn",
        "attn_output": "transformer.h.{}.attn.c_proj",
        "ffn_norm": "transformer.h.{}.ln_2",
        "ffn_up": "transformer.h.{}.mlp.c_fc",
        "ffn_down": "transformer.h.{}.mlp.c_proj",
    },
}
_CONFIG_TENSORS = {"rope_freqs.weight"}


def _split_name(name: str) -> tuple[str, str, str]:
    """ "blk.3.attn_q.weight" -> ("3", "attn_q", "weight"); the block is "" outside the layers."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(\w+)", name, re.ASCII)
    if match is None:
        return "", name, ""
    block, stem, suffix = match.groups()
    layered = "{}" in (_LLAMA | _QK_NORM | _NAMES["gemma3"] | _NAMES["gpt2"]).get(stem, "{}")
    if layered != (block is not None):
        return "", name, ""
    return block or "", stem, suffix


def _is_projection(name: str) -> bool:
    return _split_name(name)[1] in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def _unsupported(file: GGUF) -> InvalidModel:
    return InvalidModel(
        f"{file.path.name}: the architecture {file.architecture!r} is not supported; "
        f"chiliad reads {', '.join(_NAMES)} from GGUF (mistral files say llama)"
    )


# --- config ----------------------------------------------------------------------------------


def _arch_config(file: GGUF) -> dict[str, object]:
    arch = file.architecture
    if arch not in _NAMES:
        raise _unsupported(file)
    for key in ("expert_count", "attention.clamp_kqv", "attention.max_alibi_bias"):
        if file.metadata.get(f"{arch}.{key}"):
            raise InvalidModel(
                f"{file.path.name}: {arch}.{key} is not supported (dense llama-like models are)"
            )

    def integer(key: str, default: int | None = None) -> int:
        full = f"{arch}.{key}"
        return file._required(full, int) if default is None else file._optional(full, int, default)

    def number(key: str, default: float | None = None) -> float:
        full = f"{arch}.{key}"
        value = file._required(full, float) if default is None else file._optional(full, float, default)
        return _shortest(value)

    def token(key: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int else None

    embedding = file.infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidModel(f"{file.path.name}: tensor 'token_embd.weight' is missing or not a matrix")
    hidden, heads = integer("embedding_length"), file._heads("head_count")
    config: dict[str, object] = {
        "vocab_size": embedding.shape[0],
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "tie_word_embeddings": "output.weight" not in file.infos,
    }
    if arch == "gpt2":
        return config | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": hidden,
            "n_head": heads,
            "n_layer": integer("block_count"),
            "n_positions": integer("context_length"),
            "n_inner": integer("feed_forward_length"),
            "layer_norm_epsilon": number("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }

    head_dim = integer("attention.key_length", hidden // heads)
    if integer("attention.value_length", head_dim) != head_dim:
        raise InvalidModel(f"{file.path.name}: keys and values of different head sizes are not supported")
    if integer("rope.dimension_count", head_dim) != head_dim:
        raise InvalidModel(f"{file.path.name}: rotating only a part of each head is not supported")
    config |= {
        "hidden_size": hidden,
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file._heads("head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
    }
    attention_bias = "blk.0.attn_q.bias" in file.infos
    window = integer("attention.sliding_window", 0) or None
    if arch == "gemma3":
        pattern = 6 if window else 1  # gemma3's fixed rhythm: five sliding layers, then a full one
        layers = range(1, integer("block_count") + 1)
        kinds = ["full_attention" if layer % pattern == 0 else "sliding_attention" for layer in layers]
        # llama.cpp derives the attention scale like this; only the 27B model divides by head count.
        scalar = hidden // heads if integer("block_count") == 62 else head_dim
        return config | {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "rope_local_base_freq": number("rope.freq_base_swa", 10000.0),
            "sliding_window": window or 4096,
            "layer_types": kinds,
            "attention_bias": attention_bias,
            "final_logit_softcapping": number("final_logit_softcapping", 0.0) or None,
        }
    config["hidden_act"] = "silu"
    if arch in ("qwen2", "qwen3"):
        if arch == "qwen3":
            config["attention_bias"] = attention_bias
        name = arch.capitalize()
        return config | {
            "model_type": arch, "architectures": [f"{name}ForCausalLM"], "use_sliding_window": False,
        }  # fmt: skip
    if window:
        return config | {
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window,
        }  # fmt: skip
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": attention_bias,
        "mlp_bias": "blk.0.ffn_up.bias" in file.infos,
    }


def _shortest(value: float) -> float:
    """A float32 from the file as the decimal its author wrote: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUF, head_dim: int) -> dict[str, object] | None:
    arch = file.architecture
    kind = file._optional(f"{arch}.rope.scaling.type", str, "none")
    factor = _shortest(file._optional(f"{arch}.rope.scaling.factor", float, 1.0))
    if "rope_freqs.weight" in file.infos:
        if kind != "none":
            raise InvalidModel(f"{file.path.name}: rope_freqs.weight beside rope scaling {kind!r}")
        return _llama3_scaling(file, head_dim)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file._required(f"{arch}.rope.scaling.original_context_length", int)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise InvalidModel(f"{file.path.name}: rope scaling {kind!r} is not supported")


def _llama3_scaling(file: GGUF, head_dim: int) -> dict[str, object]:
    """Llama 3's scaling from the factors that divide each frequency.

    The published models share low 1, high 4 and 8192 original positions; the scheme is then a
    function of the largest factor alone, so the tensor is checked against it, entry by entry.
    """
    info = file.infos["rope_freqs.weight"]
    if info.shape != (head_dim // 2,) or info.kind.name != "F32":
        raise InvalidModel(f"{file.path.name}: rope_freqs.weight should be float32 [{head_dim // 2}]")
    stored = dequantize(file.read(info), info.kind).astype(np.float64)
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    base = file._optional(f"{file.architecture}.rope.freq_base", float, 10000.0)
    turns = original * base ** (-np.arange(head_dim // 2) * 2 / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise InvalidModel(
            f"{file.path.name}: rope_freqs.weight is not llama3 scaling; load the original checkpoint instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
