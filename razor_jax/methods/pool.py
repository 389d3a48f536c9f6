"""Pool: one set of slots for all KV heads of a layer, so that heads keep different numbers of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int

from ..kernels import attention as kernel
from ..kernels.attention import State
from .base import CacheMethod, Prompt
from .slots import ALWAYS, einsum


class Pool(flax.struct.PyTreeNode):
    """Kept tokens of a layer, in any order.

    Attributes:
      k, v: [B, P, H].
      owner: int8 [B, P], the KV head of each slot, in the stored order.
      valid: int32 [B], how many slots are used. They are a prefix.
    """

    k: jax.Array
    v: jax.Array
    owner: jax.Array
    valid: jax.Array


def fill_pool(prompt: Prompt, scores: Float32[jax.Array, "B K T"], room: Int[jax.Array, " B"], slots: int) -> Pool:
    """Return the `room` tokens of each row with the highest scores over all heads, in `slots` slots."""
    B, K, T, H = prompt.k.shape
    valid = jnp.minimum(jnp.minimum(room, K * prompt.lengths), slots).astype(jnp.int32)
    scores = jnp.where(prompt.valid[:, None], scores, -jnp.inf).reshape(B, K * T)
    scores = jnp.pad(scores, ((0, 0), (0, max(0, slots - K * T))), constant_values=-jnp.inf)
    at = jnp.minimum(lax.top_k(scores, slots)[1], K * T - 1)
    k, v = (jnp.take_along_axis(x.reshape(B, K * T, H), at[..., None], axis=1) for x in (prompt.k, prompt.v))
    return Pool(k, v, (at // T).astype(jnp.int8), valid)


def keep_first(
    scores: Float32[jax.Array, "B K T"],
    valid: Bool[jax.Array, "B T"],
    count: Int[jax.Array, "B k"],
) -> Float32[jax.Array, "B K T"]:
    """Return the scores with the highest `count` of each head raised to `ALWAYS`."""
    return jnp.where(rank(scores, valid) < count[..., None], ALWAYS, scores)


def rank(scores: Float32[jax.Array, "B K T"], valid: Bool[jax.Array, "B T"]) -> Int[jax.Array, "B K T"]:
    """Return each token's place in its head, 0 for the highest score; the earlier of equal scores comes first."""
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)


def read_pool(pool: Pool, q: Float[jax.Array, "B K R H"], scale: float) -> State:
    """Return the softmax state of query rows over the slots of their own head."""
    K, P = q.shape[1], pool.k.shape[1]
    used = jnp.arange(P, dtype=jnp.int32) < pool.valid[:, None]
    own = (pool.owner[:, None] == jnp.arange(K, dtype=jnp.int8)[:, None]) & used[:, None]  # [B, K, P]
    mask = own[:, :, None]
    k, v = (jnp.where(used[..., None], x, 0).astype(jnp.float32) for x in (pool.k, pool.v))
    logits = jnp.where(mask, einsum("bkrh,bph->bkrp", q.astype(jnp.float32), k) * scale, kernel.NEG)
    m = jnp.max(logits, axis=-1)
    weights = jnp.where(mask, jnp.exp(logits - m[..., None]), 0.0)
    return cast(State, (einsum("bkrp,bph->bkrh", weights, v), m, weights.sum(axis=-1)))


@dataclasses.dataclass(frozen=True)
class PoolMethod(CacheMethod):
    """A method whose state of a layer is a pool."""

    def read(self, state: Pool, q: Float[jax.Array, "B K R H"], scale: float, implementation: Any) -> State:
        """Return the softmax state over each head's own slots. Runs on XLA."""
        return read_pool(state, q, scale)
