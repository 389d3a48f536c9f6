"""Slots of a head group spread over P devices: logical slot g is local slot g // P of device g mod P.

The share of each device is again a cache of the same kind, only smaller, so code that reads and writes a cache runs
on a share unchanged, given the share's numbers. With d the device and share(n) = ceil((n - d) / P):

    slots [0, n)        share(n) of them here, a prefix
    sinks and ring      N0' = share(N0), W' = share(N0 + W) - N0'; a lap of the ring passes here as a lap of W'
    the first p tokens  p' of them came here, so n' = max(0, p' - N0' - W') were dropped here

W' may be 0, in a ring of fewer slots than devices: then no token past the sinks ever comes here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shard:
    """The share of one device, or of several at once: `index` d is an int32 scalar or has leading axes of its own.

    `window` int32 [B] is None for a group that keeps every token.
    """

    devices: int
    index: jax.Array

    def share(self, slots: Any) -> Any:
        """Return how many of the logical slots [0, n) are here."""
        return (slots + (self.devices - 1) - self.index) // self.devices

    def slots(self, count: int) -> jax.Array:
        """Return the logical slots int32 [count] of the first `count` local ones."""
        return self.index + self.devices * jnp.arange(count, dtype=jnp.int32)

    def ring(self, window: jax.Array | None, sinks: int) -> tuple[jax.Array | None, jax.Array]:
        """Return W' and N0'."""
        return (None if window is None else self._lap(window, sinks)), self.share(sinks)

    def _lap(self, window: jax.Array, sinks: int) -> jax.Array:
        return self.share(sinks + window) - self.share(sinks)

    def length(self, length: jax.Array, window: jax.Array | None, sinks: int) -> jax.Array:
        """Return how many of the first `length` tokens int32 [B] came here."""
        if window is None:
            return self.share(length)
        past, lap = jnp.maximum(length - sinks, 0), jnp.maximum(window, 1)
        in_ring = past // lap * self._lap(window, sinks) + self.share(sinks + past % lap) - self.share(sinks)
        return self.share(jnp.minimum(length, sinks)) + in_ring

    def dropped(self, length: jax.Array, window: jax.Array, sinks: int) -> jax.Array:
        """Return how many of the tokens that came here were dropped."""
        return jnp.maximum(self.length(length, window, sinks) - self.share(sinks + window), 0) * (window > 0)

    def tokens(self, length: jax.Array, window: jax.Array | None, sinks: int, most: int) -> jax.Array:
        """Return the first `most` tokens that come here of a call after `length` others, int32 [..., B, most]."""
        here = jnp.arange(most, dtype=jnp.int32) + self.length(length, window, sinks)[..., None]
        deep = Shard(self.devices, jnp.asarray(self.index)[..., None])
        return deep._position(here, None if window is None else window[:, None], sinks) - length[:, None]

    def _position(self, token: jax.Array, window: jax.Array | None, sinks: int) -> jax.Array:
        """Return the position of the token that came here after `token` others."""
        first = self.index + self.devices * token
        if window is None:
            return first
        per_lap, here = jnp.maximum(self._lap(window, sinks), 1), self.share(sinks)
        lap, at = (token - here) // per_lap, (token - here) % per_lap
        return jnp.where(token < here, first, self.index + self.devices * (here + at) + lap * window)


def most_tokens(tokens: int, devices: int, shortest: int | None) -> int:
    """Return a bound on how many of `tokens` consecutive tokens come to one device; `shortest` ring, None without one.

    Inside a lap every P-th comes here; each of the laps that the tokens touch may round up.
    """
    laps = 1 if shortest is None else tokens // shortest + 2
    return min(tokens, tokens // devices + laps)
