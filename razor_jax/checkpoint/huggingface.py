"""Hugging Face checkpoints: safetensors, one file or many with an index.

Tensors are read one at a time, each only in the parts that the devices of this process need, straight into their final
shape and type. safetensors reads bfloat16 into NumPy if ml_dtypes is installed, which JAX requires (seen with
safetensors 0.6 to 0.8). Pickles are never opened, because reading one can run code. An index names files inside its
folder only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import lax
from jax.experimental import multihost_utils

from .. import models
from ..config import HeadSplit
from ..files import read_json, write_json
from ..mesh import MeshPlacement
from ..models import CheckpointTensor, ModelConfig, tensor_names, write_config
from ..models.linear import Weights
from ..params import Params, stored_order
from ..sharding import MeshLike
from . import quantised
from .float8 import Float8
from .loader import Loader, Progress, float_type, fold

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_WEIGHTS = "model.safetensors"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers in old checkpoints that models compute themselves.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# Tensors of the common ways to quantise: GPTQ and AWQ, bitsandbytes, FP8 and compressed-tensors, MLX.
_QUANTISED = re.compile(r"\.(qweight|SCB|absmax|weight_scale(_inv)?|weight_packed|scales)$")
_EMBEDDING, _HEAD = "embedding/embedding", "head/kernel"
_PREFIX = "model."  # Name of the base model inside the language model; a base model's checkpoint lacks it.

_Slice = Any  # A stored tensor of safetensors, which has no public type.
_Found = Mapping[str, _Slice]  # tensor name -> stored tensor


def read(
    path: Path,
    dtype: Any,
    mesh: MeshLike,
    weights: Weights | None,
    split: HeadSplit | None,
    progress: Progress | None,
) -> Params:
    """Return the model of a folder. Arguments and errors are those of `checkpoint.read`."""
    hf, config = _config(path)
    with contextlib.ExitStack() as stack:
        found = _find_tensors(path, stack)
        _refuse_undeclared(path, hf, found)
        try:
            found = quantised.decode(hf, found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        _refuse_more_layers(path, config, found)
        config, tensors = _resolve_tie(config, found)
        _check(path, config, tensors, found)
        to = _dtype(dtype, hf, found[tensors[_EMBEDDING].name].get_dtype())
        loader = Loader(config, to, mesh, weights)
        total = sum(_bytes(found, stored) for stored in tensors.values())
        done = 0
        for name, stored in tensors.items():
            heads = _stored_order(name, split, loader.placement)
            fill = functools.partial(stored.read, found, heads=heads)
            loader.read(name, fill, _FLOATS[found[stored.names[0]].get_dtype()])
            done += _bytes(found, stored)
            if progress is not None:
                progress(done, total)
    return loader.params(split)


def read_config(path: Path) -> ModelConfig:
    """Return the config as config.json states it."""
    return _config(path)[1]


def _config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    if (path / ADAPTER).is_file():
        raise ValueError(_adapter(path))
    hf = read_json(path / "config.json", "it names the architecture; a Hugging Face checkpoint has one")
    try:
        config = models.read_config(hf)
        quantised.check(hf)
        return hf, config
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None


def _stored_order(name: str, split: HeadSplit | None, placement: MeshPlacement | None) -> tuple[int, ...] | None:
    """Return the order of KV heads in a layer's weights, None for the checkpoint's order."""
    layer = re.match(r"blocks_(\d+)/", name)
    return None if split is None or layer is None else stored_order(split, int(layer[1]), placement)


def _adapter(path: Path) -> str:
    adapter = read_json(path / ADAPTER, "it names the model that it adapts")
    merge = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{path}').merge_and_unload()"
        f".save_pretrained('{path}-merged')"
    )
    return (
        f"{path} is a PEFT adapter ({adapter.get('peft_type')}) of {adapter.get('base_model_name_or_path')!r}, not a "
        f'model: merge the two with python -c "{merge}" and load the result, or remove {ADAPTER} if the weights here '
        "are merged already"
    )


def _find_tensors(path: Path, stack: contextlib.ExitStack) -> dict[str, _Slice]:
    """Return the checkpoint's tensors by the names of a language model, from open files on `stack`."""
    files = _weight_map(path)
    shards = sorted(set(files.values())) or [path / _WEIGHTS]
    # An old copy of a tensor may remain in a shard that the index no longer names for it.
    found = {
        name: tensor for shard in shards for name, tensor in _open(shard, stack) if files.get(name, shard) == shard
    }
    if "embed_tokens.weight" not in found:
        return found
    return {(_PREFIX + name if not name.startswith("lm_head.") else name): tensor for name, tensor in found.items()}


def _weight_map(path: Path) -> dict[str, Path]:
    """Return the file of each tensor as the index states it, empty for a checkpoint of one file."""
    if (path / _WEIGHTS).is_file():
        return {}
    if not (path / INDEX).is_file():
        raise FileNotFoundError(_no_weights(path))
    names = read_json(path / INDEX, "it lists the weight files").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path / INDEX} has no weight_map of tensor and file names: copy or download it again")
    for name in sorted(set(names.values())):
        if not _is_inside(path, name):
            raise ValueError(
                f"{path / INDEX} names {name!r}, which is outside its folder and is not read: copy the file into the "
                "folder and correct the index, if you trust both"
            )
    files = {tensor: path / name for tensor, name in names.items()}
    absent = sorted({file.name for file in files.values() if not file.is_file()})
    if absent:
        raise FileNotFoundError(
            f"{path} is incomplete: its index names {len(set(files.values()))} weight files, and {len(absent)} are "
            f"missing ({fold(absent, ', ')}): {_fetch_rest(path)}"
        )
    return files


def _is_inside(path: Path, name: str) -> bool:
    """Return whether a file that the index names is in the folder, or among the files of the same Hub cache."""
    relative = PurePath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return False
    # A snapshot of the Hub cache is a folder of links: models--owner--name/snapshots/REVISION -> ../../blobs.
    folder, file = path.resolve(), (path / name).resolve()
    blobs = folder.parent.parent / "blobs"
    return file.is_relative_to(folder) or (folder.parent.name == "snapshots" and file.is_relative_to(blobs))


def _fetch_rest(path: Path) -> str:
    """Return how to get the missing files."""
    repository = path.absolute().parent.parent.name
    if path.absolute().parent.name == "snapshots" and repository.startswith("models--"):
        return f"where there is a network, `hf download {repository.removeprefix('models--').replace('--', '/', 1)}`"
    return "copy or download the rest of the checkpoint"


def _no_weights(path: Path) -> str:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        convert = (
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}', "
            f"use_safetensors=False).save_pretrained('{path}-safetensors')"
        )
        return (
            f"{path} has its weights as pickle ({', '.join(pickles)}), and reading a pickle can run any "
            "code that its author put there. If you trust it, convert it once with torch and transformers "
            f'and copy the tokenizer files beside the result: python -c "{convert}"'
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    has = f"; {', '.join(others)} is not in transformers' format" if others else ""
    return f"{path} has neither {_WEIGHTS} nor {INDEX}{has}"


def _open(shard: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, _Slice]]:
    try:
        handle = stack.enter_context(safetensors.safe_open(shard, framework="np"))
    except (safetensors.SafetensorError, OSError) as error:
        with shard.open("rb") as file:
            pointer = file.read(24).startswith(b"version https://git-lfs")
        cause = (
            "is a Git LFS pointer: run `git lfs pull` in its folder"
            if pointer
            else (f"is truncated or no safetensors file ({error}): copy or download it again")
        )
        raise ValueError(f"{shard} {cause}") from error
    for name in handle.keys():  # noqa: SIM118, it is no dictionary
        tensor = handle.get_slice(name)
        yield name, Float8(shard, name) if tensor.get_dtype() in Float8.TYPES else tensor


def _refuse_undeclared(path: Path, hf: Mapping[str, Any], found: _Found) -> None:
    """Refuse quantised weights that config.json says nothing about."""
    name = next(filter(_QUANTISED.search, found), None)
    if name is not None and not (hf.get("quantization_config") or hf.get("quantization")):
        raise ValueError(
            f"the weights in {path} are quantised ({name}), but config.json has no quantization_config that says how: "
            "copy the checkpoint's own config.json, or use the bfloat16 or float16 checkpoint that it was made from"
        )


def _refuse_more_layers(path: Path, config: ModelConfig, found: _Found) -> None:
    """Refuse a config.json that claims more layers than there are tensors, before each layer costs memory."""
    if config.num_layers > len(found):
        raise ValueError(
            f"{path / 'config.json'} states num_hidden_layers={config.num_layers}, but the weight files hold only "
            f"{len(found)} tensors: copy or download the checkpoint again"
        )


def _resolve_tie(config: ModelConfig, found: _Found) -> tuple[ModelConfig, dict[str, CheckpointTensor]]:
    """Return config and tensors by transformers' rules for tied embeddings: one stored tensor serves for both, and two
    that differ stay two."""
    tensors = tensor_names(config)
    embedding, head = tensors[_EMBEDDING].name, _head_name(config)
    if not config.tie_embeddings or head not in found:
        return config, tensors
    if embedding not in found:
        tensors[_EMBEDDING] = dataclasses.replace(tensors[_EMBEDDING], name=head)
        return config, tensors
    if _equal(found, embedding, head):
        return config, tensors
    warnings.warn(
        f"config.json ties the embeddings, but {embedding} and {head} differ: both are used, untied",
        stacklevel=4,
    )
    config = dataclasses.replace(config, tie_embeddings=False)
    return config, tensor_names(config)


def _head_name(config: ModelConfig) -> str:
    return tensor_names(dataclasses.replace(config, tie_embeddings=False))[_HEAD].name


def _equal(found: _Found, one: str, other: str, rows: int = 4096) -> bool:
    """Return whether two stored matrices have the same values. One block of rows is in memory at a time."""
    a, b = found[one], found[other]
    # `_check` reports anything else.
    if a.get_shape() != b.get_shape() or len(a.get_shape()) != 2 or {a.get_dtype(), b.get_dtype()} - _FLOATS.keys():
        return False
    total = a.get_shape()[0]
    blocks = (slice(i, min(i + rows, total)) for i in range(0, total, rows))
    return all(np.array_equal(a[block], b[block]) for block in blocks)


def _check(path: Path, config: ModelConfig, tensors: Mapping[str, CheckpointTensor], found: _Found) -> None:
    wanted = {name: stored for stored in tensors.values() for name in stored.names}
    spare = {_head_name(config)} if config.tie_embeddings else set()
    extra = [name for name in found.keys() - wanted.keys() - spare if not _IGNORED.search(name)]
    problems = [f"missing {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    problems += [f"unexpected {name} {found[name].get_shape()}" for name in sorted(extra)]
    for name in sorted(wanted.keys() & found.keys()):
        tensor = found[name]
        if list(tensor.get_shape()) != list(wanted[name].shape):
            problems.append(f"{name} has shape {tensor.get_shape()}, expected {list(wanted[name].shape)}")
        if tensor.get_dtype() not in _FLOATS:
            problems.append(f"{name} has type {tensor.get_dtype()}, expected {', '.join(_FLOATS)}")
    if problems == [f"missing {_head_name(config)} {[config.vocab_size, config.hidden_size]}"]:
        raise ValueError(
            f"{path} is a base model without an output head ({_head_name(config)} is missing and config.json does not "
            "tie it to the embedding), which cannot generate: use the language model (ForCausalLM) that it belongs to"
        )
    if problems:
        raise ValueError(
            f"the tensors in {path} do not fit its config.json ({config.family}, {config.num_layers} "
            "layers):\n  " + fold(problems, "\n  ")
        )


def _bytes(found: _Found, stored: CheckpointTensor) -> int:
    each = int(np.prod(stored.shape)) // stored.parts
    return sum(each * jnp.dtype(_FLOATS[found[name].get_dtype()]).itemsize for name in stored.names)


def _dtype(asked: Any, hf: Mapping[str, Any], stored: str) -> np.dtype:
    """Return the type to load into: the requested one, config.json's, or that of the stored embedding."""
    declared = hf.get("dtype") or hf.get("torch_dtype")
    if asked is not None:
        return float_type(asked)
    name = str(declared or _FLOATS.get(stored, stored)).removeprefix("torch.")
    try:
        return float_type(name)
    except ValueError as error:
        raise ValueError(f"config.json states the type {name!r}: {error}") from None


def write(params: Params, folder: Path, shard_bytes: int) -> None:
    """Write config.json and weight files into `folder`. Every process takes part; process 0 writes."""
    if params.kernel_type:
        raise ValueError(
            f"these weights are {params.kernel_type}, which the Hugging Face format cannot store: save with "
            "format='orbax', or copy the checkpoint that they were loaded from"
        )
    assets = params.assets
    ends = list(assets.eos_ids) if assets else []
    about = {
        "torch_dtype": params.dtype.name,
        "bos_token_id": assets.bos_id if assets else None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    write_json(folder / "config.json", write_config(params.config) | about)
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(params.weights, sep="/"))
    # The parts of each tensor in order: a fused tensor has several, a tensor of an expert is one row of a weight.
    tensors: dict[str, list[tuple[CheckpointTensor, Any, int]]] = {}
    for path, stored in tensor_names(params.config).items():
        for row, name in enumerate(stored.names):
            tensors.setdefault(name, []).append((stored, flat[path], row))
    sizes = {name: sum(x.nbytes // len(stored.names) for stored, x, _ in parts) for name, parts in tensors.items()}
    groups = _group(sizes, shard_bytes)
    files = {}
    for i, names in enumerate(groups):
        file = _WEIGHTS if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        files |= dict.fromkeys(names, file)
        arrays = {}
        for name in names:
            parts = [stored.to_stored(_on_host(_one(stored, x, row))) for stored, x, row in tensors[name]]
            # Joined transposed tensors may stay transposed in memory, which safetensors writes as it is.
            arrays[name] = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        # transformers reads only files whose metadata names a framework.
        if jax.process_index() == 0:
            safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _one(stored: CheckpointTensor, x: jax.Array, row: int) -> jax.Array:
    """Return the weight x, or one expert's row of a stack."""
    return x if stored.count is None else lax.dynamic_index_in_dim(x, row, keepdims=False)


def _on_host(x: jax.Array) -> np.ndarray:
    """Return the whole array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _group(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the names in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
