"""SmolLM3 (`smollm3`): a Llama with no rotary embedding in every fourth layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import huggingface, llama
from .config import ModelConfig

ARCHITECTURE = "SmolLM3ForCausalLM"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rope_theta": 2_000_000.0,
    "no_rope_layer_interval": 4,
}

names = huggingface.tensors


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json; refuse a sliding window that a layer uses."""
    hf = {**_DEFAULTS, **hf}
    if hf.get("use_sliding_window"):
        huggingface.refuse_window(hf, hf.get("sliding_window"))
    read = llama.config(hf)
    flags, interval = hf.get("no_rope_layers"), hf["no_rope_layer_interval"]
    if flags is None:
        flags = [(layer + 1) % interval for layer in range(read.num_layers)]
    if len(flags) < read.num_layers:
        raise ValueError(f"no_rope_layers has {len(flags)} entries: must have one for each of {read.num_layers} layers")
    return dataclasses.replace(read, nope_layers=tuple(i for i in range(read.num_layers) if not flags[i]))


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    flags = [int(layer not in config.nope_layers) for layer in range(config.num_layers)]
    # transformers' default padding id is one of SmolLM3-3B's vocabulary.
    own = {"architectures": [ARCHITECTURE], "no_rope_layers": flags, "pad_token_id": None}
    return llama.fields(config) | own
