"""EMS: evict the unimportant, merge the similar."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from .base import CacheMethod, Later, Prompt, QueryRows
from .slots import ALWAYS, Slots, best, einsum, keep, next_slot, put_slot, take_tokens, write_slot

_LEAST = 1e-20  # norms and scores are at least this in divisions


@dataclasses.dataclass(frozen=True)
class EMS(CacheMethod):
    """Keep tokens that matter over the prompt or at its end, and merge the next ones into them (arXiv 2412.08521).

    A token's score is the larger of its accumulated attention and its attention from the newest rows, both of the same
    mean. The best tokens are centres. As many again join the most similar centre, if they are similar enough; the rest
    goes. Similarity is the product of the cosines of keys and values, each at least 0. Scores weigh a merge: of values,
    of directions of keys, and, apart, of norms of keys. A later token takes the slot of the lowest score, whose content
    is merged by the same rule.

    Reconstructed; the paper leaves open: the window, the threshold, the number of tokens to merge, the weights, that a
    centre's score becomes the sum of what it stands for, the protection of sinks and newest tokens, and the rule while
    decoding.

    Attributes:
      window: newest rows that score, and newest tokens that always stay; at most half of the slots.
      sinks: first tokens that always stay, if a quarter of the slots is as many.
      threshold: least similarity of a merge; above 1 nothing merges.
    """

    window: int = 32
    sinks: int = 4
    threshold: float = 0.6

    name: ClassVar = "EMS (reconstruction)"
    source: ClassVar = "arXiv 2412.08521"
    observes: ClassVar = None
    evicts_later: ClassVar = True
    slot_extras: ClassVar = 8

    def start(self, prompt: Prompt) -> Any:
        """Return zero sums over all rows and over the newest."""
        zeros = jnp.zeros(prompt.k.shape[:3], jnp.float32)
        return zeros, zeros

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add the weights of a chunk of rows, averaged over query heads."""
        weights = rows.weights(prompt.k).mean(axis=3)
        newest = rows.at >= (prompt.lengths - self.window)[:, None]
        return seen[0] + weights.sum(2), seen[1] + jnp.where(newest[:, None, :, None], weights, 0.0).sum(2)

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return the larger of both sums, the first scaled to the mean of the second."""
        # Each row's weights sum to 1, so the sums' means are in proportion to their numbers of rows.
        scale = jnp.minimum(self.window, prompt.lengths) / jnp.maximum(prompt.lengths, 1)
        return jnp.maximum(seen[0] * scale[:, None, None], seen[1])

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the centres with the tokens after them merged in, and their scores and positions."""
        scores = self.scores(prompt, seen)
        room, positions = jnp.minimum(room, slots), jnp.arange(prompt.k.shape[2], dtype=jnp.int32)
        stays = self._protected(positions, prompt.lengths[:, None], room[:, None])
        at = best(jnp.where(stays[:, None], ALWAYS, scores), prompt.lengths, 2 * slots)[1]
        centres, place = at[..., :slots], room[:, None] + jnp.arange(slots, dtype=jnp.int32)
        joins = (place < 2 * room[:, None]) & (place < prompt.lengths[:, None])
        others = jnp.take_along_axis(at, jnp.minimum(place, 2 * slots - 1)[:, None], axis=2)
        score = jnp.take_along_axis(scores, centres, axis=2)
        state = keep(prompt, centres, room, score=score, position=centres)
        k, v, score = (take_tokens(x, others) for x in (prompt.k, prompt.v, scores[..., None]))
        return self._merge(state, state.used, k, v, score, jnp.broadcast_to(joins[:, None], others.shape))

    def put(self, state: Slots, token: Later) -> Slots:
        """Add the weights to the scores, merge the lowest of those that may go, and write the token to its slot."""
        assert state.score is not None
        assert state.position is not None
        positions, scores = state.position, state.score + token.weights.mean(axis=2)
        # With the new token, which is among the newest, the row is one token longer.
        stays = self._protected(positions, token.position[:, None, None] + 1, state.room[..., None])
        at = next_slot(state, jnp.where(stays, jnp.inf, scores))
        old_k, old_v, old_score = (take_tokens(x, at[..., None]) for x in (state.k, state.v, scores[..., None]))
        left = state.used & (jnp.arange(state.k.shape[2], dtype=jnp.int32) != at[..., None])
        going = (at < state.valid)[..., None]
        merged = self._merge(state.replace(score=scores), left, old_k, old_v, old_score, going)
        assert merged.score is not None
        return put_slot(merged, at, token.k, token.v).replace(
            score=write_slot(merged.score, at, token.own.mean(axis=2)),
            position=write_slot(positions, at, jnp.broadcast_to(token.position[:, None], at.shape)),
        )

    def _protected(self, position: jax.Array, length: jax.Array, room: jax.Array) -> jax.Array:
        """Return which positions always stay in rows of `length` tokens: sinks, and the newest."""
        recent = jnp.clip(jnp.minimum(self.window, room // 2), 0, room - 1)
        return (position < jnp.minimum(self.sinks, room // 4)) | (position >= length - recent)

    def _merge(
        self,
        state: Slots,
        centres: Bool[jax.Array, "B K S"],
        k: Float[jax.Array, "B K M H"],
        v: Float[jax.Array, "B K M H"],
        scores: Float32[jax.Array, "B K M 1"],
        joins: Bool[jax.Array, "B K M"],
    ) -> Slots:
        """Return the slots with each of M tokens that `joins` merged into the most similar of the `centres`.

        A token that is not similar enough to any is dropped.
        """
        assert state.score is not None
        new = [jnp.where(joins[..., None], x.astype(jnp.float32), 0.0) for x in (k, v, scores)]
        old = [
            jnp.where(centres[..., None], x.astype(jnp.float32), 0.0)
            for x in (state.k, state.v, state.score[..., None])
        ]
        of_k, of_v = (einsum("bkmh,bksh->bkms", _unit(a), _unit(b)) for a, b in zip(new[:2], old[:2], strict=True))
        similar = jnp.maximum(of_k, 0.0) * jnp.maximum(of_v, 0.0)
        similar = jnp.where(joins[..., None] & centres[:, :, None], similar, -1.0)
        nearest = jnp.argmax(similar, axis=-1)
        merges = jnp.max(similar, axis=-1) >= self.threshold
        slot = jnp.arange(state.k.shape[2], dtype=jnp.int32)
        member = ((nearest[..., None] == slot) & merges[..., None]).astype(jnp.float32)  # [B, K, M, S]
        parts = zip(_weighted(*old), _weighted(*new), strict=True)
        weight, value, norm, direction = (a + einsum("bkms,bkmh->bksh", member, b) for a, b in parts)
        key, value = norm / weight * _unit(direction), value / weight
        grown = member.sum(2)[..., None] > 0
        k, v = (jnp.where(grown, a.astype(b.dtype), b) for a, b in ((key, state.k), (value, state.v)))
        return state.replace(k=k, v=v, score=jnp.where(grown[..., 0], weight[..., 0], state.score))


def _weighted(k: jax.Array, v: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
    """Return what a merge adds up: scores, and by them values, norms of keys and directions of keys."""
    scores = jnp.maximum(scores, _LEAST)
    return scores, scores * v, scores * jnp.linalg.norm(k, axis=-1, keepdims=True), scores * _unit(k)


def _unit(x: jax.Array) -> jax.Array:
    """Return vectors of norm 1; 0 stays 0."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _LEAST)
