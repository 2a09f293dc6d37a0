"""The least time that bytes and flops allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cases import Case


@dataclass(frozen=True)
class Model:
    """Sizes of the base, from the exported folder."""

    nbytes: int  # of weights, each once (the head is the embedding)
    linear: int  # parameters of linear layers, without the head
    head: int
    layers: int
    attention: int  # heads x head size

    @staticmethod
    def read(folder: Path) -> Model:
        config = json.loads((folder / "config.json").read_text())
        linear = head = nbytes = 0
        for name, shape, size in tensors(folder / "model.safetensors"):
            nbytes += size
            if "embed" in name:
                head += shape[0] * shape[1]
            elif len(shape) == 2:
                linear += shape[0] * shape[1]
        heads = config["num_attention_heads"] * config["head_dim"]
        return Model(nbytes, linear, head, config["num_hidden_layers"], heads)


def tensors(path: Path) -> Iterator[tuple[str, list[int], int]]:
    """(name, shape, bytes) of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, entry["shape"], end - begin


def floor(case: Case, model: Model, work: Path, read: float, multiply: float) -> dict[str, float]:
    """The least time that bfloat16 weights allow: bytes of all steps, or flops of a prefill."""
    names = case.names()
    sizes = {
        name: sum(size for *_, size in tensors(work / "adapters" / name / "adapter_model.safetensors"))
        for name in set(names) if name is not None
    }  # fmt: skip
    step_bytes = model.nbytes + sum(sizes.values())
    tokens = case.rows * case.prompt
    adapter_parameters = sum(sizes[name] // 2 for name in names if name is not None)  # once per row
    linear = 2.0 * (tokens * model.linear + case.prompt * adapter_parameters + case.rows * model.head)
    attention = 2.0 * case.rows * model.layers * model.attention * case.prompt * (case.prompt + 1)
    result = {"step_bytes": step_bytes, "prefill_flops_linear": linear, "prefill_flops_attention": attention}
    prefill = (linear + attention) / multiply
    if case.prefill:
        return result | {"seconds": prefill, "roofline_seconds": prefill}
    step_flops = 2.0 * (case.rows * (model.linear + model.head) + adapter_parameters)
    step = max(step_bytes / read, step_flops / multiply)
    return result | {
        "step_flops": step_flops,
        "seconds": case.output * step_bytes / read,  # bytes alone; the prefill counts as one step
        "roofline_seconds": prefill + (case.output - 1) * step,  # bytes or flops, whichever takes longer
    }
