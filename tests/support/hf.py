"""Tiny random Hugging Face checkpoints on disk, and transformers as the oracle that reads them."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
}
# Fields over SIZES without which a family's config class would make no tiny model with full attention.
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1},
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def write(directory: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A checkpoint of random weights, large enough that logits and attention vary; returns `directory`.

    `fields` go over SIZES into the family's config class.
    """
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**{**SIZES, **EXTRA.get(family, {}), **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1 or "embed" in name:
                weight.copy_(0.35 * noise)
            else:
                weight.copy_(1.2 * noise / weight.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(directory)
    return directory


def respell(directory: Path) -> None:
    """Rewrite config.json as transformers 4 did, without the fields that it left to defaults."""
    file = directory / "config.json"
    hf = json.loads(file.read_text())
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    hf["rope_scaling"] = None if rope["type"] == "default" else rope
    hf["torch_dtype"] = hf.pop("dtype")
    if hf["model_type"] != "qwen3" and hf["head_dim"] * hf["num_attention_heads"] == hf["hidden_size"]:
        del hf["head_dim"]
    if hf["model_type"] == "llama" and hf["num_key_value_heads"] == hf["num_attention_heads"]:
        del hf["num_key_value_heads"]
    file.write_text(json.dumps(hf))


def oracle(directory: Path) -> Any:
    """The checkpoint in transformers, float32, eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, V] of one row int [T], in one pass through a fresh copy: dynamic rope keeps state."""
    with torch.no_grad():
        return copy.deepcopy(model)(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()


def hidden_states(model: torch.nn.Module, tokens: np.ndarray) -> list[np.ndarray]:
    """[T, D] of one row: after the embedding, after each layer, the last one after the final norm."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens)[None].long(), use_cache=False, output_hidden_states=True)
    return [x[0].numpy() for x in out.hidden_states]


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Settings, each a choice for every factor, in which every two choices of two factors meet.

    Greedy and deterministic: each setting starts from a pair still missing and takes, factor by factor,
    the choice that meets most of the others.
    """
    names = list(factors)

    def pairs(setting: dict) -> set:
        chosen = [(name, factors[name].index(setting[name])) for name in names if name in setting]
        return set(itertools.combinations(chosen, 2))

    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    settings = []
    while missing:
        setting = {name: factors[name][i] for name, i in min(missing)}
        for name in names:
            if name not in setting:
                setting[name] = max(factors[name], key=lambda c: len(pairs({**setting, name: c}) & missing))
        missing -= pairs(setting)
        settings.append({name: setting[name] for name in names})
    return settings
