"""The TPU kernel over 8-bit and paged caches, in interpret mode, against float64 over the cached values."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.kernels import INT8
from razor_jax.kernels.attention import tpu, xla
from razor_jax.kernels.attention.launch import visible_slots
from razor_jax.kernels.cache_write import dequantize, quantize

from ..support.kernel_cases import BLOCK, COPIES, EDGES, SCALE, H, S, compensation, inputs
from ..support.kernel_inputs import NAN, by_arguments, error, literal, random
from ..support.xla_flags import FLAGS

backend = by_arguments(tpu.attend)
backend_causal = by_arguments(tpu.attend_causal)
xla_attend = by_arguments(xla.attend)

EIGHT_BIT = ["int8", "float8_e4m3fn"]
# float32 queries widen the cache, so they lose nothing; bfloat16 ones round the weights.
LIMIT = {"float32": 2e-6, "bfloat16": 8e-3}


def cached(x, lengths, dtype):
    """x [B,K,S,H] in a cache of `dtype`, unread memory poisoned: the array, its scales or None, the float64 values."""
    array, scale = quantize(jnp.asarray(x), jnp.dtype(dtype))
    values = np.asarray(dequantize(array, scale), np.float64)
    unread = np.arange(x.shape[2]) >= np.asarray(lengths)[:, None, None]
    if scale is not None:
        return jnp.where(unread[..., None], jnp.int8(-128), array), jnp.where(unread[:, :, None], NAN, scale), values
    if array.dtype.itemsize == 1:
        # NaN is written by its bits, because not every conversion to the type keeps it.
        bits = jax.lax.bitcast_convert_type(array, jnp.uint8)
        return (
            jax.lax.bitcast_convert_type(jnp.where(unread[..., None], 0x7F, bits).astype(jnp.uint8), dtype),
            None,
            values,
        )
    return jnp.where(unread[..., None], NAN, array).astype(dtype), None, values


def case(G, T, H, q_type, kv_type, lengths, K=2, S=S):
    """q, the cache (k, v), its scales, and its float64 values."""
    q, k, v = inputs(len(lengths), K, G * T, S, q_type, H=H)
    k, k_scale, k_values = cached(k, lengths, kv_type)
    v, v_scale, v_values = cached(v, lengths, kv_type)
    scales = {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    return q, (k, v), scales, (k_values, v_values)


@pytest.mark.parametrize("kv_type", EIGHT_BIT)
@pytest.mark.parametrize(
    ("G", "T", "H", "q_type"),
    [
        (1, 1, 128, "bfloat16"),
        (4, 1, 128, "bfloat16"),
        (8, 4, 128, "bfloat16"),
        (4, 1, 64, "bfloat16"),
        (4, 4, 128, "float32"),
        (1, 4, 64, "float32"),
    ],
)
def test_decode_over_8_bits_and_a_compensation_token(G, T, H, q_type, kv_type, record_property):
    q, cache, scales, values = case(G, T, H, q_type, kv_type, EDGES)
    means = [random(len(EDGES), 2, 1, H, seed=9 + i, size=0.3) for i in (0, 1)]
    poisoned = [np.where(COPIES[:, None, None, None] == 0, NAN, x) for x in means]
    q_ = jnp.asarray(q, q_type)
    scale = H**-0.5
    state = compensation(q_, *poisoned, COPIES, scale=scale)
    run = jax.jit(functools.partial(backend, scale=scale, interpret=True, blocks=tpu.Blocks(G * T, BLOCK)))
    got = run(q_, *cache, EDGES, state=state, **scales)
    assert got.dtype == q_type
    largest = error(got, literal(q, *values, EDGES, means=means, n=COPIES))
    record_property(f"TPU kernel, {q_type} queries over {kv_type}", float(largest))
    assert largest <= LIMIT[q_type]


@pytest.mark.parametrize("kv_type", EIGHT_BIT)
def test_many_rows_in_parts_over_8_bits(kv_type, monkeypatch):
    """20 rows in blocks of 16 and parts of 8, also with a state out and in."""
    monkeypatch.setattr(tpu, "_PART", 8)
    lengths = np.array([0, BLOCK + 1, S], np.int32)
    q, cache, scales, values = case(4, 5, H, "bfloat16", kv_type, lengths, K=1)
    run = jax.jit(
        functools.partial(backend, scale=SCALE, interpret=True, blocks=tpu.Blocks(16, BLOCK)),
        static_argnames="return_state",
    )
    q_ = jnp.asarray(q, "bfloat16")
    want = literal(q, *values, lengths)
    assert error(run(q_, *cache, lengths, **scales), want) <= LIMIT["bfloat16"]
    state = run(q_, *cache, lengths, return_state=True, **scales)
    np.testing.assert_array_equal(state[2][0], 0.0)
    assert error(run(q_, *cache, lengths, state=state, **scales), want) <= LIMIT["bfloat16"]


def test_many_rows_in_parts_see_the_chunk_up_to_each_token(monkeypatch):
    monkeypatch.setattr(tpu, "_PART", 8)
    G, tokens, start = 4, 12, 11
    q, k, v = inputs(len(EDGES), 1, G * tokens, S, "float32")
    k_, v_ = (cached(x, EDGES, "float32")[0] for x in (k, v))
    run = functools.partial(backend_causal, scale=SCALE, interpret=True, group_size=G, blocks=tpu.Blocks(16, BLOCK))
    got = jax.jit(run)(q, k_, v_, EDGES, start=np.int32(start))
    want = literal(q, k, v, EDGES, [start + r // G + 1 for r in range(G * tokens)])
    assert error(got, want) <= LIMIT["float32"]


def paged(x, lengths, page, pool_pages, seed, axis=2):
    """x [B,K,S,H] (or scales, slots on axis 3) as pages of a shuffled pool; all other pages are NaN (or -128).

    Returns the pool, and a table whose entries past each row's last valid page point outside the pool.
    """
    x = np.asarray(x)
    B, pages = x.shape[0], x.shape[axis] // page
    order = np.random.default_rng(seed).permutation(pool_pages)[: B * pages].reshape(B, pages)
    cut = np.moveaxis(np.stack(np.split(x, pages, axis)), 0, 1)  # [B, pages, K, page, H]
    empty = NAN if np.issubdtype(x.dtype, np.floating) else -128
    pool = np.full((pool_pages, *cut.shape[2:]), empty, x.dtype)
    pool[order] = cut
    beyond = np.arange(pages) * page >= np.asarray(lengths)[:, None]
    return pool, np.where(beyond, np.where(np.arange(pages) % 2, -1, 10_000), order).astype(np.int32)


@pytest.mark.parametrize(
    ("kv_type", "H", "page"), [("float32", 128, 8), ("bfloat16", 128, 16), ("bfloat16", 64, 128), ("int8", 128, 128)]
)
def test_pages_are_found_by_the_table(kv_type, H, page):
    q_type = "bfloat16" if kv_type == "int8" else kv_type
    lengths = np.array([0, 1, page - 1, page, page + 1, 3 * page], np.int32)
    q, (k, v), scales, values = case(4, 1, H, q_type, kv_type, lengths, S=3 * page)
    pool_pages = 20
    if kv_type == "bfloat16":
        k, v = (x.astype(jnp.float32) for x in (k, v))  # `paged` takes NumPy's own types only
    (k, table), (v, _) = (paged(x, lengths, page, pool_pages, seed=3) for x in (k, v))
    scales = {name: paged(x, lengths, page, pool_pages, seed=3, axis=3)[0] for name, x in scales.items()}
    run = jax.jit(functools.partial(backend, scale=H**-0.5, interpret=True))
    k, v = (jnp.asarray(x, kv_type) for x in (k, v))
    got = run(jnp.asarray(q, q_type), k, v, lengths, block_table=table, **scales)
    assert error(got, literal(q, *values, lengths)) <= LIMIT[q_type]
    np.testing.assert_array_equal(got[0], 0.0)
    # The reference reads the same pool and table.
    same = jax.jit(functools.partial(xla_attend, scale=H**-0.5))(
        jnp.asarray(q, q_type), k, v, lengths, block_table=table, **scales
    )
    assert error(same, literal(q, *values, lengths)) <= LIMIT[q_type]


def test_entries_past_the_last_valid_page_are_never_followed():
    """Checked on the index maps, because the output does not show whether the page of a masked block was loaded."""
    pages, page = 4, 16
    lengths = np.array([0, 1, page, page + 1, 4 * page])
    table = np.arange(len(lengths) * pages) + 100
    blocks = tpu.Blocks(4, page)
    visible = functools.partial(visible_slots, None, blocks.rows, 4)
    _, slots, scales, _ = tpu._specs(visible, blocks, 128, False, pages)
    for b, length in enumerate(lengths):
        for spec in (slots, scales):
            read = [spec.index_map(b, 0, 0, j, lengths, [0], table) for j in range(pages)]
            assert all((int(h), int(i), int(j)) == (0, 0, 0) for _, h, i, j in read)
            last = max(-(-length // page) - 1, 0)
            want = [table[b * pages + min(j, last)] if length else 0 for j in range(pages)]
            assert [int(first) for first, *_ in read] == want


@pytest.mark.parametrize(
    ("dtype", "H", "page", "allowed"),
    [
        ("bfloat16", 128, 24, 16),
        ("float32", 128, 12, 8),
        ("int8", 128, 64, 128),
        ("bfloat16", 64, 64, 128),
        ("bfloat16", 128, 16384, 16),
    ],
)
def test_a_page_that_is_too_long_or_not_whole_tiles_is_refused(dtype, H, page, allowed):
    pool = jnp.zeros((4, 1, page, H), dtype)
    scale = jnp.zeros((4, 1, 1, page)) if dtype == INT8 else None
    q, lengths, table = jnp.zeros((1, 1, 4, H), "bfloat16"), jnp.ones(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=rf"page={page} .*multiple of {allowed}, up to"):
        backend(q, pool, pool, lengths, scale=1.0, k_scale=scale, v_scale=scale, block_table=table)


def test_types_are_refused_by_name():
    wide, cache = jnp.zeros((1, 1, 4, 128)), jnp.zeros((1, 1, 16, 128))
    for dtype in ("int8", "float8_e4m3fn", "bfloat16", "float32"):
        assert tpu.unsupported(wide, cache.astype(dtype), cache.astype(dtype)) is None
    assert tpu.unsupported(wide, cache.astype("float8_e5m2"), cache) == (
        "k is float8_e5m2: the kernel takes float32, bfloat16, int8, float8_e4m3fn"
    )
    assert tpu.unsupported(wide.astype("int8"), cache, cache) == "q is int8: the kernel takes float32, bfloat16"


@pytest.mark.parametrize(
    ("rows", "page", "want"), [(4, 256, (4, 256)), (4096, 1024, (512, 1024)), (4096, 4096, (128, 4096))]
)
def test_block_choice_over_pages(rows, page, want):
    assert tpu.choose_blocks(rows, 8 * page, 128, 2, page) == tpu.Blocks(*want)


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from razor_jax.kernels.attention import Part, tpu
from razor_jax.kernels.cache_write import quantize
mesh = Mesh(np.array(jax.devices()), ("x",))
x = np.random.default_rng(0).standard_normal((3, 2, 2, 32, 128)).astype(np.float32)
(k, k_scale), (v, v_scale) = (quantize(jnp.asarray(a), jnp.dtype("int8")) for a in x[1:])
arrays = jnp.asarray(x[0, :, :, :4], "bfloat16"), k, v, k_scale, v_scale, jnp.array([5, 32], jnp.int32)
def run(q, k, v, k_scale, v_scale, lengths):
    part = Part(q, k, v, lengths, None, k_scale, v_scale)
    return tpu.attend(part, scale=0.1, interpret=True, return_state=True, blocks=tpu.Blocks(4, 16))
alone = jax.jit(run)(*arrays)
for heads in (P(None, "x"), P("x")):
    lengths = P("x") if heads == P("x") else P()
    shards = jax.shard_map(run, mesh=mesh, in_specs=(heads,) * 5 + (lengths,), out_specs=heads, check_vma=False)
    for a, b in zip(jax.jit(shards)(*arrays), alone, strict=True):
        np.testing.assert_array_equal(a, b)
print("equal on", len(jax.devices()))
"""


def test_shards_of_heads_and_of_rows_equal_one_device():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.stdout.strip() == "equal on 2", run.stderr[-2000:]
