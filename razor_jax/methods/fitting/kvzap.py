"""KVzap's recipe: ridge regression of logarithmic KVzip+ scores on hidden states, in closed form.

KVzip+ multiplies the largest weight that a repetition gives a token by the length of what the token then adds to the
residual stream, relative to that stream: max over query heads of w·‖W_o v‖ / ‖x‖ (arXiv 2601.07891).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from ...params import Params
from ...resume import State
from ..learned import Layer
from .descent import split
from .reading import RecordRepetition, read

RIDGES = tuple(10.0**power for power in range(-5, 3))  # times the mean variance of a feature
_FLOOR = 1e-8  # of a score, before its logarithm


def fit(
    params: Params, rows: Sequence[np.ndarray], state: State, progress: Callable[[int, int], None]
) -> tuple[Sequence[Layer], tuple[float, float]]:
    """Return weight float32 [K, D] and bias [K] of each layer, and the mean squared error without and with them.

    Sums over tokens are all that is kept. A layer's ridge is the best on the last quarter of the rows.
    """
    c = params.config
    output = jnp.stack([params.weights[f"blocks_{i}"]["o"]["kernel"] for i in range(c.num_layers)])
    size = c.hidden_size + 1 + c.num_kv_heads
    sums = state.arrays.get("sums", np.zeros((2, c.num_layers, size, size)))  # fitted and not, of [x, 1, score]
    fitted, _ = split(rows)
    for done in range(int(state.arrays.get("done", 0)), len(rows)):
        found = read(params, RecordRepetition(), rows[done])
        x, y = (np.asarray(a, np.float64)[:, : len(rows[done])] for a in (found["features"], targets(found, output)))
        z = np.concatenate([x, np.ones_like(x[..., :1]), y], axis=-1)
        sums[int(done >= len(fitted))] += z.swapaxes(1, 2) @ z
        state.save(sums=sums, done=np.asarray(done + 1))
        progress(done + 1, len(rows))
    solved = [_solve(sums[0, layer], sums[1, layer], c.hidden_size) for layer in range(c.num_layers)]
    before, after = (float(np.mean([losses[i] for _, losses in solved])) for i in range(2))
    return [part for part, _ in solved], (before, after)


@jax.jit
def targets(found: dict[str, jax.Array], output: jax.Array) -> Float32[jax.Array, "L T K"]:
    """Return logarithms of KVzip+ scores."""
    output, v = output.astype(jnp.float32), found["v"]
    products = jnp.einsum("lkghd,lkgid->lkghi", output, output)  # ‖W_o v‖² = vᵀ W_oᵀ W_o v
    squares = jnp.einsum("lkth,lkghi,lkti->lkgt", v, products, v)
    score = (found["most"] * jnp.sqrt(jnp.maximum(squares, 0.0))).max(axis=2) / found["norms"][:, None]
    return jnp.log(jnp.maximum(score, _FLOOR)).swapaxes(1, 2)


def _solve(fitted: np.ndarray, other: np.ndarray, features: int) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Return a layer's map, and its loss on the other rows: of the mean score, and of the map."""
    D, count = features, fitted[features, features]
    mean = fitted[D] / count
    centred = fitted / count - np.outer(mean, mean)  # the bias is not penalised
    best: Any = None
    for ridge in RIDGES:
        penalty = ridge * np.trace(centred[:D, :D]) / D * np.eye(D)
        weight = np.linalg.solve(centred[:D, :D] + penalty, centred[:D, D + 1 :])
        loss = _loss(other, weight, mean[D + 1 :] - mean[:D] @ weight)
        if best is None or loss < best[1]:
            best = weight, loss
    weight, loss = best
    bias = mean[D + 1 :] - mean[:D] @ weight
    parts = {"weight": weight.T.astype(np.float32), "bias": bias.astype(np.float32)}
    return parts, (_loss(other, np.zeros_like(weight), mean[D + 1 :]), loss)


def _loss(sums: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    """Return the mean squared error of a map, from sums of products."""
    error = np.concatenate([weight, bias[None], -np.eye(len(bias))])
    D = len(weight)
    return float(np.einsum("ik,ij,jk->", error, sums, error) / sums[D, D] / len(bias))
