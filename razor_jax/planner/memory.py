"""Bytes per device of a model, its cache and its steps, by arithmetic alone.

Weights and cache are exact: they come from the rules that shard weights and from the `CacheSpec` that allocates caches.
The temporaries of a step are an estimate fitted to answers of the TPU compiler (docs/planning.md).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import sharding
from ..cache import CacheSpec, make_spec
from ..config import HeadSplit, RazorConfig
from ..functional import CHUNK
from ..mesh import Layout, MeshPlacement
from ..models.config import Experts, ModelConfig
from ..models.linear import Weights
from ..params import abstract_weights
from .hardware import Hardware

MOST_ROWS, MOST_TOKENS = 1 << 16, 1 << 27  # upper limits of the search for what fits


@dataclasses.dataclass(frozen=True)
class Job:
    """One model, cache policy and load on one set of devices.

    Attributes:
      data, model: sizes of the mesh axes.
      batch, context: rows, and the cache capacity of each in tokens.
      call: prompt tokens per call; equal to `context` for exact prefill.
      weights: "bfloat16", "float32", "float16", or "int8" or "int4" for quantised kernels and all else in bfloat16.
      razor: cache policy, None for dense attention.
      layout: cache layout on the mesh; None chooses as `init_cache` does.
    """

    config: ModelConfig
    hardware: Hardware
    data: int
    model: int
    batch: int
    context: int
    call: int
    split: HeadSplit
    razor: RazorConfig | None
    weights: str = "bfloat16"
    layout: Layout | None = None

    @property
    def kernel_type(self) -> Weights | None:
        """Type of quantised kernels, None for floats."""
        return next((kind for kind in get_args(Weights) if kind == self.weights), None)

    @property
    def dtype(self) -> str:
        """Type of the residual stream."""
        return "bfloat16" if self.kernel_type else self.weights

    def abstract_weights(self) -> Any:
        """Return the weights as abstract arrays."""
        return abstract_weights(self.config, jnp.dtype(self.dtype), weights=self.kernel_type)

    def spec(self, mesh: Mesh) -> CacheSpec:
        """Return the cache spec that `init_cache` would make on this mesh."""
        c, placement = self.config, MeshPlacement(mesh)
        # A one-device mesh is dropped (`sharding.nontrivial`): only this context names the device.
        with placement.inside():
            placement = placement.for_cache(self.split, self.razor, self.layout)
            return make_spec(self.split, c.head_dim, self.context, self.razor, self.dtype, None, c.alibi, placement)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device; all devices need the same."""

    weights: int
    kv: int
    prefill: int
    decode: int

    def of(self, step: str) -> int:
        """Return the bytes in use during a step, "prefill" or "decode"."""
        return self.weights + self.kv + (self.prefill if step == "prefill" else self.decode)

    @property
    def needed(self) -> int:
        """Peak bytes."""
        return max(self.of("prefill"), self.of("decode"))


@dataclasses.dataclass(frozen=True)
class _Device:
    """Stand-in for a device that this machine lacks, with the attributes that a mesh reads."""

    id: int
    platform: str
    device_kind: str
    num_cores: int = 1
    process_index: int = 0


def stand_in_mesh(job: Job) -> Mesh:
    """Return the job's mesh of stand-in devices."""
    kind = job.hardware.device_kind
    devices = [_Device(index, job.hardware.kind, kind) for index in range(job.data * job.model)]
    grid = np.asarray(devices).reshape(job.data, job.model)
    made = sharding.make_mesh(Mesh(grid, sharding.AXES), job.config.num_kv_heads)
    assert made is not None
    return made


def memory(job: Job) -> Memory:
    """Return the memory that the job needs on each device.

    Raises ValueError for a batch that does not divide over the mesh, or a layout that the split does not allow.
    """
    mesh = stand_in_mesh(job)
    spec = job.spec(mesh)
    rows = job.batch if MeshPlacement(mesh).rows(job.batch) is None else job.batch // job.data
    return Memory(
        weights=_weight_bytes(job.config, job.weights, job.data, job.model),
        kv=spec.kv_bytes(rows) // job.model,
        prefill=_prefill(job, rows, mesh, by_slot=spec.shards > 1),
        decode=_decode(job, rows),
    )


@functools.cache
def _weight_bytes(config: ModelConfig, weights: str, data: int, model: int) -> int:
    """Return the weight bytes per device, extrapolated from models of one and two layers of each kind."""
    nowhere = Hardware("", "gpu", "", data * model, 1, 0)

    def of(layers: int, kind: Experts | None) -> int:
        shallow = dataclasses.replace(config, num_layers=layers, experts=kind)
        split = HeadSplit.all(layers, config.num_kv_heads)
        job = Job(shallow, nowhere, data, model, 1, 1, 1, split, None, weights)
        return sharding.weight_bytes(job.abstract_weights(), stand_in_mesh(job))[0]

    experts = config.experts and dataclasses.replace(config.experts, dense_layers=())
    sparse = sum(config.experts_of(layer) is not None for layer in range(config.num_layers))
    counts = {experts: sparse, None: config.num_layers - sparse}
    layers = {kind: of(2, kind) - of(1, kind) for kind, count in counts.items() if count}
    outside = of(1, experts) - (of(2, experts) - of(1, experts))
    return outside + sum(counts[kind] * size for kind, size in layers.items())


def _decode(job: Job, rows: int) -> int:
    """Return the temporary bytes of a decode step: logits, the widest activations, and a little per layer."""
    c = job.config
    logits = rows * c.vocab_size * 8 // job.model
    return logits + c.num_layers * (800_000 + rows * 8 * c.hidden_size)


def _prefill(job: Job, rows: int, mesh: Mesh, by_slot: bool) -> int:
    """Return the temporary bytes of a prefill call of `job.call` tokens, as fitted to the compiler at several shapes.

    They are the hidden states, one layer's keys and values with their copies on the way into the cache, and the
    activations of one chunk.
    """
    c, size = job.config, jnp.dtype(job.dtype).itemsize
    tokens = -(-min(job.call, job.context) // CHUNK) * CHUNK
    heads, parts = mesh.shape[sharding.HEADS], mesh.shape[sharding.ROWS]
    hidden = rows * tokens * c.hidden_size * size // job.model
    kv = 2 * rows * tokens * (c.num_kv_heads // heads) * c.head_dim * size
    width = c.num_heads * c.head_dim
    sparse = c.experts is not None and not c.experts.dense_layers
    mlp = c.experts.intermediate_size if sparse and c.experts else c.intermediate_size
    chunk = rows * CHUNK * (3 * mlp * size + 5 * width * 4) // job.model
    if job.model == 1:
        # Hidden states are copied between layers. Attention's widest float weight is copied to another layout.
        relaid = 0 if job.kernel_type else c.hidden_size * width * size
        return max(2 * hidden, hidden + 2 * kv) + chunk + relaid
    # By slot each device sends keys and values to the others; `parts` devices with the same ones each send a part.
    sent = kv if not by_slot else kv * 3 // 2 if parts == 1 else kv // parts
    return hidden + kv + sent + chunk


def largest_batch(job: Job) -> int:
    """Return the most rows of `job.context` tokens that fit, a multiple of the data axis; 0 if none fits."""
    return job.data * _most(MOST_ROWS, lambda n: _fits(dataclasses.replace(job, batch=n * job.data)))


def largest_context(job: Job) -> int:
    """Return the longest context that fits for `job.batch` rows, 0 if none does; exact prefill stays exact."""

    def fits(tokens: int) -> bool:
        call = tokens if job.call >= job.context else job.call
        return _fits(dataclasses.replace(job, context=tokens, call=call))

    return _most(MOST_TOKENS, fits)


def _fits(job: Job) -> bool:
    return memory(job).needed <= job.hardware.hbm


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest n of 1..limit that fits, 0 if none does, by bisection: memory grows with n."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))
