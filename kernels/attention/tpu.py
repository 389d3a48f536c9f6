"""Blockwise attention as one Pallas TPU kernel: decode, a chunk against the cache, and a chunk against itself.

The grid is `(B, K, blocks of query rows, blocks of slots)`. Its last axis is sequential and ends, at run time, with the
last block of the longest row. `visible_slots` says which blocks need a mask and which are not loaded: past the end the
index map repeats the last block, and a block that is already in fast memory is not loaded again. Where a block reaches
past S, Pallas fills it with arbitrary values, and the masks keep them out.

An int8 or float8 cache meets bfloat16 queries in a product of mixed types. Scales multiply rows of logits and of
weights, never tiles. With a block table a page is a block, and the index map looks it up.

A cache [B, K, S, H] is read in place, never copied. The TPU compiler stores a cache of H = 128 row by row, and one of
H = 64 slot by slot, as if it were [B, K, H, S], because rows of 64 would fill half of every tile. The kernel follows:
for H = 64 its blocks are [H, s], and the transposition before it moves nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from .. import EIGHT_BIT, INT8
from ..tpu_memory import keep_in_hbm
from .launch import LaunchOptions, visible_slots
from .part import Part
from .state import NEG, State

_LANES = 128
_HEAD_WIDTHS = (64, 128)
# Up to _FEW_ROWS query rows, loading K and V is the cost, and a step must be long enough to hide its overhead. Above,
# arithmetic is the cost, and a step is a tile of logits in fast memory. By the compiler's schedule a tile of
# 512 × 1,024 takes a third less time per logit than 512 × 512; 256 rows would load K and V twice as often, which v5e
# cannot hide. By the same schedule, halves of 256 rows (see `_fold`) take 7 % less time than 512 at once on v5e, and
# 30 % less on v6e and 7x.
_FEW_ROWS = 64
_BYTES_FEW_ROWS = 1 << 20  # of K, and as many of V, per step: 4,096 slots of 128 in bfloat16
_MANY_ROWS = (512, 1024)
_PART = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Query rows and slots of a grid step. `rows` is a multiple of 128, or all query rows."""

    rows: int
    slots: int


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Return why the kernel cannot run on q [B,K,R,H] and k, v [B,K,S,H], or None if it can."""
    H = q.shape[-1]
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel reads caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    wide = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    for name, x, types in (("q", q, wide), ("k", k, wide + EIGHT_BIT), ("v", v, wide + EIGHT_BIT)):
        if x.dtype not in types:
            return f"{name} is {x.dtype}: the kernel takes {', '.join(t.name for t in types)}"
    return None


def choose_blocks(R: int, S: int, H: int, itemsize: int, page: int | None = None) -> Blocks:
    """Return the blocks for R query rows over S slots of H elements of `itemsize` bytes.

    `page` is the slots of a page, None for a cache without pages.
    """
    if page is not None:
        tile = _MANY_ROWS[0] * _MANY_ROWS[1]
        return Blocks(min(R, _MANY_ROWS[0], max(tile // page // _LANES, 1) * _LANES), page)
    if R > _FEW_ROWS:
        return Blocks(min(R, _MANY_ROWS[0]), min(S, _MANY_ROWS[1]))
    longest = _BYTES_FEW_ROWS // (H * itemsize)
    # As few blocks as possible, of equal length: a ring of 4,100 slots is 2 × 2,176, not 4,096 + 4.
    slots = pl.cdiv(pl.cdiv(S, pl.cdiv(S, longest)), _LANES) * _LANES
    return Blocks(R, min(S, slots))


def attend(
    part: Part, *, scale: float, return_state: bool = False, blocks: Blocks | None = None, interpret: Any = False
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); see `Part`. With a block table a page is a block of the kernel.

    Raises ValueError if a page is not whole tiles, or too long for fast memory.
    """
    return _run(LaunchOptions(None, scale, return_state, interpret), part, jnp.zeros((1,), jnp.int32), blocks)


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
    """Attend causally to the tokens of a chunk; see `Part`."""
    options = LaunchOptions(group_size, scale, return_state, interpret)
    return _run(options, part, jnp.asarray(start, jnp.int32).reshape(1), blocks)


# Jitted here because memory-space constraints are only valid under jit.
@functools.partial(jax.jit, static_argnames=("options", "blocks"))
def _run(options: LaunchOptions, part: Part, start: jax.Array, blocks: Blocks | None):
    """Launch the kernel; `start` is int32 [1]."""
    q, k, v, lengths, state, k_scale, v_scale, table, _ = part
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    B, K, R, H = q.shape
    S = k.shape[2] if table is None else k.shape[2] * table.shape[1]
    dtype = q.dtype if k.dtype in EIGHT_BIT else jnp.promote_types(q.dtype, k.dtype)
    # A float32 query widens the tiles that it multiplies.
    itemsize = dtype.itemsize if dtype == jnp.float32 else k.dtype.itemsize
    if table is not None:
        _check_page(k, itemsize)
    if blocks is None:
        blocks = choose_blocks(R, S, H, itemsize, None if table is None else k.shape[2])
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, S)
    transposed = H < _LANES  # k and v as [B,K,H,S], slots along the lanes
    if transposed:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    visible = functools.partial(visible_slots, options.group_size, blocks.rows, R)
    pages = None if table is None else table.shape[1]
    rows, slots, slot_scales, stats = _specs(visible, blocks, H, transposed, pages)
    acc_shape = jax.ShapeDtypeStruct(q.shape, jnp.float32 if options.return_state else q.dtype)
    stats_shape = jax.ShapeDtypeStruct((B, K, 2, R), jnp.float32)
    column = pltpu.VMEM((blocks.rows, 1), jnp.float32)
    # At least one step, or nothing would write the output of rows that see nothing.
    steps = pl.cdiv(jnp.maximum(_longest(options.group_size, R, lengths, start[0]), 1), blocks.slots)
    (out,) = pl.pallas_call(
        functools.partial(_kernel, options=options, visible=visible, block=blocks.slots, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, pl.cdiv(R, blocks.rows), steps),
            in_specs=(rows, slots, slots, (slot_scales,) * len(scales), () if state is None else (rows, stats)),
            out_specs=((rows, stats) if options.return_state else (rows,),),
            scratch_shapes=(pltpu.VMEM((blocks.rows, H), jnp.float32), column, column),
        ),
        out_shape=((acc_shape, stats_shape) if options.return_state else (acc_shape,),),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        cost_estimate=_cost(q.shape, S, k.dtype.itemsize, options.group_size is not None),
        interpret=options.interpret,
        name="razor_attend" if options.group_size is None else "razor_attend_causal",
    )(
        lengths,
        start,
        jnp.zeros((1,), jnp.int32) if table is None else table.astype(jnp.int32).reshape(-1),
        q.astype(dtype),
        keep_in_hbm(k, options.interpret),
        keep_in_hbm(v, options.interpret),
        tuple(keep_in_hbm(x, options.interpret) for x in scales),
        () if state is None else (state[0], jnp.stack(state[1:], axis=2)),
    )
    if not options.return_state:
        return out[0]
    acc, stats_out = out
    return acc, stats_out[:, :, 0], stats_out[:, :, 1]


def _check_page(pool, itemsize: int) -> None:
    """Raise ValueError if pages of a pool [P,K,page,H] are not whole tiles, or do not fit fast memory twice."""
    page, H = pool.shape[2:]
    # Scales, and a cache of narrow heads, are along the lanes; otherwise a tile is 32 bytes of one column.
    tile = _LANES if H < _LANES or pool.dtype == INT8 else 32 // pool.dtype.itemsize
    # Small slots are counted as 2 bytes, or the logits of 128 rows would not fit either.
    longest = 2 * _BYTES_FEW_ROWS // (_LANES * max(itemsize, 2))
    if page % tile or page > longest:
        raise ValueError(
            f"page={page} slots of {pool.dtype}, H={H}: the kernel reads pages of a multiple of {tile}, up to {longest}"
        )


def _specs(visible, blocks: Blocks, H: int, transposed: bool, pages: int | None) -> tuple[pl.BlockSpec, ...]:
    """Return four block specs: for q, acc and out; for k and v; for their scales; for m and l."""

    def at_rows(b, h, i, j, lengths, start, table):
        return b, h, i, 0

    def at_stats(b, h, i, j, lengths, start, table):
        return b, h, 0, i

    def at_block(b, i, j, lengths, start, table):
        """Return the index of the block on the first axis and on the slot axis of k and v."""
        _, end = visible(i, lengths[b], start[0])
        # Past the end, the last block again: a block that is already loaded is not loaded again.
        block = jnp.minimum(j, jnp.maximum(pl.cdiv(end, blocks.slots) - 1, 0))
        if pages is None:
            return b, block
        # An empty row has no page, but the index map must name one.
        return jnp.where(end > 0, table[b * pages + block], 0), 0

    def at_slots(b, h, i, j, *prefetched):
        b, block = at_block(b, i, j, *prefetched)
        return (b, h, 0, block) if transposed else (b, h, block, 0)

    def at_scales(b, h, i, j, *prefetched):
        b, block = at_block(b, i, j, *prefetched)
        return b, h, 0, block

    slots = (H, blocks.slots) if transposed else (blocks.slots, H)
    return (
        pl.BlockSpec((None, None, blocks.rows, H), at_rows),
        pl.BlockSpec((None, None, *slots), at_slots),
        pl.BlockSpec((None, None, 1, blocks.slots), at_scales),
        # m and l are two rows along the lanes: an array [..., R, 1] would take 128 times its size.
        pl.BlockSpec((None, None, 2, blocks.rows), at_stats),
    )


def _longest(group_size: int | None, R: int, lengths, start):
    """Return how many slots the longest row sees."""
    longest = jnp.max(lengths)
    return longest if group_size is None else jnp.minimum(longest, start + R // group_size)


def _cost(q_shape: tuple[int, ...], S: int, itemsize: int, causal: bool) -> pl.CostEstimate:
    """Return the cost estimate for the compiler's scheduler, as if every cache were full."""
    B, K, R, H = q_shape
    pairs = B * K * R * S // (2 if causal else 1)
    moved = 2 * B * K * (S + R) * H * itemsize
    return pl.CostEstimate(flops=4 * pairs * H, transcendentals=pairs, bytes_accessed=moved)


class _Refs(NamedTuple):
    """Blocks of a grid step in fast memory: query rows, slots, and the state of the rows.

    Attributes:
      q: [r, H].
      k, v: [s, H], or [H, s] if transposed.
      scales: (k_scale, v_scale), [1, s] each, or empty.
      acc, m, l: float32 [r, H], [r, 1] and [r, 1].
    """

    q: Any
    k: Any
    v: Any
    scales: tuple
    acc: Any
    m: Any
    l: Any


def _kernel(
    lengths,
    start,
    table,
    q,
    k,
    v,
    scales,
    state,
    out,
    acc,
    m,
    l,
    *,
    options: LaunchOptions,
    visible,
    block: int,
    transposed: bool,
):
    """Fold one block of slots into the state of one block of query rows."""
    i, step = pl.program_id(2), pl.program_id(3)
    length = lengths[pl.program_id(0)]
    full, end = visible(i, length, start[0])
    first = step * block
    fold = functools.partial(_fold, _Refs(q, k, v, scales, acc, m, l), options.scale, transposed)

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
        sees = functools.partial(_sees, options.group_size, block, first, length, start[0])
        valid = _valid((1, block) if transposed else (block, 1), first, length)
        fold(lambda row, rows: sees(top + row, rows), valid)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        if len(out) == 1:
            out[0][...] = (acc[...] / jnp.where(l[...] == 0, 1.0, l[...])).astype(out[0].dtype)
        else:
            out[0][...] = acc[...]
            out[1][0:1, :], out[1][1:2, :] = _line(m[...]), _line(l[...])


def _valid(shape: tuple[int, int], first, length):
    """Return which slots of the block hold a token, in the layout of its values: [s, 1], or [1, s] if transposed."""
    return first + lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1) < length


def _sees(group_size: int | None, block: int, first, length, start, row, rows: int):
    """Return which of rows [row, row + rows) see which slots: bool [rows, s], or [1, s] if all rows are alike."""
    slot = first + lax.broadcasted_iota(jnp.int32, (1, block), 1)
    if group_size is None:
        return slot < length
    row = row + lax.broadcasted_iota(jnp.int32, (rows, block), 0)
    # slot <= start + row // G, without dividing a vector.
    return (slot < length) & ((slot - start) * group_size <= row)


def _fold(refs: _Refs, scale: float, transposed: bool, sees, valid):
    """Run one online-softmax step over the block, and update the state in place.

    `sees(row, rows)` returns which of those rows see which slots, `valid` marks the slots that hold a token; None for
    all. Many rows go in parts, and the logits of each part are computed before the softmax of the part before it: the
    compiler can then run products on the matrix unit while the other units compute exponentials.
    """
    q, k, v, scales, acc, m, l = refs
    R = q.shape[0]
    part = _PART if R % _PART == 0 else R
    keys, values = _operand(k, q.dtype), _operand(v, q.dtype)
    weights = scales[1][...] if scales else None
    # 0 × NaN is NaN: a weight of 0 is not enough, so values past the end become 0 too. An int8 is never NaN.
    if valid is not None and v.dtype != INT8:
        values = jnp.where(valid, values, jnp.zeros((), values.dtype))
    if sees is not None and weights is not None:
        weights = jnp.where(sees(0, 1), weights, 0.0)

    def logits_of(row):
        logits = _dot(q[row : row + part, :], keys, 0 if transposed else 1) * scale
        if scales:
            logits = logits * scales[0][...]
        return logits if sees is None else jnp.where(sees(row, part), logits, NEG)

    following = logits_of(0)
    for row in range(0, R, part):
        logits, rows = following, slice(row, row + part)
        if row + part < R:
            following = logits_of(row + part)
        m_old = m[rows, :]
        m_new = jnp.maximum(m_old, jnp.max(logits, axis=1, keepdims=True))
        # A masked weight is exp(NEG - m_new) = 0: every row sees slot 0, in the first block, so m_new is a real logit.
        p = jnp.exp(logits - m_new)
        decay = jnp.exp(m_old - m_new)
        m[rows, :] = m_new
        l[rows, :] = l[rows, :] * decay + jnp.sum(p, axis=1, keepdims=True)
        if weights is not None:
            p = p * weights
        acc[rows, :] = acc[rows, :] * decay + _dot(p.astype(q.dtype), values, 1 if transposed else 0)


def _operand(x, dtype):
    """Return a tile of the cache in the type that multiplies rows of `dtype`: 8 bits stay 8 bits beside bfloat16."""
    return x[...] if x.dtype in EIGHT_BIT and dtype == jnp.bfloat16 else x[...].astype(dtype)


def _dot(a, b, axis: int):
    """Contract a [r, n] with axis `axis` of b, in float32. Precision matters to float32 operands only."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _diagonal(n: int):
    return lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)


def _column(line):
    """Return [1, n] as [n, 1]. The select compiles on every TPU, and runs once per block of query rows."""
    return jnp.sum(jnp.where(_diagonal(line.shape[1]), line, 0.0), axis=1, keepdims=True)


def _line(column):
    """Return [n, 1] as [1, n]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)
