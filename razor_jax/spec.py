"""What is static about a cache: policy, types and shapes, and how it lies on the devices of a mesh.

On a mesh every head group of every layer is either *by slot*, each head's slots dealt out to all devices of the model
axes (`slots.py`), or *by head*, whole heads on each device. By slot the devices hold equal bytes whatever the split,
and merge what each has seen; by head nothing has to be merged, but each group has to divide. Rows of a batch lie over
the axis `data` either way.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from . import sharding
from .config import HeadSplit, RazorConfig, kv_type
from .kernels import attention, cache_write
from .kernels.backend import Implementation, choose, first_choice, why_not
from .kernels.cache_write import GroupArrays
from .kernels.quantize import INT8

Layout = Literal["slot", "head"]

# Slots that a kernel reads are whole tiles: on TPU of the smallest type, or the cache is copied each step.
_TILE = {"pallas_tpu": 32, "mosaic_gpu": 8}


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All that is static about a cache: what jit compiles for."""

    capacity: int  # tokens a row can hold
    head_dim: int  # H
    retrieval: tuple[tuple[int, ...], ...]  # of the split: which KV heads keep everything, held first
    num_kv_heads: int  # K
    dtype: str
    razor: RazorConfig | None  # None: dense, every head in one full group
    windowed_dtype: str = ""  # of the windowed heads, "" for `dtype`
    implementation: Implementation = "xla"  # of attention and writes
    forced: bool = False  # asked for by name
    scopes: tuple[tuple[int, ...], ...] = ()  # of the split: how many tokens each KV head of an ALiBi model keeps
    mesh: Mesh | None = None  # (data, heads, rows), None for one device
    layout: Layout | None = None  # on a mesh

    @property
    def counts(self) -> tuple[int, ...]:
        """Retrieval KV heads of each layer."""
        return tuple(len(heads) for heads in self.retrieval)

    @property
    def sinks(self) -> int:
        """N0."""
        return self.razor.sinks if self.razor else 0

    @property
    def windowed_slots(self) -> int:
        """Slots that a windowed head may use."""
        if self.razor is None:
            return self.capacity
        return min(self.capacity, self.sinks + ring_length(self.razor, self.capacity))

    @property
    def shards(self) -> int:
        """Devices that the slots of a head are dealt out to."""
        return sharding.model_devices(self.mesh) if self.layout == "slot" else 1

    def rows(self, batch: int) -> str | None:
        """The mesh axis that rows of a batch lie over; a single row is held by all of that axis.

        Raises ValueError for a batch that does not divide.
        """
        data = 1 if self.mesh is None else self.mesh.shape[sharding.DATA]
        if batch % data and batch > 1:
            raise ValueError(
                f"batch={batch} does not divide over data={data} of the mesh: make it a multiple of {data}, or give "
                "the mesh more of model and less of data"
            )
        return sharding.DATA if batch % data == 0 else None

    def slots(self, windowed: bool, scope: int = 0) -> int:
        """Slots allocated for a head: those it may use, rounded up to whole tiles on each device that shares them."""
        slots = self.windowed_slots if windowed else self.capacity
        if scope:
            slots = min(self.capacity, scope)
        tile = _TILE.get(self.implementation, 1) * self.shards
        return -(-slots // tile) * tile

    def type(self, windowed: bool) -> jnp.dtype:
        """The type of a head's keys and values."""
        return jnp.dtype(self.windowed_dtype or self.dtype) if windowed else jnp.dtype(self.dtype)

    @property
    def kernels(self) -> Implementation | None:
        """What calls ask for: kernels that nobody forced leave a call that they cannot take to XLA."""
        return self.implementation if self.forced or self.implementation == "xla" else None

    def groups(self, layer: int) -> tuple[tuple[int, bool, int], ...]:
        """(KV heads, windowed, scope or 0) of each of the layer's groups, in the order in which heads are held."""
        if self.razor is None:
            return ((self.num_kv_heads, False, 0),)
        kept = self.counts[layer]
        rest = ((self.num_kv_heads - kept, True, 0),)
        if self.scopes:
            heads = collections.Counter(scope for scope in self.scopes[layer] if scope)
            rest = tuple((heads[scope], True, scope) for scope in sorted(heads, reverse=True))
        return tuple(group for group in ((kept, False, 0), *rest) if group[0])

    def held(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Where the heads of groups of these sizes are among all KV heads, as weights hold them."""
        dealt = 1 if self.razor is None else sharding.dealt(self, self.mesh)
        return sharding.places(sizes, dealt)

    def shortest_ring(self, scope: int) -> int:
        """Tokens that no windowed head's ring goes below."""
        if scope or self.razor is None:
            return scope or self.capacity
        return self.razor.window or self.razor.min_window

    def compensated(self, windowed: bool, scope: int) -> bool:
        """Whether such a group has means."""
        return windowed and not scope and self.razor is not None and self.razor.compensation

    def describe(self) -> str:
        """The policy in one line, for reports."""
        if self.razor is None:
            return "dense"
        if not self.scopes:
            return self.razor.describe()
        kept = [scope for layer in self.scopes for scope in layer if scope]
        return f"ALiBi scopes of {min(kept):,} to {max(kept):,} tokens" if kept else "no ALiBi head is cut"

    def kv_bytes(self, batch: int) -> int:
        """Bytes of all groups, as `init` allocates them."""
        total = 0
        for layer in range(len(self.counts)):
            for heads, windowed, scope in self.groups(layer):
                kind = self.type(windowed)
                token = self.head_dim * kind.itemsize + (4 if kind == INT8 else 0)
                means = self.shards * 4 * self.head_dim if self.compensated(windowed, scope) else 0
                total += heads * 2 * (self.slots(windowed, scope) * token + means)
        return batch * total

    def dense_bytes(self, batch: int) -> int:
        """Bytes of a bfloat16 dense cache of the same capacity and batch, the denominator of every ratio."""
        return batch * len(self.counts) * self.num_kv_heads * self.capacity * 2 * self.head_dim * 2


def ring_length(razor: RazorConfig, tokens: Any) -> Any:
    """W for a prompt of that many tokens (an int or an int32 array): fixed, or max(4000, tokens / 5)."""
    if razor.window is not None:
        return tokens * 0 + razor.window
    larger = max if isinstance(tokens, int) else jnp.maximum
    return larger(tokens // razor.window_divisor, razor.min_window)


def make_spec(
    split: HeadSplit,
    head_dim: int,
    capacity: int,
    razor: RazorConfig | None,
    dtype: Any,
    implementation: Implementation | None = None,
    alibi: bool = False,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> CacheSpec:
    """The spec of a cache for a model of that split, head width and weight type, which is the cache's too where
    razor names none; `alibi` where attention adds biases.

    `implementation` None chooses by the device; where no kernel takes the model's shapes or types the XLA path runs
    and a warning says so. `layout` None is by head where every group divides over the mesh, else by slot.

    Raises ValueError where a forced implementation cannot run or a layout does not divide.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a cache holds at least 1 token")
    full = windowed = jnp.dtype(dtype)
    if razor is not None:
        full = kv_type(razor.kv_dtype) if razor.kv_dtype else full
        windowed = kv_type(razor.windowed_kv_dtype) if razor.windowed_kv_dtype else full
    mesh = sharding.nontrivial(mesh)
    with _kernels_on(mesh):
        chosen = _choose(implementation, head_dim, jnp.dtype(dtype), {full, windowed}, alibi)
    return CacheSpec(
        capacity,
        head_dim,
        split.retrieval,
        split.num_kv_heads,
        full.name,
        razor,
        windowed_dtype="" if windowed == full else windowed.name,
        implementation=chosen,
        forced=implementation is not None,
        scopes=split.scopes,
        mesh=mesh,
        layout=lay_out(layout, split, mesh, dense=razor is None),
    )


def lay_out(asked: Layout | None, split: sharding.Split, mesh: Mesh | None, dense: bool) -> Layout | None:
    """The layout on a mesh, None without one."""
    if asked not in (None, "slot", "head"):
        raise ValueError(f"layout={asked!r}: 'slot', 'head', or None to choose")
    if mesh is None:
        return None
    devices = sharding.model_devices(mesh)
    whole = split.num_kv_heads % devices == 0 if dense else sharding.dealt(split, mesh) == devices
    if asked == "head" and not whole:
        sizes = {len(heads) for heads in split.retrieval}
        raise ValueError(
            f"layout='head' over {devices} devices: every layer's retrieval heads and windowed heads must divide by "
            f"it, there are layers with {sorted(sizes)} of {split.num_kv_heads} retrieval heads; choose heads with "
            f"select(balanced_over={devices}), or leave the layout to 'slot'"
        )
    return asked or ("head" if whole else "slot")


def _kernels_on(mesh: Mesh | None) -> Any:
    """Where kernels run: inside `shard_map`, on the mesh's own devices."""
    if mesh is None:
        return contextlib.nullcontext()
    inside = mesh.abstract_mesh.update(axis_types=(AxisType.Manual,) * len(mesh.axis_names))
    return jax.sharding.use_abstract_mesh(inside)


def _choose(
    asked: Implementation | None, H: int, dtype: jnp.dtype, cached: set[jnp.dtype], alibi: bool
) -> Implementation:
    """The implementation that runs for queries and new tokens of `dtype` and caches of the types `cached`."""

    def of(kind) -> Any:
        return jax.ShapeDtypeStruct((1, 1, 32, H), kind)

    def unsupported(name):
        for kind in sorted(cached | {dtype}, key=str):
            keys = of(kind)
            reason = attention.unsupported(name, of(dtype), keys, keys, alibi) or cache_write.unsupported(
                name, GroupArrays(keys, keys)
            )
            if reason is not None:
                return reason
        return None

    chosen = choose(asked, unsupported)
    if asked is None and chosen != first_choice():
        # Python shows a warning from one place once.
        reason = why_not(first_choice(), unsupported)
        warnings.warn(f"attention runs without its {first_choice()} kernels, on XLA: {reason}", stacklevel=3)
    return chosen
