"""Memory spaces of a kernel's operands on TPU."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def keep_in_hbm(x: jax.Array | None, interpret: Any) -> jax.Array | None:
    """Pin a cache to HBM; otherwise the compiler may stage all of it through VMEM.

    The kernels load the blocks that they need, and `memory_analysis` does not count a staged copy. Use it only on
    operands of a `pallas_call` under jit. The interpreter has one memory and rejects the constraint.
    """
    return x if x is None or interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
