"""Given tokens read into a cache, as decoding would read them: what the model would have said at each."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int, Int32

from ..cache import KVCache
from ..functional import decode, extend
from ..params import Params


class Read(NamedTuple):
    """After each token: log-probability of the given next one, the likeliest one, whether all logits are finite."""

    logprobs: Float32[jax.Array, "B T"]
    best: Int32[jax.Array, "B T"]
    finite: jax.Array  # bool [B, T]


@functools.partial(jax.jit, static_argnames=("chunk",), donate_argnames=("cache",))
def read(
    params: Params,
    cache: KVCache,
    tokens: Int[jax.Array, "B T"],
    following: Int[jax.Array, "B T"],
    lengths: Int[jax.Array, " B"],
    *,
    chunk: int = 1,
) -> tuple[Read, KVCache]:
    """Write int32 tokens [B, T], `chunk` of them a call, and judge `following` [B, T], each token's next one.

    Rows end at `lengths` [B]; what is returned past them means nothing. The cache is given away. With `chunk` 1 every
    token is read as decoding reads it; else tokens of one call see each other whole.
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
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        new = Read(logprobs, best, jnp.isfinite(logits).all(-1))
        return jax.tree.map(functools.partial(_put, at), found, new), cache

    empty = Read(jnp.zeros(tokens.shape), jnp.zeros(tokens.shape, jnp.int32), jnp.zeros(tokens.shape, bool))
    found, cache = lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, body, (empty, cache))
    return jax.tree.map(lambda x: x[:, :T], found), cache


def _put(at: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, at, axis=1)
