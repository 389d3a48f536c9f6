"""Initial weights of razor-mini: noise and nothing else; and how a trained shallow model gets more layers.

Embeddings have unit size, and so have the writes of attention and feed-forward: no part of the residual stream drowns
another one, and one learning rate suits all matrices. The final norm starts small, for with tied embeddings of unit
size a token would otherwise predict itself beyond doubt. All embeddings share one random direction, as those of
trained models do: attention by position alone can hold on to it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig
from razor_jax.models.transformer import Transformer

_COMMON = 0.5  # size of the direction that all embeddings share, theirs being 1
_FINAL_NORM = 0.1


def initial_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Return fresh float32 weights in the transformer's own tree: normal at fan-in^-1/2, embeddings at 1, norms at
    1.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        name = next((p.key for p in path if p.key in _FAN_IN), None)
        if name is not None:
            fan_in = np.prod([x.shape[axis] for axis in _FAN_IN[name]])
            return rng.normal(size=x.shape) * fan_in**-0.5
        if x.ndim == 2:  # the embedding
            return rng.normal(size=x.shape) + _COMMON * rng.normal(size=(1, x.shape[1]))
        return np.full(x.shape, _FINAL_NORM if path[0].key == "norm" else 1.0)

    params = jax.tree_util.tree_map_with_path(drawn, _shapes(config))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def add_layers(config: ModelConfig, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return `params` of a shallower model in one of `config`'s depth that computes the same.

    Old layers are spread evenly, the first stays first; new ones are noise that writes nothing yet.
    """
    old = [name for name in params if name.startswith("blocks_")]
    L = config.num_layers
    if len(old) > L:
        raise ValueError(f"params have {len(old)} layers, the model {L}: layers are only ever added")
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
