"""The host side on a mesh: what it gives is what one device gives."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import razor_jax
from razor_jax import RazorConfig, Sampling
from razor_jax.text.sampling import rules, set_rule

from ..support import tiny
from ..support.meshes import on

RAZOR = RazorConfig(sinks=2, window=6)
PROMPTS = [tiny.prompt(n) for n in (20, 9, 14)]  # three rows, which data=2 does not divide


@functools.cache
def both():
    return tiny.params(), on(tiny.params(), "data=2,model=4")


def test_generate_pads_the_batch_and_says_the_same(record_property):
    one, many = both()
    want, got = (razor_jax.generate(p, PROMPTS, max_new_tokens=12, razor=RAZOR) for p in (one, many))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    report = got[0].kv
    assert (report.batch, report.devices, report.layout) == (4, 8, "slot")
    assert report.device_bytes * 8 == report.allocated_bytes
    assert "on each of 8 devices by slot" in str(report)


@pytest.mark.slow
def test_stop_strings_are_replayed():
    one, many = both()
    text = razor_jax.generate(one, PROMPTS[0], max_new_tokens=12, razor=RAZOR).text
    options = {"max_new_tokens": 12, "razor": RAZOR, "stop": text[3:5]}
    want, got = (razor_jax.generate(p, PROMPTS[0], **options) for p in (one, many))
    assert (got.text, got.tokens, got.finish_reason) == (want.text, want.tokens, "stop")


@pytest.mark.slow
def test_a_document_read_once_answers_many():
    """A cache of one row, which all of data holds, repeated, and grown past its capacity."""
    one, many = both()
    questions = [tiny.prompt(4, seed=s) for s in range(2)]
    answers = []
    for p in (one, many):
        cache = razor_jax.prefill(p, PROMPTS[0], razor=RAZOR)
        found = razor_jax.generate(p, questions, cache=cache, max_new_tokens=60)
        assert found[0].kv.capacity > cache.spec.capacity
        answers.append([r.tokens for r in found])
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_several_answers_with_log_probabilities():
    rule = Sampling.of(top_p=0.9, temperature=0.8, repetition_penalty=1.3)
    options = {"n": 2, "logprobs": 2, "sampling": rule, "max_new_tokens": 6, "razor": RAZOR}
    want, got = (razor_jax.generate(p, PROMPTS, **options) for p in both())
    for alone, spread in zip(want, got, strict=True):
        assert [each.tokens for each in spread] == [each.tokens for each in alone]
        for a, b in zip(alone, spread, strict=True):
            values = [[each.logprob for each in one.logprobs] for one in (a, b)]
            np.testing.assert_allclose(*values, atol=2e-5)


@pytest.mark.slow
def test_answers_that_data_does_not_divide():
    options = {"n": 3, "sampling": Sampling.of(temperature=0.8), "max_new_tokens": 6, "razor": RAZOR}
    for prompt in (PROMPTS[0], PROMPTS[:1]):
        want, got = (razor_jax.generate(p, prompt, **options) for p in both())
        assert repr(got).count("Result(") == 3
        assert [each.tokens for each in np.ravel(got)] == [each.tokens for each in np.ravel(want)]


@pytest.mark.slow
def test_each_row_has_its_rule():
    rule = rules(3)
    set_rule(rule, 1, Sampling.of(temperature=0, repetition_penalty=3.0))
    options = {"sampling": rule, "max_new_tokens": 8, "razor": RAZOR}
    want, got = ([each.tokens for each in razor_jax.generate(p, PROMPTS, **options)] for p in both())
    assert want == got


@pytest.mark.slow
def test_a_cache_keeps_its_tokens_and_weights(tmp_path):
    """Saved on a mesh and loaded there, the penalty sees what the cache holds."""
    one, many = both()
    rule = {"sampling": Sampling.of(temperature=0, repetition_penalty=3.0), "max_new_tokens": 8}
    cache = razor_jax.prefill(many, PROMPTS[0], razor=RAZOR)
    want = razor_jax.generate(one, PROMPTS[2], cache=razor_jax.prefill(one, PROMPTS[0], razor=RAZOR), **rule)
    razor_jax.save_cache(cache, many, tmp_path / "cache")
    for kept in (cache, razor_jax.load_cache(many, tmp_path / "cache")):
        assert razor_jax.generate(many, PROMPTS[2], cache=kept, **rule).tokens == want.tokens


@pytest.mark.slow
def test_streaming_prefill_and_scores():
    one, many = both()
    streaming = RazorConfig(sinks=2, window=6, prefill_chunk=4)
    targets = [tiny.prompt(5, seed=s) for s in range(3)]
    for razor in (RAZOR, streaming):
        want, got = (razor_jax.score(p, PROMPTS, targets, razor=razor) for p in (one, many))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
            np.testing.assert_array_equal(a.greedy, b.greedy)
    pieces = [list(razor_jax.stream(p, PROMPTS[1], max_new_tokens=9, razor=streaming)) for p in (one, many)]
    assert [p.tokens for p in pieces[0]] == [p.tokens for p in pieces[1]]


def test_documents_that_data_does_not_divide():
    _, many = both()
    with pytest.raises(ValueError, match=r"batch=3 does not divide over data=2 of the mesh"):
        razor_jax.prefill(many, PROMPTS, razor=RAZOR)


@pytest.mark.slow
def test_a_conversation_keeps_its_cache():
    chats = [razor_jax.Chat(p, razor=RAZOR) for p in both()]
    for text in ("hello there", "and again"):
        want, got = (chat.send(text, max_new_tokens=10) for chat in chats)
        assert got.tokens == want.tokens
