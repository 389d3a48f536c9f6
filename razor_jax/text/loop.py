"""The compiled programs of generation: read the prompt layer by layer; choose a token; decode a block of tokens.

Only shapes, and whether log probabilities are wanted, are static. Sampling rules, stop ids, limits and lengths are
traced: a later call with the same padded shapes compiles nothing. Reading takes one program per kind of layer, so that
a model of 80 layers compiles a few.

On a mesh, the arrays that the host reads (tokens, counts, flags) are replicated, so every process can read them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import cache as kv
from ..cache import CacheSpec, KVCache
from ..functional import Ids, decode, extend, extend_known, placement_of, promoting
from ..kernels import as_bits, from_bits
from ..kernels.backend import platform
from ..params import Params
from .logprobs import Logprobs, logprobs, no_logprobs
from .sampling import Sampling, sample

BLOCK = 32  # Most decode steps per call. The host reads tokens and looks for stop strings between calls.


class LoopState(flax.struct.PyTreeNode):
    """State between calls: the cache, with `seen`, and one chosen token per row that the cache lacks.

    Attributes:
      token: int32 [B], the newest token of each row; input of the next decode step.
      count: int32 [B], number of tokens generated so far.
      done: bool [B], rows that reached a stop token or their limit, or failed.
      failed: bool [B], rows whose logits were not finite; they get no further token.
      counts: int32 [B, V], how often each token occurs in the output.
      keys: PRNG keys [B], folded with `count` at each draw, so that a replay draws the same.
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    done: jax.Array
    failed: jax.Array
    counts: jax.Array
    keys: jax.Array


@promoting
def begin(
    params: Params,
    source: KVCache | None,
    tokens: Ids,
    lengths: Ids,
    stop_ids: Ids,
    limit: Ids,
    sampling: Sampling,
    seed: np.uint32,
    *,
    spec: CacheSpec,
    chunk: int | None,
    n: int = 1,
    score: bool = False,
    in_place: bool = False,
) -> tuple[LoopState, Logprobs | None]:
    """Read prompts int32 [B, T] into a new cache, a copy of `source`, or `in_place` into `source` itself, and choose
    the first token of `n` rows per prompt.

    Returns the state, and the log probabilities of the tokens if `score`.
    """
    if source is None:
        logits, cache = prefill(params, tokens, lengths, spec=spec, chunk=chunk)
    else:
        if source.seen is None:
            unknown = jnp.zeros((source.batch, params.config.vocab_size), bool)
            source = source.replace(seen=placement_of(spec).to_devices(unknown))
        source = source if in_place else _copy(source, batch=tokens.shape[0], capacity=spec.capacity)
        logits, cache = _read(params, source, tokens, lengths, chunk, fresh=False)
    if n > 1:
        cache = _copy(cache, batch=n * tokens.shape[0], capacity=spec.capacity)
    # A program would copy the layers that it only passes on.
    bare = cache.replace(layers=())
    state, found = _first(bare, logits, stop_ids, limit, sampling, seed, n=n, score=score)
    return state.replace(cache=cache), found


def prefill(
    params: Params, tokens: Ids, lengths: Ids, *, spec: CacheSpec, chunk: int | None
) -> tuple[jax.Array, KVCache]:
    """Read prompts int32 [B, T] into a new cache. Return float32 logits [B, V] after each prompt, and the cache."""
    empty = _empty(lengths, spec=spec, vocabulary=params.config.vocab_size)
    return _read(params, empty, tokens, lengths, chunk, fresh=True)


@functools.partial(jax.jit, static_argnames=("spec", "vocabulary"))
@promoting
def _empty(lengths: Ids, *, spec: CacheSpec, vocabulary: int) -> KVCache:
    placement, B = placement_of(spec), lengths.shape[0]
    return placement.pin_cache(placement.init(spec, B, lengths).replace(seen=jnp.zeros((B, vocabulary), bool)))


@functools.partial(jax.jit, static_argnames=("batch", "capacity"))
@promoting
def _copy(source: KVCache, *, batch: int, capacity: int) -> KVCache:
    placement = placement_of(source.spec)
    return placement.pin_cache(placement.broadcast(source, batch, capacity))


def _read(
    params: Params, cache: KVCache, tokens: Ids, lengths: Ids, chunk: int | None, *, fresh: bool
) -> tuple[jax.Array, KVCache]:
    """Run `read_prompt` from the host, in place: streaming prefill as one program, exact prefill layer by layer."""
    if chunk is not None and chunk < tokens.shape[1]:
        return _stream(params, cache, tokens, lengths, chunk)
    logits, cache = extend_known(params, cache, tokens, lengths, "last", fresh=fresh, in_place=True)
    assert logits is not None
    return logits, cache


@functools.partial(jax.jit, static_argnames=("chunk",), donate_argnames=("cache",))
@promoting
def _stream(params: Params, cache: KVCache, tokens, lengths, chunk: int):
    return read_prompt(params, cache, tokens, lengths, chunk, fresh=False)


@functools.partial(jax.jit, static_argnames=("n", "score"))
@promoting
def _first(
    cache: KVCache, logits, stop_ids, limit, sampling: Sampling, seed, *, n: int, score: bool
) -> tuple[LoopState, Logprobs | None]:
    """Choose each row's first token from logits [B / n, V]; `score`: return its log probabilities too."""
    logits = kv.repeat(logits, n)
    B, V = logits.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(B, dtype=jnp.int32))
    zeros = jnp.zeros((B,), jnp.int32)
    state = LoopState(cache, zeros, zeros, zeros > 0, zeros > 0, jnp.zeros((B, V), jnp.int32), keys)
    state = choose(state, cache, logits, stop_ids, limit, sampling)
    return state, scored(state, logits) if score else None


def scored(state: LoopState, logits: jax.Array) -> Logprobs:
    """Return the log probabilities of the newest tokens, on every device."""
    replicated = placement_of(state.cache.spec).replicated
    chosen, ids, values = logprobs(logits, state.token)
    return replicated(chosen), replicated(ids), replicated(values)


@promoting
def read_prompt(
    params: Params, cache: KVCache, tokens: Ids, lengths: Ids, chunk: int | None, *, fresh: bool
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


def decode_block(*arguments: Any, score: bool = False) -> tuple[LoopState, jax.Array, LoopState, Logprobs | None]:
    """Run `_decode_block`, compiled for this device."""
    return decode_program(platform())(*arguments, score=score)


@functools.cache
def decode_program(device: str) -> Any:
    """Return the jitted `_decode_block` for a kind of device, as `kernels.backend.platform` names it."""
    # With one row XLA makes reshapes of broadcasts, and this pass moves them one step per round of all passes over all
    # layers, up to 25 rounds: a fifth of the time of compiling. Without it the steps are as fast.
    options = {"xla_disable_hlo_passes": "reshape-mover"} if device == "cpu" else None
    return jax.jit(_decode_block, static_argnames=("score",), donate_argnames=("state",), compiler_options=options)


@promoting
def _decode_block(
    params: Params,
    state: LoopState,
    stop_ids: jax.Array,
    limit: jax.Array,
    steps: jax.Array,
    sampling: Sampling,
    *,
    score: bool = False,
) -> tuple[LoopState, jax.Array, LoopState, Logprobs | None]:
    """Run up to `steps` ≤ BLOCK decode steps. A row stops at a stop token or after `limit` [B] tokens. The cache may be
    `packed`.

    Returns the state, the new tokens int32 [B, BLOCK], a state for `rewind`, and, if `score`, the log probabilities
    [B, BLOCK, …] of the tokens. Row b has as many new tokens as its `count` grew; the rest of the row is padding.
    """
    saved, bits = before_block(state), any(x.dtype == jnp.uint16 for x in jax.tree.leaves(state.cache))
    # The host lowers the limit of a row that ended at a stop string.
    state = state.replace(done=state.done | (state.count >= limit))
    B, V = state.counts.shape
    tokens = jnp.zeros((B, BLOCK), jnp.int32)
    scores = tuple(jnp.zeros((B, BLOCK, *x.shape[1:]), x.dtype) for x in no_logprobs(B, V)) if score else None

    def going(carry):
        index, state, _ = carry
        return (index < steps) & jnp.any(~state.done)

    def step(carry):
        index, state, out = carry
        logits, cache = decode(params, jax.tree.map(from_bits, state.cache), state.token, ~state.done)
        cache = jax.tree.map(as_bits, cache) if bits else cache
        state = choose(state, cache, logits, stop_ids, limit, sampling)
        new = state.token, scored(state, logits) if score else None
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
        return index + 1, state, jax.tree.map(lambda x, y: put(x, y[:, None]), out, new)

    _, state, out = lax.while_loop(going, step, (jnp.int32(0), state, (tokens, scores)))
    tokens, scores = jax.tree.map(placement_of(state.cache.spec).replicated, out)
    return _with_sharding(state), tokens, _with_sharding(saved), scores


def packed(cache: KVCache) -> KVCache:
    """Return a cache on one CPU with bfloat16 values as bits, which `decode_block` updates in place (see
    `kernels.as_bits`); any other cache as it is. What changed is deleted."""
    (device, *_) = cache.length.devices()
    plain = cache.spec.placement is None and cache.spec.method is None
    return _replaced(cache, as_bits) if plain and device.platform == "cpu" else cache


def unpacked(cache: KVCache) -> KVCache:
    """Return what `packed` took."""
    return _replaced(cache, from_bits)


def _replaced(cache: KVCache, change: Callable[[jax.Array], jax.Array]) -> KVCache:
    def leaf(x: jax.Array) -> jax.Array:
        new = change(x)
        if new is not x:
            jax.block_until_ready(new)
            x.delete()  # before the next one is changed
        return new

    return jax.tree.map(leaf, cache)


def before_block(state: LoopState) -> LoopState:
    """Return a state to `rewind` to, which lacks the full groups: they are append-only.

    The windowed groups are copied even without stop strings: a program that does not copy would be a second one.
    """
    layers = tuple(
        tuple(g if g.windowed else g.map_slots(lambda x, axis: lax.slice_in_dim(x, 0, 0, axis=axis)) for g in layer)
        for layer in state.cache.layers
    )
    return state.replace(cache=state.cache.replace(layers=layers))


def _with_sharding(state: LoopState) -> LoopState:
    """Return the state with the sharding that the host and the next call expect.

    A sharding constraint inside the body of a loop does not apply to the result of the loop.
    """
    placement = placement_of(state.cache.spec)
    small = {name: placement.replicated(getattr(state, name)) for name in ("token", "count", "done", "failed")}
    return state.replace(**small, cache=placement.pin_cache(state.cache))


def rewind(state: LoopState, saved: LoopState, rows: np.ndarray | None) -> LoopState:
    """Return `saved` in `rows`, bool [B], or in all, and `state` in the others; full groups are those of `state`.

    Folding cannot be undone, so the windowed groups of `saved` are copies.
    """
    whole = saved.replace(cache=kv.rollback(state.cache, saved.cache))
    if rows is None:
        return whole
    rows = placement_of(state.cache.spec).to_devices(rows)
    # Leaf by leaf: one array more in memory, and a small program for each shape.
    return jax.tree.map(lambda old, new: old if old is new else _in_rows(rows, old, new), whole, state)


@functools.partial(jax.jit, donate_argnames=("old",))
def _in_rows(rows: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), old, new)


def choose(state: LoopState, cache: KVCache, logits, stop_ids, limit, sampling: Sampling) -> LoopState:
    """Choose the next token of each live row and return the new state. Finished rows keep their token."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    failed = state.failed | (~state.done & ~jnp.isfinite(logits).all(axis=-1))
    ended = state.done | failed
    assert cache.seen is not None, "a cache of this loop knows its tokens"
    token = jnp.where(ended, state.token, sample(sampling, logits, keys, cache.seen, state.counts))
    count = state.count + ~ended
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    counts = state.counts.at[rows, token].add((~ended).astype(jnp.int32))
    stopped = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
    done = ended | stopped | (count >= limit) | cache.overflow
    new = {"token": token, "count": count, "done": done, "failed": failed, "counts": counts}
    replicated = placement_of(cache.spec).replicated
    return state.replace(cache=cache, **{name: replicated(x) for name, x in new.items()})
