"""Linear maps whose kernel may be int8 or int4, with its scales beside it.

The contracted dimensions of a kernel come first, its outputs after. Most kernels contract one dimension ([D, K, G, H],
[D, F]); o, [K, G, H, D], contracts three. The kernels of experts (`experts.py`) are stacked, [E, inputs, outputs].

int8   `scale`, float32: one per output channel. Dequantising is part of the matmul, y = (x · q) · scale. Scales of
       experts keep the contracted dimension, [E, 1, outputs].
int4   `group_scale`, bfloat16: one per output and group of 64 inputs, or of 32 if 64 does not divide them. It has the
       shape of the kernel with groups in place of inputs; o has groups along H. y = x · (q · group_scale). The output
       head is int8: its errors go straight into the logits, and it is read once per token.

The weights never exist in another type: the compiler converts them as it reads them. XLA for CPUs does so ten times
slower than it reads float32 (`_by_platform`), so there a decode step multiplies and sums. int4 is unpacked there, once
per call.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Float, Float32, Int

Weights = Literal["int8", "int4"]  # types of kernels beside floats

INT8, INT4 = jnp.dtype("int8"), jnp.dtype("int4")
GROUPS = (64, 32)  # inputs that share a scale of int4, best first
_FEW_ROWS = 4  # 8 rows are slower multiplied and summed than through XLA's slow dot

# How many dimensions a kernel contracts, by the name of its map; 1 for the others.
_CONTRACTED = {"o": 3}

# int4: a group's largest weight is stored as minus one of these, whichever leaves the smallest error. Above 8 it is
# clipped to -8. Whole numbers reproduce weights that were rounded to 4 bits before.
_LARGEST = (8.0, 7.0, 6.0, 5.0, 7.5, 8.5, 9.0, 9.5, 10.0)


class Linear(nn.Module):
    """Linear map y = einsum(x, kernel) + bias. The kernel is int8 if it has a `scale`, int4 if a `group_scale`.

    Attributes:
      shape: the kernel's shape, contracted dimensions first.
      spec: the einsum, such as "btd,dkh->btkh".
    """

    shape: tuple[int, ...]
    spec: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[jax.Array, "*inputs"]) -> Float[jax.Array, "*outputs"]:
        self.param("kernel", nn.initializers.normal(0.02), self.shape)
        _, axes, result = re.split(",|->", self.spec)
        outputs = tuple(size for size, axis in zip(self.shape, axes, strict=True) if axis in result)
        bias = self.param("bias", nn.initializers.zeros, outputs) if self.use_bias else None
        linear, inputs = dict(self.variables["params"]), sum(axis not in result for axis in axes)
        linear.pop("bias", None)
        packed = "group_scale" in linear
        if packed:
            linear = {"kernel": self.weight().astype(x.dtype)}

        def dot(x: jax.Array, linear: dict[str, jax.Array]) -> jax.Array:
            if "scale" not in linear:
                x, kernel = promote_dtype(x, linear["kernel"])
                return _product(self.spec, x, kernel, 1 if packed else inputs)
            # A sum of products with int8 overflows float16.
            wide = jnp.promote_types(x.dtype, jnp.bfloat16)
            y = jnp.einsum(self.spec, x, linear["kernel"].astype(x.dtype), preferred_element_type=wide)
            return (y * linear["scale"]).astype(x.dtype)

        y = _by_platform(functools.partial(_multiply_and_sum, inputs=inputs), dot, x, linear, inputs)
        return y if bias is None else y + bias.astype(y.dtype)

    def weight(self) -> Float32[jax.Array, "*shape"]:
        """Return the kernel, dequantised."""
        return dequantize(self.variables["params"])


def look_up(embedding: Float[jax.Array, "V D"], tokens: Int[jax.Array, "*n"]) -> Float[jax.Array, "*n D"]:
    """Return the embeddings of tokens."""

    def take(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.take(embedding, tokens, axis=0)

    def from_the_table(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        # XLA for CPUs gathers from a float32 copy of the table, which a loop over steps would make before its first.
        return take(*jax.lax.optimization_barrier((embedding, tokens)))

    if embedding.dtype.itemsize >= 4:
        return take(embedding, tokens)
    return jax.lax.platform_dependent(embedding, tokens, cpu=from_the_table, default=take)


def attend(embedding: Float[jax.Array, "V D"], x: Float[jax.Array, "*n D"]) -> Float[jax.Array, "*n V"]:
    """Return the products of hidden states x with every embedding: the logits of a tied output head."""

    def dot(x: jax.Array, linear: dict[str, jax.Array]) -> jax.Array:
        return jnp.dot(x, linear["kernel"].T)

    def multiply_and_sum(x: jax.Array, linear: dict[str, jax.Array]) -> jax.Array:
        rows, linear = _rows(x, linear, 1)
        return jnp.sum(rows[..., None, :] * dequantize(linear), axis=-1).reshape(*x.shape[:-1], -1)

    x, embedding = promote_dtype(x, embedding)
    return _by_platform(multiply_and_sum, dot, x, {"kernel": embedding}, 1)


Product = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]


def _by_platform(on_cpu: Product, dot: Product, x: jax.Array, linear: dict[str, jax.Array], inputs: int) -> jax.Array:
    """Return a product by `on_cpu` where XLA for CPUs takes ten times as long for `dot` as for one of float32.

    Of a 135M model, one row through all kernels of its MLPs: bfloat16 171 ms, int8 146 ms, float32 17 ms; multiplied
    and summed bfloat16 19 ms, int8 15 ms. The choice is made when a program is lowered: it may be for another machine.
    """
    if math.prod(x.shape[:-inputs]) > _FEW_ROWS or linear["kernel"].dtype.itemsize >= 4:
        return dot(x, linear)
    kind = jax.eval_shape(dot, x, linear).dtype
    return jax.lax.platform_dependent(x, linear, cpu=lambda x, linear: on_cpu(x, linear).astype(kind), default=dot)


def _multiply_and_sum(x: jax.Array, linear: dict[str, jax.Array], inputs: int) -> jax.Array:
    """Return the product of the last `inputs` dimensions of x and the first of the kernel, in float32."""
    rows, linear = _rows(x, linear, inputs)
    kernel = dequantize(linear)
    y = jnp.sum(rows[..., None] * kernel.reshape(rows.shape[-1], -1), axis=-2)
    return y.reshape(*x.shape[:-inputs], *kernel.shape[inputs:])


def _rows(
    x: jax.Array, linear: dict[str, jax.Array], inputs: int
) -> tuple[Float32[jax.Array, ...], dict[str, jax.Array]]:
    """Return x with its last `inputs` dimensions as one, and the others as one or, for a single row, as none.

    A dimension of one row makes XLA thirty times slower. So does what computes x, if it is fused into the sum, hence
    the barrier. It also keeps a loop over steps from converting all kernels before its first.
    """
    size = math.prod(x.shape[-inputs:])
    rows = x.reshape((size,) if x.size == size else (-1, size)).astype(jnp.float32)
    return jax.lax.optimization_barrier((rows, linear))


def _product(spec: str, x: jax.Array, kernel: jax.Array, merge: int) -> jax.Array:
    """Return the einsum, with the last dimensions of x and the first of the kernel, `merge` in number, as one.

    XLA for CPUs otherwise transposes a kernel that contracts several at every call. Quantised kernels stay as they are:
    XLA for TPUs would write them out wide.
    """
    if merge > 1:
        inputs, axes, result = re.split(",|->", spec)
        x, kernel = x.reshape(*x.shape[:-merge], -1), kernel.reshape(-1, *kernel.shape[merge:])
        spec = f"{inputs[: 1 - merge]},{axes[0]}{axes[merge:]}->{result}"
    return jnp.einsum(spec, x, kernel)


def is_kernel(path: str) -> bool:
    """Return whether quantised weights store the weight at this path, joined by "/", as int8 or int4.

    Norms, biases, embeddings and routers keep their type. Norms and biases are small. Embeddings are looked up row by
    row, and a tied output head needs their precision to choose between similar tokens, a router to choose between
    similar experts.
    """
    return path.endswith("/kernel") and not path.endswith("router/kernel")


def stored_type(path: str, weights: Weights) -> Weights:
    """Return the type of the kernel at `path` in quantised weights."""
    return "int8" if path.endswith("head/kernel") else weights


def scale_of(path: str, weights: Weights) -> str:
    """Return the path of a kernel's scales."""
    return path.removesuffix("kernel") + ("scale" if stored_type(path, weights) == "int8" else "group_scale")


def weights_type(paths: Any) -> Weights | None:
    """Return the type of the kernels in a tree of weights from its paths, None for floats."""
    if any(path.endswith("/group_scale") for path in paths):
        return "int4"
    return "int8" if any(is_kernel(path) and scale_of(path, "int8") in paths for path in paths) else None


def quantize(path: str, kernel: Float[jax.Array, "*shape"], weights: Weights) -> dict[str, jax.Array]:
    """Return the kernel at `path` as int8 or int4, and its scales, by their paths.

    An int8 scale is max|w| / 127 of an output channel.

    Raises ValueError if int4 groups do not divide the kernel's inputs.
    """
    name = path.split("/")[-2]
    stacked = name.startswith("expert_")
    contracted = (1,) if stacked else tuple(range(_CONTRACTED.get(name, 1)))
    if stored_type(path, weights) == "int4":
        size = _group_size(path, kernel.shape[contracted[-1]])
        kernel, scale = _quantize_groups(kernel.astype(jnp.float32), contracted[-1], size)
    else:
        kernel = kernel.astype(jnp.float32)
        largest = jnp.max(jnp.abs(kernel), axis=contracted, keepdims=stacked)
        scale = jnp.where(largest == 0, 1.0, largest) / 127.0
        kernel = jnp.round(kernel / scale).astype(INT8)
    return {path: kernel, scale_of(path, weights): scale}


def _group_size(path: str, inputs: int) -> int:
    for size in GROUPS:
        if inputs % size == 0:
            return size
    raise ValueError(
        f"{path} has {inputs} inputs in a row, which int4 groups of {' or '.join(map(str, GROUPS))} do not divide: use "
        "weights='int8'"
    )


def _quantize_groups(kernel: jax.Array, axis: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Return an int4 kernel and its scales, bfloat16, for groups of `size` inputs along an axis."""
    shape = kernel.shape
    groups = kernel.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    axis += 1
    most, least = jnp.max(groups, axis=axis, keepdims=True), jnp.min(groups, axis=axis, keepdims=True)
    largest = jnp.where(most >= -least, most, least)  # by magnitude, with its sign

    def numbers(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(groups / scale.astype(jnp.float32)), -8, 7)

    def better(best: tuple[jax.Array, jax.Array], stored: jax.Array) -> tuple[Any, None]:
        scale = jnp.where(largest == 0, 1.0, largest / -stored).astype(jnp.bfloat16)
        error = jnp.sum(jnp.square(groups - numbers(scale) * scale.astype(jnp.float32)), axis=axis, keepdims=True)
        return jax.tree.map(functools.partial(jnp.where, error < best[0]), (error, scale), best), None

    # A group with infinity or NaN keeps it in its scale.
    fallback = jnp.where(jnp.isfinite(largest), 1.0, largest).astype(jnp.bfloat16)
    start = jnp.full(largest.shape, jnp.inf, jnp.float32), fallback
    (_, scale), _ = jax.lax.scan(better, start, jnp.asarray(_LARGEST, jnp.float32))
    return numbers(scale).reshape(shape).astype(INT4), scale.squeeze(axis)


def dequantize(linear: Mapping[str, Any]) -> Float32[jax.Array, "*shape"]:
    """Return the float32 kernel of a map's parameters, of any type."""
    kernel = linear["kernel"].astype(jnp.float32)
    if "group_scale" not in linear:
        return kernel * linear["scale"] if "scale" in linear else kernel
    scale = linear["group_scale"].astype(jnp.float32)
    axis = next(i for i, (one, other) in enumerate(zip(kernel.shape, scale.shape, strict=True)) if one != other)
    return kernel * jnp.repeat(scale, kernel.shape[axis] // scale.shape[axis], axis=axis)


def quantize_tree(tree: Any, weights: Weights) -> Any:
    """Return a model's weights with its kernels as int8 or int4, and their scales."""
    flat: dict[str, Any] = {}
    for path, x in flax.traverse_util.flatten_dict(tree, sep="/").items():
        flat |= quantize(path, jnp.asarray(x), weights) if is_kernel(path) else {path: x}
    return flax.traverse_util.unflatten_dict(flat, sep="/")
