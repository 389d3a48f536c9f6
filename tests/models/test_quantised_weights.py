"""int8 and int4 kernels: their distance from the floats, in a whole model, and on disk."""

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
from ..support.small import CONFIG, layers, weights

SPLIT = HeadSplit(((1,), ()), 2)


def _floats(params: Params) -> Params:
    """The same model with its quantised kernels as float32."""

    def widen(node):
        if "kernel" not in node:
            return {name: widen(x) if isinstance(x, dict) else x for name, x in node.items()}
        return {"kernel": dequantize(node)} | {name: x for name, x in node.items() if name == "bias"}

    return params.replace(weights=widen(params.weights), origin=None)


def _logits(params: Params, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V], dense."""
    cache = functional.init_cache(params, batch=len(tokens), capacity=tokens.shape[1], razor=None)
    lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    out, _ = jax.jit(functional.extend, static_argnums=4)(params, cache, tokens, lengths, "all")
    return np.asarray(out)


# With biases, tied embeddings, and one tensor for q, k and v. llama has nothing of its own, qwen3 is tied in int4 too.
CASES = [
    *((name, "int8") for name in ("qwen2", "baichuan")),
    *((name, "int4") for name in ("qwen2", "qwen3")),
    *(pytest.param((name, "int8"), marks=pytest.mark.slow) for name in ("llama", "qwen3")),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A folder of floats, and the type to load it in."""
    name, kind = request.param
    path = tmp_path_factory.mktemp(name)
    if name == "baichuan":
        baichuan.write(path, 4)
    else:
        hf.write(path, name, tie_word_embeddings=name == "qwen3", head_dim=32 if kind == "int4" else 16)
    return path, kind


@pytest.fixture
def folder(case):
    return case[0]


@pytest.fixture
def kind(case):
    return case[1]


TOKENS = np.random.default_rng(0).integers(0, 101, (2, 24), np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["q", "o"])
def test_a_channel_is_within_half_a_step(name, dtype):
    shape, contracted = ((8, 2, 3, 4), (0,)) if name == "q" else ((2, 3, 4, 8), (0, 1, 2))
    kernel = np.random.default_rng(1).normal(size=shape).astype(dtype)
    kernel[..., 0] = 0
    q, scale = quantize(f"blocks_0/{name}/kernel", jnp.asarray(kernel), "int8").values()
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
    q, scale = quantize("gate/kernel", jnp.asarray(kernel), "int8").values()
    linear = Linear(kernel.shape, "bd,df->bf", use_bias=True)
    y = linear.apply({"params": {"kernel": q, "scale": scale, "bias": bias}}, jnp.asarray(x))
    assert y.dtype == dtype
    want = x.astype(np.float64) @ np.asarray(dequantize({"kernel": q, "scale": scale}), np.float64) + bias
    assert np.abs(x.astype(np.float64) @ np.asarray(q, np.float64)).max() > 65504
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_logits_are_those_of_the_dequantised_model(folder, kind, record_property):
    """They are also close to those of the floats."""
    params = checkpoint.read(folder, weights=kind)
    got, floats = _logits(params, TOKENS), _logits(checkpoint.read(folder), TOKENS)
    np.testing.assert_allclose(got, _logits(_floats(params), TOKENS), atol=2e-5 * np.abs(got).max(), rtol=0)
    error = np.linalg.norm(got - floats) / np.linalg.norm(floats)
    record_property(f"{kind} weights: logit error on random models, share of the logits", float(error))
    assert 0 < error < (0.05 if kind == "int8" else 0.5)


def test_heads_move_with_their_scales(folder, kind):
    if folder.name.startswith("baichuan"):
        split = HeadSplit(((3,), (0, 2)), 4, scopes=((9, 5, 7, 0), (0, 6, 0, 8)))
    else:
        split = SPLIT
    params = checkpoint.read(folder, weights=kind)
    moved = with_heads(params, split)
    want = _logits(params, TOKENS)
    np.testing.assert_allclose(_logits(moved, TOKENS), want, atol=2e-5 * np.abs(want).max(), rtol=0)
    read = checkpoint.read(folder, weights=kind, split=split)
    for one, other, back, want in zip(
        *map(jax.tree.leaves, (moved.weights, read.weights, with_heads(moved, None).weights, params.weights)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(back, want)


def test_a_split_found_on_the_floats_does_not_warn(folder, kind):
    floats, params = checkpoint.read(folder), checkpoint.read(folder, "bfloat16", weights=kind)
    assert (params.kernel_type, floats.kernel_type) == (kind, None)
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
    assert params.kernel_type == "int8"
    assert params.heads_or_all.retrieval == ((1,), ())


@pytest.mark.usefixtures("unchecked")
def test_another_type_of_weights_is_refused(folder):
    with pytest.raises(ValueError, match=r"weights='int3': use 'int8' or 'int4', or None"):
        checkpoint.read(folder, weights="int3")  # type: ignore[arg-type]


def test_embeddings_and_norms_stay_and_bytes_are_counted(folder, kind):
    params = checkpoint.read(folder, "bfloat16", weights=kind)
    shapes = abstract_weights(params.config, jnp.bfloat16, kind)
    for (path, x), want in zip(
        jax.tree_util.tree_leaves_with_path(params.weights), jax.tree.leaves(shapes), strict=True
    ):
        assert (x.shape, x.dtype) == (want.shape, want.dtype), path
    kinds = {x.dtype for x in jax.tree.leaves(params.weights)}
    head = {"int8", "float32"} if kind == "int8" or not params.config.tie_embeddings else set()
    assert {each.name for each in kinds} == {kind, "bfloat16"} | head
    assert params.weights["embedding"]["embedding"].dtype == jnp.bfloat16


def test_theorem_1_reads_int8_weights(tmp_path):
    baichuan.write(tmp_path, 4)
    params = checkpoint.read(tmp_path, weights="int8")
    np.testing.assert_allclose(alibi.logit_bound(params), alibi.logit_bound(_floats(params)), rtol=1e-5)


# In and out


def test_orbax_round_trip_is_exact(folder, kind, tmp_path):
    params = checkpoint.read(folder, "bfloat16", weights=kind)
    checkpoint.save(params, tmp_path / "out", "orbax")
    for asked in (None, kind):
        again = checkpoint.read(tmp_path / "out", weights=asked)
        assert again.origin == params.origin
        for one, other in zip(jax.tree.leaves(again.weights), jax.tree.leaves(params.weights), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_floats_saved_by_orbax_load_quantised(folder, kind, tmp_path):
    checkpoint.save(checkpoint.read(folder), tmp_path / "floats", "orbax")
    split = SPLIT if not folder.name.startswith("baichuan") else None
    again = checkpoint.read(tmp_path / "floats", weights=kind, split=split)
    want = checkpoint.read(folder, weights=kind, split=split)
    assert (again.origin, again.heads) == (want.origin, split)
    for one, other in zip(jax.tree.leaves(again.weights), jax.tree.leaves(want.weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_hugging_face_has_no_quantised_weights(folder, kind, tmp_path):
    with pytest.raises(ValueError, match=rf"{kind}.*save with format='orbax'"):
        checkpoint.save(checkpoint.read(folder, weights=kind), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_from_flax_takes_quantised_weights_and_says_what_is_wrong_with_them(kind):
    config, scale = (CONFIG, "scale") if kind == "int8" else (layers(2), "group_scale")
    tree = quantize_tree(weights(config), kind)
    params = Params.from_flax({"params": tree}, config)
    assert params.kernel_type == kind
    assert weights_fingerprint(params) == weights_fingerprint(params)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    assert sum(is_kernel(jax.tree_util.keystr(path, simple=True, separator="/")) for path, _ in flat) == 7 * 2 + 1
    assert scale_of("blocks_0/q/kernel", kind) == f"blocks_0/q/{scale}"
    assert scale_of("head/kernel", kind) == "head/scale"
    tree["blocks_0"]["q"]["kernel"] = tree["blocks_0"]["q"]["kernel"].astype(jnp.float32)
    tree["blocks_1"]["up"][scale] = tree["blocks_1"]["up"][scale][:-1]
    del tree["blocks_1"]["down"][scale]
    problems = rf"(?s)missing blocks_1/down/{scale}.*q/kernel has type float32, expected {kind}.*up/{scale} has shape"
    with pytest.raises(ValueError, match=problems):
        Params.from_flax({"params": tree}, config)


# int4


def _literal_int4(numbers, scales, axis):
    """The definition in float64: each number times the scale of its group."""
    size = numbers.shape[axis] // scales.shape[axis]
    return numbers.astype(np.float64) * np.repeat(scales.astype(np.float64), size, axis=axis)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "shape", "axis", "group"),
    [
        ("q", (128, 2, 2, 8), 0, 64),
        ("o", (2, 2, 64, 8), 2, 64),
        ("down", (96, 8), 0, 32),
        ("expert_up", (3, 64, 8), 1, 64),
    ],
)
def test_int4_beats_plain_rounding_in_every_group(name, shape, axis, group, dtype):
    """Plain rounding has the scale max|w| / 7. Zeros stay zeros."""
    kernel = np.random.default_rng(1).normal(size=shape).astype(dtype)
    kernel[..., 0] = 0
    numbers, scale = map(np.asarray, quantize(f"blocks_0/{name}/kernel", jnp.asarray(kernel), "int4").values())
    assert (numbers.dtype, scale.dtype) == (jnp.int4, jnp.bfloat16)
    assert scale.shape == (*shape[:axis], shape[axis] // group, *shape[axis + 1 :])
    got = dequantize({"kernel": jnp.asarray(numbers), "group_scale": jnp.asarray(scale)})
    np.testing.assert_array_equal(np.asarray(got, np.float64), _literal_int4(numbers, scale, axis))
    wide = np.moveaxis(kernel.astype(np.float64), axis, -1)
    wide = wide.reshape(*wide.shape[:-1], -1, group)
    step = np.abs(wide).max(-1, keepdims=True) / 7
    plain = np.where(step == 0, 0, np.round(wide / np.where(step == 0, 1, step)) * step)
    ours = np.moveaxis(np.asarray(got, np.float64), axis, -1).reshape(wide.shape)
    errors, most = (np.square(x - wide).sum(-1) for x in (ours, plain))
    assert (errors <= 1.05 * most).all()  # its scale is not rounded to bfloat16
    assert errors.sum() < 0.8 * most.sum()
    assert (ours[wide == 0] == 0).all()


def test_weights_of_4_bits_keep_their_numbers():
    """As in symmetric GPTQ: numbers from -8 to 7 in groups of 128, scales in float16."""
    rng = np.random.default_rng(3)
    numbers = rng.integers(-8, 8, (256, 32))
    scales = rng.uniform(0.01, 0.02, (2, 32)).astype(np.float16).astype(np.float32)
    kernel = (numbers * np.repeat(scales, 128, axis=0)).astype(np.float32)
    q, group_scale = map(np.asarray, quantize("gate/kernel", jnp.asarray(kernel), "int4").values())
    ours = np.repeat(group_scale.astype(np.float32), 64, axis=0)
    np.testing.assert_array_equal(q.astype(int) * np.sign(ours), numbers)
    np.testing.assert_allclose(abs(ours), np.repeat(scales, 128, axis=0), rtol=2**-8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_stays_visible(value):
    kernel = np.ones((64, 2), np.float32)
    kernel[5, 1] = value
    q, scale = quantize("gate/kernel", jnp.asarray(kernel), "int4").values()
    assert np.isfinite(scale[:, 0]).all()
    assert not np.isfinite(scale[:, 1]).any()
    assert not np.isfinite(dequantize({"kernel": q, "group_scale": scale})[:, 1]).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_int4_matmul_dequantises(dtype, tolerance):
    rng = np.random.default_rng(4)
    kernel, bias = rng.normal(size=(2, 3, 32, 5)).astype(np.float32), rng.normal(size=5).astype(dtype)
    x = rng.normal(size=(4, 2, 3, 32)).astype(dtype)
    q, scale = quantize("blocks_0/o/kernel", jnp.asarray(kernel), "int4").values()
    linear = Linear(kernel.shape, "bkgh,kghd->bd", use_bias=True)
    y = linear.apply({"params": {"kernel": q, "group_scale": scale, "bias": bias}}, jnp.asarray(x))
    assert y.dtype == dtype
    want = np.einsum("bkgh,kghd->bd", x.astype(np.float64), _literal_int4(np.asarray(q), np.asarray(scale), 2)) + bias
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_a_width_that_groups_do_not_divide_is_named(tmp_path):
    hf.write(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"blocks_0/o/kernel has 16 inputs in a row, which int4 groups of 64 or 32 do"):
        checkpoint.read(tmp_path, weights="int4")


def test_int4_stays_int4(tmp_path):
    hf.write(tmp_path / "floats", "llama", head_dim=32)
    checkpoint.save(checkpoint.read(tmp_path / "floats", weights="int4"), tmp_path / "int4", "orbax")
    with pytest.raises(ValueError, match=r"weights='int8': the checkpoint's kernels are int4 and stay so"):
        checkpoint.read(tmp_path / "int4", weights="int8")


def test_transformers_computes_the_same_logits_with_the_dequantised_weights(tmp_path):
    hf.write(tmp_path / "floats", "llama", head_dim=32)
    params = checkpoint.read(tmp_path / "floats", weights="int4")
    checkpoint.save(_floats(params), tmp_path / "dequantised")
    got = _logits(params, TOKENS)
    want = np.stack([hf.logits(hf.oracle(tmp_path / "dequantised"), row) for row in TOKENS])
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)
