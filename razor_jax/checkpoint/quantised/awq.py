"""AWQ in 4 bits (AutoAWQ's "gemm" layout): groups of inputs with scale and zero point.

qweight [inputs, outputs / 8]   int32; the 8 outputs of a word are in the order 0 2 4 6 1 3 5 7, lowest bits first
qzeros  [groups, outputs / 8]   int32, packed alike
scales  [groups, outputs]
weight = scales · (qweight - zero)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .decoded import FLOATS, Matrices, aligned, choice, group_size_of, spread, unpack

_WEIGHT, _PER = ".qweight", 8
_PLACE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # which bits of a word hold each output


def decode(fields: Mapping[str, Any], matrices: Matrices) -> None:
    """Put together the AWQ matrices of a checkpoint."""
    choice(fields, "bits", (4,))
    choice(fields, "version", ("gemm", "GEMM"), default="gemm")
    choice(fields, "zero_point", (True,), default=True)
    size = group_size_of(fields, 128)
    for base in matrices.bases(_WEIGHT):
        inputs, words = shape = matrices.shape(base + _WEIGHT)
        each = inputs if size == -1 else size
        if not matrices.divides(base, each, inputs):
            continue
        qweight = matrices.take(base + _WEIGHT, [shape], ["I32"])
        qzeros = matrices.take(f"{base}.qzeros", [(inputs // each, words)], ["I32"])
        scales = matrices.take(f"{base}.scales", [(inputs // each, words * _PER)], FLOATS)
        if qweight is not None and qzeros is not None and scales is not None:
            part = functools.partial(_part, qweight, qzeros, scales, each)
            matrices.put(base, (words * _PER, inputs), part)


def _part(qweight: Any, qzeros: Any, scales: Any, group_size: int, rows: slice, columns: slice) -> np.ndarray:
    (words, row), (groups, column) = aligned(rows, _PER), aligned(columns, group_size)
    numbers, zeros = (_outputs(stored[part, words])[:, row] for stored, part in ((qweight, columns), (qzeros, groups)))
    zeros, scale = (spread(x.T, group_size, column) for x in (zeros, scales[groups, rows]))
    return scale * (numbers.T - zeros)


def _outputs(words: np.ndarray) -> np.ndarray:
    """Return the numbers of words [n, outputs / 8] in the order of the outputs, float32 [n, outputs]."""
    numbers = unpack(words, 4, axis=1)
    return numbers.reshape(len(words), -1, _PER)[:, :, _PLACE].reshape(numbers.shape)
