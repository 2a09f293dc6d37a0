"""Draw the result of `run.py`: one panel per case, a bar per system, the floor as a line.

python benchmarks/peers/plot.py benchmarks/peers/result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"chiliad": "#1b6ca8", "vLLM": "#d98032", "PEFT": "#8a8a8a", "transformers": "#8a8a8a"}
LLAMA, QUANTISED = "#5a9367", "#7fb2d9"


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = result["cases"]
    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, (name, case) in zip(axes.flat, cases.items(), strict=False):
        rates = dict(reversed(case["rate"].items()))
        colours = [COLOURS.get(s, LLAMA if s.startswith("llama") else QUANTISED) for s in rates]
        top = max([*rates.values(), case.get("floor", {}).get("rate", 0)])
        axis.barh(list(rates), list(rates.values()), color=colours)
        for i, rate in enumerate(rates.values()):
            axis.text(
                rate + 0.015 * top,
                i,
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
                va="center",
                fontsize=8,
            )
        if "floor" in case:
            axis.axvline(case["floor"]["rate"], color="black", linewidth=1, linestyle=":")
            axis.set_xlabel(
                f"tokens/s (dotted: what bfloat16 allows, {case['floor']['rate']:,.0f})", fontsize=8
            )
        axis.set_xlim(0, 1.18 * top)
        axis.set_title(f"{name}: {case['rows']} x {case['prompt']} in, {case['output']} out", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    figure.suptitle(f"SmolLM2-135M, {machine['cpu']}, {machine['threads']} threads, median of {result['rounds']}",
                    fontsize=10)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
