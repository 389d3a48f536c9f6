"""Checkpoint folders of a few kilobytes for tests to change and to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from razor_jax.params import Params

LLAMA: dict[str, Any] = {"num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 128}


def copy(folder: Path, to: Path) -> Path:
    """Copy the files of a folder into another one; return that one."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def stored(directory: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a folder."""
    return {
        name: x
        for file in sorted(directory.glob("*.safetensors"))
        for name, x in safetensors.numpy.load_file(file).items()
    }


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite model.safetensors as `change` leaves its tensors."""
    tensors = stored(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def set_config(directory: Path, **fields: Any) -> None:
    """Set fields of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def set_index(directory: Path, **files: str) -> dict[str, str]:
    """Change the file that the index names for some tensors; return the names as they were."""
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **files}}))
    return index["weight_map"]


def assert_equal_params(a: Params, b: Params) -> None:
    """Compare configs and all weights, bit for bit."""
    assert a.config == b.config
    assert jax.tree.structure(a.weights) == jax.tree.structure(b.weights)
    for x, y in zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
