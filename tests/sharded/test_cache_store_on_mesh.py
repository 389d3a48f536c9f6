"""Caches saved on one mesh and read on another: the same content, equal next tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import razor_jax
from razor_jax import RazorConfig
from razor_jax.mesh import relayout
from tests.support import tiny

from ..support.meshes import BALANCED, on, one_device

RAZOR = RazorConfig(sinks=2, window=6)
DOCUMENTS = [tiny.prompt(n) % 60 for n in (40, 23)]


def same(one, other):
    """Equal up to what nobody reads: slots past those in use, means of nothing."""
    assert one.spec.capacity == other.spec.capacity
    one, other = (jax.jit(relayout.logical)(cache) if cache.spec.placement else cache for cache in (one, other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=1e-6)


def params_on(mesh, split=None):
    params = one_device() if split is None else one_device(split)
    return params if mesh is None else on(params, mesh)


def next_tokens(params, cache):
    questions = [tiny.prompt(5, seed=1) % 60, tiny.prompt(3, seed=1) % 60]
    return [result.tokens for result in razor_jax.generate(params, questions, cache=cache, max_new_tokens=6)]


@pytest.mark.parametrize(
    ("mesh", "other"),
    [
        ("data=2,model=4", None),
        pytest.param(None, "model=8", marks=pytest.mark.slow),
        pytest.param("model=4", "data=2,model=2", marks=pytest.mark.slow),
    ],
)
def test_a_cache_goes_on_on_another_mesh(mesh, other, tmp_path):
    here, there = params_on(mesh), params_on(other)
    cache = razor_jax.prefill(here, DOCUMENTS, razor=RAZOR)
    razor_jax.save_cache(cache, here, tmp_path / "saved")
    read = razor_jax.load_cache(there, tmp_path / "saved")
    same(cache, read)
    assert next_tokens(here, cache) == next_tokens(there, read)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_cache_of_8_bits_moves(kv_dtype, tmp_path):
    policy = RazorConfig(sinks=2, window=6, kv_dtype=kv_dtype)
    cache = razor_jax.prefill(params_on("model=8"), DOCUMENTS, razor=policy)
    razor_jax.save_cache(cache, params_on("model=8"), tmp_path / "saved")
    same(cache, razor_jax.load_cache(params_on(None), tmp_path / "saved"))


@pytest.mark.slow
def test_heads_that_lie_otherwise_are_put_in_order(tmp_path):
    """By head on one mesh, by slot on another; a dense cache, whose heads lie as the weights' do."""
    here, there = params_on("model=2", BALANCED), params_on(None, BALANCED)
    for name, policy in (("razor", RAZOR), ("dense", None)):
        cache = razor_jax.prefill(here, DOCUMENTS, razor=policy)
        assert cache.spec.placement.layout == "head"
        razor_jax.save_cache(cache, here, tmp_path / name)
        read = razor_jax.load_cache(there, tmp_path / name)
        assert next_tokens(here, cache) == next_tokens(there, read)
