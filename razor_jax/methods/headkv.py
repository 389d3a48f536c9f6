"""HeadKV-R2: SnapKV inside a head, slots shared out by the importance of heads."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from ..models.config import ModelConfig
from .base import Prompt
from .pool import Pool, PoolMethod, fill_pool, rank
from .snapkv import SnapKV

_ROUNDS = 8  # of sharing out what full heads cannot use


@dataclasses.dataclass(frozen=True)
class HeadKV(PoolMethod, SnapKV):
    """Keep more in important heads (Fu et al., arXiv 2410.19258, section 3).

    Of an equal share, 1 - 1/β goes to every head and 1/β by importance; inside a head SnapKV chooses. What a head
    cannot use, because it keeps its whole prompt, goes to the others in proportion. The paper works on query heads and
    finds importance by questions that need reasoning; here heads are KV heads, and any scores may be given.

    Attributes:
      importance: one non-negative number per KV head and layer, in the checkpoint's order.
      beta: β, above 1; the closer to 1, the more goes by importance.
    """

    window: int = 8
    kernel: int = 7
    importance: tuple[tuple[float, ...], ...] = ()
    beta: float = 1.2

    name: ClassVar = "HeadKV-R2"
    source: ClassVar = "arXiv 2410.19258"
    by_layer: ClassVar = True
    slot_extras: ClassVar = 1

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the importance does not cover the model's heads."""
        shape = (config.num_layers, config.num_kv_heads)
        if np.shape(self.importance) != shape:
            raise ValueError(
                f"HeadKV needs importance of shape {shape}, one number per layer and KV head, and has "
                f"{np.shape(self.importance)}: take razor_jax.find_heads(params).best, for example"
            )

    def sizes(self, room: Any, lengths: Any, layer: int) -> Any:
        """Return the tokens of each KV head of a layer, int32 [B, K] in the checkpoint's order; JAX or NumPy [B]."""
        xp: Any = np if isinstance(room, np.ndarray) else jnp
        weights = np.asarray(self.importance, np.float32).reshape(-1)
        weights = weights * len(weights) / weights.sum()
        window = xp.minimum(xp.minimum(self.window, room), lengths)
        share = (room - window)[:, None] * ((1 - 1 / self.beta) + weights / self.beta)
        total, limit = share.sum(1, keepdims=True), xp.maximum(0, lengths - window)[:, None]
        for _ in range(_ROUNDS):
            share = xp.minimum(share, limit)
            growing = share * (share < limit)
            spare = total - share.sum(1, keepdims=True)
            share = share * xp.where(share < limit, 1 + spare / xp.maximum(growing.sum(1, keepdims=True), 1), 1)
        share = xp.minimum(share, limit).reshape(room.shape[0], len(self.importance), -1)[:, layer]
        return (window[:, None] + xp.floor(share + 1e-3)).astype(xp.int32)

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Pool:
        """Return the pool of a layer, in which every head has its own size."""
        sizes = self.sizes(room, prompt.lengths, prompt.layer)[:, np.asarray(prompt.heads)]
        chosen = rank(self.scores(prompt, seen), prompt.valid) < sizes[..., None]
        scores = jnp.where(chosen, 1.0, 0.0).astype(jnp.float32)
        return fill_pool(prompt, scores, sizes.sum(1), self._most(prompt, slots))

    def _most(self, prompt: Prompt, slots: int) -> int:
        """Return the slots that the layer needs for the prompt that needs most."""
        lengths, room = self.rooms(prompt.longest, slots)
        return int(self.sizes(room, lengths, prompt.layer).sum(1).max())
