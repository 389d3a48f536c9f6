"""Trying heads: the shortcut equals the real cache, searches find planted importance; needles and chance."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from razor_jax import HeadSplit, RazorConfig, compilation, extend, init_cache, with_heads
from razor_jax.heads import causal
from razor_jax.heads.causal import Ablation, Outcome, causal_heads, greedy, mask_of, needle_tasks, window_each
from razor_jax.heads.needle import needle_heads, random_heads, two_needles
from razor_jax.text.prompts import pad
from tests.support import tiny

RAZOR = RazorConfig.compact(window=24, sinks=2)
SHAPE = (2, 2)


@pytest.fixture(scope="module")
def tasks():
    return needle_tasks(tiny.params(), documents=3, tokens=160, facts=2)


@pytest.fixture(scope="module")
def ablation(tasks):
    return Ablation(tiny.params(), tasks, RAZOR)


def test_tasks_ask_for_planted_facts(tasks):
    text = tiny.assets().decode
    assert len(tasks) == 3
    for task in tasks:
        document = text(task.document)
        assert len(task.turns) == 2
        for question, answer in task.turns:
            assert "What is the" in text(question)
            assert text(answer) in document


@pytest.mark.parametrize("split", [((0,), (1,)), ((0, 1), ())], ids=str)
def test_any_split_scores_as_on_its_own_cache(ablation, tasks, split):
    """The shortcut chooses head by head between two caches; a real cache holds the split's groups."""
    chosen = HeadSplit(split, 2)
    params = with_heads(tiny.params(), chosen)
    read = jax.jit(extend, static_argnames="logits")
    documents, lengths = pad([task.document for task in tasks], 256)
    empty = init_cache(params, batch=len(tasks), capacity=512, razor=RAZOR)
    _, cache = read(params, empty, documents, lengths, logits="none")
    want, right = [], []
    for number in range(2):
        turns, lengths = pad([question + answer for question, answer in (task.turns[number] for task in tasks)], 128)
        logits, _ = read(params, cache, turns, lengths, logits="all")
        for row, task in enumerate(tasks):
            question, answer = task.turns[number]
            before = np.asarray(logits[row], np.float64)[len(question) - 1 :][: len(answer)]
            logprobs = before - np.log(np.exp(before).sum(axis=-1, keepdims=True))
            want.append(-logprobs[np.arange(len(answer)), answer].mean())
            right.append((before.argmax(axis=-1) == answer).all())
    found = ablation(chosen)
    np.testing.assert_allclose(found.losses, want, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(found.right, right)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_written_again_a_document_has_the_cache_that_reading_it_makes(ablation, tasks, kv_dtype):
    razor = dataclasses.replace(RAZOR, kv_dtype=kv_dtype)
    documents = [task.document for task in tasks]
    capacity = ablation.caches[0].spec.capacity
    want = ablation._read(documents, capacity, razor)
    got = Ablation(tiny.params(), tasks, razor).caches[1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.spec == want.spec


def test_another_split_compiles_nothing(ablation):
    ablation(np.ones(SHAPE, bool))
    compilation.track_compilation()
    before = compilation.totals()[0]
    losses = {ablation(mask_of(HeadSplit(((head,), ()), 2))).loss for head in (0, 1)}
    assert compilation.totals()[0] == before
    assert len(losses) == 2


def test_one_head_alone_is_dense_less_that_head(ablation):
    rise = window_each(ablation)
    dense = ablation(HeadSplit.all(*SHAPE)).loss
    np.testing.assert_allclose(rise[1, 0], ablation(HeadSplit(((0, 1), (1,)), 2)).loss - dense, rtol=1e-6)


class Made:
    """A loss that is known: each windowed head costs its weight, and two of them cost more together."""

    shape = (2, 3)
    weights = np.asarray([[0.1, 3.0, 0.0], [0.5, 0.2, 2.0]])

    def __call__(self, kept):
        windowed = ~np.asarray(kept)
        loss = float((self.weights * windowed).sum()) + 10.0 * (windowed[0, 0] and windowed[1, 1])
        return Outcome(np.asarray([loss]), np.asarray([False]))


@pytest.mark.usefixtures("unchecked")
def test_searches_find_what_is_planted():
    made = Made()
    np.testing.assert_allclose(window_each(made), made.weights)
    grown = greedy(made, grow=True, steps=3)
    assert [len(heads) for heads, _ in grown] == [0, 1, 2, 3]
    # Windowed together 0.0 and 1.1 cost 10: a ranking of single heads cannot know, growing does.
    assert [set(b) - set(a) for (a, _), (b, _) in itertools.pairwise(grown)] == [{(1, 1)}, {(0, 1)}, {(1, 2)}]
    shrunk = greedy(made, grow=False, steps=6)
    assert shrunk[0] == (frozenset(np.ndindex(2, 3)), 0.0)
    assert [set(a) - set(b) for (a, _), (b, _) in itertools.pairwise(shrunk)][:2] == [{(0, 2)}, {(0, 0)}]
    assert shrunk[4][0] == {(0, 1), (1, 1)}
    assert shrunk[-1][0] == frozenset()


def test_causal_scores_are_head_scores():
    scores = causal_heads(tiny.params(), documents=2, tokens=256, razor=RAZOR)
    assert scores.meta.preset == "causal"
    np.testing.assert_array_equal(scores.echo, scores.induction)
    best = np.unravel_index(scores.induction.argmax(), SHAPE)
    assert causal.heads_of(mask_of(scores.select(share=0.25))) == {best}
    assert "2 documents of 256 tokens per seed, sinks 2, window 24" in scores.select().note


def test_documents_that_drop_nothing_are_refused(tasks):
    with pytest.raises(ValueError, match=r"drops nothing under sinks 4, window max\(4000"):
        Ablation(tiny.params(), tasks, RazorConfig())
    with pytest.raises(ValueError, match="prefill_chunk=16"):
        Ablation(tiny.params(), tasks, RazorConfig.compact(window=24, prefill_chunk=16))


def test_text_needs_a_tokenizer():
    for search in (needle_heads, causal_heads):
        with pytest.raises(ValueError, match=r"need.* a model with a tokenizer\.json"):
            search(tiny.params(text=False))


# The two-needle probe


def test_late_copy_aims_at_the_early_one():
    tokenizer = Tokenizer.from_str(tiny.assets().tokenizer_json)
    prose = tokenizer.encode("lorem ipsum dolor sit amet " * 40).ids
    for seed in range(20):
        ids, targets = two_needles(np.random.default_rng(seed), tokenizer, prose, [0], 400)
        assert ids.shape == (400,)
        assert ids[0] == 0
        late = np.flatnonzero(targets[:, 0] >= 0)
        early = targets[late, 0]
        np.testing.assert_array_equal(ids[late], ids[early])
        fact = tokenizer.decode(ids[late].tolist())
        assert fact.startswith("The ")
        assert fact.endswith(".")
        assert early[0] < 400 / 2 < late[0]
        # The token after the early copy exists, and the pair after the fact is a line's end in both.
        assert ids[early[-1] + 1] == ids[late[-1] + 1]


def test_needle_scores_depend_on_the_draw_and_not_on_the_chunk():
    scores = needle_heads(tiny.params(), documents=2, tokens=256, chunk=64)
    again = needle_heads(tiny.params(), documents=2, tokens=256, chunk=256)
    np.testing.assert_allclose(scores.query_induction, again.query_induction, atol=1e-6)
    assert ((scores.query_echo > 0) & (scores.query_echo < 1)).all()
    assert scores.meta.note == "2 documents of 256 tokens per seed"
    other = needle_heads(tiny.params(), seeds=(1,), documents=2, tokens=256)
    assert np.abs(other.query_echo - scores.query_echo).max() > 1e-5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [({"tokens": 100}, "tokens=100: must be an integer, from 128 to 4096"), ({"documents": 0}, "documents=0")],
)
def test_impossible_needles_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        needle_heads(tiny.params(), **options)


def test_chance_is_seeded_and_even():
    params = tiny.params()
    np.testing.assert_array_equal(random_heads(params).query_echo, random_heads(params).query_echo)
    chosen = [random_heads(params, seeds=(seed,)).select(share=0.25) for seed in range(200)]
    counts = np.sum([mask_of(split) for split in chosen], axis=0)
    assert counts.sum() == 200
    assert counts.min() > 25
