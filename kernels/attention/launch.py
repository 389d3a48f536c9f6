"""What the Pallas backends share: the static options of a launch, and how far a block of query rows sees.

A length, a causal diagonal and their combination are the same three kinds of step over the slots. `visible_slots`
returns the two numbers that separate them, `full` and `end`:

    slots [0, full)      every query row of the block sees them: no mask
    slots [full, end)    some rows see them: masked
    slots from end on    no row sees them: never loaded
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Static options of a launch; `group_size` is None if the call is not causal."""

    group_size: int | None
    scale: float
    return_state: bool
    interpret: Any


def visible_slots(group_size: int | None, block: int, R: int, i, length, start):
    """Return (full, end) of the i-th block of `block` query rows, out of R; `start` is read if the call is causal."""
    if group_size is None:
        return length, length
    first = i * block
    last = jnp.minimum(first + block, R) - 1
    full, end = (start + lax.div(row, jnp.int32(group_size)) + 1 for row in (first, last))
    return jnp.minimum(length, full), jnp.minimum(length, end)
