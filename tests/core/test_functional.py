"""init_cache, extend and decode against a literal model, and what jit must and must not do with them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax import HeadSplit, Params, RazorConfig, compilation, functional
from razor_jax.params import abstract_weights

from ..support import oracle
from ..support.small import (
    ALL,
    CONFIG,
    NONE,
    RULE,
    SPLIT,
    B,
    T,
    decode,
    extend,
    layers,
    new_cache,
    params,
    text,
    weights,
)


def padded(tokens, done, lengths, T):
    """Each row's next tokens, right-padded with a token of their own."""
    out = np.full((len(lengths), T), 7, np.int32)
    for b, n in enumerate(lengths):
        out[b, :n] = tokens[b, done[b] : done[b] + n]
    return out


def feed(cache, tokens, calls, split=SPLIT):
    """Run calls (T, lengths); gives each row's logits of all its tokens [n, V], and the cache.

    What the cache has not yet written is NaN.
    """
    if not np.asarray(cache.length).any():
        cache = cache.replace(layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.layers))
    done, out = np.zeros(len(tokens), np.int32), [[] for _ in tokens]
    for width, lengths in calls:
        lengths = np.asarray(lengths, np.int32)
        logits, cache = extend(params(split), cache, padded(tokens, done, lengths, width), lengths, logits="all")
        for b, n in enumerate(lengths):
            out[b].append(np.asarray(logits[b, :n]))
        done += lengths
    return [np.concatenate(rows) for rows in out], cache


def held(cache, layer, b):
    """(k, v) of each KV head of a row in held order, valid slots only."""
    out = []
    for group in cache.layers[layer]:
        end = int(cache.length[b])
        if group.windowed:
            end = min(end, cache.spec.sinks + int(cache.window[b]))
        out += [(np.asarray(group.k[b, h, :end]), np.asarray(group.v[b, h, :end])) for h in range(group.k.shape[1])]
    return out


def bits(tree, b=None):
    return [np.asarray(x if b is None else x[b]).tobytes() for x in jax.tree.leaves(tree)]


# --- Against the literal model -------------------------------------------------------------------------

SCENARIOS = {
    "prefill and steps": [(T, [12, 5, 9])] + [(1, [1, 1, 0]), (1, [1, 0, 1]), (1, [1, 1, 1])] * 2,
    "streaming, ragged": [(T, [12, 5, 0]), (T, [7, 12, 3]), (T, [0, 12, 12])],
}


@pytest.mark.parametrize(
    ("scenario", "split", "dtype"),
    [
        ("prefill and steps", SPLIT, None),
        ("streaming, ragged", SPLIT, None),
        ("streaming, ragged", NONE, None),
        ("streaming, ragged", SPLIT, "bfloat16"),
    ],
)
def test_matches_the_literal_model(scenario, split, dtype):
    razor = RazorConfig(sinks=2, min_window=1, window_divisor=3, kv_dtype=dtype)
    tokens, windows = text(), [3, 10, 7]
    logits, cache = feed(new_cache(split, razor), tokens, SCENARIOS[scenario], split)
    np.testing.assert_array_equal(cache.window, windows)
    assert (np.asarray(cache.dropped) > 0).any()
    for b, window in enumerate(windows):
        table = [[None if h in split.retrieval[i] else window for h in range(2)] for i in range(2)]
        model = oracle.Model(weights(), CONFIG, table, 2, dtype=jnp.dtype(dtype or "float32"))
        want, done = [], 0
        for _, lengths in SCENARIOS[scenario]:
            want.append(model.extend(tokens[b, done : done + lengths[b]]))
            done += lengths[b]
        want = np.concatenate(want)
        # In bfloat16 a key on the edge of two values may round the other way than in the oracle.
        np.testing.assert_allclose(logits[b], want, atol=(2e-2 if dtype else 2e-5) * np.abs(want).max())
        for layer in range(2):
            for (k, v), h in zip(held(cache, layer, b), split.order(layer), strict=True):
                head = model.heads[layer][h]
                for token in head.first + head.recent:
                    for got, exact in ((k, token[1]), (v, token[2])):
                        np.testing.assert_allclose(
                            np.asarray(got[head.slot(token[0])], np.float64), exact, atol=0.06 if dtype else 2e-5
                        )


@pytest.mark.parametrize("case", ["all heads retrieval", "nothing dropped", "window past the capacity"])
def test_equals_dense(case):
    tokens, calls = text(), [(T, [12, 5, 0]), (T, [3, 10, 12]), (1, [1, 0, 1]), (1, [0, 1, 1])]
    split, razor, prompts, calls = {
        "all heads retrieval": (ALL, RULE, (3, 3, 3), calls[:2]),
        "nothing dropped": (SPLIT, RULE, (42, 42, 42), calls),  # 2 sinks and 14 more
        "window past the capacity": (SPLIT, RazorConfig(), (42, 42, 42), calls[:2]),
    }[case]
    want, _ = feed(new_cache(SPLIT, None), tokens, calls)
    got, cache = feed(new_cache(split, razor, prompts=prompts), tokens, calls, split)
    if split == SPLIT:
        np.testing.assert_array_equal(cache.dropped, 0)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_one_call_is_exact_whatever_is_dropped():
    """Attend first, then write: the whole prompt in one call sees all of itself."""
    tokens = text()
    got, cache = feed(new_cache(), tokens, [(T, [12, 5, 9])])
    assert (np.asarray(cache.dropped) > 0).any()
    want, _ = feed(new_cache(razor=None), tokens, [(T, [12, 5, 9])])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_one_call_of_T_is_not_T_decodes():
    """Same state in the first layer, other logits once something is dropped: a stated consequence."""
    tokens = text()
    one, a = feed(new_cache(), tokens, [(T, [12] * B), (T, [8] * B)])
    many, b = feed(new_cache(), tokens, [(T, [12] * B)] + [(1, [1] * B)] * 8)
    for row in range(B):
        for (k1, v1), (k2, v2) in zip(held(a, 0, row), held(b, 0, row), strict=True):
            np.testing.assert_allclose(k1, k2, atol=1e-5)
            np.testing.assert_allclose(v1, v2, atol=1e-5)
    np.testing.assert_array_equal(a.dropped, b.dropped)
    assert np.abs(one[0][12:] - many[0][12:]).max() > 1e-2  # window 3: much was dropped within the call
    dense = [feed(new_cache(razor=None), tokens, calls)[0] for calls in (
        [(T, [12] * B), (T, [8] * B)], [(T, [12] * B)] + [(1, [1] * B)] * 8
    )]  # fmt: skip
    np.testing.assert_allclose(dense[0][0], dense[1][0], atol=2e-5)


# --- Rows ----------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch():
    """With other mates, and alone in a larger cache: the same logits and the same state."""
    tokens, prompts = text(), [20, 9, 33]
    calls = [(T, [12, 5, 12]), (T, [8, 4, 12]), (T, [0, 1, 9]), (1, [1, 1, 1]), (1, [1, 1, 0])]
    together, cache = feed(new_cache(prompts=prompts), tokens, calls)
    for b in range(B):
        other = np.roll(tokens, 1, axis=0)
        other[0] = tokens[b]
        mates = [(T_, [n[b], n[2], n[0]]) for T_, n in calls]
        padded_steps = [(T, n[b : b + 1]) for _, n in calls]
        for got, state in (
            feed(new_cache(prompts=(prompts[b], 2, 42)), other, mates),
            feed(new_cache(prompts=(prompts[b],), capacity=60), tokens[b : b + 1], padded_steps),
        ):
            np.testing.assert_allclose(got[0], together[b], atol=2e-5)
            assert int(state.window[0]) == int(cache.window[b])
            for layer in range(2):
                for x, y in zip(held(state, layer, 0), held(cache, layer, b), strict=True):
                    np.testing.assert_allclose(x[0], y[0], atol=1e-5)
                    np.testing.assert_allclose(x[1], y[1], atol=1e-5)


def test_idle_and_overflowing_rows_are_bit_identical():
    tokens = text()
    _, cache = feed(new_cache(), tokens, [(T, [12, 5, 12]), (T, [12, 0, 12]), (T, [12, 0, 12])])
    before = cache
    logits, after = decode(params(), cache, tokens[:, 0], np.array([True, False, True]))
    assert bits(after, 1) == bits(before, 1)
    np.testing.assert_array_equal(logits[1], 0.0)
    logits, cache = extend(params(), before, tokens[:, :T], np.array([7, 12, 6], np.int32))
    np.testing.assert_array_equal(cache.overflow, [True, False, False])
    np.testing.assert_array_equal(cache.length, [36, 17, 42])
    np.testing.assert_array_equal(logits[0], 0.0)
    assert bits(cache.replace(overflow=before.overflow), 0) == bits(before, 0)
    # The others are as if it had not been there.
    want, other = extend(params(), before, tokens[:, :T], np.array([0, 12, 6], np.int32))
    np.testing.assert_array_equal(logits, want)
    assert bits(cache.replace(overflow=other.overflow)) == bits(other)


def test_first_call_sets_the_window():
    tokens = text()
    _, cache = feed(new_cache(prompts=None), tokens, [(T, [12, 3, 0]), (T, [0, 12, 9])])
    np.testing.assert_array_equal(cache.window, [4, 1, 3])


# --- The operations ------------------------------------------------------------------------------------


def test_decode_is_extend_by_one():
    tokens = text()
    _, cache = feed(new_cache(), tokens, [(T, [12, 5, 9])])
    token = tokens[:, 20]
    a, after_a = decode(params(), cache, token)
    b, after_b = extend(params(), cache, token[:, None], np.ones(B, np.int32), logits="all")
    c, after_c = decode(params(), cache, token, np.ones(B, bool))
    for other, after in ((b[:, 0], after_b), (c, after_c)):
        np.testing.assert_allclose(a, other, atol=1e-5)
        for x, y in zip(jax.tree.leaves(after_a), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-6)
    assert a.dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
def test_logits_all_last_none():
    tokens, lengths = text(T), np.array([12, 5, 0], np.int32)
    every, a = extend(params(), new_cache(), tokens, lengths, logits="all")
    last, b = extend(params(), new_cache(), tokens, lengths)
    assert every.shape == (B, T, CONFIG.vocab_size)
    assert last.shape == (B, CONFIG.vocab_size)
    assert every.dtype == last.dtype == jnp.float32
    assert np.isfinite(every).all()
    np.testing.assert_allclose(last[0], every[0, 11], atol=1e-5)
    np.testing.assert_allclose(last[1], every[1, 4], atol=1e-5)
    np.testing.assert_array_equal(last[2], 0.0)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-6)
    none, c = jax.eval_shape(lambda *x: functional.extend(*x, logits="none"), params(), a, tokens, lengths)
    assert none is None
    assert jax.tree.map(jnp.shape, c) == jax.tree.map(jnp.shape, a)


@pytest.mark.parametrize("razor", [None, RULE], ids=["dense", "razor"])
def test_long_calls_go_layer_by_layer(razor, monkeypatch):
    """The chunked path equals the plain one, T not a multiple of the chunk, ragged, on a cache in use."""
    tokens, done, lengths = text(), np.array([12, 0, 4], np.int32), np.array([12, 9, 0], np.int32)
    want, plain = feed(new_cache(razor=razor), tokens, [(T, done), (T, lengths)])
    _, cache = feed(new_cache(razor=razor), tokens, [(T, done)])
    args = params(), cache, padded(tokens, done, lengths, T), lengths
    monkeypatch.setattr(functional, "CHUNK", 5)
    chunked = jax.jit(lambda *a, logits: functional.extend(*a, logits=logits), static_argnames="logits")
    logits, after = chunked(*args, logits="all")
    assert logits.shape == (B, T, CONFIG.vocab_size)
    assert np.isfinite(logits).all()
    for b in range(2):
        np.testing.assert_allclose(logits[b, : lengths[b]], want[b][done[b] :], atol=2e-5)
    assert bits(after, 2) == bits(cache, 2)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-5)
    if razor is None:  # equals several smaller calls, too
        parts, _ = feed(new_cache(razor=None), tokens, [(T, done), (T, [3, 8, 0]), (T, [9, 1, 0])])
        for b in range(2):
            np.testing.assert_allclose(logits[b, : lengths[b]], parts[b][done[b] :], atol=2e-5)
    else:
        last, _ = chunked(*args, logits="last")
        np.testing.assert_allclose(last[0], logits[0, 11], atol=2e-5)
        np.testing.assert_allclose(last[1], logits[1, 8], atol=2e-5)
        np.testing.assert_array_equal(last[2], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("razor", [None, RazorConfig.compact(100)], ids=["dense", "razor"])
def test_long_calls_at_the_real_chunk(razor):
    """600 tokens in one call = dense in calls of 200, from a cache in use."""
    tokens = text(700, 2)
    _, cache = feed(new_cache(razor=razor, capacity=700, prompts=(700, 700)), tokens, [(200, [50, 0])])
    lengths = np.array([600, 513], np.int32)
    logits, after = extend(params(), cache, padded(tokens, np.array([50, 0]), lengths, 600), lengths, logits="all")
    calls = [(200, [50, 0]), (200, [200, 200]), (200, [200, 200]), (200, [200, 113])]
    want, dense = feed(new_cache(razor=None, capacity=700, prompts=(700, 700)), tokens, calls)
    np.testing.assert_array_equal(after.length, dense.length)
    for b, done in enumerate((50, 0)):
        np.testing.assert_allclose(logits[b, : lengths[b]], want[b][done:], atol=5e-5)


# --- jit: compilations, donation, memory, devices ------------------------------------------------------


def test_other_lengths_and_windows_compile_nothing():
    tokens = text()

    def session(prompts, lengths):
        cache = new_cache(prompts=prompts)
        for _ in range(2):  # a new cache, then one that came out of a call
            logits, cache = extend(params(), cache, tokens[:, :T], np.asarray(lengths, np.int32), logits="all")
        for token in tokens.T[:2]:
            logits, cache = decode(params(), cache, token)
        jax.block_until_ready(logits)

    session((9, 30, 21), (12, 5, 9))
    programs = compilation.totals()[0]
    session((40, 2, 10), (1, 12, 0))
    assert compilation.totals()[0] == programs
    jax.jit(lambda x: x + programs)(tokens)  # and the count does count
    assert compilation.totals()[0] == programs + 1


def pointers(cache):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]


@pytest.mark.parametrize(("T", "prompts"), [(1, None), (T, (9, 30, 21))])
def test_donated_cache_is_updated_in_place(T, prompts):
    step = jax.jit(functional.extend, donate_argnums=1)
    cache = new_cache(prompts=prompts)
    before = pointers(cache)
    assert len(set(before)) == len(before)
    for _ in range(2):
        _, cache = step(params(), cache, text(T), np.full(B, T, np.int32))
        assert pointers(cache) == before


def analysis(config, razor, T, capacity, batch=1):
    """Memory of a compiled, donated extend, nothing allocated; and the bytes of the cache."""
    split = HeadSplit(((0,),) * config.num_layers, config.num_kv_heads)
    given = Params(abstract_weights(config), config, split)
    cache = jax.eval_shape(lambda: functional.init_cache(given, batch=batch, capacity=capacity, razor=razor))
    args = (jax.ShapeDtypeStruct((batch, T), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32))
    compiled = jax.jit(functional.extend, donate_argnums=1).lower(given, cache, *args).compile()
    return compiled.memory_analysis(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def growth(few, many, razor, T=2048):
    """Temporaries per added layer, as a share of one layer's K/V."""
    temps = [analysis(layers(n), razor, T, T)[0].temp_size_in_bytes for n in (few, many)]
    return (temps[1] - temps[0]) / (many - few) / (2 * 2 * T * 32 * 4)


@pytest.mark.usefixtures("unchecked")
def test_prefill_temporaries_do_not_grow_with_layers():
    assert growth(2, 4, RazorConfig.compact(128)) < 0.10


@pytest.mark.slow
@pytest.mark.parametrize("razor", [None, RazorConfig.compact(128)], ids=["dense", "razor"])
@pytest.mark.usefixtures("unchecked")
def test_prefill_temporaries_of_16_layers(razor):
    assert growth(4, 16, razor) < 0.10


@pytest.mark.parametrize("razor", [None, RazorConfig.compact(512)], ids=["dense", "razor"])
@pytest.mark.usefixtures("unchecked")
def test_decode_keeps_no_second_cache(razor):
    """In place, and with temporaries of about one block of slots: a fraction of one layer's cache."""
    memory, cache_bytes = analysis(layers(1), razor, 1, 32768)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < 0.2 * cache_bytes


DEVICES = """
    import dataclasses, jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from razor_jax import HeadSplit, Params, functional, with_heads
    from tests.core import test_functional as t

    assert jax.device_count() == 4
    D, T = 4, t.T
    config = dataclasses.replace(t.CONFIG, num_layers=1)
    params = with_heads(Params.from_flax(t.weights(config), config), HeadSplit(((1,),), 2))
    tokens = t.text(40, 2 * D)
    lengths, prompts = np.array([12, 5, 0, 9, 12, 12, 1, 3], np.int32), np.arange(3, 43, 5, dtype=np.int32)
    whole = functional.init_cache(params, batch=2 * D, capacity=40, razor=t.RULE, prompt_lengths=prompts)

    def session(extend, decode, params, cache, split):
        out = []
        logits, cache = jax.block_until_ready(extend(params, cache, split(tokens[:, :T]), split(lengths)))
        out.append(logits)
        for i in range(3):  # one step at a time: queued launches can deadlock on few cores
            logits, cache = jax.block_until_ready(decode(params, cache, split(tokens[:, T + i])))
            out.append(logits)
        return jax.tree.map(np.asarray, (out, cache))

    def same(got):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a.reshape(b.shape).astype(np.float32), b.astype(np.float32), atol=2e-5)

    want = session(t.extend, t.decode, params, whole, np.asarray)
    assert (want[1].dropped > 0).any()

    fold = lambda x: np.asarray(x).reshape(D, 2, *x.shape[1:])
    mapped = jax.pmap(functional.extend, in_axes=(None, 0, 0, 0)), jax.pmap(functional.decode, in_axes=(None, 0, 0))
    same(session(*mapped, params, jax.tree.map(fold, whole), fold))

    mesh = jax.make_mesh((D,), ("data",), (AxisType.Auto,))
    rows = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    same(session(t.extend, t.decode, everywhere, jax.tree.map(rows, whole), rows))
    print("equal")
"""


def test_pmap_and_a_sharded_batch_equal_one_device():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = textwrap.dedent(DEVICES)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-4000:]
