"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from .base import Later, Prompt
from .observed import SumsMethod
from .slots import ALWAYS, Slots, best, keep, next_slot, put_slot, write_slot


@dataclasses.dataclass(frozen=True)
class H2O(SumsMethod):
    """Keep the tokens of largest accumulated attention and the newest (Zhang et al., arXiv 2306.14048, section 4).

    A token's score is the sum of its weights over all rows that saw it, averaged over the query heads of a KV head, and
    goes on growing while decoding. Half of the room is for the newest tokens. A slot stores its token's score and
    position.
    """

    name: ClassVar = "H2O"
    source: ClassVar = "arXiv 2306.14048"
    observes: ClassVar = None
    evicts_later: ClassVar = True
    slot_extras: ClassVar = 8

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the newest tokens and the heavy ones before them, with their scores and positions."""
        sums = seen.mean(axis=2)
        positions = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)
        newest = positions >= (prompt.lengths - _recent(room))[:, None]
        _, at = best(jnp.where(newest[:, None], ALWAYS, sums), prompt.lengths, slots)
        return keep(prompt, at, room, score=jnp.take_along_axis(sums, at, axis=2), position=at)

    def put(self, state: Slots, token: Later) -> Slots:
        """Add the weights to the scores, and write the token over the lowest of those that are not among the newest."""
        assert state.score is not None
        assert state.position is not None
        scores = state.score + token.weights.mean(axis=2)
        # The new token is among the newest, too.
        newest = state.position > (token.position[:, None] - _recent(state.room))[..., None]
        at = next_slot(state, jnp.where(newest, jnp.inf, scores))
        positions = write_slot(state.position, at, jnp.broadcast_to(token.position[:, None], at.shape))
        score = write_slot(scores, at, token.own.mean(axis=2))
        return put_slot(state, at, token.k, token.v).replace(score=score, position=positions)


def _recent(room: jax.Array) -> jax.Array:
    """Return how many of the newest tokens stay whatever their scores: half of the room, and one slot less than it."""
    return jnp.clip(room // 2, 0, room - 1)
