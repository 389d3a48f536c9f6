"""The public attention calls: they check shapes, then run the backend that `kernels/backend.py` chooses."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Float32, Int

from .. import INT8
from ..backend import Implementation, Kind, Op, choose, platform, rejected
from .alibi import Alibi
from .part import Part
from .state import State

# Imported on first use: where a release of JAX drops a GPU backend, only GPUs notice.
_MODULES = {"xla": "xla", "pallas_tpu": "tpu", "pallas_gpu": "triton", "mosaic_gpu": "mosaic_gpu"}


def attend(
    q: Float[jax.Array, "B K R H"],
    k: jax.Array,
    v: jax.Array,
    lengths: Int[jax.Array, " B"],
    *,
    scale: float,
    state: State | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    block_table: Int[jax.Array, "B pages"] | None = None,
    alibi: Alibi | None = None,
    return_state: bool = False,
    implementation: Implementation | None = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend to slots [0, lengths[b]): decode, and a chunk against the cache. The arrays are those of `Part`.

    Args:
      scale: factor on the logits, positive.
      return_state: return (acc, m, l) instead of acc / l.
      implementation: the backend by name, None to choose by device and shapes.

    Returns:
      [B, K, R, H] in q's type, or the state.

    Raises:
      ValueError: shapes or types disagree, pages are not whole tiles of the backend, or a forced backend cannot run.
    """
    part = Part(q, k, v, lengths, state, k_scale, v_scale, block_table, alibi)
    _check_part(part)
    backend = _backend(implementation, "attend", q, k, v, alibi is not None)
    return backend.attend(part, scale=scale, return_state=return_state)


def attend_groups(
    parts: Sequence[Part],
    *,
    scale: float,
    return_state: bool = False,
    implementation: Implementation | None = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Run `attend` on each head group of a layer and concatenate on K, in one launch where the backend has one.

    Raises as `attend`.
    """
    together = len(parts) > 1 and implementation in (None, "pallas_gpu") and platform() == "gpu"

    def runs(part: Part) -> bool:
        if implementation is None and rejected(_kind("attend", part.q, part.k)):
            return False
        return unsupported("pallas_gpu", part.q, part.k, part.v, part.alibi is not None) is None

    if together and all(map(runs, parts)):
        for part in parts:
            _check_part(part)
        return backend_module("pallas_gpu").attend_groups(parts, scale=scale, return_state=return_state)
    options = {"scale": scale, "return_state": return_state, "implementation": implementation}
    results = [attend(**part._asdict(), **options) for part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


def attend_causal(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K S H"],
    v: Float[jax.Array, "B K S H"],
    lengths: Int[jax.Array, " B"],
    *,
    start: jax.Array | int,
    group_size: int,
    scale: float,
    state: State | None = None,
    slopes: Float32[jax.Array, "K G"] | None = None,
    return_state: bool = False,
    implementation: Implementation | None = None,
) -> Float[jax.Array, "B K R H"] | State:
    """Attend causally: query token t is token start + t of a chunk and sees the chunk's tokens up to itself.

    Args:
      q: [B, K, G·Tq, H], rows packed t-major.
      k, v: [B, K, T, H], the whole chunk, in a type that multiplies with q's type without rounding.
      lengths: int32 [B], valid tokens of the chunk.
      start: index of q's first token in the chunk, an int or int32 scalar.
      group_size: G.
      slopes: float32 [K, G] of ALiBi, None for no bias.
      scale, state, return_state, implementation: as in `attend`.

    Returns:
      [B, K, G·Tq, H] in q's type, or the state.

    Raises:
      ValueError: as in `attend`.
    """
    part = Part(q, k, v, lengths, state)
    _check_shapes(part)
    if q.shape[2] % group_size:
        raise ValueError(f"q has {q.shape[2]} rows per KV head: must be a multiple of group_size={group_size}")
    options = {} if slopes is None else {"slopes": slopes}  # XLA only
    return _backend(implementation, "attend_causal", q, k, v, slopes is not None).attend_causal(
        part, start=start, group_size=group_size, scale=scale, return_state=return_state, **options
    )


def unsupported(implementation: Implementation, q: Any, k: Any, v: Any, alibi: bool = False) -> str | None:
    """Return why the backend cannot run on these arrays, or None if it can. Only shapes and dtypes are read."""
    if alibi:
        return "ALiBi runs on XLA"
    return backend_module(implementation).unsupported(q, k, v)


def backend_module(implementation: Implementation) -> ModuleType:
    """Return the module of a backend."""
    return importlib.import_module(f".{_MODULES[implementation]}", __package__)


def _backend(
    implementation: Implementation | None, op: Op, q: jax.Array, k: jax.Array, v: jax.Array, alibi: bool
) -> ModuleType:
    if implementation == "xla":
        return backend_module("xla")
    return backend_module(choose(implementation, lambda name: unsupported(name, q, k, v, alibi), _kind(op, q, k)))


def _kind(op: Op, q: Any, k: Any) -> Kind:
    return Kind(op, q.shape[-1], str(q.dtype), str(k.dtype))


def _check_part(part: Part) -> None:
    """Raise ValueError if shapes or types of a part disagree."""
    q, k, v, lengths, _, k_scale, v_scale, table, alibi = part
    _check_shapes(part)
    if alibi is not None:
        _check_alibi(alibi, q, k.shape[2] if table is None else k.shape[2] * table.shape[1])
    for name, x, scale in (("k_scale", k, k_scale), ("v_scale", v, v_scale)):
        _check_scale(name, x, scale)
    if table is None:
        return
    if table.ndim != 2 or table.shape[0] != q.shape[0] or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(
            f"block_table is {table.dtype}{list(table.shape)}, must be int32 [B, pages] with q's B = {len(q)}"
        )
    if not any(isinstance(x, Tracer) for x in (table, lengths)):
        # Values are known only outside jit: there, every entry that a kernel follows must name a page.
        followed = np.arange(table.shape[1]) * k.shape[2] < np.asarray(lengths)[:, None]
        entries = np.asarray(table)[followed]
        if entries.size and not 0 <= entries.min() <= entries.max() < len(k):
            raise ValueError(
                f"block_table names pages {entries.min()} to {entries.max()}, the pool has pages 0 to {len(k) - 1}"
            )


def _check_shapes(part: Part) -> None:
    """Raise ValueError if q, k, v, lengths or the state disagree."""
    q, k, v, lengths, state = part[:5]
    B, K, R, H = q.shape
    paged = part.block_table is not None
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k {k.dtype}{list(k.shape)} and v {v.dtype}{list(v.shape)} must agree")
    if k.ndim != 4 or (k.shape[1], k.shape[3]) != (K, H) or (not paged and k.shape[0] != B):
        wanted = "pools [P, K, page, H]" if paged else "[B, K, S, H]"
        raise ValueError(f"k and v {list(k.shape)} must be {wanted} with q's B, K, H = {B}, {K}, {H}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths {list(lengths.shape)} must be [B] with q's B = {B}")
    if state is not None:
        for name, x, shape in zip(("acc", "m", "l"), state, (q.shape, (B, K, R), (B, K, R)), strict=True):
            if x.shape != shape or x.dtype != jnp.float32:
                raise ValueError(f"state's {name} is {x.dtype}{list(x.shape)}, must be float32{list(shape)}")


def _check_alibi(alibi: Alibi, q: jax.Array, S: int) -> None:
    B, K, R, _ = q.shape
    slopes, queries, keys = (x.shape for x in alibi)
    if slopes[0] != K or queries[0] != B or slopes[1] * queries[1] != R or keys != (B, S):
        raise ValueError(
            f"alibi has slopes {list(slopes)}, queries {list(queries)} and keys {list(keys)}: must be [K, G], [B, T] "
            f"and [B, S] with K = {K}, B = {B}, T·G = {R} and S = {S}"
        )


def _check_scale(name: str, x: jax.Array, scale: jax.Array | None) -> None:
    shape = (*x.shape[:2], 1, x.shape[2])
    if (x.dtype == INT8) != (scale is not None):
        raise ValueError(
            f"{name} is {'missing' if scale is None else 'given'} for a cache of type {x.dtype}: int8 has scales, "
            "other types have none"
        )
    if scale is not None and (scale.shape != shape or scale.dtype != jnp.float32):
        raise ValueError(f"{name} is {scale.dtype}{list(scale.shape)}, must be float32{list(shape)}")
