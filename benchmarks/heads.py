"""Learned heads beside probed ones: held-out questions to one model at equal numbers of heads.

    python -m benchmarks.heads [--model smollm2] [--window 256] [--tokens 2048] [--documents 12]

Every document is read before its questions. Names, prose and phrasings of the questions are not those of calibration.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

import razor_jax
from razor_jax import HeadSplit, RazorConfig, find_heads
from razor_jax.evals.bench import machine
from razor_jax.heads.causal import Ablation
from razor_jax.heads.gates import gate_heads, gradient_heads
from razor_jax.needles.tasks import FAMILIES, Task, make_tasks


def main(
    model: str = "smollm2",
    share: Annotated[list[float] | None, typer.Option(help="Shares of KV heads that keep everything.")] = None,
    window: int = 256,
    tokens: int = 2048,
    documents: int = 12,
    steps: int = 72,
) -> None:
    """Choose heads by three methods and print what each keeps."""
    params = razor_jax.load(model, dtype="float32", heads=None)
    razor = RazorConfig.compact(window=window)
    scores = {}
    for name, method in (
        ("gates", lambda: gate_heads(params, razor=razor, steps=steps)),
        ("gradient", lambda: gradient_heads(params, razor=razor)),
        ("probe", lambda: find_heads(params)),
    ):
        start = time.perf_counter()
        scores[name] = method()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    tasks = make_tasks(params, "held_out", documents=documents, tokens=tokens, seed=7)
    ablation = Ablation(params, tasks, razor)
    shape = (params.config.num_layers, params.config.num_kv_heads)
    show("dense", HeadSplit.all(*shape), ablation, tasks)
    for part in share or (0.289, 0.2, 0.144):
        for name, found in scores.items():
            show(name, found.select(share=part), ablation, tasks)
    print(f"{razor.describe()}; {machine()}")


def show(name: str, split: HeadSplit, ablation: Ablation, tasks: list[Task]) -> None:
    """Print right answers in all and of each family, and the loss."""
    outcome = ablation(split)
    turns = len(tasks[0].turns)
    family = np.asarray([[task.families[turn] for task in tasks] for turn in range(turns)]).reshape(-1)
    parts = "  ".join(f"{f} {outcome.right[family == f].sum()}/{(family == f).sum()}" for f in FAMILIES)
    print(
        f"{name:9s} {sum(split.counts):3d} heads  {outcome.right.sum()}/{len(outcome.right)} right  "
        f"{outcome.loss:.3f} nats  {parts}",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
