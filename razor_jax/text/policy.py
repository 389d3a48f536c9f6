"""Which policy and which cache a call gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..cache import CacheSpec
from ..config import RazorConfig, check_int
from ..functional import cache_spec, placement_of, require_split
from ..params import Params
from . import prompts

Policy = RazorConfig | None | Literal["auto"]


def choose_policy(params: Params, razor: Policy) -> RazorConfig | None:
    """Return the policy of a call: "auto" is the checkpoint's recommendation, or the paper's setting.

    Raises ValueError or TypeError for anything else, or where the params carry no head split.
    """
    if isinstance(razor, str):
        if razor != "auto":
            raise ValueError(f"razor={razor!r}: give a RazorConfig, None for dense attention, or 'auto'")
        razor = params.razor or RazorConfig()
    if not isinstance(razor, RazorConfig | None):
        raise TypeError(f"razor={razor!r}: give a RazorConfig, None for dense attention, or 'auto'")
    require_split(params, razor)
    return razor


def spec_for(params: Params, razor: RazorConfig | None, tokens: int, capacity: int | None = None) -> CacheSpec:
    """Return the spec of a cache with room for `tokens` per row, on the ladder unless `capacity` is given."""
    return cache_spec(params, razor, room_for(tokens, capacity))


def room_for(tokens: int, capacity: int | None) -> int:
    """Return the capacity of a cache for `tokens` per row. Raises ValueError where they do not fit `capacity`."""
    if capacity is None:
        return prompts.capacity_bucket(tokens)
    capacity = check_int("capacity", capacity, 1)
    if tokens > capacity:
        raise ValueError(
            f"{tokens:,} tokens (prompt and new tokens) do not fit capacity={capacity:,}: "
            "raise capacity, shorten the prompt or lower max_new_tokens"
        )
    return capacity


def prefill_chunk(razor: RazorConfig | None) -> int | None:
    """Return the tokens per call of a streaming prefill, None for exact prefill."""
    return None if razor is None else razor.prefill_chunk


def read_batch(rows: Sequence[Sequence[int]], spec: CacheSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as a batch: int32 [B, T] in a bucket and lengths [B], with empty rows where a mesh needs them."""
    longest = max(len(row) for row in rows)
    return prompts.pad([*rows, *[()] * placement_of(spec).padding(len(rows))], prompts.prompt_bucket(longest))
