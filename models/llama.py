"""Llama 2, 3, 3.1, 3.2, and checkpoints that share their architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import huggingface
from .config import ModelConfig

ARCHITECTURE = "LlamaForCausalLM"
_DEFAULTS = {"num_key_value_heads": None, "max_position_embeddings": 2048}

names = huggingface.tensors


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json."""
    attention_bias = bool(hf.get("attention_bias", False))
    return huggingface.decoder(
        {**_DEFAULTS, **hf},
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return huggingface.fields(config, ARCHITECTURE) | own
