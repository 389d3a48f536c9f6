"""The Triton kernel through the real GPU compiler, to machine code, on a machine without a GPU.

    pip install -e '.[cuda]' nvidia-cuda-nvcc
    JAX_PLATFORMS=cpu pytest -m 'slow or not slow' tests/aot/test_gpu.py -s

Every chip compiles in its own process, because XLA reads its flags once. ptxas then reports the registers and spills of
each kernel, and the list of launches its shared memory. `memory_analysis` shows a cache that was copied.
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

pytestmark = pytest.mark.slow

# Compute capability, multiprocessors, bandwidth (bytes/s), and bytes of L2, memory, shared memory per core and block.
CHIPS = {
    "a100": (8, 0, 108, 2.039e12, 40 << 20, 80 << 30, 167936, 166912),
    "h100": (9, 0, 132, 3.35e12, 50 << 20, 80 << 30, 233472, 232448),
    "h200": (9, 0, 132, 4.8e12, 50 << 20, 141 << 30, 233472, 232448),
    "b200": (10, 0, 148, 8.0e12, 126 << 20, 180 << 30, 233472, 232448),
}
REGISTERS = 65536  # per multiprocessor
FULL, RING = 32768, 4100

# kind, B, K, R, S, H, query type, cache type, state in and out
CASES = [
    ("attend", 1, 2, 4, FULL, 128, "bfloat16", "bfloat16", True),
    ("attend", 32, 8, 4, RING, 128, "bfloat16", "bfloat16", False),
    ("attend", 8, 5, 32, FULL, 128, "bfloat16", "bfloat16", True),  # T = 8, G = 4
    ("attend", 4, 8, 4, FULL, 128, "bfloat16", "int8", True),
    ("attend", 1, 3, 64, FULL, 128, "bfloat16", "int8", False),
    ("attend", 4, 8, 4, FULL, 128, "bfloat16", "float8_e4m3fn", True),
    ("attend", 4, 8, 7, FULL, 64, "bfloat16", "bfloat16", True),
    ("attend", 4, 8, 4, FULL, 64, "bfloat16", "int8", True),
    ("attend", 2, 3, 4, FULL, 128, "float32", "float32", True),
    ("attend", 2, 3, 4, RING, 128, "float32", "int8", False),
    ("attend", 1, 5, 16384, RING, 128, "bfloat16", "bfloat16", True),  # a chunk of 4,096 against the ring
    ("attend", 1, 5, 16384, RING, 128, "bfloat16", "int8", True),
    ("attend", 1, 8, 1000, FULL, 128, "float32", "float32", False),
    ("attend_causal", 1, 8, 16384, 4096, 128, "bfloat16", "bfloat16", True),
    ("attend_causal", 1, 8, 1000, 4096, 128, "float32", "float32", True),
    ("attend_causal", 1, 2, 7168, 4096, 64, "bfloat16", "bfloat16", False),
    ("paged", 4, 8, 4, FULL, 128, "bfloat16", "bfloat16", True),
    ("groups", 1, 8, 4, FULL, 128, "bfloat16", "bfloat16", True),
    ("groups", 4, 8, 4, FULL, 128, "bfloat16", "int8", True),
    ("step", 4, 8, 4, FULL, 128, "bfloat16", "bfloat16", False),
    ("step", 4, 8, 4, FULL, 128, "bfloat16", "int8", False),
]

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.kernels.attention import triton
from razor_jax.kernels.cache_write import CacheWrite, GroupArrays, xla as cache

chip, target, cases, folder = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(platform="cuda", topology_name=chip, target_config=target, topology="1x1x1")
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))

def part(B, K, R, S, H, q, kv, carries):
    rows, slots, line = array((B, K, R, H), q), array((B, K, S, H), kv), array((B, K, R), jnp.float32)
    scale = array((B, K, 1, S), jnp.float32) if kv == "int8" else None
    state = (array((B, K, R, H), jnp.float32), line, line) if carries else None
    return triton.Part(rows, slots, slots, array((B,), jnp.int32), state, scale, scale)

def attend(part, carries, start):
    return triton.attend(part, scale=0.1, return_state=carries)

def attend_causal(part, carries, start):
    part = part._replace(k_scale=None, v_scale=None)
    return triton.attend_causal(part, scale=0.1, start=start, group_size=4, return_state=carries)

def groups(parts, carries, start):
    return triton.attend_groups(parts, scale=0.1, return_state=carries)

def step(groups, part, new, window):
    # One decode step of a full group and of a ring: attend, then write in place.
    outs, after = [], []
    for x, of_window in zip(groups, (None, window)):
        out = triton.attend(part._replace(k=x.k, v=x.v, k_scale=x.k_scale, v_scale=x.v_scale), scale=0.1)
        outs.append(out)
        after.append(cache.write(CacheWrite(x, new, part.lengths, jnp.ones_like(part.lengths), of_window, 4)))
    return outs, after

found = []
with jax.set_mesh(mesh):
    for index, (kind, B, K, R, S, H, q, kv, carries) in enumerate(cases):
        shape = part(B, K, R, S, H, q, kv, carries)
        run = {"attend_causal": attend_causal, "groups": groups, "step": step}.get(kind, attend)
        static, donated = ((), (0,)) if kind == "step" else ((1,), ())
        arguments = (shape, carries, array((), jnp.int32))
        if kind == "paged":
            pool = array((B * S // 128, K, 128, H), kv)
            shape = shape._replace(k=pool, v=pool, block_table=array((B, S // 128), jnp.int32))
            arguments = (shape, *arguments[1:])
        if kind == "groups":
            groups_ = (part(B, K - 5, R, S, H, q, kv, carries), part(B, 5, R, 4100, H, q, kv, carries))
            arguments = (groups_, *arguments[1:])
        if kind == "step":
            mean = array((B, K, 1, H), jnp.float32)
            one = part(B, K, R, 1, H, q, kv, False)
            ring = part(B, K, R, 4100, H, q, kv, False)
            stored = [
                GroupArrays(x.k, x.v, x.k_scale, x.v_scale, *means)
                for x, means in ((shape, ()), (ring, (mean, mean)))
            ]
            new = GroupArrays(one.k, one.v, one.k_scale, one.v_scale)
            alone = shape._replace(k=None, v=None, k_scale=None, v_scale=None)
            arguments = (stored, alone, new, array((B,), jnp.int32))
        options = {"xla_dump_to": f"{folder}/{index}"}
        traced = jax.jit(run, static_argnums=static, donate_argnums=donated).trace(*arguments)
        memory = traced.lower(lowering_platforms=("cuda",)).compile(options).memory_analysis()
        found.append((memory.temp_size_in_bytes, memory.alias_size_in_bytes))
print(json.dumps(found))
"""


def missing() -> str | None:
    """Return why the GPU compiler cannot run here, or None if it can."""
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    ):
        return "the GPU compiler is in JAX's CUDA plugin: pip install -e '.[cuda]' nvidia-cuda-nvcc"
    if assembler() is None:
        return "ptxas is not installed: pip install nvidia-cuda-nvcc"
    return None


def assembler() -> str | None:
    """Return the path of ptxas, from the wheels or the system."""
    wheels = (Path(folder) / "nvidia" for folder in sys.path)
    return next((str(path) for wheel in wheels for path in wheel.glob("*/bin/ptxas")), None) or shutil.which("ptxas")


def target(chip: str) -> str:
    """Return the chip as a GpuTargetConfigProto in text form."""
    major, minor, cores, bandwidth, l2, memory, shared, shared_block = CHIPS[chip]
    extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
  registers_per_core_limit: {REGISTERS} registers_per_block_limit: {REGISTERS}
  core_count: {cores} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: 1.8
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
}}
platform_name: "CUDA"
"""


def kernels(folder: Path, chip: str) -> dict[str, dict[str, int]]:
    """Return registers, bytes spilt, bytes of shared memory and threads of each of our kernels in an XLA dump."""
    major, minor = CHIPS[chip][:2]
    architecture = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    found = {}
    for path in folder.glob("*.ptx"):
        if "razor" not in path.read_text():  # a kernel of XLA, or empty
            continue
        command = [assembler(), "-v", "-arch", architecture, str(path), "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        for entry in run.stderr.split("Compiling entry function")[1:]:
            name = re.search(r"'(\S+)'", entry)[1]
            if "razor" in name:
                spilt = sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry))
                found[name] = {"registers": int(re.search(r"Used (\d+) registers", entry)[1]), "spilt": spilt}
    (launches,) = folder.glob("*thunk_sequence.txt")
    for name, x, y, z, shared in re.findall(
        r"(\w*razor\w*) grid.*threads: \[(\d+), (\d+), (\d+)\]\s+shared_memory: (\d+)", launches.read_text()
    ):
        found[name] |= {"shared": int(shared), "threads": int(x) * int(y) * int(z)}
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_fit_their_registers_and_copy_no_cache(chip, tmp_path):
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    # Below 8.9 converting float8 crashes the compiler. `unsupported` prevents that in the package.
    cases = [case for case in CASES if CHIPS[chip][:2] >= (8, 9) or case[7] != "float8_e4m3fn"]
    command = [sys.executable, "-c", COMPILE, json.dumps([chip, target(chip), cases, str(tmp_path)])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    for index, (case, (temporary, aliased)) in enumerate(
        zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True)
    ):
        kind, B, K, _, S, H, _, kv, _ = case
        found = kernels(tmp_path / str(index), chip)
        print(chip, *case, found, f"temporaries {temporary}")
        assert any("attend" in name for name in found), case
        for kernel in found.values():
            assert kernel["spilt"] == 0, (case, found)
            assert kernel["registers"] * kernel["threads"] <= REGISTERS, (case, found)
            assert kernel["shared"] <= CHIPS[chip][7], (case, found)
        # The temporaries are states of the splits, less than one of the two arrays of a cache.
        itemsize = {"float32": 4, "bfloat16": 2}.get(kv, 1)
        assert temporary < B * K * S * H * itemsize, (case, temporary)
        if kind == "step":
            assert aliased >= 2 * B * K * (S + RING) * H * itemsize, (case, aliased)
