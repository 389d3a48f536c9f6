"""The programs of `benchmarks.attention`: caches full of noise, the timed calls, and the checks before timing.

B batch, K KV heads, G query heads per KV head, R query rows (G·T, t-major), H head width, S slots, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import attention_peers as peers
from razor_jax import HeadSplit, RazorConfig
from razor_jax import cache as kv
from razor_jax.config import kv_type
from razor_jax.kernels import cache_write
from razor_jax.kernels.attention import attend, attend_causal, compensation
from razor_jax.kernels.cache_write import GroupArrays, dequantize
from razor_jax.models.config import ModelConfig

# --- Inputs


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def noise(seed: jax.Array | int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return reproducible numbers of variance 1 (int8: all bytes), by hashing the index.

    The array is written once, and no other memory is needed.
    """
    x = jnp.full(shape, jnp.uint32(seed) * jnp.uint32(0x9E3779B9))
    for axis, stride in enumerate(np.cumprod([1, *shape[:0:-1]])[::-1]):
        x += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(int(stride) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    if dtype == jnp.int8:
        return lax.bitcast_convert_type((x >> 24).astype(jnp.uint8), jnp.int8)
    return ((x >> 8).astype(jnp.float32) * (2 * math.sqrt(3) / 2**24) - math.sqrt(3)).astype(dtype)


@functools.cache
def uneven_split(model: ModelConfig, kept: int, seed: int = 0) -> HeadSplit:
    """Return a random split with `kept` KV heads: all heads of one layer, no head of another, the rest at random."""
    L, K = model.num_layers, model.num_kv_heads
    rng = np.random.default_rng([seed, kept])
    full, empty = rng.permutation(L)[:2]
    others = [(layer, head) for layer in range(L) if layer not in (full, empty) for head in range(K)]
    drawn = rng.permutation(len(others))[: kept - K]
    return HeadSplit.of(L, K, [(int(full), head) for head in range(K)] + [others[i] for i in drawn])


@dataclasses.dataclass(frozen=True)
class Cache:
    """One batch of caches as the library allocates them, and the bytes that a decode step must read."""

    spec: kv.CacheSpec
    lengths: np.ndarray  # int32 [B]

    @classmethod
    def of(
        cls, model: ModelConfig, kept: int | None, razor: RazorConfig | None, lengths: np.ndarray, dtype: str
    ) -> Cache:
        """Return a cache in which `kept` KV heads keep everything; None for a dense one.

        The capacity is the largest of `lengths`.
        """
        split = HeadSplit.all(model.num_layers, model.num_kv_heads) if kept is None else uneven_split(model, kept)
        if razor is not None:
            razor = dataclasses.replace(razor, kv_dtype=dtype)
        return cls(kv.make_spec(split, model.head_dim, int(lengths.max()), razor, kv_type("bfloat16")), lengths)

    @property
    def window(self) -> np.ndarray:
        """W of each row by its length, int32 [B]."""
        razor = self.spec.razor
        return self.lengths if razor is None else np.asarray([kv.ring_length(razor, int(n)) for n in self.lengths])

    def valid(self, windowed: bool) -> np.ndarray:
        """Return how many slots hold a token, int32 [B]."""
        return np.minimum(self.lengths, self.spec.sinks + self.window) if windowed else self.lengths

    @property
    def dropped(self) -> np.ndarray:
        """n, int32 [B]."""
        return np.maximum(0, self.lengths - self.valid(True)).astype(np.int32)

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step must read, over all layers."""
        token = 2 * (self.spec.head_dim * jnp.dtype(self.spec.dtype).itemsize + 4 * (self.spec.dtype == "int8"))
        means = len(self.lengths) * 2 * 4 * self.spec.head_dim
        total = 0
        for layer in range(len(self.spec.heads.counts)):
            for heads, windowed, _ in self.spec.groups(layer):
                total += len(heads) * (int(self.valid(windowed).sum(dtype=np.int64)) * token + windowed * means)
        return total

    def layers(self, count: int) -> tuple[tuple[GroupArrays, ...], ...]:
        """Return the first `count` layers, filled with noise."""
        return tuple(
            tuple(
                self.group(len(heads), windowed, 8 * layer + windowed) for heads, windowed, _ in self.spec.groups(layer)
            )
            for layer in range(count)
        )

    def group(self, heads: int, windowed: bool, seed: int) -> GroupArrays:
        """Return one head group filled with noise."""
        batch, H, dtype = len(self.lengths), self.spec.head_dim, jnp.dtype(self.spec.dtype)
        slots = self.spec.slots(windowed)
        k, v = (noise(seed + 2 * i, (batch, heads, slots, H), dtype) for i in (0, 1))
        scales = means = (None, None)
        if dtype == jnp.int8:
            # The bytes have deviation 74, so the values have variance 1, and vary by a fifth between tokens.
            scales = tuple(
                (1 + 0.12 * noise(seed + 4 + i, (batch, heads, 1, slots), jnp.dtype("float32"))) / 74 for i in (0, 1)
            )
        if windowed:
            means = tuple(0.1 * noise(seed + 6 + i, (batch, heads, 1, H), jnp.dtype("float32")) for i in (0, 1))
        return GroupArrays(k, v, *scales, *means)

    @property
    def row_counts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Valid slots of full groups, valid slots of windowed groups, and n: int32 [B] each."""
        return tuple(jnp.asarray(x, jnp.int32) for x in (self.valid(False), self.valid(True), self.dropped))


# --- Programs


@functools.partial(jax.jit, static_argnames=("implementation", "return_state"))
def attend_group(rows, group: GroupArrays, row_counts, implementation: str, return_state: bool = False):
    """Attend with rows [B,K,R,H] to one head group: its compensation token, if it has one, and its slots."""
    full, windowed, dropped = row_counts
    scale = 1 / math.sqrt(rows.shape[-1])
    state = None
    if group.k_mean is not None:
        state = compensation(rows, group.k_mean, group.v_mean, dropped, scale)
    return attend(
        rows,
        group.k,
        group.v,
        full if group.k_mean is None else windowed,
        scale=scale,
        state=state,
        # Passed only if there are any, so that a kernel without 8-bit caches is timed on the others.
        **({} if group.k_scale is None else {"k_scale": group.k_scale, "v_scale": group.v_scale}),
        return_state=return_state,
        implementation=implementation,
    )


@dataclasses.dataclass(frozen=True)
class RazorLayer:
    """Attention of one layer by our kernels: (rows [B,K,G,H], groups, row_counts) -> [B,K,G,H]."""

    implementation: str

    def __call__(self, rows, layer: tuple[GroupArrays, ...], row_counts):
        outs, first = [], 0
        for group in layer:
            heads = slice(first, first + group.k.shape[1])
            first = heads.stop
            outs.append(attend_group(rows[:, heads], group, row_counts, self.implementation))
        return jnp.concatenate(outs, axis=1)


@dataclasses.dataclass(frozen=True)
class PeerLayer:
    """Attention of one layer by a dense peer, with k and v in the peer's layout."""

    peer: peers.Peer

    def __call__(self, rows, layer, row_counts):
        return self.peer.call(rows, *layer, row_counts[0])


@functools.partial(jax.jit, static_argnames=("attend_layer", "probe"))
def chain(q, layers, row_counts, *, attend_layer: Callable[..., jax.Array], probe: int):
    """Run all layers in sequence, each on q plus the output of the layer before.

    Returns the last rows, and the rows and output of layer `probe`.
    """
    rows, probed = q, None
    for index, layer in enumerate(layers):
        # Some peers answer in float32.
        out = attend_layer(rows, layer, row_counts).astype(q.dtype)
        probed = (rows, out) if index == probe else probed
        rows = q + out
    return rows, probed


@functools.partial(jax.jit, static_argnames=("chunk", "window", "sinks", "implementation"))
def stream(q, k, v, groups: tuple[GroupArrays, ...], *, chunk: int, window: int, sinks: int, implementation: str):
    """Run streaming prefill of one layer: per chunk, attend to the cache and to the chunk, then write.

    Takes q [B,K,G·T,H], k, v [B,K,T,H] and the layer's empty groups. Returns the outputs [B,K,G·T,H] and the groups.
    """
    B, _, T, H = k.shape
    G = q.shape[2] // T
    scale = 1 / math.sqrt(H)
    counts, windows = jnp.full((B,), chunk, jnp.int32), jnp.full((B,), window, jnp.int32)

    def heads_of(groups: tuple[GroupArrays, ...]) -> list[slice]:
        ends = np.cumsum([group.k.shape[1] for group in groups])
        return [slice(int(end) - group.k.shape[1], int(end)) for end, group in zip(ends, groups, strict=True)]

    def body(index, carry):
        out, groups = carry
        length = jnp.full((B,), index * chunk, jnp.int32)
        valid = jnp.minimum(length, sinks + window)
        rows = lax.dynamic_slice_in_dim(q, index * chunk * G, chunk * G, axis=2)
        new = [lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=2) for x in (k, v)]
        row_counts = (length, valid, length - valid)
        states = [
            attend_group(rows[:, heads], group, row_counts, implementation, return_state=True)
            for heads, group in zip(heads_of(groups), groups, strict=True)
        ]
        state = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *states)
        answer = attend_causal(
            rows, *new, counts, start=0, group_size=G, scale=scale, state=state, implementation=implementation
        )
        groups = tuple(
            cache_write.write(
                group,
                GroupArrays(*(x[:, heads].astype(group.k.dtype) for x in new)),
                length,
                counts,
                None if group.k_mean is None else windows,
                0 if group.k_mean is None else sinks,
            )
            for heads, group in zip(heads_of(groups), groups, strict=True)
        )
        return lax.dynamic_update_slice_in_dim(out, answer, index * chunk * G, axis=2), groups

    return lax.fori_loop(0, T // chunk, body, (jnp.zeros_like(q), groups))


@functools.partial(jax.jit, static_argnames=("group_size", "implementation"))
def exact(q, k, v, lengths, *, group_size: int, implementation: str):
    """Run causal attention over a whole prompt, q [B,K,G·T,H] and k, v [B,K,T,H]."""
    scale = 1 / math.sqrt(q.shape[-1])
    return attend_causal(q, k, v, lengths, start=0, group_size=group_size, scale=scale, implementation=implementation)


# --- Checks before timing


def float32(x: Any) -> Any:
    """Return the tree with bfloat16 arrays as float32, which changes no value."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, x)


def check_decode(implementation: str, dtype: str) -> float:
    """Return the error of one layer with both groups, compared with XLA in float32.

    Rows are ragged, and everything that must not be read is NaN.
    """
    model = ModelConfig("llama", 64, 4096, 64, 3, 16, 4, 128, 4096)
    lengths = np.asarray([5, 700, 2048], np.int32)
    cache = Cache.of(model, 5, RazorConfig.compact(509), lengths, dtype)
    mixed = next(layer for layer, kept in enumerate(cache.spec.heads.counts) if 0 < kept < 4)
    groups = [cache.group(len(heads), windowed, int(windowed)) for heads, windowed, _ in cache.spec.groups(mixed)]

    def poison(group: GroupArrays) -> GroupArrays:
        windowed = group.k_mean is not None
        unread = jnp.arange(group.k.shape[2]) >= jnp.asarray(cache.valid(windowed))[:, None]
        if group.k_scale is not None:
            line = unread[:, None, None, :]
            group = group._replace(**{n: jnp.where(line, jnp.nan, getattr(group, n)) for n in ("k_scale", "v_scale")})
        else:
            rows = unread[:, None, :, None]
            nan = jnp.asarray(jnp.nan, group.k.dtype)
            group = group._replace(k=jnp.where(rows, nan, group.k), v=jnp.where(rows, nan, group.v))
        if windowed:
            unused = jnp.asarray(cache.dropped == 0)[:, None, None, None]
            group = group._replace(**{n: jnp.where(unused, jnp.nan, getattr(group, n)) for n in ("k_mean", "v_mean")})
        return group

    def plain(group: GroupArrays) -> GroupArrays:
        k, v = dequantize(group.k, group.k_scale), dequantize(group.v, group.v_scale)
        return GroupArrays(k, v, None, None, group.k_mean, group.v_mean)

    layer = tuple(poison(group) for group in groups)
    q = noise(99, (3, 4, 4, 128), jnp.dtype("bfloat16"))
    with jax.default_matmul_precision("highest"):
        want = RazorLayer("xla")(float32(q), tuple(plain(group) for group in layer), cache.row_counts)
    return peers.error_of(float32(RazorLayer(implementation)(q, layer, cache.row_counts)), want)


def check_causal(implementation: str) -> float:
    """Return the error of a causal call over rows of 640 and 200 tokens, compared with XLA in float32."""
    T, lengths = 640, jnp.asarray([640, 200], jnp.int32)
    q, k, v = (noise(i, (2, 4, n, 128), jnp.dtype("bfloat16")) for i, n in enumerate((4 * T, T, T)))
    unread = (jnp.arange(T) >= lengths[:, None])[:, None, :, None]
    k, v = (jnp.where(unread, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    got = exact(q, k, v, lengths, group_size=4, implementation=implementation)
    with jax.default_matmul_precision("highest"):
        want = exact(*float32((q, k, v)), lengths, group_size=4, implementation="xla")
    pairs = [(float32(got)[row, :, : 4 * int(n)], want[row, :, : 4 * int(n)]) for row, n in enumerate(lengths)]
    return max(peers.error_of(a, b) for a, b in pairs)


def check_stream(implementation: str) -> float:
    """Return the error of outputs and means of a streaming prefill of four chunks, compared with XLA in float32."""
    T, chunk, window = 1024, 256, 300
    q, k, v = (noise(i, (1, 4, n, 128), jnp.dtype("bfloat16")) for i, n in enumerate((4 * T, T, T)))
    options = {"chunk": chunk, "window": window, "sinks": 4}

    def empty(heads: int, slots: int, windowed: bool, dtype) -> GroupArrays:
        k, v = (jnp.zeros((1, heads, slots, 128), dtype) for _ in range(2))
        means = (jnp.zeros((1, heads, 1, 128)) for _ in range(2)) if windowed else (None, None)
        return GroupArrays(k, v, None, None, *means)

    def groups_of(dtype):
        return empty(1, T, False, dtype), empty(3, window + 4, True, dtype)

    got, groups = stream(q, k, v, groups_of(jnp.bfloat16), **options, implementation=implementation)
    with jax.default_matmul_precision("highest"):
        want, wanted = stream(*float32((q, k, v)), groups_of(jnp.float32), **options, implementation="xla")
    return max(peers.error_of(float32(got), want), peers.error_of(groups[1].k_mean, wanted[1].k_mean))


def check_head(rows, out, group: GroupArrays, valid: int, n: int) -> float:
    """Return the error of the last head of the last row at the timed size, compared with a float64 softmax on the host.

    rows and out [B,K,G,H] have the heads of this group only. The row has `valid` slots and `n` dropped tokens.
    """

    def host(x: Any, scale: Any = None) -> np.ndarray:
        x = np.asarray(x[-1, -1]).astype(np.float64)
        return x if scale is None else x * np.asarray(scale[-1, -1, 0], np.float64)[:, None]

    q, k, v = host(rows), host(group.k, group.k_scale)[:valid], host(group.v, group.v_scale)[:valid]
    bias = np.zeros(valid)
    if n and group.k_mean is not None:
        k, v = np.concatenate([k, host(group.k_mean)]), np.concatenate([v, host(group.v_mean)])
        bias = np.append(bias, math.log(n))
    logits = q @ k.T / math.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return peers.error_of(host(out), weights @ v / weights.sum(-1, keepdims=True))
