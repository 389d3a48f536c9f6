"""Hugging Face checkpoints: the fields of config.json and the tensor names that all families share.

`config.json` is read as transformers 4 and 5 write it, with transformers' defaults for missing fields. A field that
changes the arithmetic in a way that `transformer.py` does not support is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import numpy as np

from .config import ModelConfig, Rope

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic")
# Fields of mixture-of-experts models, whose feed-forward differs if there is more than one expert.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """One weight in a checkpoint: the tensor's name, and how it becomes our array.

    `pattern` is an einops pattern, stored axes -> our axes; `sizes` are the lengths of its letters. If the tensor fuses
    `parts` weights on its first axis, this weight is number `part`. If the weight stacks the tensors of `count` experts
    on its first axis, the name has {} for the number of the expert, and the pattern is that of one.
    """

    name: str
    pattern: str
    sizes: Mapping[str, int]
    part: int = 0
    parts: int = 1
    count: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the checkpoint: one, or one per expert."""
        return (self.name,) if self.count is None else tuple(self.name.format(i) for i in range(self.count))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one whole tensor in the checkpoint: `[out, in]` for a projection."""
        axes = re.findall(r"\([^)]*\)|\S+", self.pattern.split("->")[0])
        first, *rest = (math.prod(self.sizes[letter] for letter in axis.strip("()").split()) for axis in axes)
        return (self.parts * first, *rest)

    def read(
        self, found: Mapping[str, Any], index: Sequence[slice], out: np.ndarray, heads: Sequence[int] | None = None
    ) -> None:
        """Write the part `index` of our array into `out`. No other bytes of the file are read.

        Args:
          found: the stored tensors by name, as safetensors slices.
          index: one slice per axis of our array.
          heads: KV heads in the order of our array, None for the checkpoint's order.
        """
        if self.count is None:
            # NumPy casts and transposes in one go ten times as slowly as one after the other.
            out[...] = self._read_one(found[self.name], index, heads).astype(out.dtype, copy=False)
            return
        for row, name in zip(out, self.names[index[0]], strict=True):
            row[...] = self._read_one(found[name], index[1:], None).astype(row.dtype, copy=False)

    def _read_one(self, tensor: Any, index: Sequence[slice], heads: Sequence[int] | None) -> np.ndarray:
        left, right = (re.findall(r"\([^)]*\)|\S+", side) for side in self.pattern.split("->"))
        order = {letter: np.arange(self.sizes[letter]) for letter in right}
        if heads is not None and "k" in order:
            order["k"] = np.asarray(heads)
        chosen = {letter: order[letter][part] for letter, part in zip(right, index, strict=True)}
        axes = []
        for axis in left:
            indices = np.zeros((), int)
            for letter in axis.strip("()").split():
                indices = indices[..., None] * self.sizes[letter] + chosen[letter]
            axes.append(_runs(indices.ravel()))
        rows = self.shape[0] // self.parts * self.part
        axes[0] = [slice(run.start + rows, run.stop + rows) for run in axes[0]]
        sizes = {letter: len(numbers) for letter, numbers in chosen.items()}
        return einops.rearrange(_gather(tensor, axes), self.pattern, **sizes)

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """Return the stored tensor, or its part of a fused tensor, from our whole array, or one expert's of it."""
        left, right = self.pattern.split("->")
        return einops.rearrange(x, f"{right.strip()} -> {left.strip()}")


def _runs(indices: np.ndarray) -> list[slice]:
    """Join ascending neighbours into slices: [4, 5, 6, 0, 1] -> 4:7, 0:2."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(indices, breaks)]


def _gather(tensor: Any, axes: Sequence[Sequence[slice]]) -> np.ndarray:
    """Read runs of a stored matrix or vector, and join them."""
    first, *rest = axes
    rows = []
    for run in first:
        blocks = [tensor[(run, *columns)] for columns in itertools.product(*rest)]
        rows.append(blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1))
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def tensors(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Map the linen path of every weight, joined by "/", to its tensor in the checkpoint."""
    c = config
    # v vocabulary, d model width, f feed-forward, k KV heads, g query heads per KV head, h head width.
    sizes = {
        "v": c.vocab_size,
        "d": c.hidden_size,
        "f": c.intermediate_size,
        "k": c.num_kv_heads,
        "g": c.group_size,
        "h": c.head_dim,
    }
    block = {
        "attn_norm/scale": ("input_layernorm.weight", "d -> d"),
        "q/kernel": ("self_attn.q_proj.weight", "(k g h) d -> d k g h"),
        "k/kernel": ("self_attn.k_proj.weight", "(k h) d -> d k h"),
        "v/kernel": ("self_attn.v_proj.weight", "(k h) d -> d k h"),
        "o/kernel": ("self_attn.o_proj.weight", "d (k g h) -> k g h d"),
        "mlp_norm/scale": ("post_attention_layernorm.weight", "d -> d"),
    }
    if c.qkv_bias:
        block["q/bias"] = ("self_attn.q_proj.bias", "(k g h) -> k g h")
        block["k/bias"] = ("self_attn.k_proj.bias", "(k h) -> k h")
        block["v/bias"] = ("self_attn.v_proj.bias", "(k h) -> k h")
    if c.output_bias:
        block["o/bias"] = ("self_attn.o_proj.bias", "d -> d")
    if c.qk_norm:
        block["q_norm/scale"] = ("self_attn.q_norm.weight", "h -> h")
        block["k_norm/scale"] = ("self_attn.k_norm.weight", "h -> h")
    mlp = {
        "gate/kernel": ("mlp.gate_proj.weight", "f d -> d f"),
        "up/kernel": ("mlp.up_proj.weight", "f d -> d f"),
        "down/kernel": ("mlp.down_proj.weight", "d f -> f d"),
    }
    if c.mlp_bias:
        mlp["gate/bias"] = ("mlp.gate_proj.bias", "f -> f")
        mlp["up/bias"] = ("mlp.up_proj.bias", "f -> f")
        mlp["down/bias"] = ("mlp.down_proj.bias", "d -> d")

    named = {"embedding/embedding": CheckpointTensor("model.embed_tokens.weight", "v d -> v d", sizes)}
    for i in range(c.num_layers):
        dense = block | (mlp if c.experts_of(i) is None else {})
        layer = {path: CheckpointTensor(name, pattern, sizes) for path, (name, pattern) in dense.items()}
        if c.experts_of(i) is not None:
            layer |= _expert_tensors(c, sizes)
        named |= {
            f"blocks_{i}/{path}": dataclasses.replace(tensor, name=f"model.layers.{i}.{tensor.name}")
            for path, tensor in layer.items()
        }
    named["norm/scale"] = CheckpointTensor("model.norm.weight", "d -> d", sizes)
    if not c.tie_embeddings:
        named["head/kernel"] = CheckpointTensor("lm_head.weight", "v d -> d v", sizes)
    return named


def _expert_tensors(config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, CheckpointTensor]:
    """Return the tensors of a layer's router and experts. e experts, f feed-forward width of an expert."""
    experts = config.experts
    assert experts is not None
    sizes = {**sizes, "e": experts.count, "f": experts.intermediate_size}
    stack = functools.partial(CheckpointTensor, sizes=sizes, count=experts.count)
    return {
        "router/kernel": CheckpointTensor("mlp.gate.weight", "e d -> d e", sizes),
        "expert_gate/kernel": stack("mlp.experts.{}.gate_proj.weight", "f d -> d f"),
        "expert_up/kernel": stack("mlp.experts.{}.up_proj.weight", "f d -> d f"),
        "expert_down/kernel": stack("mlp.experts.{}.down_proj.weight", "d f -> f d"),
    }


def decoder(
    hf: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm=False,
) -> ModelConfig:
    """Return the config of a Llama-like decoder; `hf` has the fields of config.json and the family's defaults.

    Raises ValueError if a field is missing, wrong or not supported, with its value and the supported ones.
    """
    missing = [field for field in _REQUIRED if field not in hf]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    _refuse_unsupported(hf)
    num_heads = hf["num_attention_heads"]
    num_kv_heads = num_heads if hf["num_key_value_heads"] is None else hf["num_key_value_heads"]
    head_dim = hf["hidden_size"] // num_heads if hf.get("head_dim") is None else hf["head_dim"]
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: rotary embedding rotates pairs")
    return ModelConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=hf["max_position_embeddings"],
        rope=_read_rope(hf),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def refuse_window(hf: Mapping[str, Any], window: int | None) -> None:
    """Raise ValueError if a sliding window hides tokens within the model's context.

    Such a model has not learned to look farther, and retrieval heads would make it do so.
    """
    if window is not None and window < hf["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window={window} is active and shorter than max_position_embeddings="
            f"{hf['max_position_embeddings']}: every layer must have full attention "
            "(sliding_window null, or at least max_position_embeddings)"
        )


def fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Return the fields of config.json that all families share, as transformers 4 and 5 both read them."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope(config.rope),
    }


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Raise ValueError if a field asks for arithmetic that `transformer.py` does not have."""
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported: use silu")
    for field in _EXPERTS:
        if (hf.get(field) or 0) > 1 and hf["model_type"] != "qwen3_moe":
            raise ValueError(
                f"{field}={hf[field]}: a mixture of experts is supported for qwen3_moe only, not for "
                f"{hf['model_type']}: use a dense model"
            )
    other = sorted(set(hf.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"layer_types has {', '.join(other)}, which is not supported: use full_attention")


def _read_rope(hf: Mapping[str, Any]) -> Rope:
    """Return the rotary embedding from either spelling, with the precedence and defaults of transformers."""
    given = {"rope_theta": hf.get("rope_theta"), "partial_rotary_factor": hf.get("partial_rotary_factor")}
    given |= hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported: use one of {', '.join(_ROPE_KINDS)}")
    if (given["partial_rotary_factor"] or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={given['partial_rotary_factor']} is not supported: use 1.0")
    trained = hf["max_position_embeddings"]
    if kind == "llama3" and _number(given, "low_freq_factor") >= _number(given, "high_freq_factor"):
        raise ValueError(
            f"high_freq_factor={given['high_freq_factor']} in config.json: must be above "
            f"low_freq_factor={given['low_freq_factor']}"
        )
    original = hf.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or trained
    rope = Rope(theta=float(given["rope_theta"] or 10_000.0), kind=kind)
    match kind:
        case "default":
            return rope
        case "linear":
            return dataclasses.replace(rope, factor=_number(given, "factor"))
        case "dynamic":
            # transformers stretches from max_position_embeddings and ignores the original length.
            return dataclasses.replace(rope, factor=_number(given, "factor"), original_max_position=trained)
        case "llama3":
            return dataclasses.replace(
                rope,
                factor=_number(given, "factor"),
                original_max_position=original,
                low_freq_factor=_number(given, "low_freq_factor"),
                high_freq_factor=_number(given, "high_freq_factor"),
            )
    factor = float(given.get("factor") or trained / original)
    truncate = given.get("truncate")
    return dataclasses.replace(
        rope,
        factor=factor,
        original_max_position=original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(given, factor),
        truncate=True if truncate is None else bool(truncate),
    )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """Return YaRN's factor on cos and sin: the given one, or by mscale and mscale_all_dim, or 0.1 ln(factor) + 1."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def _number(given: Mapping[str, Any], field: str) -> float:
    value = given.get(field)
    if value is None:
        kind = given.get("rope_type", given.get("type"))
        raise ValueError(f"{field}={value!r} in config.json: rope type {kind!r} needs a number")
    return float(value)


def _write_rope(rope: Rope) -> dict[str, Any] | None:
    original = {"original_max_position_embeddings": rope.original_max_position}
    match rope.kind:
        case "default":
            return None
        case "linear" | "dynamic":
            return {"rope_type": rope.kind, "factor": rope.factor}
        case "llama3":
            bands = {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
            return {"rope_type": "llama3", "factor": rope.factor} | original | bands
        case "yarn":
            ramp = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
            return (
                {"rope_type": "yarn", "factor": rope.factor}
                | original
                | ramp
                | {"attention_factor": rope.attention_factor}
            )
    raise ValueError(f"rope kind {rope.kind!r} is unknown: use one of {', '.join(_ROPE_KINDS)}")
