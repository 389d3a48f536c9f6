"""Dense readings of documents that record what a recipe learns from, as the states of a method that records."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...functional import CHUNK, cache_spec, extend_known
from ...params import Params
from ..base import CacheMethod, Prompt, QueryRows
from ..engine import bind
from ..kvzap import features


@dataclasses.dataclass(frozen=True)
class Record(CacheMethod):
    """Record keys, values and queries (scaled) of a layer."""

    budget: float | int = 1.0

    name = "recorder"
    source = ""
    observes = None

    def start(self, prompt: Prompt) -> Any:
        """Return zero queries [B, K, T, G, H]."""
        B, K, T, H = prompt.k.shape
        return jnp.zeros((B, K, T, prompt.config.group_size, H), jnp.float32)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Write a chunk of queries to its place."""
        return lax.dynamic_update_slice_in_dim(seen, rows.q, rows.at[0], axis=2)

    def compress(self, prompt: Prompt, seen: Any, room: Any, slots: int) -> Any:
        """Return all that was recorded."""
        return {"q": seen, "k": prompt.k.astype(jnp.float32), "v": prompt.v.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class RecordRepetition(Record):
    """Record what a repetition of the prompt reads: the largest weight on each token, float32 [B, K, G, T]."""

    repeats = True

    def start(self, prompt: Prompt) -> Any:
        """Return zero maxima, and the layer's features."""
        B, K, T, _ = prompt.k.shape
        assert prompt.x is not None
        norms = jnp.linalg.norm(prompt.x.astype(jnp.float32), axis=-1)
        return jnp.zeros((B, K, prompt.config.group_size, T), jnp.float32), features(prompt.x), norms

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Raise the maxima to the weights of a chunk of the repetition."""
        most, *rest = seen
        return (jnp.maximum(most, rows.weights(prompt.k).max(axis=2)), *rest)

    def compress(self, prompt: Prompt, seen: Any, room: Any, slots: int) -> Any:
        """Return all that was recorded."""
        return dict(zip(("most", "features", "norms"), seen, strict=True)) | {"v": prompt.v.astype(jnp.float32)}


def read(params: Params, recorder: CacheMethod, row: np.ndarray) -> dict[str, jax.Array]:
    """Return what the recorder records of a row of token ids, each array [L, T, …] or [L, K, T, …]; T is padded."""
    width = -(-len(row) // CHUNK) * CHUNK
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(row)] = row
    engine = bind(recorder, params, width)
    spec = dataclasses.replace(cache_spec(params, None, width), method=engine)
    lengths = np.asarray([len(row)], np.int32)
    _, cache = extend_known(params, engine.init(spec, 1), tokens, lengths, "none", fresh=True)
    states: list[Any] = [layer[0].state for layer in cache.layers]
    return {name: jnp.concatenate([state[name] for state in states]) for name in states[0]}
