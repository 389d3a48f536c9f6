"""LESS's recipe: kept tokens and memory together repeat what dense attention adds to the residual stream.

Layers are independent of each other, but take their steps in one program. Each step draws 64 query rows of a document
and the size of the window of newest tokens, because the memory must serve any number of evicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...params import Params
from ...resume import State
from ..learned import Layer
from ..less import key_features, query_features
from .descent import Parts, descend, mean_loss, split
from .reading import Record, read

RANK, HIDDEN = 8, 64  # R and R'
SINKS, ROWS, SHORTEST = 4, 64, 16  # SHORTEST window of newest tokens; the longest is half of the document
_SMALL = 1e-4  # first scales of ψ: the memory starts almost empty


def fit(
    params: Params, rows: Sequence[np.ndarray], state: State, progress: Callable[[int, int], None]
) -> tuple[Sequence[Layer], tuple[float, float]]:
    """Return the feature maps of each layer, and the mean squared error relative to the dense output.

    The first loss is that of sinks and newest tokens without a memory, whose bytes serve for newest tokens.
    """
    output = jnp.stack([params.weights[f"blocks_{i}"]["o"]["kernel"] for i in range(params.config.num_layers)])

    def read_row(row: np.ndarray) -> Any:
        return read(params, Record(), row) | {"length": np.int32(len(row)), "output": output}

    started = _start(params)
    extra = math.ceil(4 * RANK * (params.config.head_dim + 1) / (2 * params.config.head_dim * params.dtype.itemsize))

    def without(parts: Parts, reading: Any, key: jax.Array) -> jax.Array:
        return loss(parts, reading, key, extra)

    before = mean_loss(without, started, split(rows)[1], read_row)
    parts, after = descend(rows, read_row, started, loss, state, progress)
    layers = [{name: np.asarray(x[i]) for name, x in parts.items()} for i in range(params.config.num_layers)]
    return layers, (before, after)


def loss(parts: Parts, reading: Any, key: jax.Array, instead: int = 0) -> jax.Array:
    """Return the mean over layers of the squared error, relative to the mean square of the dense output.

    `instead`: tokens to keep in place of the memory; 0 for the memory.
    """
    k, v, length = reading["k"], reading["v"], reading["length"]
    T = k.shape[2]
    first, second = jax.random.split(key)
    recent = jax.random.randint(first, (), jnp.minimum(SHORTEST, length // 4), length // 2 + 1)
    at = jax.random.randint(second, (ROWS,), SINKS + recent, length)
    q = jnp.moveaxis(reading["q"][:, :, at], 2, 3)  # [L, K, G, rows, H]
    logits = jnp.einsum("lkgph,lkth->lkgpt", q, k)
    token = jnp.arange(T, dtype=jnp.int32)
    seen = token <= at[:, None]
    kept = seen & ((token < SINKS) | (token > at[:, None] - recent - instead))
    exact = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    # Relative to what is kept: an evicted token may weigh so much more that all kept weights would vanish.
    top = jnp.maximum(jnp.max(jnp.where(kept, logits, -jnp.inf), axis=-1, keepdims=True), 0.0)
    near = jnp.where(kept, jnp.exp(jnp.where(kept, logits, 0.0) - top), 0.0)
    if not instead:
        phi = query_features(parts, q * math.sqrt(q.shape[-1]))
        psi = key_features(parts, k)
        memory = jnp.einsum("lkgpr,lktr->lkgpt", phi, psi) * jnp.exp(-top)
        near += jnp.where(seen & ~kept, memory, 0.0)
    error, whole = (_output(weights, v, reading["output"]) for weights in (near, exact))
    error = error - whole
    return jnp.mean((error**2).mean(axis=(1, 2)) / (whole**2).mean(axis=(1, 2)))


def _output(weights: jax.Array, v: jax.Array, output: jax.Array) -> jax.Array:
    """Return what attention adds to the residual stream, [L, rows, D], from weights [L, K, G, rows, T] of any sum."""
    out = jnp.einsum("lkgpt,lkth->lkgph", weights, v) / weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("lkgph,lkghd->lpd", out, output.astype(jnp.float32))


def _start(params: Params) -> Parts:
    """Return the first maps: uniform within ±√(6 / (inputs + outputs))."""
    c = params.config
    L, K, G, H = c.num_layers, c.num_kv_heads, c.group_size, c.head_dim
    shapes = {
        "q_in": (L, K, G, H, HIDDEN),
        "q_out": (L, K, G, HIDDEN, RANK),
        "k_in": (L, K, H, HIDDEN),
        "k_out": (L, K, HIDDEN, RANK),
        "mix": (L, K, RANK, RANK),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    parts = {
        name: jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / sum(shape[-2:]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    small = jnp.full((L, K, RANK), _SMALL, jnp.float32)
    return parts | {"scale": small, "mix_scale": small}
