"""Scores from observed attention: sums of attention weights per key, blockwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32

from .base import CacheMethod, Prompt, QueryRows


def no_sums(prompt: Prompt) -> Float32[jax.Array, "B K G T"]:
    """Return the sums before the first row."""
    B, K, T, _ = prompt.k.shape
    return jnp.zeros((B, K, prompt.config.group_size, T), jnp.float32)


@dataclasses.dataclass(frozen=True)
class SumsMethod(CacheMethod):
    """A method whose statistics are sums of attention weights over the rows that it observes, [B, K, G, T]."""

    def start(self, prompt: Prompt) -> Any:
        """Return zero sums."""
        return no_sums(prompt)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add the weights of a chunk of rows."""
        return seen + rows.weights(prompt.k).sum(axis=2)


def smooth(x: Float32[jax.Array, "*n T"], width: int, method: str = "mean") -> Float32[jax.Array, "*n T"]:
    """Return the mean or maximum over windows of `width` (odd) keys. Past the ends are zeros, which the mean counts."""
    half = width // 2
    padding = [(0, 0)] * (x.ndim - 1) + [(half, width - 1 - half)]
    window, strides = (1,) * (x.ndim - 1) + (width,), (1,) * x.ndim
    if method == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, padding) / width
