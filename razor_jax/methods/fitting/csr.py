"""CSR's recipe: two dictionaries per layer, for keys and for halves of values, that leave pursuit the least error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...params import Params
from ...resume import State
from ..csr import decode, halves, pursue, unrotate
from ..learned import Layer
from .descent import Parts, descend, mean_loss, split
from .reading import Record, read

ATOMS = 8  # per key and per value
ENTRIES, TOKENS = 512, 128  # N, and tokens of a document that a step draws
RATE = 2e-3


def fit(
    params: Params, rows: Sequence[np.ndarray], state: State, progress: Callable[[int, int], None]
) -> tuple[Sequence[Layer], tuple[float, float]]:
    """Return the dictionaries of each layer, and the loss of vectors drawn from a document and of the dictionaries."""

    def read_row(row: np.ndarray) -> Any:
        found = read(params, Record(), row)
        lengths = jnp.full(params.config.num_layers, len(row), jnp.int32)  # layers in the place of rows
        return {"k": unrotate(found["k"], params.config, lengths), "v": found["v"], "length": lengths[0]}

    started = _start(read_row(rows[0]))
    before = mean_loss(loss, started, split(rows)[1], read_row)
    parts, after = descend(rows, read_row, started, loss, state, progress, project=_unit, rate=RATE)
    layers = [{n: np.asarray(x[i], np.float16) for n, x in parts.items()} for i in range(params.config.num_layers)]
    return layers, (before, after)


def loss(parts: Parts, reading: Any, key: jax.Array) -> jax.Array:
    """Return the relative squared error of keys and of values, and the penalty on atoms that are alike; summed.

    The penalty ‖I − W Wᵀ‖² / N² has a tenth of the error's size, at most itself (equation of the paper).
    """
    at = jax.random.randint(key, (TOKENS,), 0, reading["length"])
    vectors = {"keys": reading["k"][:, :, at], "values": halves(reading["v"][:, :, at])}
    counts = {"keys": ATOMS, "values": ATOMS // 2}

    def of_layer(name: str, x: jax.Array, dictionary: jax.Array) -> jax.Array:
        atoms, weights = jax.lax.stop_gradient(pursue(x, dictionary, counts[name]))
        error = jnp.sum((x - decode(atoms, weights, dictionary)) ** 2) / jnp.sum(x**2)
        alike = jnp.mean((jnp.eye(len(dictionary)) - dictionary @ dictionary.T) ** 2)
        return error + jax.lax.stop_gradient(jnp.clip(0.1 * error / alike, 0.0, 1.0)) * alike

    found = [jax.lax.map(lambda args, name=n: of_layer(name, *args), (x, parts[n])) for n, x in vectors.items()]
    return sum(jnp.mean(each) for each in found)  # type: ignore[return-value]


def _start(reading: Any) -> Parts:
    """Return vectors of a document, drawn at random and scaled to length 1."""
    rng, found = np.random.default_rng(0), {}
    for name, x in (("keys", reading["k"]), ("values", halves(reading["v"]))):
        vectors = np.asarray(x[:, :, : int(reading["length"])]).reshape(x.shape[0], -1, x.shape[-1])
        found[name] = jnp.asarray(vectors[:, rng.choice(vectors.shape[1], ENTRIES, vectors.shape[1] < ENTRIES)])
    return _unit(found)


def _unit(parts: Parts) -> Parts:
    return {name: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for name, x in parts.items()}
