"""One entry to every method that scores heads."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..functional import promoting
from ..params import Params
from .causal import causal_heads
from .gates import gate_heads, gradient_heads
from .needle import needle_heads, random_heads
from .probe import probe_heads
from .scores import HeadScores
from .search import search_heads

Method = Literal["probe", "needle", "causal", "gradient", "gates", "search", "random"]

LEARNED: tuple[Method, ...] = ("gradient", "gates", "search")  # they ask questions about documents

_SCORERS = {
    "probe": probe_heads,
    "needle": needle_heads,
    "causal": causal_heads,
    "gradient": gradient_heads,
    "gates": gate_heads,
    "search": search_heads,
    "random": random_heads,
}


@promoting
def find_heads(params: Params, *, method: Method = "probe", **options: Any) -> HeadScores:
    """Score every head by one method; `select` turns scores into a split.

    Args:
      method: *probe*, the paper's: random tokens, seconds, needs no text. *needle*: a fact twice in prose. *gradient*:
        integrated gradient of answers over one gate per head, a minute or two for a small model. *gates*: gates learned
        by gradient, minutes. *search*: swaps at one budget, `heads=`, from the ranking of another method. *causal*:
        each head alone, small models only. *random*: chance.
      options: of the method's function: `probe_heads`, `needle_heads`, `gradient_heads`, `gate_heads`, `search_heads`,
        `causal_heads`, `random_heads`.

    Raises ValueError for an unknown method, TypeError for an option that the method does not take.
    """
    if method not in _SCORERS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(get_args(Method))}")
    return _SCORERS[method](params, **options)
