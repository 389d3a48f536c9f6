"""Times of decode attention, dense beside Razor, and the copy bandwidth of the same device.

A time is the median of several calls. One call runs many steps in a loop on the device, each step on the output of the
step before, so that the time to start a program does not count. Attention that waits for memory only would reach the
copy bandwidth.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import attention
from .. import cache as kv
from ..cache import AttentionMetadata, CacheSpec
from ..config import HeadSplit, RazorConfig
from ..kernels import backend
from ..memory import free_bytes

K, G, H = 8, 4, 128  # Llama-3-8B
RETRIEVAL = ((0,), (3,), (5,), (1, 6))  # five of 32 heads: the paper's 15 %
SAMPLE_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Speed:
    """Decode attention of one cache.

    Attributes:
      bytes: that one layer of a step must read.
      seconds: per layer of a step.
    """

    cache: str
    implementation: str
    bytes: int
    seconds: float

    def cells(self, speeds: Speeds) -> tuple[str, ...]:
        """Return the cells of a table under `Speeds.header`."""
        rate, dense = self.bytes / self.seconds, speeds.rows[0]
        return (
            self.cache,
            self.implementation,
            f"{self.bytes / 1e6:,.1f}",
            f"{self.seconds * 1e6:,.0f}",
            f"{rate / 1e9:,.1f}",
            f"{rate / speeds.copy_bytes_per_second:.0%}",
            f"{dense.seconds / self.seconds:.2f}×",
            f"{dense.bytes / self.bytes:.2f}×",
        )


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Times of several caches; the first row is the dense one. `copy_bytes_per_second` counts reads and writes."""

    batch: int
    context: int
    dtype: str
    copy_bytes_per_second: float
    rows: tuple[Speed, ...]
    header = ("cache", "implementation", "MB", "µs", "GB/s", "of copy", "speed-up", "by bytes")

    @property
    def setting(self) -> str:
        """Shape, lengths and copy bandwidth in words."""
        return (
            f"one layer of a decode step, {K} KV heads × {G}, H={H}, {self.batch} × {self.context:,} tokens in "
            f"{self.dtype}; a copy moves {self.copy_bytes_per_second / 1e9:,.1f} GB/s"
        )


def measure(progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Speeds:
    """Time decode attention of a dense cache and of Razor caches, as large as a third of the free memory allows."""
    on_cpu = backend.platform() == "cpu"
    # XLA on a CPU widens bfloat16 caches once, outside of the loop.
    dtype, context = ("float32", 2048) if on_cpu else ("bfloat16", 32_768)
    free = free_bytes(jax.local_devices()[0]) or 4 << 30
    dense = _spec(None, context, dtype)
    batch = max(1, min(1 if on_cpu else 8, free // 3 // dense.kv_bytes(1)))
    window = context // 8
    caches = {
        "dense": dense,
        "Razor, a fifth": _spec(RazorConfig(min_window=context // 8), context, dtype),
        f"Razor, {window:,}": _spec(RazorConfig.compact(window), context, dtype),
        f"Razor, {window:,}, int8": _spec(RazorConfig.compact(window, kv_dtype="int8"), context, dtype),
    }
    progress("timed", 0, len(caches) + 1)
    copied = _copy_rate((64 if on_cpu else 512) << 20)
    rows = []
    for name, spec in caches.items():
        progress("timed", len(rows) + 1, len(caches) + 1)
        rows.append(_time(name, spec, batch, jnp.dtype(dtype)))
    return Speeds(batch, context, dtype, copied, tuple(rows))


def _spec(razor: RazorConfig | None, context: int, dtype: str) -> CacheSpec:
    return kv.make_spec(HeadSplit(RETRIEVAL, K), H, context, razor, dtype)


def _copy_rate(size: int) -> float:
    """Return the bytes per second, read and written, of a pass over an array of `size` bytes."""

    @functools.partial(jax.jit, donate_argnums=0)
    def passes(x, repeats):
        return lax.fori_loop(0, repeats, lambda i, x: x ^ i, x)

    x = jnp.zeros((size // 4,), jnp.int32)

    def run(repeats: int) -> None:
        nonlocal x
        x = jax.block_until_ready(passes(x, np.int32(repeats)))

    return 2 * size / _seconds(run)


def _time(name: str, spec: CacheSpec, batch: int, dtype: jnp.dtype) -> Speed:
    """Time the layers of a cache that is full but for one token."""
    tokens = np.full(batch, spec.capacity - 1, np.int32)
    cache = kv.init(spec, batch, np.full(batch, spec.capacity, np.int32))
    layers = jax.tree.map(_noise, cache.layers)
    meta = AttentionMetadata(jnp.asarray(tokens), jnp.ones(batch, jnp.int32), cache.window, spec)
    q, k, v = (_noise(jnp.zeros((batch, K, rows, H), dtype)) for rows in (G, 1, 1))

    @jax.jit
    def steps(q, k, v, layers, meta, repeats):
        def step(_, q):
            for layer in layers:
                q = q / 2 + attention.attend(q, k, v, layer, meta, start=0, group_size=G).astype(q.dtype)
            return q

        return lax.fori_loop(0, repeats, step, q)

    seconds = _seconds(lambda repeats: jax.block_until_ready(steps(q, k, v, layers, meta, np.int32(repeats))))
    return Speed(name, spec.implementation, _step_bytes(spec, batch) // len(layers), seconds / len(layers))


@jax.jit
def _noise(x: jax.Array) -> jax.Array:
    """Return numbers like those of a cache in the shape and type of x; scales of an int8 cache fit its bytes."""
    if x.dtype == jnp.int8:
        return jax.random.randint(jax.random.key(0), x.shape, -127, 128, x.dtype)
    size = 1 / 74 if x.ndim == 4 and x.shape[2] == 1 and x.dtype == jnp.float32 else 1.0
    return (size * jax.random.normal(jax.random.key(0), x.shape)).astype(x.dtype)


def _step_bytes(spec: CacheSpec, batch: int) -> int:
    """Return the bytes of all slots that a decode step reads."""
    total = 0
    for layer in range(spec.heads.num_layers):
        for heads, windowed, _ in spec.groups(layer):
            kind = spec.type(windowed)
            token = 2 * (H * kind.itemsize + 4 * (kind == jnp.int8))
            total += len(heads) * (spec.windowed_slots if windowed else spec.capacity - 1) * token
    return batch * total


def _seconds(run: Callable[[int], Any]) -> float:
    """Return the seconds per repeat of `run(repeats)`, without the first call, which compiles."""
    run(1)
    repeats = 1
    while True:
        started = time.perf_counter()
        run(repeats)
        took = time.perf_counter() - started
        if took > SAMPLE_SECONDS / 4 or repeats >= 1 << 14:
            break
        repeats *= 4
    repeats = max(1, int(repeats * SAMPLE_SECONDS / took))
    samples = []
    for _ in range(3):
        started = time.perf_counter()
        run(repeats)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples) / repeats
