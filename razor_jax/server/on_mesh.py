"""Where the arrays of the engine are on a mesh. Every function returns its argument unchanged on one device.

Pages and compensation tokens are spread as those of any cache. By slot, each page is divided over the devices of the
model axes: slot g of a row is on device g mod P there as here, and one block table serves all devices. Staged keys and
values are spread by head. Everything else is whole on every device, so that every process reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import NamedSharding

from .. import memory
from ..cache import CacheSpec
from ..functional import placement_of
from ..mesh.cache import cache_pspecs
from ..sharding import DATA, HEADS, constrain

T = TypeVar("T")


def pin_cache(tree: T, spec: CacheSpec) -> T:
    """Pin a part of a cache, head groups or compensation tokens, to its devices."""
    if spec.placement is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    mesh, pspecs = spec.placement.mesh, cache_pspecs(tree, spec, 1)
    pinned = [lax.with_sharding_constraint(x, NamedSharding(mesh, at)) for x, at in zip(leaves, pspecs, strict=True)]
    return jax.tree.unflatten(structure, pinned)


def pin_by_head(tree: T, spec: CacheSpec) -> T:
    """Pin arrays [1, K, …] to the devices of their heads."""
    mesh = None if spec.placement is None else spec.placement.mesh
    return jax.tree.map(lambda x: constrain(x, mesh, DATA, HEADS), tree)


def pin_whole(tree: T, spec: CacheSpec) -> T:
    """Pin arrays to every device."""
    return jax.tree.map(placement_of(spec).replicated, tree)


def allocate(make: Callable[[], T], pin: Callable[[T, CacheSpec], T], spec: CacheSpec) -> T:
    """Return what `make` makes, pinned. On a mesh no device holds more than its part meanwhile."""
    if spec.placement is None:
        return make()
    return jax.jit(lambda: pin(make(), spec))()


def devices(spec: CacheSpec) -> int:
    """Return how many devices share the pages."""
    return 1 if spec.placement is None else spec.placement.mesh.size


def head_devices(spec: CacheSpec) -> int:
    """Return how many devices share the heads of staged keys and values."""
    return 1 if spec.placement is None else spec.placement.mesh.shape[HEADS]


def free_bytes(spec: CacheSpec) -> int | None:
    """Return the free bytes per device, the least of all processes; None if unknown."""
    return memory.least_free_bytes(None if spec.placement is None else spec.placement.mesh)


def require_one_group(spec: CacheSpec) -> None:
    """Raise ValueError for a mesh with several groups of devices along `data`, or processes without a mesh."""
    if spec.placement is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes without a mesh: give mesh='data=1,model=N', N all devices"
            )
        return
    data = spec.placement.mesh.shape[DATA]
    if data > 1:
        raise ValueError(
            f"a mesh of data={data}: all answers share one pool of pages, so the engine needs data=1; give all devices "
            "to model, or start one server per group of devices"
        )


__all__: Sequence[str] = (
    "allocate",
    "devices",
    "free_bytes",
    "head_devices",
    "pin_by_head",
    "pin_cache",
    "pin_whole",
    "require_one_group",
)
