"""The TPU's kernels on a mesh, interpreted: inside shard_map they give what they give on one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from razor_jax import RazorConfig, functional

from ..support import interpreted as kernels
from ..support.meshes import on

B, T, CAPACITY = 3, 20, 64


def session(params, window, steps):
    """Logits of two ragged calls, one with a row that sits out, and of some steps; and the cache's spec."""
    tokens = np.random.default_rng(1).integers(0, 96, (B, 2 * T + steps)).astype(np.int32)
    cache = functional.init_cache(params, batch=B, capacity=CAPACITY, razor=RazorConfig.compact(window, sinks=3))
    extend, decode = jax.jit(functional.extend), jax.jit(functional.decode)
    out = []
    for start, lengths in ((0, [20, 9, 0]), (T, [20, 20, 7])):
        # Interpreted kernels call back into Python: one program at a time.
        found = extend(params, cache, tokens[:, start : start + T], np.array(lengths, np.int32))
        logits, cache = jax.block_until_ready(found)
        out.append(np.asarray(logits))
    for step in range(2 * T, 2 * T + steps):
        logits, cache = jax.block_until_ready(decode(params, cache, tokens[:, step]))
        out.append(np.asarray(logits))
    return out, cache.spec


@pytest.mark.parametrize(("window", "steps"), [(2, 2), pytest.param(6, 6, marks=pytest.mark.slow)])
def test_the_kernels_on_a_mesh_equal_one_device(window, steps, monkeypatch, record_property):
    """Two KV heads on four devices: each pair shares the slots of a head."""
    kernels.interpreted(monkeypatch, "tpu")
    one = kernels.model(64)
    many = on(one, "model=4")
    assert dict(many.mesh.shape) == {"data": 1, "heads": 2, "rows": 2}
    want, _ = session(one, window, steps)
    got, spec = session(many, window, steps)
    assert (spec.implementation, spec.placement.layout) == ("pallas_tpu", "slot")
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
    record_property("logits of interpreted TPU kernels on a mesh over the largest", worst)
    assert worst <= 5e-6
