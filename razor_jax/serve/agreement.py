"""Do all processes hold the same model, versions and options? Asked before any weight is read."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import razor_jax
from razor_jax.checkpoint import gguf, hub
from razor_jax.heads import store

_SAMPLES, _SAMPLE = 16, 512  # pieces of a weight file that are read, and their bytes
_SIZE = 1 << 16  # bytes of a record, padded
# Files that decide answers, whole; weights are too large for that.
_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "razor.json")
_TEXTS += ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "razor_model.json")
_TEXTS += ("model.safetensors.index.json",)


def versions() -> dict[str, str]:
    """Return the versions that this process runs."""
    return {"razor_jax": razor_jax.__version__, "jax": jax.__version__, "platform": jax.default_backend()}


def describe(model: Path) -> dict[str, str]:
    """Return digests of the files of a model, a folder or a GGUF file, by name."""
    folder = model.is_dir()
    files = {name: model / name for name in _TEXTS} if folder else {store.NAME: hub.beside_model(model)}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
    return digests | {"weights": fingerprint(model)}


def heads_file(path: str) -> str:
    """Return the digest of a razor.json that was named by its path."""
    file = Path(path).expanduser()
    file = file / store.NAME if file.is_dir() else file
    # If no process has the file, `load` reports it.
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"


def as_text(options: Mapping[str, Any]) -> dict[str, str]:
    """Return command line options as text, by name."""
    return {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in options.items()}


def fingerprint(model: Path) -> str:
    """Return the SHA-256 of a model's weights.

    A GGUF file counts whole: its header is the tokenizer too, and loading it takes longer than hashing it. Other weight
    files count by names, sizes and samples, because a process may read a small part of them; a change that misses
    every sample goes unseen.
    """
    file = gguf.find_file(model)
    if file is not None:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path for path in model.rglob("*") if path.is_file() and path.name not in _TEXTS):
        if file.suffix == ".safetensors" or "weights" in file.relative_to(model).parts:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(model).as_posix()} {size}\n".encode())
            with file.open("rb") as content:
                for index in range(_SAMPLES):
                    content.seek(index * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(content.read(_SAMPLE))
    return digest.hexdigest()


def require(record: Mapping[str, str]) -> None:
    """Refuse a run whose processes differ, on every process.

    Raises ValueError that names each process and field that differs from process 0.
    """
    if jax.process_count() == 1:
        return
    held = collections.Counter(device.process_index for device in jax.devices())
    if len(set(held.values())) > 1:
        counts = ", ".join(f"process {process} has {count}" for process, count in sorted(held.items()))
        raise ValueError(f"the processes differ in devices: {counts}; each must bring as many as the others")
    data = np.zeros(_SIZE, np.uint8)
    text = json.dumps(record).encode()
    data[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data))
    records = [json.loads(bytes(row).rstrip(b"\0")) for row in rows]
    problems = [
        f"process {process}, {name}: {_short(theirs.get(name))}, on process 0 {_short(records[0].get(name))}"
        for process, theirs in enumerate(records)
        for name in sorted(records[0].keys() | theirs.keys())
        if theirs.get(name) != records[0].get(name)
    ]
    if problems:
        raise ValueError("the processes do not run the same thing:\n  " + "\n  ".join(problems))


def _short(value: str | None) -> str:
    return "none" if value is None else f"{value[:16]}…" if len(value) == 64 else value
