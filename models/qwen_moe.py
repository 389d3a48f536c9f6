"""Qwen3-MoE (`qwen3_moe`: 30B-A3B, Coder-30B-A3B, 235B-A22B): Qwen3's attention, and experts in most layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import huggingface
from .config import Experts, ModelConfig

ARCHITECTURE = "Qwen3MoeForCausalLM"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
_COUNT = 128  # experts

names = huggingface.tensors


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json; refuse a sliding window."""
    hf = {**_DEFAULTS, **hf}
    if hf.get("use_sliding_window"):
        huggingface.refuse_window(hf, hf["sliding_window"])
    bias = bool(hf.get("attention_bias", False))
    read = huggingface.decoder(hf, qkv_bias=bias, output_bias=bias, qk_norm=True)
    count = hf.get("num_local_experts", hf.get("num_experts", _COUNT))
    only, step = hf.get("mlp_only_layers") or (), hf["decoder_sparse_step"]
    dense = tuple(layer for layer in range(read.num_layers) if layer in only or (layer + 1) % step)
    if not count or len(dense) == read.num_layers:
        raise ValueError(f"num_experts={count}: no layer has experts; use model_type qwen3 for a dense model")
    if hf["num_experts_per_tok"] > count:
        raise ValueError(f"num_experts_per_tok={hf['num_experts_per_tok']} must be at most num_experts={count}")
    experts = Experts(count, hf["num_experts_per_tok"], hf["moe_intermediate_size"], hf["norm_topk_prob"], dense)
    return dataclasses.replace(read, experts=experts)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    experts = config.experts
    assert experts is not None
    return huggingface.fields(config, ARCHITECTURE) | {
        "use_sliding_window": False,
        "attention_bias": config.qkv_bias,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
    }
