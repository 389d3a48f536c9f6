"""Retrieval heads.

Score them (`find`: `probe`, `needle`, `causal`, `gates`, `search`), select some (`scores`, `select`), store the
selection (`store`, `interchange`), and evaluate it (`promise`, `study`, `report`, `plots`). `alibi` handles ALiBi
models, which need no search.
"""

from .causal import causal_heads
from .find import find_heads
from .gates import Calibration, gate_heads, gradient_heads
from .interchange import read_duo, read_vendor, write_duo
from .needle import needle_heads, random_heads
from .probe import probe_heads
from .promise import Promise, measure
from .scores import HeadScores, ProbeMeta
from .search import search_heads, smallest_budget
from .store import HeadFile

__all__ = (
    "Calibration",
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
    "probe_heads",
    "random_heads",
    "read_duo",
    "read_vendor",
    "search_heads",
    "smallest_budget",
    "write_duo",
)
