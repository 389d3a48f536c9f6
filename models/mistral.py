"""Mistral with full attention: 7B v0.2 and later, Nemo, and their fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import huggingface
from .config import ModelConfig

ARCHITECTURE = "MistralForCausalLM"
_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}

names = huggingface.tensors


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json; refuse an active sliding window."""
    hf = {**_DEFAULTS, **hf}
    huggingface.refuse_window(hf, hf["sliding_window"])
    return huggingface.decoder(hf)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    return huggingface.fields(config, ARCHITECTURE) | {"sliding_window": None}
