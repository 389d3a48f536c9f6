"""The public cache write: it checks shapes, then runs the backend that `kernels/backend.py` chooses."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Int

from ..backend import Implementation, Kind, choose
from .arrays import CacheWrite, GroupArrays


def write(
    group: GroupArrays,
    tokens: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"] | None,
    sinks: jax.Array | int = 0,
    block_table: Int[jax.Array, "B pages"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> GroupArrays:
    """Append tokens to a head group, and return the group's arrays. The arguments are those of `CacheWrite`.

    Args:
      implementation: the backend by name, None to choose by device and shapes.

    Raises:
      ValueError: shapes or types disagree, or a forced backend cannot run.
    """
    call = CacheWrite(group, tokens, lengths, counts, window, sinks, block_table)
    _check(call)
    if implementation != "xla":
        kind = Kind("write", group.k.shape[-1], "", str(group.k.dtype))
        implementation = choose(implementation, lambda name: unsupported(name, group), kind)
    return backend_module(implementation).write(call)


def unsupported(implementation: Implementation, group: Any) -> str | None:
    """Return why an implementation cannot write such a group, or None if it can. Only shapes and dtypes are read."""
    return backend_module(implementation).unsupported(group) if implementation == "pallas_tpu" else None


def backend_module(implementation: Implementation) -> ModuleType:
    """Return the module of a backend, imported on first use, because Pallas takes a quarter of a second.

    On a GPU a donated scatter is in place, so a kernel would save nothing.
    """
    return importlib.import_module(".tpu" if implementation == "pallas_tpu" else ".xla", __package__)


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
        first = 0 if call.block_table is None else 1  # A pool has pages where a cache has rows.
        cached_shape, new_shape = (x.shape[first:axis] + x.shape[axis + 1 :] for x in (cached, new))
        if cached.dtype != new.dtype or cached_shape != new_shape:
            raise ValueError(
                f"new {name} is {new.dtype}{list(new.shape)}, the cache {cached.dtype}{list(cached.shape)}: types and "
                "all axes but the slots must agree"
            )
    B = call.tokens.k.shape[0]
    for name in ("lengths", "counts", "window"):
        x = getattr(call, name)
        if x is not None and x.shape != (B,):
            raise ValueError(f"{name} {list(x.shape)} must be [B] with the cache's B = {B}")
    if call.block_table is not None and (call.block_table.ndim != 2 or call.block_table.shape[0] != B):
        raise ValueError(f"block_table {list(call.block_table.shape)} must be [B, pages] with the cache's B = {B}")
