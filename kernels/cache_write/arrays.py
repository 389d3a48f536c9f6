"""The arrays of a head group, and the record of arguments of every write backend: the contract of all writes."""

from __future__ import annotations

from typing import NamedTuple

import jax


class GroupArrays(NamedTuple):
    """Arrays of one head group, or of the tokens that a call appends to it (then without means).

    Attributes:
      k, v: [B, K, S, H] in the cache's type.
      k_scale, v_scale: float32 [B, K, 1, S] of an int8 cache, None for other types.
      k_mean, v_mean: float32 [B, K, 1, H] over the dropped tokens, unread while none is dropped. None if the group has
        no compensation token.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    k_mean: jax.Array | None = None
    v_mean: jax.Array | None = None


class CacheWrite(NamedTuple):
    """One write: append tokens 0 … counts[b]-1 to row b of a head group, which has seen lengths[b] tokens.

    A backend is a module with `write(call)`, which returns the group's arrays, and `unsupported(group)`, which returns
    why it cannot write such a group, or None if it can.

    Position p goes to slot p in a full group. In a windowed group it goes to slot p if p < N0, otherwise to slot
    N0 + (p - N0) mod W_b; the token that it evicts joins the means. Afterwards n = max(0, length - N0 - W_b) tokens are
    dropped. T tokens in one call leave the slots exactly as T calls of one token do, and the means to float32 rounding.
    A full group ignores positions past its slots. Donated arrays are written in place.

    `dispatch.py` checks shapes and types before a backend runs.

    Attributes:
      group: the group before the write.
      tokens: T tokens in the cache's type, k and v [B, K, T, H], scales [B, K, 1, T], no means.
      lengths: int32 [B], tokens that each row has seen.
      counts: int32 [B], tokens to append; a row of count 0 stays bit-identical.
      window: int32 [B], W of each row, 0 before a row's first tokens; None for a full group.
      sinks: N0, an int, or an int32 scalar if it is known at run time only. 0 for a full group.
      block_table: int32 [B, pages], or None. With a table k and v of the group are pools [P, K, page, H], its scales
        [P, K, 1, page], its means stay [B, K, 1, H]; slot s of row b is slot s % page of page
        block_table[b, s // page]. Entries past a row's last valid page are never followed. No two rows with a count
        share a page that they write. Page P - 1 belongs to no row: the TPU kernel writes it back unchanged for rows of
        count 0.
    """

    group: GroupArrays
    tokens: GroupArrays
    lengths: jax.Array
    counts: jax.Array
    window: jax.Array | None
    sinks: jax.Array | int = 0
    block_table: jax.Array | None = None
