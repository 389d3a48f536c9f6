"""Blockwise flash attention whose initial state carries the compensation token."""

from ..backend import Implementation
from .dispatch import attend, attend_causal, unsupported
from .state import NEG, State, compensation, empty, finish

__all__ = [
    "NEG",
    "Implementation",
    "State",
    "attend",
    "attend_causal",
    "compensation",
    "empty",
    "finish",
    "unsupported",
]
