"""Order of KV heads on a mesh: retrieval heads first, on each device where every head group divides over all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ..config import HeadSplit
from ..sharding import model_devices


def divides_evenly(split: HeadSplit, mesh: Mesh | None) -> bool:
    """Return whether every head group of every layer divides over the devices of the model axes."""
    devices = model_devices(mesh)
    layers = range(split.num_layers)
    return all(len(group.heads) % devices == 0 for layer in layers for group in split.groups(layer))


def head_positions(sizes: Sequence[int], devices: int) -> list[np.ndarray]:
    """Return where the heads of groups of these sizes are among all KV heads.

    Each device has its share of every group, one group after the other; with one device, whole groups.
    """
    blocks = np.arange(sum(sizes)).reshape(devices, -1)
    ends = np.cumsum(sizes) // devices
    return [blocks[:, end - size // devices : end].reshape(-1) for end, size in zip(ends, sizes, strict=True)]


def stored_order(split: HeadSplit, layer: int, mesh: Mesh) -> tuple[int, ...]:
    """Return a layer's KV heads in the order of its weights on the mesh."""
    devices = model_devices(mesh) if divides_evenly(split, mesh) else 1
    sizes = [len(group.heads) for group in split.groups(layer)]
    order = [0] * split.num_kv_heads
    for head, position in zip(split.order(layer), np.concatenate(head_positions(sizes, devices)), strict=True):
        order[position] = head
    return tuple(order)
