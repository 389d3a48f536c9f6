"""The rows of a table: dense attention, Razor, and what Razor is taken apart into."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..config import HeadSplit, RazorConfig
from ..params import Params, with_heads
from .protocol import CachedModel, dense


def settings(
    params: Params,
    policy: RazorConfig,
    *,
    no_compensation: bool = False,
    random_heads: int = 0,
    all_windowed: bool = False,
    seed: int = 1,
) -> list[CachedModel]:
    """Return dense first, then the split of the params under `policy`, then the requested settings.

    `random_heads` is how many splits of as many heads, chosen at random, are tried. Raises ValueError for a model whose
    heads are not split.
    """
    L, K = params.config.num_layers, params.config.num_kv_heads
    if params.heads is None:
        raise ValueError(
            "these params have no head split: load with heads='auto', or find it with `razor-jax heads find`"
        )
    rows = [dense(params), CachedModel("Razor", params, policy)]
    if no_compensation:
        rows.append(CachedModel("no compensation token", params, dataclasses.replace(policy, compensation=False)))
    kept = sum(params.heads_or_all.counts)
    for draw in range(random_heads):
        chosen = np.random.default_rng([seed, draw]).permutation(L * K)[:kept]
        split = HeadSplit.of(L, K, [divmod(int(i), K) for i in chosen])
        rows.append(CachedModel(f"{kept} random heads, {draw + 1}", with_heads(params, split), policy))
    if all_windowed:
        rows.append(CachedModel("all heads windowed", with_heads(params, HeadSplit.none(L, K)), policy))
    return rows
