"""Shapes, lengths and inputs of the tests of the TPU and GPU attention kernels."""

from __future__ import annotations

import jax
import numpy as np

from razor_jax.kernels import attention as kernel

from .kernel_inputs import random

BLOCK, S, H = 16, 40, 128  # the block does not divide S
SCALE = H**-0.5
EDGES = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)  # lengths of the rows
COPIES = np.array([37, 0, 1, 1_000_000, 0, 37], np.int32)  # dropped tokens of the rows

compensation = jax.jit(kernel.compensation, static_argnames="scale")


def inputs(B, K, R, S, dtype, seed=0, H=H):
    """Random q [B,K,R,H] and k, v [B,K,S,H]."""
    shapes = ((B, K, R, H), (B, K, S, H), (B, K, S, H))
    return tuple(random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
