"""Bar chart of a plan: memory of one device under each cache policy. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path

from ..heads.plots import require
from .hardware import GIB
from .plan import Plan

# Readable in black and white.
_PARTS = (("weights", "0.35", ""), ("KV cache", "0.65", ""), ("temporaries", "white", "///"))


def draw(plan: Plan, file: Path) -> Path:
    """Draw stacked bars of GiB per device, one bar per policy, against the device's memory; return the path.

    Raises ModuleNotFoundError, with the command to install it, without matplotlib.
    """
    pyplot = require()
    job, hbm = plan.job, plan.job.hardware.hbm / GIB
    figure, axes = pyplot.subplots(figsize=(6.4, 1.6 + 0.5 * len(plan.rows)))
    names = [row.cache for row in plan.rows]
    ends = [0.0] * len(plan.rows)
    for part, (label, shade, hatch) in enumerate(_PARTS):
        sizes = [_parts(row)[part] / GIB for row in plan.rows]
        axes.barh(names, sizes, left=ends, color=shade, edgecolor="black", hatch=hatch, label=label)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.axvline(hbm, color="black", linestyle="--", label=f"available: {hbm:.2f}")
    axes.set_xlim(0, 1.15 * max(hbm, *ends))
    axes.invert_yaxis()
    axes.set_xlabel("GiB per device")
    axes.set_title(f"{plan.model} on {job.hardware.name}, {job.batch} × {job.context:,} tokens", fontsize="medium")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(_PARTS) + 1, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return file


def _parts(row) -> tuple[int, int, int]:
    """Return the bytes of weights, cache and temporaries, which add up to `row.needed`."""
    return row.memory.weights, row.memory.kv, max(0, row.needed - row.memory.weights - row.memory.kv)
