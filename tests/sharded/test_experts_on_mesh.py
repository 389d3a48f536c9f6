"""Mixture of experts on meshes: each device stores and runs its experts, and the logits are those of one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from razor_jax import functional
from razor_jax.models import Experts, ModelConfig
from razor_jax.models.linear import quantize_tree
from razor_jax.planner import collectives

from ..support.meshes import SPLIT, K, on, one_device

CONFIG = ModelConfig(
    "qwen3_moe", 64, 32, 48, 3, 2 * K, K, 16, 4096, qk_norm=True, experts=Experts(8, 3, 24, True, dense_layers=(1,))
)
# Widths that groups of int4 divide.
GROUPED = dataclasses.replace(CONFIG, intermediate_size=64, head_dim=32, experts=Experts(8, 3, 32, True, (1,)))
LENGTHS = np.asarray([300, 31], np.int32)


def _session(params, steps=3):
    """Return the logits of a long prompt in chunks, of a short call and of greedy steps."""
    tokens = np.random.default_rng(1).integers(0, 64, (2, 300)).astype(np.int32)
    cache = functional.init_cache(params, batch=2, capacity=640, razor=None)
    logits, cache = jax.jit(functional.extend)(params, cache, tokens, LENGTHS)
    out = [logits]
    logits, cache = jax.jit(functional.extend)(params, cache, tokens[:, :20], np.asarray([20, 7], np.int32))
    out.append(logits)
    for _ in range(steps):
        logits, cache = jax.jit(functional.decode)(params, cache, np.asarray(out[-1]).argmax(-1).astype(np.int32))
        out.append(logits)
    return [np.asarray(x) for x in out]


@pytest.mark.parametrize(
    ("mesh", "weights"),
    [
        ("model=8", None),
        pytest.param("data=2,model=4", None, marks=pytest.mark.slow),
        ("model=8", "int8"),
        ("data=2,model=4", "int4"),
    ],
)
def test_logits_are_those_of_one_device(mesh, weights, record_property):
    one = one_device(SPLIT, GROUPED if weights == "int4" else CONFIG)
    if weights is not None:
        one = one.replace(weights=quantize_tree(one.weights, weights))
    many = on(one, mesh)
    stack = many.weights["blocks_0"]["expert_up"]["kernel"]
    parts = 8 if mesh == "model=8" else 4
    assert {shard.data.shape[0] for shard in stack.addressable_shards} == {8 // parts}
    worst = 0.0
    for got, want in zip(_session(many), _session(one), strict=True):
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    record_property("experts on a mesh, logits over the largest", worst)
    assert worst < 1e-5


def test_experts_that_do_not_divide_are_on_every_device():
    config = dataclasses.replace(CONFIG, experts=Experts(5, 2, 24, True))
    one = one_device(SPLIT, config)
    many = on(one, "model=4")
    assert many.weights["blocks_0"]["expert_up"]["kernel"].sharding.is_fully_replicated
    for got, want in zip(_session(many, 1), _session(one, 1), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.usefixtures("unchecked")
def test_a_decode_step_sends_activations_only():
    """The weights of experts stay: every collective is smaller than a kernel of one expert."""
    params = on(one_device(SPLIT, dataclasses.replace(CONFIG, experts=Experts(8, 3, 512, True))), "model=8")
    cache = functional.init_cache(params, batch=2, capacity=640, razor=None)
    program = jax.jit(functional.decode, donate_argnums=1).lower(params, cache, np.zeros(2, np.int32)).compile()
    found = collectives.read(program.as_text())
    assert max(each.bytes for each in found) < 32 * 512 * 4
