"""Blockwise attention as one Pallas TPU kernel: decode, a chunk against the cache, and a chunk against itself.

Grid `(B, K, blocks of query rows, blocks of slots)`; the last axis is sequential and ends, at run time, with
the longest row's last block. How far a block of query rows sees is two numbers, `full` and `end`:

    slots [0, full)      seen by every query row: no mask at all
    slots [full, end)    seen by some: masked
    slots from end on    seen by none: the index map repeats the last block, so nothing is loaded

so that a length, a causal diagonal and their combination are the same three kinds of step. A block that reaches
over the end of S is filled by Pallas with anything at all, which the masks must and do keep out.

An int8 or float8 cache meets bfloat16 queries in a product of mixed types, and scales touch rows of logits and of
weights, never tiles. With a block table a page is a block, and the index map looks it up.

A cache [B, K, S, H] is read where it lies, never copied. On TPU the compiler lays one with H = 128 out row by
row, and one with H = 64 slot by slot, as if it were [B, K, H, S]: rows of 64 would fill half of every tile.
The kernel follows: for H = 64 its blocks are [H, s], and the transposition before it moves nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from .. import EIGHT_BIT, INT8
from ..tpu_memory import keep_in_hbm
from .part import Part
from .state import NEG, State

_LANES = 128
_HEAD_WIDTHS = (64, 128)
# Up to this many query rows the loads of K and V are the cost, and a step must be long enough to hide its
# overhead; above, the arithmetic is, and a step is a tile of logits in fast memory. By the compiler's own
# schedule, 512 × 1,024 needs a third less time for a logit than 512 × 512; 256 rows would load K and V twice
# as often, which v5e cannot hide. The same schedule gives the parts of a tile (see `_fold`): 2 × 256 rows take
# 7 % less time on v5e than 512 at once, and 30 % less on v6e and 7x.
_FEW_ROWS = 64
_BYTES_FEW_ROWS = 1 << 20  # of K (and of V) a step: 4,096 slots of 128 in bfloat16
_MANY_ROWS = (512, 1024)
_PART = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Query rows and slots of a grid step. `rows` divides by 128, or is all of them."""

    rows: int
    slots: int


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Return why the kernel cannot take queries q [B,K,R,H] and caches k, v [B,K,S,H], or None if it can."""
    H = q.shape[-1]
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel reads caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    wide = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    for name, x, types in (("q", q, wide), ("k", k, wide + EIGHT_BIT), ("v", v, wide + EIGHT_BIT)):
        if x.dtype not in types:
            return f"{name} is {x.dtype}: the kernel takes {', '.join(t.name for t in types)}"
    return None


def choose_blocks(R: int, S: int, H: int, itemsize: int, page: int | None = None) -> Blocks:
    """Return the blocks for R query rows over S slots of H elements of `itemsize` bytes, held in pages or in one
    piece.
    """
    if page is not None:
        tile = _MANY_ROWS[0] * _MANY_ROWS[1]
        return Blocks(min(R, _MANY_ROWS[0], max(tile // page // _LANES, 1) * _LANES), page)
    if R > _FEW_ROWS:
        return Blocks(min(R, _MANY_ROWS[0]), min(S, _MANY_ROWS[1]))
    longest = _BYTES_FEW_ROWS // (H * itemsize)
    # As few blocks as allowed, of equal length: a ring of 4,100 slots is 2 × 2,176 and not 4,096 + 4.
    slots = pl.cdiv(pl.cdiv(S, pl.cdiv(S, longest)), _LANES) * _LANES
    return Blocks(R, min(S, slots))


def attend(
    part: Part, *, scale: float, return_state: bool = False, blocks: Blocks | None = None, interpret: Any = False
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); the contract of `Part`.

    With a block table a page is a block of the kernel: ValueError where it is not whole tiles, or too long.
    """
    static = _Static(None, scale, return_state, interpret)
    return _run(static, part, jnp.zeros((1,), jnp.int32), blocks)


def attend_causal(
    part: Part,
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    return_state: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend causally to the tokens of a chunk; the contract of `Part`."""
    static = _Static(group_size, scale, return_state, interpret)
    return _run(static, part, jnp.asarray(start, jnp.int32).reshape(1), blocks)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static arguments of a call; `group_size` None means no causal mask."""

    group_size: int | None
    scale: float
    return_state: bool
    interpret: Any


# Jitted here because memory-space constraints are only valid under jit.
@functools.partial(jax.jit, static_argnames=("call", "blocks"))
def _run(call: _Static, part: Part, start: jax.Array, blocks: Blocks | None):
    """Launch the kernel; `start` int32 [1]."""
    q, k, v, lengths, state, k_scale, v_scale, table, _ = part
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    B, K, R, H = q.shape
    S = k.shape[2] if table is None else k.shape[2] * table.shape[1]
    dtype = q.dtype if k.dtype in EIGHT_BIT else jnp.promote_types(q.dtype, k.dtype)
    # A float32 query widens what it meets.
    itemsize = dtype.itemsize if dtype == jnp.float32 else k.dtype.itemsize
    if table is not None:
        _check_page(k, itemsize)
    if blocks is None:
        blocks = choose_blocks(R, S, H, itemsize, None if table is None else k.shape[2])
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, S)
    across = H < _LANES  # slots along the lanes
    if across:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    reach = functools.partial(_reach, call, blocks.rows, R)
    pages = None if table is None else table.shape[1]
    rows, slots, slot_scales, stats = _specs(reach, blocks, H, across, pages)
    acc_shape = jax.ShapeDtypeStruct(q.shape, jnp.float32 if call.return_state else q.dtype)
    stats_shape = jax.ShapeDtypeStruct((B, K, 2, R), jnp.float32)
    column = pltpu.VMEM((blocks.rows, 1), jnp.float32)
    # At least one step, or nothing would write the output of rows that see nothing.
    steps = pl.cdiv(jnp.maximum(_longest(call, R, lengths, start[0]), 1), blocks.slots)
    (out,) = pl.pallas_call(
        functools.partial(_kernel, call=call, reach=reach, block=blocks.slots, across=across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, pl.cdiv(R, blocks.rows), steps),
            in_specs=(rows, slots, slots, (slot_scales,) * len(scales), () if state is None else (rows, stats)),
            out_specs=((rows, stats) if call.return_state else (rows,),),
            scratch_shapes=(pltpu.VMEM((blocks.rows, H), jnp.float32), column, column),
        ),
        out_shape=((acc_shape, stats_shape) if call.return_state else (acc_shape,),),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        cost_estimate=_cost(q.shape, S, k.dtype.itemsize, call.group_size is not None),
        interpret=call.interpret,
        name="razor_attend" if call.group_size is None else "razor_attend_causal",
    )(
        lengths,
        start,
        jnp.zeros((1,), jnp.int32) if table is None else table.astype(jnp.int32).reshape(-1),
        q.astype(dtype),
        keep_in_hbm(k, call.interpret),
        keep_in_hbm(v, call.interpret),
        tuple(keep_in_hbm(x, call.interpret) for x in scales),
        () if state is None else (state[0], jnp.stack(state[1:], axis=2)),
    )
    if not call.return_state:
        return out[0]
    acc, stats_out = out
    return acc, stats_out[:, :, 0], stats_out[:, :, 1]


def _check_page(pool, itemsize: int) -> None:
    """Refuse pages of a pool [P,K,page,H] that are no whole tiles, or that fast memory cannot hold twice over."""
    page, H = pool.shape[2:]
    # Scales, and a cache of narrow heads, are along the lanes; otherwise a tile is 32 bytes of one column.
    tile = _LANES if H < _LANES or pool.dtype == INT8 else 32 // pool.dtype.itemsize
    longest = 2 * _BYTES_FEW_ROWS // (_LANES * max(itemsize, 2))  # nor the logits of 128 rows, if a slot is small
    if page % tile or page > longest:
        raise ValueError(
            f"page={page} slots of {pool.dtype}, H={H}: the kernel reads pages of a multiple of {tile}, up to {longest}"
        )


def _specs(reach, blocks: Blocks, H: int, across: bool, pages: int | None) -> tuple[pl.BlockSpec, ...]:
    """Return the blocks of q, acc and out; of k and v; of their scales; of m and l."""

    def at_rows(b, h, i, j, lengths, start, table):
        return b, h, i, 0

    def at_stats(b, h, i, j, lengths, start, table):
        return b, h, 0, i

    def at_block(b, i, j, lengths, start, table):
        """Return (first axis, slot axis) of k and v."""
        _, end = reach(i, lengths[b], start[0])
        # Past the end the last block again: a block that is already there is not loaded.
        block = jnp.minimum(j, jnp.maximum(pl.cdiv(end, blocks.slots) - 1, 0))
        if pages is None:
            return b, block
        # A row of nothing has no page; some page has to be named.
        return jnp.where(end > 0, table[b * pages + block], 0), 0

    def at_slots(b, h, i, j, *prefetched):
        b, block = at_block(b, i, j, *prefetched)
        return (b, h, 0, block) if across else (b, h, block, 0)

    def at_scales(b, h, i, j, *prefetched):
        b, block = at_block(b, i, j, *prefetched)
        return b, h, 0, block

    slots = (H, blocks.slots) if across else (blocks.slots, H)
    return (
        pl.BlockSpec((None, None, blocks.rows, H), at_rows),
        pl.BlockSpec((None, None, *slots), at_slots),
        pl.BlockSpec((None, None, 1, blocks.slots), at_scales),
        # m and l travel as two lane-dense lines: a [..., R, 1] array would take 128 times its size.
        pl.BlockSpec((None, None, 2, blocks.rows), at_stats),
    )


def _reach(call: _Static, block: int, R: int, i, length, start):
    """Return (full, end) of query block i: slots that all its rows see, and slots that any of them sees."""
    if call.group_size is None:
        return length, length
    first = i * block
    last = jnp.minimum(first + block, R) - 1
    full, end = (start + lax.div(row, jnp.int32(call.group_size)) + 1 for row in (first, last))
    return jnp.minimum(length, full), jnp.minimum(length, end)


def _longest(call: _Static, R: int, lengths, start):
    """Return the number of slots that any query of the call sees."""
    longest = jnp.max(lengths)
    return longest if call.group_size is None else jnp.minimum(longest, start + R // call.group_size)


def _cost(q_shape: tuple[int, ...], S: int, itemsize: int, causal: bool) -> pl.CostEstimate:
    """Estimate the cost for the compiler's scheduler, as if every cache were full."""
    B, K, R, H = q_shape
    pairs = B * K * R * S // (2 if causal else 1)
    moved = 2 * B * K * (S + R) * H * itemsize
    return pl.CostEstimate(flops=4 * pairs * H, transcendentals=pairs, bytes_accessed=moved)


def _kernel(
    lengths, start, table, q, k, v, scales, state, out, acc, m, l, *, call: _Static, reach, block: int, across: bool
):
    """Fold a block of slots k, v [s, H] ([H, s] across) into the state acc [r, H], m, l [r, 1] of query rows q [r,
    H].
    """
    i, step = pl.program_id(2), pl.program_id(3)
    length = lengths[pl.program_id(0)]
    full, end = reach(i, length, start[0])
    first = step * block
    fold = functools.partial(_fold, q, k, v, scales, acc, m, l, call.scale, across)

    @pl.when(step == 0)
    def begin():
        if state:
            acc[...] = state[0][...]
            m[...], l[...] = (_column(state[1][line : line + 1, :]) for line in (0, 1))
        else:
            acc[...] = jnp.zeros(acc.shape, acc.dtype)
            m[...] = jnp.full(m.shape, NEG, m.dtype)
            l[...] = jnp.zeros(l.shape, l.dtype)

    @pl.when(first + block <= full)
    def seen_by_all():
        fold(None, None)

    @pl.when((first + block > full) & (first < end))
    def edge():
        top = i * q.shape[0]
        meets = functools.partial(_meets, call.group_size, block, first, length, start[0])
        held = _held((1, block) if across else (block, 1), first, length)
        fold(lambda row, rows: meets(top + row, rows), held)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        if len(out) == 1:
            out[0][...] = (acc[...] / jnp.where(l[...] == 0, 1.0, l[...])).astype(out[0].dtype)
        else:
            out[0][...] = acc[...]
            out[1][0:1, :], out[1][1:2, :] = _line(m[...]), _line(l[...])


def _held(shape: tuple[int, int], first, length):
    """Return which slots of the block are valid, in the layout of its values ([s, 1], or [1, s] across)."""
    return first + lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1) < length


def _meets(group_size: int | None, block: int, first, length, start, row, rows: int):
    """Return which of rows [row, row + rows) see which slots: bool [rows, s], or [1, s] where all rows are alike."""
    slot = first + lax.broadcasted_iota(jnp.int32, (1, block), 1)
    if group_size is None:
        return slot < length
    row = row + lax.broadcasted_iota(jnp.int32, (rows, block), 0)
    # slot <= start + row // G, without dividing a vector.
    return (slot < length) & ((slot - start) * group_size <= row)


def _fold(q, k, v, scales, acc, m, l, scale: float, across: bool, meets, held):
    """Return one online-softmax step over the block.

    `meets(row, rows)` gives the pairs of those rows that meet, `held` the slots that hold anything; None for all.
    Many rows go in parts, the logits of a part before the softmax of the part before it: in that order the compiler
    has products for the matrix unit while the others are busy with exponentials.
    """
    R = q.shape[0]
    part = _PART if R % _PART == 0 else R
    keys, values = _operand(k, q.dtype), _operand(v, q.dtype)
    weights = scales[1][...] if scales else None
    # 0 × NaN is NaN: memory past the end must leave the product, not only get no weight. An int8 is never NaN.
    if held is not None and v.dtype != INT8:
        values = jnp.where(held, values, jnp.zeros((), values.dtype))
    if meets is not None and weights is not None:
        weights = jnp.where(meets(0, 1), weights, 0.0)

    def logits_of(row):
        logits = _dot(q[row : row + part, :], keys, 0 if across else 1) * scale
        if scales:
            logits = logits * scales[0][...]
        return logits if meets is None else jnp.where(meets(row, part), logits, NEG)

    following = logits_of(0)
    for row in range(0, R, part):
        logits, rows = following, slice(row, row + part)
        if row + part < R:
            following = logits_of(row + part)
        m_old = m[rows, :]
        m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
        # A masked weight is exp(NEG - m_new) = 0: every row sees slot 0, in the first block, so m_new is a logit.
        p = jnp.exp(logits - m_new)
        decay = jnp.exp(m_old - m_new)
        m[rows, :] = m_new
        l[rows, :] = l[rows, :] * decay + jnp.sum(p, axis=1, keepdims=True)
        if weights is not None:
            p = p * weights
        acc[rows, :] = acc[rows, :] * decay + _dot(p.astype(q.dtype), values, 1 if across else 0)


def _operand(x, dtype):
    """Return a tile of the cache as the product with rows of `dtype` takes it: 8 bits beside bfloat16 as they lie."""
    return x[...] if x.dtype in EIGHT_BIT and dtype == jnp.bfloat16 else x[...].astype(dtype)


def _dot(a, b, axis: int):
    """Multiply a [r, n] with axis `axis` of b, float32. Only float32 operands have a choice of passes."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _diagonal(n: int):
    return lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)


def _column(line):
    """Return [1, n] as [n, 1], through a select that every compiler takes; once a block of query rows."""
    return jnp.sum(jnp.where(_diagonal(line.shape[1]), line, 0.0), axis=1, keepdims=True)


def _line(column):
    """Return [n, 1] as [1, n]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)
