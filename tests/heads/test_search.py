"""Heads for one budget: search by swaps, the smallest budget for a target, and progress that survives a stop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from razor_jax import RazorConfig, find_heads
from razor_jax.heads import Calibration, gates, search
from razor_jax.heads.causal import Ablation
from razor_jax.heads.scores import HeadScores, ProbeMeta
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("long_answers")

RAZOR = RazorConfig.compact(window=24, sinks=2)
CALIBRATION = Calibration(2, 960)
ALL = np.ones((2, 2), bool)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def ablation(params):
    return Ablation(params, CALIBRATION.tasks(params), RAZOR)


def loss(ablation, heads) -> float:
    kept = np.zeros((2, 2), bool)
    kept.flat[list(heads)] = True
    return float(ablation(kept).losses[gates.answered(ablation).reshape(-1)].mean())


def ranking(order) -> HeadScores:
    scores = np.empty(4)
    scores[list(order)] = [4, 3, 2, 1]
    per_query = np.repeat(scores.reshape(2, 2), tiny.CONFIG.group_size, axis=1)
    return HeadScores(per_query, per_query, 2, ProbeMeta("test"))


def test_search_improves_the_worst_start(params, ablation):
    """From the worst of the six pairs of heads, swaps reach a pair that no single swap improves."""
    losses = {pair: loss(ablation, pair) for pair in itertools.combinations(range(4), 2)}
    worst = max(losses, key=losses.__getitem__)
    start = ranking((*worst, *(head for head in range(4) if head not in worst)))
    seen = []
    found = find_heads(
        params, method="search", heads=2, razor=RAZOR, start=start, calibration=CALIBRATION,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    split = found.select(share=0.5)
    chosen = tuple(2 * layer + head for layer, heads in enumerate(split.retrieval) for head in heads)
    assert losses[chosen] < losses[worst]
    np.testing.assert_allclose(losses[chosen], min(losses.values()), rtol=1e-3)
    assert found.meta.preset == "search"
    assert f"loss {losses[worst]:.3f} → {losses[chosen]:.3f} nats" in found.meta.note
    assert seen[-1] == (search.ROUNDS, search.ROUNDS)
    with pytest.raises(ValueError, match="heads=4: must be an integer, from 1 to 3"):
        search.search_heads(params, 4, razor=RAZOR, calibration=CALIBRATION)


def test_the_smallest_budget_for_a_target(params):
    """The accuracy lost by the budget is within the target; a target of 100 points is met by one head."""
    scores = ranking((3, 0, 1, 2))
    options = {"razor": RAZOR, "calibration": CALIBRATION}
    assert sum(search.smallest_budget(params, scores, 100, **options).counts) == 1
    none = search.smallest_budget(params, scores, 0, **options)
    assert none == scores.select(share=sum(none.counts) / 4)
    with pytest.raises(ValueError, match="points=-1: must be between 0 and 100"):
        search.smallest_budget(params, scores, -1, **options)


def test_a_stopped_search_resumes(params, tmp_path):
    class Stopped(Exception):
        pass

    def stop_at_two(done, total):
        if done == 2:
            raise Stopped

    file, options = tmp_path / "gates.npz", {"razor": RAZOR, "calibration": CALIBRATION, "steps": 4}
    with pytest.raises(Stopped):
        gates.gate_heads(params, **options, state=file, progress=stop_at_two)
    seen = []
    resumed = gates.gate_heads(params, **options, state=file, progress=lambda *at: seen.append(at))
    assert seen == [(3, 4), (4, 4)]
    np.testing.assert_array_equal(resumed.induction, gates.gate_heads(params, **options).induction)

    with pytest.raises(ValueError, match="is the state of another run"):
        gates.gate_heads(params, **options | {"steps": 5}, state=file)
    broken = tmp_path / "broken.npz"
    for content in (b"PK nothing", b"", file.read_bytes()[:200]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="is not the state of a search or fit"):
            gates.gate_heads(params, **options, state=broken)


def test_only_answers_that_dense_attention_gives_count(ablation):
    right = ablation(ALL).right.reshape(8, 2)
    counts = gates.answered(ablation)
    np.testing.assert_array_equal(counts, right if right.any() else np.ones_like(right))
    one = np.zeros((8, 2), bool)
    one[3, 1] = True
    first, second = gates.readings(ablation, one)
    half = np.full((2, 2), 0.5, np.float32)
    assert not np.any(gates.loss_gradient(half, *first))
    assert np.abs(gates.loss_gradient(half, *second)).max() > 0


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_method_is_named(params):
    with pytest.raises(ValueError, match="method='probes': must be one of probe, needle"):
        find_heads(params, method="probes")
