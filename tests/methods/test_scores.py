"""Each method's kept tokens against the whole attention map in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import H2O, TOVA, ExpectedAttention, KNorm, SnapKV, StreamingLLM
from razor_jax.methods.observed import smooth
from tests.support.methods import (
    CONFIG,
    LENGTHS,
    B,
    G,
    H,
    K,
    T,
    attention_map,
    best_tokens,
    kept_tokens,
    layer,
    observe,
    prompt_of,
    state_of,
)  # fmt: skip

BUDGET = 12


def kept(method, **options):
    state = state_of(method, **options)
    return kept_tokens(state.k, state.valid, layer()[1])


def rows_of_map(first, last):
    """Sum over the map's rows of each batch row from `first` to `last`, counted from its end; float64 [B, K, G, T]."""
    weights = attention_map(*layer()[:2])
    return np.stack([weights[b, :, :, n - first : n - last].sum(2) for b, n in enumerate(LENGTHS)])


def test_knorm_keeps_the_shortest_keys():
    norms = np.linalg.norm(layer()[1].astype(np.float64), axis=-1)
    assert kept(KNorm(BUDGET)) == best_tokens(-norms, LENGTHS, BUDGET)


def test_streaming_keeps_sinks_and_the_newest():
    expected = [{*range(4), *range(n - 8, n)} for n in LENGTHS]
    assert kept(StreamingLLM(BUDGET)) == [[row] * K for row in expected]


@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_keeps_what_the_window_attends_to(kernel):
    window = 6
    scores = rows_of_map(window, 0).mean(2)
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - window :] = 0
    ones = np.ones(kernel) / kernel
    scores = np.apply_along_axis(lambda x: np.convolve(x, ones, "same"), -1, scores)
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - window : n] = np.inf
    assert kept(SnapKV(BUDGET, window=window, kernel=kernel)) == best_tokens(scores, LENGTHS, BUDGET)


def test_smoothing_spreads_a_spike_to_its_neighbours():
    spike = jnp.eye(9)[4]
    assert_allclose(smooth(spike, 5), [0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0], atol=1e-7)
    assert_allclose(smooth(spike, 5, "max"), [0, 0, 1, 1, 1, 1, 1, 0, 0])


def test_tova_keeps_what_the_last_token_attends_to_in_all_heads():
    scores = np.broadcast_to(rows_of_map(1, 0).mean((1, 2))[:, None], (B, K, T)).copy()
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - 1] = np.inf
    assert kept(TOVA(BUDGET)) == best_tokens(scores, LENGTHS, BUDGET)


def test_h2o_keeps_heavy_hitters_and_the_newest_with_their_sums():
    sums = np.stack([rows_of_map(n, 0)[b] for b, n in enumerate(LENGTHS)]).mean(2)
    scores = sums.copy()
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - BUDGET // 2 : n] = np.inf
    state = state_of(H2O(BUDGET))
    assert kept(H2O(BUDGET)) == best_tokens(scores, LENGTHS, BUDGET)
    at = np.asarray(state.position)[..., :BUDGET]
    assert_allclose(np.asarray(state.score)[..., :BUDGET], np.take_along_axis(sums, at, -1), rtol=1e-5)


def test_expected_attention_keeps_what_future_queries_are_expected_to_attend_to():
    q, k, v = (x.astype(np.float64) for x in layer())
    half, scores = H // 2, np.empty((B, K, T))
    frequencies = 1.0 / CONFIG.rope.theta ** (np.arange(half) / half)

    def turn(position):
        c, s = np.diag(np.cos(position * frequencies)), np.diag(np.sin(position * frequencies))
        return np.block([[c, -s], [s, c]])

    for b, n in enumerate(LENGTHS):
        mean_turn = np.mean([turn(p) for p in range(n, n + 512)], axis=0)
        for head in range(K):
            found = np.zeros(n - 4)
            for g in range(G):
                plain = np.stack([turn(t).T @ q[b, head, t, g] for t in range(4, n)])
                mean, covariance = mean_turn @ plain.mean(0), mean_turn @ np.cov(plain.T, bias=True) @ mean_turn.T
                keys = k[b, head, 4:n]
                logits = keys @ mean / np.sqrt(H) + np.einsum("ti,ij,tj->t", keys, covariance, keys) / (2 * H)
                weights = np.exp(logits - logits.max())
                found += weights / weights.sum() / G
            scores[b, head, 4:n] = found * np.linalg.norm(v[b, head, 4:n], axis=-1)
            scores[b, head, :4] = np.inf
    method, prompt = ExpectedAttention(BUDGET), prompt_of(*layer()[1:])
    ours = np.asarray(method.scores(prompt, observe(method, layer()[0], prompt)))
    for b, n in enumerate(LENGTHS):
        assert_allclose(ours[b, :, 4:n], scores[b, :, 4:n], rtol=2e-4)
    assert kept(method) == best_tokens(scores, LENGTHS, BUDGET)


@pytest.mark.parametrize("method", [SnapKV, TOVA, H2O, ExpectedAttention])
def test_chunks_do_not_matter(method):
    q, k, v = layer()
    prompt = prompt_of(k, v)
    seen = (jax.tree.leaves(observe(method(BUDGET), q, prompt, chunk)) for chunk in (16, 40))
    for one, other in zip(*seen, strict=True):
        assert_allclose(one, other, rtol=1e-5, atol=1e-5)
