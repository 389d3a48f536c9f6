"""Linear maps whose kernel may be 8-bit: int8, with one float32 scale for each output channel beside it.

A kernel's contracted dimensions come first, its outputs after: [D, K, G, H], [D, F], but o's [K, G, H, D] has three of
the former. Dequantising is part of the matmul, y = (x · q) · scale, so that the weights are never there in another
type: a compiler converts them as it reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Float, Float32, Int8

INT8 = jnp.dtype("int8")

# Contracted dimensions of a kernel, by the name of its map; others have one.
_CONTRACTED = {"o": 3}


class Linear(nn.Module):
    """y = einsum(x, kernel) + bias; the kernel is int8 where it has a `scale`.

    Attributes:
      shape: of the kernel, contracted dimensions first.
      spec: einsum's, such as "btd,dkh->btkh".
    """

    shape: tuple[int, ...]
    spec: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[jax.Array, "*inputs"]) -> Float[jax.Array, "*outputs"]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape)
        _, axes, result = re.split(",|->", self.spec)
        outputs = tuple(size for size, axis in zip(self.shape, axes, strict=True) if axis in result)
        bias = self.param("bias", nn.initializers.zeros, outputs) if self.use_bias else None
        if not self.has_variable("params", "scale"):
            x, kernel, bias = promote_dtype(x, kernel, bias)
            y = jnp.einsum(self.spec, x, kernel)
            return y if bias is None else y + bias
        # Sums over int8 would overflow float16.
        wide = jnp.promote_types(x.dtype, jnp.bfloat16)
        y = jnp.einsum(self.spec, x, kernel.astype(x.dtype), preferred_element_type=wide)
        y = (y * self.get_variable("params", "scale")).astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)

    def weight(self) -> Float32[jax.Array, "*shape"]:
        """Return the kernel, dequantised."""
        return dequantize(self.variables["params"])


def is_kernel(path: str) -> bool:
    """Return whether 8-bit weights hold this one, a path joined by "/", as int8. Norms and biases are small. Embeddings
    are looked up row by row, and as a tied output head they decide between near tokens: they keep their type.
    """
    return path.endswith("/kernel")


def scale_of(path: str) -> str:
    """Return where the scales of a kernel are."""
    return path.removesuffix("kernel") + "scale"


def quantize(
    path: str, kernel: Float[jax.Array, "*shape"]
) -> tuple[Int8[jax.Array, "*shape"], Float32[jax.Array, "*outputs"]]:
    """Return int8 kernel and float32 [outputs], max|w| / 127 of each output channel; `path` is the kernel's."""
    contracted = tuple(range(_CONTRACTED.get(path.split("/")[-2], 1)))
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=contracted)
    scale = jnp.where(largest == 0, 1.0, largest) / 127.0
    return jnp.round(kernel / scale).astype(INT8), scale


def dequantize(linear: Mapping[str, Any]) -> Float32[jax.Array, "*shape"]:
    """Return float32 kernel of a map's parameters, whatever its type."""
    kernel = linear["kernel"].astype(jnp.float32)
    return kernel * linear["scale"] if "scale" in linear else kernel


def quantize_tree(weights: Any) -> Any:
    """Return a model's weights with int8 kernels and their scales."""
    flat: dict[str, Any] = {}
    for path, x in flax.traverse_util.flatten_dict(weights, sep="/").items():
        if is_kernel(path):
            flat[path], flat[scale_of(path)] = quantize(path, jnp.asarray(x))
        else:
            flat[path] = x
    return flax.traverse_util.unflatten_dict(flat, sep="/")
