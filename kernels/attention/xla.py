"""Blockwise attention in plain XLA: the reference for every kernel, and the fallback where none runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from .. import EIGHT_BIT
from .alibi import Alibi
from .part import Part
from .state import NEG, State, empty, finish

# Slots a step. Few query rows (decode) are bound by memory and want long steps; many rows (prefill) keep
# a block of logits in cache.
_BLOCK_FEW_ROWS = 2048
_BLOCK_MANY_ROWS = 256
_FEW_ROWS = 32


def attend(part: Part, *, scale: float, return_state: bool = False) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); the contract of `Part`."""
    q, k, v, lengths, state, k_scale, v_scale, block_table, alibi = part
    if block_table is not None:
        pages = functools.partial(_gather_pages, table=block_table, lengths=lengths, page=k.shape[2])
        k, v = pages(k), pages(v)
        k_scale, v_scale = (x if x is None else pages(x) for x in (k_scale, v_scale))
    keys = (k, v, k_scale, v_scale)

    def bias(slots):
        return None if alibi is None else alibi.bias(jnp.take(alibi.keys, slots, axis=1))

    state = _scan(q, keys, lengths, lambda slots: None, bias, jnp.max(lengths), scale, state)
    return state if return_state else finish(state, q.dtype)


def attend_causal(
    part: Part,
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    slopes: jax.Array | None = None,
    return_state: bool = False,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend causally to the tokens of a chunk; the contract of `Part`, and float32 [K, G] slopes of ALiBi."""
    q, k, v, lengths, state = part[:5]
    R = q.shape[2]
    last = start + R // group_size
    token = start + jnp.arange(R, dtype=jnp.int32) // group_size

    def causal(slots):
        return slots[None, :] <= token[:, None]

    def bias(slots):
        return None if slopes is None else Alibi(slopes, token[None, ::group_size], slots[None]).bias(slots[None])

    end = jnp.minimum(jnp.max(lengths), last)
    state = _scan(q, (k, v, None, None), lengths, causal, bias, end, scale, state)
    return state if return_state else finish(state, q.dtype)


def _gather_pages(pool: jax.Array, table: jax.Array, lengths: jax.Array, page: int) -> jax.Array:
    """Gather a pool [P,K,page,H] (or scales [P,K,1,page]) into rows [B,K,S,H] ([B,K,1,S])."""
    valid = jnp.arange(table.shape[1], dtype=jnp.int32) * page < lengths[:, None]
    rows = jnp.moveaxis(pool[jnp.where(valid, table, 0)], 1, 2)  # [B,K,pages,page,H]
    B, K, pages, first, last = rows.shape
    if first == 1:
        return rows.reshape(B, K, 1, pages * last)
    return rows.reshape(B, K, pages * first, last)


def _scan(q, keys, lengths, visible, bias, end, scale: float, state: State | None) -> State:
    """Fold slots [0, end) of keys (k, v, k_scale, v_scale) into the state.

    `visible(slots)` gives the pairs that may meet, bool [R, s], or None for all; `bias(slots)` what is added to
    logits, float32 [B or 1, K, R, s], or None; `end` is traced.
    """
    state = empty(q) if state is None else state
    S, few = keys[0].shape[2], q.shape[2] <= _FEW_ROWS
    block = min(S, _BLOCK_FEW_ROWS if few else _BLOCK_MANY_ROWS)

    def fold(keys, slots, state, fresh=True, clean=True):
        valid = (slots[None, :] < lengths[:, None]) & fresh
        return _fold(q, keys, valid, visible(slots), bias(slots), scale, state, clean)

    def whole(state, clean):
        return fold(keys, jnp.arange(S, dtype=jnp.int32), state, clean=clean)

    def body(index, state):
        # Where the block does not divide S the last one starts early; its first slots were folded before.
        start = jnp.minimum(index * block, S - block)
        slots = start + jnp.arange(block, dtype=jnp.int32)
        part = [
            x if x is None else lax.dynamic_slice_in_dim(x, start, block, axis)
            for x, axis in zip(keys, (2, 2, 3, 3), strict=True)
        ]
        return fold(part, slots, state, fresh=slots >= index * block)

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

    # Nor 8 bits at once: they would be widened at once.
    if not few or S <= _BLOCK_MANY_ROWS or keys[0].dtype in EIGHT_BIT:
        return by_blocks(state)
    return lax.cond(2 * end > S, at_once, by_blocks, state)


def _fold(q, keys, valid, visible, bias, scale: float, state: State, clean: bool) -> State:
    """Return one online-softmax step over slots k, v [B,K,s,H]: valid bool [B,s]; visible bool [R,s], bias [B,K,R,s] or
    None.

    `clean`: take unread values out of the product, for 0 × NaN is NaN.
    """
    k, v, k_scale, v_scale = keys
    acc, m, l = state
    dtype = q.dtype if k.dtype in EIGHT_BIT else jnp.promote_types(q.dtype, k.dtype)
    mask = valid[:, None, None, :] if visible is None else valid[:, None, None, :] & visible
    logits = _dot("bkrh,bksh->bkrs", q.astype(dtype), k.astype(dtype)) * scale
    if k_scale is not None:
        logits = logits * k_scale
    if bias is not None:
        logits = logits + bias
    logits = jnp.where(mask, logits, NEG)
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
    # A masked logit equals NEG: in a row that has seen nothing, exp(NEG - NEG) would count it.
    p = jnp.where(mask, jnp.exp(logits - m_new[..., None]), 0.0)
    l = l * jnp.exp(m - m_new) + jnp.sum(p, axis=-1)
    if v_scale is not None:
        p = jnp.where(mask, p * v_scale, 0.0)
        # Weights times small scales are below what float16 holds.
        dtype = jnp.promote_types(dtype, jnp.float32) if dtype == jnp.float16 else dtype
    if clean:
        v = jnp.where(valid[:, None, :, None], v, jnp.zeros((), v.dtype))
    acc = acc * jnp.exp(m - m_new)[..., None] + _dot("bkrs,bksh->bkrh", p.astype(dtype), v.astype(dtype))
    return acc, m_new, l


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return float32 result; float32 operands at HIGHEST, because a TPU's default for them is one bfloat16 pass."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)
