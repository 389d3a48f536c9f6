"""Elastic Cache: important tokens, each the mean of its neighbourhood, and a queue of the newest."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32

from .base import Later, Prompt
from .observed import SumsMethod
from .slots import ALWAYS, Slots, best, einsum, keep, put_slot


@dataclasses.dataclass(frozen=True)
class ElasticCache(SumsMethod):
    """Merge every token into the nearest important one (Liu et al., arXiv 2407.18121, section 3).

    A layer has one importance for all its heads: attention summed over rows, averaged over heads. The most important
    tokens are anchors; every other token joins the anchor nearest in position, and an anchor's key and value become the
    mean over its members. Later, the newest `queue` entries are a first-in-first-out queue and the others never change.
    The published code picks other anchors than the paper says; this follows the paper. The size is fixed; in the paper
    it may grow with the answer.

    Attributes:
      sinks: first tokens that are anchors and take no others; so is the last token.
      queue: newest entries that later tokens push out.
      merge: False drops the other tokens instead.
    """

    sinks: int = 1
    queue: int = 25
    merge: bool = True

    name: ClassVar = "Elastic Cache"
    source: ClassVar = "arXiv 2407.18121"
    observes: ClassVar = None
    evicts_later: ClassVar = True

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the merged anchors, the newest laid out as the queue expects them."""
        B, K, T, _ = prompt.k.shape
        room = jnp.minimum(room, slots)
        alone = prompt.first(self.sinks) | prompt.newest(1)
        importance = jnp.where(alone, ALWAYS, seen.mean(axis=(1, 2)))
        at = best(importance[:, None], prompt.lengths, slots)[1][:, 0]
        count = jnp.minimum(room, prompt.lengths)[:, None]
        entry = jnp.arange(slots, dtype=jnp.int32)
        anchors = jnp.sort(jnp.where(entry < count, at, T), axis=1)
        merged = self._merged(prompt, anchors, count, alone) if self.merge else prompt
        frozen, queue = self._queue(room)
        # In a full cache entry i stands for position n - room + i.
        turned = frozen + (entry - frozen - jnp.maximum(0, prompt.lengths - room)[:, None]) % queue
        source = jnp.where((entry < frozen) | (entry >= room[:, None]), entry, turned)
        order = jnp.minimum(jnp.take_along_axis(anchors, jnp.minimum(source, slots - 1), axis=1), T - 1)
        return keep(merged, jnp.broadcast_to(order[:, None], (B, K, slots)), room)

    def _merged(
        self,
        prompt: Prompt,
        anchors: Int32[jax.Array, "B S"],
        count: Int32[jax.Array, "B 1"],
        alone: Bool[jax.Array, "B T"],
    ) -> Prompt:
        """Return the prompt in which keys and values of anchors are means over their members.

        `anchors` rise, the first `count` are used. Tokens that stand `alone` join nobody and take nobody.
        """
        T = prompt.k.shape[2]
        tokens = jnp.arange(T, dtype=jnp.int32)
        middles = anchors[:, :-1] + anchors[:, 1:]  # doubled
        nearest = jax.vmap(lambda m: jnp.searchsorted(m, 2 * tokens, side="left"))(middles).astype(jnp.int32)
        first = jnp.minimum(self.sinks, count)
        nearest = jnp.clip(nearest, first, jnp.maximum(first, count - 2))
        target = jnp.take_along_axis(anchors, nearest, axis=1)
        joins = prompt.valid & ~alone & (count - 2 >= first)
        member = (target[:, None, :] == tokens[:, None]) & joins[:, None, :]  # [B, anchor, member]
        size = member.sum(-1)

        def mean(x: jax.Array) -> jax.Array:
            total = einsum("bat,bkth->bkah", member.astype(jnp.float32), x.astype(jnp.float32))
            means = total / jnp.maximum(size, 1)[:, None, :, None]
            return jnp.where((size > 0)[:, None, :, None], means, x).astype(x.dtype)

        return prompt._replace(k=mean(prompt.k), v=mean(prompt.v))

    def put(self, state: Slots, token: Later) -> Slots:
        """Write the token to its place in the queue."""
        frozen, queue = self._queue(state.room)
        position = token.position[:, None]
        at = jnp.where(position < frozen, position, frozen + (position - frozen) % queue)
        return put_slot(state, at, token.k, token.v)

    def _queue(self, room: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return how many entries never change, and how many the queue has, each shaped to go with slots."""
        queue = jnp.clip(room, 1, self.queue)
        frozen = room - queue
        return (frozen[:, None], queue[:, None]) if room.ndim == 1 else (frozen, queue)
