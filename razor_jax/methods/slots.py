"""Slots: the state of most methods. S tokens of each KV head, valid ones first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int, Int32

from ..kernels import attention as kernel
from ..kernels.attention import State

if TYPE_CHECKING:
    from .base import Prompt

# Products in float32 on every device.
einsum = jax.tree_util.Partial(jnp.einsum, precision=lax.Precision.HIGHEST)

ALWAYS = jnp.inf  # score of a token that is kept whatever the others score


class Slots(flax.struct.PyTreeNode):
    """Kept tokens of a layer.

    Attributes:
      k, v: [B, K, S, H].
      valid: int32 [B, K], how many slots are used. They are a prefix.
      room: int32 [B, K], how many slots may be used.
      score: float32 [B, K, S], what a method remembers of each token; None if nothing.
      position: int32 [B, K, S], positions in the row; None if the method does not need them.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    room: jax.Array
    score: jax.Array | None = None
    position: jax.Array | None = None

    @property
    def used(self) -> Bool[jax.Array, "B K S"]:
        """Which slots hold a token."""
        return jnp.arange(self.k.shape[2], dtype=jnp.int32) < self.valid[..., None]


def best(
    scores: Float32[jax.Array, "B K T"], lengths: Int[jax.Array, " B"], slots: int
) -> tuple[Float32[jax.Array, "B K S"], Int32[jax.Array, "B K S"]]:
    """Return the highest scores of each head among its row's `lengths` tokens, falling, and their tokens.

    Among equal scores the earlier token comes first. Slots past a row's length are meaningless.
    """
    T = scores.shape[2]
    scores = jnp.where(jnp.arange(T, dtype=jnp.int32) < lengths[:, None, None], scores, -jnp.inf)
    if slots > T:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, slots - T)), constant_values=-jnp.inf)
    found, at = lax.top_k(scores, slots)
    return found, jnp.minimum(at, T - 1)


def take_tokens(x: Float[jax.Array, "B K T H"], at: Int[jax.Array, "B K S"]) -> Float[jax.Array, "B K S H"]:
    """Return the tokens `at` of each head."""
    return jnp.take_along_axis(x, at[..., None], axis=2)


def keep_best(prompt: Prompt, scores: Float32[jax.Array, "B K T"], room: Int[jax.Array, " B"], slots: int) -> Slots:
    """Return the `room` tokens of each row with the highest scores; all heads of a row keep as many."""
    return keep(prompt, best(scores, prompt.lengths, slots)[1], room)


def keep(prompt: Prompt, at: Int[jax.Array, "B K S"], room: Int[jax.Array, " B"], **extras: jax.Array) -> Slots:
    """Return the tokens `at` of each head; a row uses the first `room` slots, or fewer if its prompt is shorter."""
    room = jnp.minimum(room, at.shape[2])
    room, lengths = (jnp.broadcast_to(x[:, None], at.shape[:2]).astype(jnp.int32) for x in (room, prompt.lengths))
    k, v = (take_tokens(x, at) for x in (prompt.k, prompt.v))
    return Slots(k, v, jnp.minimum(room, lengths), room, **extras)


def read_slots(
    slots: Slots, q: Float[jax.Array, "B K R H"], scale: float, implementation: Any, state: State | None = None
) -> State:
    """Return the softmax state of query rows over the used slots, joined to `state` if there is one."""
    B, K, R, H = q.shape
    # Kernels take one length per row: every head becomes a row.
    if state is not None:
        state = cast(State, tuple(x.reshape(B * K, 1, *x.shape[2:]) for x in state))
    q, k, v = (x.reshape(B * K, 1, -1, H) for x in (q, slots.k, slots.v))
    found = kernel.attend(
        q, k, v, slots.valid.reshape(-1), scale=scale, state=state, return_state=True, implementation=implementation
    )
    acc, m, l = cast(State, found)
    return acc.reshape(B, K, R, H), m.reshape(B, K, R), l.reshape(B, K, R)


def merge(first: State, second: State) -> State:
    """Return the softmax state over two disjoint sets of keys."""
    m = jnp.maximum(first[1], second[1])
    one, other = (jnp.exp(state[1] - m) for state in (first, second))
    acc = first[0] * one[..., None] + second[0] * other[..., None]
    return acc, m, first[2] * one + second[2] * other


def step_slots(
    slots: Slots, q: Float[jax.Array, "B K G H"], k: Float[jax.Array, "B K H"], v: Float[jax.Array, "B K H"]
) -> tuple[Float32[jax.Array, "B K G H"], Float32[jax.Array, "B K G S"], Float32[jax.Array, "B K G"]]:
    """Attend from one token to the used slots and itself: output, weights on the slots, weight on itself."""
    q, k, v = (x.astype(jnp.float32) for x in (q / math.sqrt(q.shape[-1]), k, v))
    used = slots.used[:, :, None]
    logits = einsum("bkgh,bksh->bkgs", q, slots.k.astype(jnp.float32))
    logits = jnp.where(used, logits, kernel.NEG)
    own = jnp.sum(q * k[:, :, None], axis=-1)
    top = jnp.maximum(own, jnp.max(logits, axis=-1, initial=kernel.NEG))
    weights = jnp.where(used, jnp.exp(logits - top[..., None]), 0.0)
    own = jnp.exp(own - top)
    total = own + weights.sum(-1)
    weights, own = weights / total[..., None], own / total
    # An unused slot may hold anything, and 0 × NaN is NaN.
    values = jnp.where(slots.used[..., None], slots.v.astype(jnp.float32), 0.0)
    out = einsum("bkgs,bksh->bkgh", weights, values)
    return out + own[..., None] * v[:, :, None], weights, own


def put_slot(slots: Slots, at: Int[jax.Array, "B K"], k: jax.Array, v: jax.Array) -> Slots:
    """Return the slots with k, v [B, K, H] of a token in slot `at` of each head."""
    valid = jnp.maximum(slots.valid, at + 1)
    return slots.replace(k=write_slot(slots.k, at, k), v=write_slot(slots.v, at, v), valid=valid)


def write_slot(x: jax.Array, at: Int[jax.Array, "B K"], value: jax.Array) -> jax.Array:
    """Return x [B, K, S, …] with `value` [B, K, …] in slot `at` of each head."""
    here = jnp.arange(x.shape[2], dtype=jnp.int32) == at[..., None]
    here = here.reshape(*here.shape, *(1,) * (x.ndim - 3))
    return jnp.where(here, value[:, :, None].astype(x.dtype), x)


def next_slot(slots: Slots, scores: Float32[jax.Array, "B K S"]) -> Int32[jax.Array, "B K"]:
    """Return the slot of the next token: the first unused one, or, without room, the one with the lowest score."""
    lowest = jnp.argmin(jnp.where(slots.used, scores, jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(slots.valid < slots.room, slots.valid, lowest)
