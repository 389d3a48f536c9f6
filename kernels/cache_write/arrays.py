"""The arrays of one head group."""

from __future__ import annotations

from typing import NamedTuple

import jax


class GroupArrays(NamedTuple):
    """What a head group holds, or what a call brings to it (then without means).

    Attributes:
      k, v: [B, K, S, H] in the cache's type.
      k_scale, v_scale: float32 [B, K, 1, S] of an int8 cache, or None.
      k_mean, v_mean: float32 [B, K, 1, H] over the dropped tokens, unread while none is dropped; None where a group
        has no compensation token.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    k_mean: jax.Array | None = None
    v_mean: jax.Array | None = None
