"""Methods whose heads or layers keep different numbers of tokens, against the whole attention map in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import AdaKV, HeadKV, PyramidKV, SnapKV
from razor_jax.methods.kvzip import KVzip, RepetitionScores
from tests.support.methods import (
    IMPORTANCE,
    LENGTHS,
    B,
    G,
    K,
    T,
    attention_map,
    best_tokens,
    layer,
    pool_tokens,
    prompt_of,
    state_of,
)  # fmt: skip

BUDGET, WINDOW = 12, 4
SNAPKV = SnapKV(window=WINDOW, kernel=1)


def window_scores():
    """SnapKV's scores without smoothing, float64 [B, K, T]."""
    weights = attention_map(*layer()[:2])
    scores = np.stack([weights[b, :, :, n - WINDOW : n].sum(2) for b, n in enumerate(LENGTHS)]).mean(2)
    for b, n in enumerate(LENGTHS):
        scores[b, :, n - WINDOW :] = np.inf
    return scores


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_adakv_keeps_the_best_of_a_layer_after_a_floor_for_every_head(floor):
    scores = window_scores()
    first = best_tokens(scores, LENGTHS, int(BUDGET * floor))
    for b in range(B):
        for head in range(K):
            scores[b, head, list(first[b][head])] = np.inf
    expected = []
    for b, n in enumerate(LENGTHS):
        flat = np.argsort(-scores[b, :, :n].reshape(-1), kind="stable")[: K * BUDGET]
        expected.append([{int(i % n) for i in flat if i // n == head} for head in range(K)])
    assert pool_tokens(state_of(AdaKV(BUDGET, base=SNAPKV, floor=floor))) == expected
    if not floor:
        assert any(len(row[0]) != len(row[1]) for row in expected)


def test_a_floor_of_one_gives_every_head_as_many():
    assert pool_tokens(state_of(AdaKV(BUDGET, base=SNAPKV, floor=1.0))) == best_tokens(window_scores(), LENGTHS, BUDGET)


def test_kvzip_scores_a_token_by_the_largest_weight_of_the_repetition():
    q, k, v = layer()
    prompt, rng = prompt_of(k, v), np.random.default_rng(7)
    again_q, again_k = (rng.standard_normal(x.shape).astype(np.float32) for x in (q, k))
    expected = np.zeros((B, K, T))
    for b, n in enumerate(LENGTHS):
        both_k = np.concatenate([k[b, :, :n], again_k[b, :, :n]], axis=1)[None]
        both_q = np.concatenate([q[b, :, :n], again_q[b, :, :n]], axis=1)[None]
        expected[b, :, :n] = attention_map(both_q, both_k)[0, :, :, n:, :n].max((1, 2))
    # The engine gives the rows with the denominators of prompt and repetition together.
    from razor_jax.methods.base import QueryRows

    method = RepetitionScores()
    totals = np.zeros((B, K, T, G), np.float32)
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            keys = np.concatenate([k[b, :, :n], again_k[b, :, : t + 1]], axis=1).astype(np.float64)
            logits = np.einsum("kgh,kjh->kgj", again_q[b, :, t], keys) / np.sqrt(q.shape[-1])
            totals[b, :, t] = np.log(np.exp(logits).sum(-1))
    at = np.arange(T, dtype=np.int32)
    rows = QueryRows(again_q / np.float32(np.sqrt(q.shape[-1])), totals, at + T, at < LENGTHS[:, None])
    seen = np.asarray(method.see(method.start(prompt), rows, prompt))
    for b, n in enumerate(LENGTHS):
        assert_allclose(seen[b, :, :n], expected[b, :, :n], rtol=1e-4)
    assert KVzip(0.2).repeats


@pytest.mark.parametrize("number", [0, 1])
def test_pyramidkv_keeps_more_in_the_first_layer_than_in_the_last(number):
    size = [round(1.75 * BUDGET), round(0.25 * BUDGET)][number]
    state = state_of(PyramidKV(BUDGET, window=WINDOW, kernel=1, slope=4.0), number=number)
    assert state.valid.tolist() == [[size] * K] * B
    scores = window_scores()
    expected = best_tokens(scores, LENGTHS, size)
    k = layer()[1]
    for b in range(B):
        for head in range(K):
            kept = np.asarray(state.k)[b, head, :size]
            found = {int(np.argmin(((k[b, head] - x) ** 2).sum(-1))) for x in kept}
            assert found == expected[b][head]


def test_sizes_of_a_pyramid_sum_to_the_budget():
    method = PyramidKV(BUDGET, slope=20.0)
    for tokens in (8, 13, 20, 24, 400):
        sizes = [int(method.sizes(np.asarray([BUDGET]), np.asarray([tokens]), i, 6)[0]) for i in range(6)]
        assert abs(sum(sizes) - 6 * min(BUDGET, tokens)) <= 3
        assert sizes == sorted(sizes, reverse=True)


def test_headkv_shares_slots_out_by_importance():
    method = HeadKV(BUDGET, window=WINDOW, kernel=1, importance=IMPORTANCE, beta=1.25)
    weights = np.asarray(IMPORTANCE) * 4 / np.sum(IMPORTANCE)
    for number in range(2):
        sizes = WINDOW + np.floor((BUDGET - WINDOW) * (0.2 + 0.8 * weights[number]) + 1e-3).astype(int)
        kept = pool_tokens(state_of(method, number=number))
        expected = [best_tokens(window_scores(), LENGTHS, size) for size in sizes]
        assert kept == [[expected[head][b][head] for head in range(K)] for b in range(B)]


def test_headkv_gives_what_full_heads_cannot_use_to_the_others():
    method = HeadKV(30, window=WINDOW, importance=IMPORTANCE, beta=1.01)
    room, lengths = np.asarray([30]), np.asarray([40])
    sizes = np.concatenate([method.sizes(room, lengths, number)[0] for number in range(2)])
    assert sizes.max() == 40
    assert 4 * 30 - 4 <= sizes.sum() <= 4 * 30
    # A share of everything keeps everything.
    assert method.sizes(np.asarray([50]), lengths, 0).tolist() == [[40, 40]]


def test_headkv_without_importance_is_refused():
    from tests.support.methods import CONFIG

    with pytest.raises(ValueError, match=r"importance of shape \(2, 2\)"):
        HeadKV(0.2).check(CONFIG)
