"""Write a razor-mini checkpoint as a Hugging Face folder (Llama or Qwen3): bfloat16 safetensors, no torch."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Annotated, Any

import flax.traverse_util
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import typer
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from razor_jax.models import tensor_names, write_config
from razor_jax.models.config import ModelConfig
from razor_jax.needles.text import ASSETS

from . import training, vocabulary


def export(folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    """Write model, config, tokenizer and generation config; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary.special_ids(tokenizer)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = pathlib.Path(scratch)
        save_file(tensors(config, params), made / "model.safetensors", metadata={"format": "pt"})
        _write_json(made / "config.json", hf_config(config, ids))
        stops = [ids[vocabulary.END], ids[vocabulary.EOS]]
        generation = {"bos_token_id": ids[vocabulary.BOS], "eos_token_id": stops, "pad_token_id": stops[1]}
        _write_json(made / "generation_config.json", generation)
        vocabulary.save(tokenizer, made, config.max_position_embeddings)
        for path in made.iterdir():
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)


def tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Map checkpoint names to bfloat16 arrays in torch's [out, in] layout."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {
        stored.name: np.ascontiguousarray(stored.to_stored(np.asarray(flat[path])).astype(ml_dtypes.bfloat16))
        for path, stored in tensor_names(config).items()
    }


def hf_config(config: ModelConfig, ids: dict[str, int]) -> dict[str, Any]:
    """Return the config.json of a LlamaForCausalLM or Qwen3ForCausalLM."""
    special = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.END, "pad_token_id": vocabulary.EOS}
    numbers = {field: ids[name] for field, name in special.items()}
    return {**write_config(config), **numbers, "torch_dtype": "bfloat16", "use_cache": True}


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(
    run: Annotated[pathlib.Path, typer.Option(help="Folder of a training run.")],
    output: Annotated[pathlib.Path, typer.Option("--out", help="Model folder to write.")] = ASSETS / "razor-mini",
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
    config = training.FAMILIES["qwen3" if "q_norm" in params["blocks_0"] else "llama"]
    if f"blocks_{config.num_layers - 1}" not in params:
        raise typer.BadParameter(f"step {step} is in a stage of fewer layers; train longer", param_hint="--run")
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    export(output, config, params, tokenizer)
    typer.echo(f"step {step} -> {output}")


if __name__ == "__main__":
    typer.run(main)
