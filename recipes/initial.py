"""Initial weights of razor-mini, which are only noise, and the addition of layers to a trained shallow model.

Embeddings have unit variance, and so have the outputs of attention and feed-forward blocks. No part of the residual
stream drowns another, and one learning rate suits all matrices. The final norm starts small: with tied embeddings of
unit variance, each token would otherwise predict itself with certainty. All embeddings share one random direction, as
in trained models, which heads that attend by position alone can use.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig
from razor_jax.models.transformer import Transformer

_COMMON = 0.5  # size of the direction that all embeddings share, relative to their own
_FINAL_NORM = 0.1


def initial_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Return new float32 weights in the transformer's tree.

    Kernels are normal with deviation 1/√fan-in, embeddings normal with deviation 1; norms are 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = next((p.key for p in path if p.key in _FAN_IN), None)
        if name is not None:
            fan_in = np.prod([x.shape[axis] for axis in _FAN_IN[name]])
            return rng.normal(size=x.shape) * fan_in**-0.5
        if x.ndim == 2:  # the embedding
            return rng.normal(size=x.shape) + _COMMON * rng.normal(size=(1, x.shape[1]))
        return np.full(x.shape, _FINAL_NORM if path[0].key == "norm" else 1.0)

    params = jax.tree_util.tree_map_with_path(draw, _shapes(config))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def add_layers(config: ModelConfig, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Add layers to a shallower model, up to the depth of `config`, without changing what it computes.

    Old layers are spread evenly, and the first stays first. New layers are noise with zero output projections.
    """
    old = [name for name in params if name.startswith("blocks_")]
    L = config.num_layers
    if len(old) > L:
        raise ValueError(f"params have {len(old)} layers, the config {L}: give a config with at least as many layers")
    kept = {index * L // len(old): params[f"blocks_{index}"] for index in range(len(old))}
    fresh = initial_params(config, seed)
    blocks = {f"blocks_{i}": kept[i] if i in kept else _silent(fresh[f"blocks_{i}"]) for i in range(L)}
    return {**{name: x for name, x in params.items() if name not in old}, **blocks}


def _silent(block: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.tree.map(jnp.zeros_like, x) if name in ("o", "down") else x for name, x in block.items()}


_FAN_IN = {"q": (0,), "k": (0,), "v": (0,), "gate": (0,), "up": (0,), "down": (0,), "o": (0, 1, 2)}


def _shapes(config: ModelConfig) -> dict[str, Any]:
    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        rope = rotary.tables(config.rope, config.head_dim, tokens, jnp.full((1,), 2))

        def ignore(q, k, v, state):
            return q, state

        return Transformer(config).init(key, tokens, rope, ignore, (None,) * config.num_layers)["params"]

    return jax.eval_shape(init, jax.random.key(0))
