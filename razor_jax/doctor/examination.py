"""The examination of a device: choices, checks of every kernel against float64 NumPy, and times."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from .. import proof
from ..evals.bench import machine
from ..kernels import backend, checks
from ..kernels.backend import Implementation, Kind
from ..notebook import table
from ..proof import Verdict
from .speed import Speeds, measure

_PACKAGES = ("razor-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy")
INTERPRETED: tuple[Implementation, ...] = ("pallas_tpu", "pallas_gpu")
CPU_SLOTS = 520  # more than one block of XLA's attention to many query rows
SECONDS = 120.0  # for one check; a second or two are normal


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Heads and types of a model: K and G, H, and the types of its queries and caches."""

    name: str
    heads: tuple[int, int]
    head_dim: int
    query: str
    caches: tuple[str, ...]

    @property
    def kinds(self) -> list[Kind]:
        return proof.kinds_of(self.head_dim, self.query, self.caches)


_SHAPES = (
    _Shape("Llama-3-8B", (8, 4), 128, "bfloat16", ("bfloat16", "int8", "float8_e4m3fn")),
    _Shape("razor-mini", (4, 2), 64, "bfloat16", ("bfloat16", "int8")),
    _Shape("razor-mini", (4, 2), 64, "float32", ("float32",)),
)
# For the interpreter: every kernel, every type and both head widths once.
_TINY = (
    _Shape("H=128", (2, 4), 128, "bfloat16", ("bfloat16", "float8_e4m3fn")),
    _Shape("H=64", (2, 2), 64, "float32", ("float32", "int8")),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `implementation=None` chooses for a kernel, and why."""

    model: str
    kernel: str
    implementation: str
    why: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """One check of a kernel; `call` as in `kernels.checks.Check`.

    Attributes:
      error: None if the kernel crashed or did not end.
      reason: what is wrong, "" if nothing is.
      seconds: with compilation.
    """

    implementation: str
    model: str
    kernel: str
    call: str
    slots: int
    error: float | None
    limit: float
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an examination.

    Attributes:
      machine: chip, memory in bytes, versions.
      interpreted: the kernels were interpreted on a CPU: their time means nothing.
      speeds: None if nothing was timed.
    """

    machine: dict[str, Any]
    interpreted: bool
    choices: tuple[Choice, ...]
    checks: tuple[Checked, ...]
    speeds: Speeds | None
    seconds: float
    header = ("model", "kernel", "runs on", "error", "limit", "verdict")

    @property
    def failed(self) -> list[Checked]:
        """The checks that found something wrong."""
        return [checked for checked in self.checks if checked.reason]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Cells of a table with one row per kernel, under `header`: the worst check of each."""
        groups: dict[tuple[str, str, str], list[Checked]] = {}
        for checked in self.checks:
            groups.setdefault((checked.model, checked.kernel, checked.implementation), []).append(checked)
        rows = []
        for key, group in groups.items():
            # A check without an error, or with NaN, is the worst.
            worst = max(group, key=lambda c: (bool(c.reason), c.error or 0.0))
            error = "" if worst.error is None else f"{worst.error:.1e}"
            verdict = f"{worst.call}: {worst.reason}" if worst.reason else "right"
            rows.append((*key, error, f"{worst.limit:.0e}", verdict))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the verdict, for JSON, which has no NaN: the reason names such an error."""
        fields = dataclasses.asdict(self)
        for check in fields["checks"]:
            if check["error"] is not None and not math.isfinite(check["error"]):
                check["error"] = None
        return {"verdict": "wrong" if self.failed else "right", **fields}

    def _repr_html_(self) -> str:
        parts = [table(self.machine.items()), table(self.rows, self.header)]
        if self.speeds is not None:
            parts.append(table([speed.cells(self.speeds) for speed in self.speeds.rows], self.speeds.header))
        return "".join(parts)


def examine(
    *,
    interpret: bool = False,
    timed: bool = True,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Check every kernel that this device would use, and time decode attention.

    On an accelerator the verdicts are remembered, as those of a kernel's first use are (`razor_jax.proof`).

    Args:
      interpret: on a CPU, also interpret the kernels for TPU and GPU on tiny shapes.
      timed: also time decode attention.
      progress: is called with ("checked" or "timed", done, total).

    Raises:
      ValueError: `interpret` on an accelerator.
    """
    started = time.monotonic()
    if interpret and backend.platform() != "cpu":
        raise ValueError(f"the kernels run on this {backend.platform()}: interpret them on a CPU (JAX_PLATFORMS=cpu)")
    wanted: list[tuple[str, Implementation, checks.Check]] = [
        (shape.name, name, check) for shape in _SHAPES for name, check in _checks(shape)
    ]
    for name in INTERPRETED if interpret else ():
        wanted.extend((shape.name, name, check) for shape in _TINY for check in _tiny_checks(shape, name))
    checked: list[tuple[Kind, Checked]] = []
    for done, (model, implementation, check) in enumerate(wanted):
        progress("checked", done, len(wanted))
        checked.append((check.kind, _check(model, implementation, check, interpret and implementation != "xla")))
    _remember(checked)
    choices = tuple(Choice(shape.name, str(kind), *_choice(kind)) for shape in _SHAPES for kind in shape.kinds)
    speeds = measure(progress) if timed else None
    found = tuple(each for _, each in checked)
    return Report(_machine(), interpret, choices, found, speeds, time.monotonic() - started)


def _checks(shape: _Shape) -> list[tuple[Implementation, checks.Check]]:
    """Return the checks of what this device would run for a model's heads, and the implementation of each."""
    on_cpu, found = backend.platform() == "cpu", []
    for kind in shape.kinds:
        implementation, _ = _kernel_or_xla(kind)
        slots = proof.CAUSAL_TOKENS if kind.op == "attend_causal" else checks.slots_of(kind.cache)
        if on_cpu:
            slots = min(slots, CPU_SLOTS)
        found += [(implementation, check) for check in checks.checks_of(kind, shape.heads, slots)]
    return found


def _tiny_checks(shape: _Shape, implementation: Implementation) -> list[checks.Check]:
    kinds = [kind for kind in shape.kinds if checks.has_kernel(kind, implementation)]
    return [
        check for kind in kinds for check in checks.checks_of(kind, shape.heads, checks.slots_of(kind.cache, tiny=True))
    ]


def _check(model: str, implementation: Implementation, check: checks.Check, interpret: bool) -> Checked:
    started = time.monotonic()
    device = proof.target_device()
    error, reason = proof.attempt(check, implementation, device, SECONDS, interpret)
    seconds = round(time.monotonic() - started, 2)
    about = (implementation, model, str(check.kind), check.call, check.slots)
    return Checked(*about, error, check.limit, reason, seconds)


def _remember(checked: list[tuple[Kind, Checked]]) -> None:
    """Let the verdicts on this device's kernels count in this process and the next ones."""
    first, device = backend.first_choice(), proof.target_device()
    for kind in dict.fromkeys(kind for kind, each in checked if first != "xla" and each.implementation == first):
        own = [each for other, each in checked if other == kind]
        reason = next((each.reason for each in own if each.reason), "")
        errors = [each.error / each.limit for each in own if each.error is not None]
        verdict = Verdict(not reason, max(errors, default=None), reason, sum(each.seconds for each in own))
        backend.reject(kind, wrong=not verdict.right)
        proof.remember(kind, first, device, verdict)


def _kernel_or_xla(kind: Kind) -> tuple[Implementation, str]:
    """Return what this device would run if no check has failed, and why."""
    first, here = backend.first_choice(), backend.platform()
    if first == "xla":
        return "xla", f"a {here} has no kernels"
    if not checks.has_kernel(kind, first):
        return "xla", "a donated scatter is in place on a GPU"
    reason = checks.why_unsupported(kind, first)
    return (first, f"the kernels of a {here}") if reason is None else ("xla", reason)


def _choice(kind: Kind) -> tuple[str, str]:
    implementation, why = _kernel_or_xla(kind)
    return ("xla", "the kernel failed its check") if backend.rejected(kind) else (implementation, why)


def _machine() -> dict[str, Any]:
    """Return chip, memory and versions."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        **machine(),
        "memory_bytes": stats.get("bytes_limit"),
        "free_bytes": stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None,
        "compute_capability": getattr(device, "compute_capability", None),
        "runtime": device.client.platform_version.splitlines()[0],
        "system": platform.platform(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
