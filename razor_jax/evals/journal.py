"""Results on disk as they are computed, so that a killed run resumes where it stopped.

Each line is a JSON object with the result and its `key`, a hash of everything that decides it (weights, heads, policy,
text, options). Lines are only appended. A last line that a kill left incomplete is removed when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_START = b'{"key": "'  # how every line starts


def key_of(**parts: Any) -> str:
    """Return a SHA-256 of named JSON values, the same for equal values only."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """Records of one file, by key; without a file they are in memory only."""

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key, None if it is missing."""
        return self._records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Add a record; it is on disk when this returns."""
        self._records[key] = dict(record)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **record}, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a record of a run ({error}): name another file, or delete this one"
                ) from error
        tail = data[whole:]
        if tail and tail[: len(_START)] != _START[: len(tail)]:
            raise ValueError(f"{path} is not a record of a run: name another file")
        if tail:
            os.truncate(path, whole)
