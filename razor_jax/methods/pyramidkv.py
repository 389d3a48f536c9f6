"""PyramidKV: SnapKV with more slots in the first layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from .base import Prompt
from .slots import Slots, keep_best
from .snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep as SnapKV, with sizes that fall linearly over the layers (Cai et al., arXiv 2406.02069, section 3).

    The last layer keeps 1 / `slope` of the mean, the first one as much more than it, but no more than the prompt. The
    window is part of every size; in the paper it comes on top.

    Attributes:
      slope: β of the paper.
    """

    window: int = 8
    slope: float = 20.0

    name: ClassVar = "PyramidKV"
    source: ClassVar = "arXiv 2406.02069"
    by_layer: ClassVar = True

    def sizes(self, room: Any, lengths: Any, layer: int, layers: int) -> Any:
        """Return how many tokens a layer keeps, int32 like `room` and `lengths`, which are JAX or NumPy arrays."""
        xp: Any = np if isinstance(room, np.ndarray) else jnp
        most = xp.minimum((2 - 1 / self.slope) * room, lengths)
        size = most - 2 * (most - room) * (layer / max(1, layers - 1))
        return xp.clip(xp.floor(size + 0.501), 1, xp.maximum(1, lengths)).astype(xp.int32)

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Slots:
        """Return the state of a layer of its own size."""
        lengths, rooms = self.rooms(prompt.longest, slots)
        at = prompt.layer, prompt.config.num_layers
        most = int(self.sizes(rooms, lengths, *at).max())
        return keep_best(prompt, self.scores(prompt, seen), self.sizes(room, prompt.lengths, *at), most)
