"""The choice of a backend: `implementation=None` chooses by device, a name forces one.

"xla"         every device; the reference
"pallas_tpu"  TPU v5e, v5p, v6e, 7x
"pallas_gpu"  NVIDIA Ampere and later, through Triton
"mosaic_gpu"  NVIDIA Hopper, through Mosaic GPU; never chosen, only forced
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"]
Op = Literal["attend", "attend_causal", "write"]
_DEVICE = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "mosaic_gpu": "gpu"}
# The backend that None chooses on each device.
_FIRST: dict[str, Implementation] = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class Kind(NamedTuple):
    """What one proof covers: an op, head width H, and types of queries ("" for writes) and cache."""

    op: Op
    head_dim: int
    query: str
    cache: str

    def __str__(self) -> str:
        queries = f", {self.query} queries" if self.query else ""
        return f"{self.op} (H={self.head_dim}{queries}, {self.cache} cache)"


# Kernels that failed their checks on this machine: None no longer chooses them. See `razor_jax/proof.py`.
_rejected: set[Kind] = set()


def reject(kind: Kind, wrong: bool = True) -> None:
    """Keep `implementation=None` from choosing a kernel in this process, or allow it again."""
    (_rejected.add if wrong else _rejected.discard)(kind)


def rejected(kind: Kind | None) -> bool:
    """Return whether a kernel failed its checks."""
    return kind in _rejected


def platform() -> str:
    """Return "tpu", "gpu" or "cpu": the device being traced for, which may not be on this machine."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        device, *_ = jax.devices(device)
    if device.device_kind.startswith("TPU"):  # A remote TPU's platform may have another name.
        return "tpu"
    return "gpu" if device.platform in ("cuda", "gpu", "rocm") else device.platform


def check_name(implementation: str | None) -> None:
    """Raise ValueError if no backend has this name."""
    if implementation not in (None, *get_args(Implementation)):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation={implementation!r} is unknown: use one of {names}, or None to choose")


def choose(
    implementation: Implementation | None,
    unsupported: Callable[[Implementation], str | None],
    kind: Kind | None = None,
) -> Implementation:
    """Return the implementation that runs.

    `unsupported(name)` returns why a Pallas implementation cannot take the call, or None if it can. None does not
    choose a kernel of a rejected `kind`.

    Raises ValueError if the name is unknown, or if a forced implementation cannot run.
    """
    check_name(implementation)
    if implementation is None:
        first = first_choice()
        return "xla" if first == "xla" or rejected(kind) or why_not(first, unsupported) else first
    if implementation == "xla":
        return implementation
    device = platform()
    if _DEVICE[implementation] == device:
        reason = why_not(implementation, unsupported)
    else:
        reason = f"the device is a {device}, not a {_DEVICE[implementation]}"
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot run here: {reason}. Pass None or 'xla'")
    return implementation


def why_not(implementation: Implementation, unsupported: Callable[[Implementation], str | None]) -> str | None:
    """Return why a Pallas implementation cannot run here, or None if it can.

    The reason is the implementation's own, or a mesh that the compiler partitions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind != jax.sharding.AxisType.Manual
    ]
    if axes:
        return f"mesh axes {axes} are partitioned by the compiler: wrap the call in shard_map"
    return unsupported(implementation)


def first_choice() -> Implementation:
    """Return what None chooses on this device if the arrays allow it."""
    return _FIRST.get(platform(), "xla")
