"""FastGen's ladder against the whole attention map in float64, and the rungs of hand-made heads."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import FastGen, token_classes
from razor_jax.methods.fastgen import climb
from tests.support import tiny
from tests.support.methods import (
    CONFIG,
    LENGTHS,
    B,
    K,
    attention_map,
    layer,
    observe,
    pool_tokens,
    prompt_of,
    state_of,
    token_ids,
)  # fmt: skip

SPECIAL, PUNCTUATION = (3, 7), (11, 12, 13, 20, 21)
SHARE = 0.6  # of frequent and local tokens each: large steps, so that heads stop on different rungs
every_budget = pytest.mark.parametrize("budget", [8, 24])


def make(budget):
    return FastGen(budget, SPECIAL, PUNCTUATION, SHARE, SHARE)


def ladder(budget):
    """The rungs as sets of tokens and the attention that each retains, row by row of the float64 map."""
    weights, ids, sets, retained = attention_map(*layer()[:2]), token_ids(), {}, np.zeros((B, K, 5))
    count = int(SHARE * budget)
    for b, n in enumerate(LENGTHS):
        special = {0} | {t for t in range(n) if ids[b, t] in SPECIAL}
        marks = special | {t for t in range(n) if ids[b, t] in PUNCTUATION}
        assert len(special) > 1
        assert marks > special
        for head in range(K):
            p = weights[b, head, :, :n, :n]
            frequent = marks | set(np.argsort(-p.sum(1).mean(0), kind="stable")[:count].tolist())
            local = frequent | set(range(n - count, n))
            sets[b, head] = [special, marks, frequent, local, set(range(n))]
            for rung, tokens in enumerate(sets[b, head]):
                of_row = [tokens if rung != 3 else frequent | set(range(t - count + 1, t + 1)) for t in range(n)]
                kept = [p[:, t, [j for j in of_row[t] if 0 <= j <= t]].sum(-1) for t in range(n)]
                retained[b, head, rung] = np.mean(kept, axis=0).min()
    return sets, retained


@every_budget
def test_a_rung_retains_the_attention_of_its_tokens(budget):
    sets, expected = ladder(budget)
    method, (q, k, v) = make(budget), layer()
    prompt = prompt_of(k, v)
    found, retained = method.ladder(prompt, observe(method, q, prompt), method.room(prompt.lengths, 64))
    assert_allclose(retained, expected, rtol=1e-5)
    for (b, head), rungs in sets.items():
        assert [set(np.flatnonzero(x).tolist()) for x in np.asarray(found)[b, head]] == rungs


@every_budget
def test_heads_share_slots_out_by_attention_gained_per_slot(budget):
    sets, retained = ladder(budget)
    sums = attention_map(*layer()[:2])
    expected, used = [], []
    for b, n in enumerate(LENGTHS):
        rung, total = [0] * K, K * budget
        while True:
            spent = sum(len(sets[b, head][rung[head]]) for head in range(K))
            steps = []
            for head in range(K):
                for target in range(rung[head] + 1, 5):
                    cost = len(sets[b, head][target]) - len(sets[b, head][rung[head]])
                    if 0 < cost <= total - spent:
                        gain = retained[b, head, target] - retained[b, head, rung[head]]
                        steps.append((gain / cost, head, target))
            if not steps:
                break
            _, head, target = max(steps)
            rung[head] = target
        kept = [set(sets[b, head][rung[head]]) for head in range(K)]
        attention = sums[b, :, :, :n, :n].sum(2).mean(1)
        rest = [(-attention[head, t], head, t) for head in range(K) for t in range(n) if t not in kept[head]]
        for _, head, t in sorted(rest)[: total - sum(map(len, kept))]:
            kept[head].add(t)
        expected.append(kept)
        used.append(rung)
    assert pool_tokens(state_of(make(budget))) == expected
    assert len({rung for row in used for rung in row}) > 1


def test_hand_made_heads_get_the_rung_that_serves_them():
    T, heads, room, marks = 40, 4, 17, [5, 9, 17, 30]
    rows = np.tril(np.ones((T, T)))
    first, commas, newest = np.zeros((3, T, T))
    first[:, 0] = 1
    commas[:, marks] = rows[:, marks]
    commas[:5, 0] = 1
    newest[:] = rows - np.tril(rows, -5)
    maps = np.stack([x / x.sum(1, keepdims=True) for x in (first, commas, newest, rows)])
    local = np.tril(np.ones((T, T))) - np.tril(np.ones((T, T)), -5)  # five tokens, as 0.3 of 17
    ids = np.zeros((1, T), np.int32)
    ids[0, marks] = 11
    method = FastGen(room, SPECIAL, PUNCTUATION)
    k = np.zeros((1, heads, T, 8), np.float32)
    prompt = prompt_of(k, k, np.asarray([T], np.int32), tokens=ids)
    seen = [jnp.asarray(x.sum(1), jnp.float32)[None, :, None] for x in (maps, maps * local)]
    sets, retained = method.ladder(prompt, seen, jnp.asarray([room]))
    sizes = np.asarray(sets.sum(-1))
    needed = sum(sizes[0, range(4), [0, 1, 3, 4]])
    assert climb(retained, jnp.asarray(sizes), jnp.asarray([needed])).tolist() == [[0, 1, 3, 4]]
    # Without slots every head keeps its first rung, with all of them everything that gains.
    assert climb(retained, jnp.asarray(sizes), jnp.asarray([0])).tolist() == [[0, 0, 0, 0]]


def test_token_classes_are_those_of_the_tokenizer():
    special, marks = token_classes(tiny.assets())
    assert special == tuple(range(len(tiny.SPECIALS)))
    assert {tiny.assets().decode([id]) for id in marks} == set("!\"#%&'()*,-./:;?@[\\]_{}")
    assert token_classes(None) == ((), ())


def test_fastgen_without_token_classes_is_refused():
    with pytest.raises(ValueError, match="token_classes"):
        FastGen(0.2).check(CONFIG)
    FastGen(0.2, (), ()).check(CONFIG)
