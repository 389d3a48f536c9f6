"""Checks of the kernels against float64 NumPy: random inputs with NaN in everything that must not be read.

`razor-jax doctor` runs them on every kernel of a device; `razor_jax/proof.py` runs small ones before a kernel's first
use. The expected results share no code with the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import EIGHT_BIT, attention, cache_write
from .attention import dispatch
from .attention.part import Part
from .attention.state import State
from .backend import Implementation, Kind
from .cache_write import CacheWrite, GroupArrays

Host = Any  # a NumPy array or None, in records that are annotated for JAX arrays

SINKS = 4
# Right kernels reach 2e-6 in float32, and 6e-3 in types that round queries or weights to 8 bits of mantissa.
FLOAT32_LIMIT, LIMIT = 1e-4, 2e-2
MEANS_LIMIT = 1e-4  # of the means after a write: float32 sums in any order
PAGE = 128  # slots of a page
_CALLS = {
    "attend": ("decode", "ring", "chunk", "pages"),
    "attend_causal": ("causal",),
    "write": ("token", "tokens", "append", "page"),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One call of one kernel.

    Attributes:
      kind: the kernel.
      call: "decode" (a full group), "ring" (with a compensation token), "chunk" (many queries against the cache),
        "causal", "token" and "tokens" (writes to a ring), "append" (a write to a full group); "pages" and "page" are
        "ring" and "token" on a pool of pages.
      heads: K and G.
      slots: S, slots of the cache; tokens of the chunk for "causal".
    """

    kind: Kind
    call: str
    heads: tuple[int, int]
    slots: int

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        if self.kind.op == "write":
            return MEANS_LIMIT
        exact = self.kind.query == "float32" and jnp.dtype(self.kind.cache) not in EIGHT_BIT
        return FLOAT32_LIMIT if exact else LIMIT

    def __str__(self) -> str:
        K, G = self.heads
        return f"{self.call}, {K} KV heads × {G}, H={self.kind.head_dim}, {self.slots:,} slots, {self.kind.cache}"


def checks_of(kind: Kind, heads: tuple[int, int], slots: int) -> list[Check]:
    """Return the checks of a kernel on caches of `slots` slots, K and G as in `heads`."""
    return [Check(kind, call, heads, slots) for call in _CALLS[kind.op]]


def run(check: Check, implementation: Implementation, interpret: bool = False) -> float:
    """Return the error of a kernel: max|a - b| / max|b|; infinite if a slot of a cache write has wrong bits.

    Compiles and runs on the default device. The result is NaN if anything that must not be read was read.
    """
    run_op = {"attend": _attend, "attend_causal": _causal, "write": _write}[check.kind.op]
    return run_op(check, implementation, interpret)


class _Random:
    """Reproducible values of a type, and their float64 values."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: str = "float32") -> Host:
        return self.rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))

    def cached(self, *shape: int, dtype: str) -> tuple[Host, Host]:
        """Return values [B,K,S,H] of a cache type and their scales [B,K,1,S]."""
        if dtype != "int8":
            return self.normal(*shape, dtype=dtype), None
        scale = self.rng.uniform(0.5, 1.5, (*shape[:2], 1, shape[2])).astype(np.float32) / 74
        return self.rng.integers(-127, 128, shape, np.int8), scale


def _real(x: Host, scale: Host) -> Host:
    """Return float64 values of a cached array [B,K,S,H]."""
    x = x.astype(np.float64)
    return x if scale is None else x * scale[:, :, 0, :, None]


def _poison(x: Host, seen: Host) -> Host:
    """Return x [B,K,S,H] with NaN in slots that bool [B,S] leaves out; int8 has none and stays."""
    return x if x.dtype == np.int8 else np.where(seen[:, None, :, None], x, np.asarray(np.nan, x.dtype))


def _poison_scale(x: Host, seen: Host) -> Host:
    return x if x is None else np.where(seen[:, None, None, :], x, np.float32(np.nan))


def error_of(got: Any, want: Host) -> float:
    """Return the largest max|a - b| / max|b| of a query row [..., H], NaN if any value is NaN.

    Each row counts alone, because means over many random values are small. NumPy's maximum keeps NaN.
    """
    difference = np.max(np.abs(np.asarray(got).astype(np.float64) - want), axis=-1)
    largest = np.max(np.abs(want), axis=-1)
    return float(np.max(difference / np.maximum(largest, 1e-30)))


def _softmax(q, k, v, sees, means=None, n=None) -> tuple[Host, Host]:
    """Return float64 outputs [B,K,R,H] and log-sum-exps [B,K,R] of q over the slots that `sees` [B,1,R,S] shows.

    Means [B,K,1,H] count n [B] times. Rows that see nothing are zero, and their log-sum-exp is -inf.
    """
    logits = np.where(sees, q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
    if means is not None and n is not None:
        k_mean, v_mean = (np.where(n[:, None, None, None] > 0, x, 0.0) for x in means)
        with np.errstate(divide="ignore"):
            extra = q @ k_mean.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + np.log(n)[:, None, None, None]
        logits, v = np.concatenate([logits, extra], axis=3), np.concatenate([v, v_mean], axis=2)
    largest = logits.max(axis=3, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, largest + np.log(total), -np.inf)[..., 0]
    return weights @ v / np.where(total > 0, total, 1.0), lse


def _edges(slots: int, rows: int) -> Host:
    """Return ragged lengths, int32 [rows]: all slots, one, none, and about half."""
    return np.asarray([slots, 1, 0, slots // 2 + 1][:rows], np.int32)


def _scale(H: int) -> float:
    return float(1 / np.sqrt(H))


def _compensation(q: Host, means: tuple[Host, Host], n: Host) -> State:
    k_mean, v_mean = (jnp.asarray(x, jnp.float32) for x in means)
    return attention.compensation(jnp.asarray(q), k_mean, v_mean, jnp.asarray(n), _scale(q.shape[-1]))


class _Pages:
    """A pool with the pages of all rows in random order; its last page belongs to no row."""

    def __init__(self, rows: int, slots: int):
        each = -(-slots // PAGE)
        self.table = np.random.default_rng(4).permutation(rows * each).reshape(rows, each).astype(np.int32)

    def pool(self, x: Host) -> Host:
        """Return rows [B,K,S,H], or scales [B,K,1,S], as pages [P,K,page,H] or [P,K,1,page]."""
        if x is None:
            return None
        axis = 3 if x.shape[2] == 1 else 2
        x = np.moveaxis(x, axis, 2)
        B, K, S, width = x.shape
        each = self.table.shape[1]
        blank = np.asarray(0 if x.dtype == np.int8 else np.nan, x.dtype)
        x = np.concatenate([x, np.full((B, K, each * PAGE - S, width), blank)], axis=2)
        pool = np.full((B * each + 1, K, PAGE, width), blank)
        pool[self.table] = x.reshape(B, K, each, PAGE, width).swapaxes(1, 2)
        return np.moveaxis(pool, 2, axis)


def _attend(check: Check, implementation: Implementation, interpret: bool) -> float:
    (K, G), S, H, random = check.heads, check.slots, check.kind.head_dim, _Random(1)
    chunk, pages = check.call == "chunk", _Pages(3, S) if check.call == "pages" else None
    B, R = 3, G * (128 // G + 1 if chunk else 1)
    lengths = _edges(S, B)
    seen = np.arange(S) < lengths[:, None]
    q = random.normal(B, K, R, H, dtype=check.kind.query)
    (k, k_scale), (v, v_scale) = (random.cached(B, K, S, H, dtype=check.kind.cache) for _ in "kv")
    means = n = state = None
    if check.call != "decode":
        n = np.asarray([1000, 37, 0], np.int32)
        k_mean, v_mean = (np.where(n[:, None, None, None] > 0, random.normal(B, K, 1, H), np.nan) for _ in "kv")
        means = k_mean, v_mean
        state = _compensation(q, means, n)
    scales = (_poison_scale(x, seen) for x in (k_scale, v_scale))
    part = Part(q, _poison(k, seen), _poison(v, seen), lengths, state, *scales)
    if pages is not None:
        names = ("k", "v", "k_scale", "v_scale")
        part = part._replace(block_table=pages.table, **{name: pages.pool(getattr(part, name)) for name in names})
    backend = dispatch.backend_module(implementation)
    options = {"scale": _scale(H), "return_state": chunk} | ({"interpret": True} if interpret else {})
    got = jax.jit(functools.partial(backend.attend, **options))(jax.tree.map(jnp.asarray, part))
    want, lse = _softmax(q.astype(np.float64), _real(k, k_scale), _real(v, v_scale), seen[:, None, None, :], means, n)
    return _error_of_state(got, want, lse) if chunk else error_of(got, want)


def _error_of_state(state, want: Host, lse: Host) -> float:
    """Return the larger of the errors of the outputs and of the log-sum-exps of a state."""
    acc, m, l = (np.asarray(x, np.float64) for x in state)
    some = np.isfinite(lse)
    out = acc / np.where(l == 0, 1.0, l)[..., None]
    found = np.where(some, m, 0.0) + np.log(np.where(some, l, 1.0))
    # np.maximum keeps NaN, where Python's max may lose it.
    return float(np.maximum(error_of(out, want), np.max(np.abs(found - np.where(some, lse, 0.0)))))


def _causal(check: Check, implementation: Implementation, interpret: bool) -> float:
    (K, G), T, H, random = check.heads, check.slots, check.kind.head_dim, _Random(2)
    lengths: Host = np.asarray([T, T // 3 + 1], np.int32)
    n = np.asarray([0, 37], np.int32)
    B = len(lengths)
    seen = np.arange(T) < lengths[:, None]
    q = random.normal(B, K, G * T, H, dtype=check.kind.query)
    k, v = (random.normal(B, K, T, H, dtype=check.kind.cache) for _ in "kv")
    k_mean, v_mean = (np.where(n[:, None, None, None] > 0, random.normal(B, K, 1, H), np.nan) for _ in "kv")
    means = k_mean, v_mean
    state = _compensation(q, means, n)
    part = jax.tree.map(jnp.asarray, Part(q, _poison(k, seen), _poison(v, seen), lengths, state))
    backend = dispatch.backend_module(implementation)
    options = {"start": 0, "group_size": G, "scale": _scale(H)} | ({"interpret": True} if interpret else {})
    got = np.asarray(jax.jit(functools.partial(backend.attend_causal, **options))(part)).astype(np.float64)
    token = np.arange(G * T) // G
    sees = (np.arange(T)[None, :] <= token[:, None])[None, None] & seen[:, None, None, :]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    want, _ = _softmax(q, k, v, sees, means, n)
    # Rows past a row's tokens are finite and meaningless.
    exists = (token < lengths[:, None])[:, None, :, None]
    return error_of(np.where(exists, got, 0.0), np.where(exists, want, 0.0))


class _Writes(NamedTuple):
    """Lengths before a write, tokens written, and the window of each row; None for a full group."""

    lengths: Host
    counts: Host
    window: Host


def _writes(call: str, S: int) -> _Writes:
    if call == "append":
        lengths, counts = [0, S - 40, 7], [40, 40, 0]
        return _Writes(np.asarray(lengths, np.int32), np.asarray(counts, np.int32), None)
    T = 40 if call == "tokens" else 1
    window = np.asarray([S - SINKS, S - SINKS, 37, 37], np.int32)
    lengths = np.asarray([0, S + 3, 90, 41], np.int32)  # empty, wrapped, wrapped twice, just full
    return _Writes(lengths, np.asarray([T, T, T, int(call == "token")], np.int32), window)


def _write(check: Check, implementation: Implementation, interpret: bool) -> float:
    (K, _), S, H, random = check.heads, check.slots, check.kind.head_dim, _Random(3)
    plan = _writes(check.call, S)
    lengths, counts, window = plan
    B, T = len(lengths), int(counts.max())
    total = int((lengths + counts).max())
    arrays = [x for _ in "kv" for x in random.cached(B, K, total, H, dtype=check.kind.cache)]
    history = _record(arrays[0], arrays[2], arrays[1], arrays[3])
    before = _group(history, plan, lengths, S, blank=None)
    want = _group(history, plan, lengths + counts, S, blank=before)
    index = np.minimum(lengths[:, None] + np.arange(T), total - 1)
    new = _record(
        *(np.take_along_axis(x, index[:, None, :, None], axis=2) for x in (history.k, history.v)),
        *(None if x is None else np.take_along_axis(x, index[:, None, None, :], axis=3) for x in history[2:4]),
    )
    table: Host = None
    if check.call == "page":
        pages = _Pages(B, S)
        table = pages.table
        before, want = (_record(*map(pages.pool, x[:4]), *x[4:]) for x in (before, want))
    call = CacheWrite(before, new, lengths, counts, window, 0 if window is None else SINKS, table)
    arguments = jax.tree.map(jnp.asarray, call._replace(sinks=None))
    write = cache_write.dispatch.backend_module(implementation).write
    if implementation == "pallas_tpu":
        write = functools.partial(write, interpret=interpret)
    got: Any = jax.jit(lambda x: write(x._replace(sinks=call.sinks)))(arguments)
    for name in ("k", "v", "k_scale", "v_scale"):
        a, b = (getattr(x, name) for x in (got, want))
        if b is not None and not np.array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8)):
            return float("inf")
    if want.k_mean is None:
        return 0.0
    errors = []
    for a, b in ((got.k_mean, want.k_mean), (got.v_mean, want.v_mean)):
        a = np.asarray(a)
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("nan")
        errors.append(error_of(np.nan_to_num(a), np.nan_to_num(b)))
    return max(errors)


def _record(*arrays: Host) -> Any:
    return GroupArrays(*arrays)


def _group(history: Any, plan: _Writes, lengths: Host, S: int, blank: Any) -> Any:
    """Return the group of S slots after `lengths` tokens of each row; what no token reaches is that of `blank`."""
    B, K, _, H = history.k.shape
    folds = plan.window is not None
    if blank is None:
        values = [np.full((B, K, S, H), 0 if x.dtype == np.int8 else np.nan, x.dtype) for x in history[:2]]
        scales = [None if x is None else np.full((B, K, 1, S), np.nan, np.float32) for x in history[2:4]]
        means = [np.full((B, K, 1, H), np.nan, np.float32) if folds else None for _ in "kv"]
        blank = _record(*values, *scales, *means)
    group = _record(*(None if x is None else x.copy() for x in blank))
    for b, length in enumerate(lengths):
        positions = np.arange(length)
        slots = positions
        if folds:
            ring = plan.window[b]
            dropped = slice(SINKS, max(SINKS, int(length) - int(ring)))
            positions = np.delete(positions, dropped)
            slots = np.where(positions < SINKS, positions, SINKS + (positions - SINKS) % ring)
            if dropped.stop > dropped.start:
                for mean, x, scale in zip(group[4:6], history[:2], history[2:4], strict=True):
                    mean[b] = _real(x, scale)[b, :, dropped].mean(axis=1, keepdims=True)
        for into, x in zip(group[:2], history[:2], strict=True):
            into[b][:, slots] = x[b][:, positions]
        for into, x in zip(group[2:4], history[2:4], strict=True):
            if into is not None:
                into[b][:, 0, slots] = x[b][:, 0, positions]
    return group


def slots_of(cache: str, tiny: bool = False) -> int:
    """Return the slots of a check: more than one block of every kernel, or few if `tiny`, for the interpreter."""
    if tiny:
        return 96
    return 8256 if jnp.dtype(cache).itemsize == 1 else 4160


def has_kernel(kind: Kind, implementation: Implementation) -> bool:
    """Return whether the implementation has a kernel of this kind; a GPU writes caches by XLA."""
    return implementation != "xla" and (kind.op != "write" or implementation == "pallas_tpu")


def why_unsupported(kind: Kind, implementation: Implementation) -> str | None:
    """Return why the implementation cannot run this kind, or None if it can."""
    H = kind.head_dim
    keys: Any = jax.ShapeDtypeStruct((1, 1, 32, H), jnp.dtype(kind.cache))
    if kind.op == "write":
        return cache_write.unsupported(implementation, GroupArrays(keys, keys))
    queries = jax.ShapeDtypeStruct((1, 1, 32, H), jnp.dtype(kind.query))
    return attention.unsupported(implementation, queries, keys, keys)
