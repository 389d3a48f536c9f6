"""Memory plans: one model on one set of devices under several cache policies, by arithmetic and by the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..config import HeadSplit, RazorConfig
from ..heads.select import GROUPED_SHARE, PAPER_SHARES, head_count
from ..models.config import ModelConfig
from .compiler import STEPS, Compiled, Step, compile_step
from .memory import Job, Memory, largest_batch, largest_context, memory

SCHEMA = 1  # of `Plan.to_dict`


@dataclasses.dataclass(frozen=True)
class Row:
    """Plan for one cache policy.

    Attributes:
      cache: "dense", "Razor" or "Razor int8".
      memory: bytes per device, by arithmetic.
      batch, context: the most rows that fit at the job's context, and the longest context that fits for its rows.
      compiled: the compiler's result per step; empty without --compile.
    """

    cache: str
    job: Job
    memory: Memory
    batch: int
    context: int
    compiled: dict[Step, Compiled]

    @property
    def needed(self) -> int:
        """Peak bytes per device, from the compiler for the steps that it compiled, otherwise by arithmetic."""
        return max(self.compiled[step].needed if step in self.compiled else self.memory.of(step) for step in STEPS)

    @property
    def headroom(self) -> int:
        """Free bytes per device; negative if it does not fit."""
        return self.job.hardware.hbm - self.needed

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and not any(step.refused for step in self.compiled.values())

    def error(self, step: Step) -> float | None:
        """Return by how much the compiler's bytes exceed the arithmetic, as a share; None if it was not compiled."""
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
    """Plans of several policies for the same model, devices and load."""

    model: str
    rows: tuple[Row, ...]
    layouts: dict[str, int]

    @property
    def job(self) -> Job:
        """Job of the first row, for what all rows share."""
        return self.rows[0].job

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
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
    """Return the policies to compare, with names: dense and Razor, and Razor in int8 if the policy names no type."""
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
    """Plan the job under every policy, dense first, and compile the steps in `compiled` under each.

    Raises the errors of `memory` and `compile_step`.
    """
    rows = []
    for name, razor in policies(job.razor, job.split):
        # Dense prefill is always one call.
        here = dataclasses.replace(job, razor=razor, call=job.call if razor else job.context)
        seen = {}
        for step in compiled:
            progress(f"compiling {name}, {step}")
            seen[step] = compile_step(here, step)
        rows.append(Row(name, here, memory(here), largest_batch(here), largest_context(here), seen))
    return Plan(model, tuple(rows), layouts(job))


def layouts(job: Job) -> dict[str, int]:
    """Return the KV bytes per device of each layout, "slot" and, if the split can be balanced, "head"."""
    if job.model == 1 or job.razor is None:
        return {}
    found = {"slot": memory(dataclasses.replace(job, layout="slot")).kv}
    if why_not_by_head(job.split, job.model) is None:
        split = balanced(job.split, job.model)
        found["head"] = memory(dataclasses.replace(job, split=split, layout="head")).kv
    return found


def default_split(config: ModelConfig, share: float | None = None) -> HeadSplit:
    """Make a split, spread evenly over the layers, for a model without weights.

    It has a `share` of all heads, by default as many as `select()` would choose.
    """
    total = config.num_layers * config.num_kv_heads
    usual = PAPER_SHARES if config.group_size == 1 else (GROUPED_SHARE,)
    shares = usual if share is None else (share,)
    wanted = sum(head_count(part, total) for part in shares)
    note = f"{wanted} of {total} KV heads, share {' + '.join(f'{part:g}' for part in shares)}"
    L = config.num_layers
    counts = [(layer + 1) * wanted // L - layer * wanted // L for layer in range(L)]
    return HeadSplit(tuple(tuple(range(n)) for n in counts), config.num_kv_heads, note=f"{note}, spread evenly")


def why_not_by_head(split: HeadSplit, devices: int) -> str | None:
    """Return why `balanced` cannot divide the split by head over `devices`, None if it can."""
    if split.num_kv_heads % devices:
        return f"the {split.num_kv_heads} KV heads of a layer do not divide evenly"
    groups = {len(group.heads) for layer in range(split.num_layers) for group in split.groups(layer)}
    if split.scopes and any(n % devices for n in groups):
        # Scopes follow from an ALiBi model's weights, so they cannot be rounded.
        return f"the heads of some scopes do not divide evenly: the groups have {sorted(groups)} heads"
    return None


def balanced(split: HeadSplit, devices: int) -> HeadSplit:
    """Return the split with each layer's count rounded up to a multiple of `devices`, like `select(balanced_over=)`.

    A split with scopes is returned unchanged. Raises ValueError if heads or scopes do not divide.
    """
    reason = why_not_by_head(split, devices)
    if reason is not None:
        raise ValueError(
            f"layout='head' over {devices} devices: {reason}; use a smaller model axis and a larger data axis, or "
            "layout='slot'"
        )
    if split.scopes:
        return split
    counts = [-(-n // devices) * devices for n in split.counts]
    retrieval = tuple(tuple(range(n)) for n in counts)
    return dataclasses.replace(split, retrieval=retrieval, note=f"{split.note}; balanced over {devices} devices")


__all__ = ["STEPS", "Plan", "Row", "balanced", "default_split", "layouts", "make_plan", "policies", "why_not_by_head"]
