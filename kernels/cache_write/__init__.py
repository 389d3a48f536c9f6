"""Cache writes: append tokens to a head group in place, and fold evicted tokens into the means."""

from .arrays import CacheWrite, GroupArrays
from .dispatch import unsupported, write
from .xla import dequantize, newest_positions, ordered_after, quantize, ring_slot

__all__ = [
    "CacheWrite",
    "GroupArrays",
    "dequantize",
    "newest_positions",
    "ordered_after",
    "quantize",
    "ring_slot",
    "unsupported",
    "write",
]
