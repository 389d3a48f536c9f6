"""The header of a GGUF file: metadata fields and where its tensors are.

The file may come from a stranger, so every count and offset is checked against the file's size before anything of that
size is made.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import mmap
import reprlib
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

# Type number -> name, elements per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
# Parsed strings take about ten times their bytes. Real headers have at most about 15 MB and 2,000 tensors.
_HEADER_BYTES = 64 << 20
_ENTRIES = 1 << 16  # tensors, and metadata fields

# Type of a metadata field -> what an error asks for.
_ALLOWED = {
    int: "a whole number, {} or more",
    float: "a finite number, {} or more",
    bool: "true or false",
    str: "a string",
    list: "a list of strings",
    np.ndarray: "a list of whole numbers",
}
_REQUIRED: Any = object()
_T = TypeVar("_T")
_D = TypeVar("_D")

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 80


def short(value: object) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = _shortener.repr(value[:9].tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file: shape as in a checkpoint, [out, in]; type number; bytes [start, end) of the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a file, checked against its size. Lists are of strings; NumPy arrays are of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @overload
    def field(self, name: str, kind: type[_T], *, least: int = 0) -> _T: ...
    @overload
    def field(self, name: str, kind: type[_T], default: _D, *, least: int = 0) -> _T | _D: ...
    def field(self, name: str, kind: type, default: Any = _REQUIRED, *, least: int = 0) -> Any:
        """Return a metadata field.

        Args:
          kind: int, float, bool, str, list (of strings) or np.ndarray (of whole numbers).
          default: value of a missing field; without one the field is required.
          least: smallest allowed number.

        Raises ValueError for a missing field, another type or a number out of range.
        """
        allowed = f"must be {_ALLOWED[kind].format(least)}; use another file"
        if name not in self.metadata:
            if default is not _REQUIRED:
                return default
            raise ValueError(f"{self.path}: {name} is missing: it {allowed}")
        value = self.metadata[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or not _is_valid(value, least):
            raise self.error(name, allowed)
        return value

    def error(self, name: str, what: str) -> ValueError:
        """Return the error about a metadata field; `what` says what is allowed."""
        return ValueError(f"{self.path}: {name}={short(self.metadata.get(name))}: {what}")

    def refuse_unread(self, prefix: str, read: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise ValueError for a field that would be ignored although it may change the results.

        Args:
          prefix: only fields with this prefix are checked; others describe the file.
          read: patterns of names after the prefix: fields that the caller reads or that change nothing.
          neutral: values that change nothing, by name after the prefix.
        """
        for name, value in self.metadata.items():
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or any(fnmatch.fnmatchcase(rest, pattern) for pattern in read):
                continue
            allowed = neutral.get(rest, ())
            if isinstance(value, np.ndarray) or value not in allowed:
                raise ValueError(
                    f"{self.path}: metadata field {short(name)} is {short(value)}, which is not supported: it must be "
                    f"{' or '.join([*map(repr, allowed), 'absent'])}; use another file, or the model's safetensors"
                )


def _is_valid(value: Any, least: int) -> bool:
    """Return whether a value of the right type is in range."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iu"
    if isinstance(value, float):
        return math.isfinite(value) and value >= least
    return not isinstance(value, int) or value >= least


def read_header(path: Path) -> Header:
    """Return metadata and tensors of a file.

    Raises ValueError for a file that is not GGUF, is cut short, is one part of several, or claims sizes that it does
    not have.
    """
    status = path.stat()
    if status.st_size < 24:
        raise ValueError(f"{path} is not a GGUF file: it has {status.st_size} bytes")
    return _cached_header(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _cached_header(path: Path, size: int, changed: int) -> Header:
    """Parse a header once per version of a file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Parser(path, data).header()


class _Parser:
    """Reads a header front to back; every length is checked before anything of that length is made."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise self._error("it does not start with GGUF: not a GGUF file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._error(f"version {version}: versions 2 and 3, little-endian, are read")
        count, pairs = self._count("tensors", 32, _ENTRIES), self._count("metadata fields", 13, _ENTRIES)
        header = Header(self._path, {}, {})
        for _ in range(pairs):
            name = self._string()
            if name in header.metadata:
                raise self._error(f"metadata field {short(name)} is there twice: the file is damaged; use another one")
            header.metadata[name] = self._value(self._scalar("I"), short(name))
        if header.field("split.count", int, 0) > 1:
            raise header.error(
                "split.count",
                "this is one part of a model in several files; join them with `llama-gguf-split --merge FIRST_PART "
                "MODEL.gguf` and load that file",
            )
        infos = [self._tensor_info() for _ in range(count)]
        alignment = header.field("general.alignment", int, _ALIGNMENT, least=1)
        if alignment & (alignment - 1) or alignment > _MAX_ALIGNMENT:
            raise header.error("general.alignment", f"must be a power of two, 1 to {_MAX_ALIGNMENT:,}")
        base = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            if name in header.tensors:
                raise self._error(f"tensor {short(name)} is there twice: the file is damaged; use another one")
            header.tensors[name] = self._placed(short(name), base, shape, kind, offset)
        return header

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self._error(f"tensor {short(name)} has {dimensions} dimensions: 1 to {_DIMENSIONS} are read")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _placed(self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        """Check that a tensor is inside the file. Types that are not read take no bytes here."""
        _, block, size = TYPES.get(kind, ("", 1, 0))
        if shape[-1] % block:
            raise self._error(f"tensor {name} {list(shape)}: rows are not whole blocks of {block}")
        start, length = base + offset, math.prod(shape) // block * size
        if start + length > len(self._data):
            raise self._error(
                f"tensor {name} {list(shape)} would end at byte {start + length:,} of {len(self._data):,}: the file is "
                "cut short or damaged; download it again"
            )
        return TensorInfo(shape, kind, start, start + length)

    def _value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._error(f"metadata field {name} has type {kind}, which GGUF does not have")
        inner = self._scalar("I")
        if inner == _STRING:
            return self._strings(self._count(f"strings of {name}", 8))
        if inner not in _SCALARS:
            raise self._error(f"metadata field {name} is an array of type {inner}, which is not read")
        item = np.dtype(_SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self._take(self._count(f"entries of {name}", item.itemsize) * item.itemsize), item)

    def _strings(self, count: int) -> list[str]:
        """Read an array of strings. A vocabulary is so long that a call per string would take a second."""
        data, most, found = self._data, min(len(self._data), _HEADER_BYTES), []
        for _ in range(count):
            start = self._at + 8
            end = start + int.from_bytes(data[self._at : start], "little")
            if end > most:
                self._string()  # raises, and says why
            found.append(data[start:end].decode("utf-8", errors="replace"))
            self._at = end
        return found

    def _string(self) -> str:
        return self._take(self._count("bytes of a string", 1)).decode("utf-8", errors="replace")

    def _count(self, what: str, size: int, most: int | None = None) -> int:
        """Read a count of things that take at least `size` bytes each."""
        most = _HEADER_BYTES // size if most is None else most
        count, left = self._scalar("Q"), len(self._data) - self._at
        if count * size > left:
            raise self._error(f"{count:,} {what} are announced, {left:,} bytes are left: cut short or damaged")
        if count > most:
            raise self._error(f"{count:,} {what} are announced: at most {most:,} are read; the file is damaged")
        return count

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise self._error("the header ends early: the file is cut short; download it again")
        self._at += count
        if self._at > _HEADER_BYTES:
            raise self._error(f"the header has more than {_HEADER_BYTES:,} bytes: the file is damaged; use another one")
        return self._data[self._at - count : self._at]

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}")
