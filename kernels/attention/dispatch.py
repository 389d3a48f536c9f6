"""Which backend runs an attention call: `implementation=None` picks, a name forces.

    "xla"         everywhere, the reference
    "pallas_tpu"  one kernel on TPU (v5e, v5p, v6e, 7x), only where it is asked for by name

The kernel is proven against float64 in interpret mode and compiled by the real TPU compiler, but no TPU has run it
yet, and a cache of 4,100 slots is no whole number of its tiles: until both are settled, None is XLA.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from . import tpu, xla
from .state import State

Implementation = Literal["xla", "pallas_tpu"]


def attend(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K S H"],
    v: Float[jax.Array, "B K S H"],
    lengths: Int[jax.Array, " B"],
    *,
    scale: float,
    state: State | None = None,
    return_state: bool = False,
    implementation: Implementation | None = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Every query row sees slots [0, lengths[b]): decode, and a chunk against the cache.

    Args:
      q: [B, K, R, H] query rows, G·T of them packed t-major.
      k, v: [B, K, S, H]; slots from lengths[b] on are never read into a result.
      lengths: int32 [B], valid slots.
      scale: factor on the logits.
      state: what was seen before, None for nothing.
      return_state: give (acc, m, l) instead of acc / l.
      implementation: the backend by name, None for XLA.

    Returns:
      [B, K, R, H] in q's type, or the state.
    """
    backend = _backend(implementation, q, k, v)
    return backend.attend(q, k, v, lengths, scale=scale, state=state, return_state=return_state)


def attend_causal(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K S H"],
    v: Float[jax.Array, "B K S H"],
    lengths: Int[jax.Array, " B"],
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    state: State | None = None,
    return_state: bool = False,
    implementation: Implementation | None = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Query token t, at index start + t of a chunk, sees the chunk's tokens up to its own.

    Args:
      q: [B, K, G·Tq, H], rows packed t-major.
      k, v: [B, K, T, H], the whole chunk.
      lengths: int32 [B], valid tokens of the chunk.
      start: index in the chunk of q's first token, an int or int32 scalar.
      group_size: G.
      scale, state, return_state, implementation: as in `attend`.

    Returns:
      [B, K, G·Tq, H] in q's type, or the state.
    """
    backend = _backend(implementation, q, k, v)
    return backend.attend_causal(
        q, k, v, lengths, start=start, group_size=group_size, scale=scale, state=state, return_state=return_state
    )


def _backend(implementation: Implementation | None, q: jax.Array, k: jax.Array, v: jax.Array):
    """The module that runs the call."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation={implementation!r}: one of {', '.join(get_args(Implementation))}, or None to choose"
        )
    if implementation in (None, "xla"):
        return xla
    # The device of the trace, which ahead of time is not one of this machine.
    reason = tpu.unsupported(q, k, v)
    if reason is None and not pltpu.is_tpu_device():
        reason = f"the device is not a TPU (the backend is {jax.default_backend()})"
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot run here: {reason}. Pass None or 'xla'")
    return tpu
