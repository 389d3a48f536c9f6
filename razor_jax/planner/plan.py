"""A plan: one model on one set of devices under several cache policies, by arithmetic and by the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..config import HeadSplit, RazorConfig
from ..heads.select import GROUPED_SHARES, PAPER_SHARES, head_count
from ..models.config import ModelConfig
from .compiler import STEPS, Compiled, Step, compile_step
from .memory import Job, Memory, largest_batch, largest_context, memory

SCHEMA = 1  # of `Plan.to_dict`


@dataclasses.dataclass(frozen=True)
class Row:
    """One cache policy.

    Attributes:
      cache: its name, "dense", "Razor" or "Razor int8".
      memory: bytes on each device, by arithmetic.
      batch, context: the most rows at this context, and the most tokens of this many rows, that fit.
      compiled: what the compiler says of each step, by its name; empty where nobody asked.
    """

    cache: str
    job: Job
    memory: Memory
    batch: int
    context: int
    compiled: dict[Step, Compiled]

    @property
    def needed(self) -> int:
        """Bytes on each device at the worst moment: the compiler's figure where it was asked, otherwise arithmetic."""
        return max(self.compiled[step].needed if step in self.compiled else self.memory.of(step) for step in STEPS)

    @property
    def headroom(self) -> int:
        """Bytes left on each device; negative if some are missing."""
        return self.job.hardware.hbm - self.needed

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and not any(step.refused for step in self.compiled.values())

    def error(self, step: Step) -> float | None:
        """Return the compiler's bytes over the arithmetic's, less 1; None where it was not asked."""
        if step not in self.compiled:
            return None
        return self.compiled[step].needed / self.memory.of(step) - 1

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON; bytes are per device."""
        return {
            "cache": self.cache,
            "setting": self.job.razor.describe() if self.job.razor else "dense",
            "memory": dataclasses.asdict(self.memory),
            "needed": self.needed,
            "headroom": self.headroom,
            "fits": self.fits,
            "largest_batch": self.batch,
            "largest_context": self.context,
            "compiled": {
                step: dataclasses.asdict(seen) | {"over_arithmetic": self.error(step)}
                for step, seen in self.compiled.items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows for the same model, devices and load."""

    model: str
    rows: tuple[Row, ...]
    layouts: dict[str, int]

    @property
    def job(self) -> Job:
        """What the rows have in common."""
        return self.rows[0].job

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        job = self.rows[-1].job
        return {
            "schema": SCHEMA,
            "model": self.model,
            "config": dataclasses.asdict(job.config),
            "hardware": dataclasses.asdict(job.hardware),
            "mesh": {"data": job.data, "model": job.model},
            "batch": job.batch,
            "context": job.context,
            "tokens_a_call": job.call,
            "weights": job.weights,
            "split": {"share": job.split.share, "counts": job.split.counts, "note": job.split.note},
            "kv_bytes_by_layout": self.layouts,
            "rows": [row.to_dict() for row in self.rows],
        }


def policies(razor: RazorConfig | None, split: HeadSplit | None) -> list[tuple[str, RazorConfig | None]]:
    """Return dense and Razor: in the weights' type, and in int8 where no type was named."""
    rows: list[tuple[str, RazorConfig | None]] = [("dense", None)]
    if razor is None or split is None:
        return rows
    if razor.kv_dtype is not None:
        return [*rows, (f"Razor {razor.kv_dtype}", razor)]
    return [*rows, ("Razor", razor), ("Razor int8", dataclasses.replace(razor, kv_dtype="int8"))]


def make_plan(
    model: str,
    job: Job,
    *,
    compiled: Sequence[Step] = (),
    progress: Callable[[str], None] = lambda words: None,
) -> Plan:
    """Return every policy that goes with the job, dense first; the steps `compiled` of each by the compiler as well.

    Raises as `memory` and `compile_step`.
    """
    rows = []
    for name, razor in policies(job.razor, job.split):
        # Dense prefill is one call, whatever Razor's is.
        here = dataclasses.replace(job, razor=razor, call=job.call if razor else job.context)
        seen = {}
        for step in compiled:
            progress(f"compiling {name}, {step}")
            seen[step] = compile_step(here, step)
        rows.append(Row(name, here, memory(here), largest_batch(here), largest_context(here), seen))
    return Plan(model, tuple(rows), layouts(job))


def layouts(job: Job) -> dict[str, int]:
    """Return the KV bytes on each device by layout; by head for the split that `balanced` makes, only by slot where it
    makes none.
    """
    if job.model == 1 or job.razor is None:
        return {}
    found = {"slot": memory(dataclasses.replace(job, layout="slot")).kv}
    if why_not_by_head(job.split, job.model) is None:
        split = balanced(job.split, job.model)
        found["head"] = memory(dataclasses.replace(job, split=split, layout="head")).kv
    return found


def default_split(config: ModelConfig, share: float | None = None) -> HeadSplit:
    """Make a split of as many heads as `select()` would choose, or a share of all, spread evenly over the layers, for a
    model whose weights are not at hand.
    """
    total = config.num_layers * config.num_kv_heads
    shares = PAPER_SHARES if config.group_size == 1 else GROUPED_SHARES
    wanted = head_count(share, total) if share is not None else sum(head_count(part, total) for part in shares)
    note = f"{wanted} of {total} KV heads, " + (
        f"share {share:g}" if share is not None else f"the default shares {shares[0]:g} + {shares[1]:g}"
    )
    L = config.num_layers
    counts = [(layer + 1) * wanted // L - layer * wanted // L for layer in range(L)]
    return HeadSplit(tuple(tuple(range(n)) for n in counts), config.num_kv_heads, note=f"{note}, spread evenly")


def why_not_by_head(split: HeadSplit, devices: int) -> str | None:
    """Return why no split of this kind divides by head over `devices`; None where `balanced` makes one that does."""
    if split.num_kv_heads % devices:
        return f"they do not divide the {split.num_kv_heads} KV heads of a layer"
    groups = {len(group.heads) for layer in range(split.num_layers) for group in split.groups(layer)}
    if split.scopes and any(n % devices for n in groups):
        # Scopes follow from an ALiBi model's weights: nobody may round them.
        return f"they do not divide the heads of every scope, there are groups of {sorted(groups)}"
    return None


def balanced(split: HeadSplit, devices: int) -> HeadSplit:
    """Return the split with each layer's count rounded up to a multiple of `devices`, as `select(balanced_over=)` does;
    one with scopes as it is, where they divide.

    Raises ValueError where no such split goes by head.
    """
    reason = why_not_by_head(split, devices)
    if reason is not None:
        raise ValueError(
            f"layout='head' over {devices} devices: {reason}; give the mesh less of model and more of data, or leave "
            "the layout to 'slot'"
        )
    if split.scopes:
        return split
    counts = [-(-n // devices) * devices for n in split.counts]
    retrieval = tuple(tuple(range(n)) for n in counts)
    return dataclasses.replace(split, retrieval=retrieval, note=f"{split.note}; balanced over {devices} devices")


__all__ = ["STEPS", "Plan", "Row", "balanced", "default_split", "layouts", "make_plan", "policies", "why_not_by_head"]
