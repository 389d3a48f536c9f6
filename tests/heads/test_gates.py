"""Learned heads: gates equal real splits at 0 and 1, gradients equal finite differences; tasks and promises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig
from razor_jax.heads import gates, store
from razor_jax.heads.causal import Ablation
from razor_jax.heads.promise import Promise, measure
from razor_jax.needles.tasks import FAMILIES, make_tasks
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("long_answers")

RAZOR = RazorConfig.compact(window=24, sinks=2)
DOCUMENTS, TOKENS = 2, 960
CALIBRATION = gates.Calibration(DOCUMENTS, TOKENS)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def readings(params):
    return gates.readings(Ablation(params, CALIBRATION.tasks(params), RAZOR))


def losses(reading, mask) -> np.ndarray:
    """Mean loss of every answer, [turns]."""
    params, full, windowed, turns = reading
    found = []
    for number in range(len(turns[0])):
        turn = tuple(part[number] for part in turns)
        logprobs, counted, answer = gates._answer(params, full, windowed, jnp.asarray(mask, jnp.float32), turn)
        each = -np.take_along_axis(np.asarray(logprobs, np.float64), np.asarray(answer)[..., None], axis=-1)[..., 0]
        found.append((each * np.asarray(counted)).sum() / np.asarray(counted).sum())
    return np.asarray(found)


@pytest.mark.parametrize("mask", [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 1]]], ids=str)
def test_closed_and_open_gates_are_a_split(params, readings, mask):
    """Gates of 0 and 1 give the losses of the split, which runs through the attention of generation."""
    tasks = make_tasks(params, "train", documents=DOCUMENTS, tokens=TOKENS, seed=0)
    longest = max(len(answer) for task in tasks for _, answer in task.turns)
    assert longest <= gates._ANSWER
    want = Ablation(params, tasks, RAZOR)(np.asarray(mask, bool)).losses.reshape(-1, DOCUMENTS)
    for row, reading in enumerate(readings):
        np.testing.assert_allclose(losses(reading, mask), want[:, row], rtol=2e-4)


def test_gradient_equals_finite_differences(readings):
    reading = readings[0]
    at = np.full((2, 2), 0.5)
    found = np.asarray(gates.loss_gradient(jnp.asarray(at, jnp.float32), *reading))
    step, want = 0.01, np.zeros((2, 2))
    for layer in range(2):
        for head in range(2):
            moved = np.zeros((2, 2))
            moved[layer, head] = step
            want[layer, head] = (losses(reading, at + moved) - losses(reading, at - moved)).mean() / (2 * step)
    assert np.abs(want).max() > 1e-5  # The gates matter at all.
    np.testing.assert_allclose(found, want, rtol=0.02, atol=0.02 * np.abs(want).max())


def test_distillation_is_at_rest_at_dense_attention(readings):
    """KL(dense ‖ gated) has its minimum where every gate is open."""
    target = gates._dense(readings[0])
    ones = jnp.ones((2, 2), jnp.float32)
    there, away = (np.abs(gates._distill(g, *readings[0], target)).max() for g in (ones, 0 * ones))
    assert there < 1e-3 * away


def test_both_methods_score_every_head(params):
    seen = []
    learned = gates.gate_heads(
        params, razor=RAZOR, calibration=CALIBRATION, steps=4, progress=lambda *at: seen.append(at)
    )
    graded = gates.gradient_heads(params, razor=RAZOR, calibration=CALIBRATION)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for scores, method in ((learned, "gates"), (graded, "gradient")):
        assert scores.induction.shape == (2, 2)
        assert np.isfinite(scores.induction).all()
        assert scores.meta.preset == method
        assert sum(scores.select(share=0.5).counts) == 2


def test_tasks_hold_their_answers_and_keep_judgement_apart(params):
    train, held_out = (
        make_tasks(params, split, documents=2, tokens=960, questions=7) for split in ("train", "held_out")
    )
    decode = params.assets.decode
    for task in (*train, *held_out):
        document = decode(task.document)
        assert set(task.families) == set(FAMILIES)
        assert len(task.turns) == 7
        for _, answer in task.turns:
            assert decode(answer).strip() in document
    asked = [{decode(question) for task in tasks for question, _ in task.turns} for tasks in (train, held_out)]
    assert not asked[0] & asked[1]
    assert make_tasks(params, "train", documents=2, tokens=960, questions=7) == train
    with pytest.raises(ValueError, match=r"families=\['needles'\]: choose from facts, pairs, code, copying"):
        make_tasks(params, "train", documents=1, tokens=960, families=["needles"])
    with pytest.raises(ValueError, match=r"need a model with a tokenizer\.json"):
        make_tasks(tiny.params(text=False), "train", documents=1, tokens=960)


def test_a_promise_is_measured_kept_and_read_back(params, tmp_path):
    everything = HeadSplit.all(2, 2)
    [kept] = measure(params, everything, RAZOR, documents=2, tokens=TOKENS)
    assert (kept.questions, kept.saved, kept.low, kept.high) == (16, 0, -18.75, 18.75)  # 3 / 16
    assert kept.dense == kept.compressed

    split = HeadSplit(((1,), (0,)), 2)
    [some] = measure(params, split, RAZOR, documents=2, tokens=TOKENS)
    assert 0 < some.saved < 0.5
    assert some.dense == kept.dense
    assert some.heads == 2
    assert sum(counts[0] for counts in some.families.values()) == 16

    path = store.write(tmp_path, split, RAZOR, some)
    assert store.read(path).promise == some
    assert f"{some.compressed} of 16 held-out questions right" in str(some)
    assert "dense attention fails all kinds of these questions too" in str(some)  # The model is random.
    with pytest.raises(ValueError, match=r"promise=.*must have the fields questions, dense"):
        Promise.of({"questions": 3})
    with pytest.raises(ValueError, match="must have the fields"):
        Promise.of(some.to_dict() | {"dense": 99})


def test_a_policy_that_drops_nothing_measures_nothing(params):
    wide = dataclasses.replace(RAZOR, window=4096)
    with pytest.raises(ValueError, match="drops nothing"):
        measure(params, HeadSplit.all(2, 2), wide, documents=2, tokens=TOKENS)


def test_a_quantised_cache_is_judged_quantised(params):
    """Kept heads read int8 too: the losses are those of a real int8 cache, and not those of a float one."""
    razor = dataclasses.replace(RAZOR, kv_dtype="int8")
    tasks = make_tasks(params, "train", documents=1, tokens=TOKENS, questions=7)
    every = HeadSplit.all(2, 2)
    found = Ablation(params, tasks, razor)(every).losses
    whole, [task] = razor_jax.with_heads(params, every), tasks
    want = []
    for question, answer in task.turns:
        cache = razor_jax.init_cache(whole, batch=1, capacity=len(task.document) + 400, razor=razor)
        document, turn = (jnp.asarray([ids], jnp.int32) for ids in (task.document, question + answer))
        _, cache = razor_jax.extend(whole, cache, document, jnp.asarray([document.shape[1]], jnp.int32))
        logits, _ = razor_jax.extend(whole, cache, turn, jnp.asarray([turn.shape[1]], jnp.int32), logits="all")
        logprobs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        at = np.arange(len(question) - 1, turn.shape[1] - 1)
        want.append(-logprobs[at, np.asarray(answer)].mean())
    np.testing.assert_allclose(found, want, rtol=1e-3)
    plain = Ablation(params, tasks, RAZOR)(every).losses
    assert np.abs(found - plain).max() > 1e-3
