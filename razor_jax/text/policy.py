"""Choice of the cache policy and the cache spec of a call."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..cache import CacheSpec
from ..config import MOST, RazorConfig, check_int
from ..functional import cache_spec, placement_of, require_split
from ..memory import check_memory
from ..methods.base import CacheMethod
from ..methods.engine import bind
from ..params import Params
from . import prompts

Policy = RazorConfig | CacheMethod | None | Literal["auto"]


def choose_policy(params: Params, razor: Policy) -> RazorConfig | CacheMethod | None:
    """Return the policy of a call.

    "auto" is dense attention for params without a head split, otherwise the policy that the checkpoint recommends,
    otherwise that of the paper.

    Raises ValueError or TypeError for any other value, and ValueError if the policy needs a head split that the
    params lack.
    """
    if isinstance(razor, str) and razor == "auto":
        razor = None if params.heads is None else params.razor or RazorConfig()
    if isinstance(razor, CacheMethod):
        return razor
    if not isinstance(razor, RazorConfig | None):
        error = ValueError if isinstance(razor, str) else TypeError
        raise error(
            f"razor={razor!r}: give 'auto', a RazorConfig, None for dense attention, or a method of razor_jax.methods, "
            "as in SnapKV(budget=0.2)"
        )
    require_split(params, razor)
    return razor


def spec_for(
    params: Params,
    razor: RazorConfig | CacheMethod | None,
    tokens: int,
    capacity: int | None = None,
    *,
    batch: int = 1,
    rows: Sequence[Sequence[int]] = (),
) -> CacheSpec:
    """Return the spec of a cache of `batch` rows for `tokens` each. `capacity` overrides the bucketed capacity.

    A cache method sizes the cache by the prompts, `rows`; without them, a prompt may have up to `tokens`.

    Raises MemoryError if the device cannot hold it.
    """
    room = room_for(tokens, capacity)
    if isinstance(razor, CacheMethod):
        engine = bind(razor, params, max((len(row) for row in rows), default=tokens))
        spec = dataclasses.replace(cache_spec(params, None, room), method=engine)
    else:
        spec = cache_spec(params, razor, room)
    check_memory(spec, batch)
    return spec


def keeps_everything(spec: CacheSpec) -> bool:
    """Return whether a cache is too small for its policy to drop anything, and has all heads in one type."""
    one_kind = spec.razor is not None and not spec.heads.scopes and not spec.windowed_dtype
    return one_kind and spec.capacity <= spec.sinks + spec.shortest_ring(0)


def room_for(tokens: int, capacity: int | None) -> int:
    """Return the capacity of a cache for `tokens` per row. Raises ValueError if they exceed `capacity`."""
    if capacity is None:
        return prompts.capacity_bucket(tokens)
    capacity = check_int("capacity", capacity, 1, MOST)
    if tokens > capacity:
        raise ValueError(
            f"{tokens:,} tokens (prompt and new tokens) do not fit capacity={capacity:,}: "
            "raise capacity, shorten the prompt or lower max_new_tokens"
        )
    return capacity


def prefill_chunk(razor: RazorConfig | CacheMethod | None) -> int | None:
    """Return the number of tokens per step of streaming prefill, None for exact prefill."""
    return razor.prefill_chunk if isinstance(razor, RazorConfig) else None


def padding(rows: int, spec: CacheSpec, n: int = 1) -> int:
    """Return how many empty rows a mesh needs beside `rows` prompts of `n` answers each."""
    needs = placement_of(spec).padding
    return next(more for more in itertools.count() if not needs(rows + more) and not needs((rows + more) * n))


def padded_batch(rows: Sequence[Sequence[int]], spec: CacheSpec, n: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return token rows as padded int32 [B, T] and lengths [B], with the empty rows that a mesh needs for `n` answers
    to each."""
    longest = max(len(row) for row in rows)
    return prompts.pad([*rows, *[()] * padding(len(rows), spec, n)], prompts.prompt_bucket(longest))
