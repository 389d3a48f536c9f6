"""The progress of a long search or fit in a file, from which a second run resumes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from .files import atomic_file


class State:
    """Arrays of a search or fit after its last finished step; without a file, nothing is kept."""

    def __init__(self, path: Path | None, run: dict[str, object]):
        """Read the file if there is one. `run` describes what runs: model, method, arguments.

        Raises ValueError if the file is the state of something else, or no such file.
        """
        self.path, self.arrays = path, {}
        self._run = json.dumps(run, sort_keys=True, default=str)
        if path is None or not path.exists():
            return
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            theirs = str(arrays.pop("run"))
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not the state of a search or fit: give another file") from error
        if theirs != self._run:
            raise ValueError(f"{path} is the state of another run ({theirs}): delete it, or repeat the first command")
        self.arrays = arrays

    def save(self, **arrays: np.ndarray) -> None:
        """Replace the file, atomically."""
        if self.path is None:
            return
        with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{"run": np.asarray(self._run), **arrays})  # pyright: ignore[reportArgumentType]
