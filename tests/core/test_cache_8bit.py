"""8-bit caches: what they hold, what attention makes of it, and what they cost in bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig
from razor_jax import cache as kv
from razor_jax.attention import attend_and_write
from razor_jax.kernels import attention
from razor_jax.kernels.cache_write import dequantize, quantize

from ..support import oracle

B, K, G, H = 2, 3, 2, 16
SPLIT = HeadSplit(((0,),), K)  # head 0 keeps everything
NAN = np.float32(np.nan)
LIMIT = 2e-6  # float32 queries: nothing is rounded but the cache itself

TYPES = ("int8", "fp8")


def tokens(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


class Rounded(oracle.Head):
    """A naive head that holds what its type makes of a token, in float64."""

    def __init__(self, kind: str | None, window: int | None):
        super().__init__(2, window, dtype=np.float64)
        self.kind = kind

    def push(self, key, value) -> None:
        super().push(*(self.rounded(np.float32(x)) for x in (key, value)))

    def rounded(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "int8":
            scale = np.abs(x).max() / np.float32(127)
            return np.float64(np.round(x / scale)) * np.float64(scale)
        return x.astype(jnp.float8_e4m3fn).astype(np.float64) if self.kind == "fp8" else np.float64(x)


@functools.partial(jax.jit, static_argnames="razor")
def run(q, k, v, lengths, razor):
    """Every call's attention and the cache in the end; a call is one of the leading axis."""
    cache = kv.init(kv.make_spec(SPLIT, H, 40, razor, "float32"), B)
    # What was never written must never be read.
    cache = cache.replace(
        layers=jax.tree.map(lambda x: x if x.dtype == jnp.int8 else jnp.full_like(x, NAN), cache.layers)
    )
    outs = []
    for i in range(q.shape[0]):
        call, after = kv.begin(cache, lengths[i], k.shape[3])
        out, layer = attend_and_write(q[i], k[i], v[i], cache.layers[0], call)
        cache = after.replace(layers=(layer,))
        outs.append(out)
    return outs, cache


@pytest.mark.parametrize("kinds", [("int8", None), ("fp8", None), ("int8", "fp8"), (None, "int8")])
def test_calls_see_the_rounded_cache_and_their_own_tokens_unrounded(kinds):
    """Against naive lists of what the types hold, float64."""
    kv_dtype, windowed = kinds
    razor = RazorConfig(sinks=2, window=5, kv_dtype=kv_dtype, windowed_kv_dtype=windowed)
    T = 6
    lengths = np.array([[6, 3], [5, 6], [1, 0], [6, 6]], np.int32)
    calls = len(lengths)
    q, k, v = tokens(calls, B, K, T * G, H), tokens(calls, B, K, T, H, seed=1), tokens(calls, B, K, T, H, seed=2)
    outs, cache = run(q, k, v, lengths, razor)
    assert (np.asarray(cache.dropped) > 0).any()
    worst = 0.0
    for b in range(B):
        for h in range(K):
            head = Rounded(kv_dtype if h == 0 else windowed or kv_dtype, None if h == 0 else 5)
            for i in range(calls):
                n = lengths[i, b]
                if n:
                    want = head.call(q[i, b, h, : n * G].reshape(n, G, H), k[i, b, h, :n], v[i, b, h, :n])
                    got = np.asarray(outs[i][b, h, : n * G], np.float64).reshape(n, G, H)
                    worst = max(worst, np.max(np.abs(got - want)) / np.max(np.abs(want)))
    assert worst <= LIMIT


def test_quantize_keeps_its_error_and_takes_zeros():
    x = tokens(2, 3, 5, H) * 10
    x[0, 0, 0] = 0
    stored, scale = quantize(jnp.asarray(x), jnp.dtype("int8"))
    assert stored.dtype == jnp.int8
    assert scale.shape == (2, 3, 1, 5)
    error = np.abs(np.asarray(dequantize(stored, scale)) - x)
    assert (error <= np.abs(x).max(-1, keepdims=True) / 127 * 0.5001).all()
    # e4m3 has 3 bits of mantissa, and nothing beyond 448 becomes NaN.
    stored, scale = quantize(jnp.asarray([[[[448.0, 1e6, -1e6, 1.0625]]]]), jnp.dtype("float8_e4m3fn"))
    assert scale is None
    np.testing.assert_array_equal(np.asarray(dequantize(stored, scale))[0, 0, 0], [448, 448, -448, 1.0])


@pytest.mark.parametrize("kv_dtype", TYPES)
@pytest.mark.parametrize("windowed", [None, "bfloat16", "int8"])
def test_predicted_bytes_are_allocated(kv_dtype, windowed):
    razor = RazorConfig.compact(7, kv_dtype=kv_dtype, windowed_kv_dtype=windowed)
    spec = kv.make_spec(SPLIT, H, 50, razor, "bfloat16")
    cache = kv.init(spec, B)
    assert spec.kv_bytes(B) == kv.allocated_bytes(cache) == sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    token = {"int8": H + 4, "fp8": H, "bfloat16": 2 * H}
    by_hand = 2 * (50 * token[kv_dtype] + 2 * (11 * token[windowed or kv_dtype] + 4 * H))
    assert spec.kv_bytes(1) == by_hand


def test_growing_and_rolling_back_take_the_scales_along():
    razor = RazorConfig(sinks=2, window=5, kv_dtype="int8")
    cache = kv.init(kv.make_spec(SPLIT, H, 40, razor, "float32"), 1)
    k = jnp.asarray(tokens(1, K, 12, H))
    call, after = kv.begin(cache, jnp.asarray([12]), 12)
    cache = after.replace(layers=(kv.write(cache.layers[0], k, k, call),))
    grown = kv.broadcast(cache, 2, 60)
    for old, new in zip(cache.layers[0], grown.layers[0], strict=True):
        slots = old.k.shape[2]
        assert new.k_scale.shape == (2, old.k.shape[1], 1, new.k.shape[2])
        np.testing.assert_array_equal(new.k_scale[1, :, :, :slots], old.k_scale[0])
        np.testing.assert_array_equal(new.v[0, :, :slots], old.v[0])


@functools.cache
def answer(razor):
    prompt = np.random.default_rng(3).integers(10, 4000, 700)
    return razor_jax.generate(razor_jax.load("razor-mini"), prompt, max_new_tokens=8, razor=razor)


@pytest.mark.parametrize("kv_dtype", TYPES)
def test_razor_mini_answers_from_an_8_bit_cache(kv_dtype):
    """The shipped model generates from a compressed cache, in fewer bytes than one in bfloat16 has."""
    dense, small = answer(None), answer(RazorConfig.compact(128, kv_dtype=kv_dtype))
    assert small.kv.engaged
    assert small.kv.dtype == ("int8" if kv_dtype == "int8" else "float8_e4m3fn")
    plain = answer(RazorConfig.compact(128, kv_dtype="bfloat16"))
    assert 1.7 * small.kv.allocated_bytes < plain.kv.allocated_bytes
    # Each is compared with a dense cache of its own type: compression is not counted twice.
    assert small.kv.ratio == pytest.approx(plain.kv.ratio, rel=0.05)
    assert len(dense.tokens) == len(small.tokens)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_pages_are_the_slots_that_they_name(kind):
    """The XLA reference: a shuffled pool, NaN where no row holds anything, garbage in entries past the last page."""
    page, lengths = 4, np.array([9, 4], np.int32)
    table = np.array([[5, 0, 3], [2, -9, 99]], np.int32)
    k, v = tokens(2, K, 12, H), tokens(2, K, 12, H, seed=1)
    held = [quantize(jnp.asarray(x), jnp.dtype(kind)) for x in (k, v)]
    q = jnp.asarray(tokens(2, K, G, H, seed=2))
    want = attention.attend(
        q, held[0][0], held[1][0], jnp.asarray(lengths), scale=0.3, k_scale=held[0][1], v_scale=held[1][1]
    )

    def pool(x, axis):
        """[6 pages, K, page, H] (scales [6, K, 1, page]) out of x, NaN where no row holds anything."""
        if x is None:
            return None
        x = np.asarray(x)
        shape = [6, *x.shape[1:]]
        shape[axis] = page
        out = np.full(shape, 77 if x.dtype == np.int8 else NAN, x.dtype)
        for b, length in enumerate(lengths):
            for i in range(-(-length // page)):
                out[table[b, i]] = np.take(x[b], range(i * page, (i + 1) * page), axis=axis - 1)
                at = [slice(None)] * (x.ndim - 1)
                at[axis - 1] = slice(max(length - i * page, 0), None)
                out[(table[b, i], *at)] = 77 if x.dtype == np.int8 else NAN
        return jnp.asarray(out)

    got = attention.attend(
        q,
        pool(held[0][0], 2),
        pool(held[1][0], 2),
        jnp.asarray(lengths),
        scale=0.3,
        k_scale=pool(held[0][1], 3),
        v_scale=pool(held[1][1], 3),
        block_table=jnp.asarray(table),
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_float16_queries_over_int8_values_that_are_small():
    """Weights times scales of small values are below what float16 holds."""
    k, v = tokens(1, 1, 4096, 64), 1e-3 * tokens(1, 1, 4096, 64, seed=1)
    (k, k_scale), (v, v_scale) = (quantize(jnp.asarray(x), jnp.dtype("int8")) for x in (k, v))
    q, lengths = jnp.asarray(tokens(1, 1, 2, 64, seed=2), jnp.float16), jnp.asarray([4096])
    got = attention.attend(q, k, v, lengths, scale=0.1, k_scale=k_scale, v_scale=v_scale)
    keys, values = (np.asarray(dequantize(*x), np.float64)[0, 0] for x in ((k, k_scale), (v, v_scale)))
    p = np.exp(0.1 * np.asarray(q, np.float64)[0, 0] @ keys.T)
    want = p @ values / p.sum(1, keepdims=True)
    assert np.max(np.abs(np.asarray(got[0, 0], np.float64) - want)) / np.max(np.abs(want)) <= 8e-3


@pytest.mark.usefixtures("unchecked")
def test_wrong_inputs_name_the_argument():
    q, k = jnp.zeros((1, 2, 4, H)), jnp.zeros((1, 2, 8, H))
    lengths, eight, scales = jnp.zeros((1,), jnp.int32), jnp.zeros((1, 2, 8, H), jnp.int8), jnp.zeros((1, 2, 1, 8))
    call = functools.partial(attention.attend, scale=1.0)
    for message, run in {
        r"k float32\[1, 2, 8, 16\] and v float32\[1, 2, 7, 16\] must agree": lambda: call(q, k, k[:, :, :7], lengths),
        r"must be \[B, K, S, H\] with q's B, K, H = 1, 2, 16": lambda: call(q, k[:, :1], k[:, :1], lengths),
        r"lengths \[2\] must be \[B\]": lambda: call(q, k, k, jnp.zeros((2,), jnp.int32)),
        "k_scale is missing for a cache of type int8": lambda: call(q, eight, eight, lengths),
        "k_scale is given for a cache of type float32": lambda: call(q, k, k, lengths, k_scale=scales, v_scale=scales),
        r"v_scale is float32\[1, 2, 1, 7\], must be float32\[1, 2, 1, 8\]": lambda: call(
            q, eight, eight, lengths, k_scale=scales, v_scale=scales[..., :7]
        ),
        r"block_table is int32\[2, 3\], must be int32 \[B, pages\]": lambda: call(
            q, k, k, lengths, block_table=jnp.zeros((2, 3), jnp.int32)
        ),
        r"block_table names pages 0 to 3, the pool has pages 0 to 2": lambda: call(
            q, *[jnp.zeros((3, 2, 4, H))] * 2, lengths + 8, block_table=jnp.asarray([[0, 3, -7]])
        ),
        r"state's m is float32\[1, 2, 3\], must be float32\[1, 2, 4\]": lambda: call(
            q, k, k, lengths, state=(q, jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4)))
        ),
        "implementation='pallas_tpu' cannot run here: the device is a cpu": lambda: call(
            q, k, k, lengths, implementation="pallas_tpu"
        ),
        "implementation='cuda' is unknown: use one of xla, pallas_tpu": lambda: call(
            q, k, k, lengths, implementation="cuda"
        ),
        "4 rows per KV head: must be a multiple of group_size=3": lambda: attention.attend_causal(
            q, k, k, lengths, start=0, group_size=3, scale=1.0
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            run()
    for name in ("kv_dtype", "windowed_kv_dtype"):
        with pytest.raises(ValueError, match=rf"^{name}='int4': use one of float32, .*int8, fp8"):
            RazorConfig(**{name: "int4"})
