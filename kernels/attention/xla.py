"""Blockwise attention in plain XLA: the reference for every kernel, and the fallback where no kernel runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from .. import EIGHT_BIT, as_bits, from_bits
from .alibi import Alibi
from .part import Part
from .state import NEG, State, empty, finish

# Slots per step. Few query rows (decode) are bound by memory and want long steps; with many rows (prefill) short steps
# keep a block of logits in cache.
_BLOCK_FEW_ROWS = 2048
_BLOCK_MANY_ROWS = 256
_FEW_ROWS = 32
# So few slots are folded at once whatever is valid: a choice between programs would cost more to compile.
_FEW_SLOTS = 512
_PAGED_SLOTS = 512  # Pages are copied before they are read, so a short step keeps the copy in cache.


def attend(part: Part, *, scale: float, return_state: bool = False) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); see `Part`."""
    alibi = part.alibi

    def bias(slots):
        return None if alibi is None else alibi.bias(jnp.take(alibi.keys, slots, axis=1))

    state = _scan(part, lambda slots: None, bias, jnp.max(part.lengths), scale)
    return state if return_state else finish(state, part.q.dtype)


def attend_causal(
    part: Part,
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    slopes: jax.Array | None = None,
    return_state: bool = False,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend causally to the tokens of a chunk; see `Part`. `slopes` float32 [K, G] are those of ALiBi."""
    R = part.q.shape[2]
    last = start + R // group_size
    token = start + jnp.arange(R, dtype=jnp.int32) // group_size

    def causal(slots):
        return slots[None, :] <= token[:, None]

    def bias(slots):
        return None if slopes is None else Alibi(slopes, token[None, ::group_size], slots[None]).bias(slots[None])

    end = jnp.minimum(jnp.max(part.lengths), last)
    state = _scan(part, causal, bias, end, scale)
    return state if return_state else finish(state, part.q.dtype)


def attend_visible(
    part: Part, visible: Bool[jax.Array, "B Q S"], *, group_size: int, scale: float, return_state: bool = False
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to the slots that each query token sees; see `Part`.

    `visible` bool [B, Tq, S] says which of slots [0, lengths[b]) the query token sees; q is [B, K, G·Tq, H].
    """

    def rows(slots):
        return jnp.repeat(jnp.take(visible, slots, axis=2), group_size, axis=1)[:, None]

    state = _scan(part, rows, lambda slots: None, jnp.max(part.lengths), scale)
    return state if return_state else finish(state, part.q.dtype)


def _gather_pages(part: Part, table: jax.Array, start: jax.Array | int) -> Part:
    """Return the part with pages of its pools gathered into rows: k and v [B,K,s,H], scales [B,K,1,s].

    `table` int32 [B, pages] has the pages of slots from `start` on.
    """
    page = part.k.shape[2]

    def gather(pool: jax.Array) -> jax.Array:
        valid = start + jnp.arange(table.shape[1], dtype=jnp.int32) * page < part.lengths[:, None]
        rows = jnp.moveaxis(pool[jnp.where(valid, table, 0)], 1, 2)  # [B,K,pages,page,H]
        B, K, pages, first, last = rows.shape
        if first == 1:
            return rows.reshape(B, K, 1, pages * last)
        return rows.reshape(B, K, pages * first, last)

    k, v = gather(part.k), gather(part.v)
    k_scale, v_scale = (x if x is None else gather(x) for x in (part.k_scale, part.v_scale))
    return part._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _scan(part: Part, visible, bias, end, scale: float) -> State:
    """Fold slots [0, end) of a part, `end` traced, into its state.

    `visible(slots)` returns which query rows see which slots, bool [R, s] or [B, 1, R, s], or None if all do.
    `bias(slots)` returns what is added to the logits, float32 [B or 1, K, R, s], or None.
    """
    initial = empty(part.q) if part.state is None else part.state
    page, table = part.k.shape[2], part.block_table
    S, few = page if table is None else page * table.shape[1], part.q.shape[2] <= _FEW_ROWS
    block = min(S, _BLOCK_FEW_ROWS if few else _BLOCK_MANY_ROWS)
    if table is not None:
        block = page * max(1, min(block, _PAGED_SLOTS) // page)

    def fold(block: Part, slots, state, unfolded=True, mask_values=True):
        valid = (slots[None, :] < part.lengths[:, None]) & unfolded
        return _fold(block, valid, visible(slots), bias(slots), scale, state, mask_values)

    def fold_all(state, mask_values):
        return fold(part, jnp.arange(S, dtype=jnp.int32), state, mask_values=mask_values)

    def by_blocks(state, part=part):
        def body(index, state):
            # If the block does not divide S, the last block starts early and its first slots were folded before.
            start = jnp.minimum(index * block, S - block)
            slots = start + jnp.arange(block, dtype=jnp.int32)
            return fold(_slice(part, start, block), slots, state, unfolded=slots >= index * block)

        if block == S and table is None:
            return fold_all(state, mask_values=True)
        return lax.fori_loop(0, (end + block - 1) // block, body, state)

    def at_once(state):
        # Slicing a block and masking the values each copy, and a few rows cost less than the copy. An unread value has
        # weight 0, which is harmless unless the value is not finite; then the result is not finite either, and the
        # masked loop runs instead.
        new = fold_all(state, mask_values=False)
        return lax.cond(jnp.all(jnp.isfinite(new[0])), lambda: new, lambda: by_blocks(state))

    # 8-bit caches go by blocks: at once, all of a cache would be widened at once.
    # Pages go by blocks too: at once, all of them would be gathered.
    if not few or S <= _FEW_SLOTS or part.k.dtype in EIGHT_BIT or table is not None:
        return by_blocks(initial)

    def by_blocks_of_bits(state):
        # Products of bfloat16 take CPUs ten times as long as those of float32.
        wide = part.q.astype(jnp.promote_types(part.q.dtype, jnp.float32))
        return by_blocks(state, part._replace(q=wide, k=as_bits(part.k), v=as_bits(part.v)))

    def by_choice(state):
        return lax.cond(2 * end > S, at_once, by_blocks, state)

    if part.k.dtype != jnp.bfloat16 or block == S:
        return by_choice(initial)
    return lax.platform_dependent(initial, cpu=by_blocks_of_bits, default=by_choice)


def _slice(part: Part, start, size: int) -> Part:
    """Return the part with slots [start, start + size) only, both multiples of the page if it has pages."""
    if part.block_table is not None:
        page = part.k.shape[2]
        table = lax.dynamic_slice_in_dim(part.block_table, start // page, size // page, axis=1)
        return _gather_pages(part, table, start)

    def of(x, axis: int):
        return x if x is None else from_bits(lax.dynamic_slice_in_dim(x, start, size, axis))

    return part._replace(k=of(part.k, 2), v=of(part.v, 2), k_scale=of(part.k_scale, 3), v_scale=of(part.v_scale, 3))


def _fold(part: Part, valid, visible, bias, scale: float, state: State, mask_values: bool) -> State:
    """Return the state after one online-softmax step over all slots of `part`.

    `valid` is bool [B,s]; `visible` bool [R,s] or [B,1,R,s] and `bias` [B,K,R,s] may be None. `mask_values` takes
    unread values out of the product, because 0 × NaN is NaN.
    """
    q, k, v = part.q, part.k, part.v
    acc, m, l = state
    dtype = q.dtype if k.dtype in EIGHT_BIT else jnp.promote_types(q.dtype, k.dtype)
    mask = valid[:, None, None, :] if visible is None else valid[:, None, None, :] & visible
    logits = _dot("bkrh,bksh->bkrs", q.astype(dtype), k.astype(dtype)) * scale
    if part.k_scale is not None:
        logits = logits * part.k_scale
    if bias is not None:
        logits = logits + bias
    logits = jnp.where(mask, logits, NEG)
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
    # A masked logit equals NEG: in a row that has seen nothing, exp(NEG - NEG) would count it.
    p = jnp.where(mask, jnp.exp(logits - m_new[..., None]), 0.0)
    l = l * jnp.exp(m - m_new) + jnp.sum(p, axis=-1)
    if part.v_scale is not None:
        p = jnp.where(mask, p * part.v_scale, 0.0)
        # Weights times small scales are below float16's smallest number.
        dtype = jnp.promote_types(dtype, jnp.float32) if dtype == jnp.float16 else dtype
    if mask_values:
        v = jnp.where(valid[:, None, :, None], v, jnp.zeros((), v.dtype))
    acc = acc * jnp.exp(m - m_new)[..., None] + _dot("bkrs,bksh->bkrh", p.astype(dtype), v.astype(dtype))
    return acc, m_new, l


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum in float32. float32 operands run at HIGHEST: a TPU's default is one bfloat16 pass."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)
