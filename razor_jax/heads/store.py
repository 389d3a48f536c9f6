"""Head splits on disk: `razor.json`, in the folder of a checkpoint or in the cache folder of the user."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ..compilation import user_cache
from ..config import HeadSplit, RazorConfig
from ..files import write_text
from ..params import Params, architecture_fingerprint, norms_fingerprint, weights_fingerprint
from .promise import Promise

NAME = "razor.json"
SPLITS = Path(__file__).parents[1] / "assets" / "splits"  # measured splits of public models
FORMAT, VERSION = "razor_jax.heads", 1


@dataclasses.dataclass(frozen=True)
class HeadFile:
    """Contents of a razor.json: the split, a recommended cache policy, and the accuracy measured with both."""

    split: HeadSplit
    recommended: RazorConfig | None = None
    promise: Promise | None = None


def write(
    path: str | os.PathLike[str],
    split: HeadSplit,
    recommended: RazorConfig | None = None,
    promise: Promise | None = None,
) -> Path:
    """Write razor.json to `path`, or into it if it is a folder, and return the file's path.

    The write is atomic: a reader sees the old file or the new one.
    """
    path = _file(path)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "num_kv_heads": split.num_kv_heads,
        "retrieval_heads": [list(heads) for heads in split.retrieval],
        "architecture": split.architecture,
        "weights": split.weights,
        "note": split.note,
        **({"scopes": [list(layer) for layer in split.scopes]} if split.scopes else {}),
        "recommended": None if recommended is None else dataclasses.asdict(recommended),
        **({} if promise is None else {"promise": promise.to_dict()}),
    }
    return write_text(path, _render(data))


def read(path: str | os.PathLike[str]) -> HeadFile:
    """Read razor.json from `path`, or from inside it if it is a folder.

    Raises FileNotFoundError, or ValueError with the file, the field and the allowed values. `with_heads` checks
    whether the split fits a model.
    """
    path = _file(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no head split at {path}; make one with `razor-jax heads find --model … --save {path}`"
        )
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(data: Any) -> HeadFile:
    """Return the contents of a decoded razor.json. Raise ValueError that names the field."""
    if not isinstance(data, dict):
        raise ValueError(f"must be a JSON object, found {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(f"format={data.get('format')!r}: must be {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"version={data.get('version')!r}: this razor_jax reads version {VERSION}")
    texts = {name: _text(data, name) for name in ("architecture", "weights", "note")}
    num_kv_heads = data.get("num_kv_heads")
    if not _integer(num_kv_heads) or num_kv_heads < 1:
        raise ValueError(f"num_kv_heads={num_kv_heads!r}: must be a positive integer")
    layers = data.get("retrieval_heads")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"retrieval_heads={layers!r}: must be a list with one list of KV heads per layer")
    for number, heads in enumerate(layers):
        if not isinstance(heads, list) or not all(_integer(head) for head in heads):
            raise ValueError(f"retrieval_heads[{number}]={heads!r}: must be a list of integers")
    try:
        split = HeadSplit(tuple(map(tuple, layers)), num_kv_heads, **texts, scopes=_scopes(data))
    except ValueError as error:
        raise ValueError(f"retrieval_heads: {error}") from error
    promise = data.get("promise")
    return HeadFile(split, _policy(data.get("recommended")), None if promise is None else Promise.of(promise))


def packaged_path(params: Params) -> Path:
    """Return where a split of this model would be in the package, one per architecture and norms."""
    name = f"{architecture_fingerprint(params.config)[:16]}-{norms_fingerprint(params)[:16]}.json"
    return SPLITS / name


def cache_path(params: Params) -> Path:
    """Return the cached file for the split of this model, one per architecture and weights fingerprint.

    It is under $XDG_CACHE_HOME/razor_jax, or ~/.cache/razor_jax if the variable is unset.
    """
    name = f"{architecture_fingerprint(params.config)[:16]}-{weights_fingerprint(params)[:16]}.json"
    return user_cache() / "heads" / name


def _policy(data: Any) -> RazorConfig | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError(f"recommended={data!r}: must be an object of RazorConfig fields, or null")
    known = [field.name for field in dataclasses.fields(RazorConfig)]
    for name in data:
        if name not in known:
            raise ValueError(f"recommended.{name}: unknown; RazorConfig has {', '.join(known)}")
    if not isinstance(data.get("compensation", True), bool):
        raise ValueError(f"recommended.compensation={data['compensation']!r}: must be true or false")
    try:
        return RazorConfig(**data)
    except ValueError as error:
        raise ValueError(f"recommended.{error}") from error


def _scopes(data: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    layers = data.get("scopes", [])
    if not isinstance(layers, list) or not all(isinstance(x, list) and all(map(_integer, x)) for x in layers):
        raise ValueError(f"scopes={layers!r}: must be a list with one list of scopes, in tokens, per layer")
    return tuple(map(tuple, layers))


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: must be a string")
    return value


def _integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    return path / NAME if path.is_dir() else path


def _render(data: Mapping[str, Any]) -> str:
    """Format JSON with one field per line and one layer of heads per line."""
    layers = ",\n".join(f"    {json.dumps(heads)}" for heads in data["retrieval_heads"])
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in data.items()}
    fields["retrieval_heads"] = f"[\n{layers}\n  ]"
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {value}" for name, value in fields.items()) + "\n}\n"
