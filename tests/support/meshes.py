"""A small model on a mesh of some of the 8 devices, and the same on one."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from razor_jax import HeadSplit, Params, with_heads
from razor_jax.mesh import MeshPlacement
from razor_jax.models import ModelConfig
from razor_jax.params import abstract_weights
from razor_jax.sharding import make_mesh, parse, weight_shardings

K, G = 4, 2
CONFIG = ModelConfig("llama", 64, 32, 48, 3, K * G, K, 16, 4096)
SPLIT = HeadSplit(((1,), (), tuple(range(K))), K)  # one, no and only retrieval heads
BALANCED = HeadSplit(((0, 2), (1, 3), (0, 1)), K)


def mesh_of(text: str, num_kv_heads: int = K):
    """The mesh over the first devices that it needs."""
    return make_mesh(text, num_kv_heads, jax.devices()[: math.prod(parse(text).values())])


@functools.cache
def one_device(split: HeadSplit | None = SPLIT, config: ModelConfig = CONFIG) -> Params:
    """Random float32 weights, large enough that attention depends on the context."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: np.asarray(
            1 + 0.1 * rng.normal(size=a.shape) if a.ndim == 1 else 0.25 * rng.normal(size=a.shape), np.float32
        ),
        abstract_weights(config),
    )
    return with_heads(Params.from_flax({"params": weights}, config), split)


def on(params: Params, text: str) -> Params:
    """The same params on a mesh."""
    mesh = mesh_of(text, params.config.num_kv_heads)
    plain = with_heads(params, None)
    weights = jax.device_put(plain.weights, weight_shardings(plain.weights, mesh))
    return with_heads(plain.replace(weights=weights, placement=MeshPlacement(mesh)), params.heads)
