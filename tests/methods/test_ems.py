"""EMS against a simulation in float64 that merges token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from razor_jax.methods import EMS
from tests.support.methods import (
    LENGTHS,
    B,
    H,
    K,
    T,
    attention_map,
    best_tokens,
    kept_tokens,
    later,
    layer,
    prompt_of,
    state_of,
)  # fmt: skip

BUDGET, WINDOW, STEPS = 12, 5, 20
SINKS, RECENT = BUDGET // 4, WINDOW


def unit(x):
    return x / np.linalg.norm(x)


def similarity(a, b):
    return max(unit(a["k"]) @ unit(b["k"]), 0) * max(unit(a["v"]) @ unit(b["v"]), 0)


def merge(centres, token, threshold):
    """Add the token to the members of the most similar centre, if it is similar enough."""
    best = max(centres, key=lambda centre: similarity(centre, token))
    if similarity(best, token) >= threshold:
        best["members"].append(token)
    return best


def settle(centre):
    """Replace a centre's content by the mean over itself and its members."""
    group = [dict(centre), *centre.pop("members")]
    if len(group) > 1:
        total = sum(x["score"] for x in group)
        norm = sum(x["score"] * np.linalg.norm(x["k"]) for x in group) / total
        centre["k"] = norm * unit(sum(x["score"] * unit(x["k"]) for x in group))
        centre["v"] = sum(x["score"] * x["v"] for x in group) / total
        centre["score"] = total
    centre["members"] = []


def scores_of_map():
    weights = attention_map(*layer()[:2]).mean(2)
    scores = np.zeros((B, K, T))
    for b, n in enumerate(LENGTHS):
        whole, window = weights[b, :, :n, :n].sum(1), weights[b, :, n - WINDOW : n, :n].sum(1)
        scores[b, :, :n] = np.maximum(whole * window.mean(-1, keepdims=True) / whole.mean(-1, keepdims=True), window)
    return scores


def protected(scores):
    scores = scores.copy()
    for b, n in enumerate(LENGTHS):
        scores[b, :, [*range(SINKS), *range(n - RECENT, n)]] = np.inf
    return scores


def simulate(threshold):
    """Centres of every row and head after the prompt, and the merges that happened."""
    _, k, v = layer()
    scores, found, merges = scores_of_map(), {}, 0
    order = np.argsort(-protected(scores), axis=-1, kind="stable")
    for b, n in enumerate(LENGTHS):
        for head in range(K):

            def token(t, b=b, head=head):
                content = {"k": k[b, head, t].astype(np.float64), "v": v[b, head, t].astype(np.float64)}
                return {**content, "score": scores[b, head, t], "position": int(t), "members": []}

            ranked = [t for t in order[b, head] if t < n]
            centres = [token(t) for t in ranked[:BUDGET]]
            for t in ranked[BUDGET : 2 * BUDGET]:
                merge(centres, token(t), threshold)
            merges += sum(len(centre["members"]) for centre in centres)
            for centre in centres:
                settle(centre)
            found[b, head] = centres
    return found, merges


def check(state, found):
    for (b, head), centres in found.items():
        used = int(state.valid[b, head])
        assert used == len(centres)
        positions = np.asarray(state.position)[b, head, :used].tolist()
        by_position = {centre["position"]: centre for centre in centres}
        assert sorted(positions) == sorted(by_position)
        for slot, position in enumerate(positions):
            centre = by_position[position]
            for mine, theirs in ((state.k, "k"), (state.v, "v"), (state.score, "score")):
                assert_allclose(np.asarray(mine)[b, head, slot], centre[theirs], rtol=2e-4, atol=2e-4)


# Random keys and values of 8 numbers are hardly ever as similar as the default asks.
@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_tokens_after_the_best_join_the_most_similar_of_them(threshold):
    found, merges = simulate(threshold)
    assert merges > 3
    check(state_of(EMS(BUDGET, window=WINDOW, threshold=threshold)), found)


def test_a_later_token_takes_the_slot_of_the_lowest_score_which_is_merged():
    method = EMS(BUDGET, window=WINDOW, threshold=0.1)
    found, _ = simulate(0.1)
    state, step = state_of(method), jax.jit(method.step)
    q, k, v = later(STEPS)
    merges = 0
    for index in range(STEPS):
        out, state = step(state, *(jnp.asarray(x[:, index]) for x in (q, k, v)), jnp.asarray(LENGTHS + index))
        for (b, head), centres in found.items():
            position = int(LENGTHS[b]) + index
            content = {"k": k[b, index, head].astype(np.float64), "v": v[b, index, head].astype(np.float64)}
            new = {**content, "score": 0.0, "position": position, "members": []}
            every = [*centres, new]
            logits = q[b, index, head].astype(np.float64) @ np.stack([x["k"] for x in every]).T / np.sqrt(H)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            assert_allclose(out[b, head], weights @ np.stack([x["v"] for x in every]), rtol=1e-3, atol=1e-3)
            for x, weight in zip(every, weights.mean(0), strict=True):
                x["score"] += weight
            free = [x for x in centres if SINKS <= x["position"] <= position - RECENT]
            going = min(free, key=lambda x: x["score"])
            centres[:] = [x for x in centres if x is not going]
            into = merge(centres, going, 0.1)
            merges += len(into["members"])
            settle(into)
            centres.append(new)
    assert merges > 3
    check(state, found)


def test_a_threshold_above_one_keeps_the_best_scores_unchanged():
    state = state_of(EMS(BUDGET, window=WINDOW, threshold=1.01))
    expected = best_tokens(protected(scores_of_map()), LENGTHS, BUDGET)
    assert kept_tokens(state.k, state.valid, layer()[1]) == expected
    kept = np.take_along_axis(layer()[1], np.asarray(state.position)[..., None], axis=2)
    assert_allclose(state.k, kept)


def merged(k, v, others_k, others_v):
    """A slot's key, value and score after the merge of one other token, under the default threshold."""
    from razor_jax.methods.slots import Slots

    one = jnp.ones((1, 1), jnp.int32)
    slot = Slots(*(jnp.asarray(x, jnp.float32)[None, None, None] for x in (k, v)), one, one, jnp.ones((1, 1, 1)))
    others = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (others_k, others_v))
    yes = jnp.ones((1, 1, 1), bool)
    state = EMS()._merge(slot, yes, *others, jnp.full((1, 1, 1, 1), 3.0), yes)
    return np.asarray(state.k)[0, 0, 0], np.asarray(state.v)[0, 0, 0], float(state.score[0, 0, 0])


def test_a_duplicate_merges_into_itself_and_an_opposite_never():
    k, v = np.random.default_rng(0).standard_normal((2, H))
    found = merged(k, v, k, v)
    assert_allclose(found[0], k, rtol=1e-5)
    assert_allclose(found[1], v, rtol=1e-5)
    assert found[2] == 4.0
    assert merged(k, v, -k, -v)[2] == 1.0
    # Norms are averaged apart from directions: one weighs 1, the other 3.
    longer = merged(k, v, 2 * k, 2 * v)
    assert_allclose(longer[0], 1.75 * k, rtol=1e-5)
    assert_allclose(longer[1], 1.75 * v, rtol=1e-5)


def test_room_for_every_token_merges_nothing():
    _, k, v = layer()
    prompt = prompt_of(k, v)
    state = EMS(60, threshold=0.0).compress(prompt, (jnp.zeros((B, K, T)),) * 2, jnp.asarray([60, 60]), 60)
    assert kept_tokens(state.k, state.valid, k) == [[set(range(n))] * K for n in LENGTHS]
