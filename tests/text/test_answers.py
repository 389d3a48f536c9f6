"""Several answers per prompt, log probabilities, callbacks, and what a cache knows: its tokens and its weights."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

import razor_jax
from razor_jax import Chat, Greedy, RazorConfig, Sampling, Temperature, TopP, compilation
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24)
NEW = 12
PENALTY = Greedy(repetition_penalty=5.0)
DOCUMENT, QUESTION = tiny.prompt(60), tiny.prompt(9, seed=1)


def generate(prompt, **options):
    return razor_jax.generate(tiny.params(text=False), prompt, **{"max_new_tokens": NEW, "razor": WINDOW, **options})


def test_n_answers_of_a_prompt_are_those_of_n_equal_prompts():
    a, b = tiny.prompt(50), tiny.prompt(20)
    found = generate([a, b], n=3, sampling=Temperature(1.0), seed=5)
    want = generate([a, a, a, b, b, b], sampling=Temperature(1.0), seed=5)
    assert [[each.tokens for each in answers] for answers in found] == [
        [each.tokens for each in want[:3]],
        [each.tokens for each in want[3:]],
    ]
    assert len({each.tokens for each in found[0]}) == 3
    assert found[0][0].timings.prompt_tokens == 70  # each prompt is read once
    assert found[0][0].kv.batch == 6
    alone = generate(a, n=3, sampling=Temperature(1.0), seed=5)
    assert [each.tokens for each in alone] == [each.tokens for each in found[0]]
    (one,) = generate(a, n=1)
    assert one.tokens == generate(a).tokens


def test_questions_about_a_cache_have_n_answers_each():
    cache = razor_jax.prefill(tiny.params(text=False), DOCUMENT, razor=WINDOW, capacity=128)
    options = {"cache": cache, "razor": "auto", "sampling": Temperature(1.0)}
    found = generate([QUESTION, tiny.prompt(14, seed=2)], n=2, **options)
    want = generate([QUESTION, QUESTION, *[tiny.prompt(14, seed=2)] * 2], **options)
    assert [each.tokens for answers in found for each in answers] == [each.tokens for each in want]


@pytest.mark.parametrize("sampling", [None, Temperature(1.5)], ids=["greedy", "sampled"])
def test_log_probabilities_are_the_model_s_own(sampling):
    result = generate(DOCUMENT, sampling=sampling, logprobs=3)
    score = razor_jax.score(tiny.params(text=False), DOCUMENT, result.tokens, razor=WINDOW, exact=True)
    assert [each.token for each in result.logprobs] == list(result.tokens)
    assert_allclose([each.logprob for each in result.logprobs], score.logprobs, atol=2e-5)
    for each in result.logprobs:
        assert len(each.top) == 3
        assert [value for _, value in each.top] == sorted((value for _, value in each.top), reverse=True)
        assert each.logprob <= each.top[0][1]
    if sampling is None:
        assert [each.top[0] for each in result.logprobs] == [(each.token, each.logprob) for each in result.logprobs]
    assert result.to_dict()["logprobs"][0]["token"] == result.tokens[0]
    assert generate(DOCUMENT, sampling=sampling).logprobs is None


def test_log_probabilities_end_with_the_tokens_at_a_stop_string():
    options = {"max_new_tokens": NEW, "razor": WINDOW, "raw": True}
    free = razor_jax.generate(tiny.params(), "the fox " * 6, **options)
    stop = free.text[4:6]
    assert stop, "the text is too short to stop in it"
    pieces = list(razor_jax.stream(tiny.params(), "the fox " * 6, stop=stop, logprobs=0, **options))
    result = pieces[-1].result
    assert result.finish_reason == "stop"
    assert [each.token for each in result.logprobs] == list(result.tokens)
    assert result.logprobs == tuple(each for piece in pieces for each in piece.logprobs)
    assert all(each.top == () for each in result.logprobs)


def test_a_callback_hears_every_token_of_every_row():
    heard = []
    prompts = ["the fox " * 6, "a dog"]
    options = {"max_new_tokens": NEW, "razor": WINDOW, "logprobs": 1, "sampling": Temperature(1.0)}
    found = razor_jax.generate(tiny.params(), prompts, n=2, on_token=heard.append, **options)
    rows = [answer for answers in found for answer in answers]
    for index, result in enumerate(rows):
        mine = [piece for piece in heard if piece.row == index]
        assert "".join(piece.text for piece in mine) == result.text
        assert [piece.tokens for piece in mine] == [(token,) for token in result.tokens]
        assert tuple(each for piece in mine for each in piece.logprobs) == result.logprobs
    assert all(piece.result is None for piece in heard)

    def stop(piece):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        razor_jax.generate(tiny.params(), prompts, on_token=stop, **options)


def test_another_rule_compiles_nothing():
    generate(DOCUMENT)
    before = compilation.totals()[0]
    counted = Sampling.of(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.2)
    rules = (Temperature(0.7), TopP(0.9), PENALTY, counted, Sampling.of(top_k=3, min_p=0.1, repetition_penalty=1.1))
    tokens = {generate(DOCUMENT, sampling=rule).tokens for rule in rules}
    assert compilation.totals()[0] == before
    assert len(tokens) > 2  # the rules were heard


@pytest.mark.usefixtures("unchecked")
def test_wrong_numbers_are_named_before_anything_runs():
    for options, message in (
        ({"n": 0}, "n=0: must be an integer, at least 1"),
        ({"logprobs": 21}, "logprobs=21: must be an integer, from 0 to 20"),
        ({"logprobs": True}, "logprobs=True"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(DOCUMENT, **options)


def test_a_repetition_penalty_sees_what_is_cached(tmp_path, caplog):
    params = tiny.params(text=False)
    whole = generate(np.concatenate([DOCUMENT, QUESTION]), sampling=PENALTY, razor=None).tokens
    cache = razor_jax.prefill(params, DOCUMENT, razor=None, capacity=128)
    options = {"sampling": PENALTY, "razor": "auto"}
    assert generate(QUESTION, cache=cache, **options).tokens == whole
    razor_jax.save_cache(cache, params, tmp_path / "saved")
    assert generate(QUESTION, cache=razor_jax.load_cache(params, tmp_path / "saved"), **options).tokens == whole
    assert "repetition penalty" not in caplog.text
    blind = generate(QUESTION, cache=cache.replace(seen=None), **options)
    assert blind.tokens != whole
    assert "the repetition penalty sees only later ones" in caplog.text


def test_a_repetition_penalty_sees_earlier_turns():
    chat = Chat(tiny.params(), razor=WINDOW, capacity=256)
    for text in ("a fox", "the dog?"):
        chat.send(text, max_new_tokens=6)
    assert chat._cache is not None
    # The last token of an answer is read with the next turn.
    assert set(np.flatnonzero(chat._cache.seen[0])) == set(chat.tokens[:-1])


def test_a_cache_of_other_weights_is_refused(tmp_path):
    cache = razor_jax.prefill(tiny.params(text=False), DOCUMENT, razor=WINDOW)
    other = tiny.params(seed=1, text=False)
    with pytest.raises(ValueError, match="the cache was made with other weights"):
        razor_jax.generate(other, QUESTION, cache=cache)
    with pytest.raises(ValueError, match="the cache was made with other weights"):
        razor_jax.save_cache(cache, other, tmp_path / "cache")
