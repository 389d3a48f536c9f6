"""Sampling against transformers' logits processors, and the distribution that is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from transformers.generation import logits_process as hf

from razor_jax import generate
from razor_jax.text import sampling
from razor_jax.text.logprobs import MAX_LOGPROBS, logprobs
from razor_jax.text.sampling import Greedy, MinP, Sampling, Temperature, TopK, TopP, as_sampling
from tests.support import tiny

sample = jax.jit(sampling.sample)
filter_logits = jax.jit(sampling.filter_logits)
penalise = jax.jit(sampling.penalise)


def nothing(logits):
    """What a row knows that has read and said nothing: `seen`, `counts`."""
    return np.zeros(np.shape(logits), bool), np.zeros(np.shape(logits), np.int32)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1e-3},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.75},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.75, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.8, "repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_k": 5},
    {"repetition_penalty": 3.0, "top_p": 0.5},
]


def rows(vocab):
    """[10, V] logits: random, spread wide and narrow, extreme, masked, and with many ties."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10, vocab)).astype(np.float32) * np.array(
        [[1], [4], [20], [0.01], [2], [3], [1], [1], [1], [1]]
    )
    logits[4, rng.random(vocab) < 0.5] = -np.inf
    logits[4, 3] = 0.0
    logits[5] *= 1e4
    logits[6] = np.round(logits[6])
    logits[7] = 0.0
    logits[8] = np.where(np.arange(vocab) % 4 == 1, 2.0, -np.inf)
    logits[9, 11] = 3e38
    return logits.astype(np.float32)


def seen_tokens(vocab, batch=10):
    ids = np.random.default_rng(1).integers(0, vocab, size=(batch, 9))
    seen = np.zeros((batch, vocab), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return ids, seen


@pytest.fixture(autouse=True)
def _ties_in_vocabulary_order(monkeypatch):
    """torch.sort orders equal scores as it likes; hold it to one order, so that kept sets can be compared."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


def transformers_scores(setting, ids, logits):
    """What transformers' `generate` would draw from, in its order."""
    processors = hf.LogitsProcessorList()
    if setting.get("repetition_penalty", 1.0) != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
    if setting.get("temperature", 1.0) != 1.0:
        processors.append(hf.TemperatureLogitsWarper(setting["temperature"]))
    if "top_k" in setting:
        processors.append(hf.TopKLogitsWarper(setting["top_k"]))
    if setting.get("top_p", 1.0) < 1.0:
        processors.append(hf.TopPLogitsWarper(setting["top_p"]))
    if "min_p" in setting:
        processors.append(hf.MinPLogitsWarper(setting["min_p"]))
    return processors(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("vocab", [32, 1001])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_processed_logits_are_those_of_transformers(setting, vocab):
    logits, (ids, seen) = rows(vocab), seen_tokens(vocab)
    expected = transformers_scores(setting, ids, logits.copy())
    rule = Sampling.of(**setting)
    actual = np.asarray(filter_logits(rule, penalise(rule, logits, seen, nothing(logits)[1])))
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_greedy_is_argmax_after_the_penalty():
    logits, (ids, seen) = rows(64), seen_tokens(64)
    expected = transformers_scores({"repetition_penalty": 2.0}, ids, logits.copy()).argmax(-1)
    plain, penalised = Greedy().to_sampling(), Greedy(repetition_penalty=2.0).to_sampling()
    actual = sample(penalised, logits, _keys(10), seen, nothing(logits)[1])
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(sample(plain, logits, _keys(10), seen, nothing(logits)[1]), logits.argmax(-1))


@pytest.mark.parametrize("setting", [{}, {"temperature": 1.8}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_tokens_are_drawn_with_their_probabilities(setting):
    draws = 20_000
    logits = np.random.default_rng(2).normal(size=(1, 12)).astype(np.float32)
    scores = transformers_scores(setting, np.zeros((1, 1), np.int64), logits.copy())[0]
    probabilities = scipy.special.softmax(scores.astype(np.float64))
    logits = np.repeat(logits, draws, axis=0)
    tokens = sample(Sampling.of(**setting), logits, _keys(draws), *nothing(logits))
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    assert scipy.stats.chisquare(counts[kept], probabilities[kept] * draws).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_batch_mates():
    logits, keys = jnp.asarray(rows(200)), _keys(10)
    rule = Sampling.of(temperature=2.0, top_k=50, top_p=0.95, min_p=0.01)
    together = sample(rule, logits, keys, *nothing(logits))
    one = nothing(logits[:1])
    alone = [int(sample(rule, logits[i : i + 1], keys[i : i + 1], *one)[0]) for i in range(10)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(sample(rule, logits[::-1], keys[::-1], *nothing(logits)), together[::-1])


def test_every_rule_runs_in_one_program():
    traces = []

    @jax.jit
    def draw(rule, logits, keys):
        traces.append(rule)
        return sampling.sample(rule, logits, keys, *map(jnp.asarray, nothing(logits)))

    logits, keys = jnp.asarray(rows(50)), _keys(10)
    for rule in (
        Greedy(),
        Greedy(repetition_penalty=1.2),
        Temperature(0.5),
        Temperature(2),
        TopK(3),
        TopK(40, 0.1),
        TopP(0.5),
        TopP(1),
        MinP(0.3),
        Sampling.of(),
        Sampling.of(presence_penalty=0.5, frequency_penalty=0.1),
    ):
        draw(as_sampling(rule), logits, keys)
    assert len(traces) == 1


def test_settings_may_differ_by_row():
    logits, keys = jnp.asarray(rows(100)), _keys(10)
    rules = [TopK(1), TopK(30, 0.5), TopP(0.2), MinP(0.5), Temperature(9.0)] * 2
    rules = [rule.to_sampling() for rule in rules]
    batched = jax.tree.map(lambda *values: np.stack(values), *rules)
    alone = [np.asarray(filter_logits(rule, logits[i : i + 1])[0]) for i, rule in enumerate(rules)]
    np.testing.assert_array_equal(filter_logits(batched, logits), np.stack(alone))
    assert sample(batched, logits, keys, *nothing(logits)).shape == (10,)


def test_temperature_zero_is_greedy():
    assert Sampling.of(temperature=0).greedy
    assert jax.tree.structure(Sampling.of(temperature=0.0)) == jax.tree.structure(Greedy().to_sampling())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1e-38}, r"temperature=1e-38: must be 0 \(greedy\) or at least 1e-6"),
        ({"top_k": 0}, "top_k=0: must be an integer of at least 1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": "4"}, "top_k='4': must be an integer of at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0: must be a number in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": -0.5}, r"min_p=-0.5: must be a number in \[0, 1\]"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be a positive number"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling.of(**setting)


def _keys(batch):
    return jax.random.split(jax.random.key(0), batch)


PENALTIES = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -1.0, "frequency_penalty": 0.2},
]


def test_a_rule_per_row_is_that_of_the_row_alone():
    params, rows = tiny.params(text=False), [tiny.prompt(9), tiny.prompt(30, seed=1)]
    together = sampling.rules(2)
    sampling.set_rule(together, 1, Sampling.of(temperature=0, repetition_penalty=5.0))
    found = generate(params, rows, sampling=together, max_new_tokens=9, razor=None)
    for row, rule, result in zip(rows, (Greedy(), Greedy(repetition_penalty=5.0)), found, strict=True):
        assert generate(params, row, sampling=rule, max_new_tokens=9, razor=None).tokens == result.tokens
    with pytest.raises(ValueError, match=r"sampling.temperature has shape \(2,\): give one rule \[\]"):
        generate(params, rows[0], sampling=together, razor=None)


@pytest.mark.parametrize("idle", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_filter_beside_temperature_0_is_refused(idle):
    with pytest.raises(ValueError, match=f"temperature=0 takes the most likely token, so {next(iter(idle))} would"):
        Sampling.of(temperature=0, **idle)
    assert Sampling.of(temperature=0, top_p=1, min_p=0).greedy


@pytest.mark.parametrize("numbers", PENALTIES, ids=str)
def test_presence_and_frequency_penalties_follow_their_formula(numbers):
    logits = rows(32)[:4]
    counts = np.random.default_rng(2).integers(0, 4, logits.shape).astype(np.int32)
    rule = Sampling.of(temperature=0, **numbers)
    got = penalise(rule, logits, nothing(logits)[0], counts)
    want = logits.astype(np.float64) - counts * numbers.get("frequency_penalty", 0)
    want -= (counts > 0) * numbers.get("presence_penalty", 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # a penalty may cancel most of a logit


def test_each_row_of_a_batch_has_the_token_that_its_rule_gives_it_alone():
    vocab = 101
    logits = np.random.default_rng(3).normal(size=(10, vocab)).astype(np.float32) * 3
    _, seen = seen_tokens(vocab)
    counts = np.random.default_rng(4).integers(0, 3, logits.shape).astype(np.int32)
    settings = [{"temperature": 0}, *SETTINGS[5:12], {"temperature": 0, "repetition_penalty": 1.5}, PENALTIES[2]]
    together = sampling.rules(10)
    for row, setting in enumerate(settings):
        sampling.set_rule(together, row, Sampling.of(**setting))
    no_bias, all_allowed = np.zeros_like(logits), np.ones_like(seen)
    keys = _keys(10)
    got = np.asarray(sample(together, logits, keys, seen, counts, no_bias, all_allowed))
    for row, setting in enumerate(settings):
        one = slice(row, row + 1)
        want = sample(Sampling.of(**setting), logits[one], keys[one], seen[one], counts[one])
        assert got[row] == want[0]
    allowed = np.zeros_like(seen)
    allowed[:, 7], allowed[:, 30] = True, True
    biased = no_bias.copy()
    biased[:, 30] = 1e4
    for rule in (together, sampling.rules(10)):  # mixed rows, and greedy ones
        assert set(np.asarray(sample(rule, logits, keys, seen, counts, no_bias, allowed))) <= {7, 30}
        assert set(np.asarray(sample(rule, logits, keys, seen, counts, biased, all_allowed))) == {30}


def test_log_probabilities_and_the_likeliest_tokens():
    logits = rows(32)[:4]
    token = np.asarray([3, 0, 31, 7], np.int32)
    chosen, ids, values = logprobs(jnp.asarray(logits), jnp.asarray(token))
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(chosen, want[np.arange(4), token], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-want, axis=-1, kind="stable")[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(values, -np.sort(-want, axis=-1)[:, :MAX_LOGPROBS], atol=1e-5)
