"""Writing tokens into a head group's cache in place, evicted ones folded into the means."""

from .dispatch import unsupported, write
from .stored import Stored

__all__ = ["Stored", "unsupported", "write"]
