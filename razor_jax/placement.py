"""Where the steps of a call run: one device here; `mesh.MeshPlacement` has the same methods for a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from . import attention
from . import cache as kv
from .cache import AttentionMetadata, KVCache
from .kernels.ordering import ordered_after
from .spec import CacheSpec

if TYPE_CHECKING:
    from .mesh.placement import MeshPlacement


class OneDevice:
    """Every step of a call on one device."""

    init = staticmethod(kv.init)
    broadcast = staticmethod(kv.broadcast)
    attend = staticmethod(attention.attend)
    attend_and_write = staticmethod(attention.attend_and_write)
    write_after = staticmethod(attention.write_after)

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


def placement_of(spec: CacheSpec) -> OneDevice | MeshPlacement:
    """Return where calls on caches of this spec run."""
    return _ONE_DEVICE if spec.placement is None else spec.placement


_ONE_DEVICE = OneDevice()
