"""Rotary position embedding in transformers' half-split layout, with the common rope types.

Frequencies are float32 for every model type: at long context a bfloat16 angle is wrong by whole turns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import Rope

Tables = tuple[jax.Array, jax.Array]  # cos, sin: float32 [B, T, H/2]


def tables(rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array) -> Tables:
    """Return cos and sin, float32 [B, T, H/2], at int32 positions [B, T].

    `lengths` int32 [B] is each row's length after this call; only `dynamic` reads it.
    """
    frequencies, scale = _frequencies(rope, head_dim, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, rope: Tables) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of x [B, T, ..., H], in float32. The result has x's type."""
    cos, sin = (t.reshape(t.shape[:2] + (1,) * (x.ndim - 3) + t.shape[2:]) for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def inverse(rope: Tables) -> Tables:
    """Return the tables that undo a rotation, and the factor that YaRN's tables carry."""
    cos, sin = rope
    square = cos**2 + sin**2
    return cos / square, -sin / square


def _frequencies(rope: Rope, head_dim: int, lengths: jax.Array) -> tuple[jax.Array, float]:
    """Return the angular frequencies, float32 [B or 1, H/2], and the factor on cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A float64 power rounded to float32 equals torch's bit for bit nearly everywhere; NumPy's float32 power does not.
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
    raise ValueError(f"rope kind {rope.kind!r} is unknown: use default, linear, llama3, yarn or dynamic")


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Return frequencies: long wavelengths stretched by `factor`, short ones kept, a linear blend between."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1 - keep) / rope.factor)).astype(np.float32)


def _yarn(rope: Rope, head_dim: int, periods: np.ndarray) -> np.ndarray:
    """Return YaRN's frequencies (arXiv 2309.00071, section 3.2): a ramp over dimensions from kept to interpolated."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    keep = np.float32(1) - np.clip(ramp, 0.0, 1.0).astype(np.float32)
    plain, stretched = np.float32(1) / periods, np.float32(1) / (np.float32(rope.factor) * periods)
    return stretched * (1 - keep) + plain * keep


def _dynamic(rope: Rope, head_dim: int, exponents: np.ndarray, lengths: jax.Array) -> jax.Array:
    """Return frequencies of NTK scaling: unchanged up to the trained length, a larger base in longer rows."""
    trained = rope.original_max_position
    length = jnp.maximum(lengths, trained).astype(jnp.float32)
    stretch = rope.factor * length / trained - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / theta[:, None] ** exponents[None, :]
