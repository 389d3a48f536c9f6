"""TOVA: the newest token decides what stays."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from .base import Later, Prompt
from .observed import SumsMethod
from .slots import ALWAYS, Slots, next_slot, put_slot


@dataclasses.dataclass(frozen=True)
class TOVA(SumsMethod):
    """Drop what the newest token attends to least, at each step (Oren et al., arXiv 2401.06104, section 3).

    Weights are averaged over all heads of a layer, so all heads keep the same tokens. After the prompt, its last token
    decides at once.
    """

    name: ClassVar = "TOVA"
    source: ClassVar = "arXiv 2401.06104"
    observes: ClassVar = 1
    evicts_later: ClassVar = True

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return the last row's mean weights; the last token always stays."""
        mean = seen.mean(axis=(1, 2))
        scores = jnp.where(prompt.newest(1), ALWAYS, mean)[:, None]
        return jnp.broadcast_to(scores, prompt.k.shape[:3])

    def put(self, state: Slots, token: Later) -> Slots:
        """Write the token over the one that it attends to least."""
        mean = jnp.broadcast_to(token.weights.mean(axis=(1, 2))[:, None], state.k.shape[:3])
        return put_slot(state, next_slot(state, mean), token.k, token.v)
