"""Caches over many decoded tokens: teacher forcing, agreement with dense, and facts asked on the way."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig, with_heads
from razor_jax.evals import agreement, long_generation
from razor_jax.evals.agreement import Passage
from razor_jax.evals.examples import Example, Question
from razor_jax.evals.protocol import CachedModel, dense, encode_example, run
from razor_jax.text.teacher_forcing import force_jit
from tests.support import tiny

POLICY = RazorConfig.compact(16, sinks=2)


def razor():
    return CachedModel("Razor", tiny.params(), POLICY)


def passages(prompts=(30, 40), following=(25, 18)):
    made = zip(prompts, following, strict=True)
    return [Passage(tuple(tiny.prompt(p).tolist()), tuple(tiny.prompt(f, 1).tolist())) for p, f in made]


@pytest.mark.parametrize("chunk", [1, 4])
def test_forced_reading_is_score(chunk):
    """Log-probabilities equal those of `razor_jax.score` on the same cache, with as many tokens per call."""
    setting, passage = razor(), passages()[0]
    cache = razor_jax.prefill(setting.params, np.asarray(passage.prompt), razor=POLICY, capacity=64)
    tokens = np.asarray([passage.following[:-1]], np.int32)
    following = np.asarray([passage.following[1:]], np.int32)
    lengths = np.asarray([tokens.shape[1]], np.int32)
    found, cache = force_jit(setting.params, cache, tokens, following, lengths, chunk=chunk)
    if chunk == 1:
        want = razor_jax.score(
            setting.params, np.asarray(passage.prompt), np.asarray(passage.following), exact=True, razor=POLICY
        )
        np.testing.assert_allclose(found.logprobs[0], want.logprobs[1:], atol=1e-5)
        np.testing.assert_array_equal(np.asarray(found.best)[0] == following[0], want.greedy[1:])
    assert np.asarray(found.finite).all()
    assert int(cache.length[0]) == len(passage.prompt) + tokens.shape[1]


def test_tokens_before_anything_was_dropped_are_refused():
    """Prompts of 12 and 40, sinks 2, window 16: the first row drops from its nineteenth token on."""
    text = passages((12, 40), (25, 18))
    (found,) = agreement.run([dense(tiny.params()), razor()], text, batch=2)
    assert found.refused == 18 - 12 + 1
    assert found.counted == 24 + 17 - found.refused
    assert found.finite
    assert found.kv.engaged
    assert len(found.parted) == 2


def test_agreement_and_perplexity_are_those_of_score():
    setting, text = razor(), passages((30,), (25,))
    reference = dataclasses.replace(setting, name="dense", razor=None)
    (found,) = agreement.run([reference, setting], text, batch=1)
    prompt, following = (np.asarray(x) for x in (text[0].prompt, text[0].following))
    want = [
        razor_jax.score(setting.params, prompt, following, exact=True, razor=p).logprobs[1:] for p in (None, POLICY)
    ]
    np.testing.assert_allclose(found.reference_perplexity, np.exp(-want[0].mean()), rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.exp(-want[1].mean()), rtol=1e-4)
    assert found.counted == 24
    assert found.sure == (np.exp(want[0]) > 0.5).sum()


def test_tokens_that_the_reference_is_sure_of_are_counted_apart():
    (one,) = agreement.score_passages(razor(), passages((30,), (4,)), [0], 1)
    reference = dataclasses.replace(one[1], logprobs=(-0.1, -0.6, -0.8), best=(1, 2, 3))
    found = agreement._compare("Razor", [reference], [dataclasses.replace(reference, best=(1, 5, 6))])
    assert found.agreement.share == pytest.approx(1 / 3)
    assert (found.sure, found.sure_agreement.share) == (2, 0.5)  # exp(-0.6) > 1/2 > exp(-0.8)


def test_a_setting_agrees_with_itself_and_dense_is_never_counted():
    text = passages()
    same = dataclasses.replace(razor(), name="again")
    every = CachedModel("all heads", with_heads(tiny.params(), HeadSplit.all(2, 2)), POLICY)
    wide = CachedModel("wide", tiny.params(), RazorConfig.compact(500))
    found = agreement.run([razor(), same, every, wide], text, batch=2)
    assert found[0].agreement is not None
    assert found[0].agreement.share == 1
    assert found[0].parted == (None, None)
    for row in found[1:]:
        assert row.counted == 0
        assert row.agreement is None
        assert row.perplexity is None
    shown = [column.cells for column in agreement.render(found).columns]
    assert list(list(shown)[1])[1:] == ["NOT ENGAGED", "NOT ENGAGED"]


def test_greedy_output_is_what_generation_gives(tmp_path):
    """Free-running Razor diverges from the reference's output at the first disagreement."""
    params = tiny.params().replace(assets=None)
    reference = dense(tiny.params())
    text = agreement.greedy_passages(reference, passages((30, 40), (20, 20)), batch=2)
    assert [len(p.following) for p in text] == [20, 20]
    path = tmp_path / "records.jsonl"
    (found,) = agreement.run([reference, razor()], text, batch=2, resume=path)
    again = agreement.run([reference, razor()], text, batch=2, resume=path)
    assert json.dumps(again[0].to_dict()) == json.dumps(found.to_dict())
    for passage, parted in zip(text, found.parted, strict=True):
        # the first token comes from the prefill, which attends densely
        free = razor_jax.generate(params, np.asarray(passage.prompt), max_new_tokens=20, razor=POLICY).tokens
        differ = [i for i, (a, b) in enumerate(zip(free, passage.following, strict=True)) if a != b]
        assert (differ[0] - 1 if differ else None) == parted


def test_wrong_passages_are_refused():
    with pytest.raises(ValueError, match="1 settings and 2 passages"):
        agreement.run([razor()], passages())
    with pytest.raises(ValueError, match="at least 2 tokens after it"):
        agreement.run([dense(tiny.params()), razor()], [Passage((1, 2), (3,))])


def test_a_long_reply_is_decoded_token_by_token():
    """Answers equal those of the public functions after as many single decode steps."""
    params, new = tiny.params(), 5
    questions = tuple(Question(f"what {i}", ("a",), meta={"written": w}) for i, w in enumerate((8, 8, 20)))
    example = Example("the first fox " * 3, questions, {"reply": "of a second otter in the den"})
    table = run([long_generation.LongReply(razor())], [example], batch=2, max_new_tokens=new)
    request = Example(example.document, (Question("Continue.", ("",)),))
    document, (asked,) = encode_example(params, request)
    reply = params.assets.encode(example.meta["reply"], add_special=False)
    step = jax.jit(razor_jax.decode)
    cache, at, want = razor_jax.prefill(params, document + asked, razor=POLICY, capacity=256), 0, []
    for question in questions:
        for token in reply[at : question.meta["written"]]:
            _, cache = step(params, cache, np.asarray([token], np.int32))
        at = question.meta["written"]
        turn = params.assets.encode(f"<|end|><|user|>{question.text}<|end|><|assistant|>", add_special=False)
        want.append(razor_jax.generate(params, turn, cache=cache, max_new_tokens=new).text)
    assert list(table.rows[0].answered[0].answers) == want
    assert table.rows[0].kv.dropped_tokens == (int(cache.dropped[0]),)


def test_long_generation_examples_ask_only_what_was_written():
    made = long_generation.examples(tiny.params(), document=900, reply=1600, every=800, facts=2, count=2)
    for example in made:
        places = [(q.meta["written"], q.meta["where"]) for q in example.questions]
        assert places.count((800, "document")) == places.count((1600, "document")) == 2
        assert places.count((1600, "reply")) == 2
        assert 0 < places.count((800, "reply")) < 2
        for question in example.questions:
            text = example.document if question.meta["where"] == "document" else example.meta["reply"]
            assert question.answers[0] in text
            if question.meta["where"] == "reply":
                assert question.answers[0] in text[: question.meta["written"]]  # one token per byte
    with pytest.raises(ValueError, match="every=5"):
        long_generation.examples(tiny.params(), document=900, reply=4, every=5)
    with pytest.raises(ValueError, match="2 facts do not fit in 40 tokens"):
        long_generation.examples(tiny.params(), document=40, reply=900, every=900, facts=2)
