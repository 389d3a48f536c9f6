"""StreamingLLM: the first tokens and a window of the newest."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from .base import CacheMethod, Later, Prompt
from .slots import Slots, keep, put_slot


@dataclasses.dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """Keep the first tokens and the newest of every head (Xiao et al., arXiv 2309.17453, section 3).

    A later token takes the slot of the oldest one that is no sink. Keys keep their true positions; the paper numbers
    the positions inside the cache instead.

    Attributes:
      sinks: first tokens that always stay.
    """

    sinks: int = 4

    name: ClassVar = "StreamingLLM"
    source: ClassVar = "arXiv 2309.17453"
    evicts_later: ClassVar = True

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the newest token of every slot of sinks and ring."""
        s = jnp.arange(slots, dtype=jnp.int32)
        sinks, ring = self.ring(room[:, None])
        turns = jnp.maximum(0, (prompt.lengths[:, None] - 1 - s) // ring)
        at = jnp.clip(jnp.where(s < sinks, s, s + turns * ring), 0, prompt.k.shape[2] - 1)
        return keep(prompt, jnp.broadcast_to(at[:, None], (*prompt.k.shape[:2], slots)), room)

    def put(self, state: Slots, token: Later) -> Slots:
        """Write the token to the slot of its position."""
        return put_slot(state, self.slot_of(state, token.position), token.k, token.v)

    def slot_of(self, state: Slots, position: Int32[jax.Array, " B"]) -> Int32[jax.Array, "B K"]:
        """Return the slot of a position in each head."""
        sinks, ring = self.ring(state.room)
        at = position[:, None]
        return jnp.where(at < sinks, at, sinks + (at - sinks) % ring)

    def ring(self, room: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return how many sinks and how many other tokens fit; at least one is no sink."""
        sinks = jnp.clip(room - 1, 0, self.sinks)
        return sinks, jnp.maximum(1, room - sinks)
