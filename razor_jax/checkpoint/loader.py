"""Placement of weights on devices: check that they fit, cast them, and send each part to its device."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..config import HeadSplit
from ..memory import free_bytes
from ..mesh import MeshPlacement
from ..models import ModelConfig
from ..models.linear import INT4, INT8, Weights, is_kernel, quantize, weights_type
from ..params import Params, abstract_weights, fingerprint, in_order, sampled, samples
from ..sharding import MeshLike, make_mesh, weight_bytes, weight_shardings

log = logging.getLogger("razor_jax")

GIB = 2**30

# Bytes per weight while it is quantised, beside the result: float32, or 16 bits and a float32 copy, which some
# compilers make (the CPU's does, the TPU's does not).
_PASSING = 6

DTYPES = ("float32", "bfloat16", "float16")

Index = tuple[slice, ...]
Fill = Callable[[Index, np.ndarray], None]  # reads a shard, given by its index, into an array of its shape
Progress = Callable[[int, int], None]


class Loader:
    """Weights of one model as they are read, each cast and on its devices.

    Kernels are quantised on the devices, one by one, so that shards of a contracted dimension share the largest values
    of their channels.

    Attributes:
      mesh: (data, heads, rows), None for the default device.
      targets: path, joined by "/" -> shape, type and, on a mesh, sharding of every weight of the checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: np.dtype,
        mesh: MeshLike,
        weights: Weights | None,
        stored: Weights | None = None,
        origin: str | None = None,
    ):
        """Prepare to load. `stored` is the type of the checkpoint's kernels if they are quantised, `origin` its
        fingerprint. Quantised kernels keep their type.

        Raises ValueError if the mesh does not fit the devices, the weights do not fit into them, or they cannot have
        the type `weights`.
        """
        if weights is not None and weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r}: use 'int8' or 'int4', or None for the type of dtype=")
        if weights and stored and weights != stored:
            raise ValueError(
                f"weights={weights!r}: the checkpoint's kernels are {stored} and stay so: leave weights= out, or load "
                "the floats that they were made from"
            )
        self.config = config
        self.mesh = make_mesh(mesh, config.num_kv_heads)
        self.placement = None if self.mesh is None else MeshPlacement(self.mesh)
        self._quantizes = None if stored else weights
        tree = abstract_weights(config, dtype, stored)
        held = abstract_weights(config, dtype, weights) if self._quantizes else tree
        require_room(held, self.mesh, self._quantizes)
        if self.mesh is not None:
            where = weight_shardings(tree, self.mesh)
            tree = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)
        self.targets: dict[str, Any] = dict(flax.traverse_util.flatten_dict(tree, sep="/"))
        self._flat: dict[str, jax.Array] = {}
        self._samples: dict[str, np.ndarray] = {}
        self._origin = origin

    def read(self, name: str, fill: Fill, stored: str) -> None:
        """Add a weight; `stored` is its type in the checkpoint."""
        target = self.targets[name]
        if self._quantizes and is_kernel(name):
            # Straight from the stored values: rounded once.
            dtype = jnp.dtype("float32" if stored == "float64" else stored)
            target = jax.ShapeDtypeStruct(target.shape, dtype, sharding=target.sharding)
        self._hold(name, place(target, fill))

    def put(self, name: str, array: jax.Array, split: HeadSplit | None) -> None:
        """Add a weight that is on its devices already, with heads in the order of the checkpoint."""
        self._hold(name, array if split is None else in_order(name, array, split, self.placement))

    def params(self, split: HeadSplit | None) -> Params:
        """Return all weights, heads in the order of `split`."""
        origin = self._origin
        if self._quantizes:
            origin = fingerprint(np.concatenate([self._samples[name] for name in sampled(self.config)]))
        weights = flax.traverse_util.unflatten_dict(self._flat, sep="/")
        return Params(weights=weights, config=self.config, heads=split, origin=origin, placement=self.placement)

    def _hold(self, name: str, array: jax.Array) -> None:
        if self._quantizes and name in sampled(self.config):
            self._samples[name] = samples([{"kernel": array}], self.mesh)
        if not self._quantizes or not is_kernel(name):
            self._flat[name] = array
            return
        # Only the map's name: maps of one shape share a program.
        prefix, _, last = name.rpartition("/kernel")[0].rpartition("/")
        parts = jax.block_until_ready(_quantize(f"{last}/kernel", array, self._quantizes, self.mesh))
        self._flat |= {f"{prefix}/{path}" if prefix else path: part for path, part in parts.items()}
        array.delete()


@functools.partial(jax.jit, static_argnames=("path", "weights", "mesh"))
def _quantize(path: str, kernel: jax.Array, weights: Weights, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Return the kernel and its scales by path, on their devices; `path` is the kernel's in its layer ("q/kernel")."""
    tree = flax.traverse_util.unflatten_dict(quantize(path, kernel, weights), sep="/")
    if mesh is not None:
        tree = jax.lax.with_sharding_constraint(tree, weight_shardings(tree, mesh))
    parts: dict[str, Any] = dict(flax.traverse_util.flatten_dict(tree, sep="/"))
    return parts


def fold(items: Sequence[str], separator: str, shown: int = 10) -> str:
    """Return the first items joined, and the number of the others."""
    rest = len(items) - shown
    return separator.join([*items[:shown], f"and {rest:,} more"] if rest > 0 else items)


def float_type(asked: Any) -> np.dtype:
    """Return the dtype of a name or type. Raises ValueError if weights cannot have it."""
    name = asked if isinstance(asked, str) else jnp.dtype(asked).name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported: pass dtype= one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def require_room(weights: Any, mesh: Mesh | None, quantizes: Weights | None) -> None:
    """Raise ValueError, before anything is read, if a device has no room for the weights (a tree of shapes).

    The message has both numbers. If one process of a mesh has to refuse, all do. `quantizes`: the type of kernels that
    are floats first, one by one. Backends that do not report their memory (CPU) refuse nothing.
    """
    needed, replicated = weight_bytes(weights, mesh)
    passing = _PASSING * _largest_kernel(weights, mesh) if quantizes else 0
    devices = mesh.local_devices if mesh is not None else jax.local_devices()[:1]
    count = 1 if mesh is None else mesh.size
    if mesh is not None:
        log.info(
            "weights: %.2f GiB on each of %d devices, %.3f GiB of it the same on all",
            needed / GIB,
            count,
            replicated / GIB,
        )
    rooms = {device: _room(device) for device in devices}
    short = [
        f"{max(room, 0) / GIB:.2f} GiB free on {device}"
        for device, room in rooms.items()
        if room is not None and needed + passing > room
    ]
    processes = _where(bool(short), mesh)
    if processes:
        free = short[0] if short else f"less free on a device of process {processes[0]}"
        on_the_way = f" ({passing / GIB:.2f} of it while kernels become {quantizes})" if passing else ""
        smaller = {None: ', or weights="int8" or "int4"', "int8": ', or weights="int4"'}.get(_type_of(weights), "")
        raise ValueError(
            f"the weights do not fit: {(needed + passing) / GIB:.2f} GiB needed on each of {count} "
            f"device(s){on_the_way}, {free}: use a mesh of more devices{smaller}"
        )


def place(target: jax.ShapeDtypeStruct, fill: Fill) -> jax.Array:
    """Return an array whose shards `fill` reads, one by one; they are cast on the host.

    Each process reads only its own shards, each once.
    """
    read: dict[Any, np.ndarray] = {}  # A shard on several devices is read once.

    def shard(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in read:
            shape = [len(range(*axis.indices(size))) for axis, size in zip(index, target.shape, strict=True)]
            read[key] = np.empty(shape, target.dtype)
            # Transposed and cast in one pass; jit would keep both copies.
            fill(index, read[key])
        return read[key]

    if target.sharding is None:
        array = jnp.asarray(shard((slice(None),) * len(target.shape)))
    else:
        array = jax.make_array_from_callback(target.shape, target.sharding, shard, target.dtype)
    # Waiting bounds the host copies in flight to one tensor.
    return jax.block_until_ready(array)


def _room(device: Any) -> int | None:
    """Return the free bytes of an accelerator, None for a CPU, whose memory is that of the host."""
    return None if device.platform == "cpu" else free_bytes(device)


def _largest_kernel(weights: Any, mesh: Mesh | None) -> int:
    """Return the size of the largest quantised kernel shard on one device, in weights."""
    leaves = jax.tree.leaves(weights)
    parts = [x.shape for x in leaves]
    if mesh is not None:
        where = jax.tree.leaves(weight_shardings(weights, mesh))
        parts = [at.shard_shape(shape) for at, shape in zip(where, parts, strict=True)]
    return max(math.prod(part) for x, part in zip(leaves, parts, strict=True) if x.dtype in (INT8, INT4))


def _where(here: bool, mesh: Mesh | None) -> list[int]:
    """Return the processes of a mesh on which `here` is true. Every process calls this."""
    if mesh is None or not mesh.is_multi_process:
        return [jax.process_index()] * here
    return np.flatnonzero(multihost_utils.process_allgather(np.asarray(here))).tolist()


def _type_of(weights: Any) -> Weights | None:
    return weights_type(flax.traverse_util.flatten_dict(weights, sep="/"))
