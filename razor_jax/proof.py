"""Kernels prove themselves: small checks run a kernel on its device before `implementation=None` chooses it.

A kernel that crashes, that is wrong or that takes too long is rejected: XLA runs in its place, with one warning. The
verdict is remembered in the user's cache folder, for the chip, the versions and the source of the kernels. The check
runs in a thread, so that it is outside any trace of the caller, and so that it can be left behind if it hangs. A forced
implementation is not checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import files, kernels
from .compilation import user_cache
from .kernels import backend, checks
from .kernels.backend import Implementation, Kind

log = logging.getLogger("razor_jax")

SECONDS = 120.0  # for the checks of one kernel; about two are normal
HEADS = (2, 4)  # K and G of a check
SLOTS = 4160  # more than one block of the kernels in bfloat16
CAUSAL_TOKENS = 700
REPORT = "`razor-jax doctor --json report.json` makes a report to send"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the checks of one kernel.

    Attributes:
      right: whether the kernel may run.
      error: the largest error relative to its limit; None if a check did not end.
      reason: what is wrong, "" for a right kernel.
      seconds: time of the checks, with compilation.
    """

    right: bool
    error: float | None = None
    reason: str = ""
    seconds: float = 0.0


_verdicts: dict[tuple[str, Implementation, Kind], Verdict] = {}
# With the processes of the mesh, sorted: every one of them has the same entries.
_agreed: set[tuple[tuple[str, Implementation, Kind], tuple[int, ...]]] = set()


def kinds_of(head_dim: int, dtype: Any, cache_dtypes: Iterable[Any]) -> list[Kind]:
    """Return the kernels that a model with queries of `dtype` and caches of these types needs."""
    query, caches = jnp.dtype(dtype).name, sorted({jnp.dtype(x).name for x in cache_dtypes})
    kinds = [Kind("attend_causal", head_dim, query, query)]
    for cache in caches:
        kinds += [Kind("attend", head_dim, query, cache), Kind("write", head_dim, "", cache)]
    return kinds


def checks_of(kind: Kind) -> list[checks.Check]:
    """Return the small checks of a kernel. A ring is a full group with a compensation token, so it stands for both."""
    slots = CAUSAL_TOKENS if kind.op == "attend_causal" else SLOTS
    return [check for check in checks.checks_of(kind, HEADS, slots) if check.call != "decode"]


def settle(kinds: Sequence[Kind], implementation: Implementation, mesh: Mesh | None = None) -> None:
    """Check the kernels that this process has not checked yet, and reject those that fail.

    Without a device to run on (programs compiled ahead of time) nothing is checked. The processes of a mesh agree: they
    must run one program, so a kernel that fails on one is rejected on all. Each of them makes the same calls.
    """
    device = target_device()
    if device is None:
        return
    kinds = [kind for kind in kinds if checks.has_kernel(kind, implementation)]
    keys: list[tuple[str, Implementation, Kind]] = [(device.device_kind, implementation, kind) for kind in kinds]
    new = [key for key in keys if key not in _verdicts]
    for key in new:
        _accept(key, _verdict(key[2], implementation, device))
    processes = () if mesh is None else tuple(sorted({device.process_index for device in mesh.devices.flat}))
    pending = [key for key in keys if (key, processes) not in _agreed]
    if mesh is not None and len(processes) > 1 and pending:
        flags = [_verdicts[key].right for key in pending]
        everywhere = _in_thread(lambda: _on_all_devices(mesh, flags), device, None)
        for key, here, right in zip(pending, flags, everywhere, strict=True):
            _agreed.add((key, processes))
            if here and not right:
                _accept(key, Verdict(False, reason="it failed on another process of this run"))
                new.append(key)
    # At the end: where warnings are errors, everything is settled.
    for key in dict.fromkeys(new):
        if not _verdicts[key].right:
            _warn(*key, _verdicts[key])


def _accept(key: tuple[str, Implementation, Kind], verdict: Verdict) -> None:
    """Let a verdict count in this process."""
    _verdicts[key] = verdict
    backend.reject(key[2], wrong=not verdict.right)


def _warn(chip: str, implementation: Implementation, kind: Kind, verdict: Verdict) -> None:
    warnings.warn(
        f"the {implementation} kernel {kind} does not run on {chip}: {verdict.reason}. XLA runs in its place; "
        f"{REPORT}, `razor-jax cache clear kernels` tries again",
        stacklevel=4,
    )


def _on_all_devices(mesh: Mesh, flags: list[bool]) -> list[bool]:
    """Return which flags are set in every process of a mesh; each process gives its own."""
    line, mine = Mesh(mesh.devices.reshape(-1), ("devices",)), np.asarray([flags], np.int32)
    shape, split = (line.size, len(flags)), NamedSharding(line, PartitionSpec("devices"))
    every = jax.make_array_from_callback(shape, split, lambda index: mine)
    least = jax.jit(lambda x: jnp.min(x, axis=0), out_shardings=NamedSharding(line, PartitionSpec()))(every)
    return [bool(flag) for flag in np.asarray(least)]


def _verdict(kind: Kind, implementation: Implementation, device: Any) -> Verdict:
    """Return what is remembered of a kernel, or check it and remember."""
    file = verdict_file(kind, implementation, device)
    remembered = _read(file)
    if remembered is not None:
        return remembered
    _write(file, {"started": time.time(), "pid": os.getpid(), "host": socket.gethostname()})
    try:
        verdict = judge(checks_of(kind), implementation, device)
    except BaseException:  # Ctrl-C is no verdict
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise
    remember(kind, implementation, device, verdict)
    return verdict


def judge(wanted: Sequence[checks.Check], implementation: Implementation, device: Any) -> Verdict:
    """Run the checks of a kernel on a device, at most `SECONDS` long."""
    started = time.monotonic()
    worst, failed = 0.0, ""
    for check in wanted:
        left = SECONDS - (time.monotonic() - started)
        error, reason = attempt(check, implementation, device, left)
        if error is None:
            return Verdict(False, None, f"{check.call}: {reason}", time.monotonic() - started)
        if reason and not failed:
            failed = f"{check.call}: {reason}"
        relative = error / check.limit
        worst = relative if relative != relative else max(worst, relative)
    return Verdict(not failed, worst, failed, time.monotonic() - started)


def attempt(
    check: checks.Check, implementation: Implementation, device: Any, seconds: float, interpret: bool = False
) -> tuple[float | None, str]:
    """Run one check in a thread; return its error and what is wrong, "" for a right result.

    The error is None if the check crashed or did not end within `seconds`. A thread that hangs is left behind.
    """
    try:
        error = _in_thread(lambda: checks.run(check, implementation, interpret), device, max(seconds, 0.0))
    except TimeoutError:
        return None, f"no result after {seconds:.0f} s"
    except Exception as problem:
        return None, f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
    if not error <= check.limit:
        return error, f"error {error:.1e}, {check.limit:.0e} allowed"
    return error, ""


def _in_thread(function: Callable[[], Any], device: Any, seconds: float | None) -> Any:
    """Return the result of a function, run outside of the caller's trace and of JAX's contexts.

    Raises what the function raises, and TimeoutError if it does not end in time.
    """
    results: list[Any] = []
    problems: list[Exception] = []

    def run() -> None:
        # The caller's global flags must not decide a verdict that is remembered.
        try:
            with (
                jax.default_device(device),
                jax.enable_x64(False),
                jax.debug_nans(False),
                jax.disable_jit(False),
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
                jax.transfer_guard("allow"),
            ):
                results.append(function())
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, name="razor_jax kernel check", daemon=True)
    thread.start()
    thread.join(seconds)
    if problems:
        raise problems[0]
    if not results:
        raise TimeoutError
    return results[0]


def target_device() -> Any | None:
    """Return a device of this process like the one that is traced for, or None if it has none."""
    platform = backend.platform()
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:
        return None
    ahead = jax.sharding.get_abstract_mesh().abstract_device
    kind = devices[0].device_kind if ahead is None else ahead.device_kind
    return next((device for device in devices if device.device_kind == kind), None)


def remember(kind: Kind, implementation: Implementation, device: Any, verdict: Verdict) -> None:
    """Store a verdict in the user's cache folder; it is only logged if that cannot be written."""
    _write(verdict_file(kind, implementation, device), dataclasses.asdict(verdict))


def verdict_file(kind: Kind, implementation: Implementation, device: Any) -> Path:
    """Return the file of a verdict: one folder per chip, versions and source of the kernels."""
    versions = [jax.__version__, importlib.metadata.version("razor-jax"), device.client.platform_version, _source()]
    mark = hashlib.sha256("\n".join([device.device_kind, *versions]).encode()).hexdigest()[:12]
    chip = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    name = "-".join(str(part) for part in (implementation, *kind) if part)
    return user_cache() / "kernels" / f"{chip}-jax-{jax.__version__}-{mark}" / f"{name}.json"


@functools.cache
def _source() -> str:
    """Return a hash of the source of the kernels: an edited kernel is checked again."""
    folder = Path(kernels.__path__[0])
    content = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    return hashlib.sha256(content).hexdigest()


def _read(file: Path) -> Verdict | None:
    """Return the verdict in a file; None for a missing or broken file, or while another process checks the kernel."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "started" not in content:
            return Verdict(**content)
        age, pid, host = time.time() - content["started"], content["pid"], content["host"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    alive = host != socket.gethostname() or (pid != os.getpid() and Path(f"/proc/{pid}").exists())
    if alive and age < 2 * SECONDS:
        return None
    return Verdict(False, reason="the process that checked it before ended in the middle")


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        files.write_text(file, json.dumps(content) + "\n")
    except OSError as error:
        log.info("the check of a kernel is not remembered: %s: %s", error.filename or file, error.strerror)
