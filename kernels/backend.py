"""Which implementation of an op runs where: `implementation=None` picks, a name forces.

"xla"         everywhere, the reference
"pallas_tpu"  TPU v5e, v5p, v6e, 7x
"pallas_gpu"  NVIDIA Ampere and later
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
from jax.experimental.pallas import tpu as pltpu

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]
_HOME = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def platform() -> str:
    """ "tpu", "gpu" or "cpu": the device of the trace, which ahead of time is not one of this machine."""
    if pltpu.is_tpu_device():
        return "tpu"
    ahead = jax.sharding.get_abstract_mesh().abstract_device
    name = ahead.platform if ahead is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "gpu", "rocm") else name


def check_name(implementation: str | None) -> None:
    """Refuse a name that nothing has."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation={implementation!r}: one of {', '.join(get_args(Implementation))}, or None to choose"
        )


def choose(implementation: Implementation | None, reasons: dict[str, str | None]) -> Implementation:
    """The implementation that runs; `reasons` says of each Pallas one why it cannot take the call, or None.

    Raises ValueError where a name is unknown, or forced and cannot run.
    """
    check_name(implementation)
    here = platform()
    if implementation is None:
        name = _HOME.get(here)
        return name if name is not None and reasons[name] is None else "xla"  # type: ignore[return-value]
    if implementation == "xla":
        return implementation
    reason = reasons[implementation]
    if _HOME.get(here) != implementation:
        reason = f"the device is a {here}, not a {implementation.removeprefix('pallas_')}"
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot run here: {reason}. Pass None or 'xla'")
    return implementation
