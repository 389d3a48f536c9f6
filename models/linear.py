"""Linear maps whose kernel may be int8, with one float32 scale per output channel.

The contracted dimensions of a kernel come first, its outputs after. Most kernels contract one dimension ([D, K, G, H],
[D, F]); o, [K, G, H, D], contracts three. The kernels of experts (`experts.py`) are stacked, [E, inputs, outputs], and
keep the contracted dimension in their scales, [E, 1, outputs]. Dequantising is part of the matmul, y = (x · q) · scale,
so the weights never exist in another type: the compiler converts them as it reads them.
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

# How many dimensions a kernel contracts, by the name of its map; 1 for the others.
_CONTRACTED = {"o": 3}


class Linear(nn.Module):
    """Linear map y = einsum(x, kernel) + bias. The kernel is int8 if it has a `scale`.

    Attributes:
      shape: the kernel's shape, contracted dimensions first.
      spec: the einsum, such as "btd,dkh->btkh".
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
        # A sum of products with int8 overflows float16.
        wide = jnp.promote_types(x.dtype, jnp.bfloat16)
        y = jnp.einsum(self.spec, x, kernel.astype(x.dtype), preferred_element_type=wide)
        y = (y * self.get_variable("params", "scale")).astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)

    def weight(self) -> Float32[jax.Array, "*shape"]:
        """Return the kernel, dequantised."""
        return dequantize(self.variables["params"])


def is_kernel(path: str) -> bool:
    """Return whether 8-bit weights store the weight at this path, joined by "/", as int8.

    Norms, biases, embeddings and routers keep their type. Norms and biases are small. Embeddings are looked up row by
    row, and a tied output head needs their precision to choose between similar tokens, a router to choose between
    similar experts.
    """
    return path.endswith("/kernel") and not path.endswith("router/kernel")


def scale_of(path: str) -> str:
    """Return the path of a kernel's scales."""
    return path.removesuffix("kernel") + "scale"


def quantize(
    path: str, kernel: Float[jax.Array, "*shape"]
) -> tuple[Int8[jax.Array, "*shape"], Float32[jax.Array, "*outputs"]]:
    """Return the int8 kernel at `path` and its scales, float32 [outputs]: max|w| / 127 of each output channel.

    Scales of experts are [E, 1, outputs].
    """
    name = path.split("/")[-2]
    stacked = name.startswith("expert_")
    contracted = (1,) if stacked else tuple(range(_CONTRACTED.get(name, 1)))
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=contracted, keepdims=stacked)
    scale = jnp.where(largest == 0, 1.0, largest) / 127.0
    return jnp.round(kernel / scale).astype(INT8), scale


def dequantize(linear: Mapping[str, Any]) -> Float32[jax.Array, "*shape"]:
    """Return the float32 kernel of a map's parameters, of any type."""
    kernel = linear["kernel"].astype(jnp.float32)
    return kernel * linear["scale"] if "scale" in linear else kernel


def quantize_tree(weights: Any) -> Any:
    """Return a model's weights with its kernels as int8, and their scales."""
    flat: dict[str, Any] = {}
    for path, x in flax.traverse_util.flatten_dict(weights, sep="/").items():
        if is_kernel(path):
            flat[path], flat[scale_of(path)] = quantize(path, jnp.asarray(x))
        else:
            flat[path] = x
    return flax.traverse_util.unflatten_dict(flat, sep="/")
