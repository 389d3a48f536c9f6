"""Evaluation of a head search on one model: is it stable, and does it find the heads that matter?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import HeadSplit, RazorConfig
from ..params import Params
from . import causal, compare
from .causal import Ablation
from .mass import Progress
from .needle import needle_heads, random_heads
from .probe import probe_heads
from .scores import HeadScores
from .select import CurvePoint, by_count

MOST_HEADS = 64  # models with more KV heads get no causal search
_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
_CHANCE = 5  # random splits per size
_SHORTER = (2, 4, 8)  # divisors of the block length

Say = Callable[[str], Progress]  # starts a named phase and returns its progress callback


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two searches on one model."""

    name: str
    induction: float  # Spearman correlation over all KV heads
    echo: float
    overlap: float  # shared part of the two default splits


@dataclasses.dataclass(frozen=True)
class Stability:
    """Stability of the search: how much a split depends on the model, and how much on the random draw.

    Attributes:
      seeds: every pair of seeds.
      lengths: shorter blocks compared with the full one, with the same seed.
      presets: other searches compared with the probe of the paper.
      undecided: heads that only some seeds keep, as ((layer, head), number of seeds that keep it).
      notes: searches that could not run, and why.
    """

    seeds: tuple[Agreement, ...]
    lengths: tuple[Agreement, ...]
    presets: tuple[Agreement, ...]
    undecided: tuple[tuple[tuple[int, int], int], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """Result of one split, or the mean of several of one size, on questions that no search has seen."""

    heads: int
    loss: float
    accuracy: float
    half_width: float
    kept: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Causal:
    """Comparison of the probe with causal importance.

    Attributes:
      rise: float64 [L, K], loss added by windowing each KV head alone.
      dense_loss: loss of dense attention on the evaluation questions.
      spearman: rank correlation of each scorer with `rise`.
      judged: results of each method, one split per size, on questions that no search has seen.
      tasks: description of the questions.
      seconds: wall time of searches and evaluation.
    """

    rise: np.ndarray
    dense_loss: float
    spearman: dict[str, float]
    judged: dict[str, tuple[SplitResult, ...]]
    tasks: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a report shows about one model."""

    scores: HeadScores
    split: HeadSplit
    stability: Stability
    causal: Causal | None
    curve: tuple[CurvePoint, ...]
    setting: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        causal = None
        if self.causal is not None:
            causal = {**dataclasses.asdict(self.causal), "rise": self.causal.rise.tolist()}
        return {
            "scores": self.scores.to_json(),
            "split": dataclasses.asdict(self.split),
            "stability": dataclasses.asdict(self.stability),
            "causal": causal,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "setting": self.setting,
            "seconds": self.seconds,
        }


def study(
    params: Params,
    *,
    seeds: int = 4,
    documents: int = 8,
    tokens: int = 1024,
    capacity: int | None = None,
    say: Say = lambda phase: lambda done, total: None,
) -> Study:
    """Probe a model with several seeds, and window single heads if it is small and has a tokenizer.

    Args:
      seeds: number of probes to compare; scores are the mean.
      documents, tokens: number and length of the documents to search with. Evaluation uses twice as many documents.
      capacity: cache capacity in tokens for the curve of bytes; None for max_position_embeddings.
      say: called with the name of each phase; returns the progress callback of the phase.
    """
    started = time.perf_counter()
    policy = params.razor or RazorConfig()
    runs = [probe_heads(params, seeds=(seed,), progress=say(f"probe, seed {seed}")) for seed in range(seeds)]
    echo, induction = np.mean([(run.query_echo, run.query_induction) for run in runs], axis=0)
    meta = dataclasses.replace(runs[0].meta, seeds=tuple(range(seeds)))
    scores = HeadScores(echo, induction, params.config.num_kv_heads, meta)
    searches, notes = _searches(params, say)
    stability = Stability(
        seeds=tuple(
            agreement(f"{a.meta.seeds[0]} and {b.meta.seeds[0]}", a, b)
            for n, a in enumerate(runs)
            for b in runs[n + 1 :]
        ),
        lengths=tuple(_lengths(params, runs[0], say)),
        presets=tuple(agreement(name, scores, other) for name, other in searches.items()),
        undecided=tuple(compare.undecided([run.select() for run in runs])),
        notes=tuple(notes),
    )
    tried = None
    if scores.echo.size <= MOST_HEADS and params.assets is not None and params.assets.tokenizer_json is not None:
        scorers = {"probe": scores, **searches}
        tokens = min(tokens, params.config.max_position_embeddings // 2)
        # Heads differ only if the window drops tokens of these documents.
        narrow = policy if policy.window and policy.window < tokens // 2 else RazorConfig.compact(tokens // 8)
        tried = against_causal(params, scorers, narrow, documents=documents, tokens=tokens, say=say)
    points = scores.curve(capacity or params.config.max_position_embeddings, policy)
    chosen = params.heads or scores.select()
    return Study(scores, chosen, stability, tried, points, policy.describe(), time.perf_counter() - started)


def agreement(name: str, a: HeadScores, b: HeadScores) -> Agreement:
    """Compare rankings and default splits of two searches."""
    return Agreement(
        name,
        compare.spearman(a.induction, b.induction),
        compare.spearman(a.echo, b.echo),
        compare.overlap(a.select(), b.select()),
    )


def against_causal(
    params: Params,
    scorers: dict[str, HeadScores],
    policy: RazorConfig,
    *,
    documents: int,
    tokens: int,
    say: Say = lambda phase: lambda done, total: None,
) -> Causal:
    """Window each head alone, search greedily, and evaluate every method on questions that no search has seen."""
    started = time.perf_counter()
    search = Ablation(params, causal.needle_tasks(params, documents=documents, tokens=tokens, seed=1), policy)
    total = int(np.prod(search.shape))
    step = say("windowing each KV head alone")
    rise = causal.window_each(search, lambda done: step(done, total))
    steps = min(6, total)
    grow = say("growing the best set")
    path = causal.greedy(search, grow=True, steps=steps, progress=lambda done: grow(done, steps))
    judge = Ablation(params, causal.needle_tasks(params, documents=2 * documents, tokens=tokens, seed=2), policy)
    sizes = [n for n in _SIZES if n < total] + [total]
    step, judged = say("judging splits"), {}

    def result(heads: Any) -> SplitResult:
        outcome = judge(causal.split_of(heads, judge.shape))
        return SplitResult(len(heads), outcome.loss, outcome.accuracy, outcome.half_width, tuple(sorted(heads)))

    alone = HeadScores(rise, rise, rise.shape[1], scorers["probe"].meta)
    for done, (name, found) in enumerate({**scorers, "each alone": alone}.items()):
        judged[name] = tuple(result(by_count(found.best, n)) for n in sizes)
        step(done + 1, len(scorers) + 3)
    judged["greedy"] = tuple(result(heads) for heads, _ in path)
    chance = [random_heads(params, seeds=(seed,)).induction for seed in range(_CHANCE)]
    judged["chance"] = tuple(_mean([result(by_count(c, n)) for c in chance]) for n in sizes)
    step(len(scorers) + 3, len(scorers) + 3)
    answers = 2 * documents * 4
    return Causal(
        rise=rise,
        dense_loss=judge(np.ones(judge.shape, bool)).loss,
        spearman={name: compare.spearman(found.induction, rise) for name, found in scorers.items()},
        judged=judged,
        tasks=f"{documents} documents to search, {2 * documents} others to judge ({answers} answers), "
        f"{tokens:,} tokens each, {policy.describe()}",
        seconds=time.perf_counter() - started,
    )


def _searches(params: Params, say: Say) -> tuple[dict[str, HeadScores], list[str]]:
    """Return the other searches that this model allows, and a note on each that it does not."""
    found, notes = {}, []
    for name, search in (
        ("vendor", lambda step: probe_heads(params, preset="vendor", progress=step)),
        ("needle", lambda step: needle_heads(params, progress=step)),
    ):
        try:
            found[name] = search(say(f"search: {name}"))
        except ValueError as error:
            notes.append(f"{name}: {error}")
    return found, notes


def _lengths(params: Params, full: HeadScores, say: Say) -> list[Agreement]:
    rows = []
    for divisor in _SHORTER:
        block = full.meta.block // divisor
        if block >= 2:
            shorter = probe_heads(params, seeds=full.meta.seeds, block=block, progress=say(f"probe of {block} ids"))
            rows.append(agreement(f"{block} ids", full, shorter))
    return rows


def _mean(rows: list[SplitResult]) -> SplitResult:
    """Return the mean of several random splits of one size. The interval is over splits, not over questions."""
    accuracy = np.asarray([row.accuracy for row in rows])
    return SplitResult(
        rows[0].heads,
        float(np.mean([row.loss for row in rows])),
        float(accuracy.mean()),
        float(1.96 * accuracy.std(ddof=1) / np.sqrt(len(rows))),
        (),
    )
