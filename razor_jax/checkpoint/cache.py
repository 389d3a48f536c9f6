"""Compressed caches on disk: read a document once, answer questions about it in another process, on another mesh.

A folder contains `cache.json`, which describes the cache, and one Orbax checkpoint per layer with its head groups in
logical order: k, v [B, K_group, S, H] with slot g of a head at index g, and one mean per head, independent of the mesh.
S may be padded. Heads of a group are in the order of the split, those of a dense cache in the checkpoint's order.
The cache of another method (`methods`) is stored as it is, one array per leaf of a layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import cache as kv
from ..cache import CacheSpec, Group, KVCache, ring_length
from ..config import RazorConfig
from ..files import atomic_directory, read_json, write_json
from ..functional import cache_spec, check_cache, check_weights, placement_of
from ..mesh import relayout
from ..methods.engine import bind
from ..methods.record import from_record, to_record
from ..params import Params, architecture_fingerprint, fingerprint_words, weights_fingerprint
from ..sharding import nontrivial, replicate

RECORD = "cache.json"
_FORMAT, _VERSION = "razor_jax cache", 1
_ARRAYS = ("k", "v", "k_scale", "v_scale", "k_mean", "v_mean")
_SLOTS = {"k": 2, "v": 2, "k_scale": 3, "v_scale": 3}  # the axis of S


def save_cache(
    cache: KVCache,
    params: Params,
    directory: str | os.PathLike[str],
    *,
    pending: Sequence[Sequence[int]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cache to a folder that `load_cache` reads back bit for bit. Every process of a run calls this.

    Args:
      params: the params that the cache was made with.
      pending: per row, the tokens that were chosen but are not in the cache yet, such as the last of an answer.
        `load_pending` returns them, to be put before the next prompt.

    Raises FileExistsError if `directory` is not empty and `overwrite` is false, ValueError if the cache was made with
    other params.
    """
    if kv.deleted(cache):
        raise ValueError("this cache was consumed by a later call: save the cache that the call returned")
    check_cache(params, cache)
    check_weights(params, cache)
    record = _record(cache, params, pending)
    if pending is not None and len(pending) != cache.batch:
        raise ValueError(f"pending has {len(pending)} rows, the cache {cache.batch}: give one list of tokens per row")
    import orbax.checkpoint as ocp  # late, because the import is slow

    with (
        atomic_directory(Path(directory).expanduser(), overwrite) as folder,
        ocp.StandardCheckpointer() as checkpointer,
    ):
        for index, layer in enumerate(cache.layers):
            # Layer by layer, so that the devices store a reordered copy of only one layer.
            if cache.spec.method is None:
                groups = _logical(cache.replace(layers=(layer,)), _dense_order(params, cache.spec, index))
                arrays = {str(number): _arrays(g) for number, g in enumerate(groups)}
            else:
                arrays = {"0": _leaves(layer)}
            checkpointer.save(_layer(folder, index), arrays)
            checkpointer.wait_until_finished()
        write_json(folder / RECORD, record)


def load_cache(params: Params, directory: str | os.PathLike[str]) -> KVCache:
    """Return a saved cache, laid out for the devices of `params`, ready for `generate(params, …, cache=…)`.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged file or one that does not fit `params`:
    another architecture, other weights, another head split or other types.
    """
    path = Path(directory).expanduser()
    record = _read_record(path)
    spec = _spec(path, record, params)
    kinds = {"length": ("lengths", np.int32), "window": ("windows", np.int32), "overflow": ("overflow", bool)}
    rows = {name: _to_devices(np.asarray(record[key], kind), params) for name, (key, kind) in kinds.items()}
    batch, layers, cache = len(record["lengths"]), [], None
    rows["fingerprint"] = _to_devices(np.tile(fingerprint_words(params), (batch, 1)), params)
    if record["seen"] is not None:
        rows["seen"] = _to_devices(_seen(path, record["seen"], params.config.vocab_size), params)
    if spec.method is not None:
        return KVCache(_method_layers(path, spec, batch), spec=spec, **rows)
    # Shapes only: nothing is allocated.
    shapes = jax.eval_shape(lambda: [list(map(_arrays, layer)) for layer in kv.init(spec, batch).layers])
    for index, wanted in enumerate(shapes):
        arrays = _read_layer(path, index, wanted, spec, _dense_order(params, spec, index))
        groups = (
            Group(**(dict.fromkeys(_ARRAYS) | {name: _to_devices(x, params) for name, x in loaded.items()}), **static)
            for loaded, static in arrays
        )
        cache = KVCache((tuple(groups),), spec=spec, **rows)
        if params.placement is not None:
            cache = _distributed(cache, placement=params.placement)
        layers.append(cache.layers[0])
    assert cache is not None
    return cache.replace(layers=tuple(layers))


def load_pending(directory: str | os.PathLike[str]) -> tuple[tuple[int, ...], ...] | None:
    """Return each row's pending tokens as given to `save_cache`, None without them."""
    pending = _read_record(Path(directory).expanduser())["pending"]
    return None if pending is None else tuple(map(tuple, pending))


# The record


def _record(cache: KVCache, params: Params, pending: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    spec = cache.spec
    return {
        "format": _FORMAT,
        "version": _VERSION,
        **_fields(spec, params),
        "capacity": spec.capacity,
        "sinks": spec.sinks,
        "razor": None if spec.razor is None else dataclasses.asdict(spec.razor),
        "method": None if spec.method is None else to_record(spec.method.method),
        "longest_prompt": None if spec.method is None else spec.method.longest,
        "lengths": np.asarray(cache.length).tolist(),
        "windows": np.asarray(cache.window).tolist(),
        "overflow": np.asarray(cache.overflow).tolist(),
        "pending": None if pending is None else [[int(token) for token in row] for row in pending],
        "seen": None if cache.seen is None else [np.flatnonzero(row).tolist() for row in np.asarray(cache.seen)],
    }


def _fields(spec: CacheSpec, params: Params) -> dict[str, Any]:
    """Return the fields that must be equal when the cache is loaded."""
    return {
        "architecture": architecture_fingerprint(params.config),
        "weights": weights_fingerprint(params),
        # A dense cache is the same under every split; one of a method has its heads in the stored order.
        "retrieval_heads": [list(heads) for heads in spec.heads.retrieval] if spec.razor or spec.method else None,
        "scopes": [list(layer) for layer in spec.heads.scopes] if spec.razor else None,
        "dtype": spec.dtype,
        "windowed_dtype": spec.windowed_dtype or spec.dtype,
    }


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path / RECORD, "it describes the cache")
    if (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(
            f"{path / RECORD} has format {record.get('format')!r}, version {record.get('version')!r}; this razor_jax "
            f"reads {_FORMAT!r}, version {_VERSION}"
        )
    capacity, lengths = record.get("capacity"), record.get("lengths")
    rows = len(lengths) if isinstance(lengths, list) else 0
    sound: dict[str, Callable[[Any], bool]] = {
        "capacity": lambda x: type(x) is int and x > 0,
        "lengths": lambda x: rows > 0 and _all(x, int, rows) and all(0 <= length <= capacity for length in x),
        "windows": lambda x: _all(x, int, rows),
        "overflow": lambda x: _all(x, bool, rows),
        "pending": lambda x: x is None or (_all(x, list, rows) and all(_all(row, int, len(row)) for row in x)),
        "seen": lambda x: x is None or (_all(x, list, rows) and all(_all(row, int, len(row)) for row in x)),
    }
    record.setdefault("seen", None)  # caches of earlier versions do not know their tokens
    for name, valid in sound.items():
        if not valid(value := record.get(name, "missing")):
            raise _damaged(path, f"{name} is {_short(value)}, while lengths has {rows} rows")
    return record


def _seen(path: Path, rows: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
    """Return the tokens that each row has read, bool [B, V]."""
    seen = np.zeros((len(rows), vocabulary), bool)
    for row, tokens in zip(seen, rows, strict=True):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise _damaged(
                path, f"seen has token ids {min(tokens)} to {max(tokens)}, allowed are 0 to {vocabulary - 1}"
            )
        row[list(tokens)] = True
    return seen


def _all(values: Any, kind: type, count: int) -> bool:
    """Return whether `values` is a list of `count` values of exactly this type."""
    return isinstance(values, list) and len(values) == count and all(type(value) is kind for value in values)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path / RECORD} is damaged: {what}; save the cache again")


def _spec(path: Path, record: Mapping[str, Any], params: Params) -> CacheSpec:
    try:
        razor = None if record["razor"] is None else RazorConfig(**record["razor"])
        spec = dataclasses.replace(cache_spec(params, razor, record["capacity"]), placement=None)  # as stored
        if record.get("method") is not None:
            engine = bind(from_record(record["method"]), params, record["longest_prompt"])
            spec = dataclasses.replace(spec, method=engine)
        here = _fields(spec, params)
        differ = [name for name in here if here[name] != record[name]]
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(path, repr(error)) from error
    shown = [name for name in differ if name not in ("architecture", "weights")]  # those two are hashes
    differences = "; ".join(f"{name} {_short(record[name])}, here {_short(here[name])}" for name in shown)
    if shown != differ:
        maker = "a model of another architecture" if "architecture" in differ else "other weights of this architecture"
        raise ValueError(
            f"the cache in {path} was made by {maker}{differences and f' ({differences})'}: give the model that made "
            "it, or prefill again"
        )
    if differ:
        raise ValueError(
            f"the cache in {path} was made with other params: {differences}. Use the same model, head split and types, "
            "or prefill again"
        )
    # The ring lengths that the allocation allows; under a method, prompt lengths.
    least, most = spec.shortest_ring(0), spec.capacity if razor is None else ring_length(razor, spec.capacity)
    if spec.method is not None:
        least, most = 1, spec.method.longest
    for length, window in zip(record["lengths"], record["windows"], strict=True):
        unset = length == window == 0
        if not (unset or least <= window <= most):
            raise _damaged(path, f"a row of {length} tokens has window {window}, allowed are {least} to {most}")
    return spec


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:16]}…"


# Layers


def _layer(folder: Path, index: int) -> Path:
    return folder.absolute() / f"layer_{index:03d}"


def _dense_order(params: Params, spec: CacheSpec, layer: int) -> tuple[int, ...] | None:
    """Return the stored order of KV heads for a dense cache's only group, None if groups follow the split."""
    return params.order(layer) if spec.razor is None else None


_on_one_device = jax.jit(relayout.logical)
_distributed = jax.jit(relayout.distributed, static_argnames="placement")


def _logical(cache: KVCache, order: tuple[int, ...] | None) -> tuple[Group, ...]:
    """Return the groups of a one-layer cache in logical order."""
    layer = cache.layers[0] if cache.spec.placement is None else _on_one_device(cache).layers[0]
    if order is None or order == tuple(sorted(order)):
        return layer
    return jax.tree.map(lambda x: x[:, np.argsort(order)], layer)


def _arrays(group: Group) -> dict[str, Any]:
    return {name: x for name in _ARRAYS if (x := getattr(group, name)) is not None}


def _to_devices(x: np.ndarray, params: Params) -> jax.Array:
    """Copy an array to every device of `params`."""
    mesh = nontrivial(params.mesh)
    # Copy: on CPU the array could share the memory of `x`, and a cache is written in place.
    return jnp.array(x) if mesh is None else replicate(x, mesh)


def _read_layer(
    path: Path, index: int, wanted: Sequence[Mapping[str, Any]], spec: CacheSpec, order: tuple[int, ...] | None
) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Return each group's arrays in one-device layout, and its static fields."""
    folder, read = _layer(path, index), _read_arrays(_layer(path, index), wanted)
    groups = []
    for number, (_, windowed, scope) in enumerate(spec.groups(index)):
        used = min(spec.capacity, scope or (spec.windowed_slots if windowed else spec.capacity))
        arrays = {
            name: _fitted(f"{folder} cannot be read: {number}/{name}", x, wanted[number][name], _SLOTS.get(name), used)
            for name, x in read[str(number)].items()
        }
        if order is not None:
            arrays = {name: x[:, list(order)] for name, x in arrays.items()}
        groups.append((arrays, {"windowed": windowed, "scope": scope}))
    return groups


def _read_arrays(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of a layer's folder by group and name, which must be those that are wanted."""
    import orbax.checkpoint as ocp

    names = {str(number): dict.fromkeys(arrays, 0) for number, arrays in enumerate(wanted)}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            if jax.tree.structure(stored) != jax.tree.structure(names):
                raise ValueError(f"it has {_names(stored)}, but the record describes {_names(names)}")
            # One by one: if one of several concurrent reads fails, Orbax leaves the readers of the others running.
            return {group: {name: _read(checkpointer, folder, group, name) for name in names[group]} for group in names}
    except Exception as error:  # Orbax raises a bare Exception for a damaged file
        raise ValueError(f"{folder} cannot be read: {error.__cause__ or error}; save the cache again") from error


def _leaves(layer: Any) -> dict[str, jax.Array]:
    """Return the arrays of a method's layer by number. Orbax takes no empty ones."""
    return {str(number): x for number, x in enumerate(jax.tree.leaves(layer)) if x.size}


def _method_layers(path: Path, spec: CacheSpec, batch: int) -> tuple[tuple[Any, ...], ...]:
    """Return the layers of a method's cache."""
    layers = []
    for index, empty in enumerate(placement_of(spec).init(spec, batch).layers):
        folder, wanted = _layer(path, index), _leaves(empty)
        leaves, structure = jax.tree.flatten(empty)
        for name, x in _read_arrays(folder, [wanted])["0"].items():
            leaves[int(name)] = jnp.array(_fitted(f"{folder} cannot be read: 0/{name}", x, wanted[name], None, 0))
        layers.append(jax.tree.unflatten(structure, leaves))
    return tuple(layers)


def _read(checkpointer: Any, folder: Path, group: str, name: str) -> np.ndarray:
    import orbax.checkpoint as ocp

    restore = ocp.args.PyTreeRestore(
        item={group: {name: 0}},
        restore_args={group: {name: ocp.RestoreArgs(restore_type=np.ndarray)}},
        partial_restore=True,
    )
    return checkpointer.restore(folder, args=restore)[group][name]


def _fitted(what: str, x: np.ndarray, wanted: Any, slots: int | None, used: int) -> np.ndarray:
    """Return the array with the slot padding that this machine uses; check its shape and dtype."""
    want = list(wanted.shape)
    if slots is not None:
        want[slots] = max(used, x.shape[slots]) if x.ndim == 4 else used
    if list(x.shape) != want or x.dtype != wanted.dtype:
        raise ValueError(f"{what} is {x.dtype}{list(x.shape)}, expected {wanted.dtype}{want}")
    if slots is None:
        return x
    x = x[(slice(None),) * slots + (slice(wanted.shape[slots]),)]
    return np.pad(x, [(0, wanted.shape[axis] - x.shape[axis]) for axis in range(4)])


def _names(tree: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{group}/{name}" for group in sorted(tree) for name in sorted(tree[group]))
