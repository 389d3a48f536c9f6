"""Teacher forcing: read given tokens into a cache and return the probability of each."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int, Int32

from ..cache import KVCache
from ..functional import decode, extend, promoting
from ..params import Params


class TeacherForced(NamedTuple):
    """Predictions of the model after each given token.

    Attributes:
      logprobs: log-probability of the given next token.
      best: the most likely next token.
      finite: whether all logits are finite.
    """

    logprobs: Float32[jax.Array, "*n"]
    best: Int32[jax.Array, "*n"]
    finite: Bool[jax.Array, "*n"]


def predictions(logits: Float32[jax.Array, "*n V"], following: Int[jax.Array, "*n"]) -> TeacherForced:
    """Return the predictions in float32 logits [*n, V], with log-probabilities of the `following` tokens [*n]."""
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], axis=-1)[..., 0]
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return TeacherForced(logprobs, best, jnp.isfinite(logits).all(-1))


@promoting
def force(
    params: Params,
    cache: KVCache,
    tokens: Int[jax.Array, "B T"],
    following: Int[jax.Array, "B T"],
    lengths: Int[jax.Array, " B"],
    *,
    chunk: int = 1,
) -> tuple[TeacherForced, KVCache]:
    """Write int32 tokens [B, T] to the cache, `chunk` per step, and predict `following` [B, T], the token after each.

    With `chunk` 1 each token is read as in decoding. With a larger chunk, the tokens of a step also attend to each
    other in full precision, before any is dropped. Rows end at `lengths` [B]; later results are undefined.
    """
    T = tokens.shape[1]
    pad = ((0, 0), (0, -T % chunk))
    tokens, following = (jnp.pad(jnp.asarray(x, jnp.int32), pad) for x in (tokens, following))

    def body(index, carry):
        found, cache = carry
        at = index * chunk
        part, target = (lax.dynamic_slice_in_dim(x, at, chunk, 1) for x in (tokens, following))
        if chunk == 1:
            one, cache = decode(params, cache, part[:, 0], at < lengths)
            logits = one[:, None]
        else:
            logits, cache = extend(params, cache, part, jnp.clip(lengths - at, 0, chunk), logits="all")
            assert logits is not None
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
        return jax.tree.map(put, found, predictions(logits, target)), cache

    empty = TeacherForced(
        jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, jnp.int32), jnp.zeros(tokens.shape, bool)
    )
    found, cache = lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, body, (empty, cache))
    return jax.tree.map(lambda x: x[:, :T], found), cache


# `force`, compiled. The cache is donated.
force_jit = jax.jit(force, static_argnames=("chunk",), donate_argnames=("cache",))
