"""Inputs of the attention kernels' tests, NaN where nothing may be read, and the expected output in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from razor_jax.kernels.attention import Part

from . import oracle

NAN = np.float32(np.nan)


def random(*shape, seed, size=1.0, dtype="float32"):
    """Normal numbers, as float32, that the type represents exactly."""
    x = size * np.random.default_rng([seed, *shape]).standard_normal(shape)
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))


def poison(x, lengths, dtype):
    """x [B,K,S,H] in its type, NaN in every slot from lengths[b] on."""
    seen = np.arange(x.shape[2])[:, None] < np.asarray(lengths)[:, None, None, None]
    return jnp.asarray(np.where(seen, x, NAN), dtype)


def literal(q, k, v, lengths, causal=None, means=None, n=None):
    """Softmax of every query over the slots that it sees: at most `causal[r]` slots, and n copies of a mean."""
    out = np.zeros(q.shape)
    for b, h, r in np.ndindex(q.shape[:3]):
        end = lengths[b] if causal is None else min(lengths[b], causal[r])
        keys, values, weights = list(k[b, h, :end]), list(v[b, h, :end]), [1.0] * end
        if n is not None and n[b]:
            keys, values, weights = [*keys, means[0][b, h, 0]], [*values, means[1][b, h, 0]], [*weights, float(n[b])]
        out[b, h, r] = oracle.softmax_attention(q[b, h, r], keys, values, weights)
    return out


def error(got, want) -> float:
    """max|a - b| / max|b|, computed in NumPy, where NaN is not lost."""
    got, want = np.asarray(jnp.asarray(got, jnp.float32), np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def by_arguments(attend):
    """Return a backend's `attend` that takes the fields of `Part` as arguments."""

    def call(q, k, v, lengths, *, state=None, k_scale=None, v_scale=None, block_table=None, alibi=None, **options):
        return attend(Part(q, k, v, lengths, state, k_scale, v_scale, block_table, alibi), **options)

    return call
