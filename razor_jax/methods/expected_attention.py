"""ExpectedAttention: what queries of the near future are expected to attend to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from ..models import rope
from .base import CacheMethod, Prompt, QueryRows
from .slots import ALWAYS, einsum


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(CacheMethod):
    """Keep the tokens of largest expected attention (Devoto et al., arXiv 2510.00636; NVIDIA kvpress).

    Queries before rotation are taken as normal, with the mean and covariance of the prompt's. Rotated by the mean
    rotation of the next positions, they give the expected weight of each key, times the norm of its value. Later tokens
    all stay.

    Attributes:
      future: next positions that the rotation is averaged over.
      sinks: first tokens that always stay, and that the statistics leave out.
      epsilon: added to the expected weight before it is multiplied by the norm.
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    name: ClassVar = "ExpectedAttention"
    source: ClassVar = "arXiv 2510.00636"
    observes: ClassVar = None

    def start(self, prompt: Prompt) -> Any:
        """Return zero sums of queries and of their outer products."""
        B, K, _, H = prompt.k.shape
        shape = (B, K, prompt.config.group_size, H)
        return jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, H), jnp.float32)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add the queries of a chunk, their rotation undone."""
        c = prompt.config
        at = jnp.broadcast_to(rows.at, rows.counted.shape)
        q = jnp.moveaxis(rows.q, 1, 2)  # [B, C, K, G, H], as `rotate` takes it
        q = rope.rotate(q, rope.inverse(rope.tables(c.rope, c.head_dim, at, prompt.lengths)))
        q = jnp.where((rows.counted & (rows.at >= self.sinks))[:, :, None, None, None], q, 0.0)
        total, outer = seen
        return total + q.sum(axis=1), outer + einsum("bckgh,bckgi->bkghi", q, q)

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return expected weights times value norms; sinks always stay."""
        count = jnp.maximum(prompt.lengths - self.sinks, 1).astype(jnp.float32)
        total, outer = seen
        mean = total / count[:, None, None, None]
        covariance = outer / count[:, None, None, None, None] - mean[..., :, None] * mean[..., None, :]
        turn = self._mean_rotation(prompt)
        mean = einsum("bij,bkgj->bkgi", turn, mean)
        covariance = einsum("bij,bkgjl,bml->bkgim", turn, covariance, turn)
        k = prompt.k.astype(jnp.float32)
        logits = einsum("bkgh,bkth->bkgt", mean, k)
        logits += 0.5 * einsum("bkgti,bkti->bkgt", einsum("bkth,bkghi->bkgti", k, covariance), k)
        sinks = prompt.first(self.sinks)[:, None]
        counted = prompt.valid[:, None] & ~sinks
        weights = jax.nn.softmax(jnp.where(counted[:, :, None], logits, -jnp.inf), axis=-1).mean(axis=2)
        norms = jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1)
        return jnp.where(sinks, ALWAYS, (weights + self.epsilon) * norms)

    def _mean_rotation(self, prompt: Prompt) -> Float32[jax.Array, "B H H"]:
        """Return the rotation matrix, averaged over the next positions of each row."""
        c = prompt.config
        at = prompt.lengths[:, None] + jnp.arange(self.future, dtype=jnp.int32)
        cos, sin = (jax.vmap(jnp.diag)(x.mean(axis=1)) for x in rope.tables(c.rope, c.head_dim, at, prompt.lengths))
        return jnp.concatenate([jnp.concatenate([cos, -sin], axis=2), jnp.concatenate([sin, cos], axis=2)], axis=1)
