"""Qwen1.5, 2 and 2.5 (`qwen2`: biases on q, k, v) and dense Qwen3 (`qwen3`: normed q and k)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import huggingface
from .config import ModelConfig

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_HEAD_DIM = 128  # Qwen3's default; Qwen2's is the width divided by the heads

names = huggingface.tensors


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json; refuse a sliding window that a layer uses."""
    hf = {**_DEFAULTS, **hf}
    if hf["use_sliding_window"] and _sliding_layers(hf):
        huggingface.refuse_window(hf, hf["sliding_window"])
    if hf["model_type"] == "qwen2":
        return huggingface.decoder(hf, qkv_bias=True)
    bias = bool(hf.get("attention_bias", False))
    if hf.get("head_dim") is None:
        hf["head_dim"] = _HEAD_DIM
    return huggingface.decoder(hf, qkv_bias=bias, output_bias=bias, qk_norm=True)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    own: dict[str, Any] = {"use_sliding_window": False}
    if config.family == "qwen3":
        own["attention_bias"] = config.qkv_bias
    return huggingface.fields(config, ARCHITECTURES[config.family]) | own


def _sliding_layers(hf: Mapping[str, Any]) -> bool:
    """Return whether any layer has a sliding window: by `layer_types`, otherwise from layer `max_window_layers` on."""
    if hf.get("layer_types"):
        return "sliding_attention" in hf["layer_types"]
    return (hf["max_window_layers"] or 0) < hf.get("num_hidden_layers", 0)
