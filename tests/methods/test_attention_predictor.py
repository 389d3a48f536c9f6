"""AttentionPredictor against a simulation in float64 that holds the whole map, and its network against torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from razor_jax.methods import AttentionPredictor
from razor_jax.methods.attention_predictor import BLOCK, EVERY, HISTORY, predict
from tests.support.methods import B, G, H, K, T, attention_map, layer, observe, prompt_of, random_parts

LENGTHS, LATER = np.asarray([34, 21], np.int32), 6
BLOCKS = -(-T // BLOCK)


def mean_of_history():
    """A network that predicts the mean of the rows: weights are at least 0, so its rectifiers do nothing."""
    first, second = np.zeros((3, 3, 1, 2), np.float32), np.zeros((3, 3, 2, 2), np.float32)
    first[1, 1, 0, 0] = second[1, 1, 0, 0] = 1
    last = np.asarray([[1.0], [0.0]], np.float32)
    biases = {"first_bias": np.zeros(2), "second_bias": np.zeros(2), "last_bias": np.zeros(1)}
    parts = {"first": first, "second": second, "last": last} | biases
    return {name: jnp.asarray(x, jnp.float32) for name, x in parts.items()}


def pooled(weights):
    """The largest weight of each block, of weights [..., T]."""
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, BLOCKS * BLOCK - weights.shape[-1])])
    return padded.reshape(*weights.shape[:-1], BLOCKS, BLOCK).max(-1)


def read_prompt(budget, **options):
    q, k, v = layer()
    prompt = prompt_of(k, v, LENGTHS)
    method = AttentionPredictor(budget, **options).with_parts(mean_of_history())
    room, slots = method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H)
    return method, method.compress(prompt, observe(method, q, prompt), room, slots)


def test_the_history_has_the_pooled_newest_rows_of_the_map():
    _, state = read_prompt(16)
    weights = attention_map(*layer()[:2])
    for b, n in enumerate(LENGTHS):
        newest = np.asarray(state.history[b], np.float64)[..., HISTORY - n :, :]
        assert_allclose(newest, pooled(weights[b, :, :, :n, :n]), rtol=2**-7)
        assert not np.asarray(state.history[b])[..., : HISTORY - n, :].any()


@pytest.mark.parametrize("options", [{"sinks": 0, "local": 0}, {"sinks": 16, "local": 0}])
@pytest.mark.parametrize("budget", [16, 32])
def test_later_tokens_read_the_blocks_that_the_history_predicts(budget, options):
    q, k, v = (x.astype(np.float64) for x in layer())
    method, state = read_prompt(budget, **options)
    history = np.asarray(state.history, np.float64)
    chosen_ever = set()
    for step in range(LATER):
        at = LENGTHS + step
        out, others = np.zeros((B, K, G, H)), [np.zeros((B, K, G, H)), np.zeros((B, K, G)), np.zeros((B, K, G))]
        for b, n in enumerate(LENGTHS):
            later = np.arange(n, at[b] + 1)
            for head in range(K):
                score = history[b, head].mean(1).max(0)
                score[-(-n // BLOCK) :] = -np.inf
                if options["sinks"]:
                    score[0] = np.inf
                blocks = np.argsort(-score, kind="stable")[: budget // BLOCK]
                chosen_ever.add(tuple(blocks))
                read = [j for j in range(n) if j // BLOCK in blocks]
                for group in range(G):
                    logits = k[b, head, : at[b] + 1] @ q[b, head, at[b], group] / np.sqrt(H)
                    weights = np.exp(logits)
                    kept = [*read, *later]
                    total = weights[kept].sum()
                    out[b, head, group] = weights[kept] @ v[b, head, kept] / total
                    others[0][b, head, group] = weights[later] @ v[b, head, later]
                    others[2][b, head, group] = weights[later].sum()
                    whole = step % EVERY == EVERY - 1
                    row = np.where(whole | np.isin(np.arange(n), read), weights[:n] / total, 0)
                    row = np.asarray(jnp.asarray(pooled(row), jnp.bfloat16), np.float64)
                    history[b, head, group] = np.concatenate([history[b, head, group, 1:], row[None]])
        token = jnp.asarray(np.stack([layer()[0][b, :, at[b]] for b in range(B)]))
        seen, state = method.follow(state, token, tuple(jnp.asarray(x, jnp.float32) for x in others))
        assert_allclose(seen[0] / seen[2][..., None], out, atol=2e-4)
        assert_allclose(np.asarray(state.history, np.float64), history, rtol=2**-6, atol=1e-5)
    if budget == 16 and not options["sinks"]:
        assert len(chosen_ever) > 1


def test_the_network_is_two_convolutions_a_mean_and_a_map():
    parts = random_parts("predictor").of_layer(0)
    history = np.random.default_rng(0).uniform(size=(2, 3, HISTORY, 9)).astype(np.float32)
    x = torch.from_numpy(history.reshape(6, 1, HISTORY, 9))
    for name in ("first", "second"):
        kernel = torch.from_numpy(np.ascontiguousarray(parts[name].transpose(3, 2, 0, 1)))
        x = torch.relu(torch.nn.functional.conv2d(x, kernel, torch.from_numpy(parts[f"{name}_bias"]), padding=1))
    expected = (x.mean(2).transpose(1, 2) @ torch.from_numpy(parts["last"]))[..., 0] + float(parts["last_bias"][0])
    assert_allclose(predict(parts, jnp.asarray(history)), expected.reshape(2, 3, 9), rtol=1e-4, atol=1e-4)


def test_a_shift_of_the_history_shifts_the_prediction():
    parts = random_parts("predictor").of_layer(0)
    history = np.zeros((HISTORY, 20), np.float32)
    history[:, 6:12] = np.random.default_rng(1).uniform(size=(HISTORY, 6))
    one, other = (np.asarray(predict(parts, jnp.asarray(x))) for x in (history, np.roll(history, 3, axis=1)))
    assert_allclose(other[5:-2], one[2:-5], rtol=1e-4, atol=1e-4)  # away from the borders, whose padding is zero
    assert np.abs(other - one).max() > 0.1


def test_it_says_that_it_holds_everything():
    method, state = read_prompt(16)
    assert state.k.shape == (B, K, BLOCKS * BLOCK, H)
    assert "holds all and reads 16 tokens per step" in method.describe()
