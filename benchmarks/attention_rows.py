"""The sizes that `benchmarks.attention` measures, and the record of one measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from razor_jax import RazorConfig
from razor_jax.models.config import ModelConfig, Rope

GIB = 2**30
K32, K128 = 32_768, 131_072


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes to measure. `shapes` are (context, batch), the most informative first; `kept` counts retrieval heads."""

    model: ModelConfig
    shapes: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    policies: tuple[tuple[str, RazorConfig], ...]
    exact: tuple[int, ...]  # prompt lengths of the exact prefill
    stream: int  # prompt length of the streaming prefill
    stream_policy: RazorConfig
    contexts: tuple[int, ...]  # of the whole decode step
    copy_bytes: int
    matrix: int  # rows and columns of the matrix product
    room: int  # free slots of the cache in the whole decode step
    repeats: int = 7
    sample_seconds: float = 0.05
    smoke: bool = False


FULL = Sizes(
    model=ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, K128, rope=Rope(500000.0, "llama3", 8.0, 8192)),
    shapes=((K128, 8), (K32, 32), (K32, 8), (K128, 1), (K128, 32), (K32, 1)),
    kept=(39, 77),
    policies=(("N/5", RazorConfig()), ("4,096", RazorConfig.compact(4096))),
    exact=(8192, K32),
    stream=K128,
    stream_policy=RazorConfig.compact(4096, prefill_chunk=4096),
    contexts=(K128, K32),
    copy_bytes=4 * GIB,
    matrix=8192,
    room=64,
)
SMOKE = Sizes(
    model=ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096),
    shapes=((128, 2),),
    kept=(3,),
    policies=(("N/5", RazorConfig(min_window=8)),),
    exact=(64,),
    stream=128,
    stream_policy=RazorConfig.compact(16, prefill_chunk=32),
    contexts=(64,),
    copy_bytes=2**20,
    matrix=64,
    room=8,
    repeats=2,
    sample_seconds=0.0,
    smoke=True,
)


@dataclasses.dataclass
class ResultRow:
    """One measurement. `bytes`, `flops` and seconds are per `unit`; `layers` layers ran in sequence.

    Attributes:
      bytes, flops: the bytes that must be read, and the operations that must be done.
      alone: bytes that the case needs on the device at once.
      predicted_seconds: seconds per unit by the ceilings of this run, predicted before measuring.
      error: max|a-b| / max|b|, the larger of the errors at the small and at the timed size.
      speedup, byte_ratio: over the best dense peer of the same batch, context and lengths.
      goals: [{"name", "goal", "value", "met"}]; empty if the row has no goals.
      note: why the row has no time, or what to know about it.
    """

    section: str
    name: str
    unit: str = "layer"
    batch: int | None = None
    context: int | None = None
    ragged: bool = False
    kept: int | None = None
    window: str | None = None
    dtype: str = "bfloat16"
    layers: int = 1
    bytes: int = 0
    flops: int = 0
    alone: int = 0
    predicted_seconds: float | None = None
    seconds: float | None = None
    compile_seconds: float | None = None
    error: float | None = None
    speedup: float | None = None
    byte_ratio: float | None = None
    goals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def goal(self, name: str, goal: float, value: float) -> None:
        """Add a goal, which is met if `value` is at least `goal`."""
        self.goals.append({"name": name, "goal": goal, "value": value, "met": bool(value >= goal)})

    @property
    def setting(self) -> str:
        """Batch, context, lengths, heads and window in words."""
        parts = [] if self.batch is None else [f"{self.batch} × {self.context:,}{' ragged' if self.ragged else ''}"]
        if self.kept is not None:
            parts.append(f"{self.kept} heads kept, window {self.window}")
        return ", ".join([*parts, self.dtype] if self.dtype != "bfloat16" else parts)


@dataclasses.dataclass
class Case:
    """A row before its measurement, and the function that fills it in; None if it is filled in already."""

    row: ResultRow
    measure: Callable[[ResultRow], None] | None


class WrongResult(Exception):
    """The result of a kernel is wrong, so its time does not count."""
