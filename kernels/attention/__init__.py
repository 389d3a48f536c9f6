"""Blockwise flash attention whose initial state carries the compensation token."""

from .dispatch import Implementation, attend, attend_causal
from .state import NEG, State, compensation, empty, finish

__all__ = ["NEG", "Implementation", "State", "attend", "attend_causal", "compensation", "empty", "finish"]
