"""Scores from observed attention: sums of attention weights per key, blockwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32

from .base import Prompt, QueryRows


def no_sums(prompt: Prompt) -> Float32[jax.Array, "B K G T"]:
    """Return the sums before the first row."""
    B, K, T, _ = prompt.k.shape
    return jnp.zeros((B, K, prompt.config.group_size, T), jnp.float32)


def add_weights(sums: Float32[jax.Array, "B K G T"], rows: QueryRows, prompt: Prompt) -> Float32[jax.Array, "B K G T"]:
    """Return the sums with the attention weights of a chunk of rows added."""
    return sums + rows.weights(prompt.k).sum(axis=2)


def smooth(x: Float32[jax.Array, "*n T"], width: int, method: str = "mean") -> Float32[jax.Array, "*n T"]:
    """Return the mean or maximum over windows of `width` (odd) keys. Past the ends are zeros, which the mean counts."""
    half = width // 2
    padding = [(0, 0)] * (x.ndim - 1) + [(half, width - 1 - half)]
    window, strides = (1,) * (x.ndim - 1) + (width,), (1,) * x.ndim
    if method == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, padding) / width
