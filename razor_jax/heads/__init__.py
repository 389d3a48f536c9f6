"""Retrieval heads.

Score them (`probe`, `needle`, `causal`, `gates`), select some (`scores`, `select`), store the selection (`store`,
`interchange`), and evaluate it (`promise`, `study`, `report`, `plots`). `alibi` handles ALiBi models, which need no
search.
"""

from .causal import causal_heads
from .gates import gate_heads, gradient_heads
from .interchange import read_duo, read_vendor, write_duo
from .needle import needle_heads, random_heads
from .probe import find_heads
from .promise import Promise, measure
from .scores import HeadScores, ProbeMeta
from .store import HeadFile

__all__ = (
    "HeadFile",
    "HeadScores",
    "ProbeMeta",
    "Promise",
    "causal_heads",
    "find_heads",
    "gate_heads",
    "gradient_heads",
    "measure",
    "needle_heads",
    "random_heads",
    "read_duo",
    "read_vendor",
    "write_duo",
)
