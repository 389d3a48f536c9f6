"""One implementation for the attention and the cache writes of a model."""

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
    asked: Implementation | None, head_dim: int, dtype: jnp.dtype, cached: Iterable[jnp.dtype], alibi: bool
) -> Implementation:
    """Return the implementation for queries and new tokens of `dtype` and caches of the types `cached`.

    `asked` None chooses by the device, and warns where its kernels cannot take the model. Raises ValueError where a
    forced implementation cannot run.
    """

    def of(kind) -> Any:
        return jax.ShapeDtypeStruct((1, 1, 32, head_dim), kind)

    def unsupported(name):
        for kind in sorted({*cached, dtype}, key=str):
            keys = of(kind)
            reason = attention.unsupported(name, of(dtype), keys, keys, alibi) or cache_write.unsupported(
                name, GroupArrays(keys, keys)
            )
            if reason is not None:
                return reason
        return None

    chosen = choose(asked, unsupported)
    if asked is None and chosen != first_choice():
        # Python shows a warning once for each place that raises it.
        reason = why_not(first_choice(), unsupported)
        warnings.warn(f"attention runs without its {first_choice()} kernels, on XLA: {reason}", stacklevel=4)
    return chosen
