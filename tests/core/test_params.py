"""Params and what the functional core refuses: splits, foreign weights, caches and inputs of another shape."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax import HeadSplit, Params, functional, with_heads
from razor_jax.params import abstract_weights, architecture_fingerprint, weights_fingerprint

from ..support.small import CONFIG, NONE, RULE, SPLIT, B, T, layers, new_cache, params, text, weights


def test_a_split_changes_where_heads_are_held_and_nothing_else():
    plain = Params.from_flax({"params": weights()}, CONFIG)
    back = with_heads(with_heads(params(), HeadSplit(((0,), (1,)), 2)), None)
    for a, b in zip(jax.tree.leaves(back.weights), jax.tree.leaves(plain.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    assert back.heads is None
    assert weights_fingerprint(params()) == weights_fingerprint(plain)
    q = params().weights["blocks_0"]["q"]["kernel"]
    np.testing.assert_array_equal(q[:, 0], weights()["blocks_0"]["q"]["kernel"][:, 1])


def test_a_split_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"3 layers × 2 KV heads.*2 × 2"):
        with_heads(params(), HeadSplit.none(3, 2))
    with pytest.raises(TypeError, match="split='auto': give a HeadSplit or None"):
        getattr(with_heads, "__wrapped__", with_heads)(params(), "auto")  # without the type checker of tests
    with pytest.raises(ValueError, match="another architecture"):
        with_heads(params(), HeadSplit(((0,), ()), 2, architecture="0" * 64))
    right = HeadSplit(((0,), ()), 2, architecture=architecture_fingerprint(CONFIG), weights="0" * 64)
    with pytest.warns(UserWarning, match="other weights"):
        with_heads(params(), right)


def test_from_flax_lists_every_problem():
    tree = dict(weights())
    tree["norm"] = {"scale": np.zeros(3, np.float32)}
    tree["extra"] = np.zeros(1, np.float32)
    tree["blocks_1"] = {k: v for k, v in tree["blocks_1"].items() if k != "gate"}
    tree["embedding"] = {"embedding": tree["embedding"]["embedding"].astype(np.int32)}
    with pytest.raises(ValueError, match=r"(?s)missing blocks_1/gate.*unexpected extra.*norm/scale has shape \(3,\)"):
        Params.from_flax({"params": tree}, CONFIG)
    with pytest.raises(ValueError, match="embedding/embedding has type int32, expected floating point"):
        Params.from_flax({"params": tree}, CONFIG)


def test_frozen_variables_give_the_same_pytree():
    frozen = flax.core.freeze({"params": weights()})
    made, plain = Params.from_flax(frozen, CONFIG), Params.from_flax(weights(), CONFIG)
    assert jax.tree.structure(made) == jax.tree.structure(plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, r"batch=0.*at least 1"),
        ({"batch": -2}, r"batch=-2"),
        ({"capacity": 0}, r"capacity=0.*at least 1"),
        ({"split": None}, r"no head split.*with_heads"),
        ({"prompt_lengths": jnp.array([1, 2])}, r"prompt_lengths.*\(2,\).*batch.*3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_init_cache_refuses(arguments, message):
    arguments = {"batch": 3, "capacity": 10, "split": SPLIT, "razor": RULE} | arguments
    given = params(arguments.pop("split"))
    with pytest.raises(ValueError, match=message):
        functional.init_cache(given, **arguments)


@pytest.mark.parametrize(
    ("tokens", "lengths", "logits", "message"),
    [
        (text(T), np.ones(B, np.int32), "first", r"logits='first'.*'last', 'all' or 'none'"),
        (text(T)[0], np.ones(B, np.int32), "last", r"tokens \(12,\).*\[B, T\]"),
        (text(T)[:2], np.ones(B, np.int32), "last", r"tokens \(2, 12\).*B = 3"),
        (text(T), np.ones(2, np.int32), "last", r"lengths \(2,\).*B = 3"),
        (text(T), np.ones((B, 1), np.int32), "last", r"lengths \(3, 1\)"),
        (text(T)[:, :0], np.zeros(B, np.int32), "last", r"tokens \(3, 0\)"),
        (text(T).astype(np.float32), np.ones(B, np.int32), "last", r"float32.*int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_extend_refuses(tokens, lengths, logits, message):
    with pytest.raises((ValueError, TypeError), match=message):
        functional.extend(params(), new_cache(), tokens, lengths, logits=logits)


@pytest.mark.parametrize("razor", [None, RULE])
@pytest.mark.usefixtures("unchecked")
def test_a_cache_of_another_split_or_model_is_refused(razor):
    call = text(T), np.ones(B, np.int32)
    other = HeadSplit(((0,), (0,)), 2)  # as many heads, but others
    for split in (NONE, other):
        with pytest.raises(ValueError, match=r"another head split.*same params"):
            functional.extend(params(), new_cache(split, razor), *call)
    config = layers(2)
    alien = Params(abstract_weights(config), config, SPLIT)
    cache = jax.eval_shape(lambda: functional.init_cache(alien, batch=B, capacity=10, razor=razor))
    with pytest.raises(ValueError, match=r"\(2, 2, 32\).*\(2, 2, 16\)"):
        functional.extend(params(), cache, *call)
