"""AdaKV: the heads of a layer compete for its slots."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from .base import CacheMethod, Prompt, QueryRows
from .expected_attention import ExpectedAttention
from .pool import Pool, PoolMethod, fill_pool, keep_first
from .snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class AdaKV(PoolMethod):
    """Keep the highest scores of a layer over all its heads (Feng et al., arXiv 2407.11550, algorithm 1).

    The scores are those of another method. Every head first gets a floor of its own best tokens. Later tokens all stay.

    Attributes:
      base: the method that scores tokens; its budget is not read.
      floor: share of an equal budget that every head gets.
    """

    base: CacheMethod = dataclasses.field(default_factory=lambda: SnapKV(window=32))
    floor: float = 0.2

    name: ClassVar = "AdaKV"
    source: ClassVar = "arXiv 2407.11550"
    slot_extras: ClassVar = 1

    @property
    def observes(self) -> int | None:  # type: ignore[override]
        """What the scoring method observes."""
        return self.base.observes

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Whether the scoring method reads the prompt twice."""
        return self.base.repeats

    def start(self, prompt: Prompt) -> Any:
        """Return the scoring method's statistics."""
        return self.base.start(prompt)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add to the scoring method's statistics."""
        return self.base.see(seen, rows, prompt)

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return the scoring method's scores."""
        return self.base.scores(prompt, seen)

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Pool:
        """Return the pool of a layer."""
        floor = jnp.floor(self.floor * jnp.minimum(room, prompt.lengths)).astype(jnp.int32)
        scores = keep_first(self.scores(prompt, seen), prompt.valid, floor[:, None])
        heads = prompt.k.shape[1]
        return fill_pool(prompt, scores, heads * room, heads * slots)


@dataclasses.dataclass(frozen=True)
class AdaExpectedAttention(AdaKV):
    """AdaKV over the scores of ExpectedAttention, with the offset that NVIDIA kvpress adds to them."""

    base: CacheMethod = dataclasses.field(default_factory=lambda: ExpectedAttention(epsilon=1e-2))

    name: ClassVar = "AdaKV ExpectedAttention"
