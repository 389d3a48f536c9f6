"""The TPU kernel in interpret mode against a literal float64 softmax, NaN in unread memory.

What the interpreter cannot show (tiles, fast memory, hidden copies of a cache) is in `tests/aot`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from razor_jax.kernels.attention import dispatch, tpu, xla

from ..support import oracle
from ..support.kernel_cases import BLOCK, COPIES, EDGES, SCALE, H, S, compensation, inputs
from ..support.kernel_inputs import NAN, by_arguments, error, literal, poison, random

backend = by_arguments(tpu.attend)
backend_causal = by_arguments(tpu.attend_causal)
xla_attend = by_arguments(xla.attend)

BLOCKS = tpu.Blocks(8, BLOCK)
LIMIT = {"float32": 2e-6, "bfloat16": 8e-3}

attend = jax.jit(functools.partial(backend, scale=SCALE, interpret=True), static_argnames=("return_state", "blocks"))
attend_causal = jax.jit(
    functools.partial(backend_causal, scale=SCALE, interpret=True),
    static_argnames=("group_size", "return_state", "blocks"),
)


def check(got, want, dtype):
    assert error(got, want) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("G", "T"), [(1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (8, 4)])
def test_decode_over_ragged_prefixes_and_a_compensation_token(G, T, dtype):
    q, k, v = inputs(len(EDGES), 2, G * T, S, dtype)
    means = [random(len(EDGES), 2, 1, H, seed=9 + i, size=0.3) for i in (0, 1)]
    unused = COPIES[:, None, None, None] == 0
    poisoned = [np.where(unused, NAN, x) for x in means]
    state = compensation(jnp.asarray(q, dtype), *poisoned, COPIES, scale=SCALE)
    blocks = tpu.Blocks(G * T, BLOCK)
    got = attend(
        jnp.asarray(q, dtype), poison(k, EDGES, dtype), poison(v, EDGES, dtype), EDGES, state=state, blocks=blocks
    )
    check(got, literal(q, k, v, EDGES, means=means, n=COPIES), dtype)
    assert got.dtype == dtype


@pytest.mark.parametrize(("H", "dtype"), [(128, "float32"), (128, "bfloat16"), (64, "float32"), (64, "bfloat16")])
def test_decode_without_a_state(H, dtype):
    q, k, v = inputs(len(EDGES), 2, 4, S, dtype, H=H)
    got = attend(
        jnp.asarray(q, dtype), poison(k, EDGES, dtype), poison(v, EDGES, dtype), EDGES, blocks=tpu.Blocks(4, BLOCK)
    )
    check(got, literal(q * (SCALE * H**0.5), k, v, EDGES), dtype)  # SCALE is that of H = 128
    np.testing.assert_array_equal(got[0], 0.0)  # a row of length 0 saw nothing


def test_many_rows_against_the_cache():
    """20 rows in blocks of 8: the last block reaches past the end."""
    q, k, v = inputs(3, 1, 20, S, "float32")
    lengths = np.array([0, BLOCK + 1, S], np.int32)
    k_, v_ = poison(k, lengths, "float32"), poison(v, lengths, "float32")
    got = attend(q, k_, v_, lengths, blocks=BLOCKS)
    check(got, literal(q, k, v, lengths), "float32")
    # States use the same blocks.
    state = attend(q, k_, v_, lengths, blocks=BLOCKS, return_state=True)
    twice = attend(q, k_, v_, lengths, blocks=BLOCKS, state=state)
    check(twice, literal(q, k, v, lengths), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("G", "tokens", "start", "H"),
    [(1, 20, 9, 128), (4, 6, 11, 128), (8, 3, 0, 128), (8, 3, BLOCK, 64), (4, 5, S - 5, 64)],
)
def test_causal_sees_the_chunk_up_to_each_token(G, tokens, start, H, dtype):
    """With some starts a block of query rows straddles two blocks of slots, with others it does not."""
    q, k, v = inputs(len(EDGES), 1, G * tokens, S, dtype, H=H)
    got = attend_causal(
        jnp.asarray(q, dtype),
        poison(k, EDGES, dtype),
        poison(v, EDGES, dtype),
        EDGES,
        start=np.int32(start),
        group_size=G,
        blocks=BLOCKS,
    )
    causal = [start + r // G + 1 for r in range(G * tokens)]
    check(got, literal(q * (SCALE * H**0.5), k, v, EDGES, causal), dtype)


def test_causal_keys_after_the_last_query_are_not_read():
    G, start, tokens = 4, 3, 6
    q, k, v = inputs(1, 1, tokens * G, S, "float32")
    lengths = np.array([S], np.int32)
    k_, v_ = (poison(x, [BLOCK], "float32") for x in (k, v))  # blocks wholly after the last query
    got = attend_causal(q, k_, v_, lengths, start=np.int32(start), group_size=G, blocks=BLOCKS)
    check(got, literal(q, k, v, lengths, [start + r // G + 1 for r in range(tokens * G)]), "float32")


def test_cache_and_chunk_compose_through_the_state():
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
    causal = functools.partial(attend_causal, start=np.int32(0), group_size=G, blocks=tpu.Blocks(8, 4))
    state = attend(q, *cache, return_state=True, blocks=BLOCKS)
    check(causal(q, *chunk, state=state), want, "float32")
    state = causal(q, *chunk, return_state=True)
    check(attend(q, *cache, state=state, blocks=BLOCKS), want, "float32")
    check(jax.jit(functools.partial(xla_attend, scale=SCALE))(q, *cache, state=state), want, "float32")


def test_state_of_nothing_is_empty_and_harmless():
    q, k, v = inputs(2, 1, 4, S, "float32")
    blocks = tpu.Blocks(4, BLOCK)
    acc, m, l = attend(q, k * NAN, v * NAN, np.zeros(2, np.int32), return_state=True, blocks=blocks)
    np.testing.assert_array_equal(acc, 0.0)
    np.testing.assert_array_equal(l, 0.0)
    assert np.isfinite(np.asarray(m)).all()
    full = np.full(2, S, np.int32)
    after = attend(q, k, v, full, state=(acc, m, l), blocks=blocks)
    np.testing.assert_array_equal(after, attend(q, k, v, full, blocks=blocks))


def test_masked_slots_do_not_count_when_every_logit_is_very_negative():
    q, k = np.full((1, 1, 4, H), 1e3, np.float32), np.full((1, 1, S, H), -1e3, np.float32)
    v = random(1, 1, S, H, seed=3)
    got = attend(q, k, v, np.array([3], np.int32), blocks=tpu.Blocks(4, BLOCK))
    check(got, np.broadcast_to(v[:, :, :3].mean(axis=2, keepdims=True), q.shape), "float32")


def test_a_wide_query_over_a_narrow_cache():
    q, k, v = inputs(len(EDGES), 1, 4, S, "bfloat16")
    q = random(*q.shape, seed=5)
    k_, v_ = (poison(x, EDGES, "bfloat16") for x in (k, v))
    got = attend(q, k_, v_, EDGES, blocks=tpu.Blocks(4, BLOCK))
    check(got, literal(q, k, v, EDGES), "float32")


def test_uninitialised_memory_stays_out():
    """In the detailed interpreter scratch and padding are NaN, and every access is checked."""
    q, k, v = inputs(2, 1, 12, S, "float32")
    lengths = np.array([S, 0], np.int32)
    run = functools.partial(backend, scale=SCALE, blocks=BLOCKS, interpret=pltpu.InterpretParams())
    got = jax.jit(run)(q, poison(k, lengths, "float32"), poison(v, lengths, "float32"), lengths)
    check(got, literal(q, k, v, lengths), "float32")


def test_blocks_past_the_last_seen_slot_are_not_steps(monkeypatch):
    """The grid ends with the longest row, and the kernel's body runs only for blocks that a row sees."""
    steps, fold = [], tpu._fold

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return fold(*args)

    monkeypatch.setattr(tpu, "_fold", counted)
    q, k, v = inputs(2, 1, 4, 20 * BLOCK, "float32")
    lengths = np.array([BLOCK + 1, 3], np.int32)
    run = jax.jit(functools.partial(backend, scale=SCALE, blocks=tpu.Blocks(4, BLOCK), interpret=True))
    jax.block_until_ready(run(q, k, v, lengths))
    jax.effects_barrier()
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("rows", "slots", "itemsize", "want"),
    [
        (4, 32768, 2, (4, 4096)),
        (4, 32768, 4, (4, 2048)),
        (4, 4112, 2, (4, 2176)),  # two halves, not 4096 + 16
        (64, 100, 2, (64, 100)),
        (65, 4096, 2, (65, 1024)),
        (16384, 300, 2, (512, 300)),
    ],
)
def test_block_choice(rows, slots, itemsize, want):
    assert tpu.choose_blocks(rows, slots, 128, itemsize) == tpu.Blocks(*want)


def test_dispatch_runs_the_reference_where_there_is_no_tpu():
    q, k, v = inputs(2, 1, 4, 256, "float32")
    lengths = np.array([3, 200], np.int32)
    q, k, v, lengths = (jnp.asarray(x) for x in (q, k, v, lengths))
    want = xla_attend(q, k, v, lengths, scale=SCALE)
    for implementation in (None, "xla"):
        got = dispatch.attend(q, k, v, lengths, scale=SCALE, implementation=implementation)
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"pallas_tpu.*not a tpu.*'xla'"):
        dispatch.attend(q, k, v, lengths, scale=SCALE, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 1, 4, 96), "float32", "head width H=96"), ((1, 1, 4, 128), "float16", "q is float16")],
)
def test_a_forced_backend_that_cannot_run_says_why(shape, dtype, reason, monkeypatch):
    monkeypatch.setattr("razor_jax.kernels.backend.platform", lambda: "tpu")
    x = jnp.zeros(shape, dtype)
    lengths = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=reason):
        dispatch.attend(x, x, x, lengths, scale=1.0, implementation="pallas_tpu")
    causal = functools.partial(dispatch.attend_causal, start=0, group_size=4, scale=1.0)
    with pytest.raises(ValueError, match=reason):
        causal(x, x, x, lengths, implementation="pallas_tpu")
    np.testing.assert_array_equal(causal(x, x, x, lengths), 0.0)  # unforced, XLA runs it


def test_an_unknown_implementation_is_named(unchecked):
    x = jnp.zeros((1, 1, 4, 128))
    with pytest.raises(ValueError, match="implementation='cuda' is unknown: use one of xla, pallas_tpu"):
        dispatch.attend(x, x, x, jnp.zeros(1, jnp.int32), scale=1.0, implementation="cuda")
