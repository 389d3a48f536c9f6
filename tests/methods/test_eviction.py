"""Methods that evict while decoding, against simulations in float64 that hold every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from razor_jax.methods import CORM, H2O, TOVA, ElasticCache, StreamingLLM
from tests.support.methods import (
    LENGTHS,
    B,
    G,
    H,
    K,
    T,
    attention_map,
    kept_tokens,
    later,
    layer,
    observe,
    prompt_of,
    state_of,
)

BUDGET, STEPS = 10, 20


def run(method):
    """The method's outputs [steps, B, K, G, H] and the tokens it keeps after each step."""
    q, k, v = later(STEPS)
    every = np.concatenate([layer()[1], np.moveaxis(k, 1, 2)], axis=2)
    state, outs, kept, one = state_of(method), [], [], jax.jit(method.step)
    for step in range(STEPS):
        position = jnp.asarray(LENGTHS + step)
        out, state = one(state, *(jnp.asarray(x[:, step]) for x in (q, k, v)), position)
        outs.append(np.asarray(out))
        kept.append(kept_tokens(state.k, state.valid, every))
    return np.stack(outs), kept


def simulate(method, first, choose):
    """The same by sets of tokens: `choose(b, head, tokens, weights, step)` returns the token to drop, or None.

    `first` are the tokens kept of the prompt. Tokens are numbered as in `run`: later ones from T on.
    """
    q, k, v = (x.astype(np.float64) for x in later(STEPS))
    keys, values = (np.concatenate([a, np.moveaxis(b, 1, 2)], axis=2) for a, b in zip(layer()[1:], (k, v), strict=True))
    sets, outs, kept = [[sorted(head) for head in row] for row in first], [], []
    for step in range(STEPS):
        out, weights = np.empty((B, K, G, H)), [[None] * K for _ in range(B)]
        for b in range(B):
            for head in range(K):
                tokens = sets[b][head] = [*sets[b][head], T + step]
                logits = q[b, step, head] @ keys[b, head, tokens].T / np.sqrt(H)
                p = np.exp(logits - logits.max(-1, keepdims=True))
                weights[b][head] = p / p.sum(-1, keepdims=True)
                out[b, head] = weights[b][head] @ values[b, head, tokens]
        for b in range(B):
            for head in range(K):
                for token in choose(b, head, sets[b][head], weights[b], step):
                    sets[b][head] = [t for t in sets[b][head] if t != token]
        outs.append(out)
        kept.append([[set(head) for head in row] for row in sets])
    return np.stack(outs), kept


def check(method, choose):
    outs, kept = run(method)
    state = state_of(method)
    expected, sets = simulate(method, kept_tokens(state.k, state.valid, layer()[1]), choose)
    assert kept == sets
    assert_allclose(outs, expected, rtol=1e-4, atol=1e-4)


def position_of(b, token):
    return token if token < T else LENGTHS[b] + token - T


def test_tova_drops_what_the_newest_token_attends_to_least():
    def choose(b, head, tokens, weights, step):
        if len(tokens) <= BUDGET:
            return []
        # All heads hold the same tokens.
        mean = np.mean([w.mean(0) for w in weights], axis=0)
        return [tokens[int(np.argmin(mean[: len(tokens) - 1]))]]

    check(TOVA(BUDGET), choose)


def test_h2o_drops_the_smallest_sum_outside_the_newest_half():
    sums = attention_map(*layer()[:2])
    totals = {
        (b, head): {t: sums[b, head, :, : LENGTHS[b], t].sum(1).mean() for t in range(LENGTHS[b])}
        for b in range(B)
        for head in range(K)
    }

    def choose(b, head, tokens, weights, step):
        total = totals[b, head]
        for token, weight in zip(tokens, weights[head].mean(0), strict=True):
            total[token] = total.get(token, 0.0) + weight
        if len(tokens) <= BUDGET:
            return []
        newest = sorted(tokens, key=lambda t: position_of(b, t))[-(BUDGET // 2) :]
        return [min((t for t in tokens if t not in newest), key=total.__getitem__)]

    check(H2O(BUDGET), choose)


def test_streaming_drops_the_oldest_that_is_no_sink():
    def choose(b, head, tokens, weights, step):
        by_age = sorted(tokens, key=lambda t: position_of(b, t))
        return by_age[4 : len(tokens) - BUDGET + 4]

    check(StreamingLLM(BUDGET), choose)


@pytest.mark.parametrize(("budget", "window"), [(200, 6), (14, 6)])
def test_corm_drops_what_no_recent_step_found_important(budget, window):
    whole = attention_map(*layer()[:2])
    marks = {}
    for b in range(B):
        for head in range(K):
            rows = whole[b, head, :, : LENGTHS[b], : LENGTHS[b]].max(0)
            marked = rows >= 1 / (np.arange(LENGTHS[b]) + 1)[:, None]
            marked[: LENGTHS[b] - window] = False
            marks[b, head] = {t: max(np.flatnonzero(marked[:, t]).tolist(), default=-1) for t in range(LENGTHS[b])}

    def choose(b, head, tokens, weights, step):
        now, mark = LENGTHS[b] + step, marks[b, head]
        for token, weight in zip(tokens, weights[head].max(0), strict=True):
            important = weight >= 1 / len(tokens)
            mark[token] = now if important else mark.get(token, -1)
        old = [t for t in tokens[:-1] if position_of(b, t) <= now - window]
        dropped = [t for t in old if mark[t] <= now - window]
        left = [t for t in old if t not in dropped]
        if len(tokens) - len(dropped) > budget:
            dropped.append(min(left, key=lambda t: (mark[t], position_of(b, t))))
        return dropped

    check(CORM(budget, window=window), choose)


def test_a_large_window_of_corm_keeps_everything():
    state = state_of(CORM(200, window=200))
    assert state.valid.tolist() == [[n] * K for n in LENGTHS]


def test_elastic_cache_merges_tokens_into_the_nearest_anchor():
    _, k, v = layer()
    prompt = prompt_of(k, v)
    method = ElasticCache(5, sinks=0)
    seen = np.zeros((B, K, G, T), np.float32)
    seen[..., [0, 4, 9, 20]] = 1.0  # and the last token
    state = method.compress(prompt, jnp.asarray(seen), method.room(prompt.lengths, 8 * H), 5)
    for b, n in enumerate(LENGTHS):
        buckets = [range(3), range(3, 7), range(7, 15), range(15, n - 1), range(n - 1, n)]
        for x, found in ((k, state.k), (v, state.v)):
            expected = [x[b, :, list(bucket)].mean(0) for bucket in buckets]
            for mean in expected:
                distance = np.abs(np.asarray(found)[b] - mean[:, None]).max((0, 2))
                assert distance.min() < 1e-5


def test_the_queue_of_elastic_cache_is_first_in_first_out():
    method = ElasticCache(BUDGET, queue=4, merge=False)
    before = state_of(method)
    _, kept = run(method)
    first = kept_tokens(before.k, before.valid, layer()[1])
    for b in range(B):
        for head in range(K):
            frozen = sorted(first[b][head])[: BUDGET - 4]
            for step in range(4, STEPS):
                assert kept[step][b][head] == {*frozen, *range(T + step - 3, T + step + 1)}
    q, k, v = later(STEPS)
    state = before
    for step in range(3):
        _, state = method.step(state, *(jnp.asarray(x[:, step]) for x in (q, k, v)), jnp.asarray(LENGTHS + step))
    assert_array_equal(np.asarray(state.k)[:, :, : BUDGET - 4], np.asarray(before.k)[:, :, : BUDGET - 4])


def test_elastic_cache_keeps_every_token_that_it_has_room_for():
    q, k, v = layer()
    method = ElasticCache(60)
    state = method.compress(prompt_of(k, v), observe(method, q, prompt_of(k, v)), jnp.asarray([60, 60]), 60)
    assert kept_tokens(state.k, state.valid, k) == [[set(range(n))] * K for n in LENGTHS]
