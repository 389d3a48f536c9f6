"""Ablations: a cache written from a dense reading equals that of a prefill, and variants differ as they should."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from razor_jax import HeadSplit, RazorConfig, prefill, with_heads
from razor_jax.evals import ablations
from razor_jax.evals.journal import Journal
from razor_jax.evals.variants import CHUNK, Reading, Variant
from razor_jax.functional import extend
from razor_jax.heads.causal import Task
from tests.support import tiny

POLICY = RazorConfig.compact(20, sinks=2, kv_dtype="bfloat16")
LENGTHS = (61, 48)  # of the documents; one turn of each is longer than a chunk


@functools.cache
def tasks() -> tuple[Task, ...]:
    def turn(seed: int, question: int, answer: int):
        ids = tiny.prompt(question + answer, seed).tolist()
        return tuple(ids[:question]), tuple(ids[question:])

    long = Task(tuple(tiny.prompt(LENGTHS[0]).tolist()), (turn(1, 5, 30), turn(2, 1, 4)))
    return long, Task(tuple(tiny.prompt(LENGTHS[1]).tolist()), (turn(3, 7, 9),))


@functools.cache
def reading() -> Reading:
    return Reading(tiny.params(), tasks(), batch=2)


def judge(split: HeadSplit = tiny.SPLIT, razor: RazorConfig | None = POLICY, counting="dropped"):
    return reading().predict(Variant("", split, razor, counting))


@pytest.mark.parametrize("razor", [POLICY, dataclasses.replace(POLICY, kv_dtype="int8", compensation=False)])
def test_a_cache_from_a_dense_reading_is_the_one_a_prefill_leaves(razor):
    params = with_heads(tiny.params(), tiny.SPLIT)
    read, variant = reading(), Variant("", tiny.SPLIT, razor)
    cache = read._cache(params, variant, read._batches[0], read._read[0])
    real = prefill(params, [task.document for task in tasks()], razor=razor, capacity=read.capacity)
    assert cache.spec == real.spec
    # The program that computes keys decides their last bit, which a rounded cache shows as one step of its type.
    # A prefill also remembers its tokens and the weights.
    real = real.replace(seen=None, fingerprint=None)
    for mine, other in zip(jax.tree.leaves(cache), jax.tree.leaves(real), strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=1.0 if razor.kv_dtype == "int8" else 1e-5)


def test_losses_are_those_of_the_library_chunk_by_chunk():
    params, document = with_heads(tiny.params(), tiny.SPLIT), tasks()[0].document
    cache = prefill(params, [document], razor=POLICY, capacity=reading().capacity)
    question, answer = tasks()[0].turns[0]
    ids, logprobs = np.asarray([*question, *answer]), []
    for start in range(0, len(ids) - 1, CHUNK):
        part = ids[None, start : start + CHUNK]
        logits, cache = extend(params, cache, part, np.full(1, part.shape[1], np.int32), "all")
        logprobs.append(np.asarray(jax.nn.log_softmax(logits))[0])
    logprobs = np.concatenate(logprobs)[len(question) - 1 : len(ids) - 1]
    found = judge()
    np.testing.assert_allclose(found.losses[0], -logprobs[np.arange(len(answer)), list(answer)].mean(), rtol=1e-4)
    counted = found.wanted[0] >= 0
    assert found.wanted[0][counted].tolist() == list(answer)
    assert found.best[0][counted].tolist() == logprobs.argmax(1).tolist()
    assert found.right()[0] == np.mean(logprobs.argmax(1) == np.asarray(answer))


def test_dense_agrees_with_itself_and_windows_change_losses():
    dense = judge(HeadSplit.all(2, 2), None)
    assert dense.agreement(dense.best).tolist() == [1.0] * 3
    assert reading().documents.tolist() == [0, 0, 1]
    every = judge(HeadSplit.all(2, 2), POLICY)  # no head is windowed
    np.testing.assert_allclose(every.losses, dense.losses, atol=0.02)  # a bfloat16 cache
    assert np.abs(judge().losses - dense.losses).min() > 1e-3


def test_one_counts_a_token_whatever_was_dropped():
    assert np.abs(judge(counting="one").losses - judge().losses).min() > 1e-4
    # With one dropped token, both counts are 1.
    barely = dataclasses.replace(POLICY, window=LENGTHS[1] - POLICY.sinks - 1)
    a, b = (judge(razor=barely, counting=way).losses[2] for way in ("one", "dropped"))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_frozen_parts_from_rolling_only_after_the_first_call():
    frozen, rolling, without = (
        judge(counting="frozen"),
        judge(),
        judge(razor=dataclasses.replace(POLICY, compensation=False)),
    )
    assert abs(frozen.losses[0] - rolling.losses[0]) > 1e-5  # 35 tokens: three calls
    np.testing.assert_allclose(frozen.losses[1:], rolling.losses[1:], rtol=1e-6)  # one call each
    assert np.abs(frozen.losses - without.losses).min() > 1e-4


def test_ratio_is_of_a_dense_bfloat16_cache():
    read = reading()
    assert read.ratio(Variant("", HeadSplit.all(2, 2), RazorConfig(kv_dtype="bfloat16"))) == 1
    half = HeadSplit.of(2, 2, [(0, 0), (1, 0)])
    c, slots = read.capacity, 22
    heads = 2 * c * 4 * 16 + 2 * (slots * 4 * 16 + 2 * 4 * 16)
    assert read.ratio(Variant("", half, POLICY)) == pytest.approx(4 * c * 4 * 16 / heads)


def test_copied_segments_stand_in_their_document_and_text_goes_on():
    for task in ablations.tasks(tiny.params(), "copy", tokens=300, documents=2, questions=3):
        for question, answer in task.turns:
            joined, ids = (*question, *answer), task.document
            assert any(ids[i : i + len(joined)] == joined for i in range(len(ids)))
    (task,) = ablations.tasks(tiny.params(), "text", tokens=300, documents=1, questions=3)
    (question, answer) = task.turns[0]
    assert (len(task.document), len(question), len(answer)) == (299, 1, 240)
    assert tiny.assets().decode([*task.document, *question, *answer]).isprintable() is False  # lines of prose


def test_a_table_resumes_from_its_records(tmp_path, monkeypatch):
    dense = Variant("dense", HeadSplit.all(2, 2), RazorConfig(kv_dtype="bfloat16"))
    rows = [dense, Variant(ablations.RAZOR, tiny.SPLIT, POLICY)]
    # The table has a column per task; here all tasks use the same reading.
    readings = dict.fromkeys(ablations.TASKS, reading())
    first = ablations.judge(rows, readings, Journal(tmp_path / "a.jsonl"))
    judged, compute = [], Reading.predict

    def counted(self, variant):
        judged.append(variant.name)
        return compute(self, variant)

    monkeypatch.setattr(Reading, "predict", counted)
    again = ablations.judge(rows, readings, Journal(tmp_path / "a.jsonl"))
    assert again == first
    assert set(judged) == {"dense"}  # the others are compared with its tokens
    lines = ablations.summary(first, readings)
    assert lines[0]["needle"]["agreement"] == 1
    assert lines[1]["text"]["over_razor"]["difference"] == 0
    assert lines[1]["copy"]["answers"] == 3
    assert ablations.render(lines, "title").row_count == 2


@pytest.mark.slow
def test_razor_mini_shows_what_its_parts_are_worth():
    import razor_jax

    params = razor_jax.load("razor-mini", dtype="float32")
    razor = RazorConfig.compact(64, kv_dtype="bfloat16")
    read = Reading(params, ablations.tasks(params, "needle", tokens=1024, documents=4, questions=8), batch=4)
    every = HeadSplit.all(params.config.num_layers, params.config.num_kv_heads)
    none = HeadSplit.none(params.config.num_layers, params.config.num_kv_heads)
    dense, found, lost = (read.predict(Variant("", split, razor)) for split in (every, params.heads_or_all, none))
    assert (dense.right() == 1).mean() > 0.9
    assert (found.right() == 1).mean() > (lost.right() == 1).mean() + 0.3
    assert dense.losses.mean() < found.losses.mean() < lost.losses.mean()
