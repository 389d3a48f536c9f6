"""KVzap: KVzip's scores, predicted from hidden states instead of by a second reading."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from .base import Prompt
from .learned import LearnedMethod
from .pool import Pool, PoolMethod, fill_pool
from .slots import ALWAYS, einsum


@dataclasses.dataclass(frozen=True)
class KVzap(PoolMethod, LearnedMethod):
    """Keep the tokens whose KVzip score, predicted by a linear map, is highest (arXiv 2601.07891).

    The map takes the layer's hidden states, divided by their root mean square, to one logarithmic score per KV head.
    The heads of a layer compete for its slots; all layers have as many. The paper has one threshold for all layers.
    Later tokens all stay.

    Attributes:
      window: newest tokens that always stay, half of the room at most.
    """

    window: int = 128

    name: ClassVar = "KVzap"
    source: ClassVar = "arXiv 2601.07891"
    key: ClassVar = "kvzap"
    slot_extras: ClassVar = 1

    def start(self, prompt: Prompt) -> Float32[jax.Array, "B K T"]:
        """Return the predicted scores."""
        assert prompt.x is not None
        x = features(prompt.x)
        return einsum("btd,kd->bkt", x, self.arrays["weight"]) + self.arrays["bias"][:, None]

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Pool:
        """Return the pool of a layer."""
        window = prompt.newest(jnp.minimum(self.window, room // 2)[:, None])
        heads = prompt.k.shape[1]
        return fill_pool(prompt, jnp.where(window[:, None], ALWAYS, seen), heads * room, heads * slots)


def features(x: Float[jax.Array, "B T D"]) -> Float32[jax.Array, "B T D"]:
    """Return what the map reads: hidden states with a root mean square of 1."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
