"""The choice of one implementation for all attention and cache writes of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from . import attention, cache_write
from .backend import Implementation, choose, first_choice, why_not
from .cache_write import GroupArrays


def choose_for_model(
    implementation: Implementation | None,
    head_dim: int,
    dtype: jnp.dtype,
    cache_dtypes: Iterable[jnp.dtype],
    alibi: bool,
) -> Implementation:
    """Return the implementation for queries and new tokens of `dtype` and caches of `cache_dtypes`.

    None chooses by device, and warns if the device's kernels cannot take the model. Raises ValueError if a forced
    implementation cannot run.
    """

    def array(kind: jnp.dtype) -> Any:
        return jax.ShapeDtypeStruct((1, 1, 32, head_dim), kind)

    def unsupported(name: Implementation) -> str | None:
        for kind in sorted({*cache_dtypes, dtype}, key=str):
            keys = array(kind)
            reason = attention.unsupported(name, array(dtype), keys, keys, alibi) or cache_write.unsupported(
                name, GroupArrays(keys, keys)
            )
            if reason is not None:
                return reason
        return None

    chosen = choose(implementation, unsupported)
    if implementation is None and chosen != first_choice():
        # Python shows a warning once per place that raises it.
        reason = why_not(first_choice(), unsupported)
        warnings.warn(f"attention runs without its {first_choice()} kernels, on XLA: {reason}", stacklevel=4)
    return chosen
