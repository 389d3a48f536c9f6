"""Scoring functions: an answer's text and the reference answers in, a number from 0 to 1 out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
METRICS: dict[str, Metric] = {}


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a scoring function under a new name."""

    def enter(function: Metric) -> Metric:
        if METRICS.setdefault(name, function) is not function:
            raise ValueError(f"a metric named {name!r} exists already")
        return function

    return enter


def score(name: str, answer: str, references: Sequence[str]) -> float:
    """Return one answer's score. Raises ValueError for an unknown metric or no reference."""
    if name not in METRICS:
        raise ValueError(f"metric={name!r}: use one of {', '.join(sorted(METRICS))}")
    if not references:
        raise ValueError("a question has no reference answer to score by")
    return float(METRICS[name](answer, references))


@metric("contains_all")
def contains_all(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer contains every reference, as written."""
    return float(all(reference in answer for reference in references))


@metric("contains_any")
def contains_any(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer contains at least one reference, as written."""
    return float(any(reference in answer for reference in references))


@metric("string_match_all")
def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Return RULER's metric: the share of references that the answer contains, in upper or lower case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


@metric("string_match_part")
def string_match_part(answer: str, references: Sequence[str]) -> float:
    """Return RULER's metric for several right answers: 1 if the answer contains one of them."""
    return float(any(reference.lower() in answer.lower() for reference in references))


@metric("starts_with")
def starts_with(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer starts with a reference, as written; spaces before it do not count."""
    return float(answer.lstrip().startswith(tuple(references)))
