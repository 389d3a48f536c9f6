"""Every method of choosing heads on one model: what each keeps of held-out questions at equal numbers of heads.

    python -m benchmarks.heads [--model smollm2] [--window 256] [--tokens 2048] [--documents 96] [--out FILE]

Every document is read before its questions. Names, prose and phrasings of the questions are not those of calibration.
With `--method causal` (the loss that windowing a KV head alone adds), prints the rank correlation of every other method
with it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import razor_jax
from razor_jax import HeadScores, HeadSplit, RazorConfig, find_heads
from razor_jax.evals.bench import machine
from razor_jax.evals.provenance import provenance, write_json
from razor_jax.heads import Calibration, measure
from razor_jax.heads.compare import spearman
from razor_jax.heads.find import LEARNED


def main(
    model: str = "smollm2",
    heads: Annotated[list[int] | None, typer.Option(help="KV heads that keep everything; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; all that fit a small model.")] = None,
    window: int = 256,
    tokens: int = 2048,
    documents: int = 96,
    calibration: Annotated[int, typer.Option(help="Documents that heads are chosen by.")] = 8,
    kv_dtype: Annotated[str | None, typer.Option(help="Type of the compressed cache.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Folder to keep scores in: a second run reads them.")] = None,
    splits: Annotated[
        Path | None, typer.Option(help="Table of an earlier run, whose splits are asked, on other documents.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON of the table.")] = None,
) -> None:
    """Choose heads by several methods, then print and write what each keeps."""
    params = razor_jax.load(model, dtype="float32", heads=None)
    razor = RazorConfig.compact(window=window)
    total = params.config.num_layers * params.config.num_kv_heads
    rows: list[tuple[str, int, HeadSplit]] = []
    seconds: dict[str, float] = {}
    if splits is not None:
        earlier = json.loads(splits.read_text())
        seconds = earlier["seconds"]
        # A table may ask the same split under two policies.
        unlike = {(row["method"], row["heads"]): row["split"] for row in earlier["table"]}
        rows = [(*key, HeadSplit(split, params.config.num_kv_heads)) for key, split in unlike.items()]
    counts = heads or (30, 26, 18, 13)
    rankings: dict[str, np.ndarray] = {}
    for count in counts if splits is None else ():
        for name in method or ("gates", "gradient", "search", "probe", "random"):
            label = f"{name}-{count}" if name == "search" else name
            start = time.perf_counter()
            found = _scores(params, name, count, razor, tokens, calibration, scores and scores / f"{label}.json")
            rankings[label] = found.best
            if label not in seconds:
                seconds[label] = round(time.perf_counter() - start, 1)
                print(f"{label}: {seconds[label]:.0f} s", flush=True)
            rows.append((name, count, found.select(share=count / total)))
    policy = RazorConfig.compact(window=window, kv_dtype=kv_dtype)
    promises = measure(
        params,
        [split for _, _, split in rows],
        policy,
        documents=documents,
        tokens=tokens,
        seed=7,
        progress=lambda done, of: print(f"{done} of {of} documents", flush=True),
    )
    table = [
        {"method": name, "heads": count, **promise.to_dict(), "split": split.retrieval}
        for (name, count, split), promise in zip(rows, promises, strict=True)
    ]
    for (name, _, _), promise in zip(rows, promises, strict=True):
        print(f"{name:9s} {promise}", flush=True)
    print(promises[0].families)
    print(f"{policy.describe()}; {machine()}")
    truth = rankings.pop("causal", None)
    ranks = {} if truth is None else {name: round(spearman(best, truth), 3) for name, best in rankings.items()}
    if ranks:
        print("Spearman with causal:", ", ".join(f"{name} {value:.2f}" for name, value in ranks.items()))
    if out is not None:
        result = {"about": provenance(params, model), "seconds": seconds, "table": table}
        write_json(out, result | ({"spearman": ranks} if ranks else {}))


def _scores(
    params: razor_jax.Params, name: str, count: int, razor: RazorConfig, tokens: int, documents: int, file: Path | None
) -> HeadScores:
    if file is not None and file.exists():
        return HeadScores.load(file)
    options: dict[str, Any] = {}
    if name in LEARNED:
        options = {"razor": razor, "calibration": Calibration(documents)}
    if name == "causal":
        options = {"razor": razor, "tokens": tokens}
    if name == "search":
        options["heads"] = count
        if file is not None and (ranking := file.with_name("gates.json")).exists():
            options["start"] = HeadScores.load(ranking)
    found = find_heads(params, method=name, **options)  # type: ignore[arg-type]
    if file is not None:
        found.save(file)
    return found


if __name__ == "__main__":
    typer.run(main)
