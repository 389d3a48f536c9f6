"""Baichuan2 13B's layout against a literal torch block: ALiBi, q, k and v in one tensor, a normalised output head."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from razor_jax import functional
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.kernels import attention
from razor_jax.models import read_config, write_config
from razor_jax.models.alibi import slopes

from ..support import baichuan
from ..support.baichuan import D, L, V

PROMPT, STEPS = 48, 64
LONG = PROMPT + STEPS
torch.set_num_threads(1)


def _published_slopes(n: int) -> list[float]:
    """The recursion of the ALiBi paper's code."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return _published_slopes(below) + _published_slopes(2 * below)[0::2][: n - below]


def _logits(w: dict[str, torch.Tensor], heads: int, tokens) -> np.ndarray:
    """float32 logits [T, V] of one row, with full attention maps and every bias computed."""

    def norm(x, name):
        return w[name] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    T, H = len(tokens), D // heads
    x = w["model.embed_tokens.weight"][torch.from_numpy(np.asarray(tokens)).long()]
    position = torch.arange(T)
    bias = torch.tensor(_published_slopes(heads))[:, None, None] * (position[None, :] - position[:, None])
    bias = bias.masked_fill(position[None, :] > position[:, None], float("-inf"))
    for i in range(L):
        at = f"model.layers.{i}."
        packed = norm(x, at + "input_layernorm.weight") @ w[at + "self_attn.W_pack.weight"].T
        q, k, v = packed.unflatten(-1, (3, heads, H)).permute(1, 2, 0, 3)
        p = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(H) + bias, dim=-1)
        x = x + (p @ v).transpose(0, 1).reshape(T, D) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(y @ w[at + "mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    head = torch.nn.functional.normalize(w["lm_head.weight"])
    return (norm(x, "model.norm.weight") @ head.T).numpy()


@pytest.mark.parametrize("heads", [4, 6, 1])
def test_logits_and_greedy_tokens_equal_torch(tmp_path, heads, record_property):
    weights = baichuan.write(tmp_path, heads)
    params = checkpoint.read(tmp_path)
    assert (params.config.alibi, params.config.norm_head) == (True, True)
    lengths = np.asarray([PROMPT, 17, 1], np.int32)
    tokens = np.random.default_rng(0).integers(0, V, (3, LONG), np.int32)
    cache = functional.init_cache(params, batch=3, capacity=LONG, razor=None)
    prompt, cache = jax.jit(functional.extend, static_argnums=4)(params, cache, tokens[:, :PROMPT], lengths, "all")
    logits = np.asarray(prompt)[np.arange(3), lengths - 1]
    decode, steps = jax.jit(functional.decode), []
    for step in range(STEPS):
        steps.append(np.asarray(logits))
        chosen = steps[-1].argmax(-1).astype(np.int32)
        tokens[np.arange(3), lengths + step] = chosen
        logits, cache = decode(params, cache, chosen)
    worst = 0.0
    for b, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        want = _logits(weights, heads, row[: length + STEPS - 1])
        ours = np.concatenate([np.asarray(prompt)[b, : length - 1], np.stack(steps)[:, b]])
        np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(ours[length - 1 :].argmax(-1), want[length - 1 :].argmax(-1))
        worst = max(worst, float(np.abs(ours - want).max()))
    record_property("largest logit error against torch, baichuan", worst)


def test_the_order_of_calls_changes_nothing(tmp_path):
    """A prefill longer than CHUNK, small calls and single tokens see the same distances."""
    baichuan.write(tmp_path, 6)
    params = checkpoint.read(tmp_path)
    tokens = np.random.default_rng(1).integers(0, V, (1, 300), np.int32)
    cache = functional.init_cache(params, batch=1, capacity=300, razor=None)
    want, _ = functional.extend(params, cache, tokens, np.asarray([300], np.int32))
    cache = functional.init_cache(params, batch=1, capacity=300, razor=None)
    for first, last in ((0, 270), (270, 277), (277, 299), (299, 300)):
        got, cache = functional.extend(params, cache, tokens[:, first:last], np.asarray([last - first], np.int32))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_a_saved_model_is_read_back_exactly(tmp_path, format):
    weights = baichuan.write(tmp_path / "a", 6)
    params = checkpoint.read(tmp_path / "a")
    checkpoint.save(params, tmp_path / "b", format)
    back = checkpoint.read(tmp_path / "b")
    assert back.config == params.config
    jax.tree.map(np.testing.assert_array_equal, back.weights, params.weights)
    if format == "huggingface":
        saved = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
        assert saved.keys() == weights.keys()
        for name, x in weights.items():
            np.testing.assert_array_equal(saved[name].numpy(), x.numpy(), err_msg=name)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 32, 40, 64, 71])
def test_slopes_are_the_published_ones(n):
    np.testing.assert_allclose(slopes(n), _published_slopes(n), rtol=2e-7)


def test_which_baichuan_is_read():
    config = read_config(baichuan.config(6))
    assert read_config(write_config(config)) == config
    assert not read_config(baichuan.config(6) | {"vocab_size": 64_000}).norm_head  # Baichuan 1
    for field, value in (("max_position_embeddings", 4096), ("hidden_size", 4096), ("rope_theta", 1e4)):
        with pytest.raises(ValueError, match=f"{field}=.*7B, with rotary embedding"):
            read_config(baichuan.config(6) | {field: value})
    with pytest.raises(ValueError, match="one KV head per query head"):
        read_config(baichuan.config(6) | {"num_key_value_heads": 2})
    with pytest.raises(ValueError, match="does not tie its output head"):
        read_config(baichuan.config(6) | {"tie_word_embeddings": True})


@pytest.mark.parametrize("lengths", [[700, 300], [1, 0]])
@pytest.mark.parametrize("far", [0, 1_000_000])
def test_biases_equal_float64_far_out(lengths, far):
    """Slots in any order, positions up to a million, NaN in everything that must not be read."""
    B, K, G, T, S, H = 2, 2, 3, 2, 700, 8
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, K, T * G, H), (B, K, S, H), (B, K, S, H)))
    for b in range(B):
        k[b, :, lengths[b] :] = v[b, :, lengths[b] :] = np.nan
    keys = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32) + far
    queries = np.asarray([[S, S + 1]] * B, np.int32) + far
    slope = rng.uniform(0.01, 0.5, (K, G)).astype(np.float32)
    alibi = attention.Alibi(*map(jnp.asarray, (slope, queries, keys)))
    out = attention.attend(*map(jnp.asarray, (q, k, v)), jnp.asarray(lengths), scale=H**-0.5, alibi=alibi)
    want = np.zeros((B, K, T * G, H))
    for b, h, r in np.ndindex(B, K, T * G):
        n = lengths[b]
        if n:
            distance = queries[b, r // G].astype(np.int64) - keys[b, :n]
            logits = (
                k[b, h, :n].astype(np.float64) @ q[b, h, r] * H**-0.5 - slope[h, r % G].astype(np.float64) * distance
            )
            p = np.exp(logits - logits.max())
            want[b, h, r] = p @ v[b, h, :n].astype(np.float64) / p.sum()
    assert np.abs(np.asarray(out) - want).max() <= 2e-6 * np.abs(want).max()


def test_pallas_refuses_biases():
    x = jnp.zeros((1, 1, 32, 128))
    for name in ("pallas_tpu", "pallas_gpu", "mosaic_gpu"):
        assert attention.unsupported(name, x, x, x, alibi=True) == "ALiBi runs on XLA"
