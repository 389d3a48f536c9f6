"""Every family, rope type and odd size against transformers, on tiny random checkpoints."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from razor_jax import functional
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.models import Block, Transformer, read_config
from razor_jax.models.rope import tables

from ..support import hf

PROMPT, STEPS = 48, 64
LONG = PROMPT + STEPS

# The trained length is far below the prompt's, because at short positions all rope types look alike.
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "default-far": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 200.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1000.0,
    },
    "llama3-far": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 40,
        "rope_theta": 5e5,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": None,  # then the ratio of the two lengths
        "original_max_position_embeddings": 32,
        "rope_theta": 100.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 3.0,
        "truncate": False,
        "rope_theta": 100.0,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.7,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "rope_theta": 10_000.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
}
FACTORS = {
    "rope": list(ROPES),
    "family": list(hf.FAMILIES),
    "kv_heads": [4, 2, 1],
    "head_dim": [16, 80, 128],
    "tied": [False, True],
    "vocab": [96, 101],
    "bias": [False, True],
    "lengths": [[PROMPT], [PROMPT, 17, 1]],
    "spelling": ["new", "old"],
}
ROPE_TYPES = ["default", "linear", "llama3", "yarn", "dynamic"]
PAIRWISE = hf.pairwise(FACTORS)
# A rope type is a branch of the code, and meets everything; another setting of a type runs in one model.
TYPES_PAIRWISE = hf.pairwise({**FACTORS, "rope": ROPE_TYPES})
QUICK = TYPES_PAIRWISE + [next(s for s in PAIRWISE if s["rope"] == rope) for rope in ROPES if rope not in ROPE_TYPES]
_CORE = {name: choices for name, choices in FACTORS.items() if name not in ("rope", "bias", "spelling")}
PRODUCT = [
    {"rope": rope, **dict(zip(_CORE, choice, strict=True)), "bias": i % 2 == 0, "spelling": ("new", "old")[i // 2 % 2]}
    for rope in ROPE_TYPES
    for i, choice in enumerate(itertools.product(*_CORE.values()))
]


def _name(setting):
    return "-".join(str(len(c)) if isinstance(c, list) else str(c) for c in setting.values())


def _write(directory, setting):
    biases = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
    biases |= {"qwen3_moe": ("attention_bias",), "smollm3": ("attention_bias", "mlp_bias")}
    bias: dict[str, Any] = dict.fromkeys(biases.get(setting["family"], ()), setting["bias"])
    hf.write(
        directory,
        setting["family"],
        vocab_size=setting["vocab"],
        num_key_value_heads=setting["kv_heads"],
        head_dim=setting["head_dim"],
        tie_word_embeddings=setting["tied"],
        # dynamic stretches from max_position_embeddings itself
        max_position_embeddings=32 if setting["rope"] == "dynamic" else 128,
        rope_parameters=dict(ROPES[setting["rope"]]),
        **bias,
    )
    if setting["spelling"] == "old":
        hf.respell(directory)
    return directory


def _attend(q, k, v, state):
    """Causal attention over the call's own tokens; rows of q are t-major."""
    B, K, R, H = q.shape
    T = k.shape[2]
    q = q.reshape(B, K, T, R // T, H)
    scores = jnp.einsum("bktgh,bksh->bktgs", q, k) / H**0.5
    causal = jnp.tril(jnp.ones((T, T), bool))[:, None, :]
    out = jnp.einsum("bktgs,bksh->bktgh", jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1), v)
    return out.reshape(B, K, R, H), state


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, weights, tokens, lengths):
    """float32 logits [B, T, V] of right-padded tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope = tables(config.rope, config.head_dim, positions, lengths)
    model = Transformer(config)
    return model.apply({"params": weights}, tokens, rope, _attend, (None,) * config.num_layers)[0]


def _greedy(forward, tokens, lengths):
    """Append the likeliest tokens to the prompts in tokens [B, LONG]; return each step's logits [STEPS, B, V]."""
    rows, steps = np.arange(len(lengths)), []
    for step in range(STEPS):
        steps.append(np.asarray(forward(tokens, lengths + step))[rows, lengths + step - 1])
        tokens[rows, lengths + step] = steps[-1].argmax(-1)
    return np.stack(steps)


def _greedy_of_oracle(model, row, length, every_pass):
    """The oracle's logits [STEPS, V] after each prefix of a row that `_greedy` filled.

    As long as both choose the same tokens, the prefixes are the oracle's own greedy ones. One pass returns all logits,
    unless frequencies change with the length.
    """
    if not every_pass:
        return hf.logits(model, row[: length + STEPS - 1])[length - 1 :]
    return np.stack([hf.logits(model, row[: length + step])[-1] for step in range(STEPS)])


def _assert_same_choices(ours, theirs):
    """Check logits [STEPS, V] to 1e-4, and the likeliest token wherever the oracle has a clear one."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    best = np.sort(theirs, axis=-1)
    # If the two best logits differ by less than two errors, rounding chooses, and differs between machines.
    decided = best[:, -1] - best[:, -2] > 2e-4
    assert decided.sum() >= STEPS - 2
    np.testing.assert_array_equal(ours.argmax(-1)[decided], theirs.argmax(-1)[decided])


def _check_logits_and_greedy_tokens(directory, setting, record_property):
    params, model = checkpoint.read(directory), hf.oracle(directory)
    lengths = np.asarray(setting["lengths"], np.int32)
    tokens = np.random.default_rng(0).integers(0, setting["vocab"], (len(lengths), LONG), np.int32)
    forward = functools.partial(_forward, params.config, params.weights)
    prompt = np.asarray(forward(tokens, lengths))
    steps, worst = _greedy(forward, tokens, lengths), 0.0
    for b, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        want = hf.logits(model, row[:length])
        np.testing.assert_allclose(prompt[b, :length], want, rtol=0, atol=1e-4)
        worst = max(worst, float(np.abs(prompt[b, :length] - want).max()))
        want = _greedy_of_oracle(model, row, length, setting["rope"] == "dynamic")
        _assert_same_choices(steps[:, b], want)
        worst = max(worst, float(np.abs(steps[:, b] - want).max()))
    record_property(f"largest logit error against transformers, {setting['family']}", worst)


@pytest.mark.parametrize("setting", QUICK, ids=_name)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, setting, record_property):
    _check_logits_and_greedy_tokens(_write(tmp_path, setting), setting, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in PAIRWISE if s not in QUICK], ids=_name)
def test_logits_and_greedy_tokens_equal_transformers_for_every_pair(tmp_path, setting, record_property):
    _check_logits_and_greedy_tokens(_write(tmp_path, setting), setting, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("setting", PRODUCT, ids=_name)
def test_logits_and_greedy_tokens_equal_transformers_everywhere(tmp_path, setting, record_property):
    _check_logits_and_greedy_tokens(_write(tmp_path, setting), setting, record_property)


ONE_OF_EACH = [
    {"family": "llama", "rope": "llama3", "kv_heads": 2, "tied": True, "bias": True},
    {"family": "mistral", "rope": "default", "kv_heads": 4, "tied": False, "bias": False},
    {"family": "qwen2", "rope": "yarn", "kv_heads": 1, "tied": True, "bias": True},
    {"family": "qwen3", "rope": "yarn-mscale", "kv_heads": 2, "tied": False, "bias": False},
    {"family": "qwen3_moe", "rope": "default-far", "kv_heads": 2, "tied": False, "bias": True},
    {"family": "smollm3", "rope": "default", "kv_heads": 1, "tied": True, "bias": False},
]
ONE_OF_EACH = [{**s, "head_dim": 16, "vocab": 101, "spelling": "new"} for s in ONE_OF_EACH]
FAMILY = [s["family"] for s in ONE_OF_EACH]


@pytest.mark.parametrize("setting", ONE_OF_EACH, ids=FAMILY)
def test_hidden_states_equal_transformers_layer_by_layer(tmp_path, setting):
    params, model = checkpoint.read(_write(tmp_path, setting)), hf.oracle(tmp_path)
    config, tokens = params.config, np.random.default_rng(1).integers(0, 101, PROMPT, np.int32)
    want = hf.hidden_states(model, tokens)
    positions = jnp.arange(PROMPT)[None]
    rope = tables(config.rope, config.head_dim, positions, jnp.full((1,), PROMPT))
    # Every layer gets the oracle's input, so that an error is found in the layer that makes it.
    embedded = Transformer(config).apply({"params": params.weights}, jnp.asarray(tokens)[None], method="embed")
    np.testing.assert_array_equal(embedded[0], want[0])
    for i in range(config.num_layers):
        x, _ = Block(config, i).apply(
            {"params": params.weights[f"blocks_{i}"]}, jnp.asarray(want[i])[None], rope, _attend, None
        )
        if i < config.num_layers - 1:
            np.testing.assert_allclose(x[0], want[i + 1], rtol=0, atol=2e-5, err_msg=f"layer {i}")
    last = Transformer(config).apply({"params": params.weights}, x, method=lambda m, x: m.norm(x))
    np.testing.assert_allclose(last[0], want[-1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("setting", ONE_OF_EACH[::3], ids=FAMILY[::3])
def test_extend_and_decode_on_the_dense_cache_equal_transformers(tmp_path, setting):
    params, model = checkpoint.read(_write(tmp_path, setting)), hf.oracle(tmp_path)
    lengths = np.asarray([PROMPT, 17, 1], np.int32)
    tokens = np.random.default_rng(2).integers(0, 101, (3, LONG), np.int32)
    cache = functional.init_cache(params, batch=3, capacity=LONG, razor=None)
    logits, cache = jax.jit(functional.extend)(params, cache, tokens[:, :PROMPT], lengths)
    decode, steps = jax.jit(functional.decode), []
    for step in range(STEPS):
        steps.append(np.asarray(logits))
        chosen = steps[-1].argmax(-1).astype(np.int32)
        tokens[np.arange(3), lengths + step] = chosen
        logits, cache = decode(params, cache, chosen)
    for b, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        want = _greedy_of_oracle(model, row, length, every_pass=False)
        _assert_same_choices(np.stack(steps)[:, b], want)


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("rope", list(ROPES))
def test_rope_tables_equal_transformers_far_out(rope, head_dim):
    sizes = {**hf.SIZES, "head_dim": head_dim, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**sizes, rope_parameters=dict(ROPES[rope]))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.arange(1000)[None]
    cos, sin = rotary(torch.zeros(1, 1), positions)
    ours = read_config({**sizes, "model_type": "llama", "rope_parameters": dict(ROPES[rope])})
    got = tables(ours.rope, head_dim, jnp.arange(1000)[None], jnp.asarray([1000]))
    # An angle near 1000 is rounded to 6e-5 in float32, and a frequency may differ by its last bit.
    for mine, theirs in zip(got, (cos, sin), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy()[..., : head_dim // 2], rtol=0, atol=2e-4)


def test_dynamic_rope_stretches_each_row_by_its_own_length():
    config = read_config({**hf.SIZES, "model_type": "llama", "rope_parameters": dict(ROPES["dynamic"])})
    positions = jnp.broadcast_to(jnp.arange(200), (2, 200))
    both = tables(config.rope, 16, positions, jnp.asarray([130, 200]))
    for row, length in enumerate((130, 200)):
        alone = tables(config.rope, 16, positions[:1], jnp.asarray([length]))
        np.testing.assert_array_equal(both[0][row], alone[0][0])
    assert np.abs(np.asarray(both[0][0] - both[0][1])).max() > 0.1


@pytest.mark.parametrize(
    ("factors", "settings", "most"),
    [({**FACTORS, "rope": ROPE_TYPES}, TYPES_PAIRWISE, 35), (FACTORS, PAIRWISE, 60)],
    ids=["rope types", "ropes"],
)
def test_pairwise_meets_every_pair(factors, settings, most):
    for one, other in itertools.combinations(factors, 2):
        met = {(str(setting[one]), str(setting[other])) for setting in settings}
        assert len(met) == len(factors[one]) * len(factors[other])
    assert len(settings) < most
