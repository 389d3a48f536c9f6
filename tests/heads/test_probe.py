"""Head scores against full attention maps of transformers, and the probe itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.config import HeadSplit
from razor_jax.heads import HeadScores, find_heads, mass
from razor_jax.heads.mass import attention_mass, score_layer
from razor_jax.heads.probe import BLOCK as PAPER_BLOCK
from razor_jax.heads.probe import REPEATS, Layout, ordinary_ids, probe_tokens
from razor_jax.kernels.attention import attend_causal
from razor_jax.models.config import ModelConfig
from razor_jax.params import Params, abstract_weights, with_heads
from razor_jax.tokenizer.assets import Assets
from tests.support.heads_oracle import (
    BLOCK,
    FAMILIES,
    K,
    attention_maps,
    found,
    group_max,
    maps_of,
    oracle_scores,
    pair,
)
from tests.support.xla_flags import FLAGS

families = pytest.mark.parametrize("family", list(FAMILIES))

# Against the oracle


@families
def test_scores_and_split_equal_the_oracle(family, record_property):
    maps, scores = maps_of(family), found(family)
    echo, induction = (oracle_scores(maps, BLOCK, shift=shift) for shift in (0, 1))
    np.testing.assert_allclose(scores.query_echo, echo, atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores.query_induction, induction, atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores.echo, group_max(echo), atol=1e-5, rtol=0)
    reference = HeadScores(echo, induction, K, scores.meta)
    for shares in ({}, {"induction": 0.14, "echo": 0.01}, {"induction": 0.5, "echo": 0.5}, {"share": 0.5}):
        assert scores.select(**shares) == reference.select(**shares)
    record_property(f"head scores, {family}", float(np.max(np.abs(scores.query_echo - echo))))
    record_property(f"head scores, {family}", float(np.max(np.abs(scores.query_induction - induction))))


def test_noise_is_the_mass_half_a_block_after_the_copies():
    scores = found("llama")
    noise = oracle_scores(maps_of("llama"), BLOCK, shift=BLOCK // 2).max()
    np.testing.assert_allclose(scores.meta.floor, noise, atol=1e-5, rtol=0)
    signal = np.maximum(scores.echo, scores.induction) > noise
    assert scores.above_floor(scores.select(share=1.0)) == signal.sum()
    assert HeadScores.from_json(scores.to_json()).meta.floor == scores.meta.floor
    assert find_heads(pair("llama")[1], method="random").meta.floor == 0


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_scores_do_not_depend_on_the_chunk(chunk):
    scores, other = found("qwen3"), find_heads(pair("qwen3")[1], chunk=chunk)
    np.testing.assert_allclose(other.query_echo, scores.query_echo, atol=1e-6, rtol=0)
    np.testing.assert_allclose(other.query_induction, scores.query_induction, atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_split_that_params_hold():
    held = with_heads(pair("qwen2")[1], HeadSplit(((1,), (), (0,)), K))
    scores, other = found("qwen2"), find_heads(held, chunk=16)
    np.testing.assert_allclose(other.query_echo, scores.query_echo, atol=1e-6, rtol=0)
    np.testing.assert_allclose(other.query_induction, scores.query_induction, atol=1e-6, rtol=0)


def test_half_precision_weights_are_probed_in_their_own_type():
    params = pair("llama")[1]
    half = params.replace(weights=jax.tree.map(lambda a: a.astype(jnp.bfloat16), params.weights))
    scores = find_heads(half)
    np.testing.assert_allclose(scores.query_induction, found("llama").query_induction, atol=0.05, rtol=0)
    assert (scores.meta.dtype, scores.meta.head_dim) == ("bfloat16", 8)


def test_a_shorter_block_is_a_probe_of_its_own():
    params = pair("llama")[1]
    scores = find_heads(params, block=5)
    model_tokens = probe_tokens(0, ordinary_ids(params)[1:], Layout(5), 0)
    maps = attention_maps(pair("llama")[0], model_tokens)
    np.testing.assert_allclose(scores.query_induction, oracle_scores(maps, 5, shift=1), atol=1e-5, rtol=0)
    assert "K_p = 5 instead of 15: asked for" in scores.describe()


def test_mass_on_chosen_targets_row_by_row():
    """Targets are the caller's: other tokens, other numbers of copies, several rows at once."""
    model, params = pair("qwen3")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (2, 23)).astype(np.int32)
    targets = np.full((2, 23, 2), -1, np.int32)
    targets[0, 20], targets[0, 9], targets[1, 22] = (3, 11), (0, -1), (-1, 7)
    echo, induction = attention_mass(params, tokens, targets, chunk=8)
    for row in range(2):
        maps = attention_maps(model, tokens[row])
        for shift, ours in ((0, echo), (1, induction)):
            want = sum(maps[:, :, i, j + shift] for i, js in enumerate(targets[row]) for j in js if j >= 0)
            np.testing.assert_allclose(ours[row], want, atol=1e-5, rtol=0)


# The probe itself


def test_probe_tokens_are_one_prefix_and_a_repeated_block_of_distinct_ids():
    tokens = probe_tokens(7, np.arange(8, 108), Layout(60), seed=3)
    assert tokens.dtype == np.int32
    assert tokens[0] == 7
    block = tokens[1:].reshape(REPEATS, 60)
    np.testing.assert_array_equal(block, np.tile(block[:1], (REPEATS, 1)))
    assert len(set(block[0])) == 60
    np.testing.assert_array_equal(tokens, probe_tokens(7, np.arange(8, 108), Layout(60), seed=3))
    assert (tokens != probe_tokens(7, np.arange(8, 108), Layout(60), seed=4)).any()


def model_of(**changes) -> Params:
    """Shapes of a small model, weights zero."""
    config = ModelConfig("llama", 40, 16, 16, 1, 2, 1, 8, 1024)
    config = dataclasses.replace(config, **changes)
    weights = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_weights(config))
    return Params(weights, config)


def test_special_and_added_tokens_are_no_ordinary_ids():
    tokenizer = {
        "model": {"vocab": {str(i): i for i in range(30)}},
        "added_tokens": [{"id": 2, "special": True}, {"id": 35, "special": False}],
    }
    assets = Assets(tokenizer_json=json.dumps(tokenizer), chat_template=None, bos_id=0, eos_ids=(1, 29))
    params = model_of().replace(assets=assets)
    np.testing.assert_array_equal(ordinary_ids(params), np.arange(3, 29))
    scores = find_heads(params)
    assert scores.meta.block == 26
    assert "vocabulary has 26 ordinary ids" in scores.meta.note


def test_short_probe_is_reported(caplog):
    meta = found("llama").meta
    assert meta.block == BLOCK
    assert f"K_p = {BLOCK} instead of 2500: max_position_embeddings={4 * BLOCK + 1}" in meta.note
    caplog.set_level("INFO", logger="razor_jax")
    find_heads(model_of(max_position_embeddings=13))
    assert "K_p = 3 instead of 2500" in caplog.text


def test_uniform_attention_scores_are_as_counted():
    """Zero weights: a row at position p spreads 1 / (p + 1) over every token."""
    scores = find_heads(model_of(max_position_embeddings=41), chunk=8)
    want = np.mean([((p - 1) // 10) / (p + 1) for p in range(11, 41)])
    np.testing.assert_allclose(scores.echo, [[want]], atol=1e-7)
    np.testing.assert_allclose(scores.induction, [[want]], atol=1e-7)


def test_progress_counts_layers_of_all_seeds():
    seen = []
    find_heads(
        model_of(num_layers=2, max_position_embeddings=13),
        seeds=(0, 1),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_all_layers_and_seeds_share_one_program(monkeypatch):
    traced = []

    def counting(*args, **kwargs):
        traced.append(1)
        return attend_causal(*args, **kwargs)

    monkeypatch.setattr(mass, "attend_causal", counting)
    find_heads(model_of(num_layers=1, max_position_embeddings=17, hidden_size=24))
    once = len(traced)
    find_heads(model_of(num_layers=3, max_position_embeddings=17, hidden_size=24), seeds=(0, 1))
    assert len(traced) == 2 * once


def test_vendor_preset_is_the_published_probe(monkeypatch):
    fed = []

    def only_look(params, tokens, targets, **_):
        fed.append((tokens, targets))
        return np.zeros((3, len(tokens), params.config.num_layers, params.config.num_heads))

    monkeypatch.setattr("razor_jax.heads.probe.attention_mass", only_look)
    scores = find_heads(model_of(vocab_size=12_501, max_position_embeddings=10_001), preset="vendor")
    assert "63 %" in scores.meta.note
    (tokens, targets), block = fed[0], fed[0][0][0, 1:2501]
    assert tokens.shape == (1, 10_001)
    np.testing.assert_array_equal(tokens[0, 1:], np.tile(block, REPEATS))
    assert block.min() >= 10_000
    assert block.max() <= 12_500
    _, counts = np.unique(block, return_counts=True)
    np.testing.assert_allclose(counts[counts > 1].sum() / 2500, 0.63, atol=0.03)
    # Copies are those a block back, not the duplicates inside a block.
    aims = targets[0]
    np.testing.assert_array_equal((aims >= 0).sum(axis=1), [0, *np.repeat(range(REPEATS), 2500)])
    np.testing.assert_array_equal(aims[9999], [7499, 4999, 2499])


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"preset": "vendor"}, "vocab_size=40: preset='vendor' needs at least 12501; use preset='paper'"),
        ({"vocab_size": 13_000}, {"preset": "vendor"}, "max_position_embeddings=1024"),
        ({}, {"preset": "duo"}, "preset='duo': use 'paper' or 'vendor'"),
        ({}, {"seeds": ()}, "give at least one seed"),
        ({}, {"chunk": 0}, "chunk=0"),
        ({}, {"block": 1}, "block=1: must be an integer, from 2 to 39"),
        ({}, {"block": 2500}, "block=2500"),
        ({}, {"seeds": (0, 1, 2), "devices": "two"}, "3 seeds do not divide over 2 devices"),
        ({"max_position_embeddings": 5}, {}, "leave a block of 1 tokens"),
    ],
)
def test_impossible_probes_are_refused(changes, options, words):
    if "devices" in options:
        options = {**options, "devices": jax.devices() * 2}
    with pytest.raises(ValueError, match=words):
        find_heads(model_of(**changes), **options)


def test_models_that_are_not_finite_are_refused_with_the_reason():
    params = model_of(max_position_embeddings=17)
    broken = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan), params.weights["blocks_0"]["k"])
    weights = {**params.weights, "blocks_0": {**params.weights["blocks_0"], "k": broken}}
    with pytest.raises(
        ValueError, match=r"no heads can be found: .* weights are not \(model.layers.0.self_attn.k_proj.weight\)"
    ):
        find_heads(params.replace(weights=weights))


def temporaries(config: ModelConfig, block: int, chunk: int, dtype: jnp.dtype) -> int:
    """Bytes that the compiled layer needs above its arguments and results."""
    rows = -(-Layout(block).length // chunk) * chunk

    def shape(*dims: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *dims), dtype)

    weights = abstract_weights(config, dtype)["blocks_0"]
    rope = (shape(rows, config.head_dim // 2, dtype=jnp.float32),) * 2
    lengths, targets = jax.ShapeDtypeStruct((1,), jnp.int32), shape(rows, REPEATS - 1, dtype=jnp.int32)
    lowered = score_layer.lower(config, 0, chunk, weights, shape(rows, config.hidden_size), rope, lengths, targets)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("unchecked")
def test_memory_is_linear_in_the_probe():
    config = ModelConfig("llama", 40, 64, 128, 1, 8, 2, 16, 1 << 20)
    short, long = (temporaries(config, block, 128, jnp.float32) for block in (1000, 8000))
    assert long < 9 * short
    # One float32 map of one head would be a gigabyte and more.
    assert long < 0.1 * 4 * (REPEATS * 8000) ** 2


@pytest.mark.usefixtures("unchecked")
def test_peak_memory_of_an_8b_layer_at_10_001_tokens():
    """Llama-3.1-8B's shapes, in float32: of bfloat16 weights XLA on CPU makes a float32 copy, which no accelerator
    does."""
    config = ModelConfig("llama", 128_256, 4096, 14_336, 1, 32, 8, 128, 131_072)
    assert temporaries(config, PAPER_BLOCK, 512, jnp.float32) < 1e9


SHARDED = """
import numpy as np, jax
from razor_jax.heads import find_heads
from tests.support.tiny import params
assert jax.device_count() == 8
one = find_heads(params(), seeds=range(8), block=20)
many = find_heads(params(), seeds=range(8), block=20, devices=jax.devices())
np.testing.assert_allclose(many.query_echo, one.query_echo, atol=1e-6, rtol=0)
np.testing.assert_allclose(many.query_induction, one.query_induction, atol=1e-6, rtol=0)
print("equal")
"""


def test_seeds_spread_over_eight_devices():
    flags = {
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env={**os.environ, **flags}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
