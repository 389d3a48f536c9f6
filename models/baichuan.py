"""Baichuan 13B and Baichuan2 13B: a Llama with ALiBi in place of rotary embedding, and q, k and v in one tensor.

The 7B models have the same `model_type` and rotary embedding; they are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import huggingface
from .config import ModelConfig, Rope
from .huggingface import CheckpointTensor

ARCHITECTURE = "BaichuanForCausalLM"
_DEFAULTS = {"num_key_value_heads": None, "model_max_length": 4096}
_VOCABULARY_1 = 64_000  # of the first Baichuan, whose output head is a plain one
_WIDTH_7B = 4096
# What the 7B models' code reads and the 13B's does not know; config.json says it in no other way.
_ROTARY = ("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the fields of config.json; refuse a model with rotary embedding (7B)."""
    hf = {**_DEFAULTS, **hf}
    rotary = [field for field in _ROTARY if hf.get(field) is not None]
    if rotary or hf.get("hidden_size") == _WIDTH_7B:
        field = rotary[0] if rotary else "hidden_size"
        raise ValueError(
            f"{field}={hf[field]!r}: this is a Baichuan 7B, with rotary embedding, and is not supported: the 13B "
            "models, with ALiBi, are"
        )
    if hf["num_key_value_heads"] not in (None, hf.get("num_attention_heads")):
        raise ValueError(f"num_key_value_heads={hf['num_key_value_heads']}: baichuan has one KV head a query head")
    if hf.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings=True: baichuan has an output head of its own")
    read = huggingface.decoder({**hf, "max_position_embeddings": hf["model_max_length"]})
    return dataclasses.replace(read, rope=Rope(), alibi=True, norm_head=read.vocab_size != _VOCABULARY_1)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    own = huggingface.fields(config, ARCHITECTURE) | {"model_max_length": config.max_position_embeddings}
    return {name: value for name, value in own.items() if name not in _ROTARY}


def names(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Return Llama's tensors with q, k and v in one, in this order."""
    named = huggingface.tensors(config)
    for path, stored in named.items():
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            if stored.name.endswith(f"{name}.weight"):
                fused = stored.name.replace(name, "W_pack")
                named[path] = dataclasses.replace(stored, name=fused, part=part, parts=3)
    return named
