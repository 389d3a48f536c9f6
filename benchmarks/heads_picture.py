"""Draw docs/heads/public.png from the tables of `benchmarks.heads`: bytes saved and points lost, by method.

python -m benchmarks.heads_picture
"""

from __future__ import annotations

import json
from pathlib import Path

from razor_jax.heads.plots import require

ROOT = Path(__file__).parents[1]
MODELS = {
    "SmolLM2-135M-Instruct": "heads-smollm2.json",
    "Qwen2.5-Coder-1.5B-Instruct": "heads-qwen2.5-coder-1.5b.json",
}
# Colour (Okabe and Ito's), marker and line: each alone tells the methods apart.
STYLES = {
    "gates": ("#0072B2", "o", "-"),
    "gradient": ("#009E73", "s", "--"),
    "search": ("#CC79A7", "^", "-."),
    "probe": ("#D55E00", "v", ":"),
}


def main() -> None:
    pyplot = require()
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(9.6, 3.6), sharey=True)
    for axes, (model, file) in zip(panels, MODELS.items(), strict=True):
        table = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["table"]
        rows = [row for row in table if "window 256" in row["policy"] and row["tokens"] == 2048]
        for method, (colour, marker, line) in STYLES.items():
            for int8 in (False, True):
                # The calibration of eight documents, where there are several.
                found = {
                    r["heads"]: r for r in reversed(rows) if r["method"] == method and ("int8" in r["policy"]) == int8
                }
                if not found:
                    continue
                points = sorted((100 * row["saved"], _lost(row), row["low"], row["high"]) for row in found.values())
                saved, lost, low, high = zip(*points, strict=True)
                errors = [
                    [y - a for y, a in zip(lost, low, strict=True)],
                    [b - y for y, b in zip(lost, high, strict=True)],
                ]
                face = "white" if int8 else colour
                name = f"{method}, int8" if int8 else method
                axes.errorbar(
                    saved, lost, errors, color=colour, marker=marker, ls=line, mfc=face, capsize=2, lw=1.3, label=name
                )
        axes.axhline(0, color="0.5", lw=0.8)
        questions = {row["questions"] for row in rows}
        axes.set_title(f"{model}, {', '.join(map(str, sorted(questions)))} questions", size=9)
        axes.set(xlabel="bytes of a dense cache saved, %", xlim=(50, 86))
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[0].set_ylabel("right, compressed minus dense, points")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "heads" / "public.png", dpi=110)


def _lost(row: dict) -> float:
    return 100 * (row["compressed"] - row["dense"]) / row["questions"]


if __name__ == "__main__":
    main()
