"""Write a razor-mini checkpoint as a Hugging Face Llama folder: bfloat16 safetensors, no torch."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import typer
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from ..models.config import ModelConfig
from . import training, vocabulary
from .text import ASSETS


def export(folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    """Write model, config, tokenizer and generation config; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary.special_ids(tokenizer)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = pathlib.Path(scratch)
        save_file(tensors(config, params), made / "model.safetensors", metadata={"format": "pt"})
        _write_json(made / "config.json", llama_config(config, ids))
        stops = [ids[vocabulary.END], ids[vocabulary.EOS]]
        generation = {"bos_token_id": ids[vocabulary.BOS], "eos_token_id": stops, "pad_token_id": stops[1]}
        _write_json(made / "generation_config.json", generation)
        vocabulary.save(tokenizer, made, config.max_position_embeddings)
        for path in made.iterdir():
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)


def tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Checkpoint names -> bfloat16 arrays in torch's [out, in] layout."""
    D = config.hidden_size
    named = {
        "model.embed_tokens.weight": params["embedding"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    for layer in range(config.num_layers):
        block, prefix = params[f"blocks_{layer}"], f"model.layers.{layer}"
        named |= {
            f"{prefix}.input_layernorm.weight": block["attn_norm"]["scale"],
            f"{prefix}.post_attention_layernorm.weight": block["mlp_norm"]["scale"],
            f"{prefix}.self_attn.o_proj.weight": np.asarray(block["o"]["kernel"]).reshape(-1, D).T,
        }
        for name in ("q", "k", "v"):
            kernel = np.asarray(block[name]["kernel"])
            named[f"{prefix}.self_attn.{name}_proj.weight"] = kernel.reshape(D, -1).T
        for name in ("gate", "up", "down"):
            named[f"{prefix}.mlp.{name}_proj.weight"] = np.asarray(block[name]["kernel"]).T
    return {k: np.ascontiguousarray(np.asarray(v).astype(ml_dtypes.bfloat16)) for k, v in named.items()}


def read(folder: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    """The inverse of `tensors`: an exported folder's weights in the transformer's tree, float32."""
    D, K, G, H = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
    saved = {k: v.astype(np.float32) for k, v in load_file(folder / "model.safetensors").items()}
    params: dict[str, Any] = {
        "embedding": {"embedding": saved["model.embed_tokens.weight"]},
        "norm": {"scale": saved["model.norm.weight"]},
    }
    shapes = {"q": (D, K, G, H), "k": (D, K, H), "v": (D, K, H)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        block = {
            "attn_norm": {"scale": saved[f"{prefix}.input_layernorm.weight"]},
            "mlp_norm": {"scale": saved[f"{prefix}.post_attention_layernorm.weight"]},
            "o": {"kernel": saved[f"{prefix}.self_attn.o_proj.weight"].T.reshape(K, G, H, D)},
        }
        for name, shape in shapes.items():
            block[name] = {"kernel": saved[f"{prefix}.self_attn.{name}_proj.weight"].T.reshape(shape)}
        for name in ("gate", "up", "down"):
            block[name] = {"kernel": saved[f"{prefix}.mlp.{name}_proj.weight"].T}
        params[f"blocks_{layer}"] = block
    return params


def llama_config(config: ModelConfig, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": ids[vocabulary.END],
        "pad_token_id": ids[vocabulary.EOS],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(
    run: Annotated[pathlib.Path, typer.Option(help="Folder of a training run.")],
    output: Annotated[pathlib.Path, typer.Option(help="Model folder to write.")] = ASSETS / "razor-mini",
) -> None:
    """Export the newest checkpoint of RUN as a Hugging Face folder."""
    saved = run.resolve() / "checkpoints"
    if not saved.is_dir():
        raise typer.BadParameter(f"{saved} is missing; name a folder that train_mini wrote", param_hint="--run")
    with ocp.CheckpointManager(saved) as manager:
        step = manager.latest_step()
        if step is None:
            raise typer.BadParameter(f"{saved} holds no checkpoint yet; train longer", param_hint="--run")
        params = manager.restore(step, args=ocp.args.StandardRestore())["params"]
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    export(output, training.MINI, params, tokenizer)
    typer.echo(f"step {step} -> {output}")


if __name__ == "__main__":
    typer.run(main)
