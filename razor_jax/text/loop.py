"""The two compiled programs of generation: read the prompt and choose a token; decode a block of tokens.

Only shapes are static. Sampling numbers, stop ids, limits and lengths are traced: a session costs two
compilations, and a later call with the same padded shapes costs none.

On a mesh, the arrays that the host reads (tokens, counts, flags) are replicated, so every process can read them.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from .. import cache as kv
from ..cache import CacheSpec, KVCache
from ..functional import decode, extend, extend_known, placement_of, promoting
from ..params import Params
from .sampling import Sampling, sample

BLOCK = 32  # Most decode steps per call. The host reads tokens and looks for stop strings between calls.


class LoopState(flax.struct.PyTreeNode):
    """State between calls: the cache, and one chosen token per row that the cache lacks.

    Attributes:
      token: int32 [B], the newest token of each row; input of the next decode step.
      count: int32 [B], number of tokens generated so far.
      done: bool [B], rows that reached a stop token or their limit, or failed.
      failed: bool [B], rows whose logits were not finite; they get no further token.
      seen: bool [B, V], tokens that occur in prompt or output; None without a repetition penalty.
      counts: int32 [B, V], how often each token occurs in the output; None without a presence or frequency penalty.
      keys: PRNG keys [B], folded with `count` at each draw, so that a replay draws the same.
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    done: jax.Array
    failed: jax.Array
    seen: jax.Array | None
    counts: jax.Array | None
    keys: jax.Array


@promoting
def _begin(
    params: Params,
    source: KVCache | None,
    tokens: jax.Array,
    lengths: jax.Array,
    stop_ids: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    seed: jax.Array,
    *,
    spec: CacheSpec,
    chunk: int | None,
) -> LoopState:
    """Read prompts int32 [B, T] into a new cache, or a copy of `source`, and choose each row's first token."""
    B = tokens.shape[0]
    placement = placement_of(spec)
    cache = placement.init(spec, B, lengths) if source is None else placement.broadcast(source, B, spec.capacity)
    logits, cache = read_prompt(params, cache, tokens, lengths, chunk, fresh=source is None)
    seen = _seen(tokens, lengths, logits.shape[-1]) if sampling.penalised else None
    counts = jnp.zeros((B, logits.shape[-1]), jnp.int32) if sampling.counted else None
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(B, dtype=jnp.int32))
    zeros = jnp.zeros((B,), jnp.int32)
    state = LoopState(cache, zeros, zeros, zeros > 0, zeros > 0, seen, counts, keys)
    return _choose(state, cache, logits, stop_ids, limit, sampling)


begin = jax.jit(_begin, static_argnames=("spec", "chunk"))
# The same program with `source` donated: the cache is written in place.
resume = jax.jit(_begin, static_argnames=("spec", "chunk"), donate_argnames=("source",))


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
@promoting
def prefill(
    params: Params, tokens: jax.Array, lengths: jax.Array, *, spec: CacheSpec, chunk: int | None
) -> tuple[jax.Array, KVCache]:
    """Read prompts int32 [B, T] into a new cache. Return float32 logits [B, V] after each prompt, and the cache."""
    return read_prompt(
        params, placement_of(spec).init(spec, tokens.shape[0], lengths), tokens, lengths, chunk, fresh=True
    )


def read_prompt(
    params: Params, cache: KVCache, tokens: jax.Array, lengths: jax.Array, chunk: int | None, *, fresh: bool
) -> tuple[jax.Array, KVCache]:
    """Read prompts int32 [B, T] into `cache`: exact prefill if `chunk` is None, otherwise streaming prefill, `chunk`
    tokens per step.

    Returns float32 logits [B, V] after each prompt, and the cache. `fresh`: the cache is empty.
    """
    T = tokens.shape[1]
    if chunk is None or chunk >= T:
        logits, cache = extend_known(params, cache, tokens, lengths, "last", fresh=fresh)
        assert logits is not None
        return logits, cache
    tokens = jnp.pad(tokens, ((0, 0), (0, -T % chunk)))

    def body(index, carry):
        logits, cache = carry
        part = lax.dynamic_slice_in_dim(tokens, index * chunk, chunk, axis=1)
        new = jnp.clip(lengths - index * chunk, 0, chunk)
        latest, cache = extend(params, cache, part, new)
        assert latest is not None
        return jnp.where((new > 0)[:, None], latest, logits), cache

    logits = jnp.zeros((tokens.shape[0], params.config.vocab_size), jnp.float32)
    return lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, body, (logits, cache))


@functools.partial(jax.jit, static_argnames=("keep",), donate_argnames=("state",))
@promoting
def decode_block(
    params: Params,
    state: LoopState,
    stop_ids: jax.Array,
    limit: jax.Array,
    steps: jax.Array,
    sampling: Sampling,
    *,
    keep: bool,
) -> tuple[LoopState, jax.Array, LoopState | None]:
    """Run up to `steps` ≤ BLOCK decode steps. A row stops at a stop token or after `limit` [B] tokens.

    Returns the state, the new tokens int32 [B, BLOCK], and with `keep` a state for `rewind`, otherwise None. Row b
    has as many new tokens as its `count` grew; the rest of the row is padding.
    """
    # Full groups are append-only, so only the windowed ones need a copy.
    saved = None
    if keep:
        layers = tuple(
            tuple(g if g.windowed else g.map_slots(lambda x, axis: lax.slice_in_dim(x, 0, 0, axis=axis)) for g in layer)
            for layer in state.cache.layers
        )
        saved = state.replace(cache=state.cache.replace(layers=layers))
    # The host lowers the limit of a row that ended at a stop string.
    state = state.replace(done=state.done | (state.count >= limit))
    out = jnp.zeros((state.token.shape[0], BLOCK), jnp.int32)

    def going(carry):
        index, state, _ = carry
        return (index < steps) & jnp.any(~state.done)

    def step(carry):
        index, state, out = carry
        logits, cache = decode(params, state.cache, state.token, ~state.done)
        state = _choose(state, cache, logits, stop_ids, limit, sampling)
        return index + 1, state, lax.dynamic_update_slice_in_dim(out, state.token[:, None], index, axis=1)

    _, state, out = lax.while_loop(going, step, (jnp.int32(0), state, out))
    return (
        _with_sharding(state),
        placement_of(state.cache.spec).replicated(out),
        None if saved is None else _with_sharding(saved),
    )


def _with_sharding(state: LoopState) -> LoopState:
    """Return the state with the sharding that the host and the next call expect.

    A sharding constraint inside the body of a loop does not apply to the result of the loop.
    """
    placement = placement_of(state.cache.spec)
    small = {name: placement.replicated(getattr(state, name)) for name in ("token", "count", "done", "failed")}
    return state.replace(**small, cache=placement.pin_cache(state.cache))


def rewind(state: LoopState, saved: LoopState) -> LoopState:
    """Return `saved` with its full groups taken from `state`. Folding cannot be undone, so the windowed groups are
    copies."""
    return saved.replace(cache=kv.rollback(state.cache, saved.cache))


def _choose(state: LoopState, cache: KVCache, logits, stop_ids, limit, sampling: Sampling) -> LoopState:
    """Choose the next token of each live row and return the new state. Finished rows keep their token."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    failed = state.failed | (~state.done & ~jnp.isfinite(logits).all(axis=-1))
    ended = state.done | failed
    token = jnp.where(ended, state.token, sample(sampling, logits, keys, state.seen, state.counts))
    count = state.count + ~ended
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].set(True)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].add((~ended).astype(jnp.int32))
    stopped = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
    done = ended | stopped | (count >= limit) | cache.overflow
    replicated = placement_of(cache.spec).replicated
    new = {"token": token, "count": count, "done": done, "failed": failed, "seen": seen, "counts": counts}
    return state.replace(cache=cache, **{name: x if x is None else replicated(x) for name, x in new.items()})


def _seen(tokens: jax.Array, lengths: jax.Array, vocabulary: int) -> jax.Array:
    """Return bool [B, V]: the tokens that occur in each prompt."""
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32) < lengths[:, None]
    at = jnp.where(valid, tokens, vocabulary)
    return jnp.zeros((tokens.shape[0], vocabulary), bool).at[rows, at].set(True, mode="drop")
