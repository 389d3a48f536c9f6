"""Rotary position embedding in transformers' half-split layout, all of its common stretchings.

Frequencies are float32 whatever the model's type: a bfloat16 angle is wrong by whole turns at long context.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import Rope

Tables = tuple[jax.Array, jax.Array]  # cos, sin: float32 [B, T, H/2]


def tables(rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array) -> Tables:
    """Return cos and sin, float32 [B, T, H/2], of int32 positions [B, T].

    `lengths` int32 [B] is each row's length after this call; only `dynamic` reads it.
    """
    frequencies, scale = _frequencies(rope, head_dim, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, rope: Tables) -> jax.Array:
    """Rotate x [B, T, ..., H], pairs (i, i + H/2); the arithmetic is float32, the result x's type."""
    cos, sin = (t.reshape(t.shape[:2] + (1,) * (x.ndim - 3) + t.shape[2:]) for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _frequencies(rope: Rope, head_dim: int, lengths: jax.Array) -> tuple[jax.Array, float]:
    """Return angular frequencies, float32 [B or 1, H/2], and the factor on cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A power rounded once from float64 is torch's to the bit nearly everywhere; NumPy's float32 one is not.
    periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / periods
    match rope.kind:
        case "default":
            return jnp.asarray(plain)[None], 1.0
        case "linear":
            return jnp.asarray(plain / np.float32(rope.factor))[None], 1.0
        case "llama3":
            return jnp.asarray(_llama3(rope, plain))[None], 1.0
        case "yarn":
            return jnp.asarray(_yarn(rope, head_dim, periods))[None], rope.attention_factor
        case "dynamic":
            return _dynamic(rope, head_dim, exponents, lengths), 1.0
    raise ValueError(f"unknown rope kind {rope.kind!r}")


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Divide long wavelengths by `factor`, keep short ones, blend linearly between."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1 - keep) / rope.factor)).astype(np.float32)


def _yarn(rope: Rope, head_dim: int, periods: np.ndarray) -> np.ndarray:
    """Apply YaRN (arXiv 2309.00071, section 3.2): a ramp over dimensions from kept to interpolated."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' way round the division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    keep = np.float32(1) - np.clip(ramp, 0.0, 1.0).astype(np.float32)
    plain, stretched = np.float32(1) / periods, np.float32(1) / (np.float32(rope.factor) * periods)
    return stretched * (1 - keep) + plain * keep


def _dynamic(rope: Rope, head_dim: int, exponents: np.ndarray, lengths: jax.Array) -> jax.Array:
    """Apply NTK scaling by each row's length: unchanged up to the trained length, a larger base beyond."""
    trained = rope.original_max_position
    length = jnp.maximum(lengths, trained).astype(jnp.float32)
    stretch = rope.factor * length / trained - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / theta[:, None] ** exponents[None, :]
