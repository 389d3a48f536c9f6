"""8-bit keys and values.

int8 keeps one float32 scale a token and head, max|x| / 127, so that scaling touches rows of logits and of weights
and never the cache. float8_e4m3fn has an exponent of its own and no scale: values beyond ±448 are clipped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
EIGHT_BIT = (INT8, FP8)


def quantize(
    x: Float[jax.Array, "B K T H"], dtype: jnp.dtype
) -> tuple[jax.Array, Float32[jax.Array, "B K 1 T"] | None]:
    """x [B,K,T,H] as a cache of `dtype` holds it, and the scales [B,K,1,T] of int8."""
    if dtype == INT8:
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=-1)
        scale = jnp.where(largest > 0, largest, 1.0) / 127.0
        return jnp.round(x / scale[..., None]).astype(INT8), scale[:, :, None]
    if dtype == FP8:
        largest = float(jnp.finfo(FP8).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype), None


def dequantize(x: jax.Array, scale: Float32[jax.Array, "B K 1 T"] | None) -> Float32[jax.Array, "B K T H"]:
    """float32 values of x [B,K,T,H]."""
    x = x.astype(jnp.float32)
    return x if scale is None else x * scale[:, :, 0, :, None]
