"""Verification of drafted tokens: one call that attends as decode steps do, and a write of the accepted tokens.

A call of `functional.extend` sees the cache as it was before the call. Here each token sees what its own decode step
would see: earlier tokens of the call rounded to the cache's type, a ring without the tokens that they evict, and a
compensation token into which those are folded. Nothing is written until the caller knows how many tokens are accepted,
because a folded token cannot be taken back.

For one device, without ALiBi and other cache methods. The draft is at most as long as the shortest ring.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int

from .. import cache as kv
from ..cache import AttentionMetadata, Group, KVCache
from ..functional import Ids, extend_known
from ..kernels import attention as kernel
from ..kernels.cache_write import dequantize, newest_positions, quantize, ring_slot
from ..models import rope
from ..models.config import ModelConfig
from ..models.transformer import Block
from ..params import Params

Tokens = tuple[tuple[jax.Array, jax.Array], ...]  # k, v [B, K, T, H] of a call, by layer


def verify(
    params: Params, cache: KVCache, tokens: Int[Ids, "B T"], lengths: Int[Ids, " B"]
) -> tuple[Float32[jax.Array, "B T V"], Tokens]:
    """Return the logits of decode steps on tokens int32 [B, T], and the keys and values to `commit`.

    The cache stays as it is. Logits past a row's `lengths` int32 [B] are meaningless.
    """
    logits, called = extend_known(params, cache, tokens, lengths, "all", fresh=False, layer=_layer)
    assert logits is not None
    return logits, called.layers


def commit(cache: KVCache, tokens: Tokens, accepted: Int[jax.Array, " B"]) -> KVCache:
    """Return the cache with the first `accepted` int32 [B] tokens of each row written, as decode steps write them."""

    # Token by token: a write of several tokens passes over the whole ring.
    def write(step, cache):
        meta, begun = kv.begin(cache, (step < accepted).astype(jnp.int32), 1)
        new = (tuple(lax.dynamic_slice_in_dim(x, step, 1, axis=2) for x in layer) for layer in tokens)
        layers = tuple(kv.write(layer, k, v, meta) for layer, (k, v) in zip(cache.layers, new, strict=True))
        return begun.replace(layers=layers)

    return lax.fori_loop(0, jnp.max(accepted), write, cache)


@functools.partial(jax.jit, static_argnames=("block",))
def _layer(block: Block, weights: Any, slopes: None, x: jax.Array, layer: tuple[Group, ...], meta: AttentionMetadata):
    """Run one layer over x [B, T, D]: return the new x, and the call's k and v."""

    def attend(q, k, v, state):
        return attend_as_decode(q, k, v, state, meta), (k, v)

    tables = _tables(block.config, meta.length, x.shape[1])
    return block.apply({"params": weights}, x, tables, attend, layer)


def _tables(config: ModelConfig, length: jax.Array, T: int) -> rope.Tables:
    """Return the rotary tables of T decode steps after `length` int32 [B] tokens."""
    positions = (length[:, None] + jnp.arange(T, dtype=jnp.int32)).reshape(-1, 1)
    cos, sin = rope.tables(config.rope, config.head_dim, positions, positions[:, 0] + 1)
    return cos.reshape(len(length), T, -1), sin.reshape(len(length), T, -1)


def attend_as_decode(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K T H"],
    v: Float[jax.Array, "B K T H"],
    layer: tuple[Group, ...],
    meta: AttentionMetadata,
) -> Float[jax.Array, "B K R H"]:
    """Attend from each token of a call as its decode step does.

    Args:
      q: [B, K, G·T, H], rows packed t-major, heads in the order of the groups.
      k, v: [B, K, T, H], the tokens of the call.
      layer: the layer's head groups before the call.
      meta: lengths before the call, int32 [B].

    Returns:
      [B, K, G·T, H] in q's type.
    """
    T, scale = k.shape[2], 1.0 / math.sqrt(q.shape[-1])
    options: dict[str, Any] = {"group_size": q.shape[2] // T, "scale": scale}
    own = meta.length * 0 + T
    step = jnp.arange(T, dtype=jnp.int32)
    itself, earlier = (jnp.broadcast_to(x, (len(own), T, T)) for x in (step[:, None] == step, step[:, None] > step))
    out = []
    for group, heads in kv.by_group(layer):
        rows, new_k, new_v = q[:, heads], k[:, heads], v[:, heads]
        (cached_k, k_scale), (cached_v, v_scale) = (quantize(x, group.k.dtype) for x in (new_k, new_v))
        state = _compensation(rows, group, meta, T)
        read_back = kernel.Part(rows, cached_k, cached_v, own, state, k_scale, v_scale)
        state = cast(kernel.State, kernel.attend_visible(read_back, earlier, return_state=True, **options))
        unrounded = kernel.Part(rows, new_k, new_v, own, state)
        state = cast(kernel.State, kernel.attend_visible(unrounded, itself, return_state=True, **options))
        part = kernel.Part(rows, group.k, group.v, meta.valid(group), state, group.k_scale, group.v_scale)
        if group.windowed:
            out.append(kernel.attend_visible(part, _in_ring(group, meta, T), **options))
        else:
            out.append(kernel.attend_groups([part], scale=scale, implementation=meta.spec.kernels))
    return jnp.concatenate(out, axis=1)


def _in_ring(group: Group, meta: AttentionMetadata, T: int) -> jax.Array:
    """Return which slots of a windowed group the earlier tokens of the call do not evict, bool [B, T, S]."""
    window, sinks = meta.ring(group)
    assert window is not None
    position = newest_positions(group.k.shape[2], meta.length, window, sinks)[:, None]
    token = meta.length[:, None] + jnp.arange(T, dtype=jnp.int32)
    return (position < sinks) | (position >= (token - window[:, None])[..., None])


def _compensation(q: jax.Array, group: Group, meta: AttentionMetadata, T: int) -> kernel.State | None:
    """Return the state of having seen the compensation token of each token's step, None where the group has none."""
    if group.k_mean is None or group.v_mean is None:
        return None
    B, K, _, H = q.shape
    n, k_mean, v_mean = _means(group, meta, T)
    # Steps become rows.
    rows = q.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(B * T, K, -1, H)
    k_mean, v_mean = (x.swapaxes(1, 2).reshape(B * T, K, 1, H) for x in (k_mean, v_mean))
    state = kernel.compensation(rows, k_mean, v_mean, n.reshape(-1), 1.0 / math.sqrt(H))
    acc, m, l = (x.reshape(B, T, K, *x.shape[2:]).swapaxes(1, 2) for x in state)
    return acc.reshape(q.shape), m.reshape(q.shape[:3]), l.reshape(q.shape[:3])


def _means(group: Group, meta: AttentionMetadata, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return n int32 [B, T] and the means float32 [B, K, T, H] before each of T decode steps."""
    ring, sinks = meta.ring(group)
    assert ring is not None
    window = ring[:, None]
    position = meta.length[:, None] + jnp.arange(T, dtype=jnp.int32)
    n = kv.dropped(meta.spec, position, window)
    slots = jnp.minimum(ring_slot(position, window, sinks), group.k.shape[2] - 1)
    evicts = (position >= sinks + window)[:, None, :, None]
    count = jnp.maximum(n, 1).astype(jnp.float32)[:, None, :, None]
    share = n[:, None, :1, None] / count

    def fold(mean, x, scale):
        evicted = jnp.take_along_axis(x, slots[:, None, :, None], axis=2)
        scale = None if scale is None else jnp.take_along_axis(scale, slots[:, None, None, :], axis=3)
        evicted = jnp.where(evicts, dequantize(evicted, scale), 0.0)
        total = jnp.cumsum(evicted, axis=2) - evicted
        return jnp.where(share > 0, mean, 0.0) * share + total / count

    return n, fold(group.k_mean, group.k, group.k_scale), fold(group.v_mean, group.v, group.v_scale)
