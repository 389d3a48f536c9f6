"""Writing tokens into a head group's cache in place, evicted ones folded into the means."""

from .arrays import GroupArrays
from .dispatch import unsupported, write
from .xla import dequantize, ordered_after, quantize

__all__ = ["GroupArrays", "dequantize", "ordered_after", "quantize", "unsupported", "write"]
