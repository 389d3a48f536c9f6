"""Attention kernels: one folder an op, one file a backend; arrays in, arrays out, nothing of the rest."""

import jax.numpy as jnp

INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
EIGHT_BIT = (INT8, FP8)  # types of 8-bit caches
