"""Orbax checkpoints: the weights in an Orbax folder, and a record of everything else beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import flax.traverse_util
import jax

from ..config import HeadSplit
from ..files import read_json, write_json
from ..models import Experts, ModelConfig, Rope
from ..models.linear import Weights
from ..params import Params
from ..sharding import MeshLike
from .loader import Loader, Progress, float_type, fold

RECORD = "razor_model.json"
_WEIGHTS = "weights"
_VERSION = 1


def read(
    path: Path,
    dtype: Any,
    mesh: MeshLike,
    weights: Weights | None,
    split: HeadSplit | None,
    progress: Progress | None,
) -> Params:
    """Return the model of a folder, with the arguments and errors of `checkpoint.read`."""
    record, config = _config(path)
    loader = Loader(
        config,
        float_type(record["dtype"] if dtype is None else dtype),
        mesh,
        weights,
        record.get("weights"),
        record.get("origin"),
    )
    folder = path.absolute() / _WEIGHTS
    import orbax.checkpoint as ocp  # late, because the import is slow and few models need it

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored: dict[str, Any] = dict(
                flax.traverse_util.flatten_dict(checkpointer.metadata(folder).item_metadata.tree, sep="/")
            )
            _check(path, loader.targets, stored)
            _restore(checkpointer, folder, loader, split, progress)
    except _Misfit:
        raise
    except Exception as error:  # Orbax raises a bare Exception for a damaged file
        cause = error.__cause__ or error
        raise ValueError(f"Orbax cannot restore {folder}: {cause}; copy it again, or save the model again") from error
    return loader.params(split)


def read_config(path: Path) -> ModelConfig:
    """Return the model config from the record."""
    return _config(path)[1]


def write(params: Params, folder: Path) -> None:
    """Write record and weights into `folder`. Every process calls this and writes its shards."""
    record = {
        "version": _VERSION,
        "dtype": params.dtype.name,
        "config": dataclasses.asdict(params.config),
    }
    if params.kernel_type:
        record |= {"weights": params.kernel_type, "origin": params.origin}
    write_json(folder / RECORD, record)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / _WEIGHTS, params.weights)
        checkpointer.wait_until_finished()


def _config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    record = read_json(path / RECORD, "it describes the model")
    if record.get("version") != _VERSION:
        raise ValueError(
            f"{path / RECORD} has version {record.get('version')!r}, this razor_jax reads version {_VERSION}"
        )
    try:
        config = _model_config(record["config"])
        float_type(record["dtype"])
        if record.get("weights") not in (None, *get_args(Weights)):
            raise KeyError(f"weights of type {record['weights']!r}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / RECORD} is damaged: {error!r}; save the model again") from error
    return record, config


def _model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the config of `dataclasses.asdict`, after JSON made lists of its tuples."""
    parts: dict[str, Any] = {"rope": Rope(**fields["rope"]), "nope_layers": tuple(fields.get("nope_layers", ()))}
    if fields.get("experts") is not None:
        experts = fields["experts"]
        parts["experts"] = Experts(**experts | {"dense_layers": tuple(experts["dense_layers"])})
    return ModelConfig(**{**fields, **parts})


class _Misfit(ValueError):
    """Error for tensors that do not match the recorded config."""


def _check(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    problems = [f"missing {name} {list(x.shape)}" for name, x in wanted.items() if name not in stored]
    problems += [f"unexpected {name} {list(stored[name].shape)}" for name in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(x.shape)}"
        for name, x in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(x.shape)
    ]
    if problems:
        raise _Misfit(f"the tensors in {path} do not fit its {RECORD}:\n  " + fold(problems, "\n  "))


def _restore(
    checkpointer: Any,
    folder: Path,
    loader: Loader,
    split: HeadSplit | None,
    progress: Progress | None,
) -> None:
    """Read the weights into the loader, one tensor at a time.

    If one of several concurrent reads failed, Orbax would leave the readers of the others running, which then print
    errors about a closed event loop.
    """
    import orbax.checkpoint as ocp

    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in loader.targets.values())
    done = 0
    for name, target in loader.targets.items():
        where = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        item = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=where)
        item = flax.traverse_util.unflatten_dict({name: item}, sep="/")
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        restored: dict[str, Any] = dict(
            flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=args), sep="/")
        )
        loader.put(name, restored[name], split)
        done += math.prod(target.shape) * target.dtype.itemsize
        if progress is not None:
            progress(done, total)
