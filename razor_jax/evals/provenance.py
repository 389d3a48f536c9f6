"""What a table of figures needs beside it, to be repeated: machine, versions, command, weights. And atomic JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..params import Params, architecture_fingerprint, weights_fingerprint
from .bench import machine

_PACKAGES = ("razor-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
_INNERMOST, _BREAK = re.compile(r"[\[{][^\[\]{}]*[\]}]"), re.compile(r"\n\s*")


def provenance(params: Params, model: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, versions of what computed (and of `packages`), the command line, the model and its fingerprints.

    A folder is named without its path: that is this machine's.
    """
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "weights": weights_fingerprint(params),
        "architecture": architecture_fingerprint(params.config),
        "dtype": str(params.dtype),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
    }


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write a JSON file whole or not at all; returns its path. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        # Lists of numbers and records without parts go on one line: there are thousands. A string never holds a bare
        # line break, so nothing but the layout changes.
        text = _INNERMOST.sub(lambda found: _BREAK.sub(" ", found.group()), text)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
