"""CSR's codes against matching pursuit in float64, and what is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from razor_jax.methods import CSR
from razor_jax.methods.csr import decode, pursue, rotate, unrotate
from razor_jax.models.config import ModelConfig, Rope
from tests.support.methods import CONFIG, LENGTHS, B, G, H, K, T, attention_map, layer, prompt_of

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((30, H)).astype(np.float32)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


DICTIONARY = unit(RNG.standard_normal((50, H)))


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def pursuit(x, dictionary, count):
    """Matching pursuit of one vector in float64: its approximations after each atom."""
    left, found, steps = x.astype(np.float64), np.zeros(len(x)), []
    for _ in range(count):
        products = dictionary.astype(np.float64) @ left
        atom = int(np.argmax(np.abs(products)))
        part = bfloat16(products[atom]) * dictionary[atom]
        left, found = left - part, found + part
        steps.append(found)
    return steps


def test_codes_are_those_of_matching_pursuit_and_never_get_worse():
    steps = np.asarray([pursuit(x, DICTIONARY, 5) for x in VECTORS])
    last = np.linalg.norm(VECTORS, axis=-1)
    for count in range(1, 6):
        found = np.asarray(decode(*pursue(jnp.asarray(VECTORS), DICTIONARY, count), DICTIONARY))
        assert_allclose(found, steps[:, count - 1], atol=1e-5)
        left = np.linalg.norm(VECTORS - found, axis=-1)
        assert (left < last).all()
        last = left


def test_a_dictionary_that_has_the_vectors_needs_one_atom():
    atoms, weights = pursue(jnp.asarray(-VECTORS), unit(VECTORS), 1)
    assert_array_equal(atoms[:, 0], np.arange(len(VECTORS)))
    assert_allclose(decode(atoms, weights, unit(VECTORS)), -VECTORS, rtol=2**-8, atol=1e-6)


def test_an_orthonormal_dictionary_needs_as_many_atoms_as_channels():
    basis = np.linalg.qr(RNG.standard_normal((H, H)))[0].astype(np.float32)
    found = decode(*pursue(jnp.asarray(VECTORS), basis, H), basis)
    assert_allclose(found, VECTORS, atol=2**-8 * np.abs(VECTORS).max())


YARN = Rope(kind="yarn", factor=4.0, original_max_position=32, attention_factor=1.2)


@pytest.mark.parametrize("rope", [Rope(), YARN])
def test_keys_are_coded_without_their_rotation(rope):
    config = ModelConfig("llama", 61, 32, 48, 2, K * G, K, H, 512, rope)
    k, lengths = layer()[1], jnp.asarray(LENGTHS)
    plain = unrotate(jnp.asarray(k), config, lengths)
    assert np.abs(np.asarray(plain) - k)[:, :, 1:].max() > 0.5
    assert_allclose(rotate(plain, config, lengths), k, atol=1e-5)


@pytest.mark.parametrize("budget", [0.4, 12])
def test_attention_reads_decoded_tokens_and_the_newest(budget):
    values = unit(RNG.standard_normal((40, H // 2)))
    method = CSR(budget).with_parts({"keys": DICTIONARY, "values": values})
    q, k, v = layer()
    prompt = prompt_of(k, v)
    room, slots = method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H)
    state = method.compress(prompt, None, room, slots)
    s = 2 if isinstance(budget, float) else 8  # 0.4 of 64 bytes are 3 atoms of 8 bytes
    assert state.k_atoms.shape == (B, K, T - slots, s)
    for b, n in enumerate(LENGTHS):
        coded = n - int(room[b])
        assert int(state.coded[b]) == coded
        assert coded > 0
        plain = np.asarray(unrotate(jnp.asarray(k), CONFIG, prompt.lengths))[b]
        near_k, near_v = plain.astype(np.float64).copy(), v[b].astype(np.float64).copy()
        for head in range(K):
            for j in range(coded):
                near_k[head, j] = pursuit(plain[head, j], DICTIONARY, s)[-1]
                near_v[head, j] = np.concatenate([pursuit(x, values, s // 2)[-1] for x in v[b, head, j].reshape(2, -1)])
        near_k = np.array(rotate(jnp.asarray(near_k[None], jnp.float32), CONFIG, prompt.lengths[b : b + 1]))[0]
        near_k[:, coded:] = k[b, :, coded:]
        weights = attention_map(q[b : b + 1, :, :n], near_k[None, :, :n])[0, :, :, n - 1]
        expected = np.einsum("kgj,kjh->kgh", weights, near_v[:, :n])
        acc, _, total = method.read(state, jnp.asarray(q[:, :, n - 1]), H**-0.5, "xla")
        assert_allclose((acc / total[..., None])[b], expected, atol=2e-4)


def test_what_an_unused_code_holds_does_not_matter():
    method = CSR(0.4).with_parts({"keys": DICTIONARY, "values": unit(RNG.standard_normal((40, H // 2)))})
    q, k, v = layer()
    prompt = prompt_of(k, v)
    state = method.compress(prompt, None, method.room(prompt.lengths, 8 * H), method.slots(T, 8 * H))
    unused = (np.arange(state.k_atoms.shape[2]) >= np.asarray(state.coded)[:, None])[:, None, :, None]
    assert unused.any()
    poisoned = state.replace(
        k_atoms=jnp.where(unused, -7, state.k_atoms),
        v_atoms=jnp.where(unused, 9999, state.v_atoms),
        k_weights=jnp.where(unused, jnp.nan, state.k_weights),
        v_weights=jnp.where(unused, jnp.nan, state.v_weights),
    )
    one, other = (method.read(x, jnp.asarray(q[:, :, 20]), H**-0.5, "xla") for x in (state, poisoned))
    jax.tree.map(assert_array_equal, one, other)


def test_a_budget_without_bytes_for_two_atoms_is_refused():
    with pytest.raises(ValueError, match=r"CSR with budget=0.05: 2 atoms take 6.2% of a token's bytes"):
        CSR(0.05).slots(100, 256)
    with pytest.raises(ValueError, match="atoms=3: give an even number"):
        CSR(0.2, atoms=3)
    # The bytes of six atoms per key and per value, and the rest for 3.2 % of the tokens.
    assert CSR(0.213).atoms_for(256) == 6
    assert CSR(0.213).slots(2001, 256) == 63
