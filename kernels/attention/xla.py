"""Blockwise attention in plain XLA: the reference of every kernel, and what runs where none does.

The contract, shared with the Pallas kernels: a cache's valid slots are always a prefix, so the only mask
is a length; everything else that attention must know arrives as the initial state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from .state import NEG, State, empty, finish

# Slots a step. Few query rows (decode) are bound by memory and want long steps; many rows (prefill) keep
# a block of logits in cache.
_BLOCK_FEW_ROWS = 2048
_BLOCK_MANY_ROWS = 256
_FEW_ROWS = 32


def attend(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K S H"],
    v: Float[jax.Array, "B K S H"],
    lengths: Int[jax.Array, " B"],
    *,
    scale: float,
    state: State | None = None,
    return_state: bool = False,
) -> Float[jax.Array, "B K R H"] | State:
    """Every query row sees slots [0, lengths[b]): decode, and a chunk against the cache.

    Args:
      q: [B, K, R, H] query rows, G·T of them packed t-major.
      k, v: [B, K, S, H]; slots from lengths[b] on are never read into a result.
      lengths: int32 [B], valid slots.
      scale: factor on the logits.
      state: what was seen before, None for nothing.
      return_state: give (acc, m, l) instead of acc / l.

    Returns:
      [B, K, R, H] in q's type, or the state. Slots past the longest row's block cost nothing.
    """
    state = _scan(q, k, v, lengths, lambda slots: None, jnp.max(lengths), scale, state)
    return state if return_state else finish(state, q.dtype)


def attend_causal(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K S H"],
    v: Float[jax.Array, "B K S H"],
    lengths: Int[jax.Array, " B"],
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    state: State | None = None,
    return_state: bool = False,
) -> Float[jax.Array, "B K R H"] | State:
    """Query token t, at index start + t of a chunk, sees the chunk's tokens up to its own.

    Args:
      q: [B, K, G·Tq, H], rows packed t-major.
      k, v: [B, K, T, H], the whole chunk.
      lengths: int32 [B], valid tokens of the chunk.
      start: index in the chunk of q's first token, an int or int32 scalar.
      group_size: G.
      scale, state, return_state: as in `attend`.

    Returns:
      [B, K, G·Tq, H] in q's type, or the state. Key blocks past the last query cost nothing.
    """
    R = q.shape[2]
    last = start + R // group_size
    token = start + jnp.arange(R, dtype=jnp.int32) // group_size

    def causal(slots):
        return slots[None, :] <= token[:, None]

    state = _scan(q, k, v, lengths, causal, jnp.minimum(jnp.max(lengths), last), scale, state)
    return state if return_state else finish(state, q.dtype)


def _scan(q, k, v, lengths, visible, end, scale: float, state: State | None) -> State:
    """Fold slots [0, end) into the state.

    `visible(slots)` gives the pairs that may meet, bool [R, s], or None for all; `end` is traced.
    """
    state = empty(q) if state is None else state
    S, few = k.shape[2], q.shape[2] <= _FEW_ROWS
    block = min(S, _BLOCK_FEW_ROWS if few else _BLOCK_MANY_ROWS)

    def fold(k, v, slots, state, fresh=True, clean=True):
        valid = (slots[None, :] < lengths[:, None]) & fresh
        return _fold(q, k, v, valid, visible(slots), scale, state, clean)

    def whole(state, clean):
        return fold(k, v, jnp.arange(S, dtype=jnp.int32), state, clean=clean)

    def body(index, state):
        # Where the block does not divide S the last one starts early; its first slots were folded before.
        start = jnp.minimum(index * block, S - block)
        slots = start + jnp.arange(block, dtype=jnp.int32)
        k_block = lax.dynamic_slice_in_dim(k, start, block, axis=2)
        v_block = lax.dynamic_slice_in_dim(v, start, block, axis=2)
        return fold(k_block, v_block, slots, state, fresh=slots >= index * block)

    def by_blocks(state):
        if block == S:
            return whole(state, clean=True)
        return lax.fori_loop(0, (end + block - 1) // block, body, state)

    def at_once(state):
        # Blocks are copies, and so are values with the unread ones taken out; a few rows are done before such a
        # copy is. Unread values weigh exactly zero, so unless one of them is not a number nothing is lost by
        # reading them, and if one is, the result says so.
        new = whole(state, clean=False)
        return lax.cond(jnp.all(jnp.isfinite(new[0])), lambda: new, lambda: by_blocks(state))

    if not few or S <= _BLOCK_MANY_ROWS:
        return by_blocks(state)
    return lax.cond(2 * end > S, at_once, by_blocks, state)


def _fold(q, k, v, valid, visible, scale: float, state: State, clean: bool) -> State:
    """One online-softmax step over slots k, v [B,K,s,H]: valid bool [B,s], visible bool [R,s] or None.

    `clean`: take unread values out of the product, for 0 × NaN is NaN.
    """
    acc, m, l = state
    dtype = jnp.promote_types(q.dtype, k.dtype)
    mask = valid[:, None, None, :] if visible is None else valid[:, None, None, :] & visible
    logits = _dot("bkrh,bksh->bkrs", q.astype(dtype), k.astype(dtype))
    logits = jnp.where(mask, logits * scale, NEG)
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
    # A masked logit equals NEG: in a row that has seen nothing, exp(NEG - NEG) would count it.
    p = jnp.where(mask, jnp.exp(logits - m_new[..., None]), 0.0)
    if clean:
        v = jnp.where(valid[:, None, :, None], v, jnp.zeros((), v.dtype))
    decay = jnp.exp(m - m_new)
    acc = acc * decay[..., None] + _dot("bkrs,bksh->bkrh", p.astype(dtype), v.astype(dtype))
    return acc, m_new, l * decay + jnp.sum(p, axis=-1)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 result; float32 operands at HIGHEST, because a TPU's default for them is one bfloat16 pass."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)
