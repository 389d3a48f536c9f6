"""Baichuan 13B and Baichuan2 13B: a Llama with ALiBi in place of rotary embedding, and q, k and v in one tensor.

The 7B models have the same `model_type` but rotary embedding, and are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import config_checks, huggingface
from .config import ModelConfig, Rope
from .huggingface import CheckpointTensor

ARCHITECTURE = "BaichuanForCausalLM"
_DEFAULTS = {"num_key_value_heads": None, "model_max_length": 4096}
_VOCABULARY_1 = 64_000  # the first Baichuan's, whose output head is not normed
_WIDTH_7B = 4096
# Only the code of the 7B models reads these fields; config.json has no other sign of rotary embedding.
_ROTARY = ("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config from the fields of config.json; refuse a model with rotary embedding (7B)."""
    config_checks.check(hf, {"model_max_length": config_checks.COUNT})
    hf = {**_DEFAULTS, **hf}
    rotary = [field for field in _ROTARY if hf.get(field) is not None]
    if rotary or hf.get("hidden_size") == _WIDTH_7B:
        field = rotary[0] if rotary else "hidden_size"
        raise ValueError(
            f"{field}={hf[field]!r}: this is a Baichuan 7B, with rotary embedding, which is not supported: use a 13B "
            "model, with ALiBi"
        )
    if hf["num_key_value_heads"] not in (None, hf.get("num_attention_heads")):
        raise ValueError(f"num_key_value_heads={hf['num_key_value_heads']}: baichuan has one KV head per query head")
    if hf.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings=True: baichuan does not tie its output head")
    read = huggingface.decoder({**hf, "max_position_embeddings": hf["model_max_length"]})
    return dataclasses.replace(read, rope=Rope(), alibi=True, norm_head=read.vocab_size != _VOCABULARY_1)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json."""
    own = huggingface.fields(config, ARCHITECTURE) | {"model_max_length": config.max_position_embeddings}
    return {name: value for name, value in own.items() if name not in _ROTARY}


def names(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Return Llama's tensors, with q, k and v as parts of one tensor in this order."""
    named = huggingface.tensors(config)
    for path, tensor in named.items():
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            if tensor.name.endswith(f"{name}.weight"):
                fused = tensor.name.replace(name, "W_pack")
                named[path] = dataclasses.replace(tensor, name=fused, part=part, parts=3)
    return named
