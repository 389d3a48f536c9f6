"""Attention and cache-write kernels: one folder per op, one file per backend. They take and return arrays only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
EIGHT_BIT = (INT8, FP8)  # types of 8-bit caches


def as_bits(x: jax.Array) -> jax.Array:
    """Return bfloat16 values as integers of the same bits, and other types as they are.

    XLA for CPUs updates a bfloat16 array by way of a float32 copy of all of it, and reads a slice of one so; integers
    are updated in place.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """Return what `as_bits` took."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def on_bits(function: Callable[..., jax.Array], x: jax.Array, *more: jax.Array) -> jax.Array:
    """Return function(x, *more), which only moves values of one type; on CPUs it moves their bits."""
    if x.dtype != jnp.bfloat16:
        return function(x, *more)

    def bits(*arrays: jax.Array) -> jax.Array:
        return from_bits(function(*map(as_bits, arrays)))

    return jax.lax.platform_dependent(x, *more, cpu=bits, default=function)
