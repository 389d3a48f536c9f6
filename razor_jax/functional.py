"""The jitted core: an empty cache, `extend` it by tokens, `decode` one more. Pure, jit- and pmap-able."""

from __future__ import annotations

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float32, Int

from . import cache as kv
from .cache import Call, Group, KVCache
from .config import RazorConfig
from .mesh import attention
from .models import alibi, rope
from .models.transformer import Block, Transformer
from .params import Params
from .sharding import constrain, describe, nontrivial
from .spec import Layout

Logits = Literal["last", "all", "none"]
Ids = jax.Array | np.ndarray

# Tokens that pass through a layer together. A longer call goes layer by layer in chunks, so that what it
# needs above weights, cache and hidden states is one layer's K/V and one chunk of activations.
CHUNK = 256


def init_cache(
    params: Params,
    *,
    batch: int,
    capacity: int,
    razor: RazorConfig | None,
    prompt_lengths: Int[Ids, " B"] | None = None,
    layout: Layout | None = None,
) -> KVCache:
    """An empty cache of `batch` rows of `capacity` tokens under a policy; None for dense attention.

    Args:
      prompt_lengths: int32 [B], fixes each row's window under the paper's rule; None leaves it to the
        lengths of the first `extend`.
      layout: on a mesh, "slot" or "head" (`spec.py`); None is by head where every group divides, else by slot.

    Raises:
      ValueError: batch or capacity below 1, a policy without a head split, a forced implementation that cannot
        run here, or a batch or layout that does not divide over the mesh.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: a cache has at least 1 row")
    if prompt_lengths is not None and jnp.shape(prompt_lengths) != (batch,):
        raise ValueError(f"prompt_lengths {jnp.shape(prompt_lengths)}: must be [batch] with batch = {batch}")
    require_split(params, razor)
    config = params.config
    spec = kv.make_spec(
        params.heads_or_all,
        config.head_dim,
        capacity,
        razor,
        params.dtype,
        params.implementation,
        config.alibi,
        params.mesh,
        layout,
    )
    return kv.init(spec, batch, prompt_lengths)


def require_split(params: Params, razor: RazorConfig | None) -> None:
    """Refuse to compress when nobody has said which heads keep everything."""
    if razor is not None and params.heads is None and params.config.alibi:
        raise ValueError(
            "these params carry no scopes, so nothing says how far back their heads look: "
            "params = razor_jax.with_heads(params, razor_jax.heads.alibi.split(params)), or pass razor=None for dense "
            "attention"
        )
    if razor is not None and params.heads is None:
        raise ValueError(
            "these params carry no head split, so nothing says which heads may drop tokens: "
            "params = razor_jax.with_heads(params, razor_jax.find_heads(params).select()), "
            "or pass razor=None for dense attention"
        )


def extend(
    params: Params,
    cache: KVCache,
    tokens: Int[Ids, "B T"],
    lengths: Int[Ids, " B"],
    logits: Logits = "last",
) -> tuple[Float32[jax.Array, "B *T V"] | None, KVCache]:
    """Append tokens to every row of the cache.

    Args:
      tokens: int32 [B, T], right-padded. Ids outside the vocabulary are not caught here: under jit nothing can raise.
      lengths: int32 [B], valid new tokens of each row, clipped to 0..T; 0 leaves the row bit-identical.
      logits: "last" for float32 [B, V] of each row's last valid token (zeros for a row without one),
        "all" for [B, T, V] (meaningless past a row's length), "none" for None.

    Returns:
      The logits and the new cache. A row that would pass the capacity is left untouched and flagged in
      `cache.overflow`.
    """
    return extend_known(params, cache, tokens, lengths, logits, fresh=False)


def extend_known(
    params: Params, cache: KVCache, tokens: Ids, lengths: Ids, logits: Logits, *, fresh: bool
) -> tuple[jax.Array | None, KVCache]:
    """`extend`, told statically whether the cache is `fresh` from `init_cache`: then only the call is attended to."""
    _check_call(cache, tokens, lengths, logits)
    check_cache(params, cache)
    T = tokens.shape[1]
    run = _whole if T <= CHUNK else _in_chunks
    tokens = jnp.asarray(tokens, jnp.int32)
    if T > CHUNK:
        tokens = jnp.pad(tokens, ((0, 0), (0, -T % CHUNK)))
    call, cache = kv.begin(cache, lengths, T, fresh)
    model = Transformer(params.config)

    x = _embed(params, tokens, call)
    layers = []
    for index, layer in enumerate(cache.layers):
        with jax.named_scope(f"layer_{index}"):
            x, layer = run(params, index, x, layer, call)
            layers.append(layer)
    cache = kv.placed(cache.replace(layers=tuple(layers)))

    if logits == "none":
        return None, cache
    if logits == "last":
        last = jnp.clip(call.new - 1, 0, x.shape[1] - 1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    out = cast(jax.Array, model.apply({"params": params.weights}, x[:, :T], method="logits"))
    out = constrain(out, call.spec.mesh, call.spec.rows(cache.batch))
    if logits == "all":
        return out, cache
    return jnp.where((call.new > 0)[:, None], out[:, 0], 0.0), cache


def decode(
    params: Params, cache: KVCache, token: Int[Ids, " B"], active: Bool[Ids, " B"] | None = None
) -> tuple[Float32[jax.Array, "B V"], KVCache]:
    """Append one token int32 [B] to every active row: float32 logits [B, V] and the new cache.

    `active` bool [B], None for all; an inactive row is left untouched and its logits are zeros.
    """
    lengths = jnp.ones_like(cache.length) if active is None else active.astype(jnp.int32)
    logits, cache = extend(params, cache, token[:, None], lengths)
    assert logits is not None
    return logits, cache


def _check_call(cache: KVCache, tokens: Ids, lengths: Ids, logits: Logits) -> None:
    if logits not in ("last", "all", "none"):
        raise ValueError(f"logits={logits!r}: use 'last', 'all' or 'none'")
    B = cache.batch
    if tokens.ndim != 2 or tokens.shape[0] != B or tokens.shape[1] < 1 or lengths.shape != (B,):
        raise ValueError(
            f"tokens {tokens.shape} and lengths {lengths.shape} must be [B, T] and [B] with the cache's "
            f"B = {B} and T of at least 1"
        )
    for name, x in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} of type {x.dtype}: must be integers, int32")


def check_cache(params: Params, cache: KVCache) -> None:
    """Refuse a cache that was made for other heads, shapes or devices, or for another implementation than a forced
    one."""
    if cache.spec.mesh != nontrivial(params.mesh):
        raise ValueError(
            f"the cache lies on {describe(cache.spec.mesh)}, the params on {describe(nontrivial(params.mesh))}: "
            "make the cache from the same params"
        )
    if params.implementation not in (None, cache.spec.implementation):
        raise ValueError(
            f"these params force implementation={params.implementation!r}, the cache was made for "
            f"{cache.spec.implementation!r}: make the cache from the same params"
        )
    spec, config = cache.spec, params.config
    have = (len(spec.counts), spec.num_kv_heads, spec.head_dim)
    want = (config.num_layers, config.num_kv_heads, config.head_dim)
    if have != want:
        raise ValueError(f"the cache is for (layers, KV heads, head width) {have}, the model has {want}")
    # Another split of the same weights holds its heads in another order, dense or not.
    if (spec.retrieval, spec.scopes) != (params.heads_or_all.retrieval, params.heads_or_all.scopes):
        raise ValueError(
            f"the cache was made for another head split: retrieval heads by layer {list(spec.retrieval)}, these "
            f"params have {list(params.heads_or_all.retrieval)}; make the cache from the same params"
        )


def _block(params: Params, index: int, *args: Any, method: str) -> Any:
    return Block(params.config).apply({"params": params.weights[f"blocks_{index}"]}, *args, method=method)


def _tables(params: Params, call: Call, start: jax.Array | int, T: int) -> rope.Tables:
    positions = call.length[:, None] + start + jnp.arange(T, dtype=jnp.int32)
    return rope.tables(params.config.rope, params.config.head_dim, positions, call.length + call.new)


def _slopes(params: Params, index: int) -> np.ndarray | None:
    """float32 [K, G] of a layer's heads in held order, None without ALiBi."""
    c = params.config
    if not c.alibi:
        return None
    return alibi.slopes(c.num_heads).reshape(c.num_kv_heads, c.group_size)[list(params.order(index))]


def _embed(params: Params, tokens: jax.Array, call: Call) -> jax.Array:
    """Hidden states [B, T, D] of tokens int32 [B, T]; on a mesh those of a long call come chunk by chunk, for they
    lie split, and a chunk is whole when it is looked up."""
    mesh, (B, T) = call.spec.mesh, tokens.shape

    def embed(tokens):
        return cast(jax.Array, Transformer(params.config).apply({"params": params.weights}, tokens, method="embed"))

    if mesh is None or T <= CHUNK:
        return constrain(embed(tokens), mesh, call.spec.rows(B))
    x = jnp.zeros((B, T, params.config.hidden_size), params.dtype)
    at = attention.hidden(x, call)

    def chunk(index, x):
        part = constrain(embed(lax.dynamic_slice_in_dim(tokens, index * CHUNK, CHUNK, axis=1)), mesh, *at)
        return lax.dynamic_update_slice_in_dim(x, part, index * CHUNK, axis=1)

    return lax.fori_loop(0, T // CHUNK, chunk, constrain(x, mesh, *at))


def _whole(params: Params, index: int, x: jax.Array, layer: tuple[Group, ...], call: Call):
    """One layer over x [B, T, D] at once."""

    def attend(q, k, v, state):
        return attention.attend_and_write(q, k, v, state, call, _slopes(params, index))

    x, layer = _block(params, index, x, _tables(params, call, 0, x.shape[1]), attend, layer, method="__call__")
    return constrain(x, call.spec.mesh, call.spec.rows(x.shape[0])), layer


def _in_chunks(params: Params, index: int, x: jax.Array, layer: tuple[Group, ...], call: Call):
    """One layer over x [B, T, D], T a multiple of CHUNK: keys and values of all tokens, then attention and
    MLP chunk by chunk in place, then the cache write. Chunks past the longest row cost nothing."""
    config = params.config
    name, slopes = f"blocks_{index}", _slopes(params, index)
    # Where a compiler lays a loop's weights out anew (seen for TPU 7x) it would do so for all layers at once.
    weights, x = lax.optimization_barrier((params.weights[name], x))
    params = params.replace(weights={name: weights})
    B, T, _ = x.shape
    mesh = call.spec.mesh
    chunks = (jnp.max(call.new) + CHUNK - 1) // CHUNK

    def put(x, chunk, start):
        if mesh is not None:
            chunk = constrain(chunk, mesh, *attention.hidden(x, call))
        return lax.dynamic_update_slice_in_dim(x, chunk, start, axis=1)

    def project(chunk, kv_):
        start = chunk * CHUNK
        new = _block(
            params,
            index,
            attention.chunk(x, start, CHUNK, call),
            _tables(params, call, start, CHUNK),
            method="keys_values",
        )
        return tuple(lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(kv_, new, strict=True))

    empty = attention.blank(x, (B, config.num_kv_heads, T, config.head_dim), call)
    k, v = lax.fori_loop(0, chunks, project, (empty, empty))

    def mix(chunk, x):
        start = chunk * CHUNK
        x_chunk = attention.chunk(x, start, CHUNK, call)
        q = _block(params, index, x_chunk, _tables(params, call, start, CHUNK), method="queries")
        out = attention.attend(q, k, v, layer, call, start=start, group_size=config.group_size, slopes=slopes)
        return put(x, _block(params, index, x_chunk, out, method="output_and_mlp"), start)

    x = lax.fori_loop(0, chunks, mix, x)
    return attention.write_behind(x, k, v, layer, call)
