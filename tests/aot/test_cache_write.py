"""The cache-write kernels through the real TPU compiler: they write donated caches in place, and copy none.

`test_tpu.py` says how to run this, and why every topology compiles in its own process.
"""

from __future__ import annotations

import functools

import pytest

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

FULL, RING = 32768, 4128  # slots: a retrieval head's, and of 4 sinks and a ring of 4,096, made whole tiles

# Every third meets a full group and a ring, one token and a chunk, every type and both head widths.
# B, K, slots, tokens, H, type, and whether attention reads the old cache first, as in a decode step. A ring is
# windowed.
CASES = [
    (1, 1, FULL, 1, 128, "bfloat16", True),
    (8, 3, FULL, 1, 128, "float32", True),
    (1, 8, RING, 1, 128, "bfloat16", True),
    (8, 8, RING, 1, 128, "int8", True),
    (1, 3, FULL, 1, 128, "float8_e4m3fn", True),
    (1, 3, FULL, 1, 64, "bfloat16", True),
    (8, 3, FULL, 1, 64, "float32", True),
    (8, 8, RING, 1, 64, "bfloat16", True),
    (1, 8, RING, 1, 64, "int8", True),
    (1, 1, RING, 1, 64, "float8_e4m3fn", True),
    (1, 8, RING, 1, 128, "float8_e4m3fn", False),
    (8, 8, RING, 1, 64, "float32", False),
    (1, 3, 4100, 1, 128, "bfloat16", False),  # not a whole number of tiles
    (1, 3, 96, 5, 128, "bfloat16", False),  # a cache shorter than a block
    (1, 3, FULL, 5, 64, "int8", False),
    (1, 8, FULL, 2048, 128, "bfloat16", False),
    (1, 3, FULL, 4096, 64, "bfloat16", False),
    (8, 3, FULL, 2048, 128, "int8", False),
    (1, 8, RING, 4096, 128, "bfloat16", False),
    (1, 3, RING, 2048, 128, "float32", False),
    (1, 8, RING, 2048, 64, "int8", False),
    (1, 1, RING, 4096, 64, "float8_e4m3fn", False),
]

# The same with a block table: tokens per page at the end.
PAGED = [
    (8, 3, FULL, 1, 128, "bfloat16", True, 128),
    (8, 8, RING, 1, 128, "int8", True, 128),
    (8, 3, FULL, 1, 64, "float32", True, 128),
    (1, 3, FULL, 512, 128, "bfloat16", False, 128),
    (4, 8, RING, 1, 64, "float8_e4m3fn", True, 256),
]

COMPILE = """
import functools, json, math, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.kernels import attention
from razor_jax.kernels.attention import tpu as attention_tpu
from razor_jax.kernels.cache_write import CacheWrite, GroupArrays, ordered_after, tpu, xla

topology, full_slots, cases = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices[:1]), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))

def stored(B, K, S, H, dtype, means, pages=None):
    rows = pages or B
    scales = (array((rows, K, 1, S), jnp.float32),) * 2 if dtype == "int8" else (None, None)
    mean = array((B, K, 1, H), jnp.float32) if means else None
    return GroupArrays(*(array((rows, K, S, H), dtype),) * 2, *scales, mean, mean)

def run(group, new, q, lengths, counts, window, table, sinks):
    out = None
    if q is not None:
        state, valid = None, lengths
        if window is not None:
            state = attention.compensation(q, group.k_mean, group.v_mean, xla.dropped(lengths, window, sinks), 0.1)
            valid = jnp.minimum(lengths, sinks + window)
        scales = {} if group.k_scale is None else dict(k_scale=group.k_scale, v_scale=group.v_scale)
        part = attention.Part(q, group.k, group.v, valid, state, block_table=table, **scales)
        out = attention_tpu.attend(part, scale=0.1, return_state=True)
        new = new._replace(k=ordered_after(new.k, out[0], lengths), v=ordered_after(new.v, out[0], lengths))
    return tpu.write(CacheWrite(group, new, lengths, counts, window, sinks, table)), out

def copies(text, cache):
    # Count instructions that write a whole cache a second time. No count of bytes shows some of them: a cache may be
    # loaded into fast memory, S(1), which is a read and is not counted, and stored back, which is counted.
    pattern = r"= \\(?\\w+\\[([\\d,]+)\\]({[^}]*})?[^=]* (?:copy|copy-start|transpose)\\("
    sizes = [math.prod(map(int, n.split(","))) for n, to in re.findall(pattern, text) if "S(1)" not in to]
    return sum(size >= cache for size in sizes)

seen = []
with jax.set_mesh(mesh):
    for B, K, S, T, H, dtype, attends, *page in cases:
        ring, table, pages = S != full_slots, None, None
        if page:
            width = -(-S // page[0])
            pages, table, S = B * width + 1, array((B, width), jnp.int32), page[0]
        group, row = stored(B, K, S, H, dtype, ring, pages), array((B,), jnp.int32)
        new = stored(B, K, T, H, dtype, False)
        q = array((B, K, 4, H), dtype if dtype == "float32" else jnp.bfloat16) if attends else None
        jitted = jax.jit(run, donate_argnums=0, static_argnames="sinks")
        traced = jitted.trace(group, new, q, row, row, row if ring else None, table, 4 if ring else 0)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert "razor_write" in text or (page and T > 1)
        given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(group))
        size = (pages or B) * K * S * H
        seen.append((given, memory.alias_size_in_bytes, memory.temp_size_in_bytes, copies(text, size)))
print(json.dumps(seen))
"""


@functools.cache
def compiled(topology, every):
    """Compile a generation's cases in one process; return what was seen of those without and with pages."""
    cases, paged = CASES[::every], PAGED[::every]
    (seen,) = tpu_compiler.run(COMPILE, [topology, FULL, cases + paged])
    seen = iter(seen)
    return [(case, next(seen)) for case in cases], [(case, next(seen)) for case in paged]


@pytest.mark.parametrize(("topology", "every"), tpu_compiler.GENERATIONS)
def test_pages_are_written_in_place(topology, every):
    for case, (given, alias, _, copies) in compiled(topology, every)[1]:
        print(topology, *case, f"cache {given} aliased {alias} copies {copies}")
        assert alias >= given, case
        # A chunk gathers keys and values of its row, writes there, and puts the pages back. The pool of this case has
        # one row, so these two arrays look like copies of the pool.
        assert copies <= (2 if case[3] > 1 else 0), case


@pytest.mark.parametrize(("topology", "every"), tpu_compiler.GENERATIONS)
def test_caches_are_written_in_place(topology, every):
    for case, (given, alias, temporary, copies) in compiled(topology, every)[0]:
        B, K, *_ = case
        print(topology, *case, f"cache {given} aliased {alias} temporaries {temporary} copies {copies}")
        assert alias >= given, case
        assert copies == 0, case
        # Temporaries are queries, means and the call's tokens, in tiles.
        assert temporary < B * K * 64 * 128 * 4 + (1 << 20), case
