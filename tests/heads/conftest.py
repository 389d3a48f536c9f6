"""Fixtures of several files."""

from __future__ import annotations

import pytest

from razor_jax.heads import gates


@pytest.fixture(scope="module")
def long_answers():
    """A character is a token here, so that answers are longer than those of a real tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "_ANSWER", 24)
        yield
