"""Writing tokens into a head group's cache in place, evicted ones folded into the means."""

from .arrays import GroupArrays
from .dispatch import unsupported, write

__all__ = ["GroupArrays", "unsupported", "write"]
