"""Blockwise flash attention whose initial state carries the compensation token."""

from .state import NEG, State, compensation, empty, finish
from .xla import attend, attend_causal

__all__ = ["NEG", "State", "attend", "attend_causal", "compensation", "empty", "finish"]
