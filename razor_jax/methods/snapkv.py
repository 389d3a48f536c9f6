"""SnapKV: what the newest tokens of the prompt attend to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from .base import Prompt
from .observed import SumsMethod, smooth
from .slots import ALWAYS


@dataclasses.dataclass(frozen=True)
class SnapKV(SumsMethod):
    """Keep what the prompt's newest tokens attend to, and these (Li et al., arXiv 2404.14469, section 4).

    A token's score is the mean attention weight over the window's rows, averaged over `kernel` neighbours and over the
    query heads of a KV head. Later tokens all stay.

    Attributes:
      window: newest tokens that vote, and always stay.
      kernel: tokens that a score is averaged over, odd.
    """

    window: int = 64
    kernel: int = 5

    name: ClassVar = "SnapKV"
    source: ClassVar = "arXiv 2404.14469"

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window}, kernel={self.kernel}: window at least 1, kernel odd")

    @property
    def observes(self) -> int:  # type: ignore[override]
        """The window."""
        return self.window

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return smoothed mean weights of the tokens before the window; the window always stays."""
        window = prompt.newest(self.window)[:, None]
        before = jnp.where(window[:, :, None], 0.0, seen) / self.window
        return jnp.where(window, ALWAYS, smooth(before, self.kernel).mean(axis=2))
