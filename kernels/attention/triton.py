"""Blockwise attention as one Pallas-Triton kernel, for NVIDIA GPUs from Ampere on.

A program takes a block of query rows of one KV head and walks over its share of the slots: `visible_slots` says where
the masks begin and where the loop ends. A few query rows (decode) make too few programs for the chip. Then `splits`
programs share the slots of a row, in equal parts of the row's real length, and a second kernel merges their states.
Caches [B, K, S, H] are read in place. Masked slots are not loaded, so S may be any number.

Pallas-Triton is deprecated since JAX 0.11. All code that needs it is in this file; without it `unsupported` says so.
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
from .launch import LaunchOptions, visible_slots
from .part import Part
from .state import NEG, State

try:
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt: Any = None

_HEAD_WIDTHS = (64, 128)
_TYPES = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))
_SMALLEST = 16  # the least query rows and slots of a tensor core product
_FEW_ROWS = 64
_MULTIPROCESSORS = 132  # of H100 and H200; A100 has 108, B200 148, which is close enough
_WAVES = 4  # programs per multiprocessor in decode
# Blocks, and slots per query row, of the shortest split: its states are then a quarter of its bytes of bfloat16 slots.
_SHORTEST_SPLIT = 4, 8
_MERGED = 32  # splits merged at once
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Query rows and slots of a tile (powers of two, at least 16), and how many programs share a row's slots."""

    rows: int
    slots: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


def unsupported(q: Any, k: Any, v: Any) -> str | None:
    """Return why the kernel cannot run on q [B,K,R,H] and k, v [B,K,S,H], or None if it can."""
    if plt is None:
        return f"JAX {jax.__version__} has no Pallas-Triton"
    capability = _compute_capability()
    if capability < 8.0:
        return f"the GPU has compute capability {capability}: Triton's kernels need 8.0 (NVIDIA Ampere) or more"
    H, types = q.shape[-1], (*_TYPES, *EIGHT_BIT)
    if H not in _HEAD_WIDTHS:
        return f"head width H={H}: the kernel reads caches of H={' or '.join(map(str, _HEAD_WIDTHS))}"
    if q.dtype not in _TYPES:
        return f"q is {q.dtype}: the kernel takes {', '.join(map(str, _TYPES))}"
    if k.dtype != v.dtype or k.dtype not in types:
        return f"k is {k.dtype} and v is {v.dtype}: the kernel takes both as one of {', '.join(map(str, types))}"
    if k.dtype == INT8 and q.dtype == jnp.float16:
        return "k is int8 and q is float16, whose range is too small for weights times scales"
    if k.dtype == FP8 and capability < 8.9:
        return f"k is float8_e4m3fn: the GPU has compute capability {capability}, and converting float8 needs 8.9"
    if k.dtype in EIGHT_BIT and 2**31 <= k.size <= 2**32:
        return f"k has {k.size} elements of 8 bits: Pallas-Triton addresses 2 to 4 GiB by a signed 32-bit offset"
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

    If other head groups share the launch, `heads` is the number of heads of S slots that is as much work as all groups.

    Raises ValueError if a page of `page` slots is not whole tiles of at least 16 slots.
    """
    few = R <= _FEW_ROWS
    rows = max(_SMALLEST, pl.next_power_of_2(R)) if few else 128
    slots, warps = (128 if few and H == 64 else 64), (4 if few else 8)
    if jnp.dtype(dtype).itemsize == 4:  # multiplied without tensor cores, which takes many more registers
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
    """Attend to slots [0, lengths[b]); see `Part`."""
    (result,) = _run(LaunchOptions(None, scale, return_state, interpret), (part,), None, blocks)
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
    """Attend causally to the tokens of a chunk; see `Part`."""
    start = jnp.asarray(start, jnp.int32).reshape(1)
    (result,) = _run(LaunchOptions(group_size, scale, return_state, interpret), (part,), start, blocks)
    return result


def attend_groups(
    parts: Sequence[Part], *, scale: float, return_state: bool = False, interpret: Any = False
) -> Float[jax.Array, "B K R H"] | State:
    """Run `attend` on the head groups of a layer in one launch, and concatenate on K in the order of `parts`.

    Each part has its own K and S; B, R, H and the types are the same for all.
    """
    results = _run(LaunchOptions(None, scale, return_state, interpret), tuple(parts), None, None)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


def _run(options: LaunchOptions, parts: tuple[Part, ...], start, blocks: Blocks | None) -> list[jax.Array | State]:
    """Return the output or state of each part; `start` is int32 [1] if the call is causal."""
    B, _, R, H = parts[0].q.shape
    work = B * sum(part.q.shape[1] * _slots(part)[1] for part in parts)
    plans, kernel_parts, shapes = [], [], []
    for part in parts:
        K, (page, S) = part.q.shape[1], _slots(part)
        plan = blocks or choose_blocks(pl.cdiv(work, S), R, S, H, _multiplied_as(part), page)
        split = plan.splits > 1
        plans.append(plan)
        k_scale, v_scale = (x if x is None else x[:, :, 0] for x in (part.k_scale, part.v_scale))
        # The initial state must count once: if programs share a row, the merge adds it.
        state = None if split else part.state
        kernel_parts.append(part._replace(state=state, k_scale=k_scale, v_scale=v_scale))
        shapes.append(_states((B, K, plan.splits, R, H)) if split else _shapes(options, part.q))
    (results,) = pl.pallas_call(
        functools.partial(_razor_attend, options=options, plans=tuple(plans)),
        grid=(sum(_programs(p.q.shape, plan) for p, plan in zip(parts, plans, strict=True)), B),
        out_shape=(tuple(shapes),),
        compiler_params=plt.CompilerParams(num_warps=plans[0].warps, num_stages=plans[0].stages),
        interpret=options.interpret,
    )(tuple(kernel_parts), start)
    merged = []
    for part, plan, result in zip(parts, plans, results, strict=True):
        result = _merge(options, result, part) if plan.splits > 1 else result
        merged.append(result if options.return_state else result[0])
    return merged


def _shapes(options: LaunchOptions, q: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes that the last kernel writes: the output alone, or acc, m and l."""
    if not options.return_state:
        return (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    return _states(q.shape)


def _states(shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    line = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return jax.ShapeDtypeStruct(shape, jnp.float32), line, line


def _merge(options: LaunchOptions, states, part: Part):
    """Merge the states of the splits, acc [B,K,splits,R,H], m and l [B,K,splits,R], and the initial state."""
    B, K, R, _ = part.q.shape
    (result,) = pl.pallas_call(
        _razor_merge,
        grid=(R, K, B),
        out_shape=(_shapes(options, part.q),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=options.interpret,
    )(states, part.state)
    return result


def _slots(part: Part) -> tuple[int | None, int]:
    """Return the slots of a page, None without pages, and the most slots that a row can have."""
    if part.block_table is None:
        return None, part.k.shape[2]
    return part.k.shape[2], part.k.shape[2] * part.block_table.shape[1]


def _multiplied_as(part: Part) -> jnp.dtype:
    """Return the type of the operands of the products."""
    return part.q.dtype if part.k.dtype in EIGHT_BIT else jnp.promote_types(part.q.dtype, part.k.dtype)


def _programs(q_shape: tuple[int, ...], plan: Blocks) -> int:
    """Return how many programs a batch row has: KV heads × splits × blocks of query rows."""
    return q_shape[1] * plan.splits * pl.cdiv(q_shape[2], plan.rows)


def _razor_attend(parts, start, results, *, options: LaunchOptions, plans: tuple[Blocks, ...]):
    """Run one program: find its head group, and fold its share of the slots."""
    program, b = pl.program_id(0), pl.program_id(1)
    if len(parts) == 1:
        _program(options, plans[0], parts[0], start, results[0], program, b)
        return
    first = 0
    for part, plan, result in zip(parts, plans, results, strict=True):
        end = first + _programs(part.q.shape, plan)
        run = functools.partial(_program, options, plan, part, start, result, program - first, b)
        pl.when((program >= first) & (program < end))(run)
        first = end


def _program(options: LaunchOptions, plan: Blocks, part, start, result, program, b):
    """Fold one split of the slots into one block of query rows of one head, and store the result."""
    _, _, R, H = part.q.shape
    row_blocks = pl.cdiv(R, plan.rows)
    rest = lax.div(program, row_blocks)
    # Under a causal mask the last rows see most, so they start first.
    i = row_blocks - 1 - lax.rem(program, row_blocks)
    h, split = lax.div(rest, plan.splits), lax.rem(rest, plan.splits)
    length = jnp.clip(part.lengths[b], 0, _slots(part)[1])
    full, end = visible_slots(options.group_size, plan.rows, R, i, length, None if start is None else start[0])
    # Equal parts of the blocks that this row fills, not of all blocks of the cache.
    blocks = pl.cdiv(end, plan.slots)
    begin, stop = (lax.div((split + n) * blocks, plan.splits) for n in (0, 1))
    masked = jnp.clip(lax.div(full, plan.slots), begin, stop)

    rows = pl.ds(i * plan.rows, plan.rows)
    row = i * plan.rows + lax.iota(jnp.int32, plan.rows)
    exists = row < R
    q = plt.load(part.q.at[b, h, rows, :], mask=exists[:, None], other=0).astype(_multiplied_as(part))

    def fold(block, carry, masks: bool):
        first = block * plan.slots
        sees = valid = None
        if masks:
            slot = first + lax.iota(jnp.int32, plan.slots)
            valid = slot < length
            sees = _sees(options.group_size, row, slot, valid, start)
        return _fold(part, _tile(part, b, h, first, plan.slots), valid, sees, q, options.scale * _LOG2E, carry)

    carry = _begin(part, (b, h, rows), exists, plan.rows, H)
    carry = lax.fori_loop(begin, masked, functools.partial(fold, masks=False), carry)
    acc, m, l = lax.fori_loop(masked, stop, functools.partial(fold, masks=True), carry)

    at = (b, h, split, rows) if plan.splits > 1 else (b, h, rows)
    _store(result, at, acc, m, l, exists)


def _razor_merge(states, state, result):
    """Merge the splits of one query row, _MERGED at a time. Here m counts in powers of e."""
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


def _sees(group_size: int | None, row, slot, valid, start):
    """Return which row [r] sees which slot [s]: bool [r, s], or [1, s] if all rows are alike."""
    if group_size is None:
        return valid[None, :]
    # slot <= start + row // G, without dividing a vector.
    return valid[None, :] & (((slot - start[0]) * group_size)[None, :] <= row[:, None])


def _tile(part, b, h, first, slots: int):
    """Return the index of the tile at slot `first`: page or batch row, head, slots. Pages are whole tiles."""
    if part.block_table is None:
        return b, h, pl.ds(first, slots)
    page = part.k.shape[2]
    return part.block_table[b, lax.div(first, page)], h, pl.ds(lax.rem(first, page), slots)


def _begin(part, at, exists, rows: int, H: int):
    """Return the initial acc [r, H], m and l [r] of a program. m counts in powers of two, as the exponentials do."""
    if part.state is None:
        acc, m, l = jnp.zeros((rows, H), jnp.float32), jnp.full((rows,), NEG), jnp.zeros((rows,), jnp.float32)
    else:
        acc = plt.load(part.state[0].at[(*at, slice(None))], mask=exists[:, None], other=0.0)
        m, l = (plt.load(x.at[at], mask=exists, other=0.0) for x in part.state[1:])
    return acc, m * _LOG2E, l


def _store(result, at, acc, m, l, exists):
    """Store the output, or acc [r, H], m and l [r], of the rows that exist."""
    if len(result) == 1:
        acc /= jnp.where(l == 0, 1.0, l)[:, None]
    else:
        plt.store(result[1].at[at], m / _LOG2E, mask=exists)
        plt.store(result[2].at[at], l, mask=exists)
    plt.store(result[0].at[(*at, slice(None))], acc.astype(result[0].dtype), mask=exists[:, None])


def _fold(part, tile, valid, sees, q, scale: float, carry):
    """Return acc, m and l after one online-softmax step of q [r, H] over a tile of slots.

    `valid` [s] marks the slots that hold a token, `sees` [r, s] the rows that see them; None for all.
    """
    acc, m, l = carry
    logits = _dot(q, _load(part.k, (*tile, slice(None)), valid).astype(q.dtype), 1)
    if part.k_scale is not None:
        logits *= _load(part.k_scale, tile, valid)[None, :]
    if sees is not None:
        # m is finite, so a masked weight is 2^-inf = 0 even in a row that has seen nothing yet.
        logits = jnp.where(sees, logits, -jnp.inf)
    m_new = jnp.maximum(m, jnp.max(logits, axis=1) * scale)
    p = jnp.exp2(logits * scale - m_new[:, None])
    decay = jnp.exp2(m - m_new)
    l = l * decay + jnp.sum(p, axis=1)
    if part.v_scale is not None:
        p *= _load(part.v_scale, tile, valid)[None, :]
    values = _load(part.v, (*tile, slice(None)), valid).astype(q.dtype)
    return acc * decay[:, None] + _dot(p.astype(q.dtype), values, 0), m_new, l


def _load(ref, at, valid):
    """Load ref[at]. Where `valid` [s] is False nothing is loaded, and the result is zero."""
    if valid is None:
        return plt.load(ref.at[at])
    return plt.load(ref.at[at], mask=valid if len(at) == 3 else valid[:, None], other=jnp.zeros((), ref.dtype))


def _dot(a, b, axis: int):
    """Contract a [r, n] with axis `axis` of b, in float32.

    float32 operands are multiplied without tensor cores, whose TF32 has 10 bits.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
