"""A small model, and its kernels interpreted as on a TPU or GPU."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from razor_jax import HeadSplit, Params, with_heads
from razor_jax.kernels import backend
from razor_jax.kernels.attention import dispatch
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights


def interpreted(monkeypatch, platform: str):
    """Choose the kernels of `platform`, and run them in the interpreter."""
    call = pl.pallas_call
    monkeypatch.setattr(backend, "platform", lambda: platform)
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, space: x)  # the interpreter has one memory
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **options: call(*args, **(options | {"interpret": True})))


def model(head_dim: int) -> Params:
    config = ModelConfig("llama", 96, 32, 48, 2, 4, 2, head_dim, 4096)
    rng = np.random.default_rng(head_dim)
    weights = jax.tree.map(
        lambda a: np.asarray(1 + 0.1 * rng.normal(size=a.shape) if a.ndim == 1 else 0.2 * rng.normal(size=a.shape)),
        abstract_weights(config),
    )
    weights = jax.tree.map(lambda x: x.astype(np.float32), weights)
    return with_heads(Params.from_flax({"params": weights}, config), HeadSplit(((1,), ()), 2))
