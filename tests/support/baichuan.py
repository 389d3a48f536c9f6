"""A tiny random Baichuan checkpoint, in the published layout."""

from __future__ import annotations

import json

import safetensors.torch
import torch

V, D, F, L = 101, 48, 80, 2


def config(heads: int) -> dict:
    """The fields of Baichuan2-13B-Chat's config.json, small."""
    return {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "model_max_length": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def write(directory, heads: int):
    generator = torch.Generator().manual_seed(heads)

    def noise(*shape, scale):
        return scale * torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": noise(V, D, scale=0.35), "model.norm.weight": 1 + noise(D, scale=0.2)}
    tensors["lm_head.weight"] = noise(V, D, scale=1.0) * torch.linspace(0.2, 5.0, V)[:, None]
    for i in range(L):
        shapes = {
            "self_attn.W_pack": (3 * D, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        layer = {name: noise(*shape, scale=1.2 / shape[1] ** 0.5) for name, shape in shapes.items()}
        layer |= {name: 1 + noise(D, scale=0.2) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"model.layers.{i}.{name}.weight": x for name, x in layer.items()}
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(heads)))
    return tensors
