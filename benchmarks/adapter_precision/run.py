"""What do int8 rank rows cost in quality, and what do they save?

    python benchmarks/adapter_precision/run.py [--data DATA]

The example adapters and two random ones, each kept in the pool as float32, bfloat16 and int8 rows.
With --data (see examples/tasks.py) held-out examples are scored as well.
"""

from __future__ import annotations

import gc
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[2] / "examples"),
]

from common import ROOT, TARGETS, Report, arguments, say, scratch  # noqa: E402
from evaluate import Chiliad, rouge_l  # noqa: E402
from tasks import TASKS  # noqa: E402

from chiliad import LLM, SamplingParams  # noqa: E402
from chiliad.config import parse_bytes  # noqa: E402
from chiliad.testing import write_random_adapter  # noqa: E402

#: (base, rows): the first is the truth, the next two show the rows alone, the last two what is served.
KINDS = [
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
]
RANDOM = {"random-r16": TARGETS, "random-r16-all-linear": "all-linear"}
#: What each example adapter is for, and plain chat.
PROMPTS = {
    "clinc150": [
        "how do i reset my pin",
        "will it rain tomorrow",
        "what is my balance",
        "book a table for two",
    ],
    "banking77": [
        "My card has not arrived",
        "Why was I charged twice?",
        "How do I top up?",
        "I lost my phone",
    ],
    "e2e-nlg": [
        "name[The Eagle], eatType[coffee shop], food[Japanese], area[riverside]",
        "name[Blue Spice], eatType[pub], priceRange[cheap], near[Rainbow Vegetarian Café]",
        "name[The Mill], food[Indian], familyFriendly[yes], customer rating[high]",
        "name[Zizzi], eatType[restaurant], area[city centre]",
    ],
    "": [
        "Name three things you could do with an old newspaper.",
        "Write a short poem about the sea in winter.",
        "Explain to a child why the sky is blue.",
        "What should I check before I buy a used bicycle?",
    ],
}


@contextmanager
def served(args: Any, folder: Path, base: str, rows: str) -> Iterator[LLM]:
    llm = LLM(args.model, memory=args.memory, dtype=base, adapter_dtype=rows, max_model_len=2048)  # type: ignore[arg-type]
    llm.registry.scan(ROOT / "examples" / "adapters")
    llm.registry.scan(folder)
    try:
        yield llm
    finally:
        llm.close()
        del llm
        gc.collect()


def asked(llm: LLM, name: str) -> list[list[int]]:
    texts = [*PROMPTS.get(name, []), *PROMPTS[""]]
    chat = llm.tokenizer.chat
    return [llm.tokenizer.encode(chat([{"role": "user", "content": t}]), add_special=False) for t in texts]


class Watched:
    """A decoder that keeps the logits of its last forward."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.logits = torch.empty(0)

    def forward(self, *args: Any) -> torch.Tensor:
        self.logits = self._decoder.forward(*args)
        return self.logits


def forced(llm: LLM, name: str, prompts: list[list[int]], answers: list[list[int]]) -> list[torch.Tensor]:
    """Logits at every place where a token of `answers` was chosen: float32 [tokens, vocab] each."""
    runner = llm.engine._runner
    watched = runner._decoder = Watched(llm.model.decoder)  # type: ignore[assignment]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        llm.generate([[*prompt, *answer[:-1]]], params, name)
        found.append(watched.logits[-len(answer) :].clone())
    runner._decoder = llm.model.decoder
    return found


def held_out(llm: LLM, name: str, data: Path, limit: int) -> dict[str, float]:
    """The adapter's score in examples/evaluate.py's terms."""
    task, backend = TASKS[name], Chiliad.__new__(Chiliad)
    backend.llm = llm
    sample = random.Random(0).sample(task.test(data), limit)
    chats = [[{"role": "user", "content": example.prompt}] for example in sample]
    answers = backend.answers(chats, name, task.max_new_tokens)
    references = [example.answers for example in sample]
    nats, tokens = backend.loss(chats, [some[0] for some in references], name)
    score = {"perplexity": math.exp(nats / tokens)}
    if task.kind == "intent":
        right = sum(a.strip() == some[0] for a, some in zip(answers, references, strict=True))
        return {"accuracy": right / limit, **score}
    return {"rouge_l": sum(map(rouge_l, answers, references)) / limit, **score}


def main() -> None:
    args = arguments(
        __doc__, {"tokens": 4, "held_out": 4}, tokens=48, held_out=500, memory="2GB", pool="512MB", data=""
    )
    report = Report("What do int8 rank rows cost in quality, and what do they save?", args)
    names = [*TASKS, *RANDOM]
    truth: dict[str, list[torch.Tensor]] = {}
    answers: dict[str, list[list[int]]] = {}
    greedy = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    usual: dict[str, list[list[int]]] = {}
    with scratch(args) as folder:
        for base, rows in KINDS:
            kind = f"{base} base, {rows} rows"
            say(kind)
            with served(args, folder, base, rows) as llm:
                if not truth:
                    for seed, (name, targets) in enumerate(RANDOM.items()):
                        write_random_adapter(
                            folder / name, llm.model.info, 16, targets, seed=seed, dtype="float32"
                        )  # type: ignore[arg-type]
                    llm.registry.scan(folder)
                of_kind: dict[str, Any] = {}
                for name in names:
                    prompts = asked(llm, name)
                    free = [o.choices[0].token_ids for o in llm.generate(prompts, greedy, name)]
                    answers.setdefault(name, free)
                    logits = forced(llm, name, prompts, answers[name])
                    truth.setdefault(name, logits)
                    ours, exact = torch.cat(logits), torch.cat(truth[name])
                    error = ours - exact
                    result = {
                        "max_abs_error": float(error.abs().max()),
                        "mean_abs_error": float(error.abs().mean()),
                        "rms_error": float(error.pow(2).mean().sqrt()),
                        "rms_logit": float((exact - exact.mean(-1, keepdim=True)).pow(2).mean().sqrt()),
                        "same_best_token": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
                        "positions": len(ours),
                    }
                    if rows == "bfloat16":
                        usual[name] = free
                    elif rows == "int8":
                        pairs = list(zip(free, usual[name], strict=True))
                        result["answers_as_with_bfloat16_rows"] = sum(a == b for a, b in pairs) / len(pairs)
                        tokens = [x == y for a, b in pairs for x, y in zip(a, b, strict=True)]
                        result["tokens_as_with_bfloat16_rows"] = sum(tokens) / len(tokens)
                    if args.data and base == "bfloat16" and name in TASKS:
                        result["held_out"] = held_out(llm, name, Path(args.data), args.held_out)
                    store, version = llm.engine.store, llm.registry.resolve(name)
                    result["pool_bytes"] = store.pages_needed(version) * llm.engine.layout.page_bytes
                    of_kind[name] = result
                    say(f"  {name}: {result}")
                report.result[kind] = of_kind
    report.result["adapters_that_fit"] = {
        f"{args.pool} of {rows} rows": {
            name: int(
                parse_bytes(args.pool) // report.result[f"{base} base, {rows} rows"][name]["pool_bytes"]
            )
            for name in names
        }
        for base, rows in KINDS[3:]
    }
    report.write()


if __name__ == "__main__":
    main()
