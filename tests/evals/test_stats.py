"""Metrics against cases computed by hand, and intervals against known cases."""

from __future__ import annotations

import numpy as np
import pytest

from razor_jax.evals import metrics
from razor_jax.evals.stats import paired_bootstrap, share_interval


@pytest.mark.parametrize(
    ("name", "answer", "references", "want"),
    [
        ("contains_all", "The codes are 12 and 34.", ("12", "34"), 1.0),
        ("contains_all", "The codes are 12 and 35.", ("12", "34"), 0.0),
        ("contains_all", "apple", ("Apple",), 0.0),
        ("starts_with", "\n 12345.", ("12345",), 1.0),
        ("starts_with", "It is 12345.", ("12345",), 0.0),
        ("contains_any", "it is 34", ("12", "34"), 1.0),
        ("contains_any", "it is 3 4", ("12", "34"), 0.0),
        ("string_match_all", "APPLE, pear", ("apple", "Pear", "plum", "fig"), 0.5),
        ("string_match_part", "The PEAR of it", ("apple", "pear"), 1.0),
        ("string_match_part", "", ("apple",), 0.0),
    ],
)
def test_metrics_by_hand(name, answer, references, want):
    assert metrics.score(name, answer, references) == want


def test_a_metric_that_nobody_knows_and_a_question_without_reference():
    with pytest.raises(ValueError, match=r"metric=.rouge9.: use one of .*contains_all"):
        metrics.score("rouge9", "a", ("a",))
    with pytest.raises(ValueError, match="no reference"):
        metrics.score("contains_all", "a", ())
    with pytest.raises(ValueError, match="'contains_all' exists already"):
        metrics.metric("contains_all")(lambda answer, references: 1.0)


def test_the_bootstrap_of_a_known_case():
    """For independent questions the interval is the normal one of a difference of means, up to sampling error."""
    rng = np.random.default_rng(0)
    a = (rng.random(1500) < 0.9).astype(float)
    b = np.where(rng.random(1500) < 0.05, rng.random(1500), a)
    found = paired_bootstrap(a, b, seed=3)
    half = 1.96 * (b - a).std() / np.sqrt(len(a))
    np.testing.assert_allclose(found, (np.mean(b - a), np.mean(b - a) - half, np.mean(b - a) + half), atol=7e-4)
    assert found == paired_bootstrap(a, b, seed=3)
    assert found != paired_bootstrap(a, b, seed=4)


def test_questions_of_one_document_are_not_independent():
    """Ten questions with always equal scores count as one: the interval is √10 times as wide."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(200), 10)
    b = np.repeat((rng.random(200) < 0.7).astype(float), 10)
    a = np.ones_like(b)
    apart, together = paired_bootstrap(a, b), paired_bootstrap(a, b, documents)
    ratio = (together.high - together.low) / (apart.high - apart.low)
    np.testing.assert_allclose(ratio, np.sqrt(10), rtol=0.1)
    np.testing.assert_allclose(share_interval(b, documents), share_interval(b[::10]), atol=2e-3)


def test_clusters_of_unequal_size_keep_their_weight():
    """One document loses all three questions, one keeps its only one: draws give 0, -3/4 or -1 only."""
    found = paired_bootstrap([1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1])
    assert found == (-0.75, -1.0, 0.0)


def test_where_nothing_differs_the_difference_is_exactly_nought():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1], [0, 0, 1]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(100, 100, 0.9630, 1.0), (0, 100, 0.0, 0.0370), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_by_the_table(right, asked, low, high):
    scores = np.arange(asked) < right
    np.testing.assert_allclose(share_interval(scores), (right / asked, low, high), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "shapes"),
        (([1.0], [1.0, 0.0]), "shapes"),
        (([1.0, 0.0], [1.0, 0.0], [0]), "1 clusters but 2 scores"),
    ],
)
def test_unequal_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


def test_a_share_is_from_0_to_1():
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_interval([0.5, 1.5])
