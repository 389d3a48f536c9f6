"""score: teacher forcing on the compressed cache, which a one-pass score would not touch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import razor_jax
from razor_jax import HeadSplit, RazorConfig
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24)
PROMPT, CONTINUATION = tiny.prompt(100), tiny.prompt(30, seed=5)

extend = jax.jit(razor_jax.extend, static_argnames="logits")
decode = jax.jit(razor_jax.decode)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def one_by_one(params, razor):
    cache = razor_jax.init_cache(params, batch=1, capacity=192, razor=razor)
    padded = np.pad(PROMPT, (0, 156))[None]
    logits, cache = extend(params, cache, padded, np.asarray([100], np.int32))
    out = []
    for token in CONTINUATION:
        out.append(log_softmax(logits)[0, token])
        logits, cache = decode(params, cache, np.asarray([token], np.int32))
    return np.asarray(out)


def test_exact_score_is_decoding_with_given_tokens():
    params = tiny.params(text=False)
    score = razor_jax.score(params, PROMPT, CONTINUATION, razor=WINDOW, exact=True)
    assert_allclose(score.logprobs, one_by_one(params, WINDOW), atol=2e-5)
    assert score.chunk == 1
    assert score.total == pytest.approx(score.logprobs.sum(), abs=1e-3)


def test_dense_score_is_one_pass_and_compression_is_not():
    params = tiny.params(text=False)
    both = np.concatenate([PROMPT, CONTINUATION])
    cache = razor_jax.init_cache(params, batch=1, capacity=192, razor=None)
    logits, _ = extend(params, cache, both[None], np.asarray([130], np.int32), logits="all")
    one_pass = log_softmax(logits[0, 99:129])[np.arange(30), CONTINUATION]
    for exact in (True, False):
        dense = razor_jax.score(params, PROMPT, CONTINUATION, razor=None, exact=exact)
        assert_allclose(dense.logprobs, one_pass, atol=2e-5)
    bare = razor_jax.with_heads(params, HeadSplit.none(2, 2))
    policy = RazorConfig(window=24, compensation=False)
    windowed = razor_jax.score(bare, PROMPT, CONTINUATION, razor=policy)
    assert windowed.kv.engaged
    # The first token comes from the exact prefill and is dense by construction.
    assert_allclose(windowed.logprobs[0], one_pass[0], atol=2e-5)
    assert np.abs(windowed.logprobs[1:] - one_pass[1:]).max() > 0.05


def test_chunked_score_is_stated_and_near_the_exact_one():
    params = tiny.params(text=False)
    exact = razor_jax.score(params, PROMPT, CONTINUATION, razor=WINDOW, exact=True)
    chunked = razor_jax.score(params, PROMPT, CONTINUATION, razor=WINDOW)
    assert chunked.chunk == 16
    difference = np.abs(chunked.logprobs - exact.logprobs)
    assert_allclose(difference[:2], 0, atol=2e-5)
    assert difference.max() > 1e-4  # else the chunk saw what decoding sees, and its statement would be wrong


def test_greedy_marks_what_generate_would_choose():
    params = tiny.params(text=False)
    chosen = razor_jax.generate(params, PROMPT, max_new_tokens=12, razor=WINDOW).tokens
    assert razor_jax.score(params, PROMPT, chosen, razor=WINDOW, exact=True).greedy.all()
    wrong = np.asarray(chosen)
    wrong[3] = (wrong[3] + 1) % 200
    assert_array_equal(razor_jax.score(params, PROMPT, wrong, razor=WINDOW, exact=True).greedy[:4], [1, 1, 1, 0])


def test_a_batch_of_ragged_pairs_equals_each_alone():
    params = tiny.params(text=False)
    prompts = [PROMPT, tiny.prompt(9)]
    continuations = [CONTINUATION[:5], CONTINUATION]
    together = razor_jax.score(params, prompts, continuations, razor=WINDOW)
    for prompt, continuation, row in zip(prompts, continuations, together, strict=True):
        alone = razor_jax.score(params, prompt, continuation, razor=WINDOW)
        assert_allclose(row.logprobs, alone.logprobs, atol=2e-5)
        assert len(row.logprobs) == len(continuation)


def test_unequal_lists_are_named():
    with pytest.raises(ValueError, match="2 prompts but 1 continuations"):
        razor_jax.score(tiny.params(text=False), [PROMPT, PROMPT], [CONTINUATION])
