"""The record of arguments that every attention backend takes: the contract of all kernels."""

from __future__ import annotations

from typing import NamedTuple

import jax

from .alibi import Alibi
from .state import State


class Part(NamedTuple):
    """Queries and the keys that they may see: one head group of a layer, or the tokens of a call.

    A backend has `attend(part, *, scale, return_state)`, where query rows of row b see slots [0, lengths[b]), and
    `attend_causal(part, *, start, group_size, scale, return_state)`, where query token t, at index start + t of the
    tokens, sees slots up to its own as well. Both return [B, K, R, H] in q's type, or the state (acc, m, l), float32.
    Valid slots are always a prefix, so the only mask is a length. Slots past it are never read into a result, even
    where they hold NaN, and blocks of slots past the longest row cost nothing.

    Attributes:
      q: [B, K, R, H] query rows, R = G·T of them packed t-major: row t·G + g.
      k, v: [B, K, S, H].
      lengths: int32 [B], valid slots.
      state: of what was seen before, None for nothing: the compensation token, or another part of the same softmax.
      k_scale, v_scale: float32 [B, K, 1, S] of an int8 cache, None for other types: logits of slot s times k_scale,
        weights times v_scale.
      block_table: int32 [B, pages] or None. k, v are then pools [P, K, page, H] (scales [P, K, 1, page]), and slot s of
        row b is slot s % page of page block_table[b, s // page]. Entries past the last valid page are never followed.
      alibi: slopes and positions, None for no bias; each part of a softmax gets its own. XLA only.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    state: State | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    block_table: jax.Array | None = None
    alibi: Alibi | None = None
