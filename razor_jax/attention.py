"""Attention over the cache: attend first, then write.

Position p of a call sees the sinks, the ring as it was before the call, the compensation token of what had
been dropped before the call, and the call's own tokens up to p, unrounded. Only then are the call's tokens
written. One call with a whole prompt is therefore the paper's exact prefill, many small calls are streaming
prefill, a call of one token is a decode step: one operation.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from . import cache as kv
from .cache import AttentionMetadata, Group
from .kernels import attention as kernel
from .kernels.cache_write import ordered_after

# A call of at most this many tokens joins attention's initial state, built by XLA; a longer one is a kernel's pass.
FEW_TOKENS = 16

Slopes = np.ndarray | jax.Array | None


def attend(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K T H"],
    v: Float[jax.Array, "B K T H"],
    layer: tuple[Group, ...],
    meta: AttentionMetadata,
    *,
    start: jax.Array | int,
    group_size: int,
    slopes: Slopes = None,
) -> Float[jax.Array, "B K R H"]:
    """Attend to the layer's cache as it was before the call and, causally, to the call's tokens.

    Args:
      q: [B, K, G·Tq, H], rows packed t-major, heads in the order of the groups.
      k, v: [B, K, T, H], all tokens of the call.
      layer: the layer's head groups before the call.
      meta: lengths before the call and of the call, int32 [B].
      start: index in the call of q's first token, an int or int32 scalar; q may be a chunk of the call.
      group_size: G.
      slopes: float32 [K, G] of a model with ALiBi, heads in the order of the groups.

    Returns:
      [B, K, G·Tq, H] in q's type. Rows past a row's new tokens are finite and meaningless.
    """
    own = functools.partial(attend_own, meta=meta, start=start, group_size=group_size)
    if meta.fresh:
        return cast(jax.Array, own(q, k, v, slopes=slopes, implementation=meta.spec.kernels))
    few = k.shape[2] <= FEW_TOKENS
    positions = meta.length[:, None] + start + jnp.arange(q.shape[2] // group_size, dtype=jnp.int32)
    parts = []
    for group, heads in kv.by_group(layer):
        rows, biases = q[:, heads], None if slopes is None else slopes[heads]
        state = _compensation(rows, group, meta)
        if few:
            # A handful of keys is not worth a kernel: with the compensation token they are its initial state.
            new = rows, k[:, heads], v[:, heads]
            joined = own(*new, state=state, slopes=biases, return_state=True, implementation="xla")
            state = cast(kernel.State, joined)
        parts.append(_part(rows, group, meta, state, biases, positions))
    scale = 1.0 / math.sqrt(q.shape[-1])
    cached = kernel.attend_groups(parts, scale=scale, return_state=not few, implementation=meta.spec.kernels)
    if not few:
        cached = own(q, k, v, state=cached, slopes=slopes, implementation=meta.spec.kernels)
    return cast(jax.Array, cached)


def attend_own(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    meta: AttentionMetadata,
    start: jax.Array | int,
    group_size: int,
    slopes: Slopes,
    **options: Any,
) -> jax.Array | kernel.State:
    """Attend causally to the call's own tokens; arguments as in `attend`, options as in `kernels.attend_causal`."""
    biases = None if slopes is None else jnp.asarray(slopes, jnp.float32)
    scale = 1.0 / math.sqrt(q.shape[-1])
    return kernel.attend_causal(
        q, k, v, meta.new, start=start, group_size=group_size, scale=scale, slopes=biases, **options
    )


def _compensation(q: jax.Array, group: Group, meta: AttentionMetadata) -> kernel.State | None:
    """Return the state of having seen the compensation token, None where the group has none."""
    if group.k_mean is None or group.v_mean is None:
        return None
    return kernel.compensation(q, group.k_mean, group.v_mean, meta.dropped, 1.0 / math.sqrt(q.shape[-1]))


def _part(
    q: jax.Array,
    group: Group,
    meta: AttentionMetadata,
    state: kernel.State | None,
    slopes: Slopes,
    positions: jax.Array,
) -> kernel.Part:
    """Return the kernel's view of one head group; `positions` int32 [B, T] of the queries matter with ALiBi only."""
    alibi = None
    if slopes is not None:
        alibi = kernel.Alibi(jnp.asarray(slopes, jnp.float32), positions, kv.positions(group, meta))
    return kernel.Part(q, group.k, group.v, meta.valid(group), state, group.k_scale, group.v_scale, group.table, alibi)


def attend_and_write(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K T H"],
    v: Float[jax.Array, "B K T H"],
    layer: tuple[Group, ...],
    meta: AttentionMetadata,
    slopes: Slopes = None,
) -> tuple[jax.Array, tuple[Group, ...]]:
    """Return the attention output of a whole call, and the layer with the call's tokens written."""
    out = attend(q, k, v, layer, meta, start=0, group_size=q.shape[2] // k.shape[2], slopes=slopes)
    k, v = (ordered_after(x, out, meta.length) for x in (k, v))
    return out, kv.write(layer, k, v, meta)


def write_after(
    x: jax.Array, k: jax.Array, v: jax.Array, layer: tuple[Group, ...], meta: AttentionMetadata
) -> tuple[jax.Array, tuple[Group, ...]]:
    """Write the call's tokens once x is computed, and return x, ordered after the write, and the layer.

    Without this order a compiler may delay the writes of all layers to the end, and keep every layer's K/V until then.
    """
    k, v = (ordered_after(a, x, meta.length) for a in (k, v))
    layer = kv.write(layer, k, v, meta)
    return ordered_after_write(x, layer, meta), layer


def ordered_after_write(x: jax.Array, layer: tuple[Group, ...], meta: AttentionMetadata) -> jax.Array:
    """Return x, ordered after the arrays of `layer`."""
    for group in layer:
        x = ordered_after(ordered_after(x, group.k, meta.length), group.v, meta.length)
    return x
