"""Attention and cache-write kernels: one folder per op, one file per backend. They take and return arrays only."""

import jax.numpy as jnp

INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
EIGHT_BIT = (INT8, FP8)  # types of 8-bit caches
