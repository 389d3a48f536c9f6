"""Search for the best set of heads at one budget, and for the smallest budget that keeps the answers.

The best set changes with the budget, so a ranking that is cut at the budget is not the best set. Each round takes the
gradient of the answers' loss by every gate at the current set, pairs the kept heads that cost least to window with the
windowed heads that gain most, and tries such swaps: several heads at once, then fewer. A swap stays only if it lowers
the measured loss of the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..config import HeadSplit, RazorConfig, check_int
from ..params import Params
from ..resume import State
from .causal import Ablation, mask_of
from .gates import CALIBRATION, Calibration, Reading, answered, gradient_heads, loss_gradient, readings, run_of
from .mass import Progress
from .promise import QUESTIONS, fit_families
from .scores import HeadScores

SWAPS = (8, 4, 2, 1)  # heads that change at once
ROUNDS = 12


def search_heads(
    params: Params,
    heads: int,
    *,
    razor: RazorConfig | None = None,
    start: HeadScores | None = None,
    calibration: Calibration = CALIBRATION,
    state: Path | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Find `heads` KV heads under which the answers' loss is low, a local optimum under swaps; `select` returns them.

    Args:
      heads: KV heads that keep everything.
      razor: policy of the windowed heads; None for the checkpoint's recommendation, or the paper's.
      start: ranking whose best heads the search starts from; None for the integrated gradient.
      calibration: documents and questions that the loss is measured on.
      state: file to resume from and to save each round to.
      progress: called with (rounds done, most rounds).

    Returns scores of at least 1 for the heads found, and of at most 0.5, in the order of `start`, for others. Raises
    ValueError if `heads` leaves nothing to choose. Memory: K/V of all documents, dense and windowed.
    """
    policy = razor or params.razor or RazorConfig()
    total = params.config.num_layers * params.config.num_kv_heads
    heads = check_int("heads", heads, 1, total - 1)
    begun = "gradient" if start is None else start.describe()
    saved = State(state, run_of(params, "search", policy, calibration) | {"heads": heads, "start": begun})
    if start is None:
        start = gradient_heads(params, razor=policy, calibration=calibration)
    ablation = Ablation(params, calibration.tasks(params), policy)
    known = answered(ablation)
    parts = readings(ablation, known)

    def loss_of(kept: np.ndarray) -> float:
        return float(ablation(kept).losses[known.reshape(-1)].mean())

    kept = np.asarray(saved.arrays.get("kept", mask_of(start.select(share=heads / total))))
    loss = loss_of(kept)
    first, done = float(saved.arrays.get("first", loss)), int(saved.arrays.get("done", 0))
    while done < ROUNDS and (better := _better(loss_of, parts, kept, loss)) is not None:
        (kept, loss), done = better, done + 1
        saved.save(kept=kept, first=np.asarray(first), done=np.asarray(done))
        if progress is not None:
            progress(done, ROUNDS)
    if progress is not None:
        progress(ROUNDS, ROUNDS)
    span = np.ptp(start.best) or 1.0
    scores = np.repeat(kept + 0.5 * (start.best - start.best.min()) / span, start.group_size, axis=1)
    note = f"{heads} heads, {done} rounds from {start.meta.preset}, loss {first:.3f} → {loss:.3f} nats, {calibration}"
    meta = dataclasses.replace(start.meta, preset="search", note=f"{note}, {policy.describe()}")
    return HeadScores(scores, scores, start.num_kv_heads, meta)


def smallest_budget(
    params: Params,
    scores: HeadScores,
    points: float,
    *,
    razor: RazorConfig | None = None,
    calibration: Calibration = CALIBRATION,
) -> HeadSplit:
    """Return the fewest heads of a ranking whose accuracy is at most `points` below dense attention's, by bisection.

    It asks calibration questions of another seed than the ranking's, of the families that dense attention can do.
    Raises ValueError for points that are not between 0 and 100.
    """
    if not 0 <= points <= 100:
        raise ValueError(f"points={points}: must be between 0 and 100, the accuracy that may be lost")
    policy = razor or params.razor or RazorConfig()
    tasks = dataclasses.replace(calibration, seed=calibration.seed + 1000).tasks(params)
    ablation = Ablation(params, tasks, policy)
    total, families = ablation.shape[0] * ablation.shape[1], np.asarray([task.families for task in tasks]).T
    dense = ablation(np.ones(ablation.shape, bool)).right.reshape(QUESTIONS, -1)
    counted = fit_families(dense, families)

    def lost(heads: int) -> float:
        right = ablation(mask_of(scores.select(share=heads / total))).right.reshape(QUESTIONS, -1)
        return 100 * float(dense[counted].mean() - right[counted].mean())

    low, high = 0, total  # `high` loses little enough, `low` is not known to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) <= points else (middle, high)
    return scores.select(share=high / total)


def _better(
    loss_of: Callable[[np.ndarray], float], parts: list[Reading], kept: np.ndarray, loss: float
) -> tuple[np.ndarray, float] | None:
    """Return the first swap that lowers the loss, and its loss; None if none does."""
    gates = jnp.asarray(kept, jnp.float32)
    gain = -np.mean([loss_gradient(gates, *reading) for reading in parts], axis=0)
    # Opening a head is worth its gain; closing it costs as much.
    close = np.argsort(np.where(kept, gain, np.inf), axis=None)
    open_ = np.argsort(np.where(kept, np.inf, -gain), axis=None)
    most = min(int(kept.sum()), int((~kept).sum()))
    for count in (n for n in SWAPS if n <= most):
        for skip in range(3 if count == 1 else 1):
            tried = kept.copy()
            tried.flat[close[skip : skip + count]] = False
            tried.flat[open_[skip : skip + count]] = True
            if tried.sum() == kept.sum() and (found := loss_of(tried)) < loss:
                return tried, found
    return None
