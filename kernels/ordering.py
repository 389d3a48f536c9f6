"""Order between operations that a compiler takes for independent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def ordered_after(x: jax.Array, earlier: jax.Array, lengths: jax.Array) -> jax.Array:
    """x, but not before `earlier` is there; `lengths` are numbers ≥ 0 that only run time knows.

    Reading a cache and writing it are independent until someone says otherwise, and a compiler that may
    write first keeps a copy to read from. An optimization barrier says it on TPU and GPU; XLA on CPU drops
    barriers, so one element of x is also chosen by a condition that always holds but that no compiler knows.
    """
    x, earlier = lax.optimization_barrier((x, earlier))
    corner = (0,) * x.ndim
    chosen = jnp.where(lengths[0] >= 0, x[corner], earlier[(0,) * earlier.ndim].astype(x.dtype))
    return x.at[corner].set(chosen)
