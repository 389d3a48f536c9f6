"""Splits of public models in the package: each is a whole file with a promise, and its model finds it."""

from __future__ import annotations

import re

import pytest

import razor_jax
from razor_jax.heads import store
from tests.support.gguf_files import smollm2

FILES = sorted(store.SPLITS.glob("*.json"))


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_packaged_split_is_complete(path):
    found = store.read(path)
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}", path.stem)
    assert found.split.architecture.startswith(path.stem[:16])
    assert found.split.weights == ""  # it serves every file of the checkpoint, quantised or not
    assert found.promise is not None
    assert found.recommended is not None
    assert found.promise.heads == sum(found.split.counts)
    assert found.promise.questions >= 50


def test_smollm2_finds_its_split():
    params = razor_jax.load(smollm2(), dtype="bfloat16")
    assert params.heads == store.read(store.packaged_path(params)).split
    assert params.razor is not None
