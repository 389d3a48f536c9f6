"""The TPU kernel through the real TPU compiler, on a machine without a TPU.

    pip install -e '.[aot]'
    pytest tests/aot

The cases of each generation compile in their own process, because libtpu reads its environment once, before JAX starts,
and the rest of the suite must not see it. A compiled kernel fits fast memory, or the compiler would refuse it.
`memory_analysis` then shows a cache that was copied to be read.
"""

from __future__ import annotations

import pytest

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

FULL, RING = 32768, 4112  # slots: a retrieval head's, and of 4 sinks and a ring of 4,096, made whole tiles

# kind, B, K, R, S, H, type of q, of k and v, slots of a page (0: no pages), state in and out.
# Groups of 1, 3, 5 and 8 of Llama-3's KV heads; G = 4.
BF16, F32, INT8, FP8 = "bfloat16", "float32", "int8", "float8_e4m3fn"
CASES = [
    ("attend", 1, 1, 4, FULL, 128, BF16, BF16, 0, False),
    ("attend", 4, 8, 4, FULL, 128, BF16, BF16, 0, True),
    ("attend", 8, 5, 4, RING, 128, BF16, BF16, 0, True),
    ("attend", 2, 3, 64, FULL, 128, BF16, BF16, 0, True),  # T = 8, G = 8
    ("attend", 2, 3, 4, FULL, 128, F32, F32, 0, True),
    ("attend", 2, 3, 64, RING, 128, F32, F32, 0, False),
    ("attend", 4, 8, 7, FULL, 64, BF16, BF16, 0, True),
    ("attend", 2, 3, 4, RING, 64, F32, F32, 0, True),
    ("attend", 1, 5, 16384, RING, 128, BF16, BF16, 0, True),  # a chunk of 4,096 against the ring
    ("attend", 1, 8, 1000, FULL, 128, F32, F32, 0, False),
    ("attend", 4, 8, 4, FULL, 128, BF16, INT8, 0, True),
    ("attend", 4, 8, 4, FULL, 128, BF16, FP8, 0, True),
    ("attend", 8, 5, 4, RING, 128, BF16, INT8, 0, True),
    ("attend", 2, 3, 64, FULL, 128, BF16, INT8, 0, True),
    ("attend", 2, 3, 4, FULL, 64, BF16, INT8, 0, True),
    ("attend", 2, 3, 4, FULL, 64, BF16, FP8, 0, True),
    ("attend", 2, 3, 4, FULL, 128, F32, INT8, 0, True),
    ("attend", 2, 3, 4, FULL, 128, F32, FP8, 0, False),
    ("attend", 1, 5, 16384, RING, 128, BF16, INT8, 0, True),
    ("attend", 1, 5, 16384, RING, 128, BF16, FP8, 0, True),
    ("attend", 4, 2, 4, FULL, 128, BF16, BF16, 256, True),
    ("attend", 4, 2, 4, FULL, 128, BF16, INT8, 2048, True),
    ("attend", 4, 2, 4, FULL, 64, BF16, BF16, 1024, True),
    ("attend", 1, 2, 16384, FULL, 128, BF16, BF16, 4096, True),
    ("attend_causal", 1, 8, 16384, 4096, 128, BF16, BF16, 0, True),
    ("attend_causal", 1, 8, 1000, 4096, 128, F32, F32, 0, True),
    ("attend_causal", 1, 2, 7168, 4096, 64, BF16, BF16, 0, False),
]

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.kernels.attention import dispatch

topology, cases = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
temporary = []
with jax.set_mesh(mesh):
    for kind, B, K, R, S, H, q_type, kv_type, page, carries in cases:
        rows, slots = (B * S // page, page) if page else (B, S)
        q, kv = array((B, K, R, H), q_type), array((rows, K, slots, H), kv_type)
        given = {"block_table": array((B, S // page), jnp.int32)} if page else {}
        if kv_type == "int8":
            given |= {name: array((rows, K, 1, slots), jnp.float32) for name in ("k_scale", "v_scale")}
        line = array((B, K, R), jnp.float32)
        state = (array((B, K, R, H), jnp.float32), line, line) if carries else None
        fixed = dict(scale=H**-0.5, return_state=carries, implementation="pallas_tpu")
        if kind == "attend_causal":
            fixed["group_size"], given["start"] = 4, array((), jnp.int32)
        def run(q, k, v, lengths, state, given):
            return getattr(dispatch, kind)(q, k, v, lengths, state=state, **given, **fixed)
        traced = jax.jit(run).trace(q, kv, kv, array((B,), jnp.int32), state, given)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        assert "tpu_custom_call" in compiled.as_text()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
print(json.dumps(temporary))
"""


# Every third case meets both kernels, every type, both head widths, a chunk and pages.
@pytest.mark.parametrize(("topology", "every"), tpu_compiler.GENERATIONS)
def test_kernels_fit_and_copy_no_cache(topology, every):
    cases = CASES[::every]
    (seen,) = tpu_compiler.run(COMPILE, [topology, cases])
    size = {F32: 4, BF16: 2, INT8: 1, FP8: 1}
    for case, temporary in zip(cases, seen, strict=True):
        _, B, K, R, S, H, _, kv_type, _, _ = case
        # m and l as rows, in and out, and query rows of 64, which are padded to 128. A cache is much larger.
        lines = 2 * B * K * 8 * max(R, 128) * 4
        rows = 2 * B * K * R * 128 * 4 if H < 128 else 0
        cache = B * K * S * H * size[kv_type]
        allowed = min(lines + rows + (1 << 17), cache if R <= 64 else 1 << 30)
        assert temporary < allowed, case
