"""The trained adapters that are shipped, and the arithmetic of the scripts that made and measured them."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from chiliad.adapters.registry import Registry
from chiliad.demo import TRAINED, trained_adapters
from chiliad.testing import SMOLLM2, base_info, tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_adapter_is_small_and_says_where_it_comes_from(name: str) -> None:
    folder = trained_adapters() / name
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    assert (folder / "adapter_model.safetensors").stat().st_size < 2_000_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == SMOLLM2["_name_or_path"]
    assert "held-out examples" in (folder / "README.md").read_text()


def test_the_registry_takes_all_of_them() -> None:
    registry = Registry(":memory:", base_info(SMOLLM2))
    for name in TRAINED:
        assert registry.add(trained_adapters() / name, name).nbytes < 2_000_000


@pytest.mark.parametrize("script", ["train_adapters"], indirect=True)
def test_a_shared_head_changes_no_loss_and_no_gradient(script: ModuleType, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    tiny_model(tmp_path)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), config)
    rows = [([5, 6, 7, 8, 20, 21, 30, 31, 2], 6), ([5, 6, 7, 9, 40, 41, 2], 5), ([5, 6, 7, 9, 50, 2], 4)]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    batch = script.pack(rows)
    assert len(batch[0]) == 3 + 6 + 4 + 3
    together = script.answer_loss(model, batch)
    sizes = [len(ids) - begin for ids, begin in rows]
    alone = sum(script.answer_loss(model, script.pack([row])) * n for row, n in zip(rows, sizes, strict=True))
    alone = alone / sum(sizes)
    ids, begin = rows[0]
    logits = model(input_ids=torch.tensor([ids])).logits[0, begin - 1 : -1]
    plain = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[begin:]))
    torch.testing.assert_close(script.answer_loss(model, script.pack(rows[:1])), plain)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradient(together), gradient(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script", ["evaluate"], indirect=True)
def test_scores(script: ModuleType) -> None:
    text = "the cat sat on the mat ."
    assert script.rouge_l(text, ["no such word", text]) == 1.0
    assert script.rouge_l("the cat", [text]) == pytest.approx(2 * 1 * (2 / 7) / (1 + 2 / 7))
    assert script.bleu([text], [[text, "something else"]]) == pytest.approx(1.0)
    # clipped counts 5/6, 3/5, 2/4, 1/3 against one reference of equal length
    candidate, reference = "the cat sat on the sofa", "the cat sat on a sofa"
    expected = math.exp(sum(math.log(p) for p in (5 / 6, 3 / 5, 2 / 4, 1 / 3)) / 4)
    assert script.bleu([candidate], [[reference]]) == pytest.approx(expected)
    labels = ["card_arrival", "pin_blocked", "pin"]
    assert script.names_only("Your label: Card arrival.", "card_arrival", labels)
    assert script.names_only("pin_blocked", "pin_blocked", labels)
    assert not script.names_only("pin_blocked", "pin", labels)
    assert not script.names_only("card_arrival or pin_blocked", "card_arrival", labels)
