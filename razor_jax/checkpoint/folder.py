"""Checkpoints on disk: Hugging Face safetensors in and out, and Orbax.

Tensors are read one at a time, on a mesh only the parts that this process' devices hold, so host memory stays near
the largest tensor's. No torch. Nothing is left half-written: a checkpoint is written to a folder beside its place and
renamed when it is whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from ..config import HeadSplit, check_split
from ..files import atomic_directory
from ..models import ModelConfig
from ..models.linear import Weights
from ..params import Params, with_heads
from ..sharding import MeshLike
from ..tokenizer.assets import Assets
from . import gguf
from . import huggingface as checkpoint_huggingface
from . import orbax as checkpoint_orbax
from .loader import Progress

log = logging.getLogger("razor_jax")

SHARD_BYTES = 5_000_000_000


def read(
    directory: str | os.PathLike[str],
    dtype: Any = None,
    progress: Progress | None = None,
    *,
    mesh: MeshLike = None,
    weights: Weights | None = None,
    split: HeadSplit | None = None,
) -> Params:
    """Return the model of a Hugging Face or Orbax folder, or of a GGUF file.

    Args:
      directory: holds config.json with model.safetensors or a sharded index, or what `save` wrote.
      dtype: float32, bfloat16 or float16; None for the type that the checkpoint declares.
      progress: called after every tensor with bytes read and bytes in all.
      mesh: the devices that hold the weights, as `sharding.make_mesh` takes it; None for the default device.
      weights: "int8" or "int4" to quantise kernels (`models/linear.py`).
      split: the order of heads, as `with_heads` would make it, but nothing moves afterwards; None for the checkpoint's
        order. `with_heads` checks whether it was made for these weights.

    Raises FileNotFoundError or ValueError that says what is wrong with which file; all missing, unexpected and
    mis-shaped tensors come in one ValueError. ValueError also, before any weight is read, for a mesh that does not
    take the devices, and for weights that do not fit into them.
    """
    path = _folder(directory)
    config = read_config(path)
    if split is not None:
        check_split(split, config.num_layers, config.num_kv_heads)
    # A wrong one fails before weights are read.
    assets = gguf.read_assets(path) if path.is_file() else Assets.read(path)
    if beyond := [token for token in assets.eos_ids if token >= config.vocab_size]:
        log.warning(
            "%s: eos_token_id %s is outside the vocabulary of %d: it ends no answer", path, beyond, config.vocab_size
        )
    return _format(path).read(path, dtype, mesh, weights, split, progress).replace(assets=assets)


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Return the config of a Hugging Face or Orbax folder; the weights may still say that tied embeddings are not."""
    path = _folder(directory)
    return _format(path).read_config(path)


def save(
    params: Params,
    directory: str | os.PathLike[str],
    format: Literal["huggingface", "orbax"] = "huggingface",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write weights, config and tokenizer to a folder that `read` reads back exactly, on any mesh.

    Heads are written in the checkpoint's order. "huggingface" loads in transformers too, and is split into
    files of at most `shard_bytes` (a larger tensor gets its own file); host memory is one such file. "orbax" is
    written by all processes at once, each its shards. Every process of a run calls this; process 0 calls
    `beside`, which may write more files into the folder before it takes its place.

    Raises FileExistsError where `directory` holds something and `overwrite` is not given.
    """
    if format not in ("huggingface", "orbax"):
        raise ValueError(f"format={format!r}: use 'huggingface' or 'orbax'")
    params = with_heads(params, None)
    with atomic_directory(Path(directory).expanduser(), overwrite) as folder:
        if format == "orbax":
            checkpoint_orbax.write(params, folder)
        else:
            checkpoint_huggingface.write(params, folder, shard_bytes)
        if jax.process_index() == 0:
            if params.assets is not None:
                params.assets.write(folder)
            if beside is not None:
                beside(folder)


def _folder(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory).expanduser()
    file = gguf.find_file(path)
    if file is not None:
        return file
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"checkpoint folder {str(path)!r} {what}")
    return path


def _format(path: Path) -> Any:
    """Return the module that reads a folder or a GGUF file."""
    if path.is_file():
        return gguf
    return checkpoint_orbax if (path / checkpoint_orbax.RECORD).is_file() else checkpoint_huggingface
