"""What holds for every cache method: a large budget is dense, rows are independent, bytes are as predicted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from razor_jax.methods import METHODS
from razor_jax.methods.attention_predictor import Selectable
from razor_jax.methods.csr import Codes
from razor_jax.methods.engine import Kept
from razor_jax.methods.pool import Pool
from razor_jax.methods.slots import Slots
from tests.support import tiny
from tests.support.methods import follow, make, prefill

LENGTHS = (50, 20, 37)
BUDGET = 0.5
# A method of each kind in the quick suite: every one compiles seven programs.
QUICK = ("snapkv", "h2o", "adakv", "kvzip")
_STATES = Pool | Slots | Selectable | Codes
every_method = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
# The slot of a token is its position where a method selects, and it holds everything whatever its budget.
every_evicting_method = pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, method in METHODS.items()
        if method.kind != "selects"
    ],
)
TOKENS = np.stack([tiny.prompt(4, seed=row) for row in range(len(LENGTHS))])


@functools.cache
def read(name: str, lengths=LENGTHS, budget=BUDGET):
    return prefill(make(name, budget), lengths)


@functools.cache
def dense():
    logits, cache = prefill(None, LENGTHS)
    return logits, follow(cache, TOKENS)[0]


def change_slots(cache, change, positional=True):
    """The cache with `change(x [B, K, S, …], valid [B, K])` applied to all that a slot holds; a pool has K = 1.

    Slots whose number is a position are only changed if `positional`.
    """

    def of(state):
        if isinstance(state, Pool):
            changed = {n: change(getattr(state, n)[:, None], state.valid[:, None])[:, 0] for n in ("k", "v", "owner")}
            return state.replace(**changed)
        if isinstance(state, Selectable):
            length = jnp.broadcast_to(state.length[:, None], state.k.shape[:2])
            return state.replace(k=change(state.k, length), v=change(state.v, length))
        if isinstance(state, Codes):
            coded = jnp.broadcast_to(state.coded[:, None], state.newest.valid.shape)
            names = ("k_atoms", "k_weights", "v_atoms", "v_weights") if positional else ()
            changed = {name: change(getattr(state, name), coded) for name in names}
            return state.replace(newest=of(state.newest), **changed)
        if not isinstance(state, Slots):
            return state  # an array that is no slot's
        fields = {name: getattr(state, name) for name in ("k", "v", "score", "position")}
        return state.replace(**{name: change(x, state.valid) for name, x in fields.items() if x is not None})

    def of_layer(node):
        if not isinstance(node, Kept):
            return node
        return node.replace(state=jax.tree.map(of, node.state, is_leaf=lambda x: isinstance(x, _STATES)))

    return cache.replace(layers=tuple(tuple(map(of_layer, layer)) for layer in cache.layers))


@every_method
def test_a_budget_of_all_tokens_is_dense_attention(name):
    first, cache = read(name, budget=64)
    logits, _ = follow(cache, TOKENS)
    assert_allclose(first, dense()[0], atol=2e-5, rtol=2e-5)
    assert_allclose(logits, dense()[1], atol=1e-4, rtol=1e-4)


@every_method
def test_half_the_budget_is_not_dense_attention(name):
    # Otherwise the test above could not fail.
    assert np.abs(np.asarray(follow(read(name)[1], TOKENS)[0]) - np.asarray(dense()[1])).max() > 1e-2


@every_evicting_method
def test_the_order_of_slots_does_not_matter(name):
    _, cache = read(name)

    def turn(x, valid):
        # Turns the used slots of each head by one.
        slots = jnp.arange(x.shape[2], dtype=jnp.int32)
        source = jnp.where(slots < valid[..., None], (slots + 1) % jnp.maximum(valid[..., None], 1), slots)
        return jnp.take_along_axis(x, source.reshape(*source.shape, *(1,) * (x.ndim - 3)), axis=2)

    before, after = (follow(c, TOKENS[:, :1])[0] for c in (cache, change_slots(cache, turn, positional=False)))
    assert_allclose(after, before, atol=2e-5, rtol=2e-5)


@every_method
def test_what_an_unused_slot_holds_does_not_matter(name):
    _, cache = read(name)

    def poison(x, valid):
        used = jnp.arange(x.shape[2], dtype=jnp.int32) < valid[..., None]
        used = used.reshape(*used.shape, *(1,) * (x.ndim - 3))
        return jnp.where(used, x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -7)

    poisoned = change_slots(cache, poison)
    assert any(np.isnan(np.asarray(x)).any() for x in jax.tree.leaves(poisoned.layers))
    assert_allclose(follow(poisoned, TOKENS)[0], follow(cache, TOKENS)[0], atol=1e-6, rtol=1e-6)


@every_method
def test_a_row_does_not_depend_on_its_batch_mates(name):
    first, cache = read(name)
    together, _ = follow(cache, TOKENS)
    alone, one = read(name, LENGTHS[2:])
    assert_allclose(first[2], alone[0], atol=2e-5, rtol=2e-5)
    assert_allclose(together[2], follow(one, TOKENS[2:])[0][0], atol=5e-5, rtol=5e-5)


@every_method
def test_predicted_bytes_are_allocated_bytes(name):
    _, cache = read(name)
    assert cache.spec.kv_bytes(len(LENGTHS)) == sum(x.nbytes for x in jax.tree.leaves(cache.layers))


@every_evicting_method
def test_the_bytes_of_a_prompt_are_within_a_slot_of_its_budget(name):
    _, cache = read(name, (64,))
    spec, method = cache.spec, cache.spec.method
    heads, token = spec.heads.num_layers * spec.heads.num_kv_heads, 2 * spec.head_dim * 4
    most = token + METHODS[name].slot_extras + 2 * 4  # a slot more, and two numbers a head
    assert 0 <= method.prompt_bytes(spec, 64) - BUDGET * 64 * heads * token <= heads * most


@every_method
def test_an_inactive_row_stays_bit_for_bit(name):
    _, cache = read(name)
    _, after = follow(cache, TOKENS, np.asarray([4, 0, 2], np.int32))
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True):
        assert_array_equal(new[1], old[1])
    assert after.length.tolist() == [54, 20, 39]


@every_method
def test_tokens_of_one_call_equal_calls_of_one_token(name):
    _, cache = read(name)
    together, end = follow(cache, TOKENS)
    for index in range(TOKENS.shape[1]):
        logits, cache = follow(cache, TOKENS[:, index : index + 1])
        assert_allclose(logits[:, 0], together[:, index], atol=5e-5, rtol=5e-5)
    for one, other in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(end.layers), strict=True):
        assert_allclose(one, other, atol=2e-5, rtol=2e-5)
