"""Results of a call: tokens, text, a report on the cache, and timings."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from .. import cache as kv
from ..cache import KVCache
from ..config import HeadSplit
from ..notebook import table
from .logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class KVReport:
    """Report on a cache: its size, its policy and its savings.

    Attributes:
      setting: description of the policy.
      share: r, the share of KV heads that keep every token; 1 for dense attention.
      batch, capacity: rows, and capacity in tokens per row.
      allocated_bytes: bytes of the key, value and mean arrays.
      dense_bytes: bytes of a dense bfloat16 cache with the same batch and capacity.
      dropped_tokens: tokens that each windowed head has dropped, one number per row.
      implementation: backend of attention and cache writes.
      devices: number of devices of the mesh; 1 without a mesh.
      device_bytes: bytes of the cache per device.
      layout: "slot" or "head" (see `mesh.MeshPlacement`), None without a mesh.
      same_type_bytes: bytes of a dense cache of the same type, batch and capacity, the baseline of `ratio`; 0 if only
        `dense_bytes` is known.
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
    same_type_bytes: int = 0

    @classmethod
    def of(cls, cache: KVCache, split: HeadSplit) -> KVReport:
        """Return the report on a cache."""
        spec = cache.spec
        # NumPy, because this is not worth a compilation.
        dropped = kv.dropped(spec, np.asarray(cache.length), np.asarray(cache.window))
        return cls(
            setting=spec.describe(),
            share=0.0 if spec.method is not None else 1.0 if spec.razor is None else split.share,
            batch=cache.batch,
            capacity=spec.capacity,
            dtype=spec.dtype,
            allocated_bytes=kv.allocated_bytes(cache),
            same_type_bytes=dataclasses.replace(spec, razor=None, method=None).kv_bytes(cache.batch),
            dense_bytes=spec.dense_bytes(cache.batch),
            dropped_tokens=tuple(int(n) for n in dropped),
            implementation=spec.implementation,
            devices=1 if spec.placement is None else spec.placement.mesh.size,
            device_bytes=kv.device_bytes(cache),
            layout=None if spec.placement is None else spec.placement.layout,
        )

    def row(self, index: int) -> KVReport:
        """Return the report with the dropped tokens of one row only."""
        return dataclasses.replace(self, dropped_tokens=(self.dropped_tokens[index],))

    @property
    def ratio(self) -> float:
        """Bytes of the dense cache of the same type over the allocated bytes."""
        return (self.same_type_bytes or self.dense_bytes) / self.allocated_bytes

    @property
    def engaged(self) -> bool:
        """Whether any head has dropped any token."""
        return self.share < 1 and any(self.dropped_tokens)

    def __str__(self) -> str:
        size = f"KV {_mib(self.allocated_bytes)} {self.dtype}, dense {_mib(self.same_type_bytes)}"
        if self.dtype != "bfloat16":
            size += f" (in bfloat16 {_mib(self.dense_bytes)})"
        if self.devices > 1:
            size += f", {_mib(self.device_bytes)} on each of {self.devices} devices by {self.layout}"
        where = f"batch {self.batch} × {self.capacity:,} tokens, {self.share:.0%} of KV heads keep everything"
        if self.setting == "dense":
            return f"{size}: dense attention ({where})"
        if not self.engaged:
            why = "every KV head keeps everything" if self.share == 1 else "nothing was long enough to be dropped"
            return f"{size}: compression did not engage, {why} ({self.setting}; {where})"
        saved = f"{self.ratio:.2f}× smaller, up to {max(self.dropped_tokens):,} tokens dropped a head"
        return f"{size}: {saved} ({self.setting}; {where})"

    def _repr_html_(self) -> str:
        rows = [
            ("KV cache", f"{_mib(self.allocated_bytes)} {self.dtype}, {self.batch} × {self.capacity:,} tokens"),
            ("dense", f"{_mib(self.same_type_bytes)}, {self.ratio:.2f}×"),
            ("policy", self.setting),
            ("KV heads that keep everything", f"{self.share:.0%}"),
            ("dropped per windowed head", f"{max(self.dropped_tokens):,} tokens"),
        ]
        return table(rows)

    def to_dict(self) -> dict:
        """Return all fields and derived values, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "engaged": self.engaged}


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall time of a call in seconds, with compilation counted apart.

    Attributes:
      prompt_tokens: of the whole batch.
      decoded_tokens: tokens that were decoded, of the whole batch: all but the first of each row.
    """

    prompt_tokens: int
    decoded_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode rate. The first token of each row belongs to the prefill and is not counted."""
        return self.decoded_tokens / max(self.decode_seconds, 1e-9)

    def to_dict(self) -> dict:
        """Return all fields and rates, for JSON."""
        return dataclasses.asdict(self) | {
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer to one prompt.

    Attributes:
      text: generated text before any stop string; "" for params without a tokenizer.
      tokens: generated token ids, including the end-of-sequence token if it was generated.
      finish_reason: "stop" (end-of-sequence token or stop string), "length", or "error" (the logits of the next token
        were not finite).
      kv: report on the cache. Bytes cover the whole batch, `dropped_tokens` only this row.
      timings: timings of the whole call.
      logprobs: log probability of each token, None unless asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    kv: KVReport
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    def _repr_html_(self) -> str:
        speed = f"{self.timings.decode_tokens_per_second:,.1f} tokens/s"
        rows = [("answer", self.text), ("ended by", self.finish_reason), ("decoding", speed)]
        return table(rows) + self.kv._repr_html_()

    def to_dict(self) -> dict:
        """Return all fields, for JSON."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "kv": self.kv.to_dict(),
            "timings": self.timings.to_dict(),
            "logprobs": None if self.logprobs is None else [each.to_dict() for each in self.logprobs],
        }


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
