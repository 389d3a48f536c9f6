"""What a mesh adds to `functional.OneDevice`: how a cache is spread over devices, and each step of a call there.

Each head group of each layer is either *by slot*, the slots of every head spread over all devices of the model axes
(`slots.py`), or *by head*, whole heads on each device. By slot the devices store equal bytes whatever the split, and
merge their partial softmaxes; by head nothing is merged, but every group has to divide. Rows of a batch are spread over
the axis `data` either way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from .. import sharding
from ..cache import AttentionMetadata, CacheSpec, Group, KVCache, begin
from ..config import HeadSplit, RazorConfig
from ..sharding import constrain
from . import attention, cache, experts, head_order

Layout = Literal["slot", "head"]


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """A mesh (data, heads, rows) and, once a cache is made, its layout."""

    mesh: Mesh
    layout: Layout | None = None

    def __str__(self) -> str:
        return sharding.describe(self.mesh)

    def for_cache(self, split: HeadSplit, razor: RazorConfig | None, layout: Layout | None) -> MeshPlacement | None:
        """Return the placement of a cache; None for a mesh of one device.

        `layout` None chooses "head" where every group divides over the devices, "slot" otherwise.

        Raises ValueError for an unknown layout, or one that does not divide.
        """
        if layout not in (None, "slot", "head"):
            raise ValueError(f"layout={layout!r}: 'slot', 'head', or None to choose")
        if sharding.nontrivial(self.mesh) is None:
            return None
        devices = sharding.model_devices(self.mesh)
        whole = split.num_kv_heads % devices == 0 if razor is None else head_order.divides_evenly(split, self.mesh)
        if layout == "head" and not whole:
            sizes = {len(heads) for heads in split.retrieval}
            raise ValueError(
                f"layout='head' over {devices} devices: every layer's retrieval heads and windowed heads must divide "
                f"by it, but layers have {sorted(sizes)} of {split.num_kv_heads} retrieval heads; choose heads with "
                f"select(balanced_over={devices}), or leave the layout to 'slot'"
            )
        return dataclasses.replace(self, layout=layout or ("head" if whole else "slot"))

    def order(self, split: HeadSplit, layer: int) -> tuple[int, ...]:
        """Return a layer's KV heads in the order of its weights."""
        return head_order.stored_order(split, layer, self.mesh)

    def group_positions(self, spec: CacheSpec, layer: Sequence[Group]) -> list[np.ndarray]:
        """Return where the heads of each group are among the layer's KV heads."""
        spread = spec.razor is not None and head_order.divides_evenly(spec.heads, self.mesh)
        devices = sharding.model_devices(self.mesh) if spread else 1
        return head_order.head_positions([group.k.shape[1] for group in layer], devices)

    @property
    def shards(self) -> int:
        """Devices that share the slots of each head."""
        return sharding.model_devices(self.mesh) if self.layout == "slot" else 1

    def rows(self, batch: int) -> str | None:
        """Return the mesh axis that rows of a batch are spread over; None for a single row, which each device has.

        Raises ValueError for a batch that does not divide.
        """
        data = self.mesh.shape[sharding.DATA]
        if batch % data and batch > 1:
            raise ValueError(
                f"batch={batch} does not divide over data={data} of the mesh: make it a multiple of {data}, or give "
                "the mesh more of model and less of data"
            )
        return sharding.DATA if batch % data == 0 else None

    def padding(self, rows: int) -> int:
        """Return how many empty rows make a batch divide over `data`; a single row needs none."""
        return -rows % self.mesh.shape[sharding.DATA] if rows > 1 else 0

    @contextlib.contextmanager
    def inside(self) -> Any:
        """Enter the context in which kernels run: inside `shard_map`, on the devices of the mesh."""
        manual = self.mesh.abstract_mesh.update(axis_types=(AxisType.Manual,) * len(self.mesh.axis_names))
        with jax.sharding.use_abstract_mesh(manual):
            yield

    # The steps of a call, as `OneDevice` has them.

    def init(self, spec: CacheSpec, batch: int, prompt_lengths: Any = None) -> KVCache:
        return cache.init(spec, batch, prompt_lengths)

    begin = staticmethod(begin)

    def layers(self, run: Callable[..., Any], tokens: Any, fresh: bool) -> Callable[..., Any]:
        return run

    def broadcast(self, source: KVCache, batch: int, capacity: int) -> KVCache:
        return cache.broadcast(source, batch, capacity)

    def attend(self, q: jax.Array, k, v, layer: tuple[Group, ...], meta: AttentionMetadata, **options: Any):
        return attention.attend(q, k, v, layer, meta, **options)

    def attend_and_write(self, q: jax.Array, k, v, layer: tuple[Group, ...], meta: AttentionMetadata, slopes):
        return attention.attend_and_write(q, k, v, layer, meta, slopes)

    def write(self, layer: tuple[Group, ...], k: jax.Array, v, meta: AttentionMetadata):
        return attention.write_call(layer, k, v, meta)

    def write_after(self, x: jax.Array, k, v, layer: tuple[Group, ...], meta: AttentionMetadata):
        return attention.write_after(x, k, v, layer, meta)

    def embed(self, embed: Callable[[jax.Array], jax.Array], tokens: jax.Array, chunk: int) -> jax.Array:
        """Return the hidden states [B, T, D]; those of a long call chunk by chunk, whole only while looked up."""
        T = tokens.shape[1]
        if chunk >= T:
            return self.by_rows(embed(tokens))
        shape = jax.eval_shape(embed, tokens)
        axes = attention.hidden_spec(shape, self)

        def one(index, x):
            part = constrain(embed(lax.dynamic_slice_in_dim(tokens, index * chunk, chunk, axis=1)), self.mesh, *axes)
            return lax.dynamic_update_slice_in_dim(x, part, index * chunk, axis=1)

        empty = constrain(jnp.zeros(shape.shape, shape.dtype), self.mesh, *axes)
        return lax.fori_loop(0, T // chunk, one, empty)

    def zeros(self, x: jax.Array, shape: tuple[int, ...], meta: AttentionMetadata) -> jax.Array:
        return attention.zeros(x, shape, meta)

    def take(self, x: jax.Array, start: jax.Array, tokens: int) -> jax.Array:
        return attention.take(x, start, tokens, self)

    def put(self, x: jax.Array, chunk: jax.Array, start: jax.Array) -> jax.Array:
        chunk = constrain(chunk, self.mesh, *attention.hidden_spec(x, self))
        return lax.dynamic_update_slice_in_dim(x, chunk, start, axis=1)

    def mix(self, y: jax.Array, share: jax.Array, maps: Any) -> jax.Array:
        """Run the experts of a layer on y [B, T, D]."""
        return experts.mix(y, share, maps, self)

    def by_rows(self, x: jax.Array) -> jax.Array:
        return constrain(x, self.mesh, self.rows(x.shape[0]))

    def pin_cache(self, source: KVCache) -> KVCache:
        return cache.with_cache_sharding(source)

    def replicated(self, x: jax.Array) -> jax.Array:
        return constrain(x, self.mesh)

    def to_devices(self, tree: Any) -> Any:
        return sharding.replicate(tree, self.mesh)
