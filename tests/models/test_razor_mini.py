"""The packaged model end to end: its split is the probe's, and it answers from its compressed cache."""

from __future__ import annotations

import functools
import json

import pytest

import razor_jax
from razor_jax import HeadSplit
from razor_jax.checkpoint.hub import find
from razor_jax.evals import bench, needle
from razor_jax.evals.protocol import CachedModel, run
from razor_jax.heads import store


@functools.cache
def mini():
    return razor_jax.load("razor-mini")


@functools.cache
def haystacks():
    return needle.examples(mini(), "facts", needle.Grid((1024,), documents=4, facts=4, seed=7))


@pytest.mark.slow
def test_the_shipped_split_is_what_the_probe_finds():
    """Four heads by induction and one by echo, the paper's two classes."""
    shipped = store.read(find("razor-mini"))
    scores = razor_jax.find_heads(mini(), seeds=(0, 1, 2), block=1023)
    assert scores.select(induction=4 / 32, echo=1 / 32).retrieval == shipped.split.retrieval
    assert mini().razor == shipped.recommended


@pytest.mark.parametrize("split", ["shipped", "none"])
def test_answers_come_from_the_retrieval_heads(split):
    params = mini()
    if split == "none":
        params = razor_jax.with_heads(params, HeadSplit.none(params.config.num_layers, params.config.num_kv_heads))
    row = run([CachedModel(split, params, params.razor)], haystacks(), batch=4).rows[0]
    assert len(row.scores) == 16
    assert row.engaged == 1
    assert row.ratio > 2
    assert row.scores.sum() >= 14 if split == "shipped" else row.scores.sum() <= 4


def test_bench_measures_what_it_says():
    speed = bench.measure(mini(), mini().razor, context=700, new_tokens=8, repeats=1)
    assert speed.kv.engaged
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    row = json.loads(json.dumps(speed.to_dict()))
    assert row["decode_tokens_per_second"] == pytest.approx(1 / speed.decode_seconds)


def test_documents_are_the_same_for_every_setting():
    again = needle.examples(mini(), "facts", needle.Grid((1024,), documents=4, facts=4, seed=7))
    assert again == haystacks()
    assert all(question.answers[0] in example.document for example in again for question in example.questions)
