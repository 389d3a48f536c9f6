"""A server with a scripted engine, shared by the tests of the wire."""

from collections.abc import Iterator

import pytest

from tests.support import tiny
from tests.support.http_server import Running, serve_script
from tests.support.program import model

__all__ = ["model", "server"]


@pytest.fixture
def server() -> Iterator[Running]:
    """A server whose tokenizer has one token per byte."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as running:
        yield running
