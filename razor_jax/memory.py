"""Free memory of a device, and the check that a cache fits before anything is allocated."""

from __future__ import annotations

import bisect
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from .cache import CacheSpec


def check_memory(spec: CacheSpec, batch: int, free: int | None = None) -> None:
    """Raise MemoryError if a device has not enough free bytes for a new cache; nothing is allocated.

    `free`: free bytes per device; None to ask the first device of each process of the cache's mesh.
    """
    mesh = None if spec.placement is None else spec.placement.mesh
    devices = 1 if mesh is None else mesh.size
    if free is None:
        free = least_free_bytes(mesh)

    def needed(capacity: int, rows: int) -> int:
        return dataclasses.replace(spec, capacity=capacity).kv_bytes(rows) // devices

    if free is None or needed(spec.capacity, batch) <= free:
        return
    fits = bisect.bisect_right(range(1, spec.capacity), free, key=lambda capacity: needed(capacity, batch))
    step = 1 << fits.bit_length() >> (4 if fits > 512 else 2)
    fits = 0 if fits < 64 else fits - fits % step  # as `text.prompts.capacity_bucket` rounds up
    rows = free // max(1, needed(spec.capacity, 1))
    ways = [f"{fits:,} tokens per row fit"] * (fits > 0) + [f"{rows:,} rows fit"] * (rows > 0)
    if spec.razor is None and spec.method is None:
        ways.append("compression takes less than dense attention")
    elif needed(spec.capacity, batch) <= 1.9 * free and jnp.dtype(spec.dtype).itemsize > 1:  # scales take some
        ways.append("kv_dtype='int8' takes about half")
    raise MemoryError(
        f"a cache of {batch:,} × {spec.capacity:,} tokens needs {needed(spec.capacity, batch) / 2**30:,.2f} GiB "
        f"per device, and {free / 2**30:,.2f} GiB are free{': ' * bool(ways)}{'; '.join(ways)}"
    )


def least_free_bytes(mesh: Mesh | None) -> int | None:
    """Return the free bytes per device of a mesh, the least of all processes, or of this process; None if unknown."""
    free = free_bytes((jax.local_devices() if mesh is None else mesh.local_devices)[0])
    if mesh is None or not mesh.is_multi_process:
        return free
    # What a process decides alone, such as an error, would leave the others waiting.
    mib = np.int32(-1 if free is None else free >> 20)
    least = int(np.min(multihost_utils.process_allgather(mib)))
    return None if least < 0 else least << 20


def free_bytes(device: Any) -> int | None:
    """Return the free bytes of a device, for a CPU 90 % of the machine's; None if unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    # A tenth is left to activations and other programs: Linux kills a process that takes all.
    return None if kilobytes is None else 1024 * kilobytes * 9 // 10
