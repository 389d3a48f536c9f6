"""Published models by name: config.json gives the built-in shapes, and tiny models of its fields equal transformers.

Only sizes are made small.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from razor_jax import functional
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.models import read_config
from razor_jax.planner import known

from ..support import hf

_LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _sizes(V: int, D: int, F: int, L: int, N: int, K: int, tokens: int) -> dict[str, Any]:
    return {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "max_position_embeddings": tokens,
    }


def _llama(*sizes: int) -> dict[str, Any]:
    fields = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": _LLAMA31_ROPE}
    biases = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": 128}
    return fields | biases | _sizes(*sizes)


def _distilled_qwen(theta: float, *sizes: int) -> dict[str, Any]:
    window = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 21}
    return {"model_type": "qwen2", "rope_theta": theta, "tie_word_embeddings": False} | window | _sizes(*sizes)


def _qwen3(theta: float, tied: bool, *sizes: int) -> dict[str, Any]:
    window = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 36}
    fields = {"model_type": "qwen3", "head_dim": 128, "rope_theta": theta, "tie_word_embeddings": tied}
    return fields | {"attention_bias": False, "rope_scaling": None, "rms_norm_eps": 1e-6} | window | _sizes(*sizes)


_EXPERTS = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(128256, 4096, 14336, 32, 32, 8, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _distilled_qwen(10000, 151936, 1536, 8960, 28, 12, 2, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _distilled_qwen(1000000.0, 152064, 5120, 27648, 64, 40, 8, 131072),
    "mistralai/Mistral-Nemo-Base-2407": {
        "model_type": "mistral",
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **_sizes(131072, 5120, 14336, 40, 32, 8, 131072),
    },
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(5000000, True, 151936, 2560, 9728, 36, 32, 8, 262144),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen3(10000000, False, 151936, 2048, 6144, 48, 32, 4, 262144) | _EXPERTS,
    "Qwen/Qwen3-Coder-30B-A3B": _qwen3(10000000, False, 151936, 2048, 5472, 48, 32, 4, 262144) | _EXPERTS,
    "HuggingFaceTB/SmolLM3-3B": {
        "model_type": "smollm3",
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        **_sizes(128256, 2048, 11008, 36, 16, 4, 65536),
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_config_json_gives_the_built_in_shapes(name):
    assert read_config(MODELS[name]) == known.CONFIGS[name]


def _tiny(name: str) -> dict[str, Any]:
    """Return the published fields with small sizes; query heads per KV head and the ratio of widths stay."""
    published = MODELS[name]
    group = published["num_attention_heads"] // published["num_key_value_heads"]
    width = published.get("head_dim", published["hidden_size"] // published["num_attention_heads"])
    share = published["hidden_size"] / (published["num_attention_heads"] * width)
    small = {"vocab_size": 101, "intermediate_size": 96, "num_hidden_layers": 5, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "hidden_size": round(2 * group * 16 * share)}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    own = {"no_rope_layers": [1, 1, 1, 0, 1]} if published["model_type"] == "smollm3" else {}
    return published | small | heads | {"head_dim": 16} | (experts if "num_experts" in published else {}) | own


# Tiny, these differ from another model in the group size or the base of the angles only.
ALIKE = {
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "Qwen/Qwen3-Coder-30B-A3B",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in MODELS])
def test_tiny_models_of_the_same_fields_equal_transformers(tmp_path, name, record_property):
    fields = _tiny(name)
    hf.write(tmp_path, fields.pop("model_type"), **fields)
    params = checkpoint.read(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 101, 90, np.int32)
    cache = functional.init_cache(params, batch=1, capacity=96, razor=None)
    got, _ = jax.jit(functional.extend, static_argnames="logits")(
        params, cache, tokens[None], np.asarray([90], np.int32), logits="all"
    )
    want = hf.logits(hf.oracle(tmp_path), tokens)
    worst = float(np.abs(np.asarray(got)[0] - want).max() / np.abs(want).max())
    record_property(f"{name.split('/')[1]}, tiny: largest logit error, share of the largest logit", worst)
    assert worst < 1e-4
