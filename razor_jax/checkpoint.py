"""Checkpoints on disk: Hugging Face safetensors in and out, and Orbax.

Tensors are read one at a time, straight into their final shape and type, so host memory stays near the
weights plus the largest tensor. No torch: safetensors' NumPy side reads bfloat16 by itself wherever
ml_dtypes is installed, which JAX requires (seen with safetensors 0.6 to 0.8).

Nothing is unpickled, for a pickle runs code. Nothing is left half-written: a checkpoint is written to a
folder beside its place and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from .models import ModelConfig, Rope, Stored, read_config, tensor_names, write_config
from .params import Params, abstract_weights, with_heads
from .tokenizer import Assets

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5_000_000_000

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ORBAX_RECORD = "razor_model.json"  # beside Orbax' own folder: what it cannot know
_ORBAX_WEIGHTS = "weights"
_ORBAX_VERSION = 1
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that old checkpoints carry and every model computes.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_EMBEDDING, _HEAD = "embedding/embedding", "head/kernel"

Progress = Callable[[int, int], None]
_Handle = Any  # safetensors.safe_open, which has no public type
_Found = Mapping[str, _Handle]  # tensor name -> the open file that holds it


def read(directory: str | os.PathLike[str], dtype: Any = None, progress: Progress | None = None) -> Params:
    """The model of a Hugging Face or Orbax folder, in the checkpoint's own head order.

    Args:
      directory: holds config.json with model.safetensors or a sharded index, or what `save` wrote.
      dtype: float32, bfloat16 or float16; None for the type that the checkpoint declares.
      progress: called after every tensor with bytes read and bytes in all.

    Raises FileNotFoundError or ValueError that says what is wrong with which file; all missing, unexpected
    and mis-shaped tensors come in one ValueError.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"checkpoint folder {str(path)!r} {what}")
    if (path / _ORBAX_RECORD).is_file():
        weights, config = _read_orbax(path, dtype, progress)
    else:
        weights, config = _read_huggingface(path, dtype, progress)
    return Params(weights=weights, config=config, assets=Assets.read(path))


def save(
    params: Params,
    directory: str | os.PathLike[str],
    format: Literal["huggingface", "orbax"] = "huggingface",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, config and tokenizer to a folder that `read` reads back exactly.

    Heads are written in the checkpoint's order. "huggingface" loads in transformers too, and is split into
    files of at most `shard_bytes` (a larger tensor is a file of its own); host memory is one such file.

    Raises FileExistsError where `directory` holds something and `overwrite` is not given.
    """
    if format not in ("huggingface", "orbax"):
        raise ValueError(f"format={format!r}: use 'huggingface' or 'orbax'")
    params = with_heads(params, None)
    with _written_whole(Path(directory).expanduser(), overwrite) as folder:
        if format == "orbax":
            _write_orbax(params, folder)
        else:
            _write_huggingface(params, folder, shard_bytes)
        if params.assets is not None:
            params.assets.write(folder)


# Hugging Face, in


def _read_huggingface(path: Path, dtype: Any, progress: Progress | None) -> tuple[Any, ModelConfig]:
    hf = _read_json(path / "config.json", "it names the architecture; a Hugging Face checkpoint has one")
    try:
        config = read_config(hf)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    with contextlib.ExitStack() as stack:
        found = {name: handle for shard in _shards(path) for name, handle in _open(shard, stack)}
        config, tensors = _resolve_tie(config, found)
        _check(path, config, tensors, found)
        to = _dtype(dtype, hf, found[tensors[_EMBEDDING].name].get_slice(tensors[_EMBEDDING].name).get_dtype())
        total = sum(_bytes(found, stored) for stored in tensors.values())
        done, flat = 0, {}
        for name, stored in tensors.items():
            flat[name] = _load(stored, found[stored.name], to)
            done += _bytes(found, stored)
            if progress is not None:
                progress(done, total)
    return flax.traverse_util.unflatten_dict(flat, sep="/"), config


def _load(stored: Stored, handle: _Handle, dtype: np.dtype) -> jax.Array:
    """One tensor, turned and cast on the host in a single pass: under jit it would be there twice."""
    view = stored.to_ours(handle.get_tensor(stored.name))
    ours = np.empty(view.shape, dtype)
    ours[...] = view
    del view
    # Waiting bounds the host copies in flight to one.
    return jax.block_until_ready(jnp.asarray(ours))


def _shards(path: Path) -> list[Path]:
    """The checkpoint's weight files."""
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    if not (path / _INDEX).is_file():
        raise FileNotFoundError(_no_weights(path))
    index = _read_json(path / _INDEX, "it lists the weight files")
    if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise ValueError(f"{path / _INDEX} has no weight_map: copy or download it again")
    shards = sorted({path / name for name in index["weight_map"].values()})
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{path / _INDEX} names {len(shards)} files, and {', '.join(absent)} not there: "
            "copy or download the rest of the checkpoint"
        )
    return shards


def _no_weights(path: Path) -> str:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        convert = (
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}', "
            f"use_safetensors=False).save_pretrained('{path}-safetensors')"
        )
        return (
            f"{path} holds its weights as pickle ({', '.join(pickles)}), and reading a pickle can run any "
            "code that its author put there. Where you trust it, convert it once with torch and transformers "
            f'and copy the tokenizer files beside the result: python -c "{convert}"'
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    has = f"; {', '.join(others)} is not in transformers' format" if others else ""
    return f"{path} has neither {_WEIGHTS} nor {_INDEX}{has}"


def _open(shard: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, _Handle]]:
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
        yield name, handle


def _resolve_tie(config: ModelConfig, found: _Found) -> tuple[ModelConfig, dict[str, Stored]]:
    """transformers' rules where config.json ties the embeddings: either tensor serves for both; two that
    differ stay two."""
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
    """Whether two stored matrices hold the same values; a block of rows in memory at a time."""
    a, b = found[one].get_slice(one), found[other].get_slice(other)
    # Anything else is `_check`'s to complain about.
    if a.get_shape() != b.get_shape() or len(a.get_shape()) != 2 or {a.get_dtype(), b.get_dtype()} - _FLOATS.keys():
        return False
    total = a.get_shape()[0]
    blocks = (slice(i, min(i + rows, total)) for i in range(0, total, rows))
    return all(np.array_equal(a[block], b[block]) for block in blocks)


def _check(path: Path, config: ModelConfig, tensors: Mapping[str, Stored], found: _Found) -> None:
    wanted = {stored.name: stored for stored in tensors.values()}
    spare = {_head_name(config)} if config.tie_embeddings else set()
    extra = [name for name in found.keys() - wanted.keys() - spare if not _IGNORED.search(name)]
    problems = [f"missing {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    problems += [f"unexpected {name} {found[name].get_slice(name).get_shape()}" for name in sorted(extra)]
    for name in sorted(wanted.keys() & found.keys()):
        tensor = found[name].get_slice(name)
        if list(tensor.get_shape()) != list(wanted[name].shape):
            problems.append(f"{name} has shape {tensor.get_shape()}, expected {list(wanted[name].shape)}")
        if tensor.get_dtype() not in _FLOATS:
            problems.append(f"{name} has type {tensor.get_dtype()}, expected {', '.join(_FLOATS)}")
    if problems:
        raise ValueError(
            f"the tensors in {path} do not fit its config.json ({config.family}, {config.num_layers} "
            "layers):\n  " + "\n  ".join(problems)
        )


def _bytes(found: _Found, stored: Stored) -> int:
    kind = _FLOATS[found[stored.name].get_slice(stored.name).get_dtype()]
    return int(np.prod(stored.shape)) // stored.parts * jnp.dtype(kind).itemsize


def _dtype(asked: Any, hf: Mapping[str, Any], stored: str) -> np.dtype:
    """The type to load into: as asked, else as config.json declares, else as the embedding is stored."""
    if asked is not None:
        name = str(asked) if isinstance(asked, str) else jnp.dtype(asked).name
    else:
        declared = hf.get("dtype") or hf.get("torch_dtype")
        name = str(declared or _FLOATS.get(stored, stored)).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported: pass dtype= one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def _read_json(file: Path, role: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {role}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


# Hugging Face, out


def _write_huggingface(params: Params, folder: Path, shard_bytes: int) -> None:
    assets = params.assets
    ends = list(assets.eos_ids) if assets else []
    about = {
        "torch_dtype": params.dtype.name,
        "bos_token_id": assets.bos_id if assets else None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    _write_json(folder / "config.json", write_config(params.config) | about)
    flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(params.weights, sep="/"))
    # A tensor's parts, where it fuses weights; they are listed in order.
    tensors: dict[str, list[tuple[Stored, Any]]] = {}
    for path, stored in tensor_names(params.config).items():
        tensors.setdefault(stored.name, []).append((stored, flat[path]))
    sizes = {name: sum(x.nbytes for _, x in parts) for name, parts in tensors.items()}
    groups = _group(sizes, shard_bytes)
    files = {}
    for i, names in enumerate(groups):
        file = _WEIGHTS if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        files |= dict.fromkeys(names, file)
        arrays = {}
        for name in names:
            parts = [stored.to_stored(np.asarray(x)) for stored, x in tensors[name]]
            # Joining turned tensors may leave them turned, and safetensors writes memory as it lies.
            arrays[name] = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        # transformers reads only files that say which framework's layout they hold.
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(groups) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _group(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, a new group wherever the next tensor would pass `limit` bytes."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


# Orbax


def _read_orbax(path: Path, dtype: Any, progress: Progress | None) -> tuple[Any, ModelConfig]:
    record = _read_json(path / _ORBAX_RECORD, "it holds the model's config")
    if record.get("version") != _ORBAX_VERSION:
        raise ValueError(
            f"{path / _ORBAX_RECORD} has version {record.get('version')!r}, this razor_jax reads version "
            f"{_ORBAX_VERSION}"
        )
    try:
        config = ModelConfig(**(record["config"] | {"rope": Rope(**record["config"]["rope"])}))
        to = _dtype(dtype, record, record["dtype"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / _ORBAX_RECORD} is damaged: {error!r}") from error
    wanted = flax.traverse_util.flatten_dict(abstract_weights(config, to), sep="/")
    folder = path.absolute() / _ORBAX_WEIGHTS
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored: dict[str, Any] = dict(
                flax.traverse_util.flatten_dict(checkpointer.metadata(folder).item_metadata.tree, sep="/")
            )
            _check_orbax(path, wanted, stored)
            return flax.traverse_util.unflatten_dict(_restore(checkpointer, folder, wanted, progress), sep="/"), config
    except _Misfit:
        raise
    except Exception as error:  # Orbax raises a bare Exception where a file is damaged
        cause = error.__cause__ or error
        raise ValueError(f"Orbax cannot restore {folder}: {cause}; copy it again, or save the model again") from error


class _Misfit(ValueError):
    """Tensors that are not those of the recorded config."""


def _check_orbax(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    problems = [f"missing {name} {list(x.shape)}" for name, x in wanted.items() if name not in stored]
    problems += [f"unexpected {name} {list(stored[name].shape)}" for name in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(x.shape)}"
        for name, x in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(x.shape)
    ]
    if problems:
        raise _Misfit(f"the tensors in {path} do not fit its {_ORBAX_RECORD}:\n  " + "\n  ".join(problems))


def _restore(
    checkpointer: ocp.PyTreeCheckpointer, folder: Path, wanted: Mapping[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Weights, one tensor after the other: of many read at once one that fails leaves the others' readers
    behind, which then complain on stderr about an event loop that is gone."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in wanted.values())
    done, flat = 0, {}
    for name, x in wanted.items():
        item = flax.traverse_util.unflatten_dict(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)}, sep="/"
        )
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        flat[name] = flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=args), sep="/")[name]
        done += math.prod(x.shape) * x.dtype.itemsize
        if progress is not None:
            progress(done, total)
    return flat


def _write_orbax(params: Params, folder: Path) -> None:
    record = {
        "version": _ORBAX_VERSION,
        "dtype": params.dtype.name,
        "config": dataclasses.asdict(params.config),
    }
    _write_json(folder / _ORBAX_RECORD, record)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / _ORBAX_WEIGHTS, params.weights)
        checkpointer.wait_until_finished()


# Folders


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `path` that takes its place if the block ends well, and goes if it does not."""
    path = path.absolute()
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: choose another folder, or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, old = path.with_name(f".{path.name}.{mark}.partial"), path.with_name(f".{path.name}.{mark}.old")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
