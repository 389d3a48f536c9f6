"""Fixtures of several files."""

from __future__ import annotations

import pytest

from ..support import folders, hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 Llama that no test changes."""
    return hf.write(tmp_path_factory.mktemp("llama"), "llama", **folders.LLAMA)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it to break."""
    return folders.copy(folder, tmp_path)
