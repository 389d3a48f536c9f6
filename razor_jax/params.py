"""Everything a call needs in one pytree: weights, and the static facts about them.

Weights have each layer's retrieval heads first, so that the two head groups are static slices
at run time and never gathers. Nobody sees it: splits, scores and saved checkpoints are in the
checkpoint's order, and `with_heads(params, None)` restores it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import HeadSplit, RazorConfig, check_split
from .kernels.backend import Implementation
from .models import FAMILIES, tensor_names
from .models.config import ModelConfig
from .models.linear import Weights, is_kernel, quantize_tree, scale_of, weights_type
from .models.transformer import Block, Transformer
from .tokenizer.assets import Assets

if TYPE_CHECKING:
    from .mesh.placement import MeshPlacement

# Which axis of which weight runs over KV heads.
_KV_HEAD_AXIS: dict[tuple[str, ...], int] = {
    ("q", "kernel"): 1,
    ("q", "bias"): 0,
    ("k", "kernel"): 1,
    ("k", "bias"): 0,
    ("v", "kernel"): 1,
    ("v", "bias"): 0,
    **{(name, "scale"): 0 for name in "qkv"},  # of int8 kernels
    **{(name, "group_scale"): 1 for name in "qkv"},  # of int4 kernels
    ("o", "group_scale"): 0,
    ("o", "kernel"): 0,
}
_SAMPLES = 64  # values of a tensor that the weight fingerprint reads


class Params(flax.struct.PyTreeNode):
    """A model ready to generate: one pytree, so it passes through jit, pmap and shardings.

    Attributes:
      weights: linen parameters, retrieval heads first in every layer.
      config: shapes.
      heads: which KV heads keep the whole cache, None if nobody has said.
      razor: cache policy recommended beside the checkpoint, None for the paper's.
      assets: tokenizer, chat template and stop ids, None for token arrays only.
      implementation: of attention and cache writes: "xla", "pallas_tpu", "pallas_gpu" or "mosaic_gpu"; None chooses by
        the device.
      origin: fingerprint of the float weights that int8 or int4 ones were made from, None for float weights.
      placement: how weights and caches are spread over a mesh, None for one device.
    """

    weights: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    heads: HeadSplit | None = flax.struct.field(pytree_node=False, default=None)
    razor: RazorConfig | None = flax.struct.field(pytree_node=False, default=None)
    assets: Assets | None = flax.struct.field(pytree_node=False, default=None)
    implementation: Implementation | None = flax.struct.field(pytree_node=False, default=None)
    origin: str | None = flax.struct.field(pytree_node=False, default=None)
    placement: MeshPlacement | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def from_flax(cls, variables: Mapping[str, Any], config: ModelConfig, tokenizer: Assets | None = None) -> Params:
        """Make params from linen variables of `models.transformer.Transformer`, `{"params": tree}` or the tree itself.

        Kernels may be int8 or int4 with their scales beside them, as `models.linear.quantize_tree` makes them.

        Raises ValueError that lists every missing, unexpected, mis-shaped and non-float array.
        """
        weights = variables.get("params", variables)
        _check_tree(weights, config)
        # Plain dictionaries whatever came in: a FrozenDict is another pytree, so another compilation.
        flat = {path: jnp.asarray(x) for path, x in flax.traverse_util.flatten_dict(dict(weights)).items()}
        return cls(weights=flax.traverse_util.unflatten_dict(flat), config=config, assets=tokenizer)

    @property
    def dtype(self) -> jnp.dtype:
        """The type in which the residual stream runs."""
        return self.weights["embedding"]["embedding"].dtype

    @property
    def kernel_type(self) -> Weights | None:
        """The type of quantised kernels, None for floats."""
        return weights_type([f"q/{name}" for name in self.weights["blocks_0"]["q"]])

    @property
    def heads_or_all(self) -> HeadSplit:
        """`heads`, or every head where nobody has said: dense attention."""
        return self.heads or HeadSplit.all(self.config.num_layers, self.config.num_kv_heads)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh (data, heads, rows) of weights and caches, None for one device."""
        return None if self.placement is None else self.placement.mesh

    def __repr__(self) -> str:
        c, split = self.config, self.heads
        count = sum(x.size for x in jax.tree.leaves(self.weights))
        kept = (
            "no head split"
            if split is None
            else f"{sum(split.counts)} of {c.num_layers * c.num_kv_heads} keep everything"
        )
        size = f"{c.num_layers} layers, {c.num_heads} query and {c.num_kv_heads} KV heads"
        kind = f"{self.dtype}, {self.kernel_type} kernels" if self.kernel_type else f"{self.dtype}"
        where = "" if self.placement is None else f", on {self.mesh and self.mesh.size} devices"
        return f"Params({c.family}: {count:,} parameters in {kind}; {size}; KV heads: {kept}{where})"

    def order(self, layer: int) -> tuple[int, ...]:
        """Return the layer's KV heads in the order of its weights."""
        return stored_order(self.heads_or_all, layer, self.placement)


def abstract_weights(config: ModelConfig, dtype: Any = jnp.float32, weights: Weights | None = None) -> Any:
    """Return the weight tree of a model as shapes, nothing allocated; `weights` for quantised kernels and their scales.

    Raises ValueError if int4 groups do not divide a width of the model.
    """

    def shapes(module: nn.Module, x: jax.ShapeDtypeStruct, **states: Any) -> Any:
        def init(x: jax.Array) -> Any:
            # Inside the trace: outside it an operation needs a device, and a compiler's topology has none.
            rope = (jnp.zeros((1, 1, config.head_dim // 2)),) * 2
            return module.init(jax.random.key(0), x, rope=rope, attend=lambda q, k, v, state: (q, state), **states)

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return nn.unbox(jax.eval_shape(init, x)["params"])

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.float32)
    # Layers of one kind are traced once.
    kinds = [config.first_like(layer) for layer in range(config.num_layers)]
    blocks = {kind: shapes(Block(config, kind), x, state=None) for kind in set(kinds)}
    tree = shapes(Transformer(dataclasses.replace(config, num_layers=0)), tokens, states=())
    tree |= {f"blocks_{layer}": blocks[kind] for layer, kind in enumerate(kinds)}
    tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)
    return jax.eval_shape(functools.partial(quantize_tree, weights=weights), tree) if weights else tree


def check_heads(params: Params, split: HeadSplit) -> None:
    """Raise ValueError if the split was made for another architecture."""
    config = params.config
    check_split(split, config.num_layers, config.num_kv_heads)
    if bool(split.scopes) != config.alibi and split.share < 1:
        raise ValueError(
            "an ALiBi model's heads are cut by scope, and only theirs are: razor_jax.heads.alibi.split(params) for "
            "ALiBi, razor_jax.find_heads(params).select() for rotary embedding"
        )
    if split.architecture and split.architecture != architecture_fingerprint(config):
        raise ValueError(
            f"the head split was made for another architecture (fingerprint {split.architecture[:12]}…, this "
            f"model's is {architecture_fingerprint(config)[:12]}…); find the heads of this model with "
            "`razor-jax heads find --model …`"
        )


def with_heads(params: Params, split: HeadSplit | None, *, donate: bool = False) -> Params:
    """Return the same weights under another head split; None for none, in the checkpoint's order.

    Weights stay on their devices and move one by one. `donate` frees each one that has moved, so that two copies of
    one tensor is the most there is; the given params are of no use after.

    Raises TypeError for anything else, ValueError if the split was made for another architecture; warns if for other
    weights.
    """
    config = params.config
    if not isinstance(split, HeadSplit | None):
        raise TypeError(
            f"split={split!r}: give a HeadSplit or None; razor_jax.load(model, heads=…) takes a file or 'auto'"
        )
    if split is not None:
        check_heads(params, split)
        if split.weights and split.weights != weights_fingerprint(params):
            warnings.warn(
                "the head split was found on other weights of this architecture: right for a light fine-tune, "
                "else find the heads again with razor_jax.find_heads(params)",
                stacklevel=2,
            )
    weights = dict(params.weights)
    held = params.replace(heads=split)
    for layer in range(config.num_layers):
        move = _permutation(params.order(layer), held.order(layer))
        if move is not None:
            weights[f"blocks_{layer}"] = _permute(weights[f"blocks_{layer}"], move, donate)
    return held.replace(weights=weights)


def architecture_fingerprint(config: ModelConfig) -> str:
    """Return the SHA-256 of the shapes and switches that decide what a KV head is."""
    fields = dataclasses.asdict(config)
    # Stretching the context or renaming the family changes no head.
    for name in ("rope", "family", "max_position_embeddings"):
        fields.pop(name)
    # Switches that are off by default and came later: other models keep their fingerprints.
    for name in ("alibi", "norm_head", "nope_layers", "experts"):
        if not fields[name]:
            fields.pop(name)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(params: Params) -> str:
    """Return the SHA-256 of samples of every layer, rounded to bfloat16: the same in each head order, and whether
    loaded as float32 or bfloat16. (float32 weights loaded as float16 are rounded twice, and may differ.)
    Quantised weights have the fingerprint of those that they were made from.
    """
    if params.origin is not None:
        return params.origin
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(params.weights, sep="/"))
    maps = [{"kernel": flat[path]} for path in sampled(params.config)]
    for path, linear in zip(sampled(params.config), maps, strict=True):
        if is_kernel(path) and params.kernel_type:
            scale = scale_of(path, params.kernel_type)
            linear[scale.split("/")[-1]] = flat[scale]
    return fingerprint(samples(maps, params.mesh))


def fingerprint_words(params: Params) -> np.ndarray:
    """Return the first 64 bits of `weights_fingerprint`, uint32 [2], which a cache carries."""
    return np.frombuffer(bytes.fromhex(weights_fingerprint(params)[:16]), ">u4").astype(np.uint32)


def sampled(config: ModelConfig) -> list[str]:
    """Return the weights that a fingerprint looks at, in order: none that a head split permutes."""
    prefixes = ("" if config.experts_of(layer) is None else "expert_" for layer in range(config.num_layers))
    layers = (
        f"blocks_{layer}/{prefix}{name}/kernel" for layer, prefix in enumerate(prefixes) for name in ("gate", "down")
    )
    return ["embedding/embedding", *layers]


def samples(maps: Sequence[Mapping[str, jax.Array]], mesh: Mesh | None) -> np.ndarray:
    """Return strided samples of kernels, their scales beside them where they are quantised: bfloat16 [values]."""
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return np.asarray(_samples(maps, everywhere))


def fingerprint(values: np.ndarray) -> str:
    """Return the SHA-256 of samples of all the weights that `sampled` names."""
    return hashlib.sha256(values.tobytes()).hexdigest()


@functools.partial(jax.jit, static_argnames="where")
def _samples(maps: Sequence[Mapping[str, jax.Array]], where: NamedSharding | None) -> jax.Array:
    def sample(linear: Mapping[str, jax.Array]) -> jax.Array:
        *experts, rows, columns = (slice(None, None, max(1, size // 8)) for size in linear["kernel"].shape)
        part = linear["kernel"][*experts, rows, columns].astype(jnp.float32)
        if "scale" in linear:
            part = part * linear["scale"][*experts, ..., columns]
        if "group_scale" in linear:
            scale, inputs = linear["group_scale"], linear["kernel"].shape[-2]
            groups = np.arange(inputs)[rows] // (inputs // scale.shape[-2])
            part = part * scale[*experts, :, columns].take(groups, axis=-2)
        return part.reshape(-1)[:_SAMPLES]

    values = jnp.concatenate([sample(linear) for linear in maps]).astype(jnp.bfloat16)
    return values if where is None else jax.lax.with_sharding_constraint(values, where)


def _permutation(now: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray | None:
    """Return indices that bring heads from the order `now` into `target`; None where nothing moves."""
    if now == target:
        return None
    place = {head: index for index, head in enumerate(now)}
    return np.asarray([place[head] for head in target], np.int32)


def stored_order(split: HeadSplit, layer: int, placement: MeshPlacement | None) -> tuple[int, ...]:
    """Return a layer's KV heads in the order of its weights: retrieval heads first, on a mesh first on each device."""
    return split.order(layer) if placement is None else placement.order(split, layer)


def in_order(name: str, weight: jax.Array, split: HeadSplit, placement: MeshPlacement | None) -> jax.Array:
    """Return a weight, named by its path joined by "/", with heads moved from the checkpoint's order into a split's.

    The weight is donated.
    """
    block, *path = name.split("/")
    axis = _KV_HEAD_AXIS.get(tuple(path))
    if axis is None:
        return weight
    order = stored_order(split, int(block.removeprefix("blocks_")), placement)
    move = _permutation(tuple(range(split.num_kv_heads)), order)
    return weight if move is None else _move(weight, move, axis, donate=True)


def _permute(block: Mapping[str, Any], move: np.ndarray, donate: bool) -> dict[str, Any]:
    flat: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(dict(block)))
    for path, axis in _KV_HEAD_AXIS.items():
        if path in flat:
            flat[path] = _move(flat[path], move, axis, donate)
    return flax.traverse_util.unflatten_dict(flat)


def _move(weight: jax.Array, move: np.ndarray, axis: int, donate: bool) -> jax.Array:
    where = getattr(weight, "sharding", None)  # a tracer has none
    where = where if isinstance(where, NamedSharding) else None
    moved = _take(weight, move, axis=axis, where=where)
    if donate:
        jax.block_until_ready(moved)
        weight.delete()
    return moved


@functools.partial(jax.jit, static_argnames=("axis", "where"))
def _take(weight: jax.Array, move: jax.Array, *, axis: int, where: NamedSharding | None) -> jax.Array:
    moved = jnp.take(weight, move, axis=axis)
    return moved if where is None else jax.lax.with_sharding_constraint(moved, where)


def _check_tree(weights: Any, config: ModelConfig) -> None:
    have: dict[str, Any] = dict(flax.traverse_util.flatten_dict(dict(weights), sep="/"))
    tree = abstract_weights(config, weights=weights_type(have))
    want: dict[str, Any] = dict(flax.traverse_util.flatten_dict(tree, sep="/"))
    problems = [f"missing {name} {want[name].shape}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if tuple(have[name].shape) != want[name].shape:
            problems.append(f"{name} has shape {tuple(have[name].shape)}, expected {want[name].shape}")
        expected = jnp.floating if jnp.issubdtype(want[name].dtype, jnp.floating) else want[name].dtype
        if not jnp.issubdtype(have[name].dtype, expected):
            kind = "floating point" if expected is jnp.floating else expected
            problems.append(f"{name} has type {have[name].dtype}, expected {kind}")
    if problems:
        raise ValueError("these weights do not fit the config:\n  " + "\n  ".join(problems))


def norms_fingerprint(params: Params) -> str:
    """Return the SHA-256 of all norm vectors in bfloat16: equal for the quantised files of one checkpoint.

    Quantisation leaves norms alone, and training does not.
    """
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params.weights):
        if x.ndim == 1 and "norm" in jax.tree_util.keystr(path):
            digest.update(np.asarray(x.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()


def nonfinite(params: Params) -> str:
    """Return why a model's logits may be infinite or NaN: the damaged tensors, or an overflow of float16."""
    tensors = tensor_names(params.config) if params.config.family in FAMILIES else {}
    weights: dict[str, Any] = dict(flax.traverse_util.flatten_dict(params.weights, sep="/"))
    found = [
        tensors[path].name.replace("{}", "*") if path in tensors else path
        for path, x in weights.items()
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all())
    ]
    if found := list(dict.fromkeys(found)):  # a fused tensor holds several weights
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = f"{', '.join(found[:3])}{more}"
        return f"the logits are not finite, because weights are not ({names}): fetch the checkpoint again"
    if params.dtype == jnp.float16:
        return "the logits are not finite: float16 overflows in this model; load it with dtype='bfloat16' or 'float32'"
    if params.dtype == jnp.float32:
        return (
            "the logits are not finite, though all weights are: the model overflows float32; fetch the checkpoint again"
        )
    return f"the logits are not finite, though all weights are ({params.dtype}): load the model with dtype='float32'"
