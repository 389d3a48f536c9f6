"""Theorem 1 of RazorAttention: how far ALiBi heads look, and the cache that is cut to it."""

from __future__ import annotations

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax import HeadSplit, Params, RazorConfig, functional, with_heads
from razor_jax import cache as kv
from razor_jax.attention import attend
from razor_jax.cli import heads as cli_heads
from razor_jax.heads import alibi, store
from razor_jax.models import Block, ModelConfig
from razor_jax.models.alibi import slopes
from razor_jax.params import abstract_weights, architecture_fingerprint

from ..support import tiny

D, N, H, V = 32, 8, 8, 97
LONGEST, LENGTHS = 200, (480, 450, 30)
RAZOR = RazorConfig()
NO_ROPE = (jnp.zeros((1, 1, 1)),) * 2  # a block of an ALiBi model takes it and does not read it


def _config(**fields) -> ModelConfig:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_layers": 2, "num_heads": N}
    sizes |= {"num_kv_heads": N, "head_dim": H, "max_position_embeddings": LONGEST}
    return ModelConfig("baichuan", **(sizes | fields), alibi=True, norm_head=True)


@functools.cache
def _params(query_scale: float = 0.02, **fields) -> Params:
    """Random weights, with queries and keys so small that theorem 1 cuts at least half of the heads."""
    rng, config = np.random.default_rng(0), _config(**fields)

    def draw(path, a):
        name = path[-2].key
        if name.endswith("norm"):
            return np.asarray(rng.lognormal(0.0, 0.5, a.shape), np.float32)
        return np.asarray((query_scale if name in ("q", "k") else 0.3) * rng.normal(size=a.shape), np.float32)

    weights = jax.tree_util.tree_map_with_path(draw, abstract_weights(config))
    return Params.from_flax({"params": weights}, config)


def _run(params, razor, calls):
    """float32 logits [calls, B, V] of the last token of each call, and the cache."""
    rng = np.random.default_rng(1)
    cache = functional.init_cache(params, batch=len(LENGTHS), capacity=520, razor=razor)
    left, out = np.asarray(LENGTHS), []
    extend = jax.jit(functional.extend)
    for T in calls:
        new = np.minimum(T, left).astype(np.int32)
        left = left - new
        logits, cache = extend(params, cache, rng.integers(0, V, (len(LENGTHS), T), np.int32), new)
        out.append(np.asarray(logits))
    return np.stack(out), cache


@pytest.mark.parametrize("groups", [1, 4])
def test_a_cache_cut_by_scope_answers_as_the_whole_one(groups, record_property):
    """Ragged rows, longer than twice every cut scope, in one large call, small calls and single tokens."""
    plain = _params()
    split = alibi.split(plain, groups=groups)
    params = with_heads(plain, split)
    cut = [scope for layer in split.scopes for scope in layer if scope]
    assert len(cut) >= N  # of 2·N heads
    assert 2 * max(cut) < max(LENGTHS)
    calls = [300, *[17] * 8, *[1] * 44]
    assert sum(calls) == max(LENGTHS)
    want, dense = _run(params, None, calls)
    got, cache = _run(params, RAZOR, calls)
    error = np.abs(got - want).max() / np.abs(want).max()
    record_property(f"logits of a cache cut to {groups} ALiBi scopes a layer, error against dense", float(error))
    assert 1e-9 < error < 10 * alibi.EPSILON  # as measured; the theoretical bounds are tested below
    assert cache.spec.kv_bytes(len(LENGTHS)) == kv.allocated_bytes(cache) < kv.allocated_bytes(dense)
    assert all(len({g.scope for g in layer}) == len(layer) <= groups + 1 for layer in cache.layers)
    np.testing.assert_array_equal(cache.dropped, np.maximum(np.asarray(LENGTHS) - min(cut), 0))


def test_an_8_bit_cut_cache_and_its_growth():
    params = with_heads(_params(), alibi.split(_params()))
    razor = RazorConfig(kv_dtype="int8")
    want, _ = _run(params, None, [240, 240])
    got, cache = _run(params, razor, [240, 240])
    assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()
    assert cache.spec.kv_bytes(len(LENGTHS)) == kv.allocated_bytes(cache)
    # A cache that grows has the same tokens in the same slots as a larger one.
    small = functional.init_cache(params, batch=1, capacity=50, razor=razor)
    tokens = np.random.default_rng(3).integers(0, V, (1, 50), np.int32)
    extend = jax.jit(functional.extend)
    _, small = extend(params, small, tokens, np.asarray([50], np.int32))
    grown = kv.broadcast(small, 1, 90)
    large = functional.init_cache(params, batch=1, capacity=90, razor=razor)
    _, large = extend(params, large, tokens, np.asarray([50], np.int32))
    # Two programs may differ in the last bit of a scale.
    for one, other in zip(jax.tree.leaves(grown), jax.tree.leaves(large), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_a_cut_head_sees_and_what_it_loses(record_property):
    """In one layer a head sees exactly the newest L_h tokens, and the weights of dropped ones are within the bounds."""
    plain = _params()
    split = alibi.split(plain)
    params, T = with_heads(plain, split), 480
    config, order = params.config, split.order(0)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (1, T + 1), np.int32))
    block = functools.partial(Block(config, 0).apply, {"params": params.weights["blocks_0"]})
    x = params.weights["embedding"]["embedding"][tokens]
    q, (k, v) = block(x, NO_ROPE, method="queries"), block(x, NO_ROPE, method="keys_values")
    spec = kv.make_spec(split, H, T + 1, RAZOR, "float32", alibi=True)
    cache = kv.init(spec, 1)
    layer = cache.layers[0]
    for first, last in ((0, 300), (300, 301), (301, T)):
        call, cache = kv.begin(cache, jnp.asarray([last - first]), last - first)
        layer = kv.write(layer, k[:, :, first:last], v[:, :, first:last], call)
    call, _ = kv.begin(cache, jnp.asarray([1]), 1)
    slope = slopes(N)[list(order)]
    out = attend(q[:, :, T:], k[:, :, T:], v[:, :, T:], layer, call, start=0, group_size=1, slopes=slope[:, None])
    exact = [np.asarray(a[0], np.float64) for a in (q, k, v)]
    bound, worst_one, worst_sum = alibi.dropped_weight(plain, split), 0.0, 0.0
    for held, head in enumerate(order):
        qh, kh, vh = (a[held] for a in exact)
        logits = kh @ qh[T] / math.sqrt(H) - float(slope[held]) * np.arange(T, -1, -1)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        scope = split.scopes[0][head] or T + 1
        seen = np.arange(T + 1) >= T - scope  # the newest `scope` cached ones, and the token itself
        kept = (p * seen) @ vh / p[seen].sum()
        assert np.abs(np.asarray(out)[0, held, 0] - kept).max() <= 2e-6 * np.abs(vh).max()
        lost = p[~seen].sum()
        assert lost <= bound[0, head] <= alibi.EPSILON / math.expm1(slope[held])
        assert np.linalg.norm(kept - p @ vh) <= 2 * lost * np.linalg.norm(vh, axis=1).max() + 1e-15
        worst_one, worst_sum = max(worst_one, p[~seen].max(initial=0.0)), max(worst_sum, lost)
    assert 0 < worst_one <= alibi.EPSILON
    record_property("weight of one token past its ALiBi scope", float(worst_one))
    record_property("weight of all tokens past their ALiBi scope", float(worst_sum))
    record_property("bound of the weight of all tokens past their ALiBi scope", float(bound.max()))


def test_the_logit_bound_holds_and_is_reached():
    """No input exceeds M, and the singular vectors reach it: uneven γ and 1/√H are covered, and the bound is tight."""
    params = _params(query_scale=0.3)
    bound = alibi.logit_bound(params)
    rng = np.random.default_rng(4)
    for layer in range(2):
        w = params.weights[f"blocks_{layer}"]
        scale = np.asarray(w["attn_norm"]["scale"], np.float64)
        for head in range(N):
            form = scale[:, None] * np.asarray(w["q"]["kernel"], np.float64)[:, head, 0]
            form = form @ (scale[:, None] * np.asarray(w["k"]["kernel"], np.float64)[:, head]).T
            u = rng.normal(size=(2, 200, D))
            u *= math.sqrt(D) / np.linalg.norm(u, axis=-1, keepdims=True)
            assert np.abs(u[0] @ form @ u[1].T).max() / math.sqrt(H) <= bound[layer, head]
            left, _, right = np.linalg.svd(form)
            # Through the model's projections, in float32.
            x = jnp.asarray(np.stack([left[:, 0], right[0]])[None], jnp.float32) * math.sqrt(D)
            block = functools.partial(Block(params.config, 0).apply, {"params": w})
            q, k = block(x, NO_ROPE, method="queries"), block(x, NO_ROPE, method="keys_values")[0]
            reached = abs(float(q[0, head, 0] @ k[0, head, 1])) / math.sqrt(H)
            np.testing.assert_allclose(reached, bound[layer, head], rtol=1e-4)


def _quoted_scopes(params, epsilon):
    """The theorem as quoted: (2‖W_Q W_Kᵀ‖₂ (‖γ‖² + ‖b‖²) - ln ε) / slope, without √H, with b = 0."""
    w, c = params.weights["blocks_0"], params.config
    q, k = (np.asarray(w[n]["kernel"], np.float64).reshape(c.hidden_size, c.num_heads, c.head_dim) for n in ("q", "k"))
    norms = np.asarray([np.linalg.norm(q[:, h] @ k[:, h].T, 2) for h in range(c.num_heads)])
    energy = np.sum(np.asarray(w["attn_norm"]["scale"], np.float64) ** 2)
    return (2 * norms * energy - math.log(epsilon)) / slopes(c.num_heads)


def test_the_theorem_as_quoted_loses_a_token_that_has_nearly_all_the_weight():
    """With uneven γ, a far token has its energy in one strong channel. Our scope keeps it, the quoted one does not."""
    width, heads = 64, 2
    config = _config(vocab_size=4, hidden_size=width, num_layers=1, num_heads=heads, num_kv_heads=heads, head_dim=4)
    weights = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract_weights(config))
    weights["embedding"]["embedding"][np.arange(3), np.arange(3)] = 1.0  # token i: all energy in channel i
    block = weights["blocks_0"]
    block["attn_norm"]["scale"][:] = 0.01
    block["attn_norm"]["scale"][:2] = 1.0
    block["q"]["kernel"][0, :, :, 0] = 1.0  # token 0 asks, token 1 answers, token 2 is filler
    block["k"]["kernel"][1, :, 0] = 1.0
    block["v"]["kernel"][1, :, 0] = 1.0  # so the output is the weight of token 1, times 8
    params = Params.from_flax({"params": weights}, config)
    quoted, ours = _quoted_scopes(params, alibi.EPSILON)[0], alibi.scopes(params)[0, 0]
    distance = math.ceil(quoted) + 1
    assert distance < ours
    tokens = np.asarray([[1, *[2] * (distance - 1), 0]], np.int32)
    x = params.weights["embedding"]["embedding"][tokens]

    def weight(split):
        held = with_heads(params, split)
        spec = kv.make_spec(split, 4, tokens.size, RAZOR, "float32", alibi=True)
        cache = kv.init(spec, 1)
        block = functools.partial(Block(config, 0).apply, {"params": held.weights["blocks_0"]})
        q, (k, v) = block(x, NO_ROPE, method="queries"), block(x, NO_ROPE, method="keys_values")
        call, cache = kv.begin(cache, jnp.asarray([distance]), distance)
        layer = kv.write(cache.layers[0], k[:, :, :distance], v[:, :, :distance], call)
        call, _ = kv.begin(cache, jnp.asarray([1]), 1)
        slope = slopes(heads)[list(split.order(0))][:, None]
        out = attend(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], layer, call, start=0, group_size=1, slopes=slope)
        return float(out[0, split.order(0).index(0), 0, 0]) / math.sqrt(width)

    def cut_to(scope):
        return HeadSplit(((1,),), heads, scopes=((scope, 0),))

    assert weight(HeadSplit.all(1, heads)) > 0.9
    np.testing.assert_allclose(weight(cut_to(math.ceil(ours))), weight(HeadSplit.all(1, heads)), rtol=1e-6)
    assert weight(cut_to(math.ceil(quoted))) == 0.0


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_scopes_are_rounded_up_to_few_steps_at_least_cost(groups):
    scopes = [3, 4, 9, 10, 10, 40, 41]
    steps = alibi._steps(scopes, groups)
    cost = sum(next(s for s in steps if s >= scope) for scope in scopes)
    sets = itertools.chain.from_iterable(itertools.combinations(set(scopes) - {41}, n) for n in range(groups))
    assert len(steps) <= groups
    assert cost == min(sum(min(s for s in (*chosen, 41) if s >= x) for x in scopes) for chosen in sets)
    assert alibi._steps([], groups) == []


def test_split_by_epsilon():
    params = _params()
    rows = [alibi.split(params, epsilon, groups=N).scopes for epsilon in (1e-1, 1e-3, 1e-6)]
    exact = alibi.scopes(params)
    np.testing.assert_array_equal(rows[1], np.where(np.ceil(exact) < LONGEST, np.ceil(exact), 0))
    for one, two in itertools.pairwise(rows):
        assert all(0 < a <= b or b == 0 for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    # With a split's weights the scopes are still in the checkpoint's order.
    np.testing.assert_array_equal(alibi.scopes(with_heads(params, alibi.split(params))), exact)
    with pytest.raises(ValueError, match="epsilon=0"):
        alibi.scopes(params, 0)
    with pytest.raises(ValueError, match="no linear biases"):
        alibi.scopes(tiny.params())


def test_generate_and_store(tmp_path):
    split = alibi.split(_params())
    params = with_heads(_params(), split)
    assert store.read(store.write(tmp_path, split)).split == split
    prompt = np.random.default_rng(5).integers(0, V, 480).astype(np.int32)
    with pytest.warns(UserWarning, match="487 tokens"):
        cut, dense = (razor_jax.generate(params, prompt, max_new_tokens=8, razor=razor) for razor in (RAZOR, None))
    assert cut.tokens == dense.tokens
    assert cut.kv.engaged
    assert cut.kv.setting.startswith("ALiBi scopes of")
    assert cut.kv.allocated_bytes < dense.kv.allocated_bytes
    saved = json.loads((tmp_path / store.NAME).read_text())
    (tmp_path / store.NAME).write_text(json.dumps(saved | {"scopes": [[1, 2]]}))
    with pytest.raises(ValueError, match="scopes"):
        store.read(tmp_path)


def test_splits_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match="cut by scope"):
        with_heads(_params(), HeadSplit.none(2, N))
    with pytest.raises(ValueError, match="cut by scope"):
        with_heads(tiny.params(), HeadSplit(((), ()), 2, scopes=((5, 5), (5, 5))))
    with pytest.raises(ValueError, match="must hold 2 numbers a layer"):
        HeadSplit(((), ()), 2, scopes=((5, 0), (5, 5)))
    with pytest.raises(ValueError, match="no scopes"):
        functional.init_cache(_params(), batch=1, capacity=8, razor=RAZOR)
    with pytest.raises(ValueError, match="no rotary embedding"):
        razor_jax.find_heads(_params())
    other = functional.init_cache(with_heads(_params(), alibi.split(_params())), batch=1, capacity=8, razor=RAZOR)
    with pytest.raises(ValueError, match="another head split"):
        functional.decode(with_heads(_params(), alibi.split(_params(), 0.1)), other, np.asarray([1], np.int32))


def test_rotary_models_keep_their_fingerprints():
    assert architecture_fingerprint(tiny.CONFIG) == ("3838ce5f58f1c4b86e6c9c8b27d462e5e0793ff4712368eb4f8dc727e087846d")
    assert architecture_fingerprint(_config()) != architecture_fingerprint(_config(hidden_size=64))


def test_the_command_shows_scopes(tmp_path):
    model = tmp_path / "model"
    razor_jax.save(_params(), model)
    loaded = razor_jax.load(str(model))  # heads="auto" needs no probe
    assert loaded.heads == alibi.split(_params())
    done = CliRunner().invoke(cli_heads.app, ["find", "--model", str(model), "--save", str(tmp_path / "razor.json")])
    assert done.exit_code == 0, done.output
    assert "scope of each query head" in done.output
    assert store.read(tmp_path / "razor.json").split == loaded.heads
    done = CliRunner().invoke(cli_heads.app, ["find", "--model", str(model), "--json"])
    np.testing.assert_array_equal(json.loads(done.stdout)["scopes"], alibi.scopes(_params()))
    done = CliRunner().invoke(cli_heads.app, ["find", "--model", str(model), "--share", "0.5"])
    assert done.exit_code == 2
    assert "follow from its weights" in done.output
