"""Mixture of experts: a router chooses a few small MLPs for every token. No token is dropped, and shapes are static.

R rows (tokens), E experts, D model width, F feed-forward width of an expert.

`mix` makes one pass per chosen expert: all rows go through it, and each row adds its share of the result. So a decode
step of a few rows reads the weights of the experts that they chose and no others, int8 kernels are read as int8, and
nothing larger than the activations is stored. `jax.lax.ragged_dot` loses to it in the TPU compiler (docs/models.md): on
256 tokens it multiplies each sorted row by every expert, 8 times the work, and it writes int8 kernels to memory as
bfloat16 first.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32

from .config import Experts
from .linear import dequantize

# Fewer rows than these go through the TPU's vector unit, at twice the time of a matrix multiplication.
_ROWS = 8


class ExpertLinear(nn.Module):
    """Linear maps of all experts: a kernel [E, inputs, outputs], and if it is quantised the scales of `linear.py`."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Return kernel and scales."""
        maps = {"kernel": self.param("kernel", nn.initializers.normal(0.02), self.shape)}
        scales = (name for name in ("scale", "group_scale") if self.has_variable("params", name))
        return maps | {name: self.get_variable("params", name) for name in scales}


def shares(logits: Float[jax.Array, "*rows E"], experts: Experts) -> Float32[jax.Array, "*rows E"]:
    """Return each expert's share in a token: its probability if it is one of the `per_token` likeliest, 0 otherwise.

    `normalize` scales a token's shares to the sum 1.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    values, chosen = lax.top_k(probabilities, experts.per_token)
    if experts.normalize:
        values = values / values.sum(axis=-1, keepdims=True)
    return jnp.einsum("...ke,...k->...e", jax.nn.one_hot(chosen, experts.count), values)


@jax.custom_vjp
def mix(x: Float[jax.Array, "R D"], share: Float32[jax.Array, "R E"], maps: Any) -> Float32[jax.Array, "R D"]:
    """Return the sum over experts of share · down(silu(gate(x)) · up(x)).

    Args:
      share: of each expert in each row; an expert that has none in any row is not read.
      maps: "gate", "up" and "down", each with the kernel and scales of `ExpertLinear`.
    """
    R = x.shape[0]
    x, share = (jnp.pad(a, ((0, max(0, _ROWS - R)), (0, 0))) for a in (x, share))
    chosen = jnp.any(share > 0, axis=0)
    order = jnp.argsort(~chosen, stable=True).astype(jnp.int32)

    def add(turn: jax.Array, out: jax.Array) -> jax.Array:
        return out + _share_of(x, share, maps, order[turn])

    return lax.fori_loop(0, chosen.sum(dtype=jnp.int32), add, jnp.zeros(x.shape, jnp.float32))[:R]


def _mix_all(x: jax.Array, share: jax.Array, maps: Any) -> jax.Array:
    """Return `mix` as a loop over all experts, which can be differentiated."""

    def add(out: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        return out + _share_of(x, share, maps, expert), None

    experts = jnp.arange(share.shape[1], dtype=jnp.int32)
    return lax.scan(jax.checkpoint(add), jnp.zeros(x.shape, jnp.float32), experts)[0]


def _backward(arguments: tuple[jax.Array, jax.Array, Any], gradient: jax.Array) -> Any:
    return jax.vjp(_mix_all, *arguments)[1](gradient)


mix.defvjp(lambda *arguments: (mix(*arguments), arguments), _backward)


def _share_of(x: jax.Array, share: jax.Array, maps: Any, expert: jax.Array) -> jax.Array:
    """Return one expert's share in the output, float32 [R, D]."""
    gate, up, down = (
        {part: lax.dynamic_index_in_dim(a, expert, keepdims=False) for part, a in maps[name].items()}
        for name in ("gate", "up", "down")
    )
    y = _linear(nn.silu(_linear(x, gate)) * _linear(x, up), down)
    return y.astype(jnp.float32) * lax.dynamic_index_in_dim(share, expert, axis=1)


def _linear(x: jax.Array, linear: dict[str, jax.Array]) -> jax.Array:
    """Apply one expert's map to x [R, inputs]."""
    if "group_scale" in linear:
        return x @ dequantize(linear).astype(x.dtype)
    y = x @ linear["kernel"].astype(x.dtype)
    return (y * linear["scale"]).astype(x.dtype) if "scale" in linear else y
