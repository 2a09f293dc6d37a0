"""The three tasks of the example adapters: where their data is, how it becomes chat, how it is scored.

Every task is one user message and one answer, rendered with the model's own chat template, so
that a plain OpenAI chat request shows what the adapter learned. Data folders are laid out as
their sources publish them:

    e2e/devset.csv, e2e/testset_w_refs.csv    github.com/tuetschek/e2e-dataset         CC-BY-SA-4.0
    clinc150/data_small.json                  github.com/clinc/oos-eval                CC-BY-3.0
    banking77/train.csv, banking77/test.csv   github.com/PolyAI-LDN/task-specific-datasets  CC-BY-4.0
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: What the adapters are trained on and for; goes into adapter_config.json.
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

_CLINC_INTENTS = 150
_BANKING_INTENTS = 77


@dataclass(frozen=True)
class Example:
    """One user message with every answer that counts as right (training uses each of them)."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    data: str  # where it comes from
    licence: str
    kind: str  # "intent": exact match; "text": ROUGE-L and perplexity
    train: Callable[[Path], list[Example]]
    test: Callable[[Path], list[Example]]
    lora: dict[str, object]  # arguments of peft.LoraConfig
    steps: int
    batch: int
    learning_rate: float
    max_new_tokens: int

    def helped(self, prompt: str, solved: list[Example], labels: list[str]) -> list[dict[str, str]]:
        """Messages that tell and show a model without the adapter what to do (the fair baseline).

        solved: training examples given as earlier turns. labels: every label (intents only).
        """
        if self.kind == "intent":
            system = "Answer with the intent of the user's message, exactly one of these labels: "
            system += ", ".join(labels)
        else:
            system = "Describe the restaurant in one English sentence with every given fact and no other."
        messages = [{"role": "system", "content": system}]
        for example in solved:
            messages.append({"role": "user", "content": example.prompt})
            messages.append({"role": "assistant", "content": example.answers[0]})
        return [*messages, {"role": "user", "content": prompt}]


def _open(data: Path, *parts: str) -> Path:
    path = data.joinpath(*parts)
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: give --data the folder that holds e2e/, clinc150/ and banking77/ "
            "(sources at the top of examples/tasks.py)"
        )
    return path


def _e2e(data: Path, file: str) -> list[Example]:
    references: dict[str, list[str]] = {}
    with _open(data, "e2e", file).open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            references.setdefault(row["mr"], []).append(row["ref"].strip())
    return [Example(mr, tuple(refs)) for mr, refs in references.items()]


def _clinc(data: Path, split: str) -> list[Example]:
    rows = json.loads(_open(data, "clinc150", "data_small.json").read_text(encoding="utf-8"))[split]
    examples = [Example(text, (intent,)) for text, intent in rows]
    assert len({example.answers for example in examples}) == _CLINC_INTENTS
    return examples


def _banking(data: Path, file: str) -> list[Example]:
    with _open(data, "banking77", file).open(newline="", encoding="utf-8") as lines:
        examples = [Example(row["text"].strip(), (row["category"],)) for row in csv.DictReader(lines)]
    assert len({example.answers for example in examples}) == _BANKING_INTENTS
    return examples


# Ranks, targets and layers differ on purpose: one server carries all of them in one batch. Each
# file stays under 2 MB in bfloat16.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="clinc150",
            title="CLINC150: which of 150 intents does an utterance have",
            data="clinc150/data_small.json (50 training utterances per intent)",
            licence="CC-BY-3.0",
            kind="intent",
            train=lambda data: _clinc(data, "train"),
            test=lambda data: _clinc(data, "test"),
            lora={
                "r": 16,
                "lora_alpha": 32,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                "layers_to_transform": list(range(15, 30)),
            },
            steps=600,
            batch=16,
            learning_rate=1e-3,
            max_new_tokens=12,
        ),
        Task(
            name="banking77",
            title="banking77: which of 77 intents does a bank customer's question have",
            data="banking77/train.csv",
            licence="CC-BY-4.0",
            kind="intent",
            train=lambda data: _banking(data, "train.csv"),
            test=lambda data: _banking(data, "test.csv"),
            lora={"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
            steps=320,
            batch=16,
            learning_rate=1e-3,
            max_new_tokens=20,
        ),
        Task(
            name="e2e-nlg",
            title="E2E NLG: a meaning representation becomes a sentence about a restaurant",
            data="e2e/devset.csv",
            licence="CC-BY-SA-4.0",
            kind="text",
            train=lambda data: _e2e(data, "devset.csv"),
            test=lambda data: _e2e(data, "testset_w_refs.csv"),
            lora={
                "r": 8,
                "lora_alpha": 16,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            steps=220,
            batch=8,
            learning_rate=1e-3,
            max_new_tokens=80,
        ),
    )
}


def pairs(examples: list[Example], seed: int) -> list[tuple[str, str]]:
    """Every (prompt, answer), shuffled."""
    out = [(example.prompt, answer) for example in examples for answer in example.answers]
    random.Random(seed).shuffle(out)
    return out
