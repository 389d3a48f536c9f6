"""Log probabilities of generated tokens and of the likeliest tokens at their places.

They are the model's, before penalties, temperature and filters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MAX_LOGPROBS = 20  # most alternatives of a token that a call can ask for; programs always return as many

# Of the chosen tokens float32 [n]; ids int32 [n, top] and log probabilities float32 [n, top] of the likeliest ones.
# `top` is MAX_LOGPROBS, or the size of a smaller vocabulary.
Logprobs = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token, and the likeliest tokens at its place with theirs, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return {"token": self.token, "logprob": self.logprob, "top": [list(each) for each in self.top]}


def logprobs(logits: Float[Array, "n V"], token: Int[Array, " n"]) -> Logprobs:
    """Return the log probability of each token and of the likeliest ones. Ties go to the lower id."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    values, ids = jax.lax.top_k(scores, min(MAX_LOGPROBS, logits.shape[-1]))
    return chosen, ids.astype(jnp.int32), values


def no_logprobs(rows: int, vocabulary: int) -> Logprobs:
    """Return zeros of the shapes of `logprobs`."""
    top = (rows, min(MAX_LOGPROBS, vocabulary))
    return jnp.zeros((rows,), jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)


def token_logprobs(tokens: Iterable[int], scores: Sequence[np.ndarray], top: int) -> list[TokenLogprob]:
    """Return the records of tokens with `top` alternatives each; `scores` are `Logprobs` of at least as many tokens."""
    chosen, ids, values = scores
    return [
        TokenLogprob(
            int(token),
            float(chosen[i]),
            tuple((int(a), float(b)) for a, b in zip(ids[i, :top], values[i, :top], strict=True)),
        )
        for i, token in enumerate(tokens)
    ]
