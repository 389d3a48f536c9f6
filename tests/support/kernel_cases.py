"""Shapes and lengths of the TPU kernels' tests."""

from __future__ import annotations

import jax
import numpy as np

from razor_jax.kernels import attention as kernel

from .kernel_inputs import random

BLOCK, S, H = 16, 40, 128  # the block does not divide S


EDGES = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)


COPIES = np.array([37, 0, 1, 1_000_000, 0, 37], np.int32)


SCALE = H**-0.5


compensation = jax.jit(kernel.compensation, static_argnames="scale")


def inputs(B, K, R, S, dtype, seed=0, H=H):
    shapes = ((B, K, R, H), (B, K, S, H), (B, K, S, H))
    return tuple(random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
