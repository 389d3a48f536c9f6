"""Mixture of experts on a mesh: each device runs the experts that it stores, and the devices add up their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from ..models import experts
from ..sharding import weight_spec

if TYPE_CHECKING:
    from .placement import MeshPlacement


def mix(y: jax.Array, share: jax.Array, maps: Any, placement: MeshPlacement) -> jax.Array:
    """Run `models.experts.mix` on y [B, T, D] and share [B, T, E], rows over `data` and experts as weights are."""
    mesh, rows = placement.mesh, placement.rows(y.shape[0])
    axes = (*weight_spec("expert_gate/kernel", maps["gate"]["kernel"].shape, mesh), None)[0]

    def run(y: jax.Array, share: jax.Array, maps: Any) -> jax.Array:
        flat = (a.reshape(-1, a.shape[-1]) for a in (y, share))
        out = experts.mix(*flat, maps).reshape(y.shape).astype(y.dtype)
        return out if axes is None else lax.psum(out, axes)

    whole, stored = PartitionSpec(rows), PartitionSpec(axes)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(whole, PartitionSpec(rows, None, axes), stored),
        out_specs=whole,
        check_vma=False,
    )
    return mapped(y, share, maps)
