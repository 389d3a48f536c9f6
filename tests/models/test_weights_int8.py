"""int8 kernels: their distance from the floats, in a whole model, and on disk."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax import HeadSplit, Params, functional, with_heads
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.checkpoint import hub
from razor_jax.heads import alibi, store
from razor_jax.models.linear import Linear, dequantize, is_kernel, quantize, quantize_tree, scale_of
from razor_jax.params import abstract_weights, architecture_fingerprint, weights_fingerprint

from ..support import baichuan, hf
from ..support.small import CONFIG, weights

SPLIT = HeadSplit(((1,), ()), 2)


def _floats(params: Params) -> Params:
    """The same model with its int8 kernels as float32."""
    tree = jax.tree.map(lambda x: x, params.weights)
    for maps in tree.values():
        for name, linear in list(maps.items()):
            if isinstance(linear, dict) and "scale" in linear and "kernel" in linear:
                maps[name] = {"kernel": dequantize(linear)} | {k: x for k, x in linear.items() if k == "bias"}
        if "scale" in maps and "kernel" in maps:
            maps["kernel"] = dequantize(maps)
            del maps["scale"]
    return params.replace(weights=tree, origin=None)


def _logits(params: Params, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V], dense."""
    cache = functional.init_cache(params, batch=len(tokens), capacity=tokens.shape[1], razor=None)
    lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    out, _ = jax.jit(functional.extend, static_argnums=4)(params, cache, tokens, lengths, "all")
    return np.asarray(out)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "baichuan"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "baichuan":
        baichuan.write(path, 4)
        return path
    return hf.write(path, request.param, tie_word_embeddings=request.param == "qwen3")


TOKENS = np.random.default_rng(0).integers(0, 101, (2, 24), np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["q", "o"])
def test_a_channel_is_within_half_a_step(name, dtype):
    shape, contracted = ((8, 2, 3, 4), (0,)) if name == "q" else ((2, 3, 4, 8), (0, 1, 2))
    kernel = np.random.default_rng(1).normal(size=shape).astype(dtype)
    kernel[..., 0] = 0
    q, scale = quantize(f"blocks_0/{name}/kernel", jnp.asarray(kernel))
    assert (q.dtype, scale.dtype) == (jnp.int8, jnp.float32)
    wide = kernel.astype(np.float32)
    step = np.abs(wide).max(axis=contracted) / 127
    np.testing.assert_allclose(scale[step > 0], step[step > 0], rtol=1e-6)
    error = np.abs(np.asarray(dequantize({"kernel": q, "scale": scale})) - wide)
    assert (error <= 0.5001 * step).all()
    assert (np.asarray(q)[..., 0] == 0).all()
    assert (np.abs(np.asarray(q)).max(axis=contracted) == 127)[step > 0].all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_matmul_dequantises(dtype, tolerance):
    """float16 too, although a sum of products with int8 exceeds its largest number."""
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(4096, 5)).astype(np.float32), rng.normal(size=5).astype(dtype)
    kernel[:, 0] = np.abs(kernel[:, 0])
    x = np.abs(rng.normal(size=(3, 4096))).astype(dtype)
    q, scale = quantize("gate/kernel", jnp.asarray(kernel))
    linear = Linear(kernel.shape, "bd,df->bf", use_bias=True)
    y = linear.apply({"params": {"kernel": q, "scale": scale, "bias": bias}}, jnp.asarray(x))
    assert y.dtype == dtype
    want = x.astype(np.float64) @ np.asarray(dequantize({"kernel": q, "scale": scale}), np.float64) + bias
    assert np.abs(x.astype(np.float64) @ np.asarray(q, np.float64)).max() > 65504
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_logits_are_those_of_the_dequantised_model(folder, record_property):
    """They are also close to those of the floats."""
    params = checkpoint.read(folder, weights="int8")
    got, floats = _logits(params, TOKENS), _logits(checkpoint.read(folder), TOKENS)
    np.testing.assert_allclose(got, _logits(_floats(params), TOKENS), atol=2e-5 * np.abs(got).max(), rtol=0)
    error = np.abs(got - floats).max() / np.abs(floats).max()
    record_property("int8 weights: largest logit error on random models, share of the largest logit", float(error))
    assert 0 < error < 0.1


def test_heads_move_with_their_scales(folder):
    if folder.name.startswith("baichuan"):
        split = HeadSplit(((3,), (0, 2)), 4, scopes=((9, 5, 7, 0), (0, 6, 0, 8)))
    else:
        split = SPLIT
    params = checkpoint.read(folder, weights="int8")
    moved = with_heads(params, split)
    want = _logits(params, TOKENS)
    np.testing.assert_allclose(_logits(moved, TOKENS), want, atol=2e-5 * np.abs(want).max(), rtol=0)
    read = checkpoint.read(folder, weights="int8", split=split)
    for one, other, back, want in zip(
        *map(jax.tree.leaves, (moved.weights, read.weights, with_heads(moved, None).weights, params.weights)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(back, want)


def test_a_split_found_on_the_floats_does_not_warn(folder):
    floats, params = checkpoint.read(folder), checkpoint.read(folder, "bfloat16", weights="int8")
    assert params.int8
    assert not floats.int8
    assert params.dtype == jnp.bfloat16
    assert weights_fingerprint(params) == weights_fingerprint(floats) == weights_fingerprint(with_heads(params, None))


def test_load_takes_a_razor_json_of_the_floats(tmp_path):
    hf.write(tmp_path, "llama")
    floats = checkpoint.read(tmp_path)
    prints = {"architecture": architecture_fingerprint(floats.config), "weights": weights_fingerprint(floats)}
    store.write(tmp_path, HeadSplit(((1,), ()), 2, **prints))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = hub.load(tmp_path, weights="int8")
    assert params.int8
    assert params.heads_or_all.retrieval == ((1,), ())


@pytest.mark.usefixtures("unchecked")
def test_another_type_of_weights_is_refused(folder):
    with pytest.raises(ValueError, match=r"weights='int4': use 'int8'"):
        checkpoint.read(folder, weights="int4")  # type: ignore[arg-type]


def test_embeddings_and_norms_stay_and_bytes_are_counted(folder):
    params = checkpoint.read(folder, "bfloat16", weights="int8")
    shapes = abstract_weights(params.config, jnp.bfloat16, "int8")
    for (path, x), want in zip(
        jax.tree_util.tree_leaves_with_path(params.weights), jax.tree.leaves(shapes), strict=True
    ):
        assert (x.shape, x.dtype) == (want.shape, want.dtype), path
    kinds = {x.dtype for x in jax.tree.leaves(params.weights)}
    assert kinds == {jnp.dtype("int8"), jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert params.weights["embedding"]["embedding"].dtype == jnp.bfloat16


def test_theorem_1_reads_int8_weights(tmp_path):
    baichuan.write(tmp_path, 4)
    params = checkpoint.read(tmp_path, weights="int8")
    np.testing.assert_allclose(alibi.logit_bound(params), alibi.logit_bound(_floats(params)), rtol=1e-5)


# In and out


def test_orbax_round_trip_is_exact(folder, tmp_path):
    params = checkpoint.read(folder, "bfloat16", weights="int8")
    checkpoint.save(params, tmp_path / "int8", "orbax")
    for asked in (None, "int8"):
        again = checkpoint.read(tmp_path / "int8", weights=asked)
        assert again.origin == params.origin
        for one, other in zip(jax.tree.leaves(again.weights), jax.tree.leaves(params.weights), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_floats_saved_by_orbax_load_as_int8(folder, tmp_path):
    checkpoint.save(checkpoint.read(folder), tmp_path / "floats", "orbax")
    split = SPLIT if not folder.name.startswith("baichuan") else None
    again = checkpoint.read(tmp_path / "floats", weights="int8", split=split)
    want = checkpoint.read(folder, weights="int8", split=split)
    assert (again.origin, again.heads) == (want.origin, split)
    for one, other in zip(jax.tree.leaves(again.weights), jax.tree.leaves(want.weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_hugging_face_has_no_int8(folder, tmp_path):
    with pytest.raises(ValueError, match=r"int8.*save with format='orbax'"):
        checkpoint.save(checkpoint.read(folder, weights="int8"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_from_flax_takes_int8_and_says_what_is_wrong_with_it():
    tree = quantize_tree(weights())
    params = Params.from_flax({"params": tree}, CONFIG)
    assert params.int8
    assert weights_fingerprint(params) == weights_fingerprint(params)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    assert sum(is_kernel(jax.tree_util.keystr(path, simple=True, separator="/")) for path, _ in flat) == 7 * 2 + 1
    assert scale_of("blocks_0/q/kernel") == "blocks_0/q/scale"
    tree["blocks_0"]["q"]["kernel"] = tree["blocks_0"]["q"]["kernel"].astype(jnp.float32)
    del tree["blocks_1"]["down"]["scale"]
    with pytest.raises(ValueError, match=r"(?s)missing blocks_1/down/scale.*q/kernel has type float32, expected int8"):
        Params.from_flax({"params": tree}, CONFIG)
