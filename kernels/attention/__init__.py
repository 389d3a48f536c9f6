"""Blockwise flash attention whose initial state carries the compensation token."""

from ..backend import Implementation
from .alibi import Alibi
from .dispatch import attend, attend_causal, attend_groups, unsupported
from .part import Part
from .state import NEG, State, compensation, empty, finish
from .xla import attend_visible

__all__ = [
    "NEG",
    "Alibi",
    "Implementation",
    "Part",
    "State",
    "attend",
    "attend_causal",
    "attend_groups",
    "attend_visible",
    "compensation",
    "empty",
    "finish",
    "unsupported",
]
