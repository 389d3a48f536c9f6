"""The arrays of one head group."""

from __future__ import annotations

from typing import NamedTuple

import jax

from .alibi import Alibi
from .state import State


class Part(NamedTuple):
    """One head group of a layer: arguments of `attend`, by its names."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    state: State | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    block_table: jax.Array | None = None
    alibi: Alibi | None = None
