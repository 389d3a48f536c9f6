"""Retrieval heads: finding them (`probe`), choosing among them (`scores`), keeping the choice (`store`)."""

from .probe import find_heads
from .scores import HeadScores, ProbeMeta
from .store import HeadFile

__all__ = ("HeadFile", "HeadScores", "ProbeMeta", "find_heads")
