"""AttentionPredictor's recipe: one network for all layers and heads, from pooled rows of the dense reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...params import Params
from ...resume import State
from ..attention_predictor import HISTORY, pool, predict
from ..learned import Layer
from .descent import Parts, descend, mean_loss, split
from .reading import Record, read

CHANNELS = (16, 32)
HEADS = 16  # query heads that a step draws, of all layers
RATE = 2e-3


def fit(
    params: Params, rows: Sequence[np.ndarray], state: State, progress: Callable[[int, int], None]
) -> tuple[Sequence[Layer], tuple[float, float]]:
    """Return the network, and the squared error relative to the rows' mean square; before: the last row, repeated."""
    if min(map(len, rows)) <= HISTORY:
        raise ValueError(f"a document of {min(map(len, rows))} tokens: AttentionPredictor needs more than {HISTORY}")

    def read_row(row: np.ndarray) -> Any:
        found = read(params, Record(), row)
        return {"q": found["q"], "k": found["k"], "length": np.int32(len(row))}

    def repeated(parts: Parts, reading: Any, key: jax.Array) -> jax.Array:
        history, row = windows(reading, key)
        return _relative(history[:, -1], row)

    before = mean_loss(repeated, {}, split(rows)[1], read_row)
    parts, after = descend(rows, read_row, _start(), loss, state, progress, rate=RATE)
    return [{name: np.asarray(x) for name, x in parts.items()}], (before, after)


def loss(parts: Parts, reading: Any, key: jax.Array) -> jax.Array:
    """Return the squared error of predicted rows, relative to the mean square of the rows."""
    history, row = windows(reading, key)
    return _relative(predict(parts, history), row)


def windows(reading: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return pooled rows of random query heads: 64 in sequence [heads, 64, blocks], and the next [heads, blocks]."""
    q, k, T = reading["q"], reading["k"], reading["k"].shape[2]
    L, K, _, G, H = q.shape
    first, second = jax.random.split(key)
    chosen = jax.random.randint(first, (HEADS,), 0, L * K * G)
    start = jax.random.randint(second, (), 0, reading["length"] - HISTORY)
    at = start + jnp.arange(HISTORY + 1, dtype=jnp.int32)
    heads = jnp.moveaxis(q[:, :, at], 2, 3).reshape(L * K * G, HISTORY + 1, H)[chosen]
    logits = jnp.einsum("nwh,nth->nwt", heads, k.reshape(L * K, T, H)[chosen // G])
    seen = jnp.arange(T, dtype=jnp.int32) <= at[:, None]
    pooled = pool(jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1))
    return pooled[:, :-1], pooled[:, -1]


def _relative(found: jax.Array, row: jax.Array) -> jax.Array:
    return jnp.mean((found - row) ** 2) / jnp.mean(row**2)


def _start() -> Parts:
    """Return the first network: normal with the variance 2 / inputs, biases zero."""
    one, two = CHANNELS
    shapes = {"first": (3, 3, 1, one), "second": (3, 3, one, two), "last": (two, 1)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    parts = {
        name: jax.random.normal(key, shape, jnp.float32) * math.sqrt(2 / math.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return parts | {f"{name}_bias": jnp.zeros(shape[-1], jnp.float32) for name, shape in shapes.items()}
