"""Attention over the cache: attend first, then write.

Position p of a call sees the sinks, the ring as it was before the call, the compensation token of what had
been dropped before the call, and the call's own tokens up to p, unrounded. Only then are the call's tokens
written. One call with a whole prompt is therefore the paper's exact prefill, many small calls are streaming
prefill, a call of one token is a decode step: one operation.

On a mesh this is what each device does with its share (`attention_mesh.py`).
"""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from . import cache as kv
from .cache import Call, Group
from .kernels import attention as kernel
from .kernels.ordering import ordered_after
from .mesh import by_slot as attention_slots
from .mesh.by_slot import Split

# Up to so many tokens of a call are a part of attention's initial state, built by XLA; more are a kernel's own work.
FEW_TOKENS = 16


def attend(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K T H"],
    v: Float[jax.Array, "B K T H"],
    layer: tuple[Group, ...],
    call: Call,
    *,
    start: jax.Array | int,
    group_size: int,
    slopes: np.ndarray | jax.Array | None = None,
    split: Split = None,
) -> Float[jax.Array, "B K R H"]:
    """What queries of a call see: the layer's cache before the call ⊕ the call's tokens, causally.

    Args:
      q: [B, K, G·Tq, H], rows packed t-major, heads in held order.
      k, v: [B, K, T, H], all tokens of the call.
      layer: the layer's head groups before the call.
      call: lengths before the call and new tokens, int32 [B].
      start: index in the call of q's first token, an int or int32 scalar; q may be a chunk of the call.
      group_size: G.
      slopes: float32 [K, G] of a model with ALiBi, heads in held order.
      split: on a mesh, how devices that share heads share these queries; `start` is then of all their queries.

    Returns:
      [B, K, G·Tq, H] in q's type. Rows past a row's new tokens are finite and meaningless.
    """
    scale = 1.0 / math.sqrt(q.shape[-1])
    few = k.shape[2] <= FEW_TOKENS
    every, cached = slice(0, k.shape[1]), None
    if call.spec.shards > 1 and not call.fresh:
        cached = attention_slots.attend(q, layer, call, start=start, group_size=group_size, slopes=slopes, split=split)
    if call.spec.mesh is not None:
        start, slopes = attention_slots.of_this_device(q, start, group_size, slopes, split)
    at = call.length[:, None] + start + jnp.arange(q.shape[2] // group_size, dtype=jnp.int32)

    def own(heads, state, **options):
        return kernel.attend_causal(
            q[:, heads],
            k[:, heads],
            v[:, heads],
            call.new,
            start=start,
            group_size=group_size,
            scale=scale,
            state=state,
            slopes=None if slopes is None else jnp.asarray(slopes[heads], jnp.float32),
            **options,
        )

    if cached is not None:
        return cast(jax.Array, own(every, cached, implementation="xla" if few else call.spec.kernels))
    if call.fresh:
        return cast(jax.Array, own(every, None, implementation=call.spec.kernels))
    parts, first = [], 0
    for group in layer:
        heads = slice(first, first + group.k.shape[1])
        first = heads.stop
        rows, state = q[:, heads], None
        if group.k_mean is not None and group.v_mean is not None:
            state = kernel.compensation(rows, group.k_mean, group.v_mean, call.dropped, scale)
        if few:
            # A handful of keys is no work for a kernel: with the compensation token they are its initial state.
            state = cast(kernel.State, own(heads, state, return_state=True, implementation="xla"))
        alibi = None
        if slopes is not None:
            alibi = kernel.Alibi(jnp.asarray(slopes[heads], jnp.float32), at, kv.positions(group, call))
        valid = call.valid(group)
        parts.append(kernel.Part(rows, group.k, group.v, valid, state, group.k_scale, group.v_scale, alibi=alibi))
    cached = kernel.attend_groups(parts, scale=scale, return_state=not few, implementation=call.spec.kernels)
    if few:
        return cast(jax.Array, cached)
    return cast(jax.Array, own(every, cached, implementation=call.spec.kernels))


def attend_and_write(
    q,
    k,
    v,
    layer: tuple[Group, ...],
    call: Call,
    slopes: np.ndarray | None = None,
    group_size: int | None = None,
    split: Split = None,
) -> tuple[jax.Array, tuple[Group, ...]]:
    """A whole call at once: the attention output, and the layer with the call's tokens written."""
    group_size = group_size or q.shape[2] // k.shape[2]
    out = attend(q, k, v, layer, call, start=0, group_size=group_size, slopes=slopes, split=split)
    k, v = (ordered_after(x, out, call.length) for x in kv.bring(layer, k, v, call))
    return out, kv.write(layer, k, v, call)


def write_behind(x: jax.Array, k, v, layer: tuple[Group, ...], call: Call) -> tuple[jax.Array, tuple[Group, ...]]:
    """Write when everything has been read, which x says; and x, not before it is written: or a compiler may put the
    writes of all layers off to the end and keep every layer's K/V until then."""
    k, v = (ordered_after(a, x, call.length) for a in (k, v))
    layer = kv.write(layer, *kv.bring(layer, k, v, call), call)
    for group in layer:
        x = ordered_after(ordered_after(x, group.k, call.length), group.v, call.length)
    return x, layer
