"""Blockwise attention as one Pallas-Triton kernel, for NVIDIA GPUs from Ampere on.

A program takes a block of query rows of one KV head and walks over its share of the slots. How far a block of query
rows sees is two numbers, `full` and `end`:

    slots [0, full)      seen by every query row: no mask at all
    slots [full, end)    seen by some: masked
    slots from end on    seen by none: the loop ends before them

so that a length, a causal diagonal and their combination are the same three kinds of step. A few query rows (decode)
are too few programs for the chip: then `splits` of them share the slots of a row, in equal parts of its real length,
and a second kernel merges their states. Caches [B, K, S, H] are read in place. Masked slots are not loaded, so S
is a multiple of nothing.

Pallas-Triton is deprecated since JAX 0.11. Whatever needs it is in this file, and without it `unsupported` says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from .. import EIGHT_BIT, FP8, INT8
from .part import Part
from .state import NEG, State

try:
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt: Any = None

_HEAD_WIDTHS = (64, 128)
_TYPES = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))
_SMALLEST = 16  # query rows, and slots, that a tensor core multiplies at once
_FEW_ROWS = 64
_MULTIPROCESSORS = 132  # of H100 and H200. A100 has 108, B200 148: near enough
_WAVES = 4  # programs a multiprocessor of decode
_SHORTEST_SPLIT = 4, 8  # blocks, and slots a query row: its states are then a quarter of the bytes of bfloat16 slots
_MERGED = 32  # splits at once
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Query rows and slots of a tile (powers of two from 16 on), and how many programs share a row's slots."""

    rows: int
    slots: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Return why the kernel cannot take queries q [B,K,R,H] and caches k, v [B,K,S,H], or None if it can."""
    if plt is None:
        return f"JAX {jax.__version__} has no Pallas-Triton"
    capability = _compute_capability()
    if capability < 8.0:
        return f"the GPU has compute capability {capability}: Triton's kernels run from 8.0 (NVIDIA Ampere) on"
    H, held = q.shape[-1], (*_TYPES, *EIGHT_BIT)
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel reads caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    if q.dtype not in _TYPES:
        return f"q is {q.dtype}: the kernel takes {', '.join(map(str, _TYPES))}"
    if k.dtype != v.dtype or k.dtype not in held:
        return f"k is {k.dtype} and v is {v.dtype}: the kernel takes both as one of {', '.join(map(str, held))}"
    if k.dtype == INT8 and q.dtype == jnp.float16:
        return "k is int8 and q float16, which cannot hold weights times small scales"
    if k.dtype == FP8 and capability < 8.9:
        return "k is float8_e4m3fn, which this GPU cannot convert: its compute capability is below 8.9"
    if k.dtype in EIGHT_BIT and 2**31 <= k.size <= 2**32:
        return (
            f"k has {k.size} elements of 8 bits: Pallas-Triton addresses 2 to 4 GiB of them by a signed 32-bit number"
        )
    return None


def _compute_capability() -> float:
    """Return the compute capability of this machine's GPU: 0 if it is not NVIDIA's, infinite ahead of time."""
    try:
        device, *_ = jax.local_devices(backend="gpu")
        return float(device.compute_capability)
    except RuntimeError:
        return math.inf
    except ValueError:
        return 0.0


def choose_blocks(heads: int, R: int, S: int, H: int, dtype: jnp.dtype, page: int | None = None) -> Blocks:
    """Return the blocks for R query rows of each of `heads` (B·K) KV heads over S slots of H, multiplied as `dtype`.

    Beside other head groups, `heads` are those of S slots that would be as much work as all the groups together.
    Raises ValueError where a page [page] is not whole tiles of at least 16 slots.
    """
    few = R <= _FEW_ROWS
    rows = max(_SMALLEST, pl.next_power_of_2(R)) if few else 128
    slots, warps = (128 if few and H == 64 else 64), (4 if few else 8)
    if jnp.dtype(dtype).itemsize == 4:  # multiplied without tensor cores, from many more registers
        rows, slots, warps = min(rows, 32), 16, 8
    slots = min(slots, max(_SMALLEST, pl.next_power_of_2(S)))
    if page is not None:
        slots = math.gcd(slots, page)
        if slots < _SMALLEST:
            raise ValueError(f"pages of {page} slots: the kernel reads pages of a multiple of {_SMALLEST}")
    programs = heads * pl.cdiv(R, rows)
    wanted = (_WAVES if few else 1) * _MULTIPROCESSORS // programs
    shortest = max(_SHORTEST_SPLIT[0] * slots, _SHORTEST_SPLIT[1] * rows)
    splits = max(1, min(wanted, S // shortest))
    return Blocks(rows, slots, splits, warps)


def attend(
    part: Part, *, scale: float, return_state: bool = False, blocks: Blocks | None = None, interpret: Any = False
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]); the contract of `Part`. `scale` is positive."""
    (result,) = _run(_Static(None, scale, return_state, interpret), (part,), None, blocks)
    return result


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
    start = jnp.asarray(start, jnp.int32).reshape(1)
    (result,) = _run(_Static(group_size, scale, return_state, interpret), (part,), start, blocks)
    return result


def attend_groups(
    parts: Sequence[Part], *, scale: float, return_state: bool = False, interpret: Any = False
) -> Float[jax.Array, "B K R H"] | State:
    """Run `attend` on the head groups of a layer in one launch; concatenate on K in the order of `parts`.

    Each part has its own K and S; B, R, H and the types are those of the layer.
    """
    results = _run(_Static(None, scale, return_state, interpret), tuple(parts), None, None)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static arguments of a call; `group_size` None means no causal mask."""

    group_size: int | None
    scale: float
    return_state: bool
    interpret: Any


def _run(call: _Static, parts: tuple[Part, ...], start, blocks: Blocks | None) -> list[jax.Array | State]:
    """Return outputs or states of the parts; `start` int32 [1] of a causal call."""
    B, _, R, H = parts[0].q.shape
    work = B * sum(part.q.shape[1] * _slots(part)[1] for part in parts)
    plans, kernel_parts, shapes = [], [], []
    for part in parts:
        K, (page, S) = part.q.shape[1], _slots(part)
        plan = blocks or choose_blocks(pl.cdiv(work, S), R, S, H, _multiplied_as(part), page)
        split = plan.splits > 1
        plans.append(plan)
        k_scale, v_scale = (x if x is None else x[:, :, 0] for x in (part.k_scale, part.v_scale))
        # The state counts once: where programs share a row, in the merge.
        state = None if split else part.state
        kernel_parts.append(part._replace(state=state, k_scale=k_scale, v_scale=v_scale))
        shapes.append(_states((B, K, plan.splits, R, H)) if split else _shapes(call, part.q))
    (results,) = pl.pallas_call(
        functools.partial(_razor_attend, call=call, plans=tuple(plans)),
        grid=(sum(_programs(p.q.shape, plan) for p, plan in zip(parts, plans, strict=True)), B),
        out_shape=(tuple(shapes),),
        compiler_params=plt.CompilerParams(num_warps=plans[0].warps, num_stages=plans[0].stages),
        interpret=call.interpret,
    )(tuple(kernel_parts), start)
    merged = []
    for part, plan, result in zip(parts, plans, results, strict=True):
        result = _merge(call, result, part) if plan.splits > 1 else result
        merged.append(result if call.return_state else result[0])
    return merged


def _shapes(call: _Static, q: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes of a call's last kernel: the output alone, or acc, m and l."""
    if not call.return_state:
        return (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    return _states(q.shape)


def _states(shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    line = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return jax.ShapeDtypeStruct(shape, jnp.float32), line, line


def _merge(call: _Static, states, part: Part):
    """Merge acc [B,K,splits,R,H], m and l [B,K,splits,R] and the initial state into the shapes of `_shapes`."""
    B, K, R, _ = part.q.shape
    (result,) = pl.pallas_call(
        _razor_merge,
        grid=(R, K, B),
        out_shape=(_shapes(call, part.q),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=call.interpret,
    )(states, part.state)
    return result


def _slots(part: Part) -> tuple[int | None, int]:
    """Return the page of a pool (else None), and the slots that a row of the part can have."""
    if part.block_table is None:
        return None, part.k.shape[2]
    return part.k.shape[2], part.k.shape[2] * part.block_table.shape[1]


def _multiplied_as(part: Part) -> jnp.dtype:
    return part.q.dtype if part.k.dtype in EIGHT_BIT else jnp.promote_types(part.q.dtype, part.k.dtype)


def _programs(q_shape: tuple[int, ...], plan: Blocks) -> int:
    """Return programs of a batch row: KV heads × splits × blocks of query rows."""
    return q_shape[1] * plan.splits * pl.cdiv(q_shape[2], plan.rows)


def _razor_attend(parts, start, results, *, call: _Static, plans: tuple[Blocks, ...]):
    program, b = pl.program_id(0), pl.program_id(1)
    if len(parts) == 1:
        _program(call, plans[0], parts[0], start, results[0], program, b)
        return
    first = 0
    for part, plan, result in zip(parts, plans, results, strict=True):
        end = first + _programs(part.q.shape, plan)
        run = functools.partial(_program, call, plan, part, start, result, program - first, b)
        pl.when((program >= first) & (program < end))(run)
        first = end


def _program(call: _Static, plan: Blocks, part, start, result, program, b):
    """Return a block of query rows of one head meets its split of the slots."""
    _, _, R, H = part.q.shape
    row_blocks = pl.cdiv(R, plan.rows)
    rest = lax.div(program, row_blocks)
    # Under a causal mask the last rows see most: they start first.
    i = row_blocks - 1 - lax.rem(program, row_blocks)
    h, split = lax.div(rest, plan.splits), lax.rem(rest, plan.splits)
    length = jnp.clip(part.lengths[b], 0, _slots(part)[1])
    full, end = _reach(call, plan.rows, R, i, length, start)
    # Equal parts of the blocks that this row has, not of those that it could have.
    blocks = pl.cdiv(end, plan.slots)
    begin, stop = (lax.div((split + n) * blocks, plan.splits) for n in (0, 1))
    masked = jnp.clip(lax.div(full, plan.slots), begin, stop)

    rows = pl.ds(i * plan.rows, plan.rows)
    row = i * plan.rows + lax.iota(jnp.int32, plan.rows)
    exists = row < R
    q = plt.load(part.q.at[b, h, rows, :], mask=exists[:, None], other=0).astype(_multiplied_as(part))

    def fold(block, carry, masks: bool):
        first = block * plan.slots
        meets = held = None
        if masks:
            slot = first + lax.iota(jnp.int32, plan.slots)
            held = slot < length
            meets = _meets(call.group_size, row, slot, held, start)
        return _fold(part, _tile(part, b, h, first, plan.slots), held, meets, q, call.scale * _LOG2E, carry)

    carry = _begin(part, (b, h, rows), exists, plan.rows, H)
    carry = lax.fori_loop(begin, masked, functools.partial(fold, masks=False), carry)
    acc, m, l = lax.fori_loop(masked, stop, functools.partial(fold, masks=True), carry)

    at = (b, h, split, rows) if plan.splits > 1 else (b, h, rows)
    _store(result, at, acc, m, l, exists)


def _razor_merge(states, state, result):
    """Return the splits of one query row, some at a time; m here counts in powers of e."""
    r, h, b = (pl.program_id(axis) for axis in range(3))
    splits, H = states[0].shape[2], states[0].shape[4]

    def fold(index, carry):
        acc, m, l = carry
        first = index * _MERGED
        exists = first + lax.iota(jnp.int32, _MERGED) < splits
        at = (b, h, pl.ds(first, _MERGED), r)
        m_part = plt.load(states[1].at[at], mask=exists, other=NEG)
        m_new = jnp.maximum(m, jnp.max(m_part))
        weight, decay = jnp.exp(m_part - m_new), jnp.exp(m - m_new)
        l_part = plt.load(states[2].at[at], mask=exists, other=0.0)
        part = plt.load(states[0].at[(*at, slice(None))], mask=exists[:, None], other=0.0)
        return acc * decay + jnp.sum(part * weight[:, None], axis=0), m_new, l * decay + jnp.sum(l_part * weight)

    if state is None:
        carry = jnp.zeros((H,), jnp.float32), jnp.float32(NEG), jnp.float32(0)
    else:
        carry = state[0][b, h, r, :], state[1][b, h, r], state[2][b, h, r]
    acc, m, l = lax.fori_loop(0, pl.cdiv(splits, _MERGED), fold, carry)
    if len(result) == 1:
        result[0][b, h, r, :] = (acc / jnp.where(l == 0, 1.0, l)).astype(result[0].dtype)
    else:
        result[0][b, h, r, :] = acc
        result[1][b, h, r], result[2][b, h, r] = m, l


def _reach(call: _Static, block: int, R: int, i, length, start):
    """Return (full, end) of query block i: slots that all its rows see, and slots that any of them sees."""
    if call.group_size is None:
        return length, length
    first = i * block
    last = jnp.minimum(first + block, R) - 1
    full, end = (start[0] + lax.div(row, call.group_size) + 1 for row in (first, last))
    return jnp.minimum(length, full), jnp.minimum(length, end)


def _meets(group_size: int | None, row, slot, held, start):
    """Return which row [r] sees which slot [s], bool [r, s] or [1, s]."""
    if group_size is None:
        return held[None, :]
    # slot <= start + row // G, without dividing a vector.
    return held[None, :] & (((slot - start[0]) * group_size)[None, :] <= row[:, None])


def _tile(part, b, h, first, slots: int):
    """Return (page or batch row, head, slots) of the tile at slot `first`; pages are whole tiles."""
    if part.block_table is None:
        return b, h, pl.ds(first, slots)
    page = part.k.shape[2]
    return part.block_table[b, lax.div(first, page)], h, pl.ds(lax.rem(first, page), slots)


def _begin(part, at, exists, rows: int, H: int):
    """Return the initial acc [r, H], m and l [r] of a program; m is in powers of two, as its exponentials are."""
    if part.state is None:
        acc, m, l = jnp.zeros((rows, H), jnp.float32), jnp.full((rows,), NEG), jnp.zeros((rows,), jnp.float32)
    else:
        acc = plt.load(part.state[0].at[(*at, slice(None))], mask=exists[:, None], other=0.0)
        m, l = (plt.load(x.at[at], mask=exists, other=0.0) for x in part.state[1:])
    return acc, m * _LOG2E, l


def _store(result, at, acc, m, l, exists):
    """Store acc [r, H], m and l [r] of the existing rows in the shapes of `_shapes` or `_states`."""
    if len(result) == 1:
        acc /= jnp.where(l == 0, 1.0, l)[:, None]
    else:
        plt.store(result[1].at[at], m / _LOG2E, mask=exists)
        plt.store(result[2].at[at], l, mask=exists)
    plt.store(result[0].at[(*at, slice(None))], acc.astype(result[0].dtype), mask=exists[:, None])


def _fold(part, tile, held, meets, q, scale: float, carry):
    """Return one online-softmax step of q [r, H] over a tile of slots; `held` [s], `meets` [r, s] are None for all."""
    acc, m, l = carry
    logits = _dot(q, _load(part.k, (*tile, slice(None)), held).astype(q.dtype), 1)
    if part.k_scale is not None:
        logits *= _load(part.k_scale, tile, held)[None, :]
    if meets is not None:
        # m is finite, so a masked weight is 2^-inf = 0 even in a row that has seen nothing yet.
        logits = jnp.where(meets, logits, -jnp.inf)
    m_new = jnp.maximum(m, jnp.max(logits, axis=1) * scale)
    p = jnp.exp2(logits * scale - m_new[:, None])
    decay = jnp.exp2(m - m_new)
    l = l * decay + jnp.sum(p, axis=1)
    if part.v_scale is not None:
        p *= _load(part.v_scale, tile, held)[None, :]
    values = _load(part.v, (*tile, slice(None)), held).astype(q.dtype)
    return acc * decay[:, None] + _dot(p.astype(q.dtype), values, 0), m_new, l


def _load(ref, at, held):
    """Load ref[at]; zeros without a load where `held` [s] is False."""
    if held is None:
        return plt.load(ref.at[at])
    return plt.load(ref.at[at], mask=held if len(at) == 3 else held[:, None], other=jnp.zeros((), ref.dtype))


def _dot(a, b, axis: int):
    """Multiply a [r, n] with axis `axis` of b, float32; float32 operands without tensor cores, whose TF32 has 10
    bits.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
