"""How a cache of a method is made, read and written: the steps of a call, in the terms of `functional.OneDevice`.

A layer is `(kept, tail)`: the method's state of the prompt, and an ordinary head group that keeps every later token,
position p in slot p - n after a prompt of n tokens. The tail has room for capacity - `Engine.base` tokens of each row,
however short its prompt was. A method that evicts later has no tail.
`KVCache.window` is the number of prompt tokens of each row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import cache as kv
from ..attention import attend_own
from ..cache import AttentionMetadata, CacheSpec, Group, KVCache
from ..functional import CHUNK, OneDevice
from ..kernels import attention as kernel
from ..kernels.cache_write import ordered_after
from ..models import rope
from ..models.config import ModelConfig
from ..models.transformer import Block
from .base import CacheMethod, Prompt, QueryRows

if TYPE_CHECKING:
    from ..params import Params

_ROUND = 64  # `longest` is a multiple, so that prompts of about the same length share programs

Layer = tuple[Any, ...]
Attend = Callable[[jax.Array, jax.Array], kernel.State]


class Kept(flax.struct.PyTreeNode):
    """A method's state of one layer.

    Attributes:
      state: what the method's `compress` returned.
      windowed: whether later tokens change it, so that going back needs a copy.
    """

    state: Any
    windowed: bool = flax.struct.field(pytree_node=False)

    def map_slots(self, change: Callable[[jax.Array, int], jax.Array]) -> Kept:
        """Return the state itself: it never grows."""
        return self


@dataclasses.dataclass(frozen=True)
class Engine(OneDevice):
    """A method, bound to a model and to the prompts of a batch. Static: it is part of a cache's spec.

    Attributes:
      method: the method.
      config: shapes of the model.
      order: KV heads of each layer in the stored order.
      longest: tokens of the longest prompt, rounded up.
    """

    method: CacheMethod
    config: ModelConfig
    order: tuple[tuple[int, ...], ...]
    longest: int

    @property
    def base(self) -> int:
        """Tokens of the capacity that belong to the prompt; the longest prompt has as many or more."""
        return max(0, self.longest - _ROUND)

    def occupied(self, cache: KVCache) -> jax.Array:
        """Return how much of the capacity each row uses, int32 [B]: its tokens, or `base` and the later ones."""
        return jnp.maximum(cache.length, 0 if self.method.evicts_later else self.base + cache.length - cache.window)

    def describe(self) -> str:
        """Return the method in one line."""
        return self.method.describe()

    def kv_bytes(self, spec: CacheSpec, batch: int) -> int:
        """Return the bytes of the cache as `init` allocates them."""
        leaves = jax.eval_shape(lambda: jax.tree.leaves(self.init(spec, batch).layers))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    def prompt_bytes(self, spec: CacheSpec, tokens: int) -> int:
        """Return the bytes of the state of one prompt of exactly `tokens` tokens, without the tail."""
        exact = dataclasses.replace(self, longest=tokens)
        return exact.kv_bytes(dataclasses.replace(spec, method=exact, capacity=exact.base), 1)

    def dropped(self, spec: CacheSpec, length: Any, prompts: Any) -> Any:
        """Return how many tokens each KV head has dropped, int32 [B]; where heads differ, their mean."""
        kept = self.method.room(prompts, self._slot_bytes(spec.dtype))
        return jnp.maximum(0, (length if self.method.evicts_later else prompts) - kept)

    @property
    def _changes_later(self) -> bool:
        return self.method.evicts_later or self.method.follows

    def _slot_bytes(self, dtype: Any) -> int:
        return 2 * self.config.head_dim * jnp.dtype(dtype).itemsize

    def _tail(self, spec: CacheSpec) -> int:
        return 0 if self.method.evicts_later else max(0, spec.capacity - self.base)

    def init(self, spec: CacheSpec, batch: int, prompt_lengths: Any = None) -> KVCache:
        """Return an empty cache of `batch` rows."""
        zeros = jnp.zeros((batch,), jnp.int32)
        layers = tuple(self._empty(spec, batch, layer) for layer in range(self.config.num_layers))
        return KVCache(layers, zeros, zeros + 0, zeros > 0, spec)

    def _empty(self, spec: CacheSpec, batch: int, layer: int) -> Layer:
        c = self.config
        shape = (batch, c.num_kv_heads, self._tail(spec), c.head_dim)
        tail = Group(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype), None, None, windowed=False)
        shapes, structure = _state_shapes(self, spec.dtype, batch, layer if self.method.by_layer else 0)
        state = jax.tree.unflatten(structure, [jnp.zeros(x.shape, x.dtype) for x in shapes])
        kept = Kept(state, self._changes_later)
        return (kept,) if self.method.evicts_later else (kept, tail)

    def broadcast(self, cache: KVCache, batch: int, capacity: int) -> KVCache:
        """Return a cache with room for `capacity` tokens, each row repeated so that there are `batch`."""
        spec = dataclasses.replace(cache.spec, capacity=max(capacity, cache.spec.capacity))
        extra = self._tail(spec) - self._tail(cache.spec)

        def grow(node: Any) -> Any:
            if isinstance(node, Kept):
                return node
            return node.map_slots(lambda x, axis: jnp.pad(x, [(0, extra if i == axis else 0) for i in range(4)]))

        return kv.repeat_rows(cache, grow, batch, spec)

    def begin(
        self, cache: KVCache, lengths: jax.Array | np.ndarray, T: int, fresh: bool = False
    ) -> tuple[AttentionMetadata, KVCache]:
        """Return a call's metadata, and the cache with its new lengths, as `cache.begin`."""
        asked = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, T)
        full = (self.occupied(cache) + asked > cache.spec.capacity) & (not fresh)
        meta, cache = kv.begin(cache, jnp.where(full, 0, asked), T, fresh)
        cache = cache.replace(overflow=cache.overflow | full)
        if not fresh:
            return meta, cache
        return meta.replace(window=meta.new), cache.replace(window=meta.new)

    def layers(self, run: Callable[..., Any], tokens: Any, fresh: bool) -> Callable[..., tuple[jax.Array, Layer]]:
        """Return what runs the layers of a call on tokens [B, T], one after the other."""
        if fresh:
            return _Prompt(self, jnp.asarray(tokens, jnp.int32)).run
        numbers = itertools.count()
        return lambda block, weights, slopes, x, layer, meta: _run_later(
            self, block, weights, x, layer, meta, self.parts(next(numbers))
        )

    def parts(self, layer: int) -> Any:
        """Return what the method learned of a layer, heads in the stored order."""
        return self.method.parts(layer, self.order[layer])

    def with_parts(self, parts: Any) -> Engine:
        """Return the engine of one layer, for use inside a program."""
        return dataclasses.replace(self, method=self.method.with_parts(parts))

    def compress(self, prompt: Prompt, seen: Any, dtype: Any) -> Any:
        """Return the state of a layer of a prompt."""
        size = self._slot_bytes(dtype)
        return self.method.compress(
            prompt, seen, self.method.room(prompt.lengths, size), self.method.slots(self.longest, size)
        )

    def prompt_layer(
        self,
        block: Block,
        index: int,
        weights: Any,
        tokens: jax.Array,
        x: jax.Array,
        repetition: jax.Array | None,
        layer: Layer,
        meta: AttentionMetadata,
    ) -> tuple[jax.Array, jax.Array | None, Layer]:
        """Run a layer over a prompt x [B, T, D] with exact attention, and compress it.

        `tokens` int32 [B, T] are its ids, `repetition` [B, T, D] the hidden states of the prompt read a second time,
        None without.
        """
        c, C, method = self.config, min(CHUNK, x.shape[1]), self.method
        part = functools.partial(block.apply, {"params": weights})
        tables = _tables(c, meta, x.shape[1])
        k, v = cast(tuple[jax.Array, jax.Array], part(x, tables, method="keys_values"))
        cached_k, cached_v = (a.astype(meta.spec.dtype) for a in (k, v))
        prompt = Prompt(cached_k, cached_v, meta.new, index, self.order[index], self.longest, c, tokens=tokens, x=x)
        options = {"group_size": c.group_size, "slopes": None, "return_state": True}
        own = functools.partial(attend_own, meta=meta, implementation=meta.spec.kernels, **options)

        def run(x: jax.Array, tables: rope.Tables, seen: Any, attend: Attend) -> tuple[jax.Array, Any]:
            def chunk(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
                x, seen = carry
                start = number * C
                here, cos, sin = (lax.dynamic_slice_in_dim(a, start, C, axis=1) for a in (x, *tables))
                q = cast(jax.Array, part(here, (cos, sin), method="queries"))
                state = attend(q, start)
                if seen is not None:
                    seen = self._see(seen, q, state, start, prompt)
                out = cast(jax.Array, part(here, kernel.finish(state, here.dtype), method="output_and_mlp"))
                return lax.dynamic_update_slice_in_dim(x, out, start, axis=1), seen

            return lax.fori_loop(0, (jnp.max(meta.new) + C - 1) // C, chunk, (x, seen))

        def attend(q: jax.Array, start: jax.Array) -> kernel.State:
            return cast(kernel.State, own(q, k, v, start=start))

        seen = method.start(prompt)
        if repetition is None:
            x, seen = run(x, tables, seen, attend)
        else:
            again = _tables(c, meta.replace(length=meta.new), x.shape[1])
            k_again, v_again = cast(tuple[jax.Array, jax.Array], part(repetition, again, method="keys_values"))

            def attend_again(q: jax.Array, start: jax.Array) -> kernel.State:
                settings = {"scale": c.head_dim**-0.5, "implementation": meta.spec.kernels}
                state = kernel.attend(q, k, v, meta.new, return_state=True, **settings)
                return cast(kernel.State, own(q, k_again, v_again, start=start, state=state))

            repetition, seen = run(repetition, again, seen, attend_again)
            x, _ = run(x, tables, None, attend)
        kept = Kept(self.compress(prompt, seen, meta.spec.dtype), self._changes_later)
        x, kept = lax.optimization_barrier((x, kept))
        return x, repetition, (kept, *layer[1:])

    def _see(self, seen: Any, q: jax.Array, state: kernel.State, start: jax.Array, prompt: Prompt) -> Any:
        """Let the method observe a chunk of query rows, unless it observes none of them."""
        newest = self.method.observes
        if newest == 0:
            return seen
        c, (_, m, l) = self.config, state
        B, K, R, H = q.shape
        shape = (B, K, R // c.group_size, c.group_size)
        at = start + jnp.arange(shape[2], dtype=jnp.int32)
        counted = at < prompt.lengths[:, None]
        if newest is not None:
            counted &= at >= prompt.lengths[:, None] - newest
        log_total = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1.0)), 0.0)
        scaled = q.reshape(*shape, H).astype(jnp.float32) / math.sqrt(H)
        # The rows of a repetition come after all keys of the prompt.
        after = prompt.k.shape[2] if self.method.repeats else 0
        rows = QueryRows(scaled, log_total.reshape(shape), at + after, counted)
        return lax.cond(jnp.any(counted), lambda: self.method.see(seen, rows, prompt), lambda: seen)

    def later_layer(
        self, block: Block, weights: Any, x: jax.Array, layer: Layer, meta: AttentionMetadata
    ) -> tuple[jax.Array, Layer]:
        """Run a layer over tokens x [B, T, D] that come after the prompt."""
        attend = functools.partial(self._step_by_step if self.method.evicts_later else self._with_tail, meta)
        tables = _tables(self.config, meta, x.shape[1])
        return cast(tuple[jax.Array, Layer], block.apply({"params": weights}, x, tables, attend, layer))

    def _with_tail(
        self, meta: AttentionMetadata, q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer
    ) -> tuple[jax.Array, Layer]:
        """Attend to the state, the tail and the call's own tokens; write these to the tail."""
        kept, tail = layer
        scale, implementation = 1.0 / math.sqrt(q.shape[-1]), meta.spec.kernels
        follows = self.method.follows
        state = None if follows else self.method.read(kept.state, q, scale, implementation)
        written = meta.length - meta.window
        if tail.k.shape[2]:
            part = kernel.attend(
                q, tail.k, tail.v, written, scale=scale, state=state, return_state=True, implementation=implementation
            )
            state = cast(kernel.State, part)
        found = attend_own(
            q, k, v, meta=meta, start=0, group_size=self.config.group_size, slopes=None, state=state,
            implementation=implementation, return_state=follows,
        )  # fmt: skip
        if follows:
            out, kept = self._follow(meta, q, cast(kernel.State, found), kept)
            layer = kept, tail
        else:
            out = cast(jax.Array, found)
        if not tail.k.shape[2]:
            return out, layer
        k, v = (ordered_after(x, out, meta.length) for x in (k, v))
        return out, (kept, kv.write_group(tail, k, v, written, meta.new, None, 0, meta.spec))

    def _follow(
        self, meta: AttentionMetadata, q: jax.Array, others: kernel.State, kept: Kept
    ) -> tuple[jax.Array, Kept]:
        """Read token by token, because what a token reads depends on those before it."""
        (B, K, R, H), G = q.shape, self.config.group_size

        def step(kept: Kept, token: tuple[jax.Array, jax.Array, kernel.State]) -> tuple[Kept, jax.Array]:
            index, q_t, others_t = token
            seen, state = self.method.follow(kept.state, q_t, others_t)
            return _where(index < meta.new, state, kept), kernel.finish(seen, q.dtype)

        tokens = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, K, R // G, G, *x.shape[3:]), 2, 0), (q, others))
        kept, out = lax.scan(step, kept, (jnp.arange(R // G, dtype=jnp.int32), *tokens))
        return jnp.moveaxis(out, 0, 2).reshape(B, K, R, H), kept

    def _step_by_step(
        self, meta: AttentionMetadata, q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer
    ) -> tuple[jax.Array, Layer]:
        """Attend and write token by token, as eviction is defined."""
        B, K, T, H = k.shape
        G = self.config.group_size

        def step(kept: Kept, token: tuple[jax.Array, ...]) -> tuple[Kept, jax.Array]:
            index, q_t, k_t, v_t = token
            out, state = self.method.step(kept.state, q_t, k_t, v_t, meta.length + index)
            return _where(index < meta.new, state, kept), out.astype(q.dtype)

        by_token = (jnp.moveaxis(q.reshape(B, K, T, G, H), 2, 0), jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0))
        kept, out = lax.scan(step, layer[0], (jnp.arange(T, dtype=jnp.int32), *by_token))
        return jnp.moveaxis(out, 0, 2).reshape(B, K, T * G, H), (kept,)


def _where(active: jax.Array, state: Any, kept: Kept) -> Kept:
    """Return the new state in active rows [B], and the old one in the others."""

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *(1,) * (old.ndim - 1)), new.astype(old.dtype), old)

    return kept.replace(state=jax.tree.map(chosen, state, kept.state))


class _Prompt:
    """The layers of one prompt, run in order."""

    def __init__(self, engine: Engine, tokens: jax.Array):
        self._engine, self._tokens, self._index = engine, tokens, 0
        self._repetition: jax.Array | None = None

    def run(
        self, block: Block, weights: Any, slopes: Any, x: jax.Array, layer: Layer, meta: AttentionMetadata
    ) -> tuple[jax.Array, Layer]:
        """Run the next layer."""
        method, index = self._engine.method, self._index
        if method.repeats and index == 0:
            self._repetition = x
        self._index += 1
        parts, index = self._engine.parts(index), index if method.by_layer else 0
        tokens = jnp.pad(self._tokens, ((0, 0), (0, x.shape[1] - self._tokens.shape[1])))
        state = weights, tokens, x, self._repetition, layer, meta, parts
        x, self._repetition, layer = _run_prompt(self._engine, block, index, *state)
        return x, layer


# From the host, layers of the same shapes share a compiled program; under jit they share a trace.
@functools.partial(jax.jit, static_argnames=("engine", "block", "index"))
def _run_prompt(engine: Engine, block: Block, index: int, weights, tokens, x, repetition, layer: Layer, meta, parts):
    return engine.with_parts(parts).prompt_layer(block, index, weights, tokens, x, repetition, layer, meta)


@functools.partial(jax.jit, static_argnames=("engine", "block"))
def _run_later(engine: Engine, block: Block, weights, x, layer: Layer, meta, parts) -> tuple[jax.Array, Layer]:
    return engine.with_parts(parts).later_layer(block, weights, x, layer, meta)


def _tables(config: ModelConfig, meta: AttentionMetadata, T: int) -> rope.Tables:
    positions = meta.length[:, None] + jnp.arange(T, dtype=jnp.int32)
    return rope.tables(config.rope, config.head_dim, positions, meta.length + meta.new)


@functools.lru_cache(maxsize=512)
def _state_shapes(engine: Engine, dtype: str, batch: int, layer: int) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Return the shapes of the leaves of a layer's state, and its structure."""
    c, structures = engine.config, []

    def compress() -> list[jax.Array]:
        shape = (batch, c.num_kv_heads, engine.longest, c.head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        lengths, tokens = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, engine.longest), jnp.int32)
        x = jnp.zeros((batch, engine.longest, c.hidden_size), dtype)
        prompt = Prompt(k, v, lengths, layer, engine.order[layer], engine.longest, c, tokens=tokens, x=x)
        one = engine.with_parts(jax.tree.map(jnp.asarray, engine.parts(layer)))
        leaves, structure = jax.tree.flatten(one.compress(prompt, one.method.start(prompt), dtype))
        structures.append(structure)
        return leaves

    return jax.eval_shape(compress), structures[0]


def bind(method: CacheMethod, params: Params, longest: int) -> Engine:
    """Return the engine of a method for prompts of at most `longest` tokens.

    Raises ValueError for what no method does (a mesh, ALiBi), and for parts learned of another model.
    """
    config = params.config
    if params.placement is not None:
        raise ValueError(f"{method.name} runs on one device: load the params without a mesh, or use a RazorConfig")
    if config.alibi:
        raise ValueError(f"{method.name} needs rotary embedding, this model has ALiBi: use its head scopes instead")
    method.check(config)
    method.check_params(params)
    order = tuple(params.order(layer) for layer in range(config.num_layers))
    return Engine(method, config, order, -(-longest // _ROUND) * _ROUND)
