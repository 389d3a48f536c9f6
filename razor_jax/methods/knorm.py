"""L2-norm strategy: keep the keys of smallest norm."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from .base import CacheMethod, Prompt


@dataclasses.dataclass(frozen=True)
class KNorm(CacheMethod):
    """Keep the tokens whose keys are shortest (Devoto et al., arXiv 2406.11430, section 3).

    Nothing is forced: sinks stay because their keys are short. Later tokens all stay.
    """

    name: ClassVar = "L2-norm"
    source: ClassVar = "arXiv 2406.11430"

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return the negative norm of each key, in float32: norms of 16-bit keys tie."""
        return -jnp.linalg.norm(prompt.k.astype(jnp.float32), axis=-1)
