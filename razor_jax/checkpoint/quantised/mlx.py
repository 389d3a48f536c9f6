"""MLX in 4 or 8 bits: groups of inputs with scale and bias, embeddings included.

weight [outputs, inputs / per]   uint32, packed along the inputs
scales, biases [outputs, groups]
weight = scales · number + biases
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .decoded import FLOATS, Matrices, aligned, choice, group_size_of, spread, unpack

_SCALES = ".scales"


def decode(fields: Mapping[str, Any], matrices: Matrices) -> None:
    """Put together the quantised matrices of a checkpoint. A layer may have bits and group size of its own."""
    for base in matrices.bases(_SCALES):
        own = fields.get(base)
        own = {**fields, **own} if isinstance(own, Mapping) else fields
        choice(own, "mode", ("affine",), default="affine")
        bits, size = choice(own, "bits", (4, 8)), group_size_of(own, 64)
        outputs, words = shape = matrices.shape(f"{base}.weight")
        inputs = words * 32 // bits
        if not matrices.divides(base, size, inputs):
            continue
        weight = matrices.take(f"{base}.weight", [shape], ["U32"])
        scales, biases = (
            matrices.take(f"{base}.{name}", [(outputs, inputs // size)], FLOATS) for name in ("scales", "biases")
        )
        if weight is not None and scales is not None and biases is not None:
            matrices.put(base, (outputs, inputs), functools.partial(_part, weight, scales, biases, bits, size))


def _part(weight: Any, scales: Any, biases: Any, bits: int, size: int, rows: slice, columns: slice) -> np.ndarray:
    (words, column), (groups, within) = aligned(columns, 32 // bits), aligned(columns, size)
    scale, bias = (spread(stored[rows, groups], size, within) for stored in (scales, biases))
    return scale * unpack(weight[rows, words], bits, axis=1)[:, column] + bias
