"""Blockwise attention against a literal softmax, with lengths at block edges, NaN in unread memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_jax.kernels import attention as kernel
from razor_jax.kernels.attention import xla

from ..support import oracle
from ..support.kernel_inputs import NAN, error, literal

BLOCK, S = 8, 20  # the block does not divide S
EDGES = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)
# Jitted once per shape: run eagerly, every call would compile its loop again.
attend = jax.jit(kernel.attend, static_argnames=("scale", "return_state"))
attend_causal = jax.jit(kernel.attend_causal, static_argnames=("group_size", "scale", "return_state"))
compensation = jax.jit(kernel.compensation, static_argnames="scale")
SMALL = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make blocks so short that loops run more than once."""
    monkeypatch.setattr(xla, "_BLOCK_FEW_ROWS", BLOCK)
    monkeypatch.setattr(xla, "_BLOCK_MANY_ROWS", BLOCK)


def random(*shape, seed=0, size=1.0, dtype=np.float32):
    return (size * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(dtype)


def inputs(B, K, R, S, H, seed=0):
    return random(B, K, R, H, seed=seed), random(B, K, S, H, seed=seed + 1), random(B, K, S, H, seed=seed + 2)


def poison(x, lengths):
    """NaN in every slot from lengths[b] on."""
    return np.where(np.arange(x.shape[2])[:, None] < np.asarray(lengths)[:, None, None, None], x, NAN)


@pytest.mark.parametrize(("rows", "H", "slots"), [(1, 64, S), (4, 16, S), (40, 128, 16), (4, 16, 5)])
def test_attend_sees_its_prefix_and_nothing_else(rows, H, slots):
    lengths = np.minimum(EDGES, slots)
    q, k, v = inputs(len(lengths), 2, rows, slots, H)
    got = attend(q, poison(k, lengths), poison(v, lengths), lengths, scale=H**-0.5)
    np.testing.assert_allclose(got, literal(q, k, v, lengths), atol=2e-6)
    np.testing.assert_array_equal(got[0], 0.0)  # a row of length 0 saw nothing
    assert got.dtype == q.dtype


@pytest.mark.parametrize("leftover", [1e4, np.inf, np.nan])
def test_values_of_unread_slots_do_not_matter(leftover):
    # Few rows read a cache that is more than half full at once, and fall back to masked blocks if it is not finite.
    lengths = np.array([S - 3, 1, 0], np.int32)
    q, k, v = inputs(3, 2, 4, S, 16)
    unread = np.arange(S)[:, None] >= lengths[:, None, None, None]
    got = attend(q, *(jnp.asarray(np.where(unread, leftover, x), jnp.float32) for x in (k, v)), lengths, scale=0.25)
    assert error(got, literal(q, k, v, lengths)) < 2e-6


@pytest.mark.parametrize(("G", "H", "start"), [(1, 64, 0), (4, 16, 7), (8, 128, 8), (2, 16, 19)])
def test_attend_causal_sees_the_chunk_up_to_each_token(G, H, start):
    tokens = min(6, S - start)
    q, k, v = inputs(len(EDGES), 2, tokens * G, S, H)
    causal = [start + r // G + 1 for r in range(tokens * G)]
    k_, v_ = poison(k, EDGES), poison(v, EDGES)
    want = literal(q, k, v, EDGES, causal)
    got = attend_causal(q, k_, v_, EDGES, start=start, group_size=G, scale=H**-0.5)
    np.testing.assert_allclose(got, want, atol=2e-6)
    if G == 2:  # a Python int is static
        q, k_, v_, lengths = (jnp.asarray(x) for x in (q, k_, v_, EDGES))
        got = kernel.attend_causal(q, k_, v_, lengths, start=start, group_size=G, scale=H**-0.5)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_chunks_of_queries_equal_the_whole():
    G, H = 4, 16
    lengths = np.array([S, 13, 1], np.int32)
    q, k, v = inputs(3, 2, S * G, S, H)
    whole = attend_causal(q, k, v, lengths, start=0, group_size=G, scale=0.25)
    parts = [
        attend_causal(q[:, :, s * G : (s + 5) * G], k, v, lengths, start=s, group_size=G, scale=0.25)
        for s in range(0, S, 5)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole, atol=1e-6)


def test_causal_keys_after_the_last_query_are_not_read():
    G, start, tokens = 2, 3, 4
    q, k, v = inputs(1, 1, tokens * G, S, 16)
    later = np.arange(S)[:, None] >= BLOCK  # blocks wholly after token start + tokens - 1
    lengths = np.array([S], np.int32)
    got = attend_causal(
        q, np.where(later, NAN, k), np.where(later, NAN, v), lengths, start=start, group_size=G, scale=0.25
    )
    np.testing.assert_allclose(got, literal(q, k, v, lengths, [start + r // G + 1 for r in range(8)]), atol=2e-6)


@SMALL
@given(
    lengths=st.lists(st.integers(0, S), min_size=6, max_size=6),
    n=st.lists(st.sampled_from([0, 0, 1, 2, 37, 1000, 1_000_000]), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_compensation_token_is_n_copies_of_the_mean(lengths, n, seed):
    q, k, v = inputs(6, 2, 4, S, 16, seed)
    means = [random(6, 2, 1, 16, seed=seed + 9 + i, size=0.3) for i in (0, 1)]
    unused = np.asarray(n)[:, None, None, None] == 0
    poisoned = [np.where(unused, NAN, m) for m in means]
    lengths, n = np.asarray(lengths, np.int32), np.asarray(n, np.int32)
    state = compensation(q, *poisoned, n, scale=0.25)
    got = attend(q, poison(k, lengths), poison(v, lengths), lengths, scale=0.25, state=state)
    np.testing.assert_allclose(got, literal(q, k, v, lengths, means=means, n=n), atol=2e-6)


@pytest.mark.parametrize("n", [37, 1500])
def test_physical_copies_in_float32(n):
    """The same kernel over n real slots that hold the mean: equal up to the rounding of their sum."""
    q, k, v = inputs(1, 2, 4, S, 16)
    k_mean, v_mean = random(1, 2, 1, 16, seed=5, size=0.3), random(1, 2, 1, 16, seed=6)
    lengths = np.array([S], np.int32)
    state = compensation(q, k_mean, v_mean, np.array([n], np.int32), scale=0.25)
    got = attend(q, k, v, lengths, scale=0.25, state=state)
    k_all, v_all = (np.concatenate([x, np.repeat(m, n, axis=2)], axis=2) for x, m in ((k, k_mean), (v, v_mean)))
    copies = attend(q, k_all, v_all, lengths + n, scale=0.25)
    assert error(got, literal(q, k_all, v_all, lengths + n)) < 6e-7
    # A float32 sum of n equal terms may round each time in the same direction. Processors sum in different orders.
    assert error(got, copies) < max(6e-7, n * 2**-24)


def test_states_compose_in_any_order():
    q, k, v = inputs(6, 2, 4, S, 16)
    whole = attend(q, k, v, np.full(6, S, np.int32), scale=0.25)
    half = S // 2
    parts = [(k[:, :, a : a + half], v[:, :, a : a + half], np.full(6, half, np.int32)) for a in (0, half)]
    for order in ((0, 1), (1, 0)):
        state = None
        for part in order:
            state = attend(q, *parts[part], scale=0.25, state=state, return_state=True)
        np.testing.assert_allclose(kernel.finish(state, q.dtype), whole, atol=2e-6)
        assert all(x.dtype == jnp.float32 for x in state)


def test_state_of_nothing_is_empty_and_harmless():
    q, k, v = inputs(6, 2, 4, S, 16)
    none = np.zeros(6, np.int32)
    state = attend(q, k * NAN, v * NAN, none, scale=0.25, return_state=True)
    acc, m, l = (np.asarray(x) for x in state)
    np.testing.assert_array_equal(acc, 0.0)
    np.testing.assert_array_equal(l, 0.0)
    assert np.isfinite(m).all()
    assert np.isfinite(kernel.NEG)
    full = np.full(6, S, np.int32)
    np.testing.assert_array_equal(attend(q, k, v, full, scale=0.25, state=state), attend(q, k, v, full, scale=0.25))
    np.testing.assert_array_equal(kernel.finish(state, q.dtype), 0.0)


def test_causal_continues_from_a_state():
    """Cache ⊕ chunk by log-sum-exp is the softmax over both."""
    G, H, T = 2, 16, 6
    lengths, new = np.array([S, 5, 0], np.int32), np.array([6, 0, 3], np.int32)
    q, k, v = inputs(3, 2, T * G, S, H)
    _, k2, v2 = inputs(3, 2, T * G, T, H, seed=11)
    state = attend(q, poison(k, lengths), poison(v, lengths), lengths, scale=0.25, return_state=True)
    got = attend_causal(q, poison(k2, new), poison(v2, new), new, start=0, group_size=G, scale=0.25, state=state)
    for b, h, r in np.ndindex(3, 2, T * G):
        end = min(new[b], r // G + 1)
        keys = [*k[b, h, : lengths[b]], *k2[b, h, :end]]
        values = [*v[b, h, : lengths[b]], *v2[b, h, :end]]
        np.testing.assert_allclose(got[b, h, r], oracle.softmax_attention(q[b, h, r], keys, values), atol=2e-6)


def test_slot_order_is_irrelevant():
    q, k, v = inputs(6, 2, 4, S, 16)
    lengths = np.full(6, S, np.int32)
    order = np.random.default_rng(0).permutation(S)
    got = attend(q, k[:, :, order], v[:, :, order], lengths, scale=0.25)
    np.testing.assert_allclose(got, attend(q, k, v, lengths, scale=0.25), atol=1e-6)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_logits_stay_finite(size):
    q, k, v = inputs(len(EDGES), 2, 4, S, 16)
    q = q * np.float32(size)
    got = attend(q, poison(k, EDGES), poison(v, EDGES), EDGES, scale=0.25)
    np.testing.assert_allclose(got, literal(q, k, v, EDGES), atol=1e-5 * max(1.0, size / 30))


def test_masked_slots_do_not_count_when_every_logit_is_very_negative():
    q = np.full((6, 2, 4, 16), 1e3, np.float32)
    k = np.full((6, 2, S, 16), -1e3, np.float32)
    v = random(6, 2, S, 16)
    lengths = np.full(6, 3, np.int32)
    got = attend(q, k, v, lengths, scale=0.25)
    np.testing.assert_allclose(got[5, 1, 3], v[5, 1, :3].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_accumulate_in_float32(dtype):
    q, k, v = (x.astype(dtype) for x in inputs(len(EDGES), 2, 4, S, 64))
    got = attend(q, poison(k, EDGES).astype(dtype), poison(v, EDGES).astype(dtype), EDGES, scale=0.125)
    assert got.dtype == dtype
    want = literal(*(x.astype(np.float64) for x in (q, k, v)), EDGES)
    assert error(got.astype(np.float32), want) < 8e-3
    _, m, l = attend(q, k, v, EDGES, scale=0.125, return_state=True)
    assert m.dtype == l.dtype == jnp.float32


def test_ln_n_is_exact_whatever_the_type():
    """A bfloat16 ln n would be wrong by up to 3 % in n."""
    n = np.array([255, 257, 100_003], np.int32)
    q = jnp.zeros((3, 1, 2, 16), jnp.bfloat16)
    mean = np.ones((3, 1, 1, 16), np.float32)
    _, m, l = compensation(q, mean, mean, n, scale=0.25)
    weight = np.exp(np.asarray(m, np.float64)[:, 0, 0]) * np.asarray(l)[:, 0, 0]
    np.testing.assert_allclose(weight, n, rtol=2e-6)


def test_compensation_never_outweighs_what_it_stands_for():
    """Jensen: n e^{s(q, mean k)} <= sum e^{s(q, k)}, with equality where all keys agree."""
    q, k, v = inputs(1, 2, 8, S, 16)
    _, m, l = attend(q, k, v, np.array([S], np.int32), scale=0.25, return_state=True)
    k_mean, v_mean = k.mean(axis=2, keepdims=True), v.mean(axis=2, keepdims=True)
    n = np.array([S], np.int32)
    _, m_c, l_c = compensation(q, k_mean, v_mean, n, scale=0.25)
    mass, mass_c = np.asarray(m) + np.log(l), np.asarray(m_c) + np.log(l_c)
    assert (mass_c <= mass).all()
    assert (mass_c < mass - 0.01).any()
    same = np.repeat(k_mean, S, axis=2)
    _, m, l = attend(q, same, v, n, scale=0.25, return_state=True)
    np.testing.assert_allclose(np.asarray(m) + np.log(l), mass_c, atol=2e-6)


@SMALL
@given(
    lengths=st.lists(st.integers(0, S), min_size=3, max_size=3), start=st.integers(0, S - 4), seed=st.integers(0, 100)
)
def test_causal_property(lengths, start, seed):
    lengths = np.asarray(lengths, np.int32)
    q, k, v = inputs(3, 2, 12, S, 16, seed)
    got = attend_causal(
        q, poison(k, lengths), poison(v, lengths), lengths, start=np.int32(start), group_size=3, scale=0.25
    )
    want = literal(q, k, v, lengths, [start + r // 3 + 1 for r in range(12)])
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_work_follows_the_longest_row_not_the_slots(causal, monkeypatch):
    steps, fold = [], xla._fold

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return fold(*args)

    monkeypatch.setattr(xla, "_fold", counted)
    q, k, v = inputs(2, 1, 4, 100 * BLOCK, 16)
    lengths = np.array([BLOCK + 1, 3], np.int32)
    if causal:
        # In a chunk of 800 tokens, queries 10 to 13 need two blocks of keys.
        run = jax.jit(lambda *a: kernel.attend_causal(*a, start=10, group_size=1, scale=0.25))
        lengths = np.full(2, 100 * BLOCK, np.int32)
    else:
        run = jax.jit(lambda *a: kernel.attend(*a, scale=0.25))
    jax.block_until_ready(run(q, k, v, lengths))
    jax.effects_barrier()
    assert len(steps) == 2
