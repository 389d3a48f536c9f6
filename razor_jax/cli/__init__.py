"""The `razor-jax` program."""

from .app import main

__all__ = ["main"]
