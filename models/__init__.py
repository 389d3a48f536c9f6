"""Model families: one transformer for all, and a config reader and weight names per `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import baichuan, config_checks, llama, mistral, qwen, qwen_moe, smollm3
from .config import Experts, ModelConfig, Rope
from .huggingface import CheckpointTensor
from .transformer import Block, Transformer

__all__ = [
    "FAMILIES",
    "Block",
    "CheckpointTensor",
    "Experts",
    "ModelConfig",
    "Rope",
    "Transformer",
    "read_config",
    "tensor_names",
    "write_config",
]

# Each family module has three functions: `config`, its inverse `fields`, and `names`.
FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen3_moe": qwen_moe,
    "smollm3": smollm3,
    "baichuan": baichuan,
}
# Language models saved without their output head; with tied embeddings the embedding serves as one.
_BASE_MODELS = (
    *("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen3MoeModel", "SmolLM3Model", "BaichuanModel"),
)
_SUPPORTED = (
    "llama (Llama 2, 3, 3.1, 3.2, 3.3), mistral (full attention), qwen2 (Qwen1.5, 2, 2.5), qwen3, qwen3_moe, smollm3 "
    "and baichuan (13B)"
)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config of a checkpoint from the fields of its config.json.

    Raises ValueError if an architecture or a field is not supported, with its value and the supported ones.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported: use {_SUPPORTED}")
    config_checks.check(hf)
    architectures = hf.get("architectures") or []
    if architectures and not any(name.endswith("ForCausalLM") or name in _BASE_MODELS for name in architectures):
        raise ValueError(f"architectures={architectures} is not a language model: use one that ends in ForCausalLM")
    return FAMILIES[model_type].config(hf)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of the config.json from which `read_config` and transformers read `config`.

    Raises ValueError if Hugging Face's classes cannot express the config.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family={config.family!r} has no Hugging Face format: use {_SUPPORTED}")
    hf = FAMILIES[config.family].fields(config)
    back = read_config(hf)
    if back != config:
        raise ValueError(
            f"Hugging Face's {config.family} cannot express {config}: it would be read back as {back}; "
            "save with format='orbax' instead"
        )
    return hf


def tensor_names(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Map each weight's linen path, joined by "/", to the checkpoint's tensor."""
    return FAMILIES[config.family].names(config)
