"""An ALiBi model cut by scopes, on meshes: every scope is a head group, and positions are part of the logits."""

from __future__ import annotations

import jax
import numpy as np

from razor_jax import HeadSplit, RazorConfig, functional
from razor_jax.models import ModelConfig

from ..support.meshes import on, one_device

CONFIG = ModelConfig("baichuan", 64, 32, 48, 2, 4, 4, 8, 4096, alibi=True)
# Scopes below and above the devices, one layer without a full head.
SPLIT = HeadSplit(((0,), ()), 4, scopes=((0, 3, 20, 20), (5, 33, 9, 5)))


def session(params):
    tokens = np.random.default_rng(1).integers(0, 64, (2, 60)).astype(np.int32)
    cache = functional.init_cache(params, batch=2, capacity=80, razor=RazorConfig())
    extend, decode = jax.jit(functional.extend), jax.jit(functional.decode)
    out = []
    for start, lengths in ((0, [20, 7]), (20, [20, 20])):
        logits, cache = extend(params, cache, tokens[:, start : start + 20], np.array(lengths, np.int32))
        out.append(np.asarray(logits))
    for step in range(40, 46):
        logits, cache = decode(params, cache, tokens[:, step])
        out.append(np.asarray(logits))
    return out, cache


def test_alibi_on_a_mesh_equals_one_device(record_property):
    params = one_device(SPLIT, CONFIG)
    want, _ = session(params)
    got, cache = session(on(params, "data=2,model=4"))
    assert cache.spec.placement.layout == "slot"
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        worst = max(worst, float(np.max(np.abs(a - b)) / np.abs(b).max()))
    record_property("ALiBi logits on a mesh over the largest", worst)
