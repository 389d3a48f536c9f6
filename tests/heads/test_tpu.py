"""Memory of the probe on a TPU, by its compiler, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.heads.mass import score_layer
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
whole = NamedSharding(mesh, PartitionSpec())

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

config = ModelConfig("llama", 128_256, 4096, 14_336, 1, 32, 8, 128, 131_072)
T = -(-10_001 // 512) * 512
weights = jax.tree.map(lambda a: array(a.shape, a.dtype), abstract_weights(config, jnp.bfloat16)["blocks_0"])
rope = (array((1, T, 64), jnp.float32),) * 2
args = array((1, T, 4096), jnp.bfloat16), rope, array((1,), jnp.int32), array((1, T, 3), jnp.int32)
with jax.set_mesh(mesh):
    lowered = score_layer.trace(config, 0, 512, weights, *args).lower(lowering_platforms=("tpu",))
    print("bytes", lowered.compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_peak_memory_of_an_8b_layer_at_10_001_tokens(topology):
    """Llama-3.1-8B's shapes in bfloat16, above weights and hidden states."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")
    lone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology],
        env={**os.environ, **lone, **paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 0.5e9
