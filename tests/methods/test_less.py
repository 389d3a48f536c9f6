"""LESS against a simulation in float64 that holds every token."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import LESS, StreamingLLM
from tests.support.methods import B, G, H, K, T, layer, prompt_of

SINKS, ROOM, LATER, HIDDEN, R = 4, 10, 6, 12, 5
LENGTHS = np.asarray([34, 8], np.int32)  # the second row evicts only later


def parts(scale=1.0):
    rng = np.random.default_rng(4)
    shapes = {"q_in": (K, G, H, HIDDEN), "q_out": (K, G, HIDDEN, R), "k_in": (K, H, HIDDEN), "k_out": (K, HIDDEN, R)}
    made = {name: rng.standard_normal(shape) / np.sqrt(shape[-2]) for name, shape in shapes.items()}
    made["mix"] = rng.standard_normal((K, R, R))
    return made | {name: scale * rng.uniform(0.5, 2, (K, R)) for name in ("scale", "mix_scale")}


def method_with(parts):
    return LESS(ROOM).with_parts({name: jnp.asarray(x, jnp.float32) for name, x in parts.items()})


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def phi(p, head, group, q):
    return np.abs(gelu(gelu(q @ p["q_in"][head, group]) @ p["q_out"][head, group]))


def psi(p, head, k):
    u = np.abs(p["scale"][head]) * gelu(gelu(k @ p["k_in"][head]) @ p["k_out"][head])
    return np.abs(u + (u @ p["mix"][head]) * p["mix_scale"][head])


def follow(method):
    """The state after the prompt, the outputs of later tokens, and the state after these."""
    q, k, v = layer()
    prompt = prompt_of(k, v, LENGTHS)
    first = state = method.compress(prompt, None, method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H))
    outputs = []
    for step in range(LATER):
        at = LENGTHS + step
        token = (jnp.asarray(np.stack([x[b, :, at[b]] for b in range(B)])) for x in (q, k, v))
        out, state = method.step(state, *token, jnp.asarray(at))
        outputs.append(np.asarray(out))
    return first, np.stack(outputs), state


def test_later_tokens_read_the_kept_ones_and_the_memory_of_all_others():
    p = parts()
    q, k, v = (x.astype(np.float64) for x in layer())
    _, outputs, _ = follow(method_with(p))
    for b in range(B):
        for step in range(LATER):
            t = LENGTHS[b] + step
            kept = [j for j in range(t + 1) if j < SINKS or j >= t - (ROOM - SINKS)]
            others = [j for j in range(t) if j not in kept]
            for head in range(K):
                for group in range(G):
                    query = q[b, head, t, group]
                    weights = np.exp(k[b, head, kept] @ query / math.sqrt(H))
                    memory = psi(p, head, k[b, head, others]) @ phi(p, head, group, query)
                    out = weights @ v[b, head, kept] + memory @ v[b, head, others]
                    out /= weights.sum() + memory.sum()
                    assert_allclose(outputs[step, b, head, group], out, rtol=2e-4, atol=2e-4)


def test_the_memory_does_not_depend_on_when_tokens_were_evicted():
    method, (_, k, v) = method_with(parts()), layer()
    _, _, after = follow(method)
    prompt = prompt_of(k, v, LENGTHS + LATER)
    at_once = method.compress(prompt, None, method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H))
    assert float(np.abs(at_once.total).min()) > 0
    assert_allclose(after.values, at_once.values, rtol=1e-4, atol=1e-4)
    assert_allclose(after.total, at_once.total, rtol=1e-4, atol=1e-5)
    assert_allclose(after.slots.k, at_once.slots.k)


@pytest.mark.parametrize(("scale", "same"), [(1e-6, True), (1.0, False)])
def test_an_empty_memory_changes_nothing(scale, same):
    _, outputs, _ = follow(method_with(parts(scale)))
    _, expected, _ = follow(StreamingLLM(ROOM))
    difference = np.abs(outputs - expected).max()
    assert difference < 1e-4 if same else difference > 0.1


def test_a_share_of_the_bytes_pays_for_the_memory():
    method = method_with(parts())
    by_share = LESS(0.5).with_parts(method.arrays)
    memory = 4 * R * (H + 1) // (8 * H)
    assert by_share.slots(40, 8 * H) == StreamingLLM(0.5).slots(40, 8 * H) - memory
    assert method.slots(40, 8 * H) == ROOM
