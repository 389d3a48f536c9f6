"""Cache writes as Pallas TPU kernels: in place, whole tiles at a time, the rest of the cache untouched.

The smallest piece of TPU memory that can be written is a tile, and a token is one line of it. Both kernels read tiles,
change lines and write the tiles back over themselves (`input_output_aliases`):

    one token per row    grid (B,): the tile of the token's slot, all heads at once; the evicted line is returned
    a chunk              grid (B, K, steps): blocks of slots, each filled from a contiguous run of tokens

XLA folds the means, from the evicted line or by sums over the tokens that leave, exactly as the reference does.

With a block table the token kernel looks its tile up in the pool. A row of count 0 rewrites a tile of the last page,
which belongs to no row. A chunk in pages runs on XLA: it is written once per prompt.

Slots are on the sublanes of a tile for H = 128. They are on its lanes for H = 64, where the compiler stores [B,K,S,64]
as if it were [B,K,64,S] (see `kernels/attention/tpu.py`), and for scales [B,K,1,S].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import EIGHT_BIT, FP8
from ..tpu_memory import keep_in_hbm
from . import xla
from .arrays import CacheWrite, GroupArrays
from .xla import ordered_after

_LANES = 128
_HEAD_WIDTHS = (64, 128)
_TYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"), *EIGHT_BIT)
_LONGEST = 1024  # slots per step of a chunk: some hundred KiB of each array, which hides the overhead of a step


def unsupported(group: GroupArrays) -> str | None:
    """Return why the kernels cannot write a group of k [B,K,S,H], or None if they can."""
    H = group.k.shape[-1]
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel writes caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    if group.k.dtype not in _TYPES:
        return f"the cache is {group.k.dtype}: the kernel writes {', '.join(map(str, _TYPES))}"
    return None


def write(call: CacheWrite, *, block: int | None = None, interpret: Any = False) -> GroupArrays:
    """Append tokens to a head group; see `CacheWrite`.

    `block` is the slots per step of a chunk, a multiple of 128; None to choose.
    """
    if isinstance(call.sinks, int):
        return _write(call._replace(sinks=None), call.sinks, block, interpret)
    return _write(call, None, block, interpret)


# Jitted here because memory-space constraints are only valid under jit.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _write(call: CacheWrite, sinks: int | None, block: int | None, interpret: Any) -> GroupArrays:
    """Write by the kernel for one token or for a chunk. `sinks` replaces those of `call` if they are static."""
    if sinks is not None:
        call = call._replace(sinks=sinks)
    T = call.tokens.k.shape[2]
    if T == 1:
        return _write_token(call, interpret)
    if call.block_table is not None:
        return xla.write(call)
    return _write_chunk(call, block or min(_LONGEST, max(_LANES, pl.next_power_of_2(T))), interpret)


def _to_kernel_layout(x: GroupArrays) -> list[jax.Array]:
    """Return k, v and any scales in the layout of the kernels: [B,K,S,H], or [B,K,·,S] with slots on the lanes."""
    k, v = (a.swapaxes(2, 3) if a.shape[3] < _LANES else a for a in (x.k, x.v))
    return [k, v, *(scale for scale in (x.k_scale, x.v_scale) if scale is not None)]


def _slots_on_lanes(group: GroupArrays) -> list[bool]:
    """Return which arrays of `_to_kernel_layout` have their slots on the lanes."""
    transposed = group.k.shape[3] < _LANES
    return [transposed] * 2 if group.k_scale is None else [transposed, transposed, True, True]


def _tile(x: jax.Array, lane: bool) -> int:
    """Return the slots of x in one tile of memory."""
    return _LANES if lane else 32 // x.dtype.itemsize


def _copy_cost(size: int) -> pl.CostEstimate:
    """Return the cost of moving `size` bytes; by itself the compiler's scheduler would count whole caches."""
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=size)


def _from_kernel_layout(arrays: Sequence[jax.Array], lanes: list[bool]) -> GroupArrays:
    """Undo `_to_kernel_layout`."""
    k, v = (x.swapaxes(2, 3) if lane else x for x, lane in zip(arrays[:2], lanes, strict=False))
    return GroupArrays(k, v, *arrays[2:])


def _write_token(call: CacheWrite, interpret: Any) -> GroupArrays:
    """Write one token per row."""
    group, new, lengths, counts, window, sinks, table = call
    slot = lengths if window is None else xla.ring_slot(lengths, window, sinks)
    slot = jnp.where((counts > 0) & (slot < xla.row_slots(call)), slot, -1)
    pages: list[jax.Array] = []
    if table is not None:
        size = group.k.shape[2]
        own = jnp.take_along_axis(table, (jnp.maximum(slot, 0) // size)[:, None], axis=1)[:, 0]
        pages = [jnp.where(slot < 0, len(group.k) - 1, own)]
        slot = jnp.where(slot < 0, -1, slot % size)
    arrays, tokens, lanes = _to_kernel_layout(group), _to_kernel_layout(new), _slots_on_lanes(group)
    B, K = new.k.shape[:2]
    folds = group.k_mean is not None
    # A token on the lanes is one line of [B,·,K] for all heads: [B,K,·,1] would take 128 times its size.
    tokens = [x[..., 0].swapaxes(1, 2) if lane else x for x, lane in zip(tokens, lanes, strict=True)]
    tokens = [x.astype(jnp.float32) for x in tokens]

    def block(x, lane: bool) -> pl.BlockSpec:
        tile = _tile(x, lane)
        shape = (None, K, x.shape[2], tile) if lane else (None, K, tile, x.shape[3])

        def at(b, slot, *page):
            row, index = page[0][b] if page else b, jnp.maximum(slot[b], 0) // tile
            return (row, 0, 0, index) if lane else (row, 0, index, 0)

        return pl.BlockSpec(shape, at)

    def whole(x) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, *(0,) * (x.ndim - 1)))

    blocks = [block(x, lane) for x, lane in zip(arrays, lanes, strict=True)]
    lines = [whole(x) for x in tokens]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    old = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in tokens] if folds else []
    n = len(arrays)
    moved = sum(t.size * _tile(x, lane) * x.dtype.itemsize for t, x, lane in zip(tokens, arrays, lanes, strict=True))
    written, evicted = pl.pallas_call(
        functools.partial(_token_kernel, lanes=lanes, scalars=1 + len(pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(pages),
            grid=(B,),
            in_specs=(lines, blocks),
            out_specs=(blocks, lines if folds else []),
        ),
        out_shape=(shapes, old),
        input_output_aliases={1 + len(pages) + n + i: i for i in range(n)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=_copy_cost(2 * moved),
        interpret=interpret,
        name="razor_write_token",
    )(slot, *pages, tokens, [keep_in_hbm(x, interpret) for x in arrays])
    k_mean, v_mean = group.k_mean, group.v_mean
    if window is not None and folds:
        evicted = [x.swapaxes(1, 2)[..., None] if lane else x for x, lane in zip(evicted, lanes, strict=True)]
        k_mean, v_mean = xla.fold_token(call, _from_kernel_layout(evicted, lanes))
    return _from_kernel_layout(written, lanes)._replace(k_mean=k_mean, v_mean=v_mean)


def _token_kernel(slot, *refs, lanes: list[bool], scalars: int):
    """Write one row: copy its tiles to `out` with the tokens at the slot, and the lines that were there to `evicted`.

    The first `scalars` arguments are prefetched; then come tokens, tiles, `out` and `evicted`.
    Tokens and evicted lines are [K,1,H], or [·,K] with slots on the lanes.
    """
    tokens, tiles, out, evicted = refs[scalars - 1 :]
    at = slot[pl.program_id(0)]
    for i, lane in enumerate(lanes):
        K = tiles[i].shape[0]
        for h in range(K):
            tile = tiles[i][h]
            axis = 1 if lane else 0
            line = lax.broadcasted_iota(jnp.int32, tile.shape, axis)
            here = (line == at % tile.shape[axis]) & (at >= 0)
            token = tokens[i][:, h : h + 1] if lane else tokens[i][h]
            out[i][h] = jnp.where(here, jnp.broadcast_to(token, tile.shape).astype(tile.dtype), tile)
            if not evicted:
                continue
            old = jnp.sum(jnp.where(here, tile.astype(jnp.float32), 0.0), axis=axis, keepdims=True)
            if lane:
                evicted[i][:, h : h + 1] = old
            else:
                evicted[i][h] = old


class _Steps(NamedTuple):
    """Grid steps of each row, int32 [B, steps]: each step fills one block of slots from one run of tokens.

    Attributes:
      block: index of the block of slots; ascending, and at most one apart in neighbouring steps of a run.
      token: the token that would go to the block's slot 0 if the run reached it; may be negative or past the end.
      first, last: slots [first, last) of the block take tokens; empty in the steps after a row's last one.
      read: the block to load: this one, or, if no slot of it survives, the block that is already loaded.
    """

    block: jax.Array
    token: jax.Array
    first: jax.Array
    last: jax.Array
    read: jax.Array


def _runs(lengths, counts, window, sinks: jax.Array | int, S: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the runs of each row as (begin, end, offset), int32 [B, runs] each: ascending and disjoint.

    Slots [begin, end) take tokens slot + offset. A full group has one run. A windowed group has three: the sinks, the
    ring up to the newest token, and the rest of the ring, which is one lap older.
    """
    start, stop = lengths, lengths + counts
    if window is None:
        runs = [(start, jnp.minimum(stop, S), -start)]
    else:
        ring = jnp.maximum(window, 1)
        laps = jnp.maximum(stop - 1 - sinks, 0) // ring
        newest = jnp.where(stop > sinks, xla.ring_slot(jnp.maximum(stop - 1, sinks), window, sinks) + 1, sinks)
        newer, older = laps * ring - start, (laps - 1) * ring - start
        runs = [
            (start, jnp.minimum(stop, sinks), -start),
            (jnp.maximum(sinks, -newer), newest, newer),
            (jnp.maximum(newest, -older), jnp.where(laps > 0, sinks + window, 0), older),
        ]
    begin, end, offset = (jnp.stack(x, axis=1) for x in zip(*runs, strict=True))
    # Rows without tokens have no run, whatever their window is.
    return begin, jnp.where((counts > 0)[:, None], jnp.maximum(begin, end), begin), offset


def _steps(runs, block: int, most: int) -> tuple[_Steps, jax.Array]:
    """Return the steps of runs (begin, end, offset) [B, runs], and the most steps that a row has.

    Each row is padded to `most` steps.
    """
    begin, end, offset = runs
    first_block = begin // block
    number = jnp.where(end > begin, (end - 1) // block - first_block + 1, 0)
    ends = jnp.cumsum(number, axis=1)
    total = ends[:, -1:]
    # Padding repeats a row's last step, with no slots to fill.
    index = jnp.arange(most, dtype=jnp.int32)[None, :]
    step = jnp.clip(index, 0, jnp.maximum(total - 1, 0))
    run = jnp.minimum(jnp.sum(step[:, :, None] >= ends[:, None, :], axis=2), ends.shape[1] - 1)

    def of_run(x):
        return jnp.take_along_axis(x, run, axis=1)

    at = jnp.where(total > 0, of_run(first_block) + step - of_run(ends - number), 0)
    first = jnp.clip(of_run(begin) - at * block, 0, block)
    last = jnp.where(index < total, jnp.clip(of_run(end) - at * block, 0, block), 0)
    kept = (first > 0) | (last < block) | (index == 0)
    read = lax.cummax(jnp.where(kept, at, 0), axis=1)
    return _Steps(*(x.astype(jnp.int32) for x in (at, at * block + of_run(offset), first, last, read))), jnp.max(total)


def _write_chunk(call: CacheWrite, block: int, interpret: Any) -> GroupArrays:
    """Write T tokens per row."""
    group, new, lengths, counts, window, sinks = call[:6]
    (B, K, S, _), T = group.k.shape, new.k.shape[2]
    runs = _runs(lengths, counts, window, sinks, S)
    # A run of n slots touches at most one block more than n slots need.
    steps, longest = _steps(runs, block, pl.cdiv(min(S, T), block) + 2 * runs[0].shape[1])
    k_mean, v_mean = group.k_mean, group.v_mean
    if k_mean is not None:
        k_mean, v_mean = xla.fold_chunk(call)
        steps = steps._replace(block=ordered_after(ordered_after(steps.block, k_mean, lengths), v_mean, lengths))
    arrays, tokens, lanes = _to_kernel_layout(group), _to_kernel_layout(new), _slots_on_lanes(group)

    def spec(x, lane: bool, index) -> pl.BlockSpec:
        def at(b, h, j, *steps):
            i = index(_Steps(*steps), b, j)
            return (b, h, 0, i) if lane else (b, h, i, 0)

        return pl.BlockSpec((None, None, x.shape[2], block) if lane else (None, None, block, x.shape[3]), at)

    def specs(index) -> list[pl.BlockSpec]:
        return [spec(x, lane, index) for x, lane in zip(arrays, lanes, strict=True)]

    def source(odd: int):
        """Return the index map of the even or the odd one of the two neighbouring blocks of tokens that a step needs.

        From step to step only one of the two changes, so every token is loaded once.
        """

        def index(steps: _Steps, b, j):
            earlier = steps.token[b, j] // block
            return jnp.clip(earlier + (earlier + odd) % 2, 0, pl.cdiv(T, block) - 1)

        return index

    n = len(arrays)
    written = pl.pallas_call(
        functools.partial(_chunk_kernel, lanes=lanes, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(B, K, jnp.maximum(longest, 1)),
            in_specs=(specs(source(0)), specs(source(1)), specs(lambda steps, b, j: steps.read[b, j])),
            out_specs=specs(lambda steps, b, j: steps.block[b, j]),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={len(steps) + 2 * n + i: i for i in range(n)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_copy_cost(2 * sum(x.size * x.dtype.itemsize for x in tokens)),
        interpret=interpret,
        name="razor_write_chunk",
    )(*steps, tokens, tokens, [keep_in_hbm(x, interpret) for x in arrays])
    return _from_kernel_layout(written, lanes)._replace(k_mean=k_mean, v_mean=v_mean)


def _chunk_kernel(*refs, lanes: list[bool], block: int):
    """Write one head: slots [first, last) of a block come from the two blocks of tokens, the others stay."""
    steps = _Steps(*refs[:5])
    even, odd, old, *out = refs[5:]
    b, j = pl.program_id(0), pl.program_id(2)
    token, first, last = steps.token[b, j], steps.first[b, j], steps.last[b, j]
    new_block = (j == 0) | (steps.block[b, j] != steps.block[b, jnp.maximum(j - 1, 0)])
    earlier, shift = token // block, token % block

    # A block that is filled completely was not loaded.
    @pl.when(new_block & ((first > 0) | (last < block)))
    def begin():
        for x, before in zip(out, old, strict=True):
            x[...] = before[...]

    @pl.when(first < last)
    def fill():
        for i, lane in enumerate(lanes):
            axis = 1 if lane else 0
            line = lax.broadcasted_iota(jnp.int32, out[i].shape, axis)
            # Lines from `shift` on come from the earlier block of tokens, lines below it from the later one. Rotated,
            # they are one contiguous run.
            from_even = (line >= shift) == (earlier % 2 == 0)
            joined = _widen(jnp.where(from_even, even[i][...], odd[i][...]))
            joined = pltpu.roll(joined, (block - shift) % block, axis)
            takes = (line >= first) & (line < last)
            out[i][...] = jnp.where(takes, _narrow(joined, out[i].dtype), out[i][...])


def _widen(x: jax.Array) -> jax.Array:
    """Cast x to 32 bits, the only width that can be rotated. The cast is exact."""
    if x.dtype == FP8:
        x = pltpu.bitcast(x, jnp.int8)
    return x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)


def _narrow(x: jax.Array, dtype) -> jax.Array:
    """Undo `_widen`."""
    if dtype == FP8:
        return pltpu.bitcast(x.astype(jnp.int8), dtype)
    return x.astype(dtype)
