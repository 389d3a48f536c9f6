"""Fixtures that these tests share."""

from tests.support.program import model, run

__all__ = ["model", "run"]
