"""The `razor-jax` program."""

from .main import main

__all__ = ["main"]
