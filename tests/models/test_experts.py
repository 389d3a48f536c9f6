"""Qwen3-MoE: routing and experts against NumPy and transformers, on disk, in int8, and what is refused."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from razor_jax import HeadSplit, RazorConfig, functional, with_heads
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.models import Experts, experts, read_config, tensor_names, write_config
from razor_jax.models.linear import dequantize
from razor_jax.params import abstract_weights, weights_fingerprint

from ..support import folders, hf

MODELS = {
    "all sparse": {},
    "one expert a token": {"num_experts_per_tok": 1},
    "two dense layers": {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "norm_topk_prob": False},
    "every second layer": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True, "num_experts": 5},
}
LENGTHS = np.asarray([40, 17, 1], np.int32)
STEPS = 24


# Plain shares are those of "two dense layers" too.
CASES = [*MODELS.values(), pytest.param({"norm_topk_prob": False}, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CASES, ids=[*MODELS, "plain shares"])
def folder(request, tmp_path_factory):
    return hf.write(tmp_path_factory.mktemp("moe"), "qwen3_moe", **request.param)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A model that no test changes."""
    return hf.write(tmp_path_factory.mktemp("sparse"), "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[1])


def _generate(params, razor=None, capacity=64):
    """Return greedy tokens of a ragged batch [3, …], prompts first, and the logits [STEPS, 3, V] that chose them."""
    tokens = np.random.default_rng(2).integers(0, 101, (3, 64), np.int32)
    cache = functional.init_cache(params, batch=3, capacity=capacity, razor=razor, prompt_lengths=LENGTHS)
    extend, decode = jax.jit(functional.extend), jax.jit(functional.decode)
    logits, cache = extend(params, cache, tokens[:, :40], LENGTHS)
    steps = []
    for step in range(STEPS):
        steps.append(np.asarray(logits))
        chosen = steps[-1].argmax(-1).astype(np.int32)
        tokens[np.arange(3), LENGTHS + step] = chosen
        logits, cache = decode(params, cache, chosen)
    return tokens, np.stack(steps)


def test_a_ragged_batch_decodes_like_transformers(folder, record_property):
    """With a head split, too: a window as long as the rows drops nothing."""
    params, model = checkpoint.read(folder), hf.oracle(folder)
    split = HeadSplit(((1,), ()) * (params.config.num_layers // 2), 2)
    tokens, steps = _generate(params)
    moved, same = _generate(with_heads(params, split), RazorConfig.compact(60, sinks=4))
    np.testing.assert_array_equal(moved, tokens)
    np.testing.assert_allclose(same, steps, atol=1e-5 * np.abs(steps).max(), rtol=0)
    worst = 0.0
    for row, length, ours in zip(tokens, LENGTHS, steps.swapaxes(0, 1), strict=True):
        want = hf.logits(model, row[: length + STEPS - 1])[length - 1 :]
        worst = max(worst, float(np.abs(ours - want).max() / np.abs(want).max()))
        best = np.sort(want, axis=-1)
        decided = best[:, -1] - best[:, -2] > 2e-4
        assert decided.sum() >= STEPS - 2
        np.testing.assert_array_equal(row[length : length + STEPS][decided], want.argmax(-1)[decided])
    record_property("experts: largest logit error against transformers, share of the largest logit", worst)
    assert worst < 1e-4


def test_a_long_prompt_in_chunks_equals_transformers(tmp_path):
    hf.write(tmp_path, "qwen3_moe", mlp_only_layers=[1], max_position_embeddings=512)
    params, tokens = checkpoint.read(tmp_path), np.random.default_rng(3).integers(0, 101, 300, np.int32)
    cache = functional.init_cache(params, batch=1, capacity=320, razor=None)
    extend = jax.jit(functional.extend, static_argnames="logits")
    got, _ = extend(params, cache, tokens[None], np.asarray([300]), logits="all")
    want = hf.logits(hf.oracle(tmp_path), tokens)
    np.testing.assert_allclose(np.asarray(got)[0], want, rtol=0, atol=1e-4 * np.abs(want).max())


# The mixture


def _maps(rng, kind=None):
    """Six experts; int4 in groups of 32 inputs."""
    E, D, F = (6, 64, 32) if kind == "int4" else (6, 10, 7)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    if kind is None:
        return {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    if kind == "int4":
        return {
            name: {
                "kernel": rng.integers(-8, 8, shape).astype(jnp.int4),
                "group_scale": rng.uniform(0.1, 0.2, (E, shape[1] // 32, shape[2])).astype(jnp.bfloat16),
            }
            for name, shape in shapes.items()
        }
    return {
        name: {
            "kernel": rng.integers(-127, 128, shape).astype(np.int8),
            "scale": rng.uniform(0.01, 0.02, (E, 1, shape[2])).astype(np.float32),
        }
        for name, shape in shapes.items()
    }


def _literal(x, share, maps):
    """The definition, in float64, expert by expert."""
    out = np.zeros(x.shape)
    for e in range(share.shape[1]):
        gate, up, down = (_wide({part: a[e] for part, a in maps[name].items()}) for name in ("gate", "up", "down"))
        g = x.astype(np.float64) @ gate
        out += share[:, e, None] * ((g / (1 + np.exp(-g)) * (x @ up)) @ down)
    return out


def _wide(linear):
    """Return an expert's kernel [inputs, outputs] in float64."""
    kernel = linear["kernel"].astype(np.float64)
    if "group_scale" in linear:
        return kernel * np.repeat(linear["group_scale"].astype(np.float64), 32, axis=0)
    return kernel * linear.get("scale", 1)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_the_mixture_is_its_definition(rows, kind):
    """Weights of experts that nobody chose are NaN, or scaled by NaN: they are not read."""
    rng = np.random.default_rng(rows)
    maps = _maps(rng, kind)
    x, logits = (rng.normal(size=(rows, n)).astype(np.float32) for n in (maps["gate"]["kernel"].shape[1], 6))
    logits[:, [1, 4]] = -20
    share = np.asarray(experts.shares(jnp.asarray(logits), Experts(6, 2, 7, normalize=True)))
    assert (np.count_nonzero(share, axis=-1) == 2).all()
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-6)
    want = _literal(x, share, maps)
    for linear in maps.values():
        linear[{None: "kernel", "int8": "scale", "int4": "group_scale"}[kind]][[1, 4]] = np.nan
    got = np.asarray(jax.jit(experts.mix)(x, share, maps))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_shares_are_probabilities_of_the_likeliest():
    logits = np.log(np.asarray([[0.1, 0.4, 0.2, 0.3]], np.float32))
    for normalize, want in ((False, [0, 0.4, 0, 0.3]), (True, [0, 4 / 7, 0, 3 / 7])):
        share = experts.shares(jnp.asarray(logits), Experts(4, 2, 1, normalize))
        np.testing.assert_allclose(share, [want], rtol=1e-6)


def test_the_gradient_is_that_of_the_definition():
    """Against differences of the float64 definition."""
    rng = np.random.default_rng(0)
    x, share, maps = rng.normal(size=(5, 10)), rng.dirichlet(np.ones(6), 5), _maps(rng)
    x, share = jnp.asarray(x, jnp.float32), jnp.asarray(share, jnp.float32)
    toward, step = rng.normal(size=x.shape), 1e-6
    got = jax.grad(lambda x: jnp.sum(experts.mix(x, share, maps)))(x)
    ends = [_literal(np.asarray(x, np.float64) + sign * step * toward, np.asarray(share), maps) for sign in (1, -1)]
    want = (ends[0] - ends[1]).sum() / (2 * step)
    np.testing.assert_allclose((np.asarray(got) * toward).sum(), want, rtol=1e-4)


# On disk


def test_saved_back_exactly(folder, tmp_path):
    params = checkpoint.read(folder)
    checkpoint.save(params, tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = folders.stored(folder), folders.stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)
    tokens = np.random.default_rng(0).integers(0, 101, 40, np.int32)
    one, other = (hf.logits(hf.oracle(side), tokens) for side in (folder, tmp_path / "out"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_orbax_round_trip_is_exact(sparse, tmp_path, weights):
    params = checkpoint.read(sparse, weights=weights)
    checkpoint.save(params, tmp_path / "out", "orbax")
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)


def test_int8_is_per_expert_and_output_channel(sparse):
    floats, params = checkpoint.read(sparse), checkpoint.read(sparse, weights="int8")
    block, float_block = params.weights["blocks_0"], floats.weights["blocks_0"]
    assert block["router"]["kernel"].dtype == jnp.float32
    for name in ("expert_gate", "expert_up", "expert_down"):
        kernel, wide = np.asarray(block[name]["kernel"]), np.asarray(float_block[name]["kernel"])
        step = np.abs(wide).max(axis=1, keepdims=True) / 127
        assert kernel.dtype == np.int8
        np.testing.assert_allclose(block[name]["scale"], step, rtol=1e-6)
        assert (np.abs(np.asarray(dequantize(block[name])) - wide) <= 0.5001 * step).all()
        assert (np.abs(kernel).max(axis=1) == 127).all()
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_weights(params.config, jnp.float32, "int8"))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params.weights) == shapes
    assert weights_fingerprint(params) == weights_fingerprint(floats)
    flat = {path[:-1]: path for path in flatten_dict(params.weights) if path[-1] == "kernel"}
    wide = {path: dequantize(_at(params.weights, at)) for at, path in flat.items()}
    rest = {path: x for path, x in flatten_dict(floats.weights).items() if path not in wide}
    same = params.replace(weights=unflatten_dict(wide | rest), origin=None)
    (_, got), (_, want) = _generate(params), _generate(same)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-5 * np.abs(want[0]).max())


def _at(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.mark.parametrize("name", ["mlp.experts.3.up_proj.weight", "mlp.gate.weight"])
def test_a_missing_tensor_is_named(sparse, tmp_path, name):
    copy = folders.copy(sparse, tmp_path)
    folders.edit(copy, lambda tensors: tensors.pop(f"model.layers.0.{name}"))
    with pytest.raises(ValueError, match=rf"missing model\.layers\.0\.{name} \["):
        checkpoint.read(copy)


def test_an_expert_of_another_shape_is_named(sparse, tmp_path):
    copy = folders.copy(sparse, tmp_path)
    name = "model.layers.0.mlp.experts.7.down_proj.weight"
    folders.edit(copy, lambda tensors: tensors.update({name: np.zeros((64, 41), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[64, 41\], expected \[64, 40\]"):
        checkpoint.read(copy)


# config.json

CODER = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5472,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_theta": 10000000,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 48,
}


@pytest.mark.parametrize(
    "changes", [{}, {"mlp_only_layers": [0, 9]}, {"decoder_sparse_step": 3}, {"mlp_only_layers": None}]
)
def test_the_config_is_read_as_transformers_reads_it(changes):
    config = read_config(CODER | changes)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(CODER | changes)))
    assert config.experts is not None
    assert (config.experts.count, config.experts.per_token) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert config.experts.intermediate_size == theirs.moe_intermediate_size
    assert config.experts.normalize == theirs.norm_topk_prob
    dense = [
        layer for layer in range(48) if layer in theirs.mlp_only_layers or (layer + 1) % theirs.decoder_sparse_step != 0
    ]
    assert list(config.experts.dense_layers) == dense
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 129}, r"num_experts_per_tok=129 must be at most num_experts=128"),
        ({"mlp_only_layers": list(range(48))}, r"no layer has experts"),
        ({"num_experts": 0}, r"num_experts=0: no layer has experts"),
        ({"mlp_only_layers": ["1"]}, r"mlp_only_layers=\['1'\] in config\.json: must be a list of whole numbers"),
        ({"decoder_sparse_step": 0}, r"decoder_sparse_step=0 in config\.json: must be a positive whole number"),
        ({"norm_topk_prob": "yes"}, r"norm_topk_prob='yes' in config\.json: must be true or false"),
        ({"use_sliding_window": True, "sliding_window": 4096}, r"sliding_window=4096 is active"),
    ],
)
def test_a_wrong_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(CODER | changes)


def test_layers_of_one_kind_share_a_program():
    config = read_config(CODER | {"num_hidden_layers": 6, "mlp_only_layers": [0, 4]})
    assert [config.first_like(layer) for layer in range(6)] == [0, 1, 1, 1, 0, 1]


def test_every_read_part_of_a_stack_is_its_part_of_the_whole(sparse):
    stack = tensor_names(checkpoint.read_config(sparse))["blocks_0/expert_gate/kernel"]
    found = folders.stored(sparse)
    whole, part = np.empty((8, 64, 40), np.float32), np.empty((3, 64, 10), np.float32)
    read = functools.partial(stack.read, found)
    read((slice(None),) * 3, whole)
    read((slice(2, 5), slice(None), slice(20, 30)), part)
    np.testing.assert_array_equal(part, whole[2:5, :, 20:30])
    np.testing.assert_array_equal(whole[6], found["model.layers.0.mlp.experts.6.gate_proj.weight"].T)
