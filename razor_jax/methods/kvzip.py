"""KVzip: keep what a repetition of the prompt reads."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from .adakv import AdaKV
from .base import CacheMethod, Prompt, QueryRows
from .slots import ALWAYS


@dataclasses.dataclass(frozen=True)
class RepetitionScores(CacheMethod):
    """Score a token by the largest weight that a repetition of the prompt gives it (Kim et al., arXiv 2505.23416).

    The prompt is read a second time right after itself. The paper puts an instruction to repeat between the two, and
    cuts the repetition into pieces of 2,000 tokens.

    Attributes:
      sinks: first tokens that always stay.
    """

    sinks: int = 4

    name: ClassVar = "KVzip, equal heads"
    source: ClassVar = "arXiv 2505.23416"
    observes: ClassVar = None
    repeats: ClassVar = True

    def start(self, prompt: Prompt) -> Any:
        """Return zero maxima [B, K, T]."""
        return jnp.zeros(prompt.k.shape[:3], jnp.float32)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Raise the maxima to the largest weights of a chunk of the repetition, over rows and query heads."""
        return jnp.maximum(seen, rows.weights(prompt.k).max(axis=(2, 3)))

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return the maxima; sinks always stay."""
        return jnp.where(prompt.first(self.sinks)[:, None], ALWAYS, seen)


@dataclasses.dataclass(frozen=True)
class KVzip(AdaKV):
    """Keep what a repetition of the prompt reads (Kim et al., arXiv 2505.23416).

    The heads of a layer compete for its slots; all layers have as many. The paper has one threshold for all layers.
    """

    base: CacheMethod = dataclasses.field(default_factory=RepetitionScores)
    floor: float = 0.0

    name: ClassVar = "KVzip"
    source: ClassVar = "arXiv 2505.23416"
