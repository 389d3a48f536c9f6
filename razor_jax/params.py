"""Everything a call needs in one pytree: weights, and the static facts about them.

Weights are held with each layer's retrieval heads first, so that the two head groups are static slices
at run time and never gathers. Nobody sees it: splits, scores and saved checkpoints are in the
checkpoint's own order, and `with_heads(params, None)` gives it back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from .config import HeadSplit, RazorConfig, check_split
from .kernels.backend import Implementation
from .models.config import ModelConfig
from .models.transformer import Transformer
from .tokenizer import Assets

# Which axis of which weight runs over KV heads.
_KV_HEAD_AXIS = {
    ("q", "kernel"): 1,
    ("q", "bias"): 0,
    ("k", "kernel"): 1,
    ("k", "bias"): 0,
    ("v", "kernel"): 1,
    ("v", "bias"): 0,
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
    """

    weights: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    heads: HeadSplit | None = flax.struct.field(pytree_node=False, default=None)
    razor: RazorConfig | None = flax.struct.field(pytree_node=False, default=None)
    assets: Assets | None = flax.struct.field(pytree_node=False, default=None)
    implementation: Implementation | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def from_flax(cls, variables: Mapping[str, Any], config: ModelConfig, tokenizer: Assets | None = None) -> Params:
        """From linen variables of `models.transformer.Transformer`, `{"params": tree}` or the tree itself.

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
    def split(self) -> HeadSplit:
        """`heads`, or every head where nobody has said: dense attention."""
        return self.heads or HeadSplit.all(self.config.num_layers, self.config.num_kv_heads)


def abstract_weights(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The weight tree of a model as shapes, nothing allocated."""

    def init():
        tokens = jnp.zeros((1, 1), jnp.int32)
        rope = (jnp.zeros((1, 1, config.head_dim // 2)),) * 2
        states = (None,) * config.num_layers
        return Transformer(config).init(jax.random.key(0), tokens, rope, lambda q, k, v, s: (q, s), states)

    tree = nn.unbox(jax.eval_shape(init)["params"])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)


def with_heads(params: Params, split: HeadSplit | None) -> Params:
    """The same weights under another head split; None for none, in the checkpoint's order.

    Raises ValueError if the split was made for another architecture; warns if for other weights.
    """
    config = params.config
    if split is not None:
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
                "`razor-jax heads --model …`"
            )
        if split.weights and split.weights != weights_fingerprint(params):
            warnings.warn(
                "the head split was found on other weights of this architecture: right for a light fine-tune, "
                "else find the heads again with razor_jax.find_heads(params)",
                stacklevel=2,
            )
    weights = dict(params.weights)
    target = split or HeadSplit.all(config.num_layers, config.num_kv_heads)
    for layer in range(config.num_layers):
        move = _permutation(params.split.order(layer), target.order(layer))
        if move is not None:
            weights[f"blocks_{layer}"] = _permute(weights[f"blocks_{layer}"], move)
    return params.replace(weights=weights, heads=split)


def architecture_fingerprint(config: ModelConfig) -> str:
    """SHA-256 of the shapes and switches that decide what a KV head is."""
    fields = dataclasses.asdict(config)
    # Stretching the context or renaming the family changes no head.
    for name in ("rope", "family", "max_position_embeddings"):
        fields.pop(name)
    # Switches that are off by default and came later: other models keep their fingerprints.
    for name in ("alibi", "norm_head"):
        if not fields[name]:
            fields.pop(name)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(params: Params) -> str:
    """SHA-256 of samples of every layer, rounded to bfloat16: the same in each head order, and whether loaded as
    float32 or bfloat16. (float32 weights loaded as float16 are rounded twice, and may differ.)"""
    return hashlib.sha256(np.asarray(_sample_weights(params.weights)).tobytes()).hexdigest()


@jax.jit
def _sample_weights(weights: Any) -> jax.Array:
    """Strided samples of tensors that no head split permutes, bfloat16 [values]."""
    tensors = [weights["embedding"]["embedding"]]
    for name in sorted((n for n in weights if n.startswith("blocks_")), key=lambda n: int(n[7:])):
        tensors += [weights[name]["gate"]["kernel"], weights[name]["down"]["kernel"]]
    return jnp.concatenate(
        [t[:: max(1, t.shape[0] // 8), :: max(1, t.shape[1] // 8)].reshape(-1)[:_SAMPLES] for t in tensors]
    ).astype(jnp.bfloat16)


def _permutation(now: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray | None:
    """Indices that bring heads held as `now` into the order `target`; None where nothing moves."""
    if now == target:
        return None
    place = {head: index for index, head in enumerate(now)}
    return np.asarray([place[head] for head in target], np.int32)


def _permute(block: Mapping[str, Any], move: np.ndarray) -> dict[str, Any]:
    flat: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(dict(block)))
    for path, axis in _KV_HEAD_AXIS.items():
        if path in flat:
            flat[path] = jnp.take(flat[path], move, axis=axis)
    return flax.traverse_util.unflatten_dict(flat)


def _check_tree(weights: Any, config: ModelConfig) -> None:
    want: dict[str, Any] = dict(flax.traverse_util.flatten_dict(abstract_weights(config), sep="/"))
    have: dict[str, Any] = dict(flax.traverse_util.flatten_dict(dict(weights), sep="/"))
    problems = [f"missing {name} {want[name].shape}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    problems += [
        f"{name} has shape {tuple(have[name].shape)}, expected {want[name].shape}"
        for name in sorted(want.keys() & have.keys())
        if tuple(have[name].shape) != want[name].shape
    ]
    problems += [
        f"{name} has type {have[name].dtype}, expected floating point"
        for name in sorted(want.keys() & have.keys())
        if not jnp.issubdtype(have[name].dtype, jnp.floating)
    ]
    if problems:
        raise ValueError("these weights do not fit the config:\n  " + "\n  ".join(problems))
