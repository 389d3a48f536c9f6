"""Verified drafts against decode steps: of the literal model, and of the package in every type of cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from razor_jax import Params, RazorConfig, functional, with_heads
from razor_jax.models.config import Rope
from razor_jax.text.verification import commit, verify

from ..support import oracle
from ..support.small import CONFIG, RULE, SPLIT, decode, extend, params, text, weights

T = 4
PROMPTS, WINDOWS = (9, 30, 21), (3, 10, 7)  # Row 0 evicts its whole ring, and all rows have dropped tokens.
LENGTHS = (4, 2, 3)
ACCEPTED = (2, 0, 3)


@functools.cache
def verify_jitted():
    return jax.jit(verify)


def read_prompts(model: Params, razor: RazorConfig | None):
    """Return a cache of the prompts, NaN where nothing was written, and the tokens that follow."""
    lengths = np.asarray(PROMPTS, np.int32)
    cache = functional.init_cache(model, batch=3, capacity=42, razor=razor, prompt_lengths=lengths)
    unwritten = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, cache.layers
    )
    tokens = text()
    _, cache = extend(model, cache.replace(layers=unwritten), tokens[:, :32], lengths)
    return cache, np.stack([tokens[b, n : n + T] for b, n in enumerate(PROMPTS)])


def decode_steps(model: Params, cache, tokens, lengths):
    """Return logits [B, T, V] of decode steps, and the cache after each."""
    logits, caches = [], [cache]
    for step in range(T):
        found, cache = decode(model, cache, tokens[:, step], np.asarray(lengths) > step)
        logits.append(np.asarray(found))
        caches.append(cache)
    return np.stack(logits, axis=1), caches


def test_verified_logits_are_those_of_the_literal_models_steps():
    cache, tokens = read_prompts(params(), RULE)
    assert (np.asarray(cache.dropped) > 0).all()
    logits, _ = verify_jitted()(params(), cache, tokens, np.asarray(LENGTHS, np.int32))
    for b, window in enumerate(WINDOWS):
        table = [[None if h in SPLIT.retrieval[i] else window for h in range(2)] for i in range(2)]
        model = oracle.Model(weights(), CONFIG, table, 2)
        model.extend(text()[b, : PROMPTS[b]])
        want = np.concatenate([model.extend(tokens[b, t : t + 1]) for t in range(LENGTHS[b])])
        assert_allclose(logits[b, : LENGTHS[b]], want, atol=2e-5 * np.abs(want).max())


def test_a_call_of_several_tokens_differs_from_steps():
    # Otherwise the test above would hold for `extend` too.
    cache, tokens = read_prompts(params(), RULE)
    called, _ = extend(params(), cache, tokens, np.full(3, T, np.int32), logits="all")
    steps, _ = decode_steps(params(), cache, tokens, [T] * 3)
    assert np.abs(called - steps).max() > 1e-3 * np.abs(steps).max()


def test_commit_writes_what_decode_steps_write_and_no_rejected_token():
    cache, tokens = read_prompts(params(), RULE)
    _, new = verify_jitted()(params(), cache, tokens, np.asarray(LENGTHS, np.int32))
    # A rejected token would show.
    poisoned = jax.tree.map(
        lambda x: jnp.where(np.arange(T)[None, None, :, None] < np.reshape(ACCEPTED, (3, 1, 1, 1)), x, jnp.nan), new
    )
    _, (*_, stepped) = decode_steps(params(), cache, tokens, ACCEPTED)
    for got, want in zip(
        jax.tree.leaves(jax.jit(commit)(cache, poisoned, jnp.asarray(ACCEPTED))), jax.tree.leaves(stepped), strict=True
    ):
        assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert_array_equal(got[1], jax.tree.map(lambda x: x[1], want))
    assert_array_equal(cache.length + np.asarray(ACCEPTED), stepped.length)


DYNAMIC = dataclasses.replace(CONFIG, rope=Rope(kind="dynamic", factor=2.0, original_max_position=16))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "bfloat16", None])
def test_verified_logits_are_those_of_decode_steps(kv_dtype):
    # Frequencies that depend on the length, where the cache's type is that of the weights.
    config = CONFIG if kv_dtype else DYNAMIC
    model = with_heads(Params.from_flax({"params": weights()}, config), SPLIT)
    cache, tokens = read_prompts(model, dataclasses.replace(RULE, kv_dtype=kv_dtype))
    logits, _ = verify_jitted()(model, cache, tokens, np.asarray(LENGTHS, np.int32))
    steps, _ = decode_steps(model, cache, tokens, LENGTHS)
    for b, n in enumerate(LENGTHS):
        assert_allclose(logits[b, :n], steps[b, :n], atol=2e-5 * np.abs(steps).max())
