"""The running state of a softmax over parts: how partial attentions start, merge and end.

A state is `(acc [B,K,R,H], m [B,K,R], l [B,K,R])`, float32: m is the largest logit seen, l the sum of
exp(logit - m), acc the sum of the values under the same weights, not yet divided by l. Parts merge in any order, so
the compensation token, the ring, the sinks and a new chunk are computed apart (Milakov & Gimelshein,
arXiv 1805.02867). An empty part has m = NEG, l = 0; NEG is finite because inf - inf is NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

NEG = -1e30

State = tuple[
    Float32[jax.Array, "B K R H"],  # acc
    Float32[jax.Array, "B K R"],  # m
    Float32[jax.Array, "B K R"],  # l
]


def empty(q: jax.Array) -> State:
    """Return the state in which nothing was seen, for query rows q [B, K, R, H]."""
    m = jnp.full(q.shape[:3], NEG, jnp.float32)
    return jnp.zeros(q.shape, jnp.float32), m, jnp.zeros_like(m)


def compensation(
    q: Float[jax.Array, "B K R H"],
    k_mean: Float32[jax.Array, "B K 1 H"],
    v_mean: Float32[jax.Array, "B K 1 H"],
    n: Int[jax.Array, " B"],
    scale: float,
) -> State:
    """Return the state of one key, with logit bias ln n, that stands for n dropped tokens (RazorAttention, eq. 4 to 6).

    q [B,K,R,H]; k_mean, v_mean float32 [B,K,1,H], unread where n is 0; n int32 [B].
    """
    dropped = (n > 0)[:, None, None]
    # The means of an empty set are unused memory: keep them out of the arithmetic, before and after it.
    k_mean = jnp.where(dropped[..., None], k_mean, 0.0)
    v_mean = jnp.where(dropped[..., None], v_mean, 0.0)
    logits = jnp.sum(q.astype(jnp.float32) * k_mean, axis=-1) * scale
    logits += jnp.log(jnp.maximum(n, 1).astype(jnp.float32))[:, None, None]
    m = jnp.where(dropped, logits, NEG)
    return jnp.broadcast_to(v_mean, q.shape), m, jnp.broadcast_to(dropped, m.shape).astype(jnp.float32)


def finish(state: State, dtype: jnp.dtype) -> jax.Array:
    """Return acc / l as `dtype`; zero where nothing was seen."""
    acc, _, l = state
    return (acc / jnp.where(l == 0, 1.0, l)[..., None]).astype(dtype)
