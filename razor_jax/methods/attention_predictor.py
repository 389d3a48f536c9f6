"""AttentionPredictor: everything stays, and a small network says which blocks of the prompt a step reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from ..kernels import attention as kernel
from ..kernels.attention import State
from .base import Prompt, QueryRows
from .learned import LearnedMethod
from .slots import einsum, merge

BLOCK = 16  # keys of a block, which is read as a whole
HISTORY = 64  # rows that the network sees
EVERY = 5  # steps after which the history gets a row of all blocks


class Selectable(flax.struct.PyTreeNode):
    """A layer of a prompt, whole.

    Attributes:
      k, v: [B, K, P, H], P a multiple of `BLOCK`.
      length: int32 [B], tokens of the prompt.
      room: int32 [B], tokens that a step may read.
      history: bfloat16 [B, K, G, HISTORY, P / BLOCK], largest weight of each block in the newest rows.
      steps: int32 [B], later tokens so far.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    room: jax.Array
    history: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class AttentionPredictor(LearnedMethod):
    """Read the blocks of the prompt whose attention is predicted to be largest (arXiv 2502.04077, section 4).

    It selects: all keys and values stay, and the budget is what a step reads of them; reports count the others as
    dropped. From the newest 64 rows of attention weights, pooled over blocks of 16 keys, a convolutional network
    predicts the next row of each query head. The query heads of a KV head read the same blocks. Later tokens are always
    read. Every fifth step, the history gets its row from all blocks, otherwise from those that were read.

    Attributes:
      sinks, local: first and newest tokens of the prompt that are always read, each a quarter of the room at most.
    """

    sinks: int = 64
    local: int = 64

    name: ClassVar = "AttentionPredictor"
    source: ClassVar = "arXiv 2502.04077"
    kind: ClassVar = "selects"
    key: ClassVar = "predictor"
    by_head: ClassVar = False
    observes: ClassVar = HISTORY
    follows: ClassVar = True

    def start(self, prompt: Prompt) -> Any:
        """Return an empty history."""
        B, K = prompt.k.shape[:2]
        return jnp.zeros((B, K, prompt.config.group_size, HISTORY, -(-prompt.longest // BLOCK)), jnp.float32)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Write the pooled rows of a chunk to their places in the history."""
        place = rows.at - (prompt.lengths[:, None] - HISTORY)
        here = (place[..., None] == jnp.arange(HISTORY, dtype=jnp.int32)) & rows.counted[..., None]
        weights = _fit(rows.weights(prompt.k), seen.shape[-1] * BLOCK, axis=4)
        return seen + einsum("bcw,bkcgn->bkgwn", here.astype(jnp.float32), pool(weights))

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Selectable:
        """Return the whole layer."""
        k, v = (_fit(x, seen.shape[-1] * BLOCK, axis=2) for x in (prompt.k, prompt.v))
        room = jnp.clip(room, 1, slots)
        return Selectable(k, v, prompt.lengths, room, seen.astype(jnp.bfloat16), jnp.zeros_like(room))

    def follow(self, state: Selectable, q: Float[jax.Array, "B K G H"], others: State) -> tuple[State, Selectable]:
        """Return the softmax state of a later token over chosen blocks and `others`, and the new history."""
        B, K, _, H = q.shape
        blocks, size = state.history.shape[-1], self._blocks(state)
        chosen = self._choose(predict(self.arrays, state.history), state)  # [B, K, n]
        at = lax.top_k(jnp.where(chosen, 1.0, 0.0), size)[1]
        read = jnp.take_along_axis(chosen, at, axis=2)
        tokens = at[..., None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        mask = read[..., None] & (tokens < state.length[:, None, None, None])
        k, v = (
            jnp.take_along_axis(x.reshape(B, K, blocks, BLOCK, H), at[..., None, None], axis=2).astype(jnp.float32)
            for x in (state.k, state.v)
        )
        q = q.astype(jnp.float32) * H**-0.5
        logits = jnp.where(mask[:, :, None], einsum("bkgh,bkmth->bkgmt", q, k), kernel.NEG)
        m = jnp.max(logits, axis=(3, 4))
        weights = jnp.where(mask[:, :, None], jnp.exp(logits - m[..., None, None]), 0.0)
        v = jnp.where(mask[..., None], v, 0.0)
        seen = merge((einsum("bkgmt,bkmth->bkgh", weights, v), m, weights.sum(axis=(3, 4))), others)
        log_total = seen[1] + jnp.log(seen[2])
        row = jnp.exp(jnp.max(logits, axis=4) - log_total[..., None])
        row = einsum("bkgm,bkmn->bkgn", row, (at[..., None] == jnp.arange(blocks)).astype(jnp.float32))
        whole = (state.steps % EVERY == EVERY - 1)[:, None, None, None]
        row = lax.cond(jnp.any(whole), lambda: jnp.where(whole, _whole_row(state, q, log_total), row), lambda: row)
        history = jnp.concatenate([state.history[:, :, :, 1:], row[:, :, :, None].astype(jnp.bfloat16)], axis=3)
        return seen, state.replace(history=history, steps=state.steps + 1)

    def _blocks(self, state: Selectable) -> int:
        """Return the most blocks that a step reads of any row."""
        longest = state.k.shape[2]
        tokens = self.slots(longest, 1)
        return min(state.history.shape[-1], -(-tokens // BLOCK))

    def _choose(self, predicted: Float32[jax.Array, "B K G n"], state: Selectable) -> Bool[jax.Array, "B K n"]:
        """Return the blocks that a step reads: sinks, newest, and the highest predictions."""
        number = jnp.arange(predicted.shape[-1], dtype=jnp.int32)
        count = jnp.minimum(-(-state.room // BLOCK), self._blocks(state))[:, None]
        last = (state.length[:, None] - 1) // BLOCK
        quarter = jnp.maximum(1, count // 4)
        always = number < jnp.minimum(self.sinks // BLOCK, quarter)
        always |= number > last - jnp.minimum(self.local // BLOCK, quarter)
        score = jnp.where(always[:, None], jnp.inf, predicted.max(axis=2))
        score = jnp.where((number <= last)[:, None], score, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)
        return (rank < count[:, None]) & (number <= last)[:, None]


def pool(weights: Float32[jax.Array, "*n T"]) -> Float32[jax.Array, "*n m"]:
    """Return the largest weight of each block; T is a multiple of `BLOCK`."""
    return weights.reshape(*weights.shape[:-1], -1, BLOCK).max(axis=-1)


def predict(parts: Mapping[str, Any], history: Float[jax.Array, "*n W m"]) -> Float32[jax.Array, "*n m"]:
    """Return the next row of each history: two convolutions of 3 × 3, the mean over rows, and a linear map."""
    x = history.reshape(-1, *history.shape[-2:], 1).astype(jnp.float32)
    for name in ("first", "second"):
        x = lax.conv_general_dilated(x, parts[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + parts[f"{name}_bias"])
    out = x.mean(axis=1) @ parts["last"] + parts["last_bias"]
    return out[..., 0].reshape(*history.shape[:-2], history.shape[-1])


def _whole_row(state: Selectable, q: jax.Array, log_total: jax.Array) -> Float32[jax.Array, "B K G n"]:
    """Return the pooled weights of all blocks, as parts of what was read."""
    logits = einsum("bkgh,bkth->bkgt", q, state.k.astype(jnp.float32))
    valid = jnp.arange(state.k.shape[2], dtype=jnp.int32) < state.length[:, None]
    return pool(jnp.where(valid[:, None, None], jnp.exp(logits - log_total[..., None]), 0.0))


def _fit(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Return x with an axis cut or padded with zeros to a size."""
    x = lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
