"""Cache writes: append tokens to a head group in place, and fold evicted tokens into the means."""

from .arrays import CacheWrite, GroupArrays
from .dispatch import unsupported, write
from .xla import dequantize, ordered_after, quantize

__all__ = ["CacheWrite", "GroupArrays", "dequantize", "ordered_after", "quantize", "unsupported", "write"]
