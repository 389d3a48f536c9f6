"""CORM: drop what no recent query found important."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from .base import CacheMethod, Later, Prompt, QueryRows
from .slots import ALWAYS, Slots, best, keep, next_slot, put_slot, take_tokens, write_slot


@dataclasses.dataclass(frozen=True)
class CORM(CacheMethod):
    """Drop a token that was minor in all recent steps (Dai et al., arXiv 2404.15949; reconstructed).

    A key is important in a step if its weight is at least 1 / keys, of any query head of its KV head. A token stays
    while it was important in one of the last `window` steps, or is one of the `window` newest. How many stay follows
    from the text; the budget is a cap, at which the token that was important longest ago goes.

    Reconstructed: the number of keys counts what the cache holds, and a KV head asks all its query heads.

    Attributes:
      window: steps and newest tokens; 256 in the paper, for much larger caches.
    """

    window: int = 64

    name: ClassVar = "CORM (reconstruction)"
    source: ClassVar = "arXiv 2404.15949"
    evicts_later: ClassVar = True
    slot_extras: ClassVar = 8

    @property
    def observes(self) -> int:  # type: ignore[override]
        """The window."""
        return self.window

    def start(self, prompt: Prompt) -> Any:
        """Return -1: no token was important."""
        return jnp.full(prompt.k.shape[:3], -1.0, jnp.float32)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Return the last row in which each token was important."""
        keys = (rows.at + 1).astype(jnp.float32)
        weights = rows.weights(prompt.k).max(axis=3)
        important = weights >= 1.0 / keys[:, None]
        return jnp.maximum(seen, jnp.where(important, rows.at[:, None].astype(jnp.float32), -1.0).max(axis=2))

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the important and the newest tokens, each with its last important step and its position."""
        scores = jnp.where(prompt.newest(self.window)[:, None], ALWAYS, seen)
        found, at = best(scores, prompt.lengths, slots)
        state = keep(prompt, at, room, score=take_tokens(seen[..., None], at)[..., 0], position=at)
        return state.replace(valid=jnp.minimum(state.valid, (found >= 0).sum(-1).astype(jnp.int32)))

    def put(self, state: Slots, token: Later) -> Slots:
        """Mark the important tokens, drop the minor ones, and write the token."""
        assert state.score is not None
        assert state.position is not None
        keys = (state.valid + 1).astype(jnp.float32)[..., None]
        now = token.position[:, None, None]
        marks = jnp.where(token.weights.max(axis=2) >= 1.0 / keys, now.astype(jnp.float32), state.score)
        newest = state.position > now - self.window
        stays = state.used & (newest | (marks > now - self.window))
        order = jnp.argsort(~stays, axis=-1, stable=True)  # the used slots stay a prefix
        marks, newest, positions = (jnp.take_along_axis(x, order, axis=2) for x in (marks, newest, state.position))
        state = state.replace(
            k=take_tokens(state.k, order),
            v=take_tokens(state.v, order),
            valid=stays.sum(-1).astype(jnp.int32),
            score=marks,
            position=positions,
        )
        marked = jnp.where(state.used, jnp.where(newest, jnp.inf, marks), jnp.inf)
        longest_ago = marked == marked.min(-1, keepdims=True)  # of several, the oldest token goes
        at = next_slot(state, jnp.where(longest_ago, positions.astype(jnp.float32), jnp.inf))
        mark = jnp.where(token.own.max(axis=2) >= 1.0 / keys[..., 0], now[..., 0].astype(jnp.float32), -1.0)
        here = jnp.broadcast_to(now[..., 0], at.shape)
        return put_slot(state, at, token.k, token.v).replace(
            score=write_slot(marks, at, mark), position=write_slot(positions, at, here)
        )
