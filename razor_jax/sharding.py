"""Meshes, and the shardings of arrays on them.

A user's mesh has the axes `data` (rows of the batch) and `model` (everything else). Inside, `model` is two axes,
`heads` times `rows`: as many devices as divide the KV heads take whole heads, and where there are more devices
than that, the rest share a head's rows, be they queries or slots. (`data`, `heads`, `rows`) holds the devices in
the order of the mesh that was given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")
DATA, HEADS, ROWS = "data", "heads", "rows"
MODEL = (HEADS, ROWS)  # in a PartitionSpec: what a user calls `model`

MeshLike = Mesh | Mapping[str, int] | str | None  # what `make_mesh` takes

Axes = str | tuple[str, ...] | None  # what one dimension of an array is split over


_FORM = re.compile(r"\s*(\w+)\s*=\s*(\d+)\s*")


def parse(text: str) -> dict[str, int]:
    """Parse "data=2,model=4" into {"data": 2, "model": 4}; an axis left out is 1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = _FORM.fullmatch(part)
        if match is None or match[1] not in AXES or match[1] in sizes or int(match[2]) < 1:
            raise ValueError(f"mesh={text!r}: write it as data=2,model=4, each axis once and at least 1")
        sizes[match[1]] = int(match[2])
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(mesh: MeshLike, num_kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Return the mesh (data, heads, rows) for a model of that many KV heads; None for none.

    Args:
      mesh: "data=2,model=4", the same as a mapping, or a jax Mesh of the axes data and model, in that order.
      devices: what the axes are laid over, all devices of all processes by default.

    On TPUs the axes follow the chips' rings and grid where JAX can arrange it.

    Raises ValueError where the axes do not take all of the devices.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        if mesh.axis_names == (DATA, *MODEL):
            mesh = Mesh(mesh.devices.reshape(mesh.devices.shape[0], -1), AXES, axis_types=(AxisType.Auto,) * 2)
        if mesh.axis_names != AXES:
            raise ValueError(f"a mesh of axes {mesh.axis_names}: must be {AXES}, in that order")
        data, model = mesh.devices.shape
        heads = math.gcd(model, num_kv_heads)
        grid = mesh.devices.reshape(data, heads, model // heads)
    else:
        sizes = parse(mesh) if isinstance(mesh, str) else dict.fromkeys(AXES, 1) | dict(mesh)
        if sizes.keys() != set(AXES) or any(not isinstance(n, int) or n < 1 for n in sizes.values()):
            raise ValueError(f"mesh={mesh}: the axes are {AXES}, each a whole number of at least 1")
        devices = jax.devices() if devices is None else list(devices)
        wanted = math.prod(sizes.values())
        if wanted != len(devices):
            raise ValueError(
                f"mesh data={sizes['data']},model={sizes['model']} needs {wanted} devices, there are {len(devices)}: "
                f"choose axes whose product is {len(devices)}"
            )
        data, model = sizes["data"], sizes["model"]
        heads = math.gcd(model, num_kv_heads)
        shape = (data, heads, model // heads)
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, (DATA, *MODEL), axis_types=(AxisType.Auto,) * 3)


def nontrivial(mesh: Mesh | None) -> Mesh | None:
    """Return the mesh, None for one of a single device, on which everything is as without one."""
    return mesh if mesh is not None and mesh.size > 1 else None


def describe(mesh: Mesh | None) -> str:
    """Return a mesh in words, as it is asked for."""
    if mesh is None:
        return "one device"
    return f"a mesh data={mesh.shape[DATA]},model={model_devices(mesh)}"


def model_devices(mesh: Mesh | None) -> int:
    """Return P, the devices of the model axes."""
    return 1 if mesh is None else mesh.shape[HEADS] * mesh.shape[ROWS]


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Axes) -> jax.Array:
    """Pin the dimensions of x to mesh axes; return it unchanged without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Put host arrays, the same in every process, on all devices of a mesh; return them unchanged without one."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return jax.tree.map(place, tree)


# Sharding of a weight: its path, and the dimensions that mesh axes split, best choice first. A choice counts where
# all of its dimensions divide; where none does, every device holds the whole weight. Keys and values are not split
# over `rows`: they are 2 % of a 70B (0.17 GiB a chip on 16), and partial sums would have to meet in every layer.
# An int8 kernel's scales and its bias are sharded as its outputs are. An int4 kernel and its scales follow one choice,
# that of the scales, so that no group of inputs is split.
_Spec = tuple[str | tuple[str, ...] | None, ...]
WEIGHT_RULES: tuple[tuple[str, tuple[_Spec, ...]], ...] = (
    (r"q/(kernel|group_scale)", ((None, HEADS, ROWS, None), (ROWS, HEADS), (None, HEADS))),  # [D, K, G, H]
    (r"q/(bias|scale)", ((HEADS, ROWS), (HEADS,))),  # [K, G, H]
    (r"[kv]/(kernel|group_scale)", ((None, HEADS),)),  # [D, K, H]
    (r"[kv]/(bias|scale)", ((HEADS,),)),  # [K, H]
    (r"o/(kernel|group_scale)", ((HEADS, ROWS), (HEADS, None, None, ROWS), (HEADS,))),  # [K, G, H, D]
    (r"(gate|up)/(kernel|group_scale)", ((None, MODEL), (MODEL,), (None, HEADS), (HEADS,))),  # [D, F]
    (r"(gate|up)/(bias|scale)", ((MODEL,), (HEADS,))),  # [F]
    (r"down/(kernel|group_scale)", ((MODEL,), (None, MODEL), (HEADS,))),  # [F, D]
    (
        r"expert_(gate|up|down)/(kernel|scale|group_scale)",
        ((MODEL,), (HEADS,)),
    ),  # [E, D, F], [E, F, D], [E, 1, outputs]
    (r"embedding/embedding", ((MODEL,), (None, MODEL), (HEADS,), (None, HEADS))),  # [V, D]
    (r"head/kernel", ((None, MODEL), (MODEL,), (None, HEADS), (HEADS,))),  # [D, V]
    (r"head/scale", ((MODEL,), (HEADS,))),  # [V]
)


def weight_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of a weight on a mesh (data, heads, rows); `path` is its keys joined by "/".

    `shape` is that of the scales for an int4 kernel.
    """
    for pattern, choices in WEIGHT_RULES:
        if re.search(rf"(^|/){pattern}$", path):
            for choice in choices:
                if all(size % _parts(axes, mesh) == 0 for size, axes in zip(shape, choice, strict=False)):
                    return PartitionSpec(*choice)
    return PartitionSpec()


def weight_shardings(weights: Any, mesh: Mesh) -> Any:
    """Return a tree of NamedSharding for a tree of weights, arrays or their shapes."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(weights)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
    scales = (shapes.get(path.removesuffix("kernel") + "group_scale", shape) for path, shape in shapes.items())
    specs = (weight_spec(path, shape, mesh) for path, shape in zip(shapes, scales, strict=True))
    return jax.tree.unflatten(treedef, [NamedSharding(mesh, spec) for spec in specs])


def weight_bytes(weights: Any, mesh: Mesh | None) -> tuple[int, int]:
    """Return the bytes of a tree of weights, arrays or their shapes, on each device of a mesh; and how many of them
    every device of the model axes holds alike. All on one device, where there is no mesh.
    """
    total = sum(array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(weights))
    if mesh is None:
        return total, 0
    leaves = list(zip(jax.tree.leaves(weights), jax.tree.leaves(weight_shardings(weights, mesh)), strict=True))
    here = sum(array_bytes(where.shard_shape(x.shape), x.dtype) for x, where in leaves)
    return here, sum(array_bytes(x.shape, x.dtype) for x, where in leaves if where.is_fully_replicated)


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Return the bytes of an array on an accelerator, where two int4 share a byte."""
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8


def _parts(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Return the number of parts of a dimension split over these axes."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)
