"""Blockwise attention as one Pallas Mosaic GPU kernel for NVIDIA Hopper (H100, H200): decode and prefill.

A program is three warpgroups. One streams blocks of 64 slots of K and V into a ring of shared memory with the tensor
memory accelerator. Two consume them with tensor cores, whose smallest tile is 64 query rows:

    few query rows (decode)     one tile; the consumers take turns with the blocks, and add their sums at the end
    many query rows (prefill)   two tiles, one each; both consumers read every block

`visible_slots` says which blocks need a mask and which are not loaded. `splits` programs share the slots of a row in
equal parts of the row's real length, and XLA merges their sums and the initial state. Caches [B, K, S, H] are read in
place.

Evidence. The interpreter of JAX 0.12.0 runs the whole kernel (ring, barriers, masks, sums) with its race detector on
and NaN in everything that must not be read, and agrees with float64. The interpreter of 0.10.2 agrees too, with the
product of q and K replaced because it lacks transposed operands. The kernel compiles to SASS for sm_90a without spills.
No GPU has run it, and an interpreter shows neither memory fences, nor the order of asynchronous copies and products,
nor what an address past the end of an array does. Until a GPU has run it, it runs only by name.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from .launch import LaunchOptions, visible_slots
from .part import Part
from .state import NEG, State, finish

_HEAD_WIDTHS = (64, 128)
_TYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_ROWS = _SLOTS = 64  # per tile of logits
_CONSUMERS = 2
# Registers per thread, loading and consuming; (40 + 2 × 232) × 128 threads fill the register file.
_REGISTERS = (40, 232)
_MULTIPROCESSORS = 132  # each runs one program
_START = 3  # estimate: a program takes as long to start as to read this many blocks
_SHORTEST_SPLIT = 8  # blocks; partial sums are then a small share of the bytes
_LOG2E = math.log2(math.e)


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Return why the kernel cannot run on q [B,K,R,H] and k, v [B,K,S,H], or None if it can."""
    H, S = q.shape[-1], k.shape[2]
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel reads caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    if q.dtype not in _TYPES or not q.dtype == k.dtype == v.dtype:
        types = " or ".join(map(str, _TYPES))
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: the kernel takes all three as one of {types}"
    if S % 8:
        return f"S={S} slots: the kernel reads caches of a multiple of 8"
    return _not_hopper()


def _not_hopper() -> str | None:
    """Return why this machine's GPU cannot run the kernel, or None if it can."""
    try:
        device, *_ = jax.local_devices(backend="gpu")
    except RuntimeError:  # compiled ahead of time, where the compiler decides
        return None
    capability = getattr(device, "compute_capability", None)
    return None if capability == "9.0" else f"the GPU has compute capability {capability}: the kernel is for 9.0"


def choose_splits(heads: int, R: int, S: int) -> int:
    """Return how many programs share the slots of a row, for R query rows of each of `heads` (B·K) KV heads.

    It is the number that finishes first if all rows have S slots.
    """
    if R > _ROWS:
        return 1
    blocks = pl.cdiv(S, _SLOTS)

    def time(splits: int) -> int:
        return pl.cdiv(heads * splits, _MULTIPROCESSORS) * (pl.cdiv(blocks, splits) + _START)

    return min(range(1, max(1, blocks // _SHORTEST_SPLIT) + 1), key=time)


def attend(
    part: Part, *, scale: float, return_state: bool = False, splits: int | None = None, interpret: Any = None
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); see `Part`. Raises NotImplementedError for 8-bit caches and pages."""
    if any(x is not None for x in (part.k_scale, part.v_scale, part.block_table)):
        raise NotImplementedError("the Mosaic GPU kernel reads neither 8-bit caches nor pages")
    return _run(LaunchOptions(None, scale, return_state, interpret), part, jnp.zeros((1,), jnp.int32), splits)


def attend_causal(
    part: Part,
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    return_state: bool = False,
    splits: int | None = None,
    interpret: Any = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend causally to the tokens of a chunk; see `Part`."""
    options = LaunchOptions(group_size, scale, return_state, interpret)
    return _run(options, part, jnp.asarray(start, jnp.int32).reshape(1), splits)


class _Shared(NamedTuple):
    """Shared memory of a program, and its barriers."""

    q: Any  # [tiles, 64, H]
    k: Any  # [stages, 64, H]
    v: Any  # [stages, 64, H]
    p: Any  # [2, 64, 64], one per consumer
    acc: Any  # [tiles, 64, H]
    m: Any  # [tiles, 64]
    l: Any  # [tiles, 64]
    q_ready: Any
    k_ready: Any  # [stages]
    v_ready: Any  # [stages]
    free: Any  # [stages]
    handover: Any  # used once, from one consumer to the other: its sums, or a cleaned tail


class _Work(NamedTuple):
    """Share of a program: `steps` blocks of slots from block `begin` on; the first `unmasked` blocks need no mask."""

    begin: Any
    steps: Any
    unmasked: Any
    length: Any
    start: Any
    row: Any  # the program's first query row


def _run(options: LaunchOptions, part: Part, start: jax.Array, splits: int | None):
    """Launch the kernel; `start` is int32 [1]."""
    q, k, v, lengths, state = part[:5]
    (B, K, R, H), S = q.shape, k.shape[2]
    splits = splits or choose_splits(B * K, R, S)
    tiles = 1 if R <= _ROWS else _CONSUMERS
    # A copy moves a multiple of eight rows. The other rows of a tile are loaded as zeros and not used.
    rows = pl.cdiv(R, 8) * 8
    written = rows if tiles == 1 else pl.cdiv(R, _ROWS * tiles) * _ROWS * tiles
    line = jax.ShapeDtypeStruct((B, K, splits, written), jnp.float32)
    run = plgpu.kernel(
        functools.partial(_kernel, options, R),
        out_type=(jax.ShapeDtypeStruct((*line.shape, H), jnp.float32), line, line),
        scratch_types=_shared(tiles, H, q.dtype),
        grid=(pl.cdiv(R, _ROWS * tiles), splits, K, B),
        grid_names=("rows", "splits", "heads", "batch"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="razor_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=options.interpret,
    )
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, S)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - R), (0, 0)))
    merged = _merge(*(x[:, :, :, :R] for x in run(lengths, start, q, k, v)), state)
    return merged if options.return_state else finish(merged, q.dtype)


def _merge(acc, m, l, state: State | None) -> State:
    """Merge the states of the splits, acc [B,K,splits,R,H], m and l [B,K,splits,R], and the initial state."""
    m_before = NEG if state is None else state[1]
    m_all = jnp.maximum(jnp.max(m, axis=2), m_before)
    weight = jnp.exp(m - m_all[:, :, None])
    acc, l = jnp.sum(acc * weight[..., None], axis=2), jnp.sum(l * weight, axis=2)
    if state is not None:
        weight = jnp.exp(m_before - m_all)
        acc, l = acc + state[0] * weight[..., None], l + state[2] * weight
    return acc, m_all, l


def _shared(tiles: int, H: int, dtype) -> _Shared:
    """Return the allocations.

    With one tile the consumers take turns, and each must always meet the same stages of the ring. The number of stages
    is therefore even.
    """
    stages = (4 if tiles == 1 else 3) * 128 // H
    swizzle = plgpu.SwizzleTransform(128)
    narrow = functools.partial(plgpu.SMEM, dtype=dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle))
    return _Shared(
        q=narrow((tiles, _ROWS, H)),
        k=narrow((stages, _SLOTS, H)),
        v=narrow((stages, _SLOTS, H)),
        p=narrow((_CONSUMERS, _ROWS, _SLOTS)),
        acc=plgpu.SMEM((tiles, _ROWS, H), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), swizzle)),
        m=plgpu.SMEM((tiles, _ROWS), jnp.float32),
        l=plgpu.SMEM((tiles, _ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=tiles),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=tiles, num_barriers=stages),
        handover=plgpu.Barrier(),
    )


def _kernel(options: LaunchOptions, R: int, lengths, start, q, k, v, acc, m, l, *scratch):
    """Run one warpgroup of a program: load the program's blocks, or consume them."""
    shared = _Shared(*scratch)
    tiles = shared.q.shape[0]
    i, split, h, b = (lax.axis_index(name) for name in ("rows", "splits", "heads", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    rows = _ROWS * tiles
    length, first = lengths[b], start[0]
    full, end = visible_slots(options.group_size, rows, R, i, length, first)
    blocks = _divide(end + (_SLOTS - 1), _SLOTS)
    share = _divide(blocks + (acc.shape[2] - 1), acc.shape[2])
    begin = jnp.minimum(split * share, blocks)
    steps = jnp.minimum(share, blocks - begin)
    unmasked = jnp.clip(_divide(full, _SLOTS) - begin, 0, steps)
    work = _Work(begin, steps, unmasked, length, first, i * rows)

    @pl.when(warpgroup == _CONSUMERS)
    def load():
        plgpu.set_max_registers(_REGISTERS[0], action="decrease")
        for tile in range(tiles):
            at = pl.ds(work.row + tile * _ROWS, _ROWS)
            plgpu.copy_gmem_to_smem(q.at[b, h, at], shared.q.at[tile], shared.q_ready)
        _load(shared, work, k.at[b, h], v.at[b, h])

    @pl.when(warpgroup < _CONSUMERS)
    def consume():
        plgpu.set_max_registers(_REGISTERS[1], action="increase")
        plgpu.barrier_wait(shared.q_ready)
        state = _consume(options, shared, work, warpgroup)
        store = functools.partial(_store, shared, work, (b, h, split), (acc, m, l))
        if tiles > 1:
            store(warpgroup, state)
            return

        @pl.when(warpgroup == 1)
        def hand_over():
            shared.acc[0], shared.m[0], shared.l[0] = state
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.handover)

        @pl.when(warpgroup == 0)
        def add_up():
            plgpu.barrier_wait(shared.handover)
            store(0, _add(state, (shared.acc[0], shared.m[0], shared.l[0])))


def _load(shared: _Shared, work: _Work, k, v):
    """Stream the blocks of k, v [S, H] through the ring, and wait until all stages are free."""
    stages = shared.k.shape[0]

    def block(step, carry):
        stage = _stage(step, stages)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(shared.free.at[stage]))
        slots = pl.ds((work.begin + step) * _SLOTS, _SLOTS)
        plgpu.copy_gmem_to_smem(k.at[slots], shared.k.at[stage], shared.k_ready.at[stage])
        plgpu.copy_gmem_to_smem(v.at[slots], shared.v.at[stage], shared.v_ready.at[stage])
        return carry

    def drain(step, carry):
        plgpu.barrier_wait(shared.free.at[_stage(step, stages)])
        return carry

    lax.fori_loop(0, work.steps, block, None)
    lax.fori_loop(jnp.maximum(work.steps - stages, 0), work.steps, drain, None)


def _consume(options: LaunchOptions, shared: _Shared, work: _Work, consumer):
    """Return acc [64, H], m and l [64] of a consumer: of its tile, or of its share of the blocks."""
    tiles, _, H = shared.q.shape
    turns = _CONSUMERS // tiles
    turn, tile = (consumer, 0) if tiles == 1 else (0, consumer)

    def step(n, carry, edge: bool):
        return _fold(options, shared, work, consumer, tile, turns * n + turn, edge, carry)

    # The consumer takes every `turns`-th block, from block `turn` on.
    unmasked, steps = (_divide(steps - turn + (turns - 1), turns) for steps in (work.unmasked, work.steps))
    zeros, nothing = jnp.zeros((_ROWS, H), jnp.float32), jnp.zeros((_ROWS,), jnp.float32)
    carry = (zeros, jnp.full((_ROWS,), NEG, jnp.float32), nothing)
    carry = lax.fori_loop(0, unmasked, functools.partial(step, edge=False), carry)
    return lax.fori_loop(unmasked, steps, functools.partial(step, edge=True), carry)


def _fold(options: LaunchOptions, shared: _Shared, work: _Work, consumer, tile, step, edge: bool, carry):
    """Return acc, m and l after one online-softmax step over a block, masked if `edge`; m counts in powers of two."""
    acc, m, l = carry
    stage = _stage(step, shared.k.shape[0])
    first = (work.begin + step) * _SLOTS
    plgpu.barrier_wait(shared.k_ready.at[stage])
    logits = _logits(shared.q.at[tile], shared.k.at[stage]) * (options.scale * _LOG2E)
    if edge:
        logits = jnp.where(_sees(options.group_size, work, work.row + tile * _ROWS, first), logits, NEG)
    m_new = jnp.maximum(m, jnp.max(logits, axis=1))
    # A row that has seen nothing so far sums 2^(NEG - NEG) under m = NEG. Every row sees slot 0, in this split or in
    # another, and the real logit of slot 0 then gives that sum the weight 0.
    p = jnp.exp2(logits - _to_columns(m_new, logits.shape))
    decay = jnp.exp2(m - m_new)
    l = l * decay + jnp.sum(p, axis=1)
    shared.p[consumer] = p.astype(shared.p.dtype)
    plgpu.barrier_wait(shared.v_ready.at[stage])
    if edge:
        pl.when(first + _SLOTS > work.length)(functools.partial(_clean_tail, shared, work, consumer, stage, first))
    plgpu.commit_smem()
    acc = acc * _to_columns(decay, acc.shape) + _values(shared.p.at[consumer], shared.v.at[stage])
    plgpu.barrier_arrive(shared.free.at[stage])
    return acc, m_new, l


def _sees(group_size: int | None, work: _Work, row, first):
    """Return which rows of a tile see which slots, bool [64, 64]."""
    iota = functools.partial(lax.broadcasted_iota, jnp.int32, (_ROWS, _SLOTS))
    slot = first + iota(1)
    valid = slot < work.length
    if group_size is None:
        return valid
    # slot <= start + row // G, without dividing a vector.
    return valid & ((slot - work.start) * group_size <= row + iota(0))


def _clean_tail(shared: _Shared, work: _Work, consumer, stage, first):
    """Write zeros over the values past the length, because 0 × NaN is NaN. At most one block per program has any."""

    def clean():
        values = shared.v.at[stage]
        valid = first + lax.broadcasted_iota(jnp.int32, values.shape, 0) < work.length
        values[...] = jnp.where(valid, values[...], jnp.zeros((), values.dtype))

    if shared.q.shape[0] == 1:  # no other consumer reads this block
        clean()
        return

    @pl.when(consumer == 0)
    def for_both():
        clean()
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.handover)

    pl.when(consumer == 1)(lambda: plgpu.barrier_wait(shared.handover))


def _logits(q, k):
    """Return q [64, H] times the transpose of k [64, H], float32."""
    return _product((_ROWS, _SLOTS), q, k.transpose((1, 0)))


def _values(p, v):
    """Return p [64, 64] times v [64, H], float32."""
    return _product((_ROWS, v.shape[1]), p, v)


def _product(shape: tuple[int, int], a, b):
    def multiply(product):
        plgpu.wgmma(product, a, b)
        return product[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _add(one: State, other: State) -> State:
    """Merge the acc [64, H], m and l [64] of two consumers."""
    (acc, m, l), (acc_2, m_2, l_2) = one, other
    m_all = jnp.maximum(m, m_2)
    weight, weight_2 = jnp.exp2(m - m_all), jnp.exp2(m_2 - m_all)
    acc = acc * _to_columns(weight, acc.shape) + acc_2 * _to_columns(weight_2, acc.shape)
    return acc, m_all, l * weight + l_2 * weight_2


def _store(shared: _Shared, work: _Work, at, out, tile, state: State):
    """Store a tile's state in `out`: acc [B,K,splits,rows,H], m and l [B,K,splits,rows]."""
    acc, m, l = state
    staged = (shared.acc, shared.m, shared.l)
    # m is converted here: XLA would fuse the factor into the differences of m that follow, and at NEG they must be 0.
    for ref, x in zip(staged, (acc, m / _LOG2E, l), strict=True):
        ref[tile] = x
    plgpu.commit_smem()
    rows = min(_ROWS, out[0].shape[3])
    for ref, to in zip(staged, out, strict=True):
        plgpu.copy_smem_to_gmem(ref.at[tile, pl.ds(0, rows)], to.at[(*at, pl.ds(work.row + tile * _ROWS, rows))])
    plgpu.wait_smem_to_gmem(0)


def _to_columns(column, shape: tuple[int, ...]):
    """Broadcast [64] to [64, n]."""
    return lax.broadcast_in_dim(column, shape, (0,))


def _divide(x, y: int):
    """Return x // y for non-negative x."""
    return lax.div(x, jnp.int32(y))


def _stage(step, stages: int):
    return lax.rem(step, jnp.int32(stages))
