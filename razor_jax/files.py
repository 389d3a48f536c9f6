"""Atomic writes of files and folders, from one process or from many that share a file system."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the file takes the place of `path` if the block ends well.

    A reader sees the old file or the new one. Makes the folder.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic within one file system only.
    partial = path.with_name(f".{path.name}.{secrets.randbits(32):08x}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all, and return its path."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside `path`; it takes the place of `path` if the block ends well, and is removed otherwise.

    A killed process leaves a `.name.….partial` beside `path`, which may be removed. If it was killed between two
    renames, the old folder is left as `.name.….old`; the next call for the same path puts it back.

    Every process of a run enters. Process 0 makes, renames and removes, once all have arrived.

    Raises FileExistsError, on every process, where `path` is not empty and `overwrite` is false.
    """
    path = path.absolute()
    first = jax.process_index() == 0
    if first:
        _put_back(path)
    taken = _holds(path) and not overwrite
    if _of_first(taken):
        raise FileExistsError(f"{path} exists already: choose another folder, or pass overwrite=True")
    mark = f"{_of_first(secrets.randbits(32)):08x}"
    partial, old = path.with_name(f".{path.name}.{mark}.partial"), path.with_name(f".{path.name}.{mark}.old")
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    _meet(f"{partial} is made")
    try:
        yield partial
        _meet(f"{partial} is written")
        if first:
            if path.exists():
                path.rename(old)
            partial.rename(path)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
        raise
    _meet(f"{path} is in place")
    if first:
        shutil.rmtree(old, ignore_errors=True)


def read_json(file: Path, role: str) -> dict[str, Any]:
    """Return the JSON object in a file. FileNotFoundError or ValueError name the file; `role` says what it is for."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {role}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file from process 0."""
    if jax.process_index() == 0:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _put_back(path: Path) -> None:
    """Finish what a killed process began: put an old folder back, or remove it where a new one took its place."""
    if not path.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    # Listed before `path` is checked, so that a folder that another process is moving is not among them.
    for old in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        if _holds(path):
            shutil.rmtree(old, ignore_errors=True)
        elif not path.exists():
            old.rename(path)


def _holds(path: Path) -> bool:
    """Return whether there is more than an empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _of_first(value: int) -> int:
    """Return the first process' number, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.uint32(value)))


def _meet(where: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(where)
