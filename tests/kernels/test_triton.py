"""The Pallas-Triton kernel in interpret mode against a literal float64 softmax, NaN in unread memory.

What the interpreter cannot show (registers, shared memory, hidden copies of a cache) is in `tests/aot`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.kernels import attention as kernel
from razor_jax.kernels.attention import triton, xla
from razor_jax.kernels.cache_write import dequantize, quantize

from ..support import oracle
from ..support.kernel_cases import BLOCK, COPIES, EDGES, SCALE, H, S, compensation, inputs
from ..support.kernel_inputs import NAN, by_arguments, error, literal, poison, random

backend = by_arguments(triton.attend)
backend_causal = by_arguments(triton.attend_causal)
xla_attend = by_arguments(xla.attend)

pytestmark = pytest.mark.skipif(triton.plt is None, reason="this JAX has no Pallas-Triton")

BLOCKS = triton.Blocks(16, BLOCK)
SPLIT = triton.Blocks(16, BLOCK, splits=2)
LIMIT = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 8e-3}

attend = jax.jit(functools.partial(backend, interpret=True), static_argnames=("scale", "return_state", "blocks"))
attend_causal = jax.jit(
    functools.partial(backend_causal, interpret=True),
    static_argnames=("scale", "group_size", "return_state", "blocks"),
)
reference = jax.jit(xla_attend, static_argnames=("scale", "return_state"))


@pytest.fixture
def check(record_property):
    """Check the largest error, and record it."""

    def compare(got, want, dtype, name="float"):
        largest = error(got, want)
        assert largest <= LIMIT[dtype]
        record_property(f"Triton kernel, {name} cache, {dtype} queries", largest)

    return compare


def unseen(S, lengths):
    """Bool [B,1,S,1]: slots from lengths[b] on."""
    return np.arange(S)[:, None] >= np.asarray(lengths)[:, None, None, None]


def int8(x, lengths):
    """x [B,K,S,H] as int8 with scales, both poisoned from lengths[b] on, and their float64 values."""
    quantised, scale = quantize(jnp.asarray(x), jnp.dtype("int8"))
    values = np.asarray(dequantize(quantised, scale), np.float64)
    bad = unseen(x.shape[2], lengths)
    return jnp.where(bad, jnp.int8(127), quantised), jnp.where(bad.swapaxes(2, 3), NAN, scale), values


def compensated(q, K, dtype):
    """The means of `COPIES` dropped tokens, NaN if none is dropped, and the state that stands for them."""
    means = [random(len(COPIES), K, 1, q.shape[3], seed=9 + i, size=0.3) for i in (0, 1)]
    poisoned = [np.where(COPIES[:, None, None, None] == 0, NAN, x) for x in means]
    return means, compensation(jnp.asarray(q, dtype), *poisoned, COPIES, scale=q.shape[3] ** -0.5)


@pytest.mark.parametrize(
    ("G", "T", "blocks", "dtype"),
    [
        (1, 1, BLOCKS, "float32"),
        (4, 1, SPLIT, "float32"),
        (8, 1, BLOCKS, "bfloat16"),
        (1, 4, SPLIT, "bfloat16"),
        (4, 4, BLOCKS, "bfloat16"),
        (8, 4, SPLIT, "float32"),
    ],
)
def test_decode_over_ragged_prefixes_and_a_compensation_token(G, T, blocks, dtype, check):
    q, k, v = inputs(len(EDGES), 2, G * T, S, dtype)
    means, state = compensated(q, 2, dtype)
    k_, v_ = poison(k, EDGES, dtype), poison(v, EDGES, dtype)
    got = attend(jnp.asarray(q, dtype), k_, v_, EDGES, scale=SCALE, state=state, blocks=blocks)
    check(got, literal(q, k, v, EDGES, means=means, n=COPIES), dtype)
    assert got.dtype == dtype


@pytest.mark.parametrize(("H", "dtype"), [(64, "float32"), (64, "bfloat16"), (128, "bfloat16"), (128, "float16")])
def test_decode_without_a_state(H, dtype, check):
    q, k, v = inputs(len(EDGES), 2, 4, S, dtype, H=H)
    k_, v_ = poison(k, EDGES, dtype), poison(v, EDGES, dtype)
    got = attend(jnp.asarray(q, dtype), k_, v_, EDGES, scale=H**-0.5, blocks=SPLIT if H == 64 else BLOCKS)
    check(got, literal(q, k, v, EDGES), dtype)
    np.testing.assert_array_equal(got[0], 0.0)  # a row of length 0 saw nothing


@pytest.mark.parametrize("splits", [1, 3, 40])
def test_splits_give_one_state(splits, check):
    """Also if there are more splits than a row has blocks, and more than are merged at once."""
    q, k, v = inputs(len(EDGES), 1, 4, S, "float32")
    means, state = compensated(q, 1, "float32")
    run = functools.partial(attend, q, poison(k, EDGES, "float32"), poison(v, EDGES, "float32"), EDGES, scale=SCALE)
    blocks = triton.Blocks(16, BLOCK, splits)
    got = run(state=state, blocks=blocks, return_state=True)
    check(kernel.finish(got, jnp.dtype("float32")), literal(q, k, v, EDGES, means=means, n=COPIES), "float32")
    want = reference(q, k, v, EDGES, scale=SCALE, state=state, return_state=True)
    for a, b in zip(got, want, strict=True):
        check(a, np.asarray(b, np.float64), "float32")


def test_the_chosen_blocks_run(check):
    q, k, v = inputs(2, 1, 4, 700, "bfloat16")
    lengths = np.array([3, 700], np.int32)
    assert triton.choose_blocks(2, 4, 700, H, jnp.dtype("bfloat16")) == triton.Blocks(16, 64, splits=2)
    k_, v_ = poison(k, lengths, "bfloat16"), poison(v, lengths, "bfloat16")
    check(attend(jnp.asarray(q, "bfloat16"), k_, v_, lengths, scale=SCALE), literal(q, k, v, lengths), "bfloat16")


@pytest.mark.parametrize("blocks", [BLOCKS, SPLIT])
def test_many_rows_against_the_cache(blocks, check):
    """20 rows in blocks of 16: the last block reaches past the end. States use the same blocks."""
    q, k, v = inputs(3, 1, 20, S, "float32")
    lengths = np.array([0, BLOCK + 1, S], np.int32)
    k_, v_ = poison(k, lengths, "float32"), poison(v, lengths, "float32")
    run = functools.partial(attend, q, k_, v_, lengths, scale=SCALE, blocks=blocks)
    check(run(state=run(return_state=True)), literal(q, k, v, lengths), "float32")


@pytest.mark.parametrize(
    ("G", "tokens", "start", "H", "blocks", "dtype"),
    [
        (1, 20, 9, 128, BLOCKS, "float32"),
        (4, 6, 11, 128, BLOCKS, "bfloat16"),
        (8, 3, 0, 128, BLOCKS, "float32"),
        (8, 3, BLOCK, 64, BLOCKS, "bfloat16"),
        (4, 5, S - 5, 64, SPLIT, "float32"),
        (1, 20, 9, 64, SPLIT, "float32"),  # query rows that see nothing of the second split
    ],
)
def test_causal_sees_the_chunk_up_to_each_token(G, tokens, start, H, blocks, dtype, check):
    """With some starts a block of query rows straddles two blocks of slots, with others it does not."""
    q, k, v = inputs(len(EDGES), 1, G * tokens, S, dtype, H=H)
    k_, v_ = poison(k, EDGES, dtype), poison(v, EDGES, dtype)
    got = attend_causal(
        jnp.asarray(q, dtype), k_, v_, EDGES, start=np.int32(start), group_size=G, scale=H**-0.5, blocks=blocks
    )
    check(got, literal(q, k, v, EDGES, [start + r // G + 1 for r in range(G * tokens)]), dtype)


def test_causal_keys_after_the_last_query_are_not_read(check):
    G, start, tokens = 4, 3, 6
    q, k, v = inputs(1, 1, tokens * G, S, "float32")
    lengths = np.array([S], np.int32)
    k_, v_ = (poison(x, [BLOCK], "float32") for x in (k, v))  # blocks wholly after the last query
    got = attend_causal(q, k_, v_, lengths, start=np.int32(start), group_size=G, scale=SCALE, blocks=BLOCKS)
    check(got, literal(q, k, v, lengths, [start + r // G + 1 for r in range(tokens * G)]), "float32")


def test_cache_and_chunk_compose_through_the_state(check):
    """A chunk after a cache is the softmax over both, whichever kernel or backend made the state."""
    G, T = 4, 6
    lengths, new = np.array([S, 5, 0], np.int32), np.array([6, 0, 3], np.int32)
    q, k, v = inputs(3, 1, T * G, S, "float32")
    _, k2, v2 = inputs(3, 1, T * G, T, "float32", seed=11)
    want = np.zeros(q.shape)
    for b, h, r in np.ndindex(q.shape[:3]):
        end = min(new[b], r // G + 1)
        keys, values = [*k[b, h, : lengths[b]], *k2[b, h, :end]], [*v[b, h, : lengths[b]], *v2[b, h, :end]]
        want[b, h, r] = oracle.softmax_attention(q[b, h, r], keys, values)
    cache = (*(poison(x, lengths, "float32") for x in (k, v)), lengths)
    chunk = (*(poison(x, new, "float32") for x in (k2, v2)), new)
    causal = functools.partial(attend_causal, start=np.int32(0), group_size=G, scale=SCALE, blocks=BLOCKS)
    state = attend(q, *cache, scale=SCALE, return_state=True, blocks=SPLIT)
    check(causal(q, *chunk, state=state), want, "float32")
    state = causal(q, *chunk, return_state=True)
    check(attend(q, *cache, scale=SCALE, state=state, blocks=SPLIT), want, "float32")
    check(reference(q, *cache, scale=SCALE, state=state), want, "float32")


def test_state_of_nothing_is_empty_and_harmless():
    q, k, v = inputs(2, 1, 4, S, "float32")
    run = functools.partial(attend, scale=SCALE, blocks=SPLIT)
    acc, m, l = run(q, k * NAN, v * NAN, np.zeros(2, np.int32), return_state=True)
    np.testing.assert_array_equal(acc, 0.0)
    np.testing.assert_array_equal(l, 0.0)
    assert np.isfinite(np.asarray(m)).all()
    full = np.full(2, S, np.int32)
    np.testing.assert_array_equal(run(q, k, v, full, state=(acc, m, l)), run(q, k, v, full))


def test_masked_slots_do_not_count_when_every_logit_is_very_negative(check):
    q, k = np.full((1, 1, 4, H), 1e3, np.float32), np.full((1, 1, S, H), -1e3, np.float32)
    v = random(1, 1, S, H, seed=3)
    got = attend(q, k, v, np.array([3], np.int32), scale=SCALE, blocks=SPLIT)
    check(got, np.broadcast_to(v[:, :, :3].mean(axis=2, keepdims=True), q.shape), "float32")


def test_a_wide_query_over_a_narrow_cache(check):
    q, k, v = inputs(len(EDGES), 1, 4, S, "bfloat16")
    q = random(*q.shape, seed=5)
    k_, v_ = (poison(x, EDGES, "bfloat16") for x in (k, v))
    got = attend(q, k_, v_, EDGES, scale=SCALE, blocks=BLOCKS)
    check(got, literal(q, k, v, EDGES), "float32", "bfloat16")


@pytest.mark.parametrize(
    ("R", "H", "blocks", "dtype"),
    [(4, 128, SPLIT, "float32"), (4, 128, BLOCKS, "bfloat16"), (20, 64, BLOCKS, "bfloat16")],
)
def test_int8_is_the_softmax_over_what_its_scales_say(R, H, blocks, dtype, check):
    q, k, v = inputs(len(EDGES), 2, R, S, dtype, H=H)
    means, state = compensated(q, 2, dtype)
    (k_, k_scale, k), (v_, v_scale, v) = int8(k, EDGES), int8(v, EDGES)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    got = attend(jnp.asarray(q, dtype), k_, v_, EDGES, scale=H**-0.5, state=state, blocks=blocks, **scales)
    check(got, literal(q, k, v, EDGES, means=means, n=COPIES), dtype, "int8")


def test_float8_has_no_scale(check):
    q, k, v = inputs(len(EDGES), 2, 4, S, "float8_e4m3fn")
    k_, v_ = (poison(x, EDGES, "float8_e4m3fn") for x in (k, v))
    got = attend(jnp.asarray(q, "bfloat16"), k_, v_, EDGES, scale=SCALE, blocks=SPLIT)
    check(got, literal(q, k, v, EDGES), "bfloat16", "float8_e4m3fn")


@pytest.mark.parametrize(("quantised", "blocks"), [(False, SPLIT), (True, None)])
def test_pages_are_looked_up_and_garbage_entries_never_followed(quantised, blocks, check):
    """Rows share no page. An entry past a row's last page, if followed, leads to a page full of NaN."""
    page, pages = 2 * BLOCK, 3
    lengths = np.array([0, 1, page, page + 1, pages * page], np.int32)
    B, K = len(lengths), 2
    q, k, v = inputs(B, K, 4, pages * page, "float32")
    scales, means = {}, (k, v)
    if quantised:
        (k_, k_scale, k), (v_, v_scale, v) = int8(k, lengths), int8(v, lengths)
        means, scales = (k, v), {"k_scale": k_scale, "v_scale": v_scale}
    else:
        k_, v_ = poison(k, lengths, "float32"), poison(v, lengths, "float32")
    place = np.random.default_rng(7).permutation(B * pages).reshape(B, pages)

    def pool(x, spoilt):
        """[B,K,S,H] or scales [B,K,1,S] as pages [P,K,page,H] or [P,K,1,page], with one unused page at the end."""
        x = np.asarray(x)
        axis = 3 if x.shape[2] == 1 else 2
        parts = np.split(x, pages, axis=axis)
        out = np.full((B * pages + 1, *parts[0].shape[1:]), spoilt, x.dtype)
        for b, p in np.ndindex(B, pages):
            out[place[b, p]] = parts[p][b]
        return jnp.asarray(out)

    spoilt = 127 if quantised else NAN
    valid = np.arange(pages) * page < lengths[:, None]
    table = np.where(valid, place, B * pages).astype(np.int32)
    scales = {name: pool(x, NAN) for name, x in scales.items()}
    got = attend(
        q, pool(k_, spoilt), pool(v_, spoilt), lengths, scale=SCALE, block_table=table, blocks=blocks, **scales
    )
    check(got, literal(q, *means, lengths), "float32", "paged int8" if quantised else "paged")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_groups_of_a_layer_are_one_launch(dtype, check):
    """A full group of long rows and a windowed group with a state run in one kernel, plus the merge of the splits."""
    lengths = np.array([0, 3, 300], np.int32)
    rings = np.minimum(lengths, S).astype(np.int32)
    q, k, v = inputs(3, 1, 4, 300, dtype)
    q2, k2, v2 = inputs(3, 3, 4, S, dtype, seed=5)
    before = tuple(random(*shape, seed=8) for shape in (q2.shape, q2.shape[:3]))
    state = (before[0], before[1], np.abs(before[1]))
    cast = functools.partial(jnp.asarray, dtype=dtype)
    full = triton.Part(cast(q), poison(k, lengths, dtype), poison(v, lengths, dtype), lengths)
    ring = triton.Part(cast(q2), poison(k2, rings, dtype), poison(v2, rings, dtype), rings, state)
    run = functools.partial(triton.attend_groups, scale=SCALE, return_state=True, interpret=True)
    got = jax.jit(run)((full, ring))
    want = (
        reference(q, k, v, lengths, scale=SCALE, return_state=True),
        reference(q2, k2, v2, rings, scale=SCALE, return_state=True, state=state),
    )
    want = kernel.finish(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *want), jnp.dtype("float32"))
    check(kernel.finish(got, jnp.dtype("float32")), np.asarray(want, np.float64), dtype)
    out = jax.jit(functools.partial(run, return_state=False))((full, ring))
    check(out, np.asarray(want, np.float64), dtype)
    merged = {"float32": 1, "bfloat16": 0}[dtype]  # groups whose slots are long enough to share
    assert str(jax.make_jaxpr(run)((full, ring))).count("pallas_call[") == 1 + merged


@pytest.mark.parametrize("blocks", [BLOCKS, triton.Blocks(16, BLOCK, splits=4)])
def test_blocks_past_the_last_seen_slot_are_not_steps(blocks, monkeypatch):
    """Each row walks over its own blocks only, whatever the length of the cache; splits share them."""
    steps, fold = [], triton._fold

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return fold(*args)

    monkeypatch.setattr(triton, "_fold", counted)
    q, k, v = inputs(2, 1, 4, 20 * BLOCK, "float32")
    lengths = np.array([5 * BLOCK + 1, 3], np.int32)
    run = jax.jit(functools.partial(backend, scale=SCALE, blocks=blocks, interpret=True))
    jax.block_until_ready(run(q, k, v, lengths))
    jax.effects_barrier()
    assert len(steps) == 7


@pytest.mark.parametrize(
    ("heads", "rows", "slots", "dtype", "page", "want"),
    [
        (8, 4, 32768, "bfloat16", None, triton.Blocks(16, 64, 66)),  # four programs per multiprocessor
        (1, 4, 32768, "bfloat16", None, triton.Blocks(16, 64, 128)),  # no shorter than four blocks
        (600, 4, 32768, "bfloat16", None, triton.Blocks(16, 64, 1)),
        (8, 40, 4100, "bfloat16", None, triton.Blocks(64, 64, 8)),
        (8, 4, 20, "bfloat16", None, triton.Blocks(16, 32, 1)),
        (8, 4, 32768, "bfloat16", 48, triton.Blocks(16, 16, 66)),  # pages are whole tiles
        (8, 4, 32768, "float32", None, triton.Blocks(16, 16, 66, warps=8)),
        (8, 16384, 4096, "bfloat16", None, triton.Blocks(128, 64, 1, warps=8)),
        (8, 256, 32768, "bfloat16", None, triton.Blocks(128, 64, 8, warps=8)),
    ],
)
def test_block_choice(heads, rows, slots, dtype, page, want):
    assert triton.choose_blocks(heads, rows, slots, 128, jnp.dtype(dtype), page) == want


def test_pages_that_are_not_whole_tiles_are_refused():
    with pytest.raises(ValueError, match=r"pages of 24 slots: .* multiple of 16"):
        triton.choose_blocks(8, 4, 4096, 128, jnp.dtype("bfloat16"), page=24)


@pytest.mark.parametrize(
    ("width", "q", "k", "v", "slots", "reason"),
    [
        (96, "float32", "float32", "float32", 8, "head width H=96"),
        (128, "float64", "float32", "float32", 8, "q is float64"),
        (128, "bfloat16", "float32", "bfloat16", 8, "k is float32 and v is bfloat16"),
        (128, "bfloat16", "float8_e5m2", "float8_e5m2", 8, "k is float8_e5m2"),
        (128, "bfloat16", "int8", "int8", 1 << 24, "signed 32-bit"),
        (128, "bfloat16", "int8", "int8", 8, None),
        (64, "float16", "float16", "float16", 8, None),
    ],
)
def test_unsupported_inputs_have_a_reason(width, q, k, v, slots, reason, unchecked):
    q, k, v = (jax.ShapeDtypeStruct((1, 1, S, width), dtype) for S, dtype in ((4, q), (slots, k), (slots, v)))
    got = triton.unsupported(q, k, v)
    assert (got is None) if reason is None else reason in got


def test_float8_needs_a_gpu_that_converts_it(monkeypatch, unchecked):
    x = jax.ShapeDtypeStruct((1, 1, 4, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 1, 4, 128), "float8_e4m3fn")
    refused = "compute capability 8.0, and converting float8 needs 8.9"
    for capability, reason in (("8.0", refused), ("9.0", None), ("10.0", None)):
        device = type("Device", (), {"compute_capability": capability})()
        monkeypatch.setattr(jax, "local_devices", lambda backend, device=device: [device])
        got = triton.unsupported(x, k, k)
        assert (got is None) if reason is None else reason in got


def test_a_jax_without_pallas_triton_is_named(monkeypatch, unchecked):
    monkeypatch.setattr(triton, "plt", None)
    x = jax.ShapeDtypeStruct((1, 1, 4, 128), "bfloat16")
    assert "no Pallas-Triton" in triton.unsupported(x, x, x)
