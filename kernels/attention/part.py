"""The record of arguments of every attention backend: the contract of all kernels."""

from __future__ import annotations

from typing import NamedTuple

import jax

from .alibi import Alibi
from .state import State


class Part(NamedTuple):
    """Queries and the keys that they may see: one head group of a layer, or the tokens of a call.

    A backend is a module with three functions:

        attend(part, *, scale, return_state)
            Every query row of batch row b sees slots [0, lengths[b]).
        attend_causal(part, *, start, group_size, scale, return_state)
            k and v are the tokens of a chunk. Query token t is token start + t of the chunk; of slots [0, lengths[b])
            it sees those up to its own. Only q, k, v, lengths and state are read.
        unsupported(q, k, v)
            Return why the backend cannot run on these arrays, or None if it can. Only shapes and dtypes are read.

    Both attention functions return [B, K, R, H] in q's type, zero in rows that saw nothing. With `return_state` they
    return the state (acc, m, l), float32. `scale` is a positive factor on the logits. Every backend adds its own
    tuning options and `interpret`.

    Valid slots are always a prefix, so the only mask is a length. Slots past it never reach a result, even if they hold
    NaN, and blocks of slots past the longest row cost nothing.

    `dispatch.py` checks shapes and types before a backend runs. A backend raises ValueError for pages that are not
    whole tiles, and NotImplementedError for a field that it does not read.

    Attributes:
      q: [B, K, R, H] query rows, R = G·T of them packed t-major: row t·G + g.
      k, v: [B, K, S, H].
      lengths: int32 [B], valid slots per row.
      state: the softmax over what was seen before: the compensation token, or another part. None if nothing was seen.
      k_scale, v_scale: float32 [B, K, 1, S] of an int8 cache, None for other types. Logits of slot s are multiplied by
        its k_scale, weights by its v_scale.
      block_table: int32 [B, pages], or None. With a table k and v are pools [P, K, page, H] and scales are
        [P, K, 1, page]; slot s of row b is slot s % page of page block_table[b, s // page]. Entries past a row's last
        valid page are never followed.
      alibi: slopes and positions of ALiBi's biases, None for no bias. Each part of a softmax has its own. XLA only.
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
