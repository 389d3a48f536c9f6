"""Head scores against full attention maps of transformers.

The oracle is slow and literal: eager attention of transformers in float64, then loops over tokens and
copies. Each published bug is run through the oracle too, to show that it would have been seen.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from razor_jax import checkpoint
from razor_jax.config import HeadSplit
from razor_jax.heads import HeadScores, ProbeMeta, find_heads
from razor_jax.heads.probe import Layout, ordinary_ids, probe_layer, probe_tokens
from razor_jax.kernels.attention import attend_causal
from razor_jax.models.config import ModelConfig
from razor_jax.params import Params, abstract_weights, with_heads
from razor_jax.tokenizer import Assets

L, N, K, H = 3, 6, 2, 8
BLOCK = 15  # (max_position_embeddings - 1) // 4
REPEATS = 4
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_model(family: str) -> torch.nn.Module:
    """A tiny random model with attention far from uniform, float32."""
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=61,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=4 * BLOCK + 1,
        initializer_range=0.3,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.5 if "norm" in name else 0.0, std=0.3)
    return model.eval()


def attention_maps(model: torch.nn.Module, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """float64 [L, N, P, P] post-softmax."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens[None], dtype=torch.long),
            position_ids=None if positions is None else torch.tensor(positions[None], dtype=torch.long),
            output_attentions=True,
        )
    return np.stack([a[0].double().numpy() for a in out.attentions])


def oracle_scores(maps: np.ndarray, block: int, *, shift: int, per_pair: bool = False) -> np.ndarray:
    """float64 [L, N]: mass on token j + shift for each earlier copy j, summed, averaged over tokens."""
    maps = maps[:, :, 1:, 1:]  # the prefix is no target, and the softmax stays as it was
    total, rows, pairs = np.zeros(maps.shape[:2]), 0, 0
    for i in range(block, maps.shape[2]):
        rows += 1
        for j in range(i - block, -1, -block):
            total += maps[:, :, i, j + shift]
            pairs += 1
    return total / (pairs if per_pair else rows)


def group_max(scores: np.ndarray) -> np.ndarray:
    return scores.reshape(len(scores), K, N // K).max(-1)


def probe_of(params: Params, seed: int) -> np.ndarray:
    """The very tokens that find_heads feeds for a seed: first ordinary id, then the block."""
    return probe_tokens(0, ordinary_ids(params)[1:], Layout(BLOCK), seed)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Params]:
    """The same checkpoint in transformers (float64) and here."""
    model = tiny_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model.double(), checkpoint.read(folder)


@pytest.fixture(scope="module")
def oracle(pair) -> tuple[np.ndarray, np.ndarray]:
    """Echo and induction float64 [L, N] of seed 0."""
    maps = attention_maps(pair[0], probe_of(pair[1], 0))
    return oracle_scores(maps, BLOCK, shift=0), oracle_scores(maps, BLOCK, shift=1)


@pytest.fixture(scope="module")
def found(pair) -> HeadScores:
    return find_heads(pair[1], chunk=16)


def differs(a: np.ndarray, b: np.ndarray) -> bool:
    """Far beyond the tolerance of the comparison with the oracle."""
    return float(np.max(np.abs(a - b))) > 1e-3


# Against the oracle


def test_scores_and_split_equal_the_oracle(found, oracle):
    np.testing.assert_allclose(found.query_echo, oracle[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.query_induction, oracle[1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.echo, group_max(oracle[0]), atol=1e-5, rtol=0)
    reference = HeadScores(*oracle, K, found.meta)
    for shares in ({}, {"induction": 0.14, "echo": 0.01}, {"induction": 0.5, "echo": 0.5}, {"share": 0.5}):
        assert found.select(**shares) == reference.select(**shares)


def test_scores_do_not_depend_on_the_chunk(pair, found):
    whole = find_heads(pair[1], chunk=4096)
    np.testing.assert_allclose(whole.query_echo, found.query_echo, atol=1e-6, rtol=0)
    np.testing.assert_allclose(whole.query_induction, found.query_induction, atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_split_that_params_hold(pair, found):
    held = with_heads(pair[1], HeadSplit(((1,), (), (0,)), K))
    scores = find_heads(held, chunk=16)
    np.testing.assert_allclose(scores.query_echo, found.query_echo, atol=1e-6, rtol=0)
    np.testing.assert_allclose(scores.query_induction, found.query_induction, atol=1e-6, rtol=0)


def test_half_precision_weights_are_probed_in_their_own_type(pair, found):
    half = pair[1].replace(weights=jax.tree.map(lambda a: a.astype(jnp.bfloat16), pair[1].weights))
    np.testing.assert_allclose(find_heads(half).query_induction, found.query_induction, atol=0.05, rtol=0)


# Bugs of published tools


def test_bug_no_rotary_embedding(pair, found, oracle):
    tokens = probe_of(pair[1], 0)
    still = attention_maps(pair[0], tokens, positions=np.zeros(len(tokens)))
    assert differs(oracle_scores(still, BLOCK, shift=1), oracle[1])
    np.testing.assert_allclose(found.query_induction, oracle[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_bug_qk_norm_skipped(pair, found, oracle):
    without = tiny_model("qwen3").double()
    for layer in without.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    maps = attention_maps(without, probe_of(pair[1], 0))
    assert differs(oracle_scores(maps, BLOCK, shift=1), oracle[1])
    np.testing.assert_allclose(found.query_induction, oracle[1], atol=1e-5, rtol=0)


def test_bug_mean_over_pairs_instead_of_sum_per_token(pair, found, oracle):
    maps = attention_maps(pair[0], probe_of(pair[1], 0))
    per_pair = oracle_scores(maps, BLOCK, shift=0, per_pair=True)
    assert differs(per_pair, oracle[0])
    # Of three later repeats the tokens have 1, 2 and 3 copies: two a token, so that bug halves every score.
    np.testing.assert_allclose(found.query_echo, 2 * per_pair, atol=1e-5, rtol=0)


def test_bug_off_by_one_swaps_the_classes(pair, found, oracle):
    maps = attention_maps(pair[0], probe_of(pair[1], 0))
    late = np.concatenate([maps[:, :, :1], maps[:, :, :-1]], axis=2)  # row i holds the mass of token i - 1
    assert differs(oracle_scores(late, BLOCK, shift=1), oracle[1])
    assert differs(oracle[0], oracle[1])
    np.testing.assert_allclose(found.query_echo, oracle[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.query_induction, oracle[1], atol=1e-5, rtol=0)


def test_bug_seed_mean_after_group_max(pair):
    model, params = pair
    seeds = (0, 1, 2)
    runs = [oracle_scores(attention_maps(model, probe_of(params, s)), BLOCK, shift=1) for s in seeds]
    right = group_max(np.mean(runs, axis=0))
    wrong = np.mean([group_max(run) for run in runs], axis=0)
    scores = find_heads(params, seeds=seeds)
    np.testing.assert_allclose(scores.induction, right, atol=1e-5, rtol=0)
    assert (wrong >= right - 1e-12).all()
    assert np.max(wrong - right) > 1e-4
    made = HeadScores(np.zeros((1, 2)), np.mean([[[1.0, 0.0]], [[0.0, 0.8]]], axis=0), 1, ProbeMeta("made"))
    np.testing.assert_allclose(made.induction, [[0.5]])  # the bug gives 0.9


def test_bug_zero_echo_heads_by_rounding(found):
    assert round(0.01 * L * K) == 0
    split = found.select(induction=0, echo=0.01)
    assert sum(split.counts) == 1
    layer = split.counts.index(1)
    assert found.echo[layer, split.retrieval[layer][0]] == found.echo.max()


def test_bug_echo_heads_of_later_layers_lost():
    echo = np.asarray([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])
    scores = HeadScores(echo, np.zeros((3, 2)), 2, ProbeMeta("made"))
    assert scores.select(induction=0, echo=0.5).retrieval == ((0,), (0,), (1,))


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


def test_short_probe_is_reported(found, caplog):
    assert found.meta.block == BLOCK
    assert f"K_p = {BLOCK} instead of 2500: max_position_embeddings={4 * BLOCK + 1}" in found.meta.note
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

    monkeypatch.setattr("razor_jax.heads.probe.attend_causal", counting)
    find_heads(model_of(num_layers=1, max_position_embeddings=17, hidden_size=24))
    once = len(traced)
    find_heads(model_of(num_layers=3, max_position_embeddings=17, hidden_size=24), seeds=(0, 1))
    assert len(traced) == 2 * once


def test_vendor_preset_is_the_published_probe(monkeypatch):
    fed = []

    def only_look(params, layout, tokens, *_):
        fed.append(tokens)
        return np.zeros((2, params.config.num_layers, params.config.num_heads))

    monkeypatch.setattr("razor_jax.heads.probe._run", only_look)
    scores = find_heads(model_of(vocab_size=12_501, max_position_embeddings=10_001), preset="vendor")
    assert "63 %" in scores.meta.note
    assert fed[0].shape == (10_001,)
    block = fed[0][1:2501]
    np.testing.assert_array_equal(fed[0][1:], np.tile(block, REPEATS))
    assert block.min() >= 10_000
    assert block.max() <= 12_500
    _, counts = np.unique(block, return_counts=True)
    np.testing.assert_allclose(counts[counts > 1].sum() / 2500, 0.63, atol=0.03)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"preset": "vendor"}, "vocab_size=40: preset='vendor' needs at least 12501; use preset='paper'"),
        ({"vocab_size": 13_000}, {"preset": "vendor"}, "max_position_embeddings=1024"),
        ({}, {"preset": "duo"}, "preset='duo': use 'paper' or 'vendor'"),
        ({}, {"seeds": ()}, "give at least one seed"),
        ({}, {"chunk": 0}, "chunk=0"),
        ({"max_position_embeddings": 5}, {}, "leave a block of 1 tokens"),
    ],
)
def test_impossible_probes_are_refused(changes, options, words):
    with pytest.raises(ValueError, match=words):
        find_heads(model_of(**changes), **options)


def test_overflowing_models_are_named():
    params = model_of(max_position_embeddings=17)
    broken = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan), params.weights["blocks_0"]["k"])
    weights = {**params.weights, "blocks_0": {**params.weights["blocks_0"], "k": broken}}
    with pytest.raises(ValueError, match="layer 0, query head 0 is nan: the model's forward pass overflows"):
        find_heads(params.replace(weights=weights))


def test_memory_is_linear_in_the_probe():
    config = ModelConfig("llama", 40, 64, 128, 1, 8, 2, 16, 1 << 20)
    weights = abstract_weights(config)["blocks_0"]

    def temporaries(block: int) -> int:
        layout = Layout(block, chunk=128)
        T = layout.padded
        x = jax.ShapeDtypeStruct((1, T, 64), jnp.float32)
        rope = (jax.ShapeDtypeStruct((1, T, 8), jnp.float32),) * 2
        return probe_layer.lower(config, layout, weights, x, rope).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1000), temporaries(8000)
    assert long < 9 * short
    # One float32 map of one head would be a gigabyte and more.
    assert long < 0.1 * 4 * (REPEATS * 8000) ** 2
