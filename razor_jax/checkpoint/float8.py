"""8-bit floats of a safetensors file, which safetensors 0.8 cannot read into NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np


class Float8:
    """Stored tensor of 8-bit floats, with the methods of a safetensors slice. It is mapped into memory, not read.

    The file's header must have been checked, as `safetensors.safe_open` does.
    """

    TYPES: ClassVar = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}

    def __init__(self, file: Path, name: str):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(size))[name]
        self._type, self._shape = entry["dtype"], entry["shape"]
        start = 8 + size + entry["data_offsets"][0]
        count = math.prod(self._shape)
        bytes_ = np.memmap(file, np.uint8, "r", start, (count,)) if count else np.empty(0, np.uint8)
        self._array = bytes_.view(self.TYPES[self._type]).reshape(self._shape)

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return the type, as safetensors spells it."""
        return self._type

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._array[index]
