"""KVzap's kept tokens and its recipe against float64 NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import KVzap
from razor_jax.methods.fitting import kvzap
from razor_jax.methods.fitting.reading import Record, RecordRepetition, read
from razor_jax.params import with_heads
from tests.support import tiny
from tests.support.methods import (
    CONFIG,
    LENGTHS,
    H,
    K,
    T,
    attention_map,
    best_of_pool,
    layer,
    pool_tokens,
    prompt_of,
    text,
)  # fmt: skip

BUDGET = 12


@pytest.mark.parametrize("window", [0, 4, 100])
def test_kvzap_keeps_the_best_predictions_of_a_layer_and_the_newest_tokens(window):
    rng = np.random.default_rng(3)
    weight, bias = rng.standard_normal((K, CONFIG.hidden_size)), rng.standard_normal(K)
    prompt = prompt_of(*layer()[1:])
    x = np.asarray(prompt.x, np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    scores = np.einsum("btd,kd->bkt", x, weight) + bias[:, None]
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - min(window, BUDGET // 2) : n] = np.inf
    parts = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    method = KVzap(BUDGET, window=window).with_parts(parts)
    pool = method.compress(prompt, method.start(prompt), method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H))
    assert pool_tokens(pool) == best_of_pool(scores, BUDGET)


def test_targets_are_what_a_repetition_reads_of_a_token_relative_to_the_residual_stream():
    params, row = with_heads(tiny.params(text=False), None), np.asarray(text(40), np.int32)
    n = len(row)
    found = read(params, RecordRepetition(), row)
    output = jnp.stack([params.weights[f"blocks_{i}"]["o"]["kernel"] for i in range(2)])
    targets = np.asarray(kvzap.targets(found, output))[:, :n]
    # The prompt twice is one prompt, whose second half is the repetition.
    both = {
        name: np.asarray(x, np.float64)[:, :, : 2 * n] for name, x in read(params, Record(), np.tile(row, 2)).items()
    }
    weights = attention_map(both["q"] * np.sqrt(params.config.head_dim), both["k"])[:, :, :, n:, :n].max(3)
    added = np.einsum("lkth,lkghd->lkgtd", both["v"][:, :, :n], np.asarray(output, np.float64))
    score = (weights * np.linalg.norm(added, axis=-1)).max(2).swapaxes(1, 2)
    norms = np.asarray(found["norms"], np.float64)[:, :n, None]
    assert_allclose(targets, np.log(score / norms), atol=1e-3)
    embedded = np.asarray(params.weights["embedding"]["embedding"], np.float64)[row]
    assert_allclose(norms[0, :, 0], np.linalg.norm(embedded, axis=-1), rtol=1e-5)


def test_the_map_is_the_ridge_regression_of_its_penalty(monkeypatch):
    monkeypatch.setattr(kvzap, "RIDGES", (0.1,))
    rng = np.random.default_rng(0)
    (x, y), (x_other, y_other) = ((rng.standard_normal((n, 6)) + 1, rng.standard_normal((n, 2))) for n in (50, 20))

    def sums(x, y):
        z = np.concatenate([x, np.ones((len(x), 1)), y], axis=1)
        return z.T @ z

    part, (_, loss) = kvzap._solve(sums(x, y), sums(x_other, y_other), 6)
    centred, penalty = x - x.mean(0), 0.1 * x.var(0).mean()
    # Ridge regression as least squares on more rows, one for each penalised weight.
    more = np.concatenate([centred / np.sqrt(len(x)), np.sqrt(penalty) * np.eye(6)])
    weight = np.linalg.lstsq(more, np.concatenate([(y - y.mean(0)) / np.sqrt(len(x)), np.zeros((6, 2))]), rcond=None)[0]
    assert_allclose(part["weight"], weight.T, rtol=1e-5)
    predicted = (x_other - x.mean(0)) @ weight + y.mean(0)
    assert_allclose(loss, ((predicted - y_other) ** 2).mean(), rtol=1e-9)
