"""The public cache write: shapes checked, then the backend that `kernels/backend.py` chooses."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Int

from ..backend import Implementation, choose
from . import tpu, xla
from .arrays import GroupArrays


def write(
    held: GroupArrays,
    new: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"] | None,
    sinks: jax.Array | int = 0,
    *,
    implementation: Implementation | None = None,
) -> GroupArrays:
    """Return the group with tokens 0 … counts[b]-1 of `new` appended to row b, which has seen lengths[b] tokens.

    Position p of a full group goes to slot p; of a windowed group to slot p below N0, otherwise to slot
    N0 + (p - N0) mod W_b, and what it evicts joins the means. Donated arrays are written in place.

    Args:
      held: the group, [B,K,S,H].
      new: T tokens in the cache's type, [B,K,T,H] and scales [B,K,1,T]; no means.
      lengths, counts: int32 [B]; a row of count 0 stays bit-identical.
      window: int32 [B], W of each row; None for a group that keeps every token.
      sinks: N0, an int or, where it is known at run time only, an int32 scalar.
      implementation: the backend by name, None to choose by device and shapes.

    Returns:
      The group: slots as T single writes would leave them, exactly; means to float32 rounding.

    Raises:
      ValueError: shapes or types that disagree, or a forced backend that cannot run.
    """
    for name in ("k", "v", "k_scale", "v_scale"):
        have, given = getattr(held, name), getattr(new, name)
        if (have is None) != (given is None):
            who = ("new tokens", "cache") if have is None else ("cache", "new tokens")
            raise ValueError(f"{name}: the {who[0]} have it, the {who[1]} not; an int8 cache has scales, no other")
        if have is None:
            continue
        axis = 2 if name in "kv" else 3
        mine, other = (x.shape[:axis] + x.shape[axis + 1 :] for x in (have, given))
        if have.dtype != given.dtype or mine != other:
            raise ValueError(
                f"new {name} is {given.dtype}{list(given.shape)}, the cache {have.dtype}{list(have.shape)}"
            )
    for name, x in (("lengths", lengths), ("counts", counts), ("window", window)):
        if x is not None and x.shape != held.k.shape[:1]:
            raise ValueError(f"{name} {list(x.shape)} must be [B] with the cache's B = {held.k.shape[0]}")
    if implementation != "xla":
        implementation = choose(implementation, lambda name: unsupported(name, held))
    # On a GPU a donated scatter is in place, so there is nothing that a kernel could save.
    return (tpu if implementation == "pallas_tpu" else xla).write(held, new, lengths, counts, window, sinks)


def unsupported(implementation: Implementation, held: Any) -> str | None:
    """Return why an implementation cannot write such a group, or None if it can. Only shapes and dtypes are read."""
    return tpu.unsupported(held) if implementation == "pallas_tpu" else None
