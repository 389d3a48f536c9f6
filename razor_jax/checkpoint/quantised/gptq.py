"""GPTQ in 4 or 8 bits (AutoGPTQ, GPTQModel): groups of inputs with scale and zero point, in any order (act-order).

qweight [inputs / per, outputs]   int32, packed along the inputs
qzeros  [groups, outputs / per]   int32, packed along the outputs; version 1 stores the zero point minus 1
scales  [groups, outputs]
g_idx   [inputs]                  group of each input; without it, inputs are in the order of the groups
weight = scales · (qweight - zero)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .decoded import FLOATS, Matrices, aligned, choice, group_size_of, unpack

_WEIGHT = ".qweight"


class _Stored(NamedTuple):
    """Tensors of a matrix, the group of each input, and what is added to stored zero points."""

    qweight: Any
    qzeros: Any
    scales: Any
    groups: np.ndarray
    bits: int
    above: int


def decode(fields: Mapping[str, Any], matrices: Matrices) -> None:
    """Put together the GPTQ matrices of a checkpoint."""
    bits = choice(fields, "bits", (4, 8))
    version = choice(fields, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    size, per = group_size_of(fields, -1), 32 // bits
    for base in matrices.bases(_WEIGHT):
        words, outputs = shape = matrices.shape(base + _WEIGHT)
        inputs = words * per
        each = inputs if size == -1 else size
        if not matrices.divides(base, each, inputs):
            continue
        count = inputs // each
        qweight = matrices.take(base + _WEIGHT, [shape], ["I32"])
        qzeros = matrices.take(f"{base}.qzeros", [(count, outputs // per)], ["I32"])
        scales = matrices.take(f"{base}.scales", [(count, outputs)], FLOATS)
        groups = _groups(matrices, base, inputs, count, needed=bool(fields.get("desc_act")))
        if qweight is None or qzeros is None or scales is None or groups is None:
            continue
        stored = _Stored(qweight, qzeros, scales, groups, bits, 1 if version == "gptq" else 0)
        matrices.put(base, (outputs, inputs), functools.partial(_part, stored))


def _groups(matrices: Matrices, base: str, inputs: int, count: int, needed: bool) -> np.ndarray | None:
    """Return the group of each input, int [inputs]; note a problem if it is missing but needed, or out of range."""
    if not needed and not matrices.has(f"{base}.g_idx"):
        return np.arange(inputs) // (inputs // count)
    stored = matrices.take(f"{base}.g_idx", [(inputs,)], ["I32"])
    if stored is None:
        return None
    groups = stored[:]
    if groups.min() < 0 or groups.max() >= count:
        return matrices.problem(f"{base}.g_idx names groups {groups.min()} to {groups.max()}, there are {count}")
    return groups


def _part(stored: _Stored, rows: slice, columns: slice) -> np.ndarray:
    per, groups = 32 // stored.bits, stored.groups[columns]
    (words, column), (zero_words, row) = aligned(columns, per), aligned(rows, per)
    first, last = groups.min(), groups.max() + 1
    scales = stored.scales[first:last, rows].astype(np.float32)[groups - first]
    zeros = unpack(stored.qzeros[first:last, zero_words], stored.bits, axis=1)[:, row][groups - first] + stored.above
    return (scales * (unpack(stored.qweight[words, rows], stored.bits, axis=0)[column] - zeros)).T
