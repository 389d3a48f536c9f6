"""The Mosaic GPU kernel through the real GPU compiler to SASS for H200, on a machine without a GPU.

    pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc    # JAX's version
    pytest tests/aot

The compiler reports whether registers were spilled to memory, and `memory_analysis` shows a cache that was copied to be
read. Lowering fails if shared memory is too small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from razor_jax.kernels.attention import mosaic_gpu

wheels = (str(Path(path) / "nvidia" / "cu13" / "bin") for path in sys.path)
PATH = os.pathsep.join([*wheels, os.environ.get("PATH", "")])
if importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas", path=PATH) is None:
    pytest.skip("needs the CUDA plugin and ptxas; this file says which wheels", allow_module_level=True)

FULL, RING = 32768, 4112  # slots: a retrieval head's, and of 4 sinks and a ring of 4,096, made whole tiles

# kind, B, K, R, S, H, type. Groups of 1, 3, 5 and 8 of Llama-3's KV heads; G = 4.
CASES = [
    ("attend", 1, 1, 4, FULL, 128, "bfloat16"),
    ("attend", 4, 8, 8, FULL, 128, "float16"),
    ("attend", 8, 5, 4, RING, 64, "bfloat16"),
    ("attend", 1, 3, 1, 40, 64, "float16"),
    ("attend", 1, 8, 1000, RING, 128, "bfloat16"),
    ("attend_causal", 1, 8, 16384, 4096, 128, "bfloat16"),
    ("attend_causal", 1, 2, 1000, 4096, 64, "bfloat16"),
    ("attend_causal", 2, 3, 16, 64, 128, "bfloat16"),
]

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.kernels.attention import Part, mosaic_gpu

target, cases = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(
    platform="cuda", topology_name="h200", target_config=target, topology="1x1x1"
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
temporary = []
with jax.set_mesh(mesh):
    for kind, B, K, R, S, H, dtype in cases:
        q, kv, lengths = array((B, K, R, H), dtype), array((B, K, S, H), dtype), array((B,), jnp.int32)
        assert mosaic_gpu.unsupported(q, kv, kv) is None
        line = array((B, K, R), jnp.float32)
        def run(q, k, v, lengths, state, start):
            causal = dict(start=start, group_size=4) if kind == "attend_causal" else {}
            return getattr(mosaic_gpu, kind)(Part(q, k, v, lengths, state), scale=H**-0.5, **causal)
        traced = jax.jit(run).trace(q, kv, kv, lengths, (array(q.shape, jnp.float32), line, line), array((), jnp.int32))
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
print(json.dumps(temporary))
"""


def test_it_compiles_without_spills_or_a_copied_cache(tmp_path, record_property):
    environment = {
        **os.environ,
        "PATH": PATH,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
    }
    command = [sys.executable, "-c", COMPILE, json.dumps([TARGET, CASES])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    reports = [path.read_text() for path in sorted(tmp_path.glob("*.ptxas"))]
    assert len(reports) == len(CASES)
    for case, report in zip(CASES, reports, strict=True):
        assert "'sm_90a'" in report, report
        assert "0 bytes spill stores, 0 bytes spill loads" in report, (case, report)
        # The compiler warns if it ignores register budgets or serialises tensor core work.
        assert "warning" not in report.lower(), (case, report)
        used = re.search(r"Used (\d+) registers", report)
        assert used is not None, report
        record_property("Mosaic GPU kernel: registers a thread", int(used[1]))
    for (kind, B, K, R, S, H, dtype), temporary in zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True):
        rows = -(-R // 128) * 128 if R > 64 else -(-R // 8) * 8
        partial_sums = B * K * mosaic_gpu.choose_splits(B * K, R, S) * rows * (H + 2) * 4
        queries = B * K * rows * H * 2
        allowed = 1.1 * (partial_sums + queries) + (1 << 17)
        assert temporary < allowed, (kind, B, K, R, S, H, dtype)
