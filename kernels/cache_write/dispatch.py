"""The public cache write: it checks shapes, then runs the backend that `kernels/backend.py` chooses."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Int

from ..backend import Implementation, choose
from . import tpu, xla
from .arrays import CacheWrite, GroupArrays


def write(
    group: GroupArrays,
    tokens: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"] | None,
    sinks: jax.Array | int = 0,
    *,
    implementation: Implementation | None = None,
) -> GroupArrays:
    """Append tokens to a head group, and return the group's arrays. The arguments are those of `CacheWrite`.

    Args:
      implementation: the backend by name, None to choose by device and shapes.

    Raises:
      ValueError: shapes or types disagree, or a forced backend cannot run.
    """
    call = CacheWrite(group, tokens, lengths, counts, window, sinks)
    _check(call)
    if implementation != "xla":
        implementation = choose(implementation, lambda name: unsupported(name, group))
    # On a GPU a donated scatter is in place, so a kernel would save nothing.
    return (tpu if implementation == "pallas_tpu" else xla).write(call)


def unsupported(implementation: Implementation, group: Any) -> str | None:
    """Return why an implementation cannot write such a group, or None if it can. Only shapes and dtypes are read."""
    return tpu.unsupported(group) if implementation == "pallas_tpu" else None


def _check(call: CacheWrite) -> None:
    """Raise ValueError if shapes or types disagree."""
    for name in ("k", "v", "k_scale", "v_scale"):
        cached, new = getattr(call.group, name), getattr(call.tokens, name)
        if (cached is None) != (new is None):
            given, missing = ("new tokens", "cache") if cached is None else ("cache", "new tokens")
            raise ValueError(
                f"{name}: the {given} have it, the {missing} not; an int8 cache has scales, other types have none"
            )
        if cached is None:
            continue
        axis = 2 if name in "kv" else 3
        cached_shape, new_shape = (x.shape[:axis] + x.shape[axis + 1 :] for x in (cached, new))
        if cached.dtype != new.dtype or cached_shape != new_shape:
            raise ValueError(
                f"new {name} is {new.dtype}{list(new.shape)}, the cache {cached.dtype}{list(cached.shape)}: types and "
                "all axes but the slots must agree"
            )
    B = call.group.k.shape[0]
    for name in ("lengths", "counts", "window"):
        x = getattr(call, name)
        if x is not None and x.shape != (B,):
            raise ValueError(f"{name} {list(x.shape)} must be [B] with the cache's B = {B}")
