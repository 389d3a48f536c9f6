"""What a call gives back: tokens, text, and an honest account of the cache and the time."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from .. import cache as kv
from ..cache import KVCache
from ..config import HeadSplit

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class KVReport:
    """A cache's size, its policy, and what it saves.

    Attributes:
      setting: the policy in words.
      share: r, KV heads that keep every token; 1 for dense attention.
      batch, capacity: rows, and tokens a row can hold.
      allocated_bytes: the cache's key, value and mean arrays.
      dense_bytes: a bfloat16 dense cache of the same batch and capacity, the denominator of every ratio.
      dropped_tokens: tokens that each windowed head has folded away, one number a row.
      implementation: of attention and cache writes.
      devices: of the cache's mesh; 1 without one.
      device_bytes: of the cache on each of them.
      layout: on a mesh "slot" or "head" (`mesh.MeshPlacement`).
    """

    setting: str
    share: float
    batch: int
    capacity: int
    dtype: str
    allocated_bytes: int
    dense_bytes: int
    dropped_tokens: tuple[int, ...]
    implementation: str = "xla"
    devices: int = 1
    device_bytes: int = 0
    layout: str | None = None

    @classmethod
    def of(cls, cache: KVCache, split: HeadSplit) -> KVReport:
        """Return the report of a live cache."""
        spec = cache.spec
        # In NumPy: this is not worth a compilation.
        dropped = kv.dropped(spec, np.asarray(cache.length), np.asarray(cache.window))
        return cls(
            setting=spec.describe(),
            share=1.0 if spec.razor is None else split.share,
            batch=cache.batch,
            capacity=spec.capacity,
            dtype=spec.dtype,
            allocated_bytes=kv.allocated_bytes(cache),
            dense_bytes=spec.dense_bytes(cache.batch),
            dropped_tokens=tuple(int(n) for n in dropped),
            implementation=spec.implementation,
            devices=1 if spec.placement is None else spec.placement.mesh.size,
            device_bytes=kv.device_bytes(cache),
            layout=None if spec.placement is None else spec.placement.layout,
        )

    def row(self, index: int) -> KVReport:
        """Return the report for one row: the same cache, with the dropped tokens of that row."""
        return dataclasses.replace(self, dropped_tokens=(self.dropped_tokens[index],))

    @property
    def ratio(self) -> float:
        """Bytes of the dense bfloat16 cache over the allocated bytes."""
        return self.dense_bytes / self.allocated_bytes

    @property
    def engaged(self) -> bool:
        """Whether any head of any row has dropped anything."""
        return self.share < 1 and any(self.dropped_tokens)

    def __str__(self) -> str:
        size = f"KV {_mib(self.allocated_bytes)} {self.dtype}, dense bfloat16 {_mib(self.dense_bytes)}"
        if self.devices > 1:
            size += f", {_mib(self.device_bytes)} on each of {self.devices} devices by {self.layout}"
        where = f"batch {self.batch} × {self.capacity:,} tokens, {self.share:.0%} of KV heads keep everything"
        if self.setting == "dense":
            return f"{size}: dense attention, {self.ratio:.2f}× ({where})"
        if not self.engaged:
            why = "every KV head keeps everything" if self.share == 1 else "nothing was long enough to be dropped"
            return f"{size}: compression did not engage, {why} ({self.setting}; {where})"
        saved = f"{self.ratio:.2f}× smaller, up to {max(self.dropped_tokens):,} tokens dropped a head"
        return f"{size}: {saved} ({self.setting}; {where})"

    def to_dict(self) -> dict:
        """Return all fields with the derived ones, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "engaged": self.engaged}


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall seconds of a call, compilation separate. Token counts are of the whole batch."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after each row's first, which the prefill chooses."""
        return self.generated_tokens / max(self.decode_seconds, 1e-9)

    def to_dict(self) -> dict:
        """Return all fields with the rates, for JSON."""
        return dataclasses.asdict(self) | {
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """One prompt's answer.

    Attributes:
      text: generated text, up to a stop string; "" for params without a tokenizer.
      tokens: generated token ids, the end-of-sequence token among them if it was reached.
      finish_reason: "stop" (end-of-sequence token or stop string) or "length".
      kv: the call's cache; its bytes are those of the whole batch, `dropped_tokens` of this row.
      timings: of the whole call.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    kv: KVReport
    timings: Timings

    def to_dict(self) -> dict:
        """Return all fields, for JSON."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "kv": self.kv.to_dict(),
            "timings": self.timings.to_dict(),
        }


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
