"""ALiBi's biases: the slopes and positions that a call needs.

A key at position p adds slope·(p - q) to the logits of a query at position q. Distances are int32, so that near keys
are exact in a row of any length; the bias is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Alibi(NamedTuple):
    """Slopes float32 [K, G] and int32 positions of the queries [B, T] and of the keys [B, S].

    Positions of slots that are not read may be anything.
    """

    slopes: jax.Array
    queries: jax.Array
    keys: jax.Array

    def bias(self, keys: jax.Array) -> jax.Array:
        """Return the biases float32 [B, K, T·G, s] of keys at positions int32 [B, s], rows packed t-major."""
        distance = (keys[:, None, :] - self.queries[:, :, None]).astype(jnp.float32)  # [B, T, s]
        bias = self.slopes[None, :, None, :, None] * distance[:, None, :, None, :]  # [B, K, T, G, s]
        B, K, T, G, s = bias.shape
        return bias.reshape(B, K, T * G, s)
