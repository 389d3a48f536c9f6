"""Cache methods behind `generate`, `prefill` and `Chat`: ragged batches, stop strings, questions, turns, refusals."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import razor_jax
from razor_jax import RazorConfig, functional
from razor_jax.evals.protocol import CachedModel
from razor_jax.methods import H2O, METHODS, HeadKV, LearnedMethod, SnapKV, by_name
from razor_jax.methods.engine import bind
from razor_jax.methods.record import from_record, to_record
from razor_jax.text.session import Session
from tests.support import tiny
from tests.support.methods import IMPORTANCE, make, text

KEEPS_TAIL, EVICTS = SnapKV(0.3, window=8), H2O(0.3)
both = pytest.mark.parametrize("method", [KEEPS_TAIL, EVICTS], ids=["SnapKV", "H2O"])


def generate(prompt, **options):
    return razor_jax.generate(tiny.params(text=False), prompt, **({"max_new_tokens": 12} | options))


@both
def test_generation_differs_from_dense_and_reports_what_was_dropped(method):
    result = generate(text(60), razor=method)
    assert result.tokens != generate(text(60), razor=None).tokens
    later = 0 if method is KEEPS_TAIL else 11
    kept = int(method.room(np.asarray([60]), 2 * 16 * 4)[0])
    assert result.kv.dropped_tokens == (60 + later - kept,)
    assert result.kv.engaged
    assert method.name in str(result.kv)


@both
def test_a_stop_string_leaves_the_cache_as_if_the_answer_had_ended_there(method):
    params = tiny.params()
    whole = razor_jax.generate(params, text(60), razor=method, max_new_tokens=40)
    stop = whole.text[5:8]
    session = Session(params, text(60), razor=method, max_new_tokens=40, stop=stop)
    for _ in session.run():
        pass
    stopped = session.results()[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    short = Session(params, text(60), razor=method, max_new_tokens=len(stopped.tokens))
    for _ in short.run():
        pass
    follow = [7, 8, 9]
    first, second = (
        razor_jax.generate(params, follow, cache=s.cache, max_new_tokens=6).tokens for s in (session, short)
    )
    assert first == second


@both
def test_many_questions_share_a_prompt_and_leave_its_cache_alone(method):
    cache = razor_jax.prefill(tiny.params(text=False), text(60), razor=method)
    questions = [text(5), text(11)]
    together = generate(questions, cache=cache)
    assert [generate(q, cache=cache).tokens for q in questions] == [row.tokens for row in together]
    assert int(cache.length[0]) == 60


@both
def test_turns_of_ragged_rows_grow_past_the_first_capacity(method):
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, [text(60), text(9)], razor=method)
    for turn in range(3):
        # The row with the short prompt gets the long turns.
        session = Session(params, [text(3), text(50 + turn)], max_new_tokens=8, cache=cache, owns_cache=True)
        for _ in session.run():
            pass
        session.results()  # raises if a row overflowed
        cache = session.cache
    assert cache.length.tolist() == [60 + 3 * 3 + 3 * 7, 9 + 50 + 51 + 52 + 3 * 7]


def test_a_row_that_does_not_fit_is_left_alone_and_flagged():
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, text(60), razor=KEEPS_TAIL, capacity=80)
    room = 80 - int(cache.spec.method.occupied(cache)[0])
    _, after = functional.extend(params, cache, np.zeros((1, 96), np.int32), np.asarray([room + 1], np.int32), "none")
    assert after.overflow.tolist() == [True]
    assert_array_equal(after.layers[0][1].k, cache.layers[0][1].k)


def test_chunks_of_a_long_question_are_one_call():
    cache = razor_jax.prefill(tiny.params(text=False), text(60), razor=KEEPS_TAIL, capacity=600)
    question = (text(200) + text(150))[:300]
    assert len(generate(question, cache=cache, max_new_tokens=3).tokens) == 3


@both
def test_a_saved_cache_answers_as_the_one_that_was_saved(method, tmp_path):
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, text(60), razor=method)
    razor_jax.save_cache(cache, params, tmp_path / "cache", pending=[[7]])
    read = razor_jax.load_cache(params, tmp_path / "cache")
    assert read.spec == cache.spec
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(read), strict=True):
        assert one.dtype == other.dtype
        assert_array_equal(one, other)
    assert generate(text(5), cache=read).tokens == generate(text(5), cache=cache).tokens
    assert razor_jax.checkpoint.cache.load_pending(tmp_path / "cache") == ((7,),)


def test_a_saved_cache_is_refused_under_another_order_of_heads(tmp_path):
    params = tiny.params(text=False)
    razor_jax.save_cache(razor_jax.prefill(params, text(60), razor=KEEPS_TAIL), params, tmp_path / "cache")
    other = razor_jax.with_heads(params, razor_jax.HeadSplit(((), ()), 2))
    with pytest.raises(ValueError, match="retrieval_heads"):
        razor_jax.load_cache(other, tmp_path / "cache")


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if not issubclass(cls, LearnedMethod)])
def test_a_method_is_read_back_from_its_record(name):
    fields = {"importance": IMPORTANCE} if name == "headkv" else {}
    method = METHODS[name](0.3, **fields)
    assert from_record(json.loads(json.dumps(to_record(method)))) == method


def test_a_method_with_fitted_parts_is_not_saved():
    with pytest.raises(ValueError, match="caches of KVzap are not saved: save one of KNorm"):
        to_record(make("kvzap", 0.3))


def test_a_method_that_no_other_process_knows_is_not_saved(tmp_path):
    class Mine(SnapKV):
        name = "Mine"

    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, text(60), razor=KEEPS_TAIL)
    engine = dataclasses.replace(cache.spec.method, method=Mine(0.3))
    with pytest.raises(ValueError, match="caches of Mine are not saved: save one of KNorm"):
        razor_jax.save_cache(cache.replace(spec=dataclasses.replace(cache.spec, method=engine)), params, tmp_path / "x")


def test_what_a_method_cannot_do_is_refused_by_name(unchecked):
    params = tiny.params(text=False)
    with pytest.raises(TypeError, match="comes from razor_jax"):
        razor_jax.init_cache(params, batch=1, capacity=64, razor=KEEPS_TAIL)
    with pytest.raises(ValueError, match="SnapKV needs rotary embedding"):
        bind(KEEPS_TAIL, params.replace(config=dataclasses.replace(params.config, alibi=True)), 10)
    with pytest.raises(ValueError, match="SnapKV runs on one device"):
        bind(KEEPS_TAIL, params.replace(placement=object()), 10)
    with pytest.raises(ValueError, match="HeadKV needs importance"):
        generate(text(30), razor=HeadKV(0.2))
    with pytest.raises(ValueError, match="differs from the policy of the cache"):
        generate(text(3), cache=razor_jax.prefill(params, text(30), razor=KEEPS_TAIL), razor=EVICTS)


@pytest.mark.parametrize("budget", [0.0, 1.5, 0, -3, True])
def test_a_budget_is_a_share_or_a_number_of_tokens(budget):
    with pytest.raises(ValueError, match="budget"):
        SnapKV(budget)


def test_methods_are_named_with_their_fields():
    assert by_name("snapkv:window=32,kernel=7", 0.2) == SnapKV(0.2, window=32, kernel=7)
    assert by_name("elastic:merge=false", 0.2).merge is False
    with pytest.raises(ValueError, match="use one of knorm, streaming"):
        by_name("snap", 0.2)
    with pytest.raises(ValueError, match="snapkv has no field 'windows': use window, kernel"):
        by_name("snapkv:windows=3", 0.2)
    with pytest.raises(ValueError, match="is no int"):
        by_name("snapkv:window=x", 0.2)


def test_records_of_two_methods_with_equal_fields_differ():
    params = tiny.params()
    identities = [CachedModel("", params, METHODS[name](0.2)).identity() for name in ("knorm", "tova")]
    assert identities[0] != identities[1]
    assert "method" not in CachedModel("", params, RazorConfig()).identity()
