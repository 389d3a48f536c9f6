"""Configs of built-in models, and of any folder with a config.json."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from ..models import read_config
from ..models.config import Experts, ModelConfig, Rope

_LLAMA2 = Rope()
_LLAMA3 = Rope(500_000.0)
_LLAMA31 = Rope(500_000.0, "llama3", 8.0, 8192)
_LLAMA32 = Rope(500_000.0, "llama3", 32.0, 8192)
_MILLION = Rope(1_000_000.0)


def _llama(
    V: int, D: int, F: int, L: int, N: int, K: int, H: int, tokens: int, rope: Rope, tied: bool = False
) -> ModelConfig:
    return ModelConfig("llama", V, D, F, L, N, K, H, tokens, rope, rms_norm_eps=1e-5, tie_embeddings=tied)


def _mistral(V: int) -> ModelConfig:
    return ModelConfig("mistral", V, 4096, 14336, 32, 32, 8, 128, 32768, _MILLION, rms_norm_eps=1e-5)


def _qwen2(V: int, D: int, F: int, L: int, N: int, K: int, H: int, tied: bool = False, tokens: int = 32768):
    return ModelConfig("qwen2", V, D, F, L, N, K, H, tokens, _MILLION, tie_embeddings=tied, qkv_bias=True)


def _distill(V: int, D: int, F: int, L: int, N: int, K: int, theta: float) -> ModelConfig:
    return dataclasses.replace(_qwen2(V, D, F, L, N, K, 128, tokens=131072), rope=Rope(theta))


def _qwen3(D: int, F: int, L: int, N: int, tied: bool = False) -> ModelConfig:
    return ModelConfig("qwen3", 151936, D, F, L, N, 8, 128, 40960, _MILLION, tie_embeddings=tied, qk_norm=True)


def _qwen3_moe(D: int, F: int, L: int, N: int, expert: int) -> ModelConfig:
    experts = Experts(128, 8, expert, normalize=True)
    return ModelConfig("qwen3_moe", 151936, D, F, L, N, 4, 128, 40960, _MILLION, qk_norm=True, experts=experts)


def _of_2507(config: ModelConfig, theta: float) -> ModelConfig:
    """Return the shapes of the July 2025 release of a Qwen3 model."""
    return dataclasses.replace(config, max_position_embeddings=262144, rope=Rope(theta))


def _baichuan(V: int) -> ModelConfig:
    return ModelConfig("baichuan", V, 5120, 13696, 40, 40, 40, 128, 4096, alibi=True, norm_head=V != 64000)


_SMOLLM3 = ModelConfig(
    *("smollm3", 128256, 2048, 11008, 36, 16, 4, 128, 65536),
    rope=Rope(5_000_000.0),
    tie_embeddings=True,
    nope_layers=tuple(range(3, 36, 4)),
)

# Keyed by the Hugging Face id of the base model; its chat model has the same shapes.
CONFIGS = {
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 11008, 32, 32, 32, 128, 4096, _LLAMA2),
    "meta-llama/Llama-2-13b-hf": _llama(32000, 5120, 13824, 40, 40, 40, 128, 4096, _LLAMA2),
    "meta-llama/Llama-2-70b-hf": _llama(32000, 8192, 28672, 80, 64, 8, 128, 4096, _LLAMA2),
    "meta-llama/Meta-Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8, 128, 8192, _LLAMA3),
    "meta-llama/Meta-Llama-3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 8192, _LLAMA3),
    "meta-llama/Llama-3.1-8B": _llama(128256, 4096, 14336, 32, 32, 8, 128, 131072, _LLAMA31),
    "meta-llama/Llama-3.1-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 131072, _LLAMA31),
    "meta-llama/Llama-3.1-405B": _llama(128256, 16384, 53248, 126, 128, 8, 128, 131072, _LLAMA31),
    "meta-llama/Llama-3.2-1B": _llama(128256, 2048, 8192, 16, 32, 8, 64, 131072, _LLAMA32, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(128256, 3072, 8192, 28, 24, 8, 128, 131072, _LLAMA32, tied=True),
    "meta-llama/Llama-3.3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 131072, _LLAMA31),
    "mistralai/Mistral-7B-v0.2": _mistral(32000),
    "mistralai/Mistral-7B-v0.3": _mistral(32768),
    "mistralai/Mistral-Nemo-Base-2407": ModelConfig(
        "mistral", 131072, 5120, 14336, 40, 32, 8, 128, 131072, _MILLION, rms_norm_eps=1e-5
    ),
    "Qwen/Qwen2.5-0.5B": _qwen2(151936, 896, 4864, 24, 14, 2, 64, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(151936, 1536, 8960, 28, 12, 2, 128, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(151936, 2048, 11008, 36, 16, 2, 128, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(152064, 3584, 18944, 28, 28, 4, 128),
    "Qwen/Qwen2.5-14B": _qwen2(152064, 5120, 13824, 48, 40, 8, 128),
    "Qwen/Qwen2.5-32B": _qwen2(152064, 5120, 27648, 64, 40, 8, 128),
    "Qwen/Qwen2.5-72B": _qwen2(152064, 8192, 29568, 80, 64, 8, 128),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _distill(151936, 1536, 8960, 28, 12, 2, 10_000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _distill(152064, 3584, 18944, 28, 28, 4, 10_000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _distill(152064, 5120, 13824, 48, 40, 8, 1_000_000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _distill(152064, 5120, 27648, 64, 40, 8, 1_000_000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(128256, 4096, 14336, 32, 32, 8, 128, 131072, _LLAMA31),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 131072, _LLAMA31),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-4B-Instruct-2507": _of_2507(_qwen3(2560, 9728, 36, 32, tied=True), 5_000_000.0),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 768),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _of_2507(_qwen3_moe(2048, 6144, 48, 32, 768), 10_000_000.0),
    "Qwen/Qwen3-Coder-30B-A3B": _of_2507(_qwen3_moe(2048, 5472, 48, 32, 768), 10_000_000.0),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 1536),
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3,
    "baichuan-inc/Baichuan-13B-Base": _baichuan(64000),
    "baichuan-inc/Baichuan2-13B-Base": _baichuan(125696),
}


def find_config(model: str | os.PathLike[str]) -> ModelConfig:
    """Return the config of a built-in model or of a folder with a config.json; needs no weights.

    The owner in a built-in id is optional, and so is a chat model's suffix (-Instruct, -chat).
    Raises FileNotFoundError, with the built-in ids, for an unknown model, and ValueError for an unsupported
    config.json.
    """
    folder = Path(model).expanduser()
    file = folder / "config.json" if folder.is_dir() else folder
    if file.is_file():
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{file} is not a JSON object: give a model's config.json")
        return read_config(fields)
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} has no config.json")
    asked = _plain(str(model))
    for name, config in CONFIGS.items():
        if asked in (_plain(name), _plain(name.split("/")[1])):
            return config
    raise FileNotFoundError(
        f"{str(model)!r} is neither a folder nor a built-in model: download its config.json and give that folder, or "
        f"give one of {', '.join(CONFIGS)}"
    )


def _plain(name: str) -> str:
    """Return a model name in lower case, without the suffix of a base or chat model."""
    name = name.lower().replace("meta-llama-", "llama-")
    for ending in ("-hf", "-base", "-instruct", "-chat"):
        name = name.removesuffix(ending)
    return name
