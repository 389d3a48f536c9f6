"""Answers on disk as they come, so that a run that was killed goes on where it stood.

One JSON object a line: `key`, a hash of all that decides an answer (weights, heads, policy, text, options), and what
was found. A line is only ever appended; one that a kill cut short is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_START = b'{"key": "'  # of every line


def key_of(**parts: Any) -> str:
    """Return the SHA-256 of JSON values by name: other values, another key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """The records of one file, by key; None keeps nothing."""

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record under a key, None without one."""
        return self._records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Record it, on disk before this returns."""
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
                    f"{path}, line {number} is no record of a run ({error}): name another file, or remove this"
                ) from error
        tail = data[whole:]
        if tail and tail[: len(_START)] != _START[: len(tail)]:
            raise ValueError(f"{path} is no record of a run: name another file")
        if tail:
            os.truncate(path, whole)
