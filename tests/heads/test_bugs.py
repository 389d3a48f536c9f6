"""The bugs of published head-search tools, one test each: the bug would change the result, and it is not here.

Each bug is run through the oracle (or through a literal copy of the rule), to show that the comparison would see it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from razor_jax.heads import HeadScores, ProbeMeta, find_heads
from razor_jax.heads.select import ranked
from tests.support.heads_oracle import (
    BLOCK,
    FAMILIES,
    K,
    L,
    attention_maps,
    found,
    group_max,
    maps_of,
    oracle_scores,
    pair,
    probe_of,
    tiny_model,
)

families = pytest.mark.parametrize("family", list(FAMILIES))


def echo_of(maps: np.ndarray, **how) -> np.ndarray:
    return oracle_scores(maps, BLOCK, shift=0, **how)


def induction_of(maps: np.ndarray, **how) -> np.ndarray:
    return oracle_scores(maps, BLOCK, shift=1, **how)


def seen(bug: np.ndarray, right: np.ndarray) -> bool:
    """Far beyond the tolerance at which ours is compared."""
    return float(np.max(np.abs(bug - right))) > 1e-3


def equal(ours: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(ours, right, atol=1e-5, rtol=0)


@families
def test_bug_no_rotary_embedding(family):
    """Scores of unrotated queries and keys: the position of a token plays no part."""
    model, params = pair(family)
    tokens = probe_of(params, 0)
    still = attention_maps(model, tokens, positions=np.zeros(len(tokens)))
    right = induction_of(maps_of(family))
    assert seen(induction_of(still), right)
    equal(found(family).query_induction, right)


def test_bug_qk_norm_skipped():
    """Qwen3 norms queries and keys per head before it rotates them."""
    bare = tiny_model("qwen3").double()
    for layer in bare.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    maps = attention_maps(bare, probe_of(pair("qwen3")[1], 0))
    right = induction_of(maps_of("qwen3"))
    assert seen(induction_of(maps), right)
    equal(found("qwen3").query_induction, right)


@families
def test_bug_mean_over_pairs_instead_of_sum_per_token(family):
    """Of three later repeats the tokens have 1, 2 and 3 copies, two a token: that bug halves every score."""
    maps = maps_of(family)
    per_pair, right = echo_of(maps, per_pair=True), echo_of(maps)
    assert seen(per_pair, right)
    equal(found(family).query_echo, right)
    equal(found(family).query_echo, 2 * per_pair)


@families
def test_bug_off_by_one_swaps_the_classes(family):
    """With the targets one token late, echo heads look like induction heads: mass on j + 1 counted at j."""
    maps = maps_of(family)
    echo, induction = echo_of(maps), induction_of(maps)
    # Row i of `late` holds the attention of token i - 1, whose copy stands one before.
    late = np.concatenate([maps[:, :, :1], maps[:, :, :-1]], axis=2)
    assert seen(induction_of(late), induction)
    assert seen(echo, induction)
    equal(found(family).query_echo, echo)
    equal(found(family).query_induction, induction)


@families
def test_bug_seed_mean_after_group_max(family):
    """The largest query head of each seed, averaged: noise of many query heads passes for a score."""
    seeds = (0, 1, 2)
    runs = [induction_of(maps_of(family, seed)) for seed in seeds]
    right = group_max(np.mean(runs, axis=0))
    wrong = np.mean([group_max(run) for run in runs], axis=0)
    equal(find_heads(pair(family)[1], seeds=seeds).induction, right)
    assert (wrong >= right - 1e-12).all()
    assert np.max(wrong - right) > 1e-4


def test_bug_seed_mean_after_group_max_picks_other_heads():
    """KV head 0 has two query heads that shine in one seed each, KV head 1 a good one: the bug prefers the former."""
    seeds = np.asarray([[1.0, 0.0, 0.6, 0.0], [0.0, 1.0, 0.6, 0.0]])
    wrong = np.mean([seed.reshape(2, 2).max(axis=1) for seed in seeds], axis=0)
    assert wrong.argmax() == 0
    scores = HeadScores(np.zeros((1, 4)), seeds.mean(axis=0)[None], 2, ProbeMeta("made"))
    assert scores.select(induction=0.5, echo=0).retrieval == ((1,),)


def test_bug_echo_layers_lost():
    """Published merging of the two dictionaries keeps the echo heads of the first layer that has any."""
    echo = np.asarray([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])
    scores = HeadScores(echo, np.asarray([[0.0, 0.9], [0.0, 0.0], [0.0, 0.0]]), 2, ProbeMeta("made"))
    induction_heads, echo_heads = ranked(scores.induction)[:1], ranked(scores.echo)[:3]
    first = min(layer for layer, _ in echo_heads)
    wrong = {*induction_heads, *(head for head in echo_heads if head[0] == first)}
    split = scores.select(induction=1 / 6, echo=0.5)
    assert split.retrieval == ((0, 1), (0,), (1,))
    assert len(wrong) == 2 < sum(split.counts)


@families
def test_bug_zero_echo_heads_by_rounding(family):
    """round(0.01 · L · K) is 0 in a small model, and the echo class vanishes."""
    assert round(0.01 * L * K) == 0
    scores = found(family)
    split = scores.select(induction=0, echo=0.01)
    best = np.unravel_index(scores.echo.argmax(), scores.echo.shape)
    assert [(layer, head) for layer, heads in enumerate(split.retrieval) for head in heads] == [best]
