"""A quantised matrix as a tensor to read from, and the checks that all formats share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_SHOWN = 5  # problems in an error
FLOATS = ("F32", "F16", "BF16")

Decode = Callable[[slice, slice], np.ndarray]  # rows (outputs), columns (inputs) -> float32


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A quantised matrix [outputs, inputs] that reads like a stored float32 tensor. Only the read part is decoded."""

    shape: tuple[int, int]
    decode: Decode

    def get_shape(self) -> list[int]:
        """Return [outputs, inputs]."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the type, as safetensors spells it."""
        return "F32"

    def __getitem__(self, index: slice | Sequence[slice]) -> np.ndarray:
        parts = [index] if isinstance(index, slice) else [*index]
        parts += [slice(None)] * (2 - len(parts))
        ends = (part.indices(size) for part, size in zip(parts, self.shape, strict=True))
        return self.decode(*(slice(start, stop) for start, stop, _ in ends))


class Matrices:
    """Tensors of a checkpoint while its quantised matrices are put together, and what is wrong with them."""

    def __init__(self, found: Mapping[str, Any]):
        self._found = dict(found)
        self._problems: list[str] = []

    def bases(self, suffix: str) -> list[str]:
        """Return the names of the matrices that have a tensor of this suffix, without it."""
        return [name.removesuffix(suffix) for name in self._found if name.endswith(suffix)]

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor."""
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; of one that is missing or no matrix, (0, 0), and the problem is noted."""
        if name not in self._found:
            self.problem(f"{name} is missing")
            return (0, 0)
        shape = tuple(self._found[name].get_shape())
        if len(shape) != 2:
            self.problem(f"{name} has shape {list(shape)}, expected a matrix")
            return (0, 0)
        return shape

    def take(self, name: str, shapes: Sequence[Sequence[int]], types: Sequence[str]) -> Any:
        """Return a stored tensor and remove it; note a problem if it is missing or has none of these shapes and types.

        Returns None then.
        """
        tensor = self._found.pop(name, None)
        if tensor is None:
            return self.problem(f"{name} is missing")
        if list(tensor.get_shape()) not in [list(shape) for shape in shapes]:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            return self.problem(f"{name} has shape {list(tensor.get_shape())}, expected {expected}")
        if tensor.get_dtype() not in types:
            return self.problem(f"{name} has type {tensor.get_dtype()}, expected {', '.join(types)}")
        return tensor

    def drop(self, suffix: str) -> None:
        """Remove tensors that only the original runtime needs."""
        for base in self.bases(suffix):
            del self._found[base + suffix]

    def put(self, base: str, shape: tuple[int, int], decode: Decode) -> None:
        """Add the matrix of a base name."""
        self._found[f"{base}.weight"] = Decoded(shape, decode)

    def divides(self, base: str, group_size: int, inputs: int) -> bool:
        """Return whether whole groups make up the inputs, and note the problem if they do not."""
        if group_size < 1 or inputs % group_size:
            self.problem(f"{base}: group_size={group_size} does not divide its {inputs} inputs")
            return False
        return True

    def problem(self, words: str) -> None:
        """Note what is wrong."""
        self._problems.append(words)

    def result(self) -> dict[str, Any]:
        """Return all tensors by name; raise ValueError for the problems."""
        if self._problems:
            rest = len(self._problems) - _SHOWN
            more = f"; and {rest} more" if rest > 0 else ""
            raise ValueError(
                f"the quantised weights are damaged: {'; '.join(self._problems[:_SHOWN])}{more}; copy or download the "
                "checkpoint again"
            )
        return self._found


def choice(fields: Mapping[str, Any], name: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """Return a field of the quantisation config; raise ValueError if it has another value than the allowed ones."""
    value = fields.get(name, default)
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} in the quantisation config is not read: it must be {' or '.join(map(repr, allowed))}; "
            "use the bfloat16 or float16 checkpoint that it was made from"
        )
    return value


def group_size_of(fields: Mapping[str, Any], default: int) -> int:
    """Return the inputs that share a scale, -1 for all of them."""
    size = fields.get("group_size", default)
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ValueError(f"group_size={size!r} in the quantisation config: must be a positive whole number, or -1")
    return size


def aligned(part: slice, unit: int) -> tuple[slice, slice]:
    """Return the units of `unit` elements that hold `part`, and where in them it is."""
    first = part.start // unit
    return slice(first, -(-part.stop // unit)), slice(part.start - first * unit, part.stop - first * unit)


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Return the unsigned integers that are packed into 32-bit words along an axis, lowest bits first, as float32."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    last = np.moveaxis(words.astype(np.uint32), axis, -1)
    numbers = (last[..., None] >> shifts) & np.uint32(2**bits - 1)
    return np.moveaxis(numbers.reshape(*last.shape[:-1], -1), -1, axis).astype(np.float32)


def spread(scales: np.ndarray, group_size: int, within: slice) -> np.ndarray:
    """Return the scale of each input [rows, inputs] from those of groups [rows, groups], as float32."""
    return np.repeat(scales.astype(np.float32), group_size, axis=1)[:, within]
