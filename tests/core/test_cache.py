"""The cache against naive Python lists of tokens, NaN in every slot and mean that must not be read."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_jax import HeadSplit, RazorConfig
from razor_jax import cache as kv
from razor_jax.attention import attend_and_write

from ..support import oracle

NAN = np.float32(np.nan)
B, K, G, H = 3, 3, 2, 8
CAPACITY, CHUNK = 42, 12
SPLIT = HeadSplit(((0,),), K)  # one layer: head 0 keeps everything, heads 1 and 2 are windowed
SMALL = settings(max_examples=20, deadline=None, derandomize=True, database=None)

# Each row's window is a third of its prompt: any window of 1 to 14 without another compilation.
RULE = {"min_window": 1, "window_divisor": 3}
rows = functools.partial(st.lists, min_size=B, max_size=B)


def tokens(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def poisoned(cache: kv.KVCache) -> kv.KVCache:
    """NaN in every slot and every mean."""
    return cache.replace(layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.layers))


@functools.cache
def empty(sinks: int, dtype: str = "float32", capacity: int = CAPACITY, compensation: bool = True, **window):
    razor = RazorConfig(sinks=sinks, compensation=compensation, **(window or RULE))
    return poisoned(kv.init(kv.make_spec(SPLIT, H, capacity, razor, dtype), B))


def start(windows, sinks: int, dtype: str = "float32") -> kv.KVCache:
    """A cache that holds NaN everywhere, with these windows."""
    return empty(sinks, dtype).replace(window=jnp.asarray(windows, jnp.int32))


@jax.jit
def append(cache, k, v, lengths):
    """Write only."""
    call, cache = kv.begin(cache, lengths, k.shape[2])
    return cache.replace(layers=tuple(kv.write(layer, k, v, call) for layer in cache.layers))


@jax.jit
def attend(cache, q, k, v, lengths):
    """Attend, then write."""
    call, after = kv.begin(cache, lengths, k.shape[2])
    outs, layers = zip(*(attend_and_write(q, k, v, layer, call) for layer in cache.layers), strict=True)
    return outs, after.replace(layers=layers)


def padded(x, done, lengths, T):
    """Each row's next `lengths[b]` tokens of x [B, K, N, H] as one call [B, K, T, H], NaN after them."""
    out = np.full((B, K, T, H), NAN)
    for b in range(B):
        out[b, :, : lengths[b]] = x[b, :, done[b] : done[b] + lengths[b]]
    return out


def feed(cache, k, v, calls):
    """Write k, v [B, K, N, H] by calls (T, lengths of each row); gives the cache and the lengths."""
    done = np.zeros(B, np.int32)
    for T, lengths in calls:
        lengths = np.asarray(lengths, np.int32)
        cache = append(cache, padded(k, done, lengths, T), padded(v, done, lengths, T), lengths)
        done += lengths
    return cache, done


def naive(k, v, length, windows, sinks, dtype=np.float32):
    """Naive heads [B][K] after each row's first length[b] tokens."""
    heads = [[oracle.Head(sinks, None if h == 0 else w, dtype=dtype) for h in range(K)] for w in windows]
    for b, h in np.ndindex(B, K):
        for p in range(length[b]):
            heads[b][h].push(k[b, h, p], v[b, h, p])
    return heads


def held(cache) -> list[tuple[np.ndarray, ...]]:
    """(k, v, k_mean, v_mean) of each head of the only layer, float64, [B, slots, H]; means None without them."""
    out = []
    for group in cache.layers[0]:
        for h in range(group.k.shape[1]):
            parts = (group.k, group.v, group.k_mean, group.v_mean)
            out.append(tuple(None if x is None else np.asarray(x[:, h], np.float64) for x in parts))
    return out


def check(cache, heads) -> float:
    """Slots equal exactly and in their places, NaN in all others, means to 1e-5; the largest error of a mean."""
    worst = 0.0
    for (b, h), arrays in zip(np.ndindex(B, K), [held(cache)[h] for _ in range(B) for h in range(K)], strict=True):
        head = heads[b][h]
        for i, slots in enumerate(arrays[:2]):
            want = np.full(slots[b].shape, np.nan)
            for token in head.first + head.recent:
                want[head.slot(token[0])] = token[1 + i]
            np.testing.assert_array_equal(slots[b], want)
        if head.window is not None and arrays[2] is not None:
            assert int(cache.dropped[b]) == len(head.dropped)
            for i, mean in enumerate(arrays[2:]):
                want = head.means[i] if head.dropped else np.full(H, np.nan)
                np.testing.assert_allclose(mean[b, 0], want, atol=1e-5)
                worst = max(worst, float(np.max(np.abs(mean[b, 0] - want))) if head.dropped else 0.0)
    np.testing.assert_array_equal(cache.length, [heads[b][0].length for b in range(B)])
    return worst


calls = st.lists(st.tuples(st.sampled_from([1, CHUNK]), rows(st.integers(0, CHUNK))), min_size=1, max_size=5)


def fit(calls):
    """The calls with lengths cut to T and to the capacity."""
    done, out = np.zeros(B, np.int32), []
    for T, lengths in calls:
        lengths = np.minimum(np.minimum(lengths, T), CAPACITY - done)
        done += lengths
        out.append((T, lengths))
    return out


# --- What is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 4])
@SMALL
@given(calls=calls, windows=rows(st.integers(1, 14)), seed=st.integers(0, 50))
def test_any_calls_give_what_naive_lists_give(sinks, calls, windows, seed):
    k, v = tokens(B, K, CAPACITY, H, seed=seed), tokens(B, K, CAPACITY, H, seed=seed + 100)
    cache, done = feed(start(windows, sinks), k, v, fit(calls))
    check(cache, naive(k, v, done, windows, sinks))


@SMALL
@given(
    prompt=rows(st.integers(0, CHUNK)), steps=st.integers(0, CAPACITY - CHUNK), windows=rows(st.integers(1, 14)),
    sinks=st.sampled_from([0, 4]),
)  # fmt: skip
def test_prefill_and_steps_equal_one_prefill(prompt, steps, windows, sinks):
    """prefill(N) + M steps = prefill(N + M): slots exactly, means to 1e-5."""
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    stepped, done = feed(start(windows, sinks), k, v, [(CHUNK, prompt)] + [(1, [1] * B)] * steps)
    whole, _ = feed(start(windows, sinks), k, v, [(CAPACITY, done)])
    for a, b in zip(held(stepped), held(whole), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        if a[2] is not None:
            np.testing.assert_allclose(a[2], b[2], atol=1e-5)
            np.testing.assert_allclose(a[3], b[3], atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 4])
def test_ring_wraps_twice_and_a_chunk_overruns_it(sinks):
    windows = [3, 5, 1]
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    steps, done = feed(start(windows, sinks), k, v, [(1, [1] * B)] * 20)
    check(steps, naive(k, v, done, windows, sinks))
    assert (np.asarray(steps.dropped) > 2 * np.asarray(windows)).all()
    chunks, done = feed(start(windows, sinks), k, v, [(CHUNK, [7, 2, 0]), (CHUNK, [12, 11, 10]), (1, [1, 0, 1])])
    check(chunks, naive(k, v, done, windows, sinks))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_cache_folds_what_it_holds(dtype):
    """Slots are the rounded keys; means are float32, of the rounded keys."""
    windows, sinks = [3, 14, 1], 4
    # Far from zero, so that rounding is coarse and a mean of unrounded keys would differ.
    k, v = 40 + tokens(B, K, CAPACITY, H), 40 + tokens(B, K, CAPACITY, H, seed=1)
    cache, done = feed(start(windows, sinks, dtype), k, v, [(CHUNK, [12, 12, 3]), (1, [1, 1, 1]), (CHUNK, [12, 10, 9])])
    group = cache.layers[0][1]
    assert group.k.dtype == dtype
    assert group.k_mean.dtype == group.v_mean.dtype == jnp.float32
    check(cache, naive(k, v, done, windows, sinks, jnp.dtype(dtype)))


def test_long_sequences_keep_their_means():
    """A running mean over 3,000 one-token writes, and the same in chunks."""
    N, sinks, window = 3000, 2, 7
    razor = RazorConfig(sinks=sinks, window=window)
    cache = kv.init(kv.make_spec(HeadSplit(((),), 1), H, N, razor, "float32"), 1)
    k, v = 3 + tokens(1, 1, N, H), tokens(1, 1, N, H, seed=1)

    def by(T, cache):
        def body(i, cache):
            at = (0, 0, i * T, 0)
            call, after = kv.begin(cache, jnp.full(1, T), T)
            part = (jax.lax.dynamic_slice(jnp.asarray(x), at, (1, 1, T, H)) for x in (k, v))
            return after.replace(layers=(kv.write(cache.layers[0], *part, call),))

        return jax.lax.fori_loop(0, N // T, body, cache)

    for T in (1, 100):
        group = jax.jit(by, static_argnums=0)(T, cache).layers[0][0]
        np.testing.assert_allclose(group.k_mean[0, 0, 0], k[0, 0, sinks : N - window].mean(0), atol=1e-5)
        np.testing.assert_allclose(group.v_mean[0, 0, 0], v[0, 0, sinks : N - window].mean(0), atol=1e-5)


# --- What is seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 4])
@SMALL
@given(calls=calls, windows=rows(st.integers(1, 14)), seed=st.integers(0, 50))
def test_attention_sees_the_cache_before_the_call_and_the_call(sinks, calls, windows, seed):
    """Against n physical copies of the mean in float64; padded tokens are NaN."""
    k, v = tokens(B, K, CAPACITY, H, seed=seed), tokens(B, K, CAPACITY, H, seed=seed + 100)
    heads = naive(k, v, [0] * B, windows, sinks)
    cache, done = start(windows, sinks), np.zeros(B, np.int32)
    for T, lengths in fit(calls):
        q = tokens(B, K, T, G, H, seed=seed)
        args = padded(k, done, lengths, T), padded(v, done, lengths, T)
        (out,), cache = attend(cache, q.reshape(B, K, T * G, H), *args, lengths)
        assert np.isfinite(out).all()
        for b, h in np.ndindex(B, K):
            new = slice(done[b], done[b] + lengths[b])
            want = heads[b][h].call(q[b, h, : lengths[b]], k[b, h, new], v[b, h, new], copies=True)
            got = np.asarray(out[b, h]).reshape(T, G, H)[: lengths[b]]
            np.testing.assert_allclose(got, want, atol=5e-6)
        done += lengths
    check(cache, heads)


def test_ring_order_is_irrelevant():
    windows, sinks = [6, 6, 6], 2
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    cache, _ = feed(start(windows, sinks), k, v, [(CHUNK, [CHUNK] * B)])
    order = np.r_[[1, 0], 2 + np.random.default_rng(0).permutation(6)]
    full, ring = cache.layers[0]
    mixed = ring.replace(k=ring.k.at[:, :, :8].set(ring.k[:, :, order]), v=ring.v.at[:, :, :8].set(ring.v[:, :, order]))
    q, k1, v1 = (tokens(B, K, n, H, seed=s) for n, s in ((G, 2), (1, 3), (1, 4)))
    outs = [attend(cache.replace(layers=((full, g),)), q, k1, v1, np.ones(B, np.int32))[0][0] for g in (ring, mixed)]
    np.testing.assert_allclose(*outs, atol=1e-6)


def test_without_compensation_the_dropped_are_gone():
    k, v = tokens(B, K, CHUNK, H), tokens(B, K, CHUNK, H, seed=1)
    sinks, window = 1, 4
    cache, _ = feed(empty(sinks, compensation=False, window=window), k, v, [(CHUNK, [CHUNK] * B)])
    assert cache.layers[0][1].k_mean is None
    q, k1, v1 = (tokens(B, K, n, H, seed=s) for n, s in ((G, 2), (1, 3), (1, 4)))
    (out,), _ = attend(cache, q, k1, v1, np.ones(B, np.int32))
    for b, h in np.ndindex(B, K):
        head = oracle.Head(sinks, None if h == 0 else window, compensation=False)
        for p in range(CHUNK):
            head.push(k[b, h, p], v[b, h, p])
        want = head.call(q[b, h].reshape(1, G, H), k1[b, h], v1[b, h])
        np.testing.assert_allclose(out[b, h].reshape(1, G, H), want, atol=5e-6)


# --- Windows, overflow, idle rows ----------------------------------------------------------------------


def bits(cache):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(cache)]


def row_bits(cache, b):
    return [np.asarray(x[b]).tobytes() for x in jax.tree.leaves(cache)]


@pytest.mark.parametrize("T", [1, CHUNK])
@pytest.mark.parametrize("filled", [0, 3, 30])
def test_length_zero_leaves_a_row_bit_identical(T, filled):
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    cache, _ = feed(empty(4), k, v, [(CAPACITY, [filled] * B)])
    new = k[:, :, :T].copy()
    new[1] = NAN
    _, after = attend(cache, np.zeros((B, K, T * G, H), np.float32), new, new, np.array([1, 0, T], np.int32))
    assert row_bits(after, 1) == row_bits(cache, 1)
    assert row_bits(after, 0) != row_bits(cache, 0)
    assert row_bits(after, 2) != row_bits(cache, 2)


@pytest.mark.parametrize("T", [1, CHUNK])
def test_overflowing_row_is_untouched_and_flagged(T):
    k, v = tokens(B, K, CAPACITY + T, H), tokens(B, K, CAPACITY + T, H, seed=1)
    windows = [3, 14, 5]
    cache, done = feed(start(windows, 4), k, v, [(CAPACITY, [CAPACITY - T, CAPACITY - T + 1, 10])])
    new = [padded(x, done, [T] * B, T) for x in (k, v)]
    after = append(cache, *new, np.full(B, T, np.int32))
    np.testing.assert_array_equal(after.overflow, [False, True, False])
    check(after, naive(k, v, [CAPACITY, done[1], 10 + T], windows, 4))
    assert row_bits(after.replace(overflow=cache.overflow), 1) == row_bits(cache, 1)
    # The flag stays, and a row that is full but idle does not overflow.
    again = append(after, *new, np.array([0, T - 1, 0], np.int32))
    np.testing.assert_array_equal(again.overflow, [False, True, False])
    np.testing.assert_array_equal(again.length, [CAPACITY, CAPACITY, 10 + T])


def test_paper_rule_by_each_rows_prompt():
    paper = RazorConfig()
    for prompt, window in ((1, 4000), (19_999, 4000), (20_000, 4000), (20_005, 4001), (131_072, 26_214)):
        assert kv.ring_length(paper, prompt) == window
        np.testing.assert_array_equal(kv.ring_length(paper, jnp.array([prompt], jnp.int32)), [window])
    spec = kv.make_spec(SPLIT, H, 131_072, paper, "bfloat16")
    assert spec.windowed_slots == 4 + 26_214


def test_window_comes_from_the_first_call_or_from_prompt_lengths():
    razor = RazorConfig(sinks=4, min_window=2, window_divisor=3)
    spec = kv.make_spec(SPLIT, H, CAPACITY, razor, "float32")
    k = tokens(B, K, CAPACITY, H)
    first, _ = feed(kv.init(spec, B), k, k, [(CHUNK, [12, 1, 0])])
    np.testing.assert_array_equal(first.window, [4, 2, 0])  # a row without tokens is still undecided
    later, _ = feed(first, k, k, [(CHUNK, [12, 12, 11])])
    np.testing.assert_array_equal(later.window, [4, 2, 3])
    given_ = kv.init(spec, B, jnp.array([40, 5, 16]))
    np.testing.assert_array_equal(given_.window, [13, 2, 5])
    assert given_.window.dtype == jnp.int32
    traced = jax.jit(kv.init, static_argnums=(0, 1))(spec, B, jnp.array([40, 5, 16]))
    np.testing.assert_array_equal(traced.window, given_.window)
    streamed, done = feed(poisoned(given_), k, k, [(CHUNK, [12, 5, 12]), (CHUNK, [12, 0, 4])])
    check(streamed, naive(k, k, done, [13, 2, 5], 4))


def test_window_never_exceeds_what_is_allocated():
    """A prompt announced longer than the capacity: its share would not fit the ring."""
    razor = RazorConfig(sinks=4, min_window=2, window_divisor=3)
    spec = kv.make_spec(SPLIT, H, CAPACITY, razor, "float32")
    cache = poisoned(kv.init(spec, B, jnp.array([500, 5, 16])))
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    assert int(cache.window[0]) == spec.windowed_slots - spec.sinks
    cache, done = feed(cache, k, v, [(CHUNK, [12] * B), (CHUNK, [12, 0, 0])])
    check(cache, naive(k, v, done, [14, 2, 5], 4))


@pytest.mark.parametrize(("capacity", "sinks", "window"), [(6, 4, 4000), (6, 10, 3), (8, 4, 4), (1, 4, 4)])
def test_capacity_below_sinks_and_window_drops_nothing(capacity, sinks, window):
    cache = empty(sinks, capacity=capacity, window=window)
    assert cache.spec.windowed_slots == capacity
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    cache, done = feed(cache, k, v, [(CHUNK, [capacity, max(0, capacity - 2), 0]), (1, [0, 1, 1])])
    np.testing.assert_array_equal(cache.dropped, 0)
    assert not np.asarray(cache.overflow).any()
    check(cache, naive(k, v, done, [window] * B, sinks))


def test_first_dropped_token_is_at_sinks_plus_window():
    k = tokens(B, K, CAPACITY, H)
    cache, _ = feed(empty(4, window=5), k, k, [(CHUNK, [9, 10, 8])])
    np.testing.assert_array_equal(cache.dropped, [0, 1, 0])
    np.testing.assert_array_equal(cache.layers[0][1].k_mean[1, 0, 0], k[1, 1, 4])


# --- Bytes, growth, rollback, errors -------------------------------------------------------------------


@pytest.mark.parametrize("retrieval", [((0,), (0, 1, 2)), ((), (1,)), ((), ()), ((0, 1, 2), (0, 1, 2))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.usefixtures("unchecked")
def test_predicted_bytes_are_allocated(retrieval, dtype, compensation):
    for razor in (None, RazorConfig.compact(7, compensation=compensation), RazorConfig()):
        spec = kv.make_spec(HeadSplit(retrieval, K), H, 50, razor, dtype)
        cache = jax.eval_shape(functools.partial(kv.init, spec, B))
        leaves = [x for x in jax.tree.leaves(cache) if x.ndim == 4]
        assert spec.kv_bytes(B) == sum(x.size * x.dtype.itemsize for x in leaves) == kv.allocated_bytes(cache)
        assert all(x.shape[0] == B for x in jax.tree.leaves(cache))
        assert spec.dense_bytes(B) == B * 2 * K * 50 * 2 * H * 2
    # By hand: head 0 of 3 keeps 50 slots, two keep 4 + 7 and the means.
    spec = kv.make_spec(SPLIT, H, 50, RazorConfig.compact(7), "bfloat16")
    assert spec.kv_bytes(1) == 2 * H * (2 * (50 + 2 * 11) + 4 * 2)


def test_real_allocation_is_zeros():
    spec = kv.make_spec(SPLIT, H, 50, RazorConfig.compact(7), "bfloat16")
    cache = kv.init(spec, B)
    assert sum(x.nbytes for x in jax.tree.leaves(cache.layers)) == spec.kv_bytes(B)
    assert all(not np.asarray(x, np.float32).any() for x in jax.tree.leaves(cache))


def test_broadcast_and_growth_change_no_row():
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    windows = [3, 14, 1]
    cache, done = feed(start(windows, 4), k, v, [(CHUNK, [12, 10, 3])])
    before = bits(cache)
    grown = kv.broadcast(cache, B, CAPACITY + 30)
    assert grown.spec.kv_bytes(B) == kv.allocated_bytes(grown)
    one = jax.tree.map(lambda x: x[:1], cache)
    many = kv.broadcast(one, B, CAPACITY)
    for b in range(B):
        assert row_bits(many, b) == row_bits(cache, 0)
    assert bits(cache) == before
    np.testing.assert_array_equal(grown.length, done)
    lengths = np.array([12, 10, 1], np.int32)
    more = padded(k, done, lengths, CHUNK), padded(v, done, lengths, CHUNK)
    a, b = append(cache, *more, lengths), append(grown, *more, lengths)
    for x, y in zip(held(a), held(b), strict=True):
        np.testing.assert_array_equal(x[0], y[0][:, : x[0].shape[1]])
        if x[2] is not None:
            np.testing.assert_allclose(x[2], y[2], atol=1e-6)


def test_rollback_needs_only_the_windowed_groups():
    k, v = tokens(B, K, CAPACITY, H), tokens(B, K, CAPACITY, H, seed=1)
    windows = [3, 14, 1]
    saved, done = feed(start(windows, 4), k, v, [(CHUNK, [12, 10, 3])])
    further = append(saved, k[:, :, :CHUNK], v[:, :, :CHUNK], np.array([5, 12, 0], np.int32))
    back = kv.rollback(further, saved)
    lengths = np.array([9, 1, 12], np.int32)
    more = padded(k, done, lengths, CHUNK), padded(v, done, lengths, CHUNK)
    q = tokens(B, K, CHUNK * G, H)
    (out_a,), a = attend(saved, q, *more, lengths)
    (out_b,), b = attend(back, q, *more, lengths)
    valid = np.arange(CHUNK * G) // G < lengths[:, None]
    np.testing.assert_array_equal(np.asarray(out_a).swapaxes(1, 2)[valid], np.asarray(out_b).swapaxes(1, 2)[valid])
    for x, y in zip(held(a)[1:], held(b)[1:], strict=True):
        for p, r in zip(x, y, strict=True):
            np.testing.assert_array_equal(p, r)


@pytest.mark.usefixtures("unchecked")
def test_wrong_inputs_name_the_value():
    spec = functools.partial(kv.make_spec, SPLIT, H)
    with pytest.raises(ValueError, match=r"capacity=0.*at least 1"):
        spec(0, RazorConfig(), "float32")
    with pytest.raises(ValueError, match=r"capacity=-5"):
        spec(-5, None, "float32")
    with pytest.raises(ValueError, match=r"window=-1.*at least 1"):
        RazorConfig(window=-1)
    with pytest.raises(ValueError, match=r"window=0"):
        RazorConfig.compact(0)
    with pytest.raises(ValueError, match=r"sinks=-1.*at least 0"):
        RazorConfig(sinks=-1)
    with pytest.raises(ValueError, match=r"window=2\.5"):
        RazorConfig(window=2.5)
    with pytest.raises(ValueError, match=r"window_divisor=0"):
        RazorConfig(window_divisor=0)
    with pytest.raises(ValueError, match=r"kv_dtype='int7'.*bfloat16"):
        RazorConfig(kv_dtype="int7")


def test_spec_is_static_and_hashable():
    """Two equal specs share one compilation."""
    a, b = (kv.make_spec(SPLIT, H, 50, RazorConfig.compact(7), "bfloat16") for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert dataclasses.replace(a, capacity=51) != a
    assert jax.tree.structure(kv.init(a, 1)) == jax.tree.structure(kv.init(b, 1))
