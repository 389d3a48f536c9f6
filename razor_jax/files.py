"""Atomic writes of files and folders, by one process or by several that share a file system."""

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
    """Yield a temporary path to write to; if the block succeeds, the file replaces `path`, otherwise it is deleted.

    A reader sees either the old file or the new one. Creates the folder of `path`.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{secrets.randbits(32):08x}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically and return its path."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, it replaces `path`, otherwise it is deleted.

    A killed process leaves a `.name.….partial` beside `path`, which may be deleted. One that was killed between the two
    renames leaves the old folder as `.name.….old`; the next call for the same path restores it.

    Every process of a run must enter. Process 0 creates, renames and deletes; the others wait for it.

    Raises FileExistsError, on every process, if `path` is not empty and `overwrite` is false.
    """
    path = path.absolute()
    first = jax.process_index() == 0
    if first:
        _recover(path)
    taken = _not_empty(path) and not overwrite
    if _from_process_0(taken):
        raise FileExistsError(f"{path} already exists: choose another folder, or pass overwrite=True")
    mark = f"{_from_process_0(secrets.randbits(32)):08x}"
    partial, old = path.with_name(f".{path.name}.{mark}.partial"), path.with_name(f".{path.name}.{mark}.old")
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    _barrier(f"{partial} is made")
    try:
        yield partial
        _barrier(f"{partial} is written")
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
    _barrier(f"{path} is in place")
    if first:
        shutil.rmtree(old, ignore_errors=True)


def read_json(file: Path, role: str) -> dict[str, Any]:
    """Return the JSON object in a file; `role` says in an error what the file is for.

    Raises FileNotFoundError or ValueError, with the file's name.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {role}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains a JSON {type(value).__name__}, expected an object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file from process 0."""
    if jax.process_index() == 0:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _recover(path: Path) -> None:
    """Clean up after a killed process: restore the old folder, or delete it if a new one replaced it."""
    if not path.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    # List first, then check `path`: a folder that another process is renaming right now is then not in the list.
    for old in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        if _not_empty(path):
            shutil.rmtree(old, ignore_errors=True)
        elif not path.exists():
            old.rename(path)


def _not_empty(path: Path) -> bool:
    """Return whether `path` is a file or a non-empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _from_process_0(value: int) -> int:
    """Return process 0's value on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.uint32(value)))


def _barrier(where: str) -> None:
    """Wait until every process reaches this call."""
    multihost_utils.sync_global_devices(where)
