"""A GGUF file read by 8 devices: the weights of one device, each where it belongs, and the same tokens."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import razor_jax
from razor_jax import HeadSplit, RazorConfig
from razor_jax.sharding import weight_shardings

from ..support import devices
from ..support.gguf_files import write

SPLIT = HeadSplit(((1,), ()), 2)


def child_loads(path: str, mesh: str, weights: str | None) -> None:
    one = razor_jax.load(path, dtype="float32", weights=weights, heads=SPLIT)
    many = razor_jax.load(path, dtype="float32", weights=weights, heads=SPLIT, mesh=mesh)
    assert many.order(0) == one.order(0) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, many.weights, one.weights)
    where = weight_shardings(many.weights, many.mesh)
    jax.tree.map(
        lambda x, at: x.sharding.is_equivalent_to(at, x.ndim) or pytest.fail(f"{x.sharding}"), many.weights, where
    )
    kernel = many.weights["blocks_0"]["gate"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert math.prod(kernel.addressable_shards[0].data.shape) < kernel.size
    prompts = [np.arange(3, 60), np.arange(100, 157)]
    answers = [
        [row.tokens for row in razor_jax.generate(params.replace(assets=None), prompts, max_new_tokens=12,
                                                  razor=RazorConfig.compact(16))]
        for params in (one, many)
    ]  # fmt: skip
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(("mesh", "weights"), [("data=2,model=4", None), ("model=8", "int8")])
def test_a_mesh_of_8_devices_holds_the_same_weights(tmp_path, mesh, weights):
    path = write(tmp_path / "model.gguf", quantized=Kind.Q8_0)
    devices.run(child_loads, str(path), mesh, weights)
