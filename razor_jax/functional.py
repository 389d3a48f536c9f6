"""The jitted core: make an empty cache, `extend` it by tokens, `decode` one token more. Pure, jit- and pmap-able."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float32, Int

from . import attention
from . import cache as kv
from .cache import AttentionMetadata, CacheSpec, Group, KVCache, make_spec
from .config import RazorConfig
from .kernels.cache_write import ordered_after
from .models import alibi, rope
from .models.transformer import Block, Transformer
from .params import Params, fingerprint_words

if TYPE_CHECKING:
    from .mesh.placement import MeshPlacement
    from .methods.engine import Engine
    from .models.config import ModelConfig

Logits = Literal["last", "all", "none"]
Ids = jax.Array | np.ndarray
F = TypeVar("F", bound=Callable[..., Any])

# Tokens that pass through a layer together. A longer call goes layer by layer in chunks, so that it needs no more than
# one layer's K/V and one chunk of activations above weights, cache and hidden states.
CHUNK = 256


def promoting(function: F) -> F:
    """Trace a function under JAX's default promotion of types and ranks, whatever the user's flags say."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return cast(F, traced)


@promoting
def init_cache(
    params: Params,
    *,
    batch: int,
    capacity: int,
    razor: RazorConfig | None,
    prompt_lengths: Int[Ids, " B"] | None = None,
    layout: Literal["slot", "head"] | None = None,
) -> KVCache:
    """Return an empty cache of `batch` rows of `capacity` tokens under a policy; None for dense attention.

    Args:
      prompt_lengths: int32 [B], fixes each row's window under the paper's rule; None leaves it to the
        lengths of the first `extend`.
      layout: on a mesh "slot" or "head"; None chooses (`mesh.MeshPlacement`).

    Raises:
      ValueError: batch or capacity below 1, a policy without a head split, a forced implementation that cannot
        run here, or a batch or layout that does not divide over the mesh.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: a cache has at least 1 row")
    if prompt_lengths is not None and jnp.shape(prompt_lengths) != (batch,):
        raise ValueError(f"prompt_lengths {jnp.shape(prompt_lengths)}: must be [batch] with batch = {batch}")
    spec = cache_spec(params, razor, capacity, layout)
    return placement_of(spec).init(spec, batch, prompt_lengths)


def cache_spec(
    params: Params, razor: RazorConfig | None, capacity: int, layout: Literal["slot", "head"] | None = None
) -> CacheSpec:
    """Return the spec of a cache for these params under a policy. Raises as `init_cache`."""
    if not isinstance(razor, RazorConfig | None):
        raise TypeError(f"razor={razor!r}: give a RazorConfig or None; a method's cache comes from razor_jax.prefill")
    require_split(params, razor)
    config, split = params.config, params.heads_or_all
    placement = None if params.placement is None else params.placement.for_cache(split, razor, layout)
    return make_spec(
        split, config.head_dim, capacity, razor, params.dtype, params.implementation, config.alibi, placement
    )


def require_split(params: Params, razor: RazorConfig | None) -> None:
    """Raise ValueError for a policy on params that carry no head split."""
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
      tokens: int32 [B, T], right-padded. Ids outside the vocabulary are not caught: under jit nothing can raise.
      lengths: int32 [B], valid new tokens of each row, clipped to 0..T; 0 leaves the row bit-identical.
      logits: "last" for float32 [B, V] of each row's last valid token (zeros for a row without one),
        "all" for [B, T, V] (meaningless past a row's length), "none" for None.

    Returns:
      The logits and the new cache. A row that would pass the capacity is left untouched and flagged in
      `cache.overflow`.
    """
    return extend_known(params, cache, tokens, lengths, logits, fresh=False)


@promoting
def extend_known(
    params: Params,
    cache: KVCache,
    tokens: Ids,
    lengths: Ids,
    logits: Logits,
    *,
    fresh: bool,
    in_place: bool = False,
    layer: Callable[..., Any] | None = None,
) -> tuple[jax.Array | None, KVCache]:
    """Run `extend`; `fresh` (static) says that every row is empty, so only the call is attended to.

    `in_place` writes into the arrays of `cache`, which are of no use after. It is for calls from the host. `layer` runs
    each layer, with the arguments of `_run_layer`; None for `_run_layer`.
    """
    _check_call(cache, tokens, lengths, logits)
    check_cache(params, cache)
    T, config = tokens.shape[1], params.config
    # A program would copy the arrays that it only passes on.
    meta, begun = _begin_call(cache.replace(layers=()), tokens, lengths, fresh)
    ends = {name: weight for name, weight in params.weights.items() if not name.startswith("blocks_")}
    x = _embed(config, ends, tokens, placement=cache.spec.placement)
    placement = placement_of(cache.spec)
    run = placement.layers(layer or (_layer_in_place if in_place else _layer), tokens, fresh)
    layers, cache = list(cache.layers), begun
    for index, arrays in enumerate(layers):
        # Only `layers` holds the arrays of a layer that is written in place.
        block = Block(config, config.first_like(index), placement.mix)
        x, layers[index] = run(block, params.weights[f"blocks_{index}"], _slopes(params, index), x, arrays, meta)
    cache = placement.pin_cache(cache.replace(layers=tuple(layers)))
    return (None if logits == "none" else _logits(config, ends, x, meta, T, logits)), cache


# A call is these programs, one after the other. Under the caller's jit they are parts of one program. From the host,
# layers of the same shapes share one compiled program; under jit they share one trace.


@functools.partial(jax.jit, static_argnames=("fresh",))
def _begin_call(cache: KVCache, tokens: Ids, lengths: Ids, fresh: bool) -> tuple[AttentionMetadata, KVCache]:
    meta, cache = placement_of(cache.spec).begin(cache, lengths, tokens.shape[1], fresh)
    return meta, kv.mark_seen(cache, tokens, meta.new)


@functools.partial(jax.jit, static_argnames=("config", "placement"))
def _embed(config: ModelConfig, weights: Any, tokens: Ids, *, placement: MeshPlacement | None) -> jax.Array:
    """Return the hidden states [B, T, D] of tokens int32 [B, T], T padded to whole chunks if it exceeds one."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape[1] > CHUNK:
        tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % CHUNK)))

    def embed(tokens):
        return cast(jax.Array, Transformer(config).apply({"params": weights}, tokens, method="embed"))

    return (placement or _ONE_DEVICE).embed(embed, tokens, CHUNK)


def _run_layer(
    block: Block,
    weights: Any,
    slopes: Ids | None,
    x: jax.Array,
    layer: tuple[Group, ...],
    meta: AttentionMetadata,
) -> tuple[jax.Array, tuple[Group, ...]]:
    """Run one layer over x [B, T, D]: return the new x and the layer with the call's tokens written.

    `slopes` float32 [K, G] in the order of the weights, None without ALiBi.
    """
    run = _layer_at_once if x.shape[1] <= CHUNK else _layer_in_chunks
    return run(block, weights, slopes, x, layer, meta)


_layer = jax.jit(_run_layer, static_argnames=("block",))
# From the host only: under jit the caller's donation decides.
_layer_in_place = jax.jit(_run_layer, static_argnames=("block",), donate_argnames=("x", "layer"))


@functools.partial(jax.jit, static_argnames=("config", "T", "logits"))
def _logits(config: ModelConfig, weights: Any, x: jax.Array, meta: AttentionMetadata, T: int, logits: Logits):
    """Return the logits that `extend` returns, from hidden states x [B, ≥ T, D]."""
    placement = placement_of(meta.spec)
    if logits == "last":
        last = jnp.clip(meta.new - 1, 0, x.shape[1] - 1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    out = Transformer(config).apply({"params": weights}, x[:, :T], method="logits")
    out = placement.by_rows(cast(jax.Array, out))
    return out if logits == "all" else jnp.where((meta.new > 0)[:, None], out[:, 0], 0.0)


def decode(
    params: Params, cache: KVCache, token: Int[Ids, " B"], active: Bool[Ids, " B"] | None = None
) -> tuple[Float32[jax.Array, "B V"], KVCache]:
    """Append one token int32 [B] to every active row; return float32 logits [B, V] and the new cache.

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
    """Raise ValueError for a cache made for other heads, shapes, devices or another forced implementation."""
    spec, config, split = cache.spec, params.config, params.heads_or_all
    here = None if params.placement is None else params.placement.for_cache(split, None, None)
    if (here and here.mesh) != (spec.placement and spec.placement.mesh):
        raise ValueError(
            f"the cache is on {spec.placement or 'one device'}, the params on {here or 'one device'}: make the cache "
            "from the same params"
        )
    if params.implementation not in (None, cache.spec.implementation):
        raise ValueError(
            f"these params force implementation={params.implementation!r}, the cache was made for "
            f"{cache.spec.implementation!r}: make the cache from the same params"
        )
    have = (len(spec.heads.retrieval), spec.heads.num_kv_heads, spec.head_dim)
    want = (config.num_layers, config.num_kv_heads, config.head_dim)
    if have != want:
        raise ValueError(f"the cache is for (layers, KV heads, head width) {have}, the model has {want}")
    # Another split of the same weights stores its heads in another order, dense or not.
    if spec.heads != split:
        differ = "scopes" if spec.heads.retrieval == split.retrieval else "retrieval"
        raise ValueError(
            f"the cache was made for another head split: {differ} by layer {list(getattr(spec.heads, differ))}, these "
            f"params have {list(getattr(split, differ))}; make the cache from the same params"
        )


def check_weights(params: Params, cache: KVCache) -> None:
    """Raise ValueError for a cache that says that other weights made it. For calls from the host."""
    if cache.fingerprint is not None and np.any(np.asarray(cache.fingerprint) != fingerprint_words(params)):
        raise ValueError(
            "the cache was made with other weights: use the params that made it, or prefill again with these params"
        )


def _tables(config: ModelConfig, meta: AttentionMetadata, start: jax.Array | int, T: int) -> rope.Tables:
    positions = meta.length[:, None] + start + jnp.arange(T, dtype=jnp.int32)
    return rope.tables(config.rope, config.head_dim, positions, meta.length + meta.new)


def _slopes(params: Params, index: int) -> np.ndarray | None:
    """Return float32 [K, G] of a layer's heads in the order of its weights, None without ALiBi."""
    c = params.config
    if not c.alibi:
        return None
    return alibi.slopes(c.num_heads).reshape(c.num_kv_heads, c.group_size)[list(params.order(index))]


def _methods(block: Block, weights: Any) -> Callable[..., Any]:
    """Return the function that calls a method of the block on its weights: `run(*args, method=name)`."""
    return functools.partial(block.apply, {"params": weights})


def _layer_at_once(block: Block, weights, slopes, x: jax.Array, layer: tuple[Group, ...], meta):
    placement, config = placement_of(meta.spec), block.config
    run = _methods(block, weights)

    def attend(q, k, v, state):
        return placement.attend_and_write(q, k, v, state, meta, slopes)

    tables = _tables(config, meta, 0, x.shape[1])
    x, layer = run(x, tables, attend, layer, method="__call__")
    return placement.by_rows(x), layer


def _layer_in_chunks(block: Block, weights, slopes, x: jax.Array, layer: tuple[Group, ...], meta):
    """Run a layer over T tokens, a multiple of CHUNK.

    Keys and values of all tokens come first, then attention and MLP chunk by chunk in place, then the cache write.
    Chunks past the longest row cost nothing.
    """
    placement, config = placement_of(meta.spec), block.config
    # A compiler that changes the layout of a loop's weights (seen for TPU 7x) would do so for all layers at once.
    weights, x = lax.optimization_barrier((weights, x))
    run = _methods(block, weights)
    B, T, _ = x.shape
    chunks = (jnp.max(meta.new) + CHUNK - 1) // CHUNK

    def project(chunk, kv_):
        start = chunk * CHUNK
        part, tables = placement.take(x, start, CHUNK), _tables(config, meta, start, CHUNK)
        new = run(part, tables, method="keys_values")
        return tuple(lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(kv_, new, strict=True))

    empty = placement.zeros(x, (B, config.num_kv_heads, T, config.head_dim), meta)
    k, v = lax.fori_loop(0, chunks, project, (empty, empty))

    def attend_chunk(chunk, x):
        start = chunk * CHUNK
        x_chunk = placement.take(x, start, CHUNK)
        q = run(x_chunk, _tables(config, meta, start, CHUNK), method="queries")
        out = placement.attend(q, k, v, layer, meta, start=start, group_size=config.group_size, slopes=slopes)
        return placement.put(x, run(x_chunk, out, method="output_and_mlp"), start)

    x = lax.fori_loop(0, chunks, attend_chunk, x)
    return placement.write_after(x, k, v, layer, meta)


class OneDevice:
    """The steps of a call on one device. `mesh.MeshPlacement` has the same methods for a mesh."""

    mix = None  # a layer's experts run as they are
    init = staticmethod(kv.init)
    broadcast = staticmethod(kv.broadcast)
    begin = staticmethod(kv.begin)
    attend = staticmethod(attention.attend)
    attend_and_write = staticmethod(attention.attend_and_write)
    write = staticmethod(kv.write)
    write_after = staticmethod(attention.write_after)

    def layers(self, run: Callable[..., Any], tokens: Ids, fresh: bool) -> Callable[..., Any]:
        """Return what runs the layers of a call on tokens [B, T], one after the other: `run` for each."""
        return run

    @staticmethod
    def embed(embed: Callable[[jax.Array], jax.Array], tokens: jax.Array, chunk: int) -> jax.Array:
        """Return the hidden states [B, T, D] of tokens int32 [B, T]."""
        return embed(tokens)

    @staticmethod
    def zeros(x: jax.Array, shape: tuple[int, ...], meta: AttentionMetadata) -> jax.Array:
        """Return zeros [B, K, T, H] for the keys or values of a call.

        They depend on x [B, T, D]: a constant buffer would be allocated for all layers at once.
        """
        return jnp.broadcast_to(ordered_after(jnp.zeros((1,), x.dtype), x, meta.length), shape)

    @staticmethod
    def take(x: jax.Array, start: jax.Array, tokens: int) -> jax.Array:
        """Return tokens [start, start + tokens) of hidden states x [B, T, D]."""
        return lax.dynamic_slice_in_dim(x, start, tokens, axis=1)

    @staticmethod
    def put(x: jax.Array, chunk: jax.Array, start: jax.Array) -> jax.Array:
        """Return x [B, T, D] with `chunk` [B, t, D] written at token `start`."""
        return lax.dynamic_update_slice_in_dim(x, chunk, start, axis=1)

    @staticmethod
    def by_rows(x: jax.Array) -> jax.Array:
        """Pin an array [B, …] of one call to the devices of its rows."""
        return x

    @staticmethod
    def pin_cache(cache: KVCache) -> KVCache:
        """Pin a cache to its devices."""
        return cache

    @staticmethod
    def replicated(x: jax.Array) -> jax.Array:
        """Pin an array to every device, so that every host can read it."""
        return x

    @staticmethod
    def to_devices(tree: Any) -> Any:
        """Return host arrays, the same on every host, as arrays on every device."""
        return tree

    @staticmethod
    def padding(rows: int) -> int:
        """Return how many empty rows a batch of `rows` needs."""
        return 0


def placement_of(spec: CacheSpec) -> OneDevice | MeshPlacement | Engine:
    """Return where calls on caches of this spec run, or the engine of its method."""
    if spec.method is not None:
        return spec.method
    return _ONE_DEVICE if spec.placement is None else spec.placement


_ONE_DEVICE = OneDevice()
