"""Razor's heads with a choice inside, against sets of tokens and a literal softmax in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.kernels import attention as kernel
from razor_jax.methods import RazorKVzip, RazorSnapKV, SnapKV
from tests.support.methods import (
    CONFIG,
    LENGTHS,
    B,
    G,
    H,
    K,
    attention_map,
    best_tokens,
    kept_tokens,
    layer,
    state_of,
)  # fmt: skip

BUDGET, WINDOW, SINKS = 12, 5, 2
METHOD = RazorSnapKV(BUDGET, SnapKV(window=4, kernel=1), ((1,), ()), sinks=SINKS, window=WINDOW)
# Four heads share 48 slots: three windows of 7, and what they leave to the one retrieval head.
RETRIEVAL, WINDOWED = 27, 7
STORED = WINDOWED - 1  # the means are as large as a float32 slot


def snapkv_scores():
    weights = attention_map(*layer()[:2])
    scores = np.stack([weights[b, :, :, n - 4 : n].sum(2) for b, n in enumerate(LENGTHS)]).mean(2)
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - 4 :] = np.inf
    return scores


def windowed_tokens(n):
    return {*range(SINKS), *range(n - STORED + SINKS, n)}


def test_retrieval_heads_keep_the_best_scores_and_the_others_sinks_and_a_window():
    state = state_of(METHOD, number=0)
    assert state.order == (1, 0)
    best = best_tokens(snapkv_scores(), LENGTHS, RETRIEVAL)
    k = layer()[1]
    assert kept_tokens(state.retrieval.k, state.retrieval.valid, k[:, 1:]) == [[row[1]] for row in best]
    windows = [[windowed_tokens(n)] for n in LENGTHS]
    assert kept_tokens(state.windowed.k, state.windowed.valid, k[:, :1]) == windows
    assert state.dropped.tolist() == [n - STORED for n in LENGTHS]


def test_a_layer_without_retrieval_heads_has_windows_only():
    state = state_of(METHOD, number=1)
    assert state.retrieval.k.shape[1] == 0
    assert kept_tokens(state.windowed.k, state.windowed.valid, layer()[1]) == [
        [windowed_tokens(n)] * K for n in LENGTHS
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_attention_weighs_the_mean_of_what_a_window_dropped_by_its_number(number):
    state = state_of(METHOD, number=number)
    _, k, v = (x.astype(np.float64) for x in layer())
    q = np.random.default_rng(9).standard_normal((B, K, 3 * G, H)).astype(np.float32)
    found = kernel.finish(METHOD.read(state, jnp.asarray(q), H**-0.5, None), q.dtype)
    best = best_tokens(snapkv_scores(), LENGTHS, RETRIEVAL)
    for b, n in enumerate(LENGTHS):
        for head in range(K):
            retrieval = head in METHOD.retrieval[number]
            kept = sorted(best[b][head] if retrieval else windowed_tokens(n))
            keys, values, counts = k[b, head, kept], v[b, head, kept], np.ones(len(kept))
            if not retrieval:
                gone = [t for t in range(n) if t not in kept]
                keys = np.vstack([keys, k[b, head, gone].mean(0)])
                values = np.vstack([values, v[b, head, gone].mean(0)])
                counts = np.append(counts, len(gone))
            weights = counts * np.exp(q[b, head] @ keys.T / np.sqrt(H))
            assert_allclose(found[b, head], weights @ values / weights.sum(-1, keepdims=True), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [10, 33, 400])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 1.0])
def test_sizes_spend_the_budget(tokens, budget):
    method, room = RazorKVzip(budget, retrieval=((1,), ()), window=WINDOW, sinks=SINKS), np.asarray([budget * tokens])
    room = np.ceil(room).astype(np.int32)
    whole, windowed = (int(x[0]) for x in method.sizes(room, np.asarray([tokens], np.int32), CONFIG))
    assert 0 <= whole + 3 * windowed - 4 * room[0] < 3
    assert whole <= tokens
    assert windowed >= min(WINDOW + SINKS, room[0])
    assert whole == tokens or windowed <= max(WINDOW + SINKS, room[0])


def test_heads_of_another_model_are_refused():
    with pytest.raises(ValueError, match="needs the retrieval heads of 2 layers of 2 KV heads"):
        RazorKVzip(0.2).check(CONFIG)
    with pytest.raises(ValueError, match=r"has \(\(5,\), \(\)\)"):
        RazorKVzip(0.2, retrieval=((5,), ())).check(CONFIG)
