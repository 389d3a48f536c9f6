"""Known hardware: TPU topologies by libtpu's names, GPUs by name, with devices and memory of each."""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 1 << 30

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """TPU generation: JAX's name for a device, devices per chip, GiB of usable HBM per device, slice shapes."""

    device_kind: str
    per_chip: int
    gib: float
    shapes: tuple[str, ...]


# `gib` is the limit that libtpu 0.0.51 names when it refuses a program; a chip has slightly more HBM.
_TPUS = {
    "v5e": _Tpu("TPU v5 lite", 1, 15.75, _PLANE),
    "v6e": _Tpu("TPU v6 lite", 1, 31.24, _PLANE),
    "v5p": _Tpu("TPU v5", 1, 95.73, _CUBE),
    "tpu7x": _Tpu("TPU7x", 2, 94.74, _CUBE),
}

# Bytes of the whole card from XLA's target descriptions (openxla/xla, target_config/specs); of H200 from a driver.
_GPUS = {
    "a100-40g": 42_298_834_944,
    "a100-80g": 85_100_068_864,
    "h100": 84_942_979_072,
    "h200": 139 * GIB,
    "b200": 191_514_411_008,
}
GPU_SHARE = 0.95  # Share of a card that JAX takes: XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default.


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices of one kind, as JAX counts them.

    Attributes:
      name: the name given to `find_hardware`.
      kind: "tpu" or "gpu".
      device_kind: JAX's name for such a device.
      devices: total number of devices.
      per_chip: devices per chip or card.
      hbm: usable bytes per device.
    """

    name: str
    kind: str
    device_kind: str
    devices: int
    per_chip: int
    hbm: int

    def describe(self) -> str:
        """Return one line: number of devices, usable memory, and the reason for that limit."""
        count = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        if self.kind == "gpu":
            how = f"{GPU_SHARE:.0%} of the card (set XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE})"
        else:
            how = f"{self.per_chip} per chip, as libtpu allows"
        return f"{self.name}: {count} of {self.hbm / GIB:.2f} GiB, {how}"


def find_hardware(name: str) -> Hardware:
    """Return the hardware of a name: a TPU topology such as v5e:4x4, or GPUs such as h100 or h100:8.

    Raises ValueError, with all names, for an unknown name.
    """
    kind, _, shape = name.partition(":")
    if kind in _TPUS and shape in _TPUS[kind].shapes:
        tpu = _TPUS[kind]
        chips = math.prod(map(int, shape.split("x")))
        return Hardware(name, "tpu", tpu.device_kind, chips * tpu.per_chip, tpu.per_chip, round(tpu.gib * GIB))
    if kind in _GPUS and re.fullmatch(r"|[1-9]\d*", shape):
        return Hardware(name, "gpu", "NVIDIA GPU", int(shape or 1), 1, int(GPU_SHARE * _GPUS[kind]))
    raise ValueError(f"topology={name!r}: {'; '.join(topology_names())}")


def topology_names() -> list[str]:
    """Return all names as two phrases for an error message, TPUs then GPUs."""
    names = [f"{kind}:{' '.join(tpu.shapes)}" for kind, tpu in _TPUS.items()]
    return [f"a TPU is one of {', '.join(names)}", f"a GPU one of {', '.join(_GPUS)}, with :8 for eight"]
