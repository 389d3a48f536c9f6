"""Static description of a cache: policy, types, shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .config import HeadGroup, HeadSplit, RazorConfig, kv_type
from .kernels import attention, cache_write
from .kernels.backend import Implementation, choose, first_choice, why_not
from .kernels.cache_write import GroupArrays
from .kernels.quantize import INT8

if TYPE_CHECKING:
    from .mesh.placement import MeshPlacement

# Slots that a kernel reads are whole tiles: on TPU of the smallest type, or the cache is copied each step.
_TILE = {"pallas_tpu": 32, "mosaic_gpu": 8}


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Static description of a cache (the jit key).

    Attributes:
      capacity: tokens that a row can hold.
      head_dim: H.
      heads: the head split.
      dtype: type of keys and values.
      razor: cache policy; None for dense attention, every head in one full group.
      windowed_dtype: type of the windowed heads, "" for `dtype`.
      implementation: of attention and cache writes.
      forced: whether the implementation was requested by name.
      placement: how the cache is spread over a mesh; None for one device.
    """

    capacity: int
    head_dim: int
    heads: HeadSplit
    dtype: str
    razor: RazorConfig | None
    windowed_dtype: str = ""
    implementation: Implementation = "xla"
    forced: bool = False
    placement: MeshPlacement | None = None

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
        """Devices that share the slots of each head; 1 without a mesh."""
        return 1 if self.placement is None else self.placement.shards

    def slots(self, windowed: bool, scope: int = 0) -> int:
        """Return the slots allocated for a head: those it may use, rounded up to whole tiles on each device."""
        slots = self.windowed_slots if windowed else self.capacity
        if scope:
            slots = min(self.capacity, scope)
        tile = _TILE.get(self.implementation, 1) * self.shards
        return -(-slots // tile) * tile

    def type(self, windowed: bool) -> jnp.dtype:
        """Return the type of a head's keys and values."""
        return jnp.dtype(self.windowed_dtype or self.dtype) if windowed else jnp.dtype(self.dtype)

    @property
    def kernels(self) -> Implementation | None:
        """What attention and writes request: None lets a call that the kernels cannot take run on XLA."""
        return self.implementation if self.forced or self.implementation == "xla" else None

    def groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """Return the layer's head groups in the order of the cache."""
        if self.razor is None:
            return (HeadGroup(self.heads.order(layer), windowed=False),)
        return self.heads.groups(layer)

    def shortest_ring(self, scope: int) -> int:
        """Return a length that no windowed head's ring goes below, in tokens."""
        if scope or self.razor is None:
            return scope or self.capacity
        return self.razor.window or self.razor.min_window

    def compensated(self, windowed: bool, scope: int) -> bool:
        """Return whether such a group has a compensation token."""
        return windowed and not scope and self.razor is not None and self.razor.compensation

    def describe(self) -> str:
        """Return the policy in one line, for reports."""
        if self.razor is None:
            return "dense"
        if not self.heads.scopes:
            return self.razor.describe()
        kept = [scope for layer in self.heads.scopes for scope in layer if scope]
        return f"ALiBi scopes of {min(kept):,} to {max(kept):,} tokens" if kept else "no ALiBi head is cut"

    def kv_bytes(self, batch: int) -> int:
        """Return the bytes of all groups as `cache.init` allocates them."""
        total = 0
        for layer in range(self.heads.num_layers):
            for heads, windowed, scope in self.groups(layer):
                kind = self.type(windowed)
                token = self.head_dim * kind.itemsize + (4 if kind == INT8 else 0)
                means = self.shards * 4 * self.head_dim if self.compensated(windowed, scope) else 0
                total += len(heads) * 2 * (self.slots(windowed, scope) * token + means)
        return batch * total

    def dense_bytes(self, batch: int) -> int:
        """Return the bytes of a bfloat16 dense cache of the same capacity and batch, the denominator of every ratio."""
        return batch * self.heads.num_layers * self.heads.num_kv_heads * self.capacity * 2 * self.head_dim * 2


def ring_length(razor: RazorConfig, tokens: Any) -> Any:
    """Return W for a prompt of that many tokens (an int or an int32 array): fixed, or max(4000, tokens / 5)."""
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
    placement: MeshPlacement | None = None,
) -> CacheSpec:
    """Return the spec of a cache; `functional.cache_spec` makes it from params and a policy.

    Args:
      dtype: of the weights, and of the cache where `razor` names no type.
      implementation: None chooses by the device; where no kernel takes the model's shapes or types, XLA runs and a
        warning says so.
      alibi: whether attention adds ALiBi biases.

    Raises:
      ValueError: a capacity below 1, or a forced implementation that cannot run.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a cache holds at least 1 token")
    full = windowed = jnp.dtype(dtype)
    if razor is not None:
        full = kv_type(razor.kv_dtype) if razor.kv_dtype else full
        windowed = kv_type(razor.windowed_kv_dtype) if razor.windowed_kv_dtype else full
    with contextlib.nullcontext() if placement is None else placement.inside():
        chosen = _choose(implementation, head_dim, jnp.dtype(dtype), {full, windowed}, alibi)
    return CacheSpec(
        capacity,
        head_dim,
        split,
        full.name,
        razor,
        windowed_dtype="" if windowed == full else windowed.name,
        implementation=chosen,
        forced=implementation is not None,
        placement=placement,
    )


def _choose(
    asked: Implementation | None, H: int, dtype: jnp.dtype, cached: set[jnp.dtype], alibi: bool
) -> Implementation:
    """Return the implementation for queries and new tokens of `dtype` and caches of the types `cached`."""

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
        # Python shows a warning once for each place that raises it.
        reason = why_not(first_choice(), unsupported)
        warnings.warn(f"attention runs without its {first_choice()} kernels, on XLA: {reason}", stacklevel=3)
    return chosen
