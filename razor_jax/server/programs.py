"""The compiled programs of the engine. Each has one shape, so that all of them compile before the first request.

    embed_chunk      hidden states of a chunk of one prompt
    layer_chunk      the chunk through one layer; its keys and values join the staging buffer
    chunk_logits     logits after the chunk, and log probabilities of its tokens
    write_layer      the staged keys and values of one row go to its pages: evict, fold, store
    start_row        choose a row's first token, and set its state
    decode_block     decode steps of all rows
    set_allowed      set which tokens a row may choose
    copy_prefix      copy pages and compensation tokens between a row and the store of prefixes

**Prefill in chunks is exact.** A segment of a prompt is one call of the library: its tokens see the cache as it was
before the segment, and the segment's own tokens, unrounded. So the segment's keys and values wait in a dense *staging*
buffer until its last chunk has run, and are written together.

Every small number of a row is an argument (`Rows`), decided by the host. Only what is large stays on the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..cache import AttentionMetadata, CacheSpec, Group, KVCache
from ..functional import decode, placement_of, promoting
from ..models import rope
from ..models.config import ModelConfig
from ..models.transformer import Block, Transformer
from ..params import Params
from ..text.logprobs import Logprobs, logprobs, no_logprobs
from ..text.sampling import Sampling, sample
from . import on_mesh
from .pages import Layers, kinds

_LOGITS_AT_ONCE = 32  # prompt tokens whose logits are in memory together

Tables = tuple[jax.Array, ...]  # block table of each pool, int32 [rows, pages]
Staged = tuple[jax.Array, jax.Array]  # k, v [1, K, T, H] of one layer


class Vocabulary(flax.struct.PyTreeNode):
    """What each row knows about each token, [B, V].

    Attributes:
      seen: bool, it occurs in prompt or output.
      counts: int32, how often it occurs in the output.
      bias: float32, added to its logit.
      allowed: bool, it may be chosen next.
    """

    seen: jax.Array
    counts: jax.Array
    bias: jax.Array
    allowed: jax.Array

    @classmethod
    def init(cls, rows: int, vocabulary: int) -> Vocabulary:
        """Return the state of rows without a request."""
        shape = (rows, vocabulary)
        return cls(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.ones(shape, bool))


class Rows(flax.struct.PyTreeNode):
    """The numbers of all rows, [B], or of one row, [1].

    Attributes:
      length: tokens in the cache. window: W.
      token: newest token, which the cache lacks. count: tokens generated. limit: most tokens to generate.
      live: the row decodes.
      stop_ids: int32 [B, n], tokens that end it, padded with -1.
      seed: uint32, of its draws.
      sampling: its rule; see `sampling.rules`.
    """

    length: Any
    window: Any
    token: Any
    count: Any
    limit: Any
    live: Any
    stop_ids: Any
    seed: Any
    sampling: Sampling


class BlockOutput(flax.struct.PyTreeNode):
    """What a block of decode steps adds to each row.

    Attributes:
      tokens: int32 [B, steps]; a row has as many as its count grew.
      count: int32 [B].
      failed: bool [B], the row's logits were not finite; it has no token for them.
      logprobs: of the tokens, [B, steps] and [B, steps, 20]; zeros if nobody asked.
    """

    tokens: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    failed: jax.Array | np.ndarray
    logprobs: tuple[jax.Array | np.ndarray, ...]


def init_staging(params: Params, tokens: int, spec: CacheSpec) -> list[Staged]:
    """Return an empty staging buffer for `tokens` tokens of one prompt."""
    config = params.config
    shape = (1, config.num_kv_heads, tokens, config.head_dim)

    def make() -> list[Staged]:
        return [(jnp.zeros(shape, params.dtype), jnp.zeros(shape, params.dtype)) for _ in range(config.num_layers)]

    return on_mesh.allocate(make, on_mesh.pin_by_head, spec)


def staging_bytes(params: Params, tokens: int) -> int:
    """Return the bytes of a staging buffer."""
    config = params.config
    return config.num_layers * config.num_kv_heads * tokens * config.head_dim * 2 * params.dtype.itemsize


def _tables_of(group: Group, tables: Tables, spec: CacheSpec) -> jax.Array:
    return tables[kinds(spec).index(group.windowed)]


def _row(layer: tuple[Group, ...], slot: jax.Array, tables: Tables, spec: CacheSpec) -> tuple[Group, ...]:
    """Return the groups of a layer as a cache of one row, whose block tables are `tables`."""

    def one(group: Group) -> Group:
        group = group.replace(table=_tables_of(group, tables, spec))
        if group.k_mean is None or group.v_mean is None:
            return group
        k_mean, v_mean = (lax.dynamic_slice_in_dim(x, slot, 1, axis=0) for x in (group.k_mean, group.v_mean))
        return group.replace(k_mean=k_mean, v_mean=v_mean)

    return tuple(map(one, layer))


@functools.partial(jax.jit, static_argnames=("config", "spec"))
@promoting
def embed_chunk(config: ModelConfig, weights: Any, tokens: jax.Array, *, spec: CacheSpec) -> jax.Array:
    """Return the hidden states [1, chunk, D] of tokens int32 [1, chunk]; `weights` are those outside of layers."""
    x = Transformer(config).apply({"params": weights}, tokens, method="embed")
    return on_mesh.pin_whole(cast(jax.Array, x), spec)


# Layers of the same shapes share one compiled program.
@functools.partial(jax.jit, static_argnames=("block", "spec"), donate_argnames=("x", "staged"))
@promoting
def layer_chunk(
    block: Block,
    weights: Any,
    x: jax.Array,
    layer: tuple[Group, ...],
    staged: Staged,
    tables: Tables,
    slot: jax.Array,
    numbers: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[jax.Array, Staged]:
    """Run a chunk of a segment through one layer.

    Args:
      weights: of the layer.
      x: hidden states [1, chunk, D].
      layer: its head groups; the row holds what came before the segment.
      staged: the segment's keys and values so far.
      tables: block tables of the row, int32 [1, pages].
      numbers: int32 [5]: tokens before the segment, W, tokens of the segment, tokens of it before the chunk, tokens of
        the chunk.

    Returns:
      The new hidden states, and the staging buffer with the chunk's keys and values.
    """
    before, window, segment, start, count = (numbers[i] for i in range(5))
    # Slots past the chunk hold another prompt's tokens: they must count as invalid, because 0 × NaN is NaN.
    meta = AttentionMetadata(before[None], (start + count)[None], window[None], spec)
    positions = before + start + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    run, config = functools.partial(block.apply, {"params": weights}), block.config
    angles = rope.tables(config.rope, config.head_dim, positions, (before + segment)[None])
    added = cast(Staged, run(x, angles, method="keys_values"))
    k, v = (lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(staged, added, strict=True))
    q = cast(jax.Array, run(x, angles, method="queries"))
    groups = _row(layer, slot, tables, spec)
    out = placement_of(spec).attend(q, k, v, groups, meta, start=start, group_size=config.group_size, slopes=None)
    x = cast(jax.Array, run(x, out, method="output_and_mlp"))
    return on_mesh.pin_whole(x, spec), on_mesh.pin_by_head((k, v), spec)


@functools.partial(jax.jit, static_argnames=("config", "spec"))
@promoting
def chunk_logits(
    config: ModelConfig,
    weights: Any,
    x: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    score: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[jax.Array, Logprobs]:
    """Return float32 logits [1, V] after the last of `count` tokens, and the log probabilities of the token after each.

    Args:
      x: hidden states [1, chunk, D].
      targets: int32 [chunk], the token after each.
      score: bool; without it the log probabilities are zeros.
    """
    T = x.shape[1]

    def logits(x: jax.Array) -> jax.Array:
        out = Transformer(config).apply({"params": weights}, x, method="logits")
        return on_mesh.pin_whole(cast(jax.Array, out), spec)

    def scored() -> Logprobs:
        size = min(_LOGITS_AT_ONCE, T)
        pad = -T % size
        parts = jnp.pad(x[0], ((0, pad), (0, 0))).reshape(-1, size, x.shape[2])
        aims = jnp.pad(targets, (0, pad)).reshape(-1, size)
        found = lax.map(lambda part: logprobs(logits(part[0][None])[0], part[1]), (parts, aims))
        return cast(Logprobs, tuple(a.reshape(-1, *a.shape[2:])[:T] for a in found))

    last = lax.dynamic_slice_in_dim(x, count - 1, 1, axis=1)
    return logits(last)[:, 0], lax.cond(score, scored, lambda: no_logprobs(T, config.vocab_size))


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("layer",))
@promoting
def write_layer(
    layer: tuple[Group, ...],
    staged: Staged,
    tables: Tables,
    slot: jax.Array,
    numbers: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[Group, ...]:
    """Write a staged segment to the pages of its row; `numbers` are those of `layer_chunk`."""
    before, window, segment = (numbers[i][None] for i in range(3))
    meta = AttentionMetadata(before, segment, window, spec)
    written = placement_of(spec).write(_row(layer, slot, tables, spec), *staged, meta)

    def whole(group: Group, row: Group) -> Group:
        """Return the group with the row's pages, and its means at the slot."""
        row = row.replace(table=None)
        if group.k_mean is None or group.v_mean is None:
            return row
        return row.replace(
            **{
                name: lax.dynamic_update_slice_in_dim(getattr(group, name), getattr(row, name), slot, axis=0)
                for name in ("k_mean", "v_mean")
            }
        )

    return on_mesh.pin_cache(tuple(map(whole, layer, written)), spec)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("vocabulary",))
@promoting
def start_row(
    vocabulary: Vocabulary,
    rows: Rows,
    slot: jax.Array,
    seen: jax.Array,
    bias: jax.Array,
    allowed: jax.Array,
    logits: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[Vocabulary, jax.Array, jax.Array, Logprobs]:
    """Choose a row's first token from logits [1, V]; `rows` are the numbers of this row, `seen`, `bias` and `allowed`
    [V] are what it knows about the tokens.

    Returns the vocabulary's state, the token int32 [1], whether the logits were not finite, bool [1], and the log
    probabilities.
    """
    fresh = Vocabulary(seen[None], jnp.zeros(seen.shape, jnp.int32)[None], bias[None], allowed[None])
    token, failed, fresh = _choose(fresh, rows, rows.live, logits)
    vocabulary = jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, slot, axis=0), vocabulary, fresh)
    return on_mesh.pin_whole((vocabulary, token, failed, logprobs(logits, token)), spec)


def _choose(
    vocabulary: Vocabulary, rows: Rows, live: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array, Vocabulary]:
    """Return the next token int32 [B] of live rows, the newest one of others; the live rows that failed, bool [B]; and
    the vocabulary's state with the tokens counted."""
    failed = live & ~jnp.isfinite(logits).all(axis=-1)
    chooses = live & ~failed
    logits = jnp.where(chooses[:, None], logits, 0.0)
    # Row 0 of the batch with the same seed: a request draws as `generate` does for one prompt.
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(rows.seed)
    keys = jax.vmap(jax.random.fold_in)(keys, rows.count)
    v = vocabulary
    chosen = sample(rows.sampling, logits, keys, v.seen, v.counts, v.bias, v.allowed)
    token = jnp.where(chooses, chosen, rows.token)
    each = jnp.arange(token.shape[0], dtype=jnp.int32)
    counts = vocabulary.counts.at[each, token].add(chooses.astype(jnp.int32))
    seen = vocabulary.seen.at[each, token].max(chooses)
    return token, failed, vocabulary.replace(seen=seen, counts=counts)


@functools.partial(jax.jit, static_argnames=("spec", "block"), donate_argnames=("layers", "vocabulary"))
@promoting
def decode_block(
    params: Params,
    layers: Layers,
    vocabulary: Vocabulary,
    rows: Rows,
    tables: Tables,
    steps: jax.Array,
    score: jax.Array,
    *,
    spec: CacheSpec,
    block: int,
) -> tuple[Layers, Vocabulary, BlockOutput]:
    """Run up to `steps` ≤ `block` decode steps of the live rows. `score`: bool, log probabilities are wanted."""
    B, V = vocabulary.seen.shape
    paged = tuple(tuple(group.replace(table=_tables_of(group, tables, spec)) for group in layer) for layer in layers)
    cache = KVCache(paged, rows.length, rows.window, jnp.zeros((B,), bool), spec)
    empty = tuple(jnp.zeros((B, block, *x.shape[1:]), x.dtype) for x in no_logprobs(B, V))
    out = BlockOutput(jnp.zeros((B, block), jnp.int32), rows.count, jnp.zeros((B,), bool), empty)

    def going(carry):
        index, _, _, rows, _ = carry
        return (index < steps) & jnp.any(rows.live)

    def step(carry):
        index, cache, vocabulary, rows, out = carry
        logits, cache = decode(params, cache, rows.token, rows.live)
        token, failed, vocabulary = _choose(vocabulary, rows, rows.live, logits)
        found = lax.cond(score, lambda: logprobs(logits, token), lambda: no_logprobs(B, V))
        count = rows.count + (rows.live & ~failed)
        stopped = jnp.any(token[:, None] == rows.stop_ids, axis=1) | (count >= rows.limit) | failed
        rows = rows.replace(token=token, count=count, live=rows.live & ~stopped)

        def put(x, new):
            return lax.dynamic_update_slice_in_dim(x, new[:, None], index, axis=1)

        tokens, scores = put(out.tokens, token), tuple(map(put, out.logprobs, found))
        return index + 1, cache, vocabulary, rows, BlockOutput(tokens, count, out.failed | failed, scores)

    _, cache, vocabulary, _, out = lax.while_loop(going, step, (jnp.int32(0), cache, vocabulary, rows, out))
    layers = tuple(tuple(group.replace(table=None) for group in layer) for layer in cache.layers)
    return on_mesh.pin_cache(layers, spec), *on_mesh.pin_whole((vocabulary, out), spec)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("vocabulary",))
def set_allowed(vocabulary: Vocabulary, slot: jax.Array, allowed: jax.Array, *, spec: CacheSpec) -> Vocabulary:
    """Set which tokens a row may choose, bool [V]."""
    rows = lax.dynamic_update_slice_in_dim(vocabulary.allowed, allowed[None], slot, axis=0)
    return on_mesh.pin_whole(vocabulary.replace(allowed=rows), spec)


class Means(NamedTuple):
    """Compensation tokens of stored prefixes, of one head group: [prefixes, K_group, shards, H]."""

    k_mean: jax.Array
    v_mean: jax.Array


StoredMeans = tuple[tuple[Means | None, ...], ...]  # of each layer and group, None without compensation


def init_means(layers: Layers, prefixes: int, spec: CacheSpec) -> StoredMeans:
    """Return empty compensation tokens of that many prefixes."""

    def group(group: Group) -> Means | None:
        if group.k_mean is None or group.v_mean is None:
            return None
        shape = (prefixes, *group.k_mean.shape[1:])
        return Means(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def make() -> StoredMeans:
        return tuple(tuple(map(group, layer)) for layer in layers)

    return on_mesh.allocate(make, on_mesh.pin_cache, spec)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("layers", "stored"))
@promoting
def copy_prefix(
    layers: Layers,
    stored: StoredMeans,
    sources: Tables,
    targets: Tables,
    slot: jax.Array,
    entry: jax.Array,
    restore: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[Layers, StoredMeans]:
    """Copy pages `sources` to `targets`, int32 [width] per pool, and compensation tokens from a slot to an entry.

    Targets past the pool are ignored. With `restore` the compensation tokens go from the entry to the slot.
    """
    pools = dict(zip(kinds(spec), zip(sources, targets, strict=True), strict=True))

    def copied(group: Group) -> Group:
        source, target = pools[group.windowed]

        def copy(pool: jax.Array | None) -> jax.Array | None:
            return None if pool is None else pool.at[target].set(pool[source], mode="drop")

        k, v, k_scale, v_scale = map(copy, (group.k, group.v, group.k_scale, group.v_scale))
        return group.replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def exchange(row: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = jnp.where(restore, kept[entry], row[slot])
        return row.at[slot].set(one), kept.at[entry].set(one)

    new_layers, new_stored = [], []
    for layer, means in zip(layers, stored, strict=True):
        groups, entries = [], []
        for group, kept in zip(map(copied, layer), means, strict=True):
            if kept is None or group.k_mean is None or group.v_mean is None:
                entries.append(None)
            else:
                k_mean, k_kept = exchange(group.k_mean, kept.k_mean)
                v_mean, v_kept = exchange(group.v_mean, kept.v_mean)
                group = group.replace(k_mean=k_mean, v_mean=v_mean)
                entries.append(Means(k_kept, v_kept))
            groups.append(group)
        new_layers.append(tuple(groups))
        new_stored.append(tuple(entries))
    return on_mesh.pin_cache(tuple(new_layers), spec), on_mesh.pin_cache(tuple(new_stored), spec)
